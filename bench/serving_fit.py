"""Host constants of a cluster of measured runs: the most likely ones under a prior.

Six constants with a physical meaning, see `HostConstants`. Errors enter as logarithms of predicted
over measured. Their spread is the measurements' own noise where it is known: of identical servers
that shared a load, TPOT and E2E differ by 1 %, TTFT by 2.4 %. A constant that the
fitting side cannot tell from others stays at its prior.

Simulated means are steps and ramps of the constants (a request that arrives a microsecond later
joins the next batch), so slopes are taken over a whole spread of the prior, and Gauss-Newton steps
on those are steadier than a line search with small differences, which stops at such a ramp.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from simulator.engine_rules import HostConstants

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Prediction = Mapping[str, float]

NAMES: Final = (
    *("iteration_ms", "sequence_ms", "eager_layer_ms", "eager_dealt_layer_ms", "ingress_ms"),
    "prefill_multiplier",
)
_IN_SECONDS: Final = np.array([1e-3] * 5 + [1.0])
_LOWEST: Final = np.array([0.0] * 5 + [1.0])

NOISE: Final = {"ttft": 0.024, "tpot": 0.01, "e2e": 0.01, "makespan": 0.01}
"""Relative spread of one measured mean."""

_STEPS: Final = 4
"""Gauss-Newton steps; the fourth moves no constant by more than a tenth of its spread."""


@dataclass(frozen=True)
class Prior:
    """What is known of an engine's constants before a fit, in the units of `NAMES`.

    Parameters
    ----------
    mean, spread
        (6,) each; a spread of zero holds a constant at its mean.
    source
        Where they come from.

    """

    mean: tuple[float, ...]
    spread: tuple[float, ...]
    source: str

    def host(self) -> HostConstants:
        """The constants that the prior expects."""
        return _host(np.array(self.mean))


def fit(
    predict: Sequence[Callable[[HostConstants], Prediction]],
    measured: Sequence[Prediction],
    prior: Prior,
    kinds: Sequence[str] = (),
) -> HostConstants:
    """Most likely constants of the runs given.

    Parameters
    ----------
    predict, measured
        By run: what simulates it under given constants, and the means it was measured at.
    prior
        Where the constants start, and how far they may go.
    kinds
        By run: its kind of server. Each kind counts the same, however many runs have it, so that
        constants for all kinds do not depend on how often each was measured.

    """
    counts = Counter(kinds)
    weights = [len(kinds) / len(counts) / counts[kind] for kind in kinds] or [1.0] * len(measured)
    mean, spread = np.array(prior.mean), np.array(prior.spread)
    free = np.flatnonzero(spread)
    if not len(free) or not len(predict):
        return prior.host()

    def values(x: Floats) -> Floats:
        """Constants that lie ``x`` spreads off their prior."""
        out = mean.copy()
        out[free] += x * spread[free]
        lifted: Floats = np.maximum(out, _LOWEST)
        return lifted

    def residuals(x: Floats) -> Floats:
        host = _host(values(x))
        return np.array(
            [
                np.log(own[metric] / expected[metric]) / NOISE[metric] * np.sqrt(weight)
                for own, expected, weight in zip(
                    (p(host) for p in predict), measured, weights, strict=True
                )
                for metric in expected
            ]
        )

    lowest = (_LOWEST - mean)[free] / spread[free]
    x = np.zeros(len(free))
    for _ in range(_STEPS):
        here = residuals(x)
        slopes = np.zeros((len(here), len(free)))
        for j in range(len(free)):
            above, below = x.copy(), x.copy()
            above[j] += 0.5
            below[j] = max(below[j] - 0.5, lowest[j])
            slopes[:, j] = (residuals(above) - residuals(below)) / (above[j] - below[j])
        x = _bounded_step(slopes, slopes @ x - here, lowest)
    return _host(values(x))


def in_units(host: HostConstants) -> dict[str, float]:
    """Constants by the names of `NAMES`."""
    eager_s = (host.eager_layer_s, host.eager_dealt_layer_s)
    seconds = (host.iteration_s, host.sequence_s, *eager_s, host.ingress_s)
    values = np.array([*seconds, host.prefill_multiplier]) / _IN_SECONDS
    return {name: float(f"{value:.6g}") for name, value in zip(NAMES, values, strict=True)}


def _host(values: Floats) -> HostConstants:
    iteration_s, sequence_s, eager_s, dealt_s, ingress_s, multiplier = map(
        float, values * _IN_SECONDS
    )
    return HostConstants(
        iteration_s=iteration_s,
        sequence_s=sequence_s,
        ingress_s=ingress_s,
        eager_layer_s=eager_s,
        eager_dealt_layer_s=dealt_s,
        prefill_multiplier=multiplier,
    )


def _bounded_step(slopes: Floats, target: Floats, lowest: Floats) -> Floats:
    """Least ``|slopes x - target|^2 + |x|^2``, ``x`` held at ``lowest`` where it would pass."""
    x = lowest.copy()
    free = np.ones(len(lowest), bool)
    while free.any():
        rest = target - slopes[:, ~free] @ x[~free]
        own = slopes[:, free]
        x[free] = np.linalg.solve(own.T @ own + np.eye(free.sum()), own.T @ rest)
        low = free & (x < lowest)
        if not low.any():
            break
        x[low] = lowest[low]
        free &= ~low
    return x
