"""Times measured at scattered shapes: a few fitted rates, and the excess of near shapes over them.

Mixture-of-experts and expert all-to-all kernels are measured over token counts at shapes that
form no grid. Both are modelled alike: the time is a sum of a few physical terms at fitted rates
(`fit_rates`), times the excess over that sum which near shapes show (`Scatter`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, Final

import numpy as np

from simulator.interpolate import isotonic

if TYPE_CHECKING:
    from collections.abc import Callable

    from simulator.interpolate import FloatArray, IndexArray

NEIGHBOURS: Final = 12
"""Measured shapes that a prediction is averaged from; from 4 to 20 the median error on unseen
models moves by 0.5 points and p90 by 2, in opposite directions."""
DISTANCE_POWER: Final = 2
"""Weights fall with the square of the distance: 1 and 3 are within 0.2 points, but 3 changes faster
between two shapes."""
ROBUST_WIDTH: Final = 0.1
ROBUST_STEPS: Final = 8
"""Near shapes' log excess is averaged by its weighted median, smoothed over this width (10 % of the
time) so that it moves continuously: engines now and then run one shape's kernel with a poor
configuration, four times as slow as its neighbours'. On TensorRT-LLM's fp8 experts (H100) it lowers
the median error on unseen layouts from 6.4 to 4.6 % and p90 from 49 to 32 %; elsewhere by up to
0.7 and 4 points. Reweighted least squares has settled to 1 % after the steps."""
STEPS_PER_GAP: Final = 4
"""Curve nodes per gap between measured token counts: the physical terms bend inside a gap."""
DOUBLINGS_BEYOND: Final = 6
"""Curve nodes past the largest measured token count, one per doubling."""


def fit_rates(terms: FloatArray, time_s: FloatArray) -> FloatArray:
    """Non-negative least squares of relative errors.

    There are so few terms that every subset is tried, which finds the exact optimum.

    Parameters
    ----------
    terms
        Physical terms, shape (N, ...); each at least 0.
    time_s
        Measured seconds, shape (...); NaN where not measured.

    Returns
    -------
    rates
        Shape (N,): seconds per unit of each term.

    """
    known = ~np.isnan(time_s)
    columns = np.stack([term[known] / time_s[known] for term in terms], axis=1)
    norms = np.linalg.norm(columns, axis=0)
    scaled = columns / np.where(norms > 0, norms, 1.0)
    gram, target = scaled.T @ scaled, scaled.sum(axis=0)
    best, best_gain = np.zeros(len(terms)), 0.0
    for size in range(1, len(terms) + 1):
        for subset in map(list, combinations(np.flatnonzero(norms > 0), size)):
            solution = np.linalg.lstsq(gram[np.ix_(subset, subset)], target[subset], rcond=None)[0]
            gain = float(solution @ target[subset])
            if gain > best_gain and bool((solution >= 0).all()):
                best, best_gain = np.zeros(len(terms)), gain
                best[subset] = solution
    rates: FloatArray = best / np.where(norms > 0, norms, 1.0)
    return rates


@dataclass(frozen=True, eq=False)
class Scatter:
    """Log excess of measured over modelled times, at scattered shapes.

    Parameters
    ----------
    features
        Place of each shape, shape (S, F), scaled so that distances compare.
    log_load
        What aligns the token counts of two shapes, shape (S,): the logarithm of the load (such as
        tokens per expert) at one token.
    log_tokens
        Ascending axis, shape (T,).
    time_s, modelled_s
        Measured seconds, NaN where there are none but at least one per shape, and modelled ones;
        shapes (S, T).

    """

    features: FloatArray
    log_load: FloatArray
    log_tokens: FloatArray
    time_s: FloatArray
    modelled_s: FloatArray

    def near(self, place: FloatArray) -> tuple[IndexArray, FloatArray, float]:
        """Measured shapes near a place, shape (F,), their weights, and the nearest one's distance.

        Inverse-distance weights, tapered to zero at the first shape that is left out, so that they
        change continuously as the place moves; a shape at the very place has all the weight.
        """
        distance = np.sqrt(((self.features - place) ** 2).sum(axis=1))
        order = np.argsort(distance, kind="stable")[: NEIGHBOURS + 1]
        ranked = distance[order]
        if ranked[0] == 0:
            order = order[ranked == 0]
            return order, np.full(len(order), 1 / len(order)), 0.0
        weight = ranked**-DISTANCE_POWER
        if len(distance) > NEIGHBOURS:
            weight *= 1 - ranked / ranked[-1]
        if not weight.any():
            weight = np.ones(len(order))
        return order, weight / weight.sum(), float(ranked[0])

    def excess(self, place: FloatArray, log_load: float) -> tuple[FloatArray, float]:
        """Average log excess on the token axis, shape (T,), and the nearest shape's distance.

        Each shape is read at the token count that gives it the same load; beyond its measured
        range the boundary's excess is held.
        """
        rows, weights, nearest = self.near(place)
        shifted = self.log_tokens + (log_load - self.log_load[rows])[:, None]
        found = np.array(
            [
                np.interp(at, self.log_tokens, self._own_excess(row))
                for at, row in zip(shifted, rows, strict=True)
            ]
        )
        mean: FloatArray = weights @ found
        for _ in range(ROBUST_STEPS if len(rows) > 1 else 0):
            trusted = weights[:, None] / np.hypot(found - mean, ROBUST_WIDTH)
            mean = (trusted * found).sum(axis=0) / trusted.sum(axis=0)
        return mean, nearest

    def _own_excess(self, row: int) -> FloatArray:
        """Log excess of one shape, shape (T,).

        Log time is made non-decreasing in tokens first. A missing point takes the excess between
        its neighbours, or that of the nearest one.
        """
        known = ~np.isnan(self.time_s[row])
        excess = isotonic(np.log(self.time_s[row, known])) - np.log(self.modelled_s[row, known])
        filled: FloatArray = np.interp(self.log_tokens, self.log_tokens[known], excess)
        return filled


@dataclass(frozen=True, eq=False)
class Curve:
    """A time that never falls with the token count, joined linearly in logarithms.

    Parameters
    ----------
    log_tokens, log_time
        Nodes, the first at one token; beyond the last the time grows with the tokens.

    """

    log_tokens: FloatArray
    log_time: FloatArray

    def at(self, tokens: FloatArray) -> FloatArray:
        """Seconds at each token count, at least 1, shape (T,)."""
        log_tokens = np.log(tokens)
        beyond = np.maximum(log_tokens - self.log_tokens[-1], 0.0)
        time_s: FloatArray = np.exp(np.interp(log_tokens, self.log_tokens, self.log_time) + beyond)
        return time_s


def curve(
    log_tokens: FloatArray, log_excess: FloatArray, modelled_s: Callable[[FloatArray], FloatArray]
) -> Curve:
    """The curve of one shape.

    Parameters
    ----------
    log_tokens, log_excess
        Axis and excess on it, shapes (T,); the ends' excess is held outside.
    modelled_s
        Modelled seconds, non-decreasing in the token counts that it takes.

    """
    log_time = isotonic(np.log(modelled_s(np.exp(log_tokens))) + log_excess)
    held = log_time - np.log(modelled_s(np.exp(log_tokens)))
    nodes = curve_nodes(tuple(log_tokens.tolist()))
    fine = np.log(modelled_s(np.exp(nodes))) + np.interp(nodes, log_tokens, held)
    # Between two measured points the terms' bends must not leave the two points' times.
    low = np.searchsorted(log_tokens, nodes, side="right") - 1
    floor = np.where(low >= 0, log_time[np.maximum(low, 0)], -np.inf)
    high = np.searchsorted(log_tokens, nodes, side="left")
    ceiling = np.where(high < len(log_time), log_time[np.minimum(high, len(log_time) - 1)], np.inf)
    return Curve(nodes, isotonic(np.clip(fine, floor, ceiling)))


@lru_cache(maxsize=256)
def curve_nodes(log_tokens: tuple[float, ...]) -> FloatArray:
    """Logarithms of the token counts of a curve over this axis: one token first, then ascending."""
    steps = np.arange(STEPS_PER_GAP) / STEPS_PER_GAP
    axis = np.array(log_tokens)
    inside = (axis[:-1, None] + np.diff(axis)[:, None] * steps).ravel()
    beyond = axis[-1] + np.arange(DOUBLINGS_BEYOND + 1) * np.log(2.0)
    below = [0.0] if axis[0] > 0 else []
    return np.concatenate([below, inside, beyond])
