"""Read and check what a kernel file says of its grids: labels, series and axes."""

from __future__ import annotations

import json
from math import prod
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np

from planner.errors import NO_VALUE, InputError
from planner.io.kernel_format import FAMILIES, LAYOUT, NUMBERS, SKEW_UNIT
from simulator.precision import PRECISIONS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from planner.io.kernel_format import Family

NEEDED: Final = ("gemm", "context", "generation", "all_reduce", "nccl")
"""Families without which no model can be costed."""
GRID_KEYS: Final = ("axes", "labels", "series")

CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "precision": tuple(PRECISIONS),
    "weight_dtype": tuple(PRECISIONS),
    "kv_dtype": ("bf16", "fp8"),
    "phase": ("context", "generation"),
    "side": ("pre", "post"),
    "kind": ("gated_delta_net", "mamba2"),
    "kernel": ("convolution", "scan"),
    "mode": ("graph", "eager"),
    "operation": ("all_gather", "all_reduce", "alltoall", "reduce_scatter"),
}
"""Labels with a fixed set of values."""
ALL_TO_ALL_PHASES: Final = ("dispatch", "combine")
FREE_TEXT: Final = ("backend", "dtype")
FLAG: Final = "module"
MAY_BE_ZERO: Final = ("prefix", "q_lora_rank", "index_topk", "window_tokens", "gated", "skew")
"""Numbers that may be 0; all others are counts or widths above it."""


class Grid:
    """One checked grid of a file.

    Parameters
    ----------
    labels
        Values by name.
    series
        Rows (S, C), int64, a column each of the family's; C = 0 if it has none.
    axes
        Ascending axes by name, int32.

    """

    __slots__ = ("axes", "labels", "series", "time_s")

    def __init__(
        self, labels: dict[str, Any], series: NDArray[np.int64], axes: dict[str, Any]
    ) -> None:
        self.labels = labels
        self.series = series
        self.axes = axes
        self.time_s: NDArray[np.float64] = np.empty(0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells along the series and each axis."""
        lengths = tuple(len(axis) for axis in self.axes.values())
        return (len(self.series), *lengths) if self.series.shape[1] else lengths


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """The array made read-only: a table is shared by everything in the process."""
    array.setflags(write=False)
    return array


class LayoutReader:
    """Reads one file's layout; whatever is wrong in it becomes a one-line error.

    Parameters
    ----------
    source
        The file's name, for messages.
    numbers
        The file's `NUMBERS`.

    """

    def __init__(self, source: str, numbers: NDArray[np.int32]) -> None:
        self._source = source
        self._numbers = numbers
        self._used = 0

    def fail(self, field: str, rule: str, value: object = NO_VALUE) -> NoReturn:
        """Raise the error that says ``rule`` of ``field``."""
        raise InputError(source=self._source, field=field, value=value, rule=rule)

    def read(self, text: NDArray[np.uint8]) -> dict[str, list[Grid]]:
        """Checked grids by family, every family present, without their seconds.

        Raises
        ------
        InputError
            If the text is not as `planner.io.kernel_format` says, or does not use all numbers.

        """
        try:
            layout = json.loads(text.tobytes())
        except (ValueError, RecursionError) as error:
            self.fail(LAYOUT, f"is not JSON: {error}")
        if not isinstance(layout, dict):
            self.fail(LAYOUT, "must be a mapping of families to grids")
        # The order of families is the order of the cells.
        if list(layout) != [name for name in FAMILIES if name in layout]:
            self.fail(LAYOUT, "must hold known families in this order: " + ", ".join(FAMILIES))
        for name in NEEDED:
            if not layout.get(name):
                self.fail(f"{LAYOUT}.{name}", "must hold at least one grid")
        families: dict[str, list[Grid]] = {name: [] for name in FAMILIES}
        for name, members in layout.items():
            families[name] = self._family(name, members)
        if self._used != len(self._numbers):
            self.fail(NUMBERS, f"must hold {self._used} numbers", len(self._numbers))
        return families

    def _family(self, name: str, members: Any) -> list[Grid]:
        field = f"{LAYOUT}.{name}"
        if not isinstance(members, list):
            self.fail(field, "must be a list of grids")
        grids = [
            self._grid(f"{field}[{index}]", FAMILIES[name], grid)
            for index, grid in enumerate(members)
        ]
        if len({tuple(grid.labels.values()) for grid in grids}) < len(grids):
            self.fail(field, "must not hold two grids of the same labels")
        return grids

    def _grid(self, field: str, family: Family, grid: Any) -> Grid:
        if not isinstance(grid, dict) or sorted(grid) != list(GRID_KEYS):
            self.fail(field, "must be a mapping of " + ", ".join(GRID_KEYS))
        values = self._list(f"{field}.labels", grid["labels"], len(family.labels))
        labels = dict(zip(family.labels, values, strict=True))
        for name, value in labels.items():
            self._label(f"{field}.labels.{name}", family, name, value)
        lengths = self._list(f"{field}.axes", grid["axes"], len(family.axes))
        series = self._series(f"{field}.series", family, grid["series"])
        axes = {
            name: self._axis(f"{field}.axes.{name}", name, length)
            for name, length in zip(family.axes, lengths, strict=True)
        }
        return Grid(labels, series, axes)

    def _label(self, field: str, family: Family, name: str, value: Any) -> None:
        choices = CHOICES.get(name)
        if family is FAMILIES["all_to_all"] and name == "phase":
            choices = ALL_TO_ALL_PHASES
        if choices:
            if not isinstance(value, str) or value not in choices:
                self.fail(field, "must be one of: " + ", ".join(choices), value)
        elif name in FREE_TEXT:
            if not isinstance(value, str) or not value:
                self.fail(field, "must be text", value)
        elif name == FLAG:
            if not isinstance(value, bool):
                self.fail(field, "must be true or false", value)
        else:
            self._count(field, value, 0 if name in MAY_BE_ZERO else 1)

    def _count(self, field: str, value: Any, least: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.fail(field, f"must be a whole number from {least}", value)
        return value

    def _list(self, field: str, value: Any, length: int) -> list[Any]:
        if not isinstance(value, list) or len(value) != length:
            self.fail(field, f"must be a list of {length}")
        return value

    def _take(self, field: str, shape: tuple[int, ...]) -> NDArray[np.int32]:
        """The next numbers of the file."""
        start, self._used = self._used, self._used + prod(shape)
        if self._used > len(self._numbers):
            self.fail(field, f"needs more numbers than {NUMBERS!r} holds")
        return self._numbers[start : self._used].reshape(shape)

    def _positive(self, field: str, name: str, numbers: NDArray[Any]) -> None:
        least = 0 if name in MAY_BE_ZERO else 1
        if int(numbers.min()) < least:
            self.fail(field, f"must hold numbers from {least}", int(numbers.min()))

    def _axis(self, field: str, name: str, length: Any) -> NDArray[np.int32]:
        axis = self._take(field, (self._count(field, length, 1),))
        # The numbers fit in 32 bits, but not the difference of two that are damaged.
        if (axis[1:] <= axis[:-1]).any():
            self.fail(field, "must ascend")
        self._positive(field, name, axis)
        return frozen(axis)

    def _series(self, field: str, family: Family, rows: Any) -> NDArray[np.int64]:
        columns = family.series
        if not columns:
            if rows != 0:
                self.fail(field, "must be 0", rows)
            return np.zeros((0, 0), np.int64)
        taken = self._take(field, (len(columns), self._count(field, rows, 1))).astype(np.int64)
        for name, column in zip(columns, taken, strict=True):
            self._positive(f"{field}.{name}", name, column)
        change = np.diff(taken, axis=1)
        first = np.argmax(change != 0, axis=0)
        if (change[first, np.arange(change.shape[1])] <= 0).any():
            self.fail(field, "must ascend, row by row")
        return taken.T


def skews(column: NDArray[np.int64]) -> NDArray[np.float64]:
    """Skews from thousandths; divided, not multiplied, so that 1010 becomes 1.01 exactly."""
    return column / round(1 / SKEW_UNIT)
