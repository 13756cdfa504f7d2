"""Build a kernel table from the arrays of a file, checking them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from planner.errors import NO_VALUE, InputError
from planner.io.kernel_format import FAMILIES, HIGH, LAYOUT, LOW, MEMBERS, MISSING, NUMBERS, decode
from planner.io.kernel_layout import LayoutReader, frozen, skews
from simulator.table import (
    AllToAllSeries,
    AttentionSeries,
    BatchedGemm,
    GemmGrid,
    KernelTable,
    LatentGrid,
    MessageSeries,
    MoeGrid,
    RecurrentSeries,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from planner.io.kernel_layout import Grid


def build_table(
    source: str,
    device: str,
    engine: str,
    version: str,
    arrays: Mapping[str, NDArray[Any]],
) -> KernelTable:
    """The table that a file's arrays describe.

    Parameters
    ----------
    source
        The file's name, for messages.
    device, engine, version
        What was measured.
    arrays
        The file's members by name.

    Raises
    ------
    InputError
        If a member is missing, the layout is not as `planner.io.kernel_format` says, or a number
        leads to no latency.

    """
    for name, dtype in MEMBERS.items():
        if name not in arrays:
            raise InputError(source=source, field=name, value=NO_VALUE, rule="must be in the file")
        if arrays[name].dtype != dtype or arrays[name].ndim != 1:
            raise InputError(
                source=source,
                field=name,
                value=f"{arrays[name].dtype} in {arrays[name].ndim} dimensions",
                rule=f"must be {np.dtype(dtype)} in 1 dimension",
            )
    families = LayoutReader(source, arrays[NUMBERS]).read(arrays[LAYOUT])
    grids = [grid for members in families.values() for grid in members]
    try:
        decoded = decode([grid.shape for grid in grids], arrays[MISSING], arrays[LOW], arrays[HIGH])
    except ValueError as error:
        raise InputError(source=source, field="", value=NO_VALUE, rule=str(error)) from None
    for grid, time_s in zip(grids, decoded, strict=True):
        grid.time_s = frozen(time_s)
    return KernelTable(
        device=device,
        engine=engine,
        engine_version=version,
        gemm={g.labels["precision"]: _gemm(g) for g in families["gemm"]},
        context=_attention(families["context"]),
        generation=_attention(families["generation"]),
        all_reduce=_messages(families["all_reduce"], "mode"),
        nccl=_messages(families["nccl"], "operation"),
        moe={g.labels["precision"]: _moe(g) for g in families["moe"]},
        latent=tuple(_latent(g) for g in families["latent"]),
        latent_bmm={
            (g.labels["side"], g.labels["precision"]): BatchedGemm(
                g.axes["heads"], g.axes["tokens"], g.time_s
            )
            for g in families["latent_bmm"]
        },
        recurrent=tuple(series for g in families["recurrent"] for series in _recurrent(g)),
        all_to_all=tuple(series for g in families["all_to_all"] for series in _all_to_all(g)),
    )


def _gemm(grid: Grid) -> GemmGrid:
    return GemmGrid(grid.axes["m"], grid.axes["n"], grid.axes["k"], grid.time_s)


def _attention(grids: list[Grid]) -> tuple[AttentionSeries, ...]:
    return tuple(
        AttentionSeries(
            head_dim=head_dim,
            window_tokens=window,
            kv_dtype=grid.labels["kv_dtype"],
            heads=heads,
            kv_heads=kv_heads,
            batch=grid.axes["batch"],
            length=grid.axes["length"],
            time_s=time_s,
        )
        for grid in grids
        for (head_dim, window, heads, kv_heads), time_s in zip(
            grid.series.tolist(), grid.time_s, strict=True
        )
    )


def _messages(grids: list[Grid], label: str) -> dict[tuple[str, int], MessageSeries]:
    return {
        (grid.labels[label], devices): MessageSeries(grid.axes["elements"], time_s)
        for grid in grids
        for (devices,), time_s in zip(grid.series.tolist(), grid.time_s, strict=True)
    }


def _moe(grid: Grid) -> MoeGrid:
    return MoeGrid(
        layout=frozen(grid.series[:, :-1].astype(np.int32)),
        skew=frozen(skews(grid.series[:, -1])),
        tokens=grid.axes["tokens"],
        time_s=grid.time_s,
    )


def _latent(grid: Grid) -> LatentGrid:
    return LatentGrid(**grid.labels, **grid.axes, time_s=grid.time_s)


def _recurrent(grid: Grid) -> list[RecurrentSeries]:
    return [
        RecurrentSeries(
            **grid.labels,
            widths=(widths[0], widths[1], widths[2], widths[3], widths[4]),
            **grid.axes,
            time_s=time_s,
        )
        for widths, time_s in zip(grid.series.tolist(), grid.time_s, strict=True)
    ]


def _all_to_all(grid: Grid) -> list[AllToAllSeries]:
    names = FAMILIES["all_to_all"].series
    return [
        AllToAllSeries(
            **grid.labels,
            **dict(zip(names, row, strict=True)),
            **grid.axes,
            time_s=time_s,
        )
        for row, time_s in zip(grid.series.tolist(), grid.time_s, strict=True)
    ]
