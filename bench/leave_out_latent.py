"""Leave-out checks of latent attention and of recurrent layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from bench.leave_out import LeftOut, draw, interior, relative_errors, without
from simulator.latent import (
    latent_context_batch_s,
    latent_context_floor_s,
    latent_context_s,
    latent_generation_s,
    latent_underfill_s,
)
from simulator.latent_grid import kernel_surface
from simulator.latent_work import CONTEXT, GENERATION, projections_s, surroundings_s
from simulator.model import LatentAttention
from simulator.recurrent import GATED_DELTA_NET, MAMBA2, canonical, recurrent_surface

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.leave_out import Floats, Mask
    from simulator.device import Device
    from simulator.table import KernelTable, LatentGrid, RecurrentSeries

INDEX_HEADS: Final = 64
INDEX_HEAD_DIM: Final = 128
"""Indexer of DeepSeek-V3.2 (its config.json). Tables do not tell the measured ones; errors hardly
depend on it, since its projections are taken off and put back."""


def context_mla(
    table: KernelTable, device: Device, random: np.random.Generator
) -> Iterator[LeftOut]:
    """Dense prefill, as `_latent` says."""
    yield from _latent("context MLA", table, device, random, CONTEXT, sparse=False)


def generation_mla(
    table: KernelTable, device: Device, random: np.random.Generator
) -> Iterator[LeftOut]:
    """Dense decode, as `_latent` says."""
    yield from _latent("generation MLA", table, device, random, GENERATION, sparse=False)


def context_dsa(
    table: KernelTable, device: Device, random: np.random.Generator
) -> Iterator[LeftOut]:
    """Sparse prefill, as `_latent` says."""
    yield from _latent("context DSA", table, device, random, CONTEXT, sparse=True)


def generation_dsa(
    table: KernelTable, device: Device, random: np.random.Generator
) -> Iterator[LeftOut]:
    """Sparse decode, as `_latent` says."""
    yield from _latent("generation DSA", table, device, random, GENERATION, sparse=True)


def _latent(
    family: str,
    table: KernelTable,
    device: Device,
    random: np.random.Generator,
    phase: str,
    *,
    sparse: bool,
) -> Iterator[LeftOut]:
    """``points``; whole ``heads`` and whole ``lengths``, one at a time; and nothing left out.

    Judged is the measured time: of modules the predicted kernel with the projections that were
    taken off it put back, of bare kernels without what was added. Each grid stands alone, so that
    it is not predicted from one of other projections. Two protocols leave nothing out and show
    what the model itself loses: ``sum`` takes the kernel and the projections as an iteration's
    cost takes them, from whichever grid it prefers and from the matrix-product table; ``prompts``
    adds up the cost of prompts one by one, with whole modules no faster than their floor.
    """
    for grid in table.latent:
        if grid.phase != phase or bool(grid.index_topk) != sparse:
            continue
        known = ~np.isnan(grid.time_s[0])
        precision = f"{grid.weight_dtype} weights, {grid.kv_dtype} KV"
        heads = draw(_between(known.any(axis=(1, 2))), random)
        lengths = draw(_between(known.any(axis=(0, 1))), random)
        masks = [("points", draw(interior(known), random))]
        masks += [
            ("heads", known & (np.arange(len(heads)) == i)[:, None, None])
            for i in np.flatnonzero(heads)
        ]
        masks += [
            ("lengths", known & (np.arange(len(lengths)) == i)) for i in np.flatnonzero(lengths)
        ]
        for protocol, mask in masks:
            errors = _left_out(table, device, grid, mask)
            yield LeftOut(family, protocol, precision, errors)
        yield LeftOut(family, "sum", precision, _summed(table, device, grid))
        if phase == CONTEXT:
            yield LeftOut(family, "prompts", precision, _added_up(table, device, grid))


def _between(known: Mask) -> Mask:
    """Interior of one axis; nothing on an axis of one node, which `interior` would ignore."""
    return interior(known) & (len(known) > 1)


def _left_out(table: KernelTable, device: Device, grid: LatentGrid, mask: Mask) -> Floats:
    time_s = grid.time_s.copy()
    time_s[0] = without(time_s[0], mask)
    masked = replace(grid, time_s=time_s)
    alone = replace(table, latent=(masked,))
    errors = [np.empty(0)]
    for i in np.flatnonzero(mask.any(axis=(1, 2))).tolist():
        size = (_model(grid), int(grid.heads[i]), grid.kv_dtype)
        around_s = kernel_surface(alone, device, masked, *size).around_s
        whole_s = _kernel_s(alone, device, grid, i) + around_s
        errors.append(relative_errors(whole_s[mask[i]], grid.time_s[0, i][mask[i]]))
    return np.concatenate(errors)


def _summed(table: KernelTable, device: Device, grid: LatentGrid) -> Floats:
    rows = np.outer(grid.batch, grid.length if grid.phase == CONTEXT else np.ones(len(grid.length)))
    model = _model(grid)
    errors = [np.empty(0)]
    for i, heads in enumerate(grid.heads.tolist()):
        time_s = _kernel_s(table, device, grid, i)
        if grid.module:
            time_s = time_s + projections_s(table, device, model, grid.hidden_size, heads, rows)
        else:
            time_s = time_s - surroundings_s(table, device, model, heads, grid.phase, rows)
        errors.append(relative_errors(time_s, grid.time_s[0, i]))
    return np.concatenate(errors)


def _added_up(table: KernelTable, device: Device, grid: LatentGrid) -> Floats:
    alone = replace(table, latent=(grid,))
    errors = [np.empty(0)]
    for i, heads in enumerate(grid.heads.tolist()):
        kernel = (alone, device, _model(grid), heads, grid.kv_dtype)
        prompt_s, launch_s, _ = latent_context_s(*kernel, grid.length)
        surface = kernel_surface(alone, device, grid, *kernel[2:])
        tokens = np.outer(grid.batch, grid.length)
        underfill_s = latent_underfill_s(*kernel, tokens.ravel())[0].reshape(tokens.shape)
        whole_s = launch_s + np.outer(grid.batch, prompt_s) + underfill_s + surface.around_s
        whole_s = np.maximum(whole_s, latent_context_floor_s(*kernel))
        errors.append(relative_errors(whole_s, grid.time_s[0, i]))
    return np.concatenate(errors)


def _kernel_s(table: KernelTable, device: Device, grid: LatentGrid, i: int) -> Floats:
    predict = latent_context_batch_s if grid.phase == CONTEXT else latent_generation_s
    kernel = (table, device, _model(grid), int(grid.heads[i]), grid.kv_dtype)
    return predict(*kernel, grid.batch, grid.length)[0]


def _model(grid: LatentGrid) -> LatentAttention:
    return LatentAttention(
        num_heads=int(grid.heads[-1]),
        q_lora_rank=grid.q_lora_rank,
        kv_lora_rank=grid.kv_lora_rank,
        qk_nope_head_dim=grid.qk_nope_head_dim,
        qk_rope_head_dim=grid.qk_rope_head_dim,
        v_head_dim=grid.v_head_dim,
        index_heads=INDEX_HEADS if grid.index_topk else 0,
        index_head_dim=INDEX_HEAD_DIM if grid.index_topk else 0,
        index_topk=grid.index_topk,
        dtype=grid.weight_dtype,
    )


def gated_delta_net(
    table: KernelTable, device: Device, random: np.random.Generator
) -> Iterator[LeftOut]:
    """Gated delta net, as `_recurrent` says."""
    yield from _recurrent("gated delta net", table, device, random, GATED_DELTA_NET)


def mamba2(table: KernelTable, device: Device, random: np.random.Generator) -> Iterator[LeftOut]:
    """Mamba-2's convolution, as `_recurrent` says; no table has its scan."""
    yield from _recurrent("mamba2", table, device, random, MAMBA2)


def _recurrent(
    family: str,
    table: KernelTable,
    device: Device,
    random: np.random.Generator,
    kind: str,
) -> Iterator[LeftOut]:
    """``points`` of every series at once, and whole ``layouts``, all series of one at a time."""
    series = table.recurrent
    own = np.array([one.kind == kind for one in series], dtype=bool)
    masks = [
        draw(_interior_cells(one), random) if one.kind == kind else np.zeros(one.time_s.shape, bool)
        for one in series
    ]
    yield from _series_errors(family, "points", table, device, masks)
    layouts = sorted({one.widths for one in series if one.kind == kind})
    chosen = draw(_between(np.ones(len(layouts), dtype=bool)), random)
    for widths in (layouts[i] for i in np.flatnonzero(chosen)):
        masks = [
            ~np.isnan(one.time_s) & bool(mine and one.widths == widths)
            for one, mine in zip(series, own, strict=True)
        ]
        yield from _series_errors(family, "layouts", table, device, masks)


def _interior_cells(series: RecurrentSeries) -> Mask:
    return interior(~np.isnan(series.time_s))


def _series_errors(
    family: str, protocol: str, table: KernelTable, device: Device, masks: list[Mask]
) -> Iterator[LeftOut]:
    refitted = replace(
        table,
        recurrent=tuple(
            replace(one, time_s=without(one.time_s, mask))
            for one, mask in zip(table.recurrent, masks, strict=True)
        ),
    )
    for one, mask in zip(table.recurrent, masks, strict=True):
        if mask.any():
            widths = canonical(one.kind, one.widths)
            surface = recurrent_surface(refitted, device, one.kind, one.kernel, one.phase, widths)
            time_s = surface.at(one.batch, one.length)
            errors = relative_errors(time_s[mask], one.time_s[mask])
            yield LeftOut(family, protocol, f"{one.phase} {one.kernel}", errors)
