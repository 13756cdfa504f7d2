"""Leave-out checks of the dense families: matrix products, attention and collectives."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench.leave_out import LeftOut, draw, interior, relative_errors, without
from simulator.attention import (
    context_attention_batch_s,
    context_attention_s,
    context_underfill_s,
    generation_attention_s,
)
from simulator.collectives import all_reduce_s, nccl_s
from simulator.gemm import gemm_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.leave_out import Floats, Mask
    from simulator.device import Device
    from simulator.table import AttentionSeries, GemmGrid, KernelTable, MessageSeries

    Series = tuple[AttentionSeries, ...]
    Predict = Callable[[Series, AttentionSeries], Floats]

OF_POINTS: Final = 1 / 3
"""Share of the attention series whose left-out points, or whose sums, are judged."""
OF_LENGTHS: Final = 0.1
"""Share that is judged at each left-out length, and where nothing is left out."""


def gemm(table: KernelTable, device: Device, random: np.random.Generator) -> Iterator[LeftOut]:
    """By precision: ``points``, whole (n, k) ``shapes``, and whole token counts (``tokens``).

    Shapes are interior in the n x k grid; a token count is left out of every shape. ``nothing`` is
    the whole grid, all known: what demanding that time never falls with tokens costs.
    """
    for dtype, grid in sorted(table.gemm.items()):
        known = ~np.isnan(grid.time_s)
        shapes = draw(interior(np.asarray(known.any(axis=0))), random)
        tokens = draw(interior(np.asarray(known.any(axis=(1, 2)))), random)
        masks = {
            "points": draw(interior(known), random),
            "shapes": known & shapes,
            "tokens": known & tokens[:, None, None],
        }
        for protocol, mask in masks.items():
            refitted = replace(grid, time_s=without(grid.time_s, mask))
            unseen = replace(table, gemm={**table.gemm, dtype: refitted})
            yield LeftOut("gemm", protocol, dtype, _gemm_errors(unseen, device, dtype, grid, mask))
        yield LeftOut("gemm", "nothing", dtype, _gemm_errors(table, device, dtype, grid, known))


def _gemm_errors(
    table: KernelTable, device: Device, dtype: str, grid: GemmGrid, mask: Mask
) -> Floats:
    errors = [np.empty(0)]
    for i, j in np.argwhere(mask.any(axis=0)):
        rows = mask[:, i, j]
        time_s, _ = gemm_s(table, device, dtype, grid.m[rows], int(grid.n[i]), int(grid.k[j]))
        errors.append(relative_errors(time_s, grid.time_s[rows, i, j]))
    return np.concatenate(errors)


def context_attention(
    table: KernelTable, device: Device, random: np.random.Generator
) -> Iterator[LeftOut]:
    """Prefill attention, as `_attention` says.

    ``as composed`` leaves nothing out: how well the sum that iterations add up (a launch, a part
    for each sequence, an underfill by tokens in all) meets the measured batches.
    """

    def predict(series: Series, one: AttentionSeries) -> Floats:
        refitted = replace(table, context=series)
        return context_attention_batch_s(refitted, device, *_layout(one), **_sizes(one))[0]

    yield from _attention("context attention", table.context, predict, random)
    for one in _some_series(table.context, random, OF_POINTS):
        layout, window = (table, device, *_layout(one)), one.window_tokens
        each_s, launch_s, _ = context_attention_s(*layout, one.length, window_tokens=window)
        tokens = one.batch[:, None].astype(np.int64) * one.length
        extra_s, _ = context_underfill_s(*layout, tokens.ravel(), window_tokens=window)
        time_s = launch_s + one.batch[:, None] * each_s + extra_s.reshape(tokens.shape)
        errors = relative_errors(time_s, one.time_s)
        yield LeftOut("context attention", "as composed", f"{one.kv_dtype} KV", errors)


def generation_attention(
    table: KernelTable, device: Device, random: np.random.Generator
) -> Iterator[LeftOut]:
    """Decode attention, as `_attention` says."""

    def predict(series: Series, one: AttentionSeries) -> Floats:
        refitted = replace(table, generation=series)
        sizes = _sizes(one)
        sizes["context"] = sizes.pop("length")
        return generation_attention_s(refitted, device, *_layout(one), **sizes)[0]

    yield from _attention("generation attention", table.generation, predict, random)


def _layout(one: AttentionSeries) -> tuple[str, int, int, int]:
    return one.kv_dtype, one.head_dim, one.heads, one.kv_heads


def _sizes(one: AttentionSeries) -> dict[str, Any]:
    return {"batch": one.batch, "length": one.length, "window_tokens": one.window_tokens}


def _attention(
    family: str, series: Series, predict: Predict, random: np.random.Generator
) -> Iterator[LeftOut]:
    """By KV dtype: ``points``; whole ``heads``; whole ``lengths``; ``nothing``.

    ``heads`` leaves out 20 % of the layouts that lie between two others of the same width, window,
    KV dtype and KV heads. ``lengths`` leaves out every interior length in turn. ``nothing`` is what
    demanding that time never falls costs. Rows are left out of all series at once, but to save
    time only a random share of the series is judged: `OF_POINTS`, and `OF_LENGTHS` for the others.
    """
    known = [~np.isnan(one.time_s) for one in series]
    chosen = draw(_between_others(series), random)
    points = [draw(interior(cells), random) for cells in known]
    heads = [cells & out for cells, out in zip(known, chosen.tolist(), strict=True)]
    judged = _of_some(points, random, OF_POINTS)
    yield from _series_errors(family, "points", series, points, judged, predict)
    yield from _series_errors(family, "heads", series, heads, heads, predict)
    for length in np.unique(np.concatenate([one.length for one in series])) if series else ():
        left_out = [
            cells & (one.length == length) & interior(np.asarray(cells.any(axis=0)))
            for one, cells in zip(series, known, strict=True)
        ]
        judged = _of_some(left_out, random, OF_LENGTHS)
        yield from _series_errors(family, "lengths", series, left_out, judged, predict)
    nothing = [np.zeros_like(cells) for cells in known]
    judged = _of_some(known, random, OF_LENGTHS)
    yield from _series_errors(family, "nothing", series, nothing, judged, predict)


def _of_some(masks: list[Mask], random: np.random.Generator, share: float) -> list[Mask]:
    """The masks of a random share of the series that have anything in them; else empty ones."""
    some = draw(np.array([mask.any() for mask in masks], dtype=bool), random, share)
    return [mask & keep for mask, keep in zip(masks, some.tolist(), strict=True)]


def _some_series(series: Series, random: np.random.Generator, share: float) -> Series:
    some = draw(np.ones(len(series), dtype=bool), random, share)
    return tuple(one for one, keep in zip(series, some.tolist(), strict=True) if keep)


def _between_others(series: Series) -> Mask:
    groups = defaultdict(list)
    for one in series:
        groups[_group(one)].append(one.heads)
    return np.array(
        [min(groups[_group(one)]) < one.heads < max(groups[_group(one)]) for one in series],
        dtype=bool,
    )


def _group(one: AttentionSeries) -> tuple[int, int, str, int]:
    return one.head_dim, one.window_tokens, one.kv_dtype, one.kv_heads


def _series_errors(
    family: str,
    protocol: str,
    series: Series,
    left_out: list[Mask],
    judged: list[Mask],
    predict: Predict,
) -> Iterator[LeftOut]:
    """Errors of the judged cells after a refit without the left-out ones."""
    refitted = tuple(
        replace(one, time_s=without(one.time_s, mask))
        for one, mask in zip(series, left_out, strict=True)
        if (~np.isnan(one.time_s) & ~mask).any()
    )
    for one, mask in zip(series, judged, strict=True):
        if mask.any():
            errors = relative_errors(predict(refitted, one)[mask], one.time_s[mask])
            yield LeftOut(family, protocol, f"{one.kv_dtype} KV", errors)


def all_reduce(
    table: KernelTable, device: Device, random: np.random.Generator
) -> Iterator[LeftOut]:
    """Message sizes (``points``) of the engine's own all-reduce."""
    for (kind, gpus), one in sorted(table.all_reduce.items()):
        masked, mask = _masked(one, random)
        refitted = replace(table, all_reduce={**table.all_reduce, (kind, gpus): masked})
        time_s, _ = all_reduce_s(refitted, device, kind, gpus, one.elements[mask])
        yield LeftOut("all-reduce", "points", "", relative_errors(time_s, one.time_s[mask]))


def nccl(table: KernelTable, device: Device, random: np.random.Generator) -> Iterator[LeftOut]:
    """Message sizes (``points``) of NCCL's operations."""
    for (kind, gpus), one in sorted(table.nccl.items()):
        masked, mask = _masked(one, random)
        refitted = replace(table, nccl={**table.nccl, (kind, gpus): masked})
        time_s, _ = nccl_s(refitted, device, kind, gpus, one.elements[mask])
        yield LeftOut("nccl", "points", "", relative_errors(time_s, one.time_s[mask]))


def _masked(one: MessageSeries, random: np.random.Generator) -> tuple[MessageSeries, Mask]:
    mask = draw(interior(~np.isnan(one.time_s)), random)
    return replace(one, time_s=without(one.time_s, mask)), mask
