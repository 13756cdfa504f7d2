"""What one more prompt costs in latent attention's prefill, from batches of equal prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from simulator.interpolate import Provenance, bracket, isotonic
from simulator.latent_grid import kernel_surface
from simulator.latent_work import CONTEXT, ideal_s

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from simulator.device import Device
    from simulator.interpolate import FloatArray, LabelArray
    from simulator.latent_grid import Surface
    from simulator.model import LatentAttention
    from simulator.table import KernelTable, LatentGrid

HIDDEN_BELOW: Final = 2
"""A sparse prefill module slower than this many fastest ones shows its kernel; a faster one may
wait for the host to launch its kernels."""
ROUNDS: Final = 8
"""Alternations of the fit, as in `simulator/attention_prefill.py`."""
LONGEST: Final = 2**24
"""Tokens of a prompt beyond which F is held: more than any model's context."""
LEAST_OF_FULL: Final = 0.5
"""A prompt costs at least this share of its part of the largest batch, whatever the rest fits."""


@dataclass(frozen=True, eq=False)
class PromptFit:
    """Time of a batch of prompts: ``launch + sum of F(length) + underfill(all tokens)``.

    Parameters
    ----------
    length, log_s, label
        Ascending lengths, log F there and its labels, shapes (C,); F in seconds, non-decreasing.
    launch_s
        What a batch of any size takes.
    log_tokens, underfill_s
        Ascending logs of prompt tokens in all, and what few of them take beyond launch and F,
        shapes (K,); not negative, non-decreasing.

    """

    length: FloatArray
    log_s: FloatArray
    label: LabelArray
    launch_s: float
    log_tokens: FloatArray
    underfill_s: FloatArray


@lru_cache(maxsize=256)
def prompt_fit(
    table: KernelTable,
    device: Device,
    grid: LatentGrid,
    attention: LatentAttention,
    heads: int,
    kv_dtype: str,
) -> PromptFit:
    """Fit of `simulator.latent.latent_context_s` to one grid.

    Alternating least squares of errors relative to the measured time, every measured batch and
    length alike. The launch of dense attention is its smallest batch. Modules of sparse attention
    that may wait for the host do not count and there is no launch; at lengths where all of them
    may, F is the full time of the largest batch, or less: in proportion to the tokens, that of the
    shortest length that shows its cost.
    """
    surface = kernel_surface(table, device, grid, attention, heads, kv_dtype)
    whole_s = _whole_s(surface)
    shown = surface.measured
    launch_s = float(surface.time_s[0, 0])
    if attention.index_topk:
        shown = shown & (whole_s > HIDDEN_BELOW * floor_s(surface))
        launch_s = 0.0
    if not shown.any():
        shown, launch_s = surface.measured, 0.0
    usable = surface.measured.any(axis=0)
    cost_s = _most_s(surface, shown, launch_s)
    tokens = np.log2(np.outer(surface.batch, surface.length))
    knots = np.arange(np.floor(tokens[shown].min()), np.ceil(tokens[shown].max()) + 2)
    low, share = bracket(knots, tokens)
    weight = shown / whole_s**2
    batch = surface.batch[:, None]
    underfill_s = np.zeros(len(knots))
    fitted = shown.any(axis=0)
    for _ in range(ROUNDS):
        rest_s = surface.time_s - launch_s - np.interp(tokens, knots, underfill_s)
        best_s = (weight * batch * rest_s).sum(axis=0)[fitted]
        best_s /= (weight * batch**2).sum(axis=0)[fitted]
        cost_s[fitted] = np.maximum(best_s, LEAST_OF_FULL * _most_s(surface, shown, 0.0)[fitted])
        cost_s = np.maximum.accumulate(cost_s)
        rest_s = surface.time_s - launch_s - batch * cost_s
        total_s, count = np.zeros(len(knots)), np.zeros(len(knots))
        for knot, part in ((low, 1 - share), (low + 1, share)):
            np.add.at(total_s, knot, weight * part * rest_s)
            np.add.at(count, knot, weight * part)
        mean_s = np.divide(total_s, count, out=np.zeros(len(knots)), where=count > 0)
        underfill_s = np.maximum.accumulate(np.maximum(mean_s, 0.0))
    label = np.where(surface.measured, surface.label, 0).max(axis=0)
    fit = PromptFit(
        surface.length[usable],
        np.log(cost_s[usable]),
        label[usable].astype(np.int8),
        launch_s,
        knots * np.log(2.0),
        underfill_s,
    )
    fit = _with_prefixes(fit, grid, surface, heads)
    return _with_roofline(fit, device, attention, heads, kv_dtype)


def _most_s(surface: Surface, shown: NDArray[np.bool_], launch_s: float) -> FloatArray:
    """Share of a prompt in the largest measured batch of each length, shape (L,)."""
    last = len(surface.batch) - 1 - np.argmax(surface.measured[::-1], axis=0)
    full = last, np.arange(len(surface.length))
    most_s = np.maximum(surface.time_s[full] - launch_s, 0.0) / surface.batch[last]
    if shown[full].any():
        first = int(np.argmax(shown[full]))
        in_step = most_s[first] * surface.length / surface.length[first]
        most_s = np.where(shown[full], most_s, np.minimum(most_s, in_step))
    positive_s: FloatArray = np.maximum(most_s, np.finfo(np.float64).tiny)
    return positive_s


def _with_prefixes(fit: PromptFit, grid: LatentGrid, surface: Surface, heads: int) -> PromptFit:
    """The fit continued beyond the longest prompt by chunks measured after that many tokens.

    The longest chunk after a prefix, over the same chunk without one, at the nearest measured head
    count, tells the slope of F in its middle; the slopes are integrated.
    """
    chunk = surface.length[-1]
    if chunk != fit.length[-1]:
        return fit
    known = np.flatnonzero(~np.isnan(grid.time_s[0, :, 0, -1]))
    if not known.size:
        return fit
    own = known[np.argmin(np.abs(np.log(grid.heads[known] / heads)))]
    measured_s = grid.time_s[:, own, 0, -1]
    later = np.flatnonzero((grid.prefix >= chunk) & ~np.isnan(measured_s))
    if not later.size:
        return fit
    kernel_s, around_s = surface.time_s[0, -1], surface.around_s[0, -1]
    whole_s = (kernel_s + around_s) * measured_s[later] / measured_s[0]
    slope = np.maximum(whole_s - around_s - fit.launch_s, np.exp(fit.log_s[-1])) / chunk
    slope = np.exp(isotonic(np.log(slope)))
    middle = grid.prefix[later] + chunk / 2
    steps = np.diff(np.concatenate([[chunk], middle]))
    means = (slope + np.concatenate([slope[:1], slope[:-1]])) / 2
    beyond_s = np.exp(fit.log_s[-1]) + np.cumsum(steps * means)
    between = np.full(len(later), Provenance.INTERPOLATED, dtype=np.int8)
    return replace(
        fit,
        length=np.concatenate([fit.length, middle]),
        log_s=np.concatenate([fit.log_s, np.log(beyond_s)]),
        label=np.concatenate([fit.label, between]),
    )


def _with_roofline(
    fit: PromptFit, device: Device, attention: LatentAttention, heads: int, kv_dtype: str
) -> PromptFit:
    """The fit continued to `LONGEST` at the utilisation of its last length."""
    end = fit.length[-1]
    halves = np.arange(1, 2 * np.ceil(np.log2(max(1.0, LONGEST / end))) + 1)
    length = end * 2 ** (np.concatenate([[0.0], halves]) / 2)
    kernel = (device, attention, heads, kv_dtype, CONTEXT)
    ideal = np.log(ideal_s(*kernel, np.ones(1), np.round(length))[0])
    beyond = np.full(len(halves), Provenance.EXTRAPOLATED, dtype=np.int8)
    return replace(
        fit,
        length=np.concatenate([fit.length, length[1:]]),
        log_s=np.concatenate([fit.log_s, fit.log_s[-1] + ideal[1:] - ideal[0]]),
        label=np.concatenate([fit.label, beyond]),
    )


def floor_s(surface: Surface) -> float:
    """Fastest measured module, or bare kernel with what surrounds it."""
    return float(_whole_s(surface)[surface.measured].min())


def _whole_s(surface: Surface) -> FloatArray:
    """Times of whole modules, or of bare kernels with what surrounds them, shape (B, L)."""
    return surface.time_s + np.maximum(surface.around_s, 0.0)
