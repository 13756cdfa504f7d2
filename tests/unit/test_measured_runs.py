"""Calibration end to end: runs of a simulated server with other constants than the engine's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

from planner.calibrate import host_of
from planner.errors import InputError, RefusalError
from planner.io.measurements import METRICS, Lengths, MeasuredFile, Measurement
from planner.measured_runs import _logs, _Server, calibrate
from tests.problems import scenario

if TYPE_CHECKING:
    from collections.abc import Sequence

TRUE = (2.0, 0.05, 6.0, 1.4)
"""Milliseconds per iteration and per sequence, ingress, prefill multiplier."""


def _run(load: int, prompt: int, metrics: dict[str, float]) -> Measurement:
    return Measurement(
        source=f"c{load}.json",
        plan="",
        concurrency=load,
        request_rate=0.0,
        num_requests=2 * load,
        prompt=Lengths(prompt, prompt),
        output=Lengths(8, 8),
        metrics=metrics,
    )


def _file(values: Sequence[dict[str, float]]) -> MeasuredFile:
    runs = tuple(
        _run(load, prompt, own) for (load, prompt), own in zip(_LOADS, values, strict=True)
    )
    return MeasuredFile("runs", "0" * 64, runs)


_LOADS = tuple((load, prompt) for prompt in (64, 900) for load in (1, 4, 12))


@pytest.fixture(scope="module")
def measured() -> list[dict[str, float]]:
    """TPOT and TTFT of a server whose constants are `TRUE`."""
    server = _Server(scenario())
    loaded = [server.loaded(_run(*load, {"mean_tpot_ms": 1.0}), "tp1") for load in _LOADS]
    logs = _logs(loaded, host_of(TRUE, 0.0))
    names = [METRICS.index(name) for name in ("mean_tpot_ms", "mean_ttft_ms")]
    return [{METRICS[j]: math.exp(row[j]) for j in names} for row in logs]


def test_the_file_says_what_was_learnt(measured: list[dict[str, float]]) -> None:
    """Held-out errors fall, constants move towards the true ones, a further run is proposed."""
    found = calibrate(scenario(), [_file(measured)], plan="tp1")
    held = found.held_out
    assert held.after_pct["mean_tpot_ms"] < 0.5 * held.before_pct["mean_tpot_ms"]
    own = found.constants
    assert own.iteration_ms.before < 1.2 < own.iteration_ms.value < 2.2
    assert found.calibrated.plans == ("tp1",)
    assert found.next_run is not None
    assert found.next_run.spread_after_pct < found.next_run.spread_before_pct


def test_shuffled_values_are_refused(measured: list[dict[str, float]]) -> None:
    """The values of another run each."""
    order = np.random.default_rng(1).permutation(len(measured))
    with pytest.raises(RefusalError):
        calibrate(scenario(), [_file([measured[i] for i in order])], plan="tp1")


def test_too_little_is_refused(measured: list[dict[str, float]]) -> None:
    """Three runs, no plan, a plan that does not exist or does not fit the pool."""
    whole = _file(measured)
    few = MeasuredFile("few", "0" * 64, whole.runs[:3])
    with pytest.raises(RefusalError, match="too few"):
        calibrate(scenario(), [few], plan="tp1")
    with pytest.raises(InputError, match="plan: is not stated"):
        calibrate(scenario(), [whole])
    with pytest.raises(InputError, match="is not a plan"):
        calibrate(scenario(), [whole], plan="wide")
    with pytest.raises(RefusalError, match="more devices"):
        calibrate(scenario(), [whole], plan="8xtp1")


def test_requests_that_the_server_would_not_take_are_named(
    measured: list[dict[str, float]],
) -> None:
    """Prompt and output beyond the scenario's max_model_len."""
    whole = _file(measured)
    longer = MeasuredFile("l", "0" * 64, (*whole.runs, _run(1, 1020, measured[0])))
    with pytest.raises(InputError, match="max_model_len"):
        calibrate(scenario(), [longer], plan="tp1")
