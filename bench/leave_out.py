"""The leave-out protocol by which kernel interpolation is judged.

Measured rows are left out of a kernel table, the remaining ones refitted by the production code,
and the left-out ones predicted by the production functions. What is left out, seeded:

- ``points``: 20 % of the interior points of each series at random, all at once, so that a point's
  neighbours may be missing too. Interior: along every axis of its series there is a measured point
  on both sides of it.
- ``shapes``, ``tokens``, ``heads`` and the like: everything of one weight shape, token count or
  head count, for 20 % of the interior ones at once; ``lengths``: everything of one length, each
  interior one in turn.
- ``nothing``, ``as composed`` and the like leave nothing out: what the fitted form itself costs.

A family's check is a function ``(table, device, random) -> Iterator[LeftOut]`` (`Check`). It builds
a **new** table object with NaN in the left-out cells (`without`, then `dataclasses.replace`): fits
are cached by object identity, so nothing of a left-out point can leak through a cache. Checks are
registered in `bench.kernel_interpolation.CHECKS`. Draw from ``random`` in a fixed order (sorted
keys), so that the same seed leaves out the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from simulator.device import Device
from simulator.table import KernelTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Mask = NDArray[np.bool_]

SHARE: Final = 0.2
"""Share of interior points, shapes, head counts or lengths that is left out."""


@dataclass(frozen=True, eq=False)
class LeftOut:
    """Errors of one family under one protocol.

    Parameters
    ----------
    family
        Kernel family, for example ``gemm``.
    protocol
        What was left out, for example ``points``.
    precision
        Precision group of the rows, or an empty text where the family has none.
    errors
        Absolute relative errors of the left-out rows, ``|predicted / measured - 1|``, shape (N,).
        Results with the same three names are pooled.

    """

    family: str
    protocol: str
    precision: str
    errors: Floats


Check = Callable[[KernelTable, Device, np.random.Generator], Iterator[LeftOut]]
"""Leaves out rows of one family in every way that fits it and yields the errors."""


def interior(known: Mask) -> Mask:
    """Measured points with measured points on both sides along every axis.

    Parameters
    ----------
    known
        Which cells of a grid were measured, any number of axes; an axis of length 1 is ignored.

    """
    inside = known.copy()
    for axis, size in enumerate(known.shape):
        if size > 1:
            so_far = np.cumsum(known, axis=axis, dtype=np.int64)
            all_ = known.sum(axis=axis, keepdims=True)
            inside &= (so_far > 1) & (so_far < all_)
    return inside


def draw(candidates: Mask, random: np.random.Generator, share: float = SHARE) -> Mask:
    """A random ``share`` of the candidates, at least one where there is any, as a mask."""
    flat = np.flatnonzero(candidates)
    mask = np.zeros(candidates.shape, dtype=bool)
    if flat.size:
        count = max(1, round(share * flat.size))
        mask.flat[random.choice(flat, size=count, replace=False)] = True
    return mask


def without(time_s: Floats, left_out: Mask) -> Floats:
    """A copy of measured times with NaN where ``left_out``."""
    return np.where(left_out, np.nan, time_s)


def relative_errors(predicted_s: Floats, measured_s: Floats) -> Floats:
    """``|predicted / measured - 1|`` where both broadcast and the measured time is known, 1-D."""
    error = np.abs(predicted_s / measured_s - 1)
    return error[~np.isnan(measured_s)]
