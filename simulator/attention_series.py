"""Which measured attention series stand for a wanted kernel, and at which batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from simulator.attention_work import FULL_ATTENTION
from simulator.interpolate import Provenance
from simulator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from simulator.attention_work import AttentionShape
    from simulator.table import AttentionSeries

    Family = tuple[AttentionSeries, ...]
    Kind = tuple[int, str, int]


@dataclass(frozen=True)
class Part:
    """One measured series.

    ``index`` is its place in the family, ``weight`` that of its time, and ``sequences`` says how
    many of its sequences do the work of one wanted one.
    """

    index: int
    weight: float
    sequences: float


@dataclass(frozen=True)
class SeriesMix:
    """Measured series whose weighted times stand for one shape.

    Parameters
    ----------
    parts
        Series with weights that sum to 1. Each is read at as many of its own sequences as make
        the same work: a kernel's blocks are spread over (sequence, head) pairs, so more heads act
        as more sequences.
    label
        Best label that a time from this mix can carry.

    """

    parts: tuple[Part, ...]
    label: Provenance


def match(family: Family, shape: AttentionShape) -> SeriesMix | None:
    """Choose the series for one shape.

    The nearest measured head width serves, at the same KV dtype and window where there is one
    (a window that was not measured is full attention over a clipped length). Among its head
    layouts, the KV-head count measured nearest (by ratio) to the wanted one whose query heads
    reach the wanted group size serves; within it query heads interpolate linearly.

    Returns
    -------
    SeriesMix or None
        None if there is no series at all that could stand in.

    Raises
    ------
    ValueError
        If ``kv_heads`` is below 1 or ``heads`` below ``kv_heads``.

    """
    if not 1 <= shape.kv_heads <= shape.heads:
        raise ValueError(f"need 1 <= kv_heads <= heads, got {shape.kv_heads} and {shape.heads}")

    def unlike(kind: Kind) -> tuple[float, int, bool, bool]:
        head_dim, kv_dtype, window = kind
        distance = abs(math.log(head_dim / shape.head_dim))
        return distance, -head_dim, kv_dtype != shape.kv_dtype, window != shape.window_tokens

    by_kind = _by_kind(family)
    usable = [kind for kind in by_kind if kind[2] in (shape.window_tokens, FULL_ATTENTION)]
    if not usable:
        return None
    kind = min(usable, key=unlike)
    by_kv_heads = by_kind[kind]

    def rank(donor: int) -> tuple[bool, float, int]:
        reach = by_kv_heads[donor]
        wanted = shape.heads * donor / shape.kv_heads
        outside = not min(reach) <= wanted <= max(reach)
        return outside, abs(math.log(donor / shape.kv_heads)), -donor

    donor = min(by_kv_heads, key=rank)
    wanted = shape.heads * donor / shape.kv_heads
    weighted, reached, place = _between(by_kv_heads[donor], wanted)
    alike = kind == (shape.head_dim, shape.kv_dtype, shape.window_tokens)
    label = place if alike and donor == shape.kv_heads else Provenance.EXTRAPOLATED
    sequences = shape.kv_heads / donor * shape.head_dim / kind[0]
    if shape.prefill:
        sequences *= wanted / reached
    else:
        sequences *= DTYPE_BYTES[shape.kv_dtype] / DTYPE_BYTES[kind[1]]
    parts = tuple(Part(index, weight, sequences) for index, weight in weighted)
    return SeriesMix(parts, label)


def like_sequences(wanted: AttentionSeries, measured: AttentionSeries, *, prefill: bool) -> float:
    """Sequences of a measured series that do the work of one wanted one of the same width.

    Arithmetic sets the pace of prefill, KV traffic that of decode.
    """
    if prefill:
        return wanted.heads / measured.heads
    return wanted.kv_heads / measured.kv_heads


@lru_cache(maxsize=64)
def _by_kind(family: Family) -> dict[Kind, dict[int, dict[int, int]]]:
    """Places of the series that have any time, by kind, KV heads and query heads."""
    found: dict[Kind, dict[int, dict[int, int]]] = {}
    for index, one in enumerate(family):
        if not np.isnan(one.time_s).all():
            kind = one.head_dim, one.kv_dtype, one.window_tokens
            found.setdefault(kind, {}).setdefault(one.kv_heads, {})[one.heads] = index
    return found


def _between(
    group: dict[int, int], wanted: float
) -> tuple[list[tuple[int, float]], float, Provenance]:
    """Series around ``wanted`` query heads with their weights, the heads reached, and a label.

    ``group`` holds places of series by query heads.
    """
    measured = sorted(group)
    reached = min(max(wanted, measured[0]), measured[-1])
    if reached in group:
        label = Provenance.MEASURED if reached == wanted else Provenance.EXTRAPOLATED
        return [(group[int(reached)], 1.0)], reached, label
    high = next(heads for heads in measured if heads > reached)
    low = measured[measured.index(high) - 1]
    weight = (reached - low) / (high - low)
    return [(group[low], 1 - weight), (group[high], weight)], reached, Provenance.INTERPOLATED
