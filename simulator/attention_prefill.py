"""Prefill attention of mixed batches, as a sum that an iteration can add up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from simulator.interpolate import Provenance, bracket

if TYPE_CHECKING:
    from simulator.attention_surface import Surface
    from simulator.interpolate import FloatArray

_ROUNDS: Final = 8
"""Alternations of the fit; four more change no figure by 0.05 points."""
_POINTS: Final = 4
"""Points per fitted length that F is tabulated at."""
_NO_OVERLAP: Final = 2.0
"""A kernel that overlaps arithmetic and traffic fully takes at least half of their sum."""


@dataclass(frozen=True, eq=False)
class PrefillSum:
    """Time of a batch of prompts: ``launch + sum of F(length) + underfill(all tokens)``.

    Parameters
    ----------
    launch_s
        Time of one sequence of the shortest length.
    length, f_s
        Ascending lengths from 0 and F there, shape (C,), seconds; non-decreasing, 0 at length 0.
    log_tokens, underfill_s
        Ascending logs of prompt tokens in all, and what an iteration of that many takes beyond
        the launch and F, shape (K,); not negative, non-decreasing.

    """

    launch_s: float
    length: FloatArray
    f_s: FloatArray
    log_tokens: FloatArray
    underfill_s: FloatArray

    def per_sequence_s(self, surface: Surface, length: FloatArray, longest: float) -> FloatArray:
        """F of prompts, 0 at length 0, of which no token attends to more than ``longest``.

        Beyond the fitted lengths and beyond ``longest`` F grows as the work does.
        """
        last = min(float(self.length[-1]), longest)
        time_s = np.interp(np.minimum(length, last), self.length, self.f_s)
        beyond = length > last
        if beyond.any():
            time_s[beyond] *= surface.growth(np.array(last), length[beyond], longest)
        return time_s

    def underfill_of_s(self, tokens: FloatArray) -> FloatArray:
        """Underfill of ``tokens`` prompt tokens in all; held outside the fitted range."""
        return np.interp(np.log(np.maximum(tokens, 1.0)), self.log_tokens, self.underfill_s)


@lru_cache(maxsize=1024)
def prefill_sum(surface: Surface) -> PrefillSum:
    """Fit the sum to a surface by alternating least squares of relative errors.

    Every fitted batch and length that lies within the measured ones counts alike. ``underfill``
    is linear in log tokens between whole powers of two; it covers what the device's idle part
    costs when there are few tokens, without which single prompts read too fast.
    """
    rows = surface.batch >= surface.least_batch
    batch, length = surface.batch[rows][:, None], surface.length
    time_s, known = surface.time_s[rows], surface.place[rows] < Provenance.EXTRAPOLATED
    launch_s = float(time_s[0, 0])
    above_s = time_s - launch_s
    usable = known | ~known.any(axis=0)
    weight = usable / time_s**2
    tokens = np.log2(batch * length)
    knots = np.arange(np.floor(tokens[usable].min()), np.ceil(tokens[usable].max()) + 1)
    if len(knots) == 1:
        knots = np.array([knots[0], knots[0] + 1])
    low, share = bracket(knots, tokens)
    least_f = surface.shape.work_s(surface.device, np.ones_like(length), length) / _NO_OVERLAP
    underfill = np.zeros(len(knots))
    f = least_f
    for _ in range(_ROUNDS):
        rest_s = above_s - np.interp(tokens, knots, underfill)
        best = (weight * batch * rest_s).sum(axis=0) / (weight * batch**2).sum(axis=0)
        f = np.maximum.accumulate(np.maximum(best, least_f))
        rest_s = above_s - batch * f
        total, count = np.zeros(len(knots)), np.zeros(len(knots))
        for knot, part in ((low, 1 - share), (low + 1, share)):
            np.add.at(total, knot, weight * part * rest_s)
            np.add.at(count, knot, weight * part)
        mean = np.divide(total, count, out=np.zeros(len(knots)), where=count > 0)
        underfill = np.maximum.accumulate(np.maximum(mean, 0.0))
    # A power law between lengths, as F runs smoothly from linear to quadratic; then straight lines
    # between points so near that those are within 0.1 % of it.
    fine = np.geomspace(length[0], length[-1], _POINTS * (len(length) - 1) + 1)
    fine_f = np.exp(np.interp(np.log(fine), np.log(length), np.log(f)))
    return PrefillSum(
        launch_s=launch_s,
        length=np.concatenate([[0.0], fine]),
        f_s=np.concatenate([[0.0], fine_f]),
        log_tokens=knots * np.log(2.0),
        underfill_s=underfill,
    )
