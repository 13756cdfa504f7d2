"""Times of one measured attention series at every batch and length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from simulator.attention_series import like_sequences
from simulator.attention_work import AttentionShape
from simulator.interpolate import (
    Provenance,
    between_neighbours,
    bracket,
    fill_gaps,
    held,
    isotonic_grid,
    known_part,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from simulator.device import Device
    from simulator.interpolate import FloatArray, LabelArray
    from simulator.table import AttentionSeries

    Family = tuple[AttentionSeries, ...]

_STEPS_BETWEEN_LENGTHS: Final = 4
"""Steps that a fitted surface makes between two measured lengths; 8 change no error by 0.02 %."""
_PARTS_OF_A_SEQUENCE: Final = 6
"""Halvings of a single sequence that a surface reaches down to. A rank with fewer or narrower
heads than were measured counts as part of a sequence; 64 times fewer is beyond any model."""


@dataclass(frozen=True, eq=False)
class Surface:
    """Fitted times of one series, non-decreasing along both axes, without gaps.

    Parameters
    ----------
    shape, device
        What was measured, on what.
    batch, length
        Ascending axes, shapes (R,) and (C,); the batch starts at a part of one sequence.
    launch_s
        Shortest time, or 0 where none is twice as long: then it is unknown what is launch.
    time_s
        Seconds, shape (R, C).
    place
        Provenance of every cell, shape (R, C).

    """

    shape: AttentionShape
    device: Device
    batch: FloatArray
    length: FloatArray
    launch_s: float
    time_s: FloatArray
    place: LabelArray

    @property
    def least_batch(self) -> float:
        """Smallest measured batch."""
        return float(self.batch[_PARTS_OF_A_SEQUENCE])

    @property
    def measured_length(self) -> FloatArray:
        """Measured lengths, ascending."""
        return self.length[::_STEPS_BETWEEN_LENGTHS]

    def growth(self, reached: FloatArray, length: FloatArray, longest: float) -> FloatArray:
        """Work of sequences of ``length`` over that of ``reached``, in a window of ``longest``."""
        window = int(longest) if np.isfinite(longest) else self.shape.window_tokens
        shape = replace(self.shape, window_tokens=window)
        one = np.array(1.0)
        return shape.work_s(self.device, one, length) / shape.work_s(self.device, one, reached)

    def at(self, batch: FloatArray, length: FloatArray) -> tuple[FloatArray, LabelArray]:
        """Seconds and labels; ``batch`` and ``length`` broadcast.

        Bilinear between the fitted points; beyond them all but the launch grows as the work does.
        """
        row, row_weight = bracket(self.batch, batch)
        col, col_weight = bracket(self.length, length)
        row_weight, col_weight = np.broadcast_arrays(row_weight, col_weight)
        time_s, label = np.zeros(row_weight.shape), np.zeros(row_weight.shape, dtype=np.int8)
        between = ((row_weight > 0) & (row_weight < 1)) | ((col_weight > 0) & (col_weight < 1))
        for step_row, weight_row in ((0, 1 - row_weight), (1, row_weight)):
            for step_col, weight_col in ((0, 1 - col_weight), (1, col_weight)):
                cell = row + step_row, col + step_col
                weight = weight_row * weight_col
                time_s += weight * self.time_s[cell]
                label = np.maximum(label, np.where(weight > 0, self.place[cell], 0))
        label = np.maximum(label, np.where(between, Provenance.INTERPOLATED, 0))
        outside = (batch < self.least_batch) | (batch > self.batch[-1])
        outside = outside | (length < self.length[0]) | (length > self.length[-1])
        label = np.where(outside, Provenance.EXTRAPOLATED, label).astype(np.int8)
        beyond_batch = np.maximum(batch / self.batch[-1], 1.0)
        last = np.maximum(length, self.length[-1])
        more = beyond_batch * self.growth(np.array(self.length[-1]), last, np.inf)
        return self.launch_s + (time_s - self.launch_s) * more, label


@dataclass(frozen=True, eq=False)
class _Nodes:
    """Log of measured over reference time of one series at its measured sizes, with gaps.

    The reference is the batch's own launch (its time at the shortest length) plus the work.
    """

    shape: AttentionShape
    device: Device
    batch: FloatArray
    length: FloatArray
    launch_s: FloatArray
    log_ratio: FloatArray

    def reference_s(self, batch: FloatArray, length: FloatArray) -> FloatArray:
        launch_s = np.interp(batch, self.batch, self.launch_s)
        return launch_s + self.shape.work_s(self.device, batch, length)

    def along_batch(
        self, columns: NDArray[np.intp], batch: FloatArray, *, hold: bool
    ) -> FloatArray:
        """Log ratio of measured lengths at other batches, shape (R, C).

        ``columns`` says which length each of the C columns of ``batch`` reads. NaN where a
        neighbour is unknown, and outside the batches unless they are to ``hold``.
        """
        row, weight = bracket(np.log(self.batch), np.log(batch))
        low, high = self.log_ratio[row, columns], self.log_ratio[row + 1, columns]
        value = np.where(weight > 0, low * (1 - weight) + high * weight, low)
        outside = (batch < self.batch[0]) | (batch > self.batch[-1])
        return value if hold else np.where(outside, np.nan, value)

    def at_like_work(
        self,
        columns: NDArray[np.intp],
        batch: FloatArray,
        length: FloatArray,
        *,
        hold: bool,
    ) -> FloatArray:
        """As `along_batch`, at the batches that have as many tokens in all as those wanted.

        A kernel fills the device by its tokens in all, so lengths are compared at equal ones.
        ``batch`` has shape (R,), ``length`` (C,) and ``columns`` says where to look for each.
        """
        tokens = self.shape.tokens(length) / self.shape.tokens(self.length[columns])
        return self.along_batch(columns, batch[:, None] * tokens, hold=hold)


@lru_cache(maxsize=1024)
def surface(family: Family, index: int, device: Device, prefill: bool) -> Surface:
    """Fit one series of a table's family; the others help where it has gaps.

    Gaps between measured points are filled from all sides (`fill_gaps`): along the batch, along
    the length, along the length at like work, and from the series with the next head counts, their
    difference to this one interpolated. Beyond the measured points utilisation is held: for prefill
    along the batch (the largest measured sizes left out on H100: 1.2 % median error, 2.5 % along
    the length), for decode along the length (1.3 %, 3.0 % along the batch).
    """
    nodes = _nodes(family[index], device, prefill)
    log_ratio = nodes.log_ratio
    place = np.where(np.isnan(log_ratio), Provenance.INTERPOLATED, Provenance.MEASURED)
    sides = _sides(nodes, log_ratio)
    if (np.isnan(log_ratio) & ~np.isnan(sides)).any():
        log_ratio = fill_gaps(log_ratio, _estimates(nodes, _donors(family, index, nodes)))
    place = np.where(np.isnan(log_ratio), Provenance.EXTRAPOLATED, place)
    for axis in (0, 1) if prefill else (1, 0):
        log_ratio = held(log_ratio, axis)
    return _dense(replace(nodes, log_ratio=log_ratio), place)


@lru_cache(maxsize=1024)
def _nodes(series: AttentionSeries, device: Device, prefill: bool) -> _Nodes:
    shape = AttentionShape(
        prefill=prefill,
        head_dim=series.head_dim,
        heads=series.heads,
        kv_heads=series.kv_heads,
        kv_dtype=series.kv_dtype,
        window_tokens=series.window_tokens,
    )
    (batch, length), time_s = known_part((series.batch, series.length), series.time_s)
    launch_s = np.maximum.accumulate(held(held(time_s, 1), 0)[:, 0])
    nodes = _Nodes(shape, device, batch, length, launch_s, time_s)
    return replace(nodes, log_ratio=np.log(time_s / nodes.reference_s(batch[:, None], length)))


def _donors(family: Family, index: int, nodes: _Nodes) -> list[FloatArray]:
    """Log ratios of the series with the next head counts, at the like work of every node."""
    own = family[index]
    like = [
        one
        for one in family
        if (one.head_dim, one.kv_dtype, one.window_tokens)
        == (own.head_dim, own.kv_dtype, own.window_tokens)
        and not np.isnan(one.time_s).all()
    ]
    same_kv = [one for one in like if one.kv_heads == own.kv_heads]
    same_group = [one for one in like if one.heads * own.kv_heads == own.heads * one.kv_heads]
    chosen = []
    for group in (same_kv, same_group):
        fewer = [one for one in group if one.heads < own.heads]
        more = [one for one in group if one.heads > own.heads]
        chosen += [*sorted(fewer, key=_heads)[-1:], *sorted(more, key=_heads)[:1]]
    out = []
    for one in chosen:
        other = _nodes(one, nodes.device, nodes.shape.prefill)
        batch = np.broadcast_to(
            nodes.batch[:, None] * like_sequences(own, one, prefill=nodes.shape.prefill),
            nodes.log_ratio.shape,
        )
        columns = np.minimum(np.searchsorted(other.length, nodes.length), len(other.length) - 1)
        values = other.along_batch(columns, batch, hold=False)
        out.append(np.where(other.length[columns] == nodes.length, values, np.nan))
    return out


def _heads(one: AttentionSeries) -> int:
    return one.heads


def _sides(nodes: _Nodes, values: FloatArray) -> FloatArray:
    """Mean of what the neighbours along the batch and along the length say."""
    along_batch = between_neighbours(values, 0, np.log(nodes.batch))
    along_length = between_neighbours(values, 1, np.log(nodes.length))
    mean = (along_batch + along_length) / 2
    return np.where(np.isnan(mean), np.fmax(along_batch, along_length), mean)


def _estimates(nodes: _Nodes, donors: list[FloatArray]) -> list[FloatArray]:
    values = nodes.log_ratio
    log_length = np.log(nodes.length)
    estimates = [
        between_neighbours(values, 0, np.log(nodes.batch)),
        between_neighbours(values, 1, log_length),
    ]
    inner = np.arange(1, len(log_length) - 1)
    below, above = (
        nodes.at_like_work(inner + step, nodes.batch, nodes.length[inner], hold=False)
        for step in (-1, 1)
    )
    weight = (log_length[inner] - log_length[inner - 1]) / (
        log_length[inner + 1] - log_length[inner - 1]
    )
    at_like_work = np.full(values.shape, np.nan)
    at_like_work[:, inner] = below * (1 - weight) + above * weight
    estimates.append(at_like_work)
    estimates += [donor + _sides(nodes, values - donor) for donor in donors]
    return estimates


def _dense(nodes: _Nodes, place: LabelArray) -> Surface:
    """Monotone surface through filled nodes, with steps between lengths and parts of a sequence.

    Between two lengths the log ratio is interpolated at like work; along the batch, times are.
    """
    parts = nodes.batch[0] * 0.5 ** np.arange(_PARTS_OF_A_SEQUENCE, 0, -1.0)
    batch = np.concatenate([parts, nodes.batch])
    steps = np.arange(_STEPS_BETWEEN_LENGTHS * (len(nodes.length) - 1) + 1)
    low = np.minimum(steps // _STEPS_BETWEEN_LENGTHS, len(nodes.length) - 2)
    share = steps / _STEPS_BETWEEN_LENGTHS - low
    length = nodes.length[low] ** (1 - share) * nodes.length[low + 1] ** share
    below, above = (
        nodes.at_like_work(columns, batch, length, hold=True) for columns in (low, low + 1)
    )
    log_ratio = below * (1 - share) + above * share
    log_time = np.log(nodes.reference_s(batch[:, None], length)) + log_ratio
    # Nothing between two measured lengths is faster or slower than both.
    first, last = (
        log_time[:, low * _STEPS_BETWEEN_LENGTHS],
        log_time[:, (low + 1) * _STEPS_BETWEEN_LENGTHS],
    )
    log_time = np.clip(log_time, np.minimum(first, last), np.maximum(first, last))
    outside = np.full((len(parts), place.shape[1]), Provenance.EXTRAPOLATED)
    node_place = np.vstack([outside, place])
    step_place = np.maximum(node_place[:, low], node_place[:, low + 1])
    step_place = np.maximum(step_place, Provenance.INTERPOLATED)
    step_place = np.where(share == 0, node_place[:, low], step_place)
    step_place = np.where(share == 1, node_place[:, low + 1], step_place)
    time_s = np.exp(isotonic_grid(log_time))
    shortest_s = float(time_s.min())
    return Surface(
        shape=nodes.shape,
        device=nodes.device,
        batch=batch,
        length=length,
        launch_s=shortest_s if time_s.max() >= 2 * shortest_s else 0.0,
        time_s=time_s,
        place=step_place.astype(np.int8),
    )
