"""Which measured attention series stand for the heads of one rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from simulator.interpolate import Provenance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulator.table import AttentionSeries

FULL_ATTENTION: Final = 0
"""``window_tokens`` of a series without a sliding window."""


@dataclass(frozen=True)
class SeriesMix:
    """Measured series whose weighted times stand for one head layout.

    Parameters
    ----------
    parts
        Series and the weights of their times; weights sum to 1.
    copies
        KV heads wanted over KV heads of the series: how many such head groups run side by side.
    head_ratio
        Query heads wanted over those the series reach, 1 inside the measured range.
    label
        Best label that a time from this mix can carry.

    """

    parts: tuple[tuple[AttentionSeries, float], ...]
    copies: float
    head_ratio: float
    label: Provenance


def match(
    series: Sequence[AttentionSeries], head_dim: int, kv_dtype: str, heads: int, kv_heads: int
) -> SeriesMix | None:
    """Choose the series for one rank's heads.

    The KV-head count measured nearest (by ratio) to the wanted one whose query heads reach the
    wanted group size serves; within it query heads interpolate linearly.

    Returns
    -------
    SeriesMix or None
        None if no series has this head width and KV dtype with full attention.

    Raises
    ------
    ValueError
        If ``kv_heads`` is below 1 or ``heads`` below ``kv_heads``.

    """
    if not 1 <= kv_heads <= heads:
        raise ValueError(f"need 1 <= kv_heads <= heads, got {kv_heads} and {heads}")
    by_kv_heads: dict[int, list[AttentionSeries]] = {}
    for one in series:
        same_kernel = one.head_dim == head_dim and one.kv_dtype == kv_dtype
        if same_kernel and one.window_tokens == FULL_ATTENTION:
            by_kv_heads.setdefault(one.kv_heads, []).append(one)
    if not by_kv_heads:
        return None

    def rank(donor: int) -> tuple[bool, float, int]:
        reach = [one.heads for one in by_kv_heads[donor]]
        wanted = heads * donor / kv_heads
        outside = not min(reach) <= wanted <= max(reach)
        return outside, abs(math.log(donor / kv_heads)), -donor

    donor = min(by_kv_heads, key=rank)
    parts, head_ratio, exact = _between(by_kv_heads[donor], heads * donor / kv_heads)
    outside = donor != kv_heads or head_ratio != 1
    inside = Provenance.MEASURED if exact else Provenance.INTERPOLATED
    label = Provenance.EXTRAPOLATED if outside else inside
    return SeriesMix(parts, kv_heads / donor, head_ratio, label)


def _between(
    group: Sequence[AttentionSeries], wanted: float
) -> tuple[tuple[tuple[AttentionSeries, float], ...], float, bool]:
    """Parts around ``wanted`` query heads, wanted over reached heads, and whether it is a node."""
    ordered = sorted(group, key=lambda one: one.heads)
    reached = min(max(wanted, ordered[0].heads), ordered[-1].heads)
    for one in ordered:
        if one.heads == reached:
            return ((one, 1.0),), wanted / reached, True
    upper = next(i for i, one in enumerate(ordered) if one.heads > reached)
    low, high = ordered[upper - 1], ordered[upper]
    weight = (reached - low.heads) / (high.heads - low.heads)
    return ((low, 1 - weight), (high, weight)), wanted / reached, False
