"""The fit of host constants, on a server whose latencies are known in closed form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from planner.calibrate import TERMS, Runs, bounded_ridge, host_of, narrowed, values_of
from planner.errors import RefusalError
from simulator.engine_rules import HostConstants
from simulator.units import MS_PER_S

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

_LOADS = np.array([1.0, 4.0, 16.0, 64.0, 128.0, 256.0])
_NOISE = np.array([0.05, 0.15])
_SHIPPED = HostConstants(
    iteration_s=0.0005, sequence_s=0.01e-3, ingress_s=5e-3, prefill_multiplier=1.1
)
_TRUE = HostConstants(
    iteration_s=0.0015, sequence_s=0.03e-3, ingress_s=9e-3, prefill_multiplier=1.3
)


def _server(host: HostConstants) -> Floats:
    """Logarithms of TPOT and TTFT, (loads, 2): device time plus what the constants add."""
    prompt_ms = 60.0 * host.prefill_multiplier
    step_ms = (
        8.0
        + 0.05 * _LOADS
        + MS_PER_S * (host.iteration_s + host.sequence_s * _LOADS)
        + 0.02 * _LOADS * prompt_ms
    )
    ttft_ms = MS_PER_S * host.ingress_s + prompt_ms * (1 + 0.1 * _LOADS) + step_ms
    return np.log(np.stack([step_ms, ttft_ms], axis=1))


def _runs(measured: Floats, shipped: HostConstants = _SHIPPED) -> Runs:
    return Runs(_server, measured, _NOISE, shipped)


def test_values_and_constants_round_trip() -> None:
    """Values and constants round trip."""
    again = host_of(values_of(_TRUE), _TRUE.eager_layer_s)
    assert values_of(again) == pytest.approx(values_of(_TRUE))
    assert len(values_of(_TRUE)) == len(TERMS)


def test_fit_moves_towards_the_true_constants_and_predicts() -> None:
    """Fit moves towards the true constants and predicts."""
    fitted = _runs(_server(_TRUE)).fit()
    before = np.abs(_server(_SHIPPED) - _server(_TRUE)).mean()
    after = np.abs(_server(fitted.host) - _server(_TRUE)).mean()
    assert after < 0.2 * before
    assert fitted.values[3] == pytest.approx(1.3, abs=0.05)


def test_what_runs_do_not_tell_stays_as_it_was() -> None:
    """What runs do not tell stays as it was."""
    measured = _server(_TRUE)
    measured[:, 1] = np.nan  # without a TTFT nothing tells the ingress
    fitted = _runs(measured).fit()
    ingress = [term.name for term in TERMS].index("ingress_ms")
    assert fitted.values[ingress] == pytest.approx(fitted.shipped[ingress])
    assert fitted.spread[ingress] == pytest.approx(1.0)
    assert (fitted.spread <= 1.0 + 1e-9).all()


def test_true_runs_are_accepted_and_held_out_errors_fall() -> None:
    """True runs are accepted and held out errors fall."""
    runs = _runs(_server(_TRUE))
    fitted = runs.fit()
    judged = runs.judge(fitted)
    runs.check(fitted, judged)
    assert (judged.after < judged.before).all()
    assert judged.folds == 5


@pytest.mark.parametrize("seed", range(8))
def test_shuffled_values_are_refused(seed: int) -> None:
    """Shuffled values are refused."""
    order = np.random.default_rng(seed).permutation(len(_LOADS))
    runs = _runs(_server(_TRUE)[order])
    fitted = runs.fit()
    with pytest.raises(RefusalError):
        runs.check(fitted, runs.judge(fitted))


def test_constants_that_fit_already_are_not_replaced() -> None:
    """Constants that fit already are not replaced."""
    runs = _runs(_server(_TRUE), shipped=_TRUE)
    fitted = runs.fit()
    with pytest.raises(RefusalError, match="does not help"):
        runs.check(fitted, runs.judge(fitted))


def test_runs_that_nothing_explains_are_refused() -> None:
    """Runs that nothing explains are refused."""
    runs = _runs(_server(_TRUE) + np.log(4.0))
    fitted = runs.fit()
    with pytest.raises(RefusalError, match="no setting"):
        runs.check(fitted, runs.judge(fitted))


def test_one_broken_run_does_not_pull_the_fit() -> None:
    """One broken run does not pull the fit."""
    measured = _server(_TRUE)
    clean = _runs(measured).fit()
    measured[2] += np.log(2.0)
    broken = _runs(measured).fit()
    spreads = np.array([term.spread for term in TERMS])
    assert (np.abs(broken.values - clean.values) < spreads).all()


def test_ridge_keeps_to_its_bounds() -> None:
    """Ridge keeps to its bounds."""
    low, high = np.array([-0.5, 0.0]), np.array([0.5, 3.0])
    rows, target = np.array([[4.0, 0.0], [0.0, 4.0]]), np.array([8.0, -8.0])
    assert bounded_ridge(rows, target, low, high) == pytest.approx([0.5, 0.0])
    free = bounded_ridge(rows, target, low - 9, high + 9)
    assert free == pytest.approx([32 / 17, -32 / 17])


def test_another_run_narrows_along_its_slopes_only() -> None:
    """Another run narrows along its slopes only."""
    slopes = np.array([[0.3, 0.0, 0.0, 0.0]])
    after = narrowed(np.eye(4), slopes, np.array([0.05]))
    assert after[0, 0] == pytest.approx(0.05**2 / (0.3**2 + 0.05**2))
    assert np.diag(after)[1:] == pytest.approx(1.0)
