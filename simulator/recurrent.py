"""Time of the kernels of linear-attention and state-space layers: convolution and scan.

Mamba-2's scan is linear attention with scalar decay (state-space duality, arXiv 2405.21060), so one
form of widths serves it and the gated delta net alike: key heads and width, value heads and width,
convolution width. In Mamba-2 the groups are the key heads and the state size is the key width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from simulator.interpolate import Provenance, isotonic, labels, not_negative, positive
from simulator.kernel_work import recurrent_work
from simulator.local_fit import between, grown, joined_labels, local_slab
from simulator.model import GatedDeltaNet
from simulator.table import RecurrentSeries

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from simulator.device import Device
    from simulator.interpolate import FloatArray, LabelArray
    from simulator.model import Mamba2
    from simulator.table import KernelTable

    Widths = tuple[int, int, int, int, int]

GATED_DELTA_NET: Final = "gated_delta_net"
MAMBA2: Final = "mamba2"
CONVOLUTION: Final = "convolution"
SCAN: Final = "scan"
KERNELS: Final = (CONVOLUTION, SCAN)
CONTEXT: Final = "context"
GENERATION: Final = "generation"
STRETCH: Final = {"context": 1.0, "generation": 2.0}
"""In decode the kernels stream, so their regime changes with all sizes together
(`local_quadratic`): 2 gives a median error of 0.5 % on left-out points of the scan where 1 gives
1.4 %. In prefill the scan's length counts apart from its batch: 1.7 and 2.2 %."""


def recurrent_generation_s(
    table: KernelTable,
    device: Device,
    mixer: GatedDeltaNet | Mamba2,
    tp: int,
    batch: ArrayLike,
) -> tuple[FloatArray, LabelArray]:
    """Seconds of one layer's convolution and scan in decode, one token per sequence.

    Joined linearly in the batch, since the kernels read and write one state per sequence; beyond
    the table time grows with the batch. `recurrent_surface` says how widths are matched.

    Parameters
    ----------
    table, device
        Measured kernels, and the peaks of the same device.
    mixer, tp
        The layer, and the tensor-parallel ranks that its heads are split over.
    batch
        Sequences, shape (S,), each at least 1.

    Returns
    -------
    time_s, label
        Shapes (S,); non-decreasing.

    Raises
    ------
    ValueError
        If a size is below 1.

    """
    sequences = positive("batch", batch)
    positive("tp", [tp])
    time_s = np.zeros(sequences.shape)
    label = labels(time_s.shape, Provenance.MEASURED)
    for kernel in KERNELS:
        surface = recurrent_surface(
            table, device, _kind(mixer), kernel, GENERATION, _widths(mixer, tp)
        )
        beyond = np.maximum(1.0, sequences / surface.batch[-1])
        node_s = np.exp(isotonic(np.log(surface.time_s[:, 0])))
        time_s += np.interp(sequences, surface.batch, node_s) * beyond
        label = np.maximum(label, joined_labels(surface.batch, surface.label[:, 0], sequences))
    return time_s, label


def recurrent_context_s(
    table: KernelTable,
    device: Device,
    mixer: GatedDeltaNet | Mamba2,
    tp: int,
    length: ArrayLike,
) -> tuple[FloatArray, float, LabelArray]:
    """Seconds of one layer's convolution and scan in prefill, as a launch and a cost per sequence.

    A batch of prompts costs ``launch_s + sum of F(length)``, a chunk of c tokens after p cached
    ones ``F(p + c) - F(p)``; F is joined linearly, being affine in tokens. It is measured on a
    single sequence. A scan walks along its sequence, so one alone leaves most of the device idle
    and further ones run beside it for nothing: on H100 four prompts take as long as one, and
    sixty-four take 0.3 of the sum (32 heads). An iteration that computes prompts at all mostly
    computes one; with several the sum reads too high.

    Parameters
    ----------
    table, device, mixer, tp
        As in `recurrent_generation_s`.
    length
        Prompt lengths, tokens, shape (T,), each 0 or more.

    Returns
    -------
    per_sequence_s, launch_s, label
        F, shape (T,), 0 at length 0 and non-decreasing; one launch; labels, shape (T,).

    Raises
    ------
    ValueError
        If a length is negative or ``tp`` below 1.

    """
    tokens = not_negative("length", length)
    positive("tp", [tp])
    time_s, launch_s = np.zeros(tokens.shape), 0.0
    label = labels(tokens.shape, Provenance.MEASURED)
    kind, widths = _kind(mixer), _widths(mixer, tp)
    for kernel in KERNELS:
        surface = recurrent_surface(table, device, kind, kernel, CONTEXT, widths)
        axis = np.concatenate([[0.0], surface.length])
        single_s = np.exp(isotonic(np.log(surface.time_s[0])))
        above_s = np.concatenate([[0.0], single_s - single_s[0]])
        beyond = np.maximum(1.0, tokens / axis[-1])
        time_s += np.interp(tokens, axis, above_s) * beyond
        launch_s += float(single_s[0])
        label = np.maximum(label, joined_labels(surface.length, surface.label[0], tokens))
    return time_s, launch_s, label


@dataclass(frozen=True, eq=False)
class RecurrentSurface:
    """Times of one kernel without gaps: axes (B,) and (L,), seconds and labels (B, L)."""

    batch: FloatArray
    length: FloatArray
    time_s: FloatArray
    label: LabelArray

    def at(self, batch: NDArray[np.int32], length: NDArray[np.int32]) -> FloatArray:
        """Seconds at every pair of sizes, joined linearly and held beyond the axes, (B, L)."""
        columns = [np.interp(batch, self.batch, column) for column in self.time_s.T]
        rows = np.stack(columns, axis=1)
        return np.stack([np.interp(length, self.length, row) for row in rows])


@lru_cache(maxsize=256)
def recurrent_surface(
    table: KernelTable,
    device: Device,
    kind: str,
    kernel: str,
    phase: str,
    widths: Widths,
) -> RecurrentSurface:
    """Times of one kernel of a rank, from the series of the nearest sizes.

    A scan is known by the elements of its states and, in prefill, of its keys; a convolution by its
    channels times its width: measured layouts that agree in those agree in time. A size
    between measured ones, like a missing cell, is filled by `local_slab` in the logs of size,
    batch and length; beyond them the part above the launch grows with the size. A table that
    measured only the other kind lends that (of Mamba-2 no table has the scan); one without either
    leaves the roofline.

    Parameters
    ----------
    table, device
        Measured kernels, and the peaks of the same device.
    kind, kernel, phase
        As in `simulator.table.RecurrentSeries`.
    widths
        Of the rank: key heads and width, value heads and width, convolution width.

    """
    alike = [
        one
        for one in table.recurrent
        if one.kernel == kernel and one.phase == phase and not np.isnan(one.time_s).all()
    ]
    own = [one for one in alike if one.kind == kind]
    if not alike:
        return _roofline_surface(device, kernel, phase, widths)
    group = own or alike
    sizes = np.array([_sizes(kernel, phase, canonical(one.kind, one.widths)) for one in group])
    wanted = np.array(_sizes(kernel, phase, widths))
    reached = np.clip(wanted, sizes.min(axis=0), sizes.max(axis=0))
    by_distance = np.lexsort(
        (
            [canonical(one.kind, one.widths) != widths for one in group],
            np.abs(np.log(sizes / reached)).sum(axis=1),
        )
    )
    batch, length = (
        np.unique(np.concatenate(axes)).astype(np.float64)
        for axes in ([one.batch for one in group], [one.length for one in group])
    )
    cube = np.full((len(group), len(batch), len(length)), np.nan)
    for times_s, one in zip(cube, group, strict=True):
        cells = np.searchsorted(batch, one.batch), np.searchsorted(length, one.length)
        times_s[np.ix_(*cells)] = one.time_s
    log_s, filled = _log_s(cube, sizes, batch, length, reached, by_distance[0], STRETCH[phase])
    ideal_s = _ideal_s(device, kernel, phase, widths, batch, length)
    time_s = grown(np.exp(log_s), ideal_s)
    outside = bool((wanted != reached).any())
    launch_s = time_s.min()
    time_s = launch_s + (time_s - launch_s) * wanted[0] / reached[0]
    label = np.where(filled, Provenance.INTERPOLATED, Provenance.MEASURED)
    label = np.where(np.isnan(log_s), Provenance.EXTRAPOLATED, label)
    if outside or not own:
        label = np.full(label.shape, Provenance.EXTRAPOLATED)
    return RecurrentSurface(batch, length, time_s, label.astype(np.int8))


def canonical(kind: str, widths: Widths) -> Widths:
    """Widths of a series as key heads and width, value heads and width, convolution width."""
    if kind != MAMBA2:
        return widths
    heads, head_dim, state_size, groups, conv_width = widths
    return groups, state_size, heads, head_dim, conv_width


def _kind(mixer: GatedDeltaNet | Mamba2) -> str:
    return GATED_DELTA_NET if isinstance(mixer, GatedDeltaNet) else MAMBA2


def _widths(mixer: GatedDeltaNet | Mamba2, tp: int) -> Widths:
    """Canonical widths on one of ``tp`` ranks; key heads and groups are replicated below one."""
    if isinstance(mixer, GatedDeltaNet):
        return (
            max(1, mixer.num_key_heads // tp),
            mixer.key_head_dim,
            max(1, mixer.num_value_heads // tp),
            mixer.value_head_dim,
            mixer.conv_width,
        )
    return (
        max(1, mixer.num_groups // tp),
        mixer.state_size,
        max(1, mixer.num_heads // tp),
        mixer.head_dim,
        mixer.conv_width,
    )


def _sizes(kernel: str, phase: str, widths: Widths) -> tuple[float, ...]:
    """What a kernel's time goes by beside batch and length; of equal number for equal kernels."""
    key_heads, key_width, value_heads, value_width, conv_width = widths
    keys, values = key_heads * key_width, value_heads * value_width
    if kernel == CONVOLUTION:
        return (float((2 * keys + values) * conv_width),)
    states = float(values * key_width)
    return (states, float(keys)) if phase == CONTEXT else (states,)


def _log_s(
    cube: FloatArray,
    sizes: FloatArray,
    batch: FloatArray,
    length: FloatArray,
    reached: FloatArray,
    nearest: int,
    stretch: float,
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Log times of a size over all batches and lengths, and which of them were filled.

    ``cube`` holds the times of every series, shape (S, B, L). Cells that no series brackets in
    sizes, nor the nearest one in batch or length, stay NaN.
    """
    known = ~np.isnan(cube)
    slab = np.log(cube[nearest])
    own = bool((sizes[nearest] == reached).all())
    log_s = slab if own else np.full(slab.shape, np.nan)
    holes = np.isnan(log_s)
    smaller, larger = (sizes <= reached).all(axis=1), (sizes >= reached).all(axis=1)
    bracketed = known[smaller].any(axis=0) & known[larger].any(axis=0)
    fill = holes & (bracketed | between(known[nearest], 0) | between(known[nearest], 1))
    if fill.any():
        series, row, column = np.nonzero(known)
        cells = np.log(np.stack([batch[row], length[column]], axis=1))
        fitted = local_slab(
            np.concatenate([np.log(sizes[series]), cells], axis=1),
            np.log(cube[known]),
            np.log(reached),
            np.log(sizes[nearest]),
            slab,
            np.log(batch),
            np.log(length),
            stretch,
        )
        log_s = np.where(fill, fitted, log_s)
    return log_s, fill


def _ideal_s(
    device: Device,
    kernel: str,
    phase: str,
    widths: Widths,
    batch: FloatArray,
    length: FloatArray,
) -> FloatArray:
    """Seconds that the kernel's traffic takes at full bandwidth, shape (B, L)."""
    axes = batch.astype(np.int32), length.astype(np.int32)
    shape = RecurrentSeries(GATED_DELTA_NET, kernel, phase, widths, *axes, np.empty(0))
    seconds: FloatArray = recurrent_work(shape)[0].ideal_s(device)
    return seconds


def _roofline_surface(device: Device, kernel: str, phase: str, widths: Widths) -> RecurrentSurface:
    """Traffic at full bandwidth; it is affine in both sizes, so two of each tell it all."""
    batch = np.array([1.0, 2.0])
    length = np.array([1.0, 2.0**15 if phase == CONTEXT else 2.0])
    time_s = _ideal_s(device, kernel, phase, widths, batch, length)
    return RecurrentSurface(batch, length, time_s, labels(time_s.shape, Provenance.ROOFLINE))
