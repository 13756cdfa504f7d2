"""Filling the gaps of a measured grid: a local fit between measured cells, growth beyond them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from simulator.interpolate import Provenance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from simulator.interpolate import FloatArray, LabelArray

NEIGHBOURS: Final = 24
"""Points that each fit sees. A quadratic in three variables has ten coefficients; 20 to 30 points
serve equally well on the latent-attention tables (``python -m bench.kernel_interpolation``), 40
blur the steps of kernels that change regime and 14 leave the noise in."""
RIDGE: Final = 1e-2
"""Weight of the pull of slopes and curvatures to zero, in steps of the coordinates. It only decides
where neighbours lie on one line; ten times as much costs a tenth of the accuracy."""
SLIP: Final = 2.0
"""Kernels chosen by size may be up to 1.5 times slower just before a switch (sparse decode of
TensorRT-LLM); slips in the tables are tenfold."""
REMEMBERED: Final = 0.1
"""Log distance over which a measured place's own deviation fades (`local_slab`): 10 %, so that a
step of 1 % moves the time by a tenth of the deviation."""
_REACH: Final = 1.02
"""The weight falls to zero this far beyond the last neighbour, so that it still counts a little."""


def local_quadratic(
    points: FloatArray, values: FloatArray, at: FloatArray, stretch: float = 1.0
) -> FloatArray:
    """Local quadratic regression (LOESS; Cleveland and Devlin, 1988).

    Each value is that of a quadratic fitted to the nearest points, the nearer the heavier by the
    tricube weight. It never leaves the range of those points' values.

    Parameters
    ----------
    points, values
        Known points, shape (N, D), N >= 1, and their values, shape (N,).
    at
        Where a value is wanted, shape (Q, D).
    stretch
        Factor on distance along the diagonal, the sum of all coordinates. Where coordinates are
        logs of sizes that multiply to the work, a kernel's regime changes with that sum, so points
        of like work should count as near.

    Returns
    -------
    FloatArray
        Shape (Q,).

    """
    size = points.shape[1]
    along = np.full((size, size), (stretch - 1) / size) + np.eye(size)
    points, at = points @ along, at @ along
    square = ((at[:, None, :] - points[None, :, :]) ** 2).sum(axis=2)
    count = min(NEIGHBOURS, len(points))
    near = np.argpartition(square, count - 1, axis=1)[:, :count]
    reach = np.take_along_axis(square, near, axis=1)
    furthest = np.maximum(reach.max(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    weight = (1 - (reach / (furthest * _REACH**2)) ** 1.5) ** 3
    step = points[near] - at[:, None, :]
    first, second = np.triu_indices(size)
    terms = np.concatenate(
        [np.ones((*step.shape[:2], 1)), step, step[..., first] * step[..., second]], axis=2
    )
    weighted = np.swapaxes(terms * weight[..., None], 1, 2)
    pull = np.full(terms.shape[2], RIDGE**2)
    pull[0] = np.finfo(np.float64).eps  # only against a weightless system
    known = values[near]
    solution = np.linalg.solve(weighted @ terms + np.diag(pull), weighted @ known[..., None])
    fitted: FloatArray = np.clip(solution[:, 0, 0], known.min(axis=1), known.max(axis=1))
    return fitted


def local_slab(
    points: FloatArray,
    values: FloatArray,
    place: FloatArray,
    nearest: FloatArray,
    slab: FloatArray,
    log_batch: FloatArray,
    log_length: FloatArray,
    stretch: float,
) -> FloatArray:
    """Fitted values at one place over a grid of batches and lengths.

    A fit smooths over a kernel's steps, so it would jump to a measured place that it comes near.
    Close to one the fit's error there is made up for, less and less with the distance.

    Parameters
    ----------
    points, values
        Known points, shape (N, P + 2), the last two their log batch and log length; values (N,).
    place, nearest
        Where values are wanted, and the nearest measured place, shapes (P,).
    slab
        Values measured at the latter, NaN where not, shape (B, L).
    log_batch, log_length
        Axes, shapes (B,) and (L,).
    stretch
        As for `local_quadratic`.

    Returns
    -------
    FloatArray
        Shape (B, L).

    """
    cells = np.stack(np.meshgrid(log_batch, log_length, indexing="ij"), axis=-1).reshape(-1, 2)

    def fit(at: FloatArray) -> FloatArray:
        full = np.concatenate([np.tile(at, (len(cells), 1)), cells], axis=1)
        return local_quadratic(points, values, full, stretch).reshape(slab.shape)

    fitted = fit(place)
    share = 1 - float(np.abs(place - nearest).sum()) / REMEMBERED
    if 0 < share < 1:
        missed = slab - fit(nearest)
        fitted = fitted + share * np.where(np.isnan(missed), 0.0, missed)
    return fitted


def between(known: NDArray[np.bool_], axis: int) -> NDArray[np.bool_]:
    """Cells with a known one before and after them, or at them, along ``axis``."""
    before = np.logical_or.accumulate(known, axis=axis)
    after = np.flip(np.logical_or.accumulate(np.flip(known, axis), axis=axis), axis)
    inside: NDArray[np.bool_] = before & after
    return inside


def without_spikes(time_s: FloatArray) -> FloatArray:
    """Times with NaN where a measurement slipped.

    More work never takes half the time: a cell slower than `SLIP` times both the next larger batch
    and the next larger length, or faster than both smaller ones by that factor, is dropped. One
    such cell would bend a monotone fit of everything beyond it. The last and the first cells, with
    one neighbour or none to judge by, are kept.

    Parameters
    ----------
    time_s
        Shape (..., B, L), NaN where not measured.

    """
    edged = np.pad(time_s, [(0, 0)] * (time_s.ndim - 2) + [(1, 1), (1, 1)], constant_values=np.nan)
    after = np.maximum(edged[..., 2:, 1:-1], edged[..., 1:-1, 2:])
    before = np.minimum(edged[..., :-2, 1:-1], edged[..., 1:-1, :-2])
    return np.where((time_s > SLIP * after) | (time_s < before / SLIP), np.nan, time_s)


def grown(time_s: FloatArray, ideal_s: FloatArray) -> FloatArray:
    """Times with missing cells grown by the roofline from the cells before them.

    Time grows at most as the work does, so the smaller of the two neighbours' extrapolations
    serves, but neither neighbour's time is undercut. A cell with no known one before it takes the
    least of those right after it.

    Parameters
    ----------
    time_s
        Shape (R, C), NaN where missing, with at least one cell known.
    ideal_s
        Roofline seconds of every cell, shape (R, C), positive.

    """
    out = time_s.copy()
    rows, columns = out.shape
    for i, j in np.argwhere(np.isnan(time_s)):
        before = [at for at in ((i - 1, j), (i, j - 1)) if min(at) >= 0]
        before = [at for at in before if not np.isnan(out[at])]
        if before:
            scaled = min(out[at] * ideal_s[i, j] / ideal_s[at] for at in before)
            out[i, j] = max(scaled, *(out[at] for at in before))
    for i, j in np.argwhere(np.isnan(out))[::-1]:
        after = [at for at in ((i + 1, j), (i, j + 1)) if at[0] < rows and at[1] < columns]
        out[i, j] = min(out[at] for at in after if not np.isnan(out[at]))
    return out


def joined_labels(axis: FloatArray, label: LabelArray, at: FloatArray) -> LabelArray:
    """Label of values joined between an axis' nodes.

    Parameters
    ----------
    axis, label
        Ascending nodes and their labels, shape (G,).
    at
        Places, any shape.

    Returns
    -------
    LabelArray
        A node's own label on it, the worse neighbour's between two, extrapolated outside.

    """
    gaps = np.full(len(axis) + 1, Provenance.EXTRAPOLATED, dtype=np.int8)
    gaps[1:-1] = np.maximum(np.maximum(label[:-1], label[1:]), Provenance.INTERPOLATED)
    gaps[0], gaps[-1] = max(gaps[0], label[0]), max(gaps[-1], label[-1])
    after = np.searchsorted(axis, at)
    node = np.minimum(after, len(axis) - 1)
    joined: LabelArray = np.where(axis[node] == at, label[node], gaps[after])
    return joined
