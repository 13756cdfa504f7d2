"""An engine's host constants from measured runs of one plan: the most likely ones under a prior.

Few constants, each with a physical meaning (`TERMS`). They start at the constants in use and are
pulled back towards them: a term lies one prior spread off at the price of one typical model error.
Errors enter as logarithms of predicted over measured, and those beyond two typical errors count
less than squared, so that one broken run does not pull the fit.

Simulated means are steps and ramps of the constants (a request that arrives a microsecond later
joins the next batch), so slopes are taken over a whole prior spread; Gauss-Newton steps on those
are steadier than a line search with small differences.

What is not in the runs is not learnt: a term whose spread the runs hardly narrow is reported, and
held-out runs judge the whole (`judge`). Runs whose measured values do not follow their loads are
refused: shuffled values fit no better paired than crossed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from planner.errors import RefusalError
from simulator.engine_rules import HostConstants
from simulator.units import S_PER_MS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Bools = npt.NDArray[np.bool_]
    Predict = Callable[[HostConstants], Floats]


@dataclass(frozen=True)
class Term:
    """One constant of a calibration.

    Parameters
    ----------
    name, unit
        Its name in engine profiles, and the unit in words; empty: a factor.
    low, high
        Bounds.
    spread
        Prior spread round the constant in use.
    meaning
        One line for people.

    """

    name: str
    unit: str
    low: float
    high: float
    spread: float
    meaning: str


TERMS: Final = (
    Term("iteration_ms", "ms", 0.0, 20.0, 0.5, "host time of every iteration"),
    Term("sequence_ms", "ms", 0.0, 2.0, 0.02, "host time per sampled sequence"),
    Term("ingress_ms", "ms", 0.0, 100.0, 5.0, "from the client's send to the scheduler's queue"),
    Term("prefill_multiplier", "", 1.0, 4.0, 0.15, "factor on device time of prompt iterations"),
)
"""What is calibrated. Spreads are about those of the constants that public engines of 2025 and 2026
need (bench/host_fits.json: 0.1 to 1.7 ms, 0.002 to 0.06 ms, 0.2 to 19 ms, 1.0 to 1.1; mixtures of
experts up to 2.7).

A factor on all device time and one on all-reduces were tried beside these. Runs of one tp do not
tell them (they keep 0.5 to 1.0 of their prior spread), and the other tps came out worse: TPOT 5.1
for 4.7 % from tp2 of Llama-70B on vLLM, 5.5 and 5.9 for 4.4 and 4.6 % from tp4 and tp8 of Qwen3-32B
on SGLang."""

NOISE: Final = {
    "mean_tpot_ms": 0.05,
    "mean_ttft_ms": 0.15,
    "mean_e2el_ms": 0.05,
    "output_throughput": 0.05,
}
"""Typical relative error of a prediction, by metric. A fit on a whole cluster of the development
runs leaves TPOT 2 to 4 %, TTFT 5 to 12 %; errors of runs of one plan hang together, so that they
say less than as many independent ones, hence the rest."""

_SOFT: Final = 2.0
"""Errors beyond so many typical ones count less than squared."""
_STEPS: Final = 3
"""Gauss-Newton steps; the third moves no constant by more than a tenth of its spread."""
_HALF: Final = 0.5
"""Slopes are taken from half a spread below to half a spread above."""

LEAST_RUNS: Final = 4
"""Runs that a calibration needs: with fewer nothing can be held out."""
_FOLDS: Final = 5
IDENTIFIED: Final = 0.7
"""A term whose spread the runs leave above this share of the prior's is not told by them."""

_PAIRINGS: Final = 200
_PAIRED_SHARE: Final = 0.01
"""Share of the crossed pairings that may fit as well as the true one."""
_TELLING: Final = 0.1
"""Least spread of predicted logarithms for the pairing to tell anything."""
_MOST_ERROR: Final = 0.35
"""Median error beyond which no setting of the constants explains the runs. Runs under wrong
settings (KV cache of another dtype, half the memory) come out at 10 to 30 %."""


def values_of(host: HostConstants) -> Floats:
    """(4,) constants in the units of `TERMS`."""
    in_ms = (host.iteration_s, host.sequence_s, host.ingress_s)
    return np.array([*(value / S_PER_MS for value in in_ms), host.prefill_multiplier])


def host_of(values: Sequence[float] | Floats, eager_layer_s: float) -> HostConstants:
    """Constants from values in the units of `TERMS`; the eager floor stays as it is."""
    iteration_ms, sequence_ms, ingress_ms, prefill = map(float, values)
    return HostConstants(
        iteration_s=iteration_ms * S_PER_MS,
        sequence_s=sequence_ms * S_PER_MS,
        ingress_s=ingress_ms * S_PER_MS,
        eager_layer_s=eager_layer_s,
        prefill_multiplier=max(prefill, 1.0),
    )


@dataclass(frozen=True, eq=False)
class Posterior:
    """What runs tell of the constants.

    Parameters
    ----------
    shipped, values
        (4,) constants in use before, and the most likely ones, in the units of `TERMS`.
    covariance
        (4, 4) of the constants, in prior spreads.
    eager_layer_s
        Constant that is not calibrated.

    """

    shipped: Floats
    values: Floats
    covariance: Floats
    eager_layer_s: float

    @property
    def host(self) -> HostConstants:
        """The constants, as the simulator takes them."""
        return host_of(self.values, self.eager_layer_s)

    @property
    def spread(self) -> Floats:
        """(4,) spread left, in prior spreads."""
        left: Floats = np.sqrt(np.diag(self.covariance))
        return left


@dataclass(frozen=True, eq=False)
class Judgement:
    """Errors on runs that a fit did not see.

    Parameters
    ----------
    before, after
        By metric, mean absolute relative error of the constants in use and of those fitted to the
        other folds; NaN where nothing was measured.
    folds
        Parts that the runs were split into.

    """

    before: Floats
    after: Floats
    folds: int


class Runs:
    """Measured runs, and what simulates them.

    Parameters
    ----------
    predict
        Logarithms of the predicted metrics under given constants, (N, M); NaN: not predicted.
    measured
        Logarithms of the measured ones, (N, M); NaN: not measured.
    noise
        (M,) typical relative error of each metric.
    shipped
        Constants in use.

    """

    def __init__(
        self, predict: Predict, measured: Floats, noise: Floats, shipped: HostConstants
    ) -> None:
        self._predict, self._measured, self._noise = predict, measured, noise
        self._eager_layer_s = shipped.eager_layer_s
        self._prior = values_of(shipped)
        self._spread = np.array([term.spread for term in TERMS])
        # A constant in use may lie outside the bounds (vLLM 0.6); it is not pushed back in.
        low = np.minimum([term.low for term in TERMS], self._prior)
        high = np.maximum([term.high for term in TERMS], self._prior)
        self._low = (low - self._prior) / self._spread
        self._high = (high - self._prior) / self._spread
        self._cache: dict[bytes, Floats] = {}

    def fit(self) -> Posterior:
        """Most likely constants of all runs."""
        everything = np.ones(len(self._measured), bool)
        at = np.zeros(len(TERMS))
        for _ in range(_STEPS):
            slopes = self.slopes(at)
            here = at
            at, precision = self._step(here, slopes, everything)
        return self._posterior(at, precision)

    def judge(self, fitted: Posterior) -> Judgement:
        """Errors of each fold by constants of the others.

        Folds take every fifth run in the order of predicted TPOT and TTFT, so that each holds
        light loads and heavy ones. Slopes are those at the constants fitted to all runs; measured
        values of a fold have no part in what predicts it.
        """
        folds = min(_FOLDS, len(self._measured))
        prior = self._errors(np.zeros(len(TERMS)))
        order = np.argsort(np.argsort(np.nansum(self._logs(np.zeros(len(TERMS))), axis=1)))
        at = (fitted.values - self._prior) / self._spread
        slopes = self.slopes(at)
        after = np.full(self._measured.shape, np.nan)
        for fold in range(folds):
            mine = order % folds == fold
            own, _ = self._step(at, slopes, ~mine)
            after[mine] = self._errors(own)[mine]
        return Judgement(_mean_size(prior), _mean_size(after), folds)

    def check(self, fitted: Posterior, judged: Judgement) -> None:
        """Refuse what does not calibrate.

        Raises
        ------
        RefusalError
            If no setting explains the runs, if measured values do not follow the loads, or if the
            constants in use predict held-out runs better.

        """
        at = (fitted.values - self._prior) / self._spread
        errors = self._errors(at)
        size = float(np.nanmedian(np.abs(errors)))
        if not self._is_paired(at):
            raise RefusalError(
                "the measured values do not follow the loads stated: crossed between the runs they "
                "fit about as well (are values and loads of different runs mixed up?)"
            )
        if size > _MOST_ERROR:
            raise RefusalError(
                f"no setting of the constants explains the runs (median error {100 * size:.0f} %): "
                "check model, device, engine settings, plan and lengths"
            )
        before, after = (
            float(np.nanmean(part / self._noise)) for part in (judged.before, judged.after)
        )
        if after >= before:
            raise RefusalError(
                f"calibration does not help: error on held-out runs {_text(judged.after)} with "
                f"it, {_text(judged.before)} without; the constants in use stay"
            )

    def slopes(self, at: Floats) -> Floats:
        """(N, M, 4) change of the logarithms per prior spread of each constant."""
        columns = []
        for j in range(len(TERMS)):
            above, below = at.copy(), at.copy()
            above[j] = min(at[j] + _HALF, self._high[j])
            below[j] = max(at[j] - _HALF, self._low[j])
            change = self._logs(above) - self._logs(below)
            columns.append(change / (above[j] - below[j]))
        return np.stack(columns, axis=-1)

    def _step(self, at: Floats, slopes: Floats, rows: Bools) -> tuple[Floats, Floats]:
        """Least squares of the runs ``rows`` by ``slopes`` at ``at``, and its precision (4, 4)."""
        errors = self._errors(at)
        used = ~np.isnan(errors) & rows[:, None] & ~np.isnan(slopes).any(axis=-1)
        noise = np.broadcast_to(self._noise, errors.shape)[used]
        scaled = errors[used] / noise
        own = slopes[used] / noise[:, None]
        found = at
        # The weights of outliers follow from the errors left, so they are found again.
        for _ in range(_STEPS):
            left = scaled + own @ (found - at)
            weight = (1 + (left / _SOFT) ** 2) ** -0.25
            rows_, target = own * weight[:, None], (own @ at - scaled) * weight
            found = bounded_ridge(rows_, target, self._low, self._high)
        return found, rows_.T @ rows_ + np.eye(len(TERMS))

    def _posterior(self, at: Floats, precision: Floats) -> Posterior:
        values = self._prior + at * self._spread
        covariance: Floats = np.asarray(np.linalg.inv(precision), np.float64)
        return Posterior(self._prior, values, covariance, self._eager_layer_s)

    def _logs(self, at: Floats) -> Floats:
        key = at.tobytes()
        if key not in self._cache:
            values = self._prior + at * self._spread
            self._cache[key] = self._predict(host_of(values, self._eager_layer_s))
        return self._cache[key]

    def _errors(self, at: Floats) -> Floats:
        return self._logs(at) - self._measured

    def _is_paired(self, at: Floats) -> bool:
        """Whether measured values fit their own runs better than each other's."""
        logs = self._logs(at)
        known = ~np.isnan(logs + self._measured).any(axis=1)
        logs, measured = logs[known], self._measured[known]
        telling = logs.std(axis=0) > _TELLING if len(logs) else np.zeros(0, bool)
        if len(logs) < LEAST_RUNS or not telling.any():
            return True
        rng = np.random.default_rng(0)
        for metric in np.flatnonzero(telling):
            own = np.abs(logs[:, metric] - measured[:, metric]).mean()
            crossed = np.array(
                [
                    np.abs(logs[:, metric] - rng.permutation(measured[:, metric])).mean()
                    for _ in range(_PAIRINGS)
                ]
            )
            if (crossed <= own).mean() > max(_PAIRED_SHARE, 1.5 / _factorial(len(logs))):
                return False
        return True


def bounded_ridge(rows: Floats, target: Floats, low: Floats, high: Floats) -> Floats:
    """Least ``|rows x - target|^2 + |x|^2`` with ``low <= x <= high``.

    Parameters
    ----------
    rows, target
        (N, K) and (N,).
    low, high
        (K,); a bound that the free solution passes holds its entry.

    """
    x = np.clip(np.zeros(rows.shape[1]), low, high)
    normal, right = rows.T @ rows + np.eye(rows.shape[1]), rows.T @ target
    # Coordinate descent: the ridge makes the problem strictly convex, so it converges.
    for _ in range(200):
        before = x.copy()
        for j in range(len(x)):
            rest = right[j] - normal[j] @ x + normal[j, j] * x[j]
            x[j] = min(max(rest / normal[j, j], low[j]), high[j])
        if np.abs(x - before).max() < 1e-10:
            break
    return x


def narrowed(covariance: Floats, slopes: Floats, noise: Floats) -> Floats:
    """Covariance of the constants after one more run with these slopes, (K, K).

    Parameters
    ----------
    covariance
        (K, K) before.
    slopes
        (M, K) of the run's metrics.
    noise
        (M,) their typical errors.

    """
    gain = covariance @ slopes.T
    joint = slopes @ gain + np.diag(noise**2)
    return covariance - gain @ np.linalg.solve(joint, gain.T)


def _mean_size(errors: Floats) -> Floats:
    """(M,) mean absolute relative error of (N, M) logarithms; NaN where there is none."""
    size = np.abs(np.expm1(errors))
    return np.array(
        [
            column[~np.isnan(column)].mean() if (~np.isnan(column)).any() else np.nan
            for column in size.T
        ]
    )


def _factorial(n: int) -> float:
    return float(np.prod(np.arange(1.0, min(n, 20) + 1)))


def _text(errors: Floats) -> str:
    known = errors[~np.isnan(errors)]
    return f"{100 * float(known.mean()):.1f} %" if len(known) else "unknown"
