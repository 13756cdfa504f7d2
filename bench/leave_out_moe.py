"""Leave-out checks of mixture-of-experts and expert all-to-all times.

The bars come from how far measurements of the same thing lie apart (median, p90, percent):

- Rows that a source table holds twice, same kernel and shape (vLLM 0.19 on H200 and B200; SGLang
  0.5.10 on A100, H100 and H200, 0.5.14 on B300 and GB200): balanced routing 0.2 to 1.3 (0.8 to
  9.8), power law, whose routing is drawn anew, 0.4 to 1.7 (2.3 to 12.9).
- The same kernel one engine version later, after the median ratio is taken out: vLLM 0.19 and 0.22
  on B200 2.2 to 3.7 (6.4 to 9.7), vLLM 0.19 and 0.24 on H200 in bf16 4.8 (21.5), TensorRT-LLM
  1.3.0rc10 and rc20 on H200 1.2 to 5.7 (7 to 25). Another kernel for the same shapes: vLLM 0.19 and
  0.24 on H200 in fp8_block 10.9 (49.7), in fp8 37 (70).
- All-to-all on two devices with the same link (H100 and H200, B200 and B300, GB200 and GB300),
  same treatment: SGLang 0.9 to 3.3 (2 to 21), TensorRT-LLM 2.9 to 12 (11 to 29), vLLM 4.7 to 20
  (24 to 80).

So ``points`` should be within twice the repeat noise of a drawn routing: 3.4 (13). ``layouts``
within what a version of the same kernel changes: 6 (25). ``models`` within what another kernel
changes: 11 (50). All of a table's precisions together. All-to-all ``points`` should be within twice
the difference of its pair of devices.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from bench.leave_out import LeftOut, draw, interior, relative_errors, without
from simulator.all_to_all import all_to_all_s
from simulator.fabric import Fabric, Level
from simulator.moe import moe_s

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from bench.leave_out import Floats, Mask
    from simulator.device import Device
    from simulator.table import AllToAllSeries, KernelTable, MoeGrid

MODEL_COLUMNS: Final = [0, 1, 2, 3, 6]
"""Columns of `MoeGrid.layout` that a model fixes: the others are its shards."""
WIDEST_DOMAIN: Final = 1 << 20
"""More devices than any exchange has: measured nodes are told apart, no network is added."""


def moe(table: KernelTable, device: Device, random: np.random.Generator) -> Iterator[LeftOut]:
    """Routed experts, by precision.

    ``points``: interior token counts of every layout and skew. ``layouts``: 20 % of the layouts
    (shape and shards), at every skew, all at once. ``models``: each shape in turn, with all its
    shards and skews and in every precision.
    """
    for dtype in sorted(table.moe):
        grid = table.moe[dtype]
        known = ~np.isnan(grid.time_s)
        inside = np.array([interior(row) for row in known], dtype=bool).reshape(known.shape)
        yield _moe_errors(table, device, dtype, "points", draw(inside, random))
        layouts, row_layout = np.unique(grid.layout, axis=0, return_inverse=True)
        if len(layouts) > 1:
            chosen = draw(np.ones(len(layouts), dtype=bool), random)
            out = chosen[row_layout.ravel()]
            yield _moe_errors(table, device, dtype, "layouts", known & out[:, None])
        for model in np.unique(grid.layout[:, MODEL_COLUMNS], axis=0):
            others = {
                name: replace(other, time_s=without(other.time_s, _of_model(other, model)))
                for name, other in table.moe.items()
            }
            unseen = replace(table, moe=others | {dtype: grid})
            yield _moe_errors(unseen, device, dtype, "models", known & _of_model(grid, model))


def _of_model(grid: MoeGrid, model: NDArray[np.int32]) -> Mask:
    """Rows of one shape of a layer, shape (S, 1)."""
    rows: Mask = (grid.layout[:, MODEL_COLUMNS] == model).all(axis=1)[:, None]
    return rows


def _moe_errors(
    table: KernelTable, device: Device, dtype: str, protocol: str, left_out: Mask
) -> LeftOut:
    grid = table.moe[dtype]
    kept = replace(grid, time_s=without(grid.time_s, left_out))
    refitted = replace(table, moe=dict(table.moe) | {dtype: kept})
    errors: list[Floats] = []
    for row in np.flatnonzero(left_out.any(axis=1)):
        out = left_out[row]
        hidden, width, top_k, experts, tp, ep, gated = grid.layout[row].tolist()
        predicted_s, _ = moe_s(
            refitted,
            device,
            dtype,
            hidden,
            width,
            top_k,
            experts,
            tp,
            ep,
            bool(gated),
            float(grid.skew[row]),
            grid.tokens[out],
        )
        errors.append(relative_errors(predicted_s, grid.time_s[row, out]))
    return LeftOut("moe", protocol, dtype, np.concatenate(errors) if errors else np.empty(0))


def all_to_all(
    table: KernelTable, device: Device, random: np.random.Generator
) -> Iterator[LeftOut]:
    """Dispatch and combine; what is sent stands for the precision.

    ``points``: interior token counts. ``ranks``: every series of one number of ranks in turn, but
    for the fewest that a backend was measured on: every table has those.
    """
    family = table.all_to_all
    masks = [draw(interior(~np.isnan(series.time_s)), random) for series in family]
    yield from _exchange_errors(table, device, "points", masks)
    by_group: dict[tuple[str, str, str], set[int]] = {}
    for series in family:
        by_group.setdefault(_group(series), set()).add(series.ranks)
    for group, ranks in sorted(by_group.items()):
        for count in sorted(ranks)[1:]:
            masks = [
                ~np.isnan(series.time_s) & (_group(series) == group and series.ranks == count)
                for series in family
            ]
            yield from _exchange_errors(table, device, "ranks", masks)


def _group(series: AllToAllSeries) -> tuple[str, str, str]:
    return series.backend, series.phase, series.dtype


def _exchange_errors(
    table: KernelTable, device: Device, protocol: str, masks: list[Mask]
) -> Iterator[LeftOut]:
    left = zip(table.all_to_all, masks, strict=True)
    refitted = replace(
        table,
        all_to_all=tuple(
            replace(series, time_s=without(series.time_s, mask)) for series, mask in left
        ),
    )
    domain = (Level("domain", WIDEST_DOMAIN, device.link_bytes_per_s, 0.0, network=False),)
    for series, mask in zip(table.all_to_all, masks, strict=True):
        if not mask.any():
            continue
        predicted_s, _ = all_to_all_s(
            refitted,
            device,
            series.backend,
            series.phase,
            series.dtype,
            series.ranks,
            series.hidden_size,
            series.top_k,
            series.num_experts,
            series.tokens[mask],
            Fabric(series.ranks // series.nodes, domain),
        )
        yield LeftOut(
            "expert all-to-all",
            protocol,
            series.dtype,
            relative_errors(predicted_s, series.time_s[mask]),
        )
