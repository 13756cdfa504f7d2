"""ServeGen's files of arrival rates: how often one client sent, window by window."""

from __future__ import annotations

import csv
import math
from typing import TYPE_CHECKING, Final

from planner.errors import NO_VALUE, InputError
from planner.io.trace_file import TraceFile
from simulator.arrivals import RateWindows

if TYPE_CHECKING:
    from pathlib import Path

_COLUMNS: Final = ("start_s", "rate", "cv", "distribution", "shape", "scale")
"""The file has no header. In the published sample (2,016 windows) Gamma's shape is 1 / cv**2 in
every row, and shape times scale is the mean gap, 1.2 % below 1 / rate on average; the mean of a
Weibull of that shape and scale is 2.1 % above it."""

_DISTRIBUTIONS: Final = ("Gamma", "Weibull")
_SHAPE_RANGE: Final = (1e-2, 1e4)
"""Shapes of a Gamma distribution whose coefficient of variation is 10 and 0.01."""


def is_rates(line: str) -> bool:
    """Whether ``line`` is a row of a ServeGen file."""
    cells = line.split(",")
    return len(cells) == len(_COLUMNS) and cells[3].strip() in (*_DISTRIBUTIONS, "")


def read_rates(path: Path, *, source: str) -> tuple[RateWindows, str]:
    """Read a ServeGen file of one client: rates and shapes of arrival gaps by window.

    Each row is ``start_s, rate, cv, distribution, shape, scale``; rates in requests per second.
    A window ends where the next one starts; the last is as long as the one before it. The rate
    column holds, not the rate that shape and scale imply.

    Returns
    -------
    RateWindows, str
        The windows, and the hex digest of the file's bytes.

    Raises
    ------
    InputError
        When the file cannot be read, is not of this format or a row breaks a rule.

    """
    file = TraceFile(path, source)
    rows: list[tuple[int, list[str]]] = []
    for number, lines in file.chunks():
        rows += [(number + i, row) for i, row in enumerate(csv.reader(lines)) if row]
    if not rows:
        raise file.error("", "is empty; it needs rows of arrival rates")
    if not is_rates(",".join(rows[0][1])):
        rule = f"is no file of arrival rates, whose rows are {','.join(_COLUMNS)} without a header"
        raise file.error(f"line {rows[0][0]}", rule)
    if len(rows) < 2:
        raise file.error("", "needs two rows or more: a window ends where the next one starts")
    windows = [_window(number, row, file) for number, row in rows]
    start_s, rate, is_weibull, shape = zip(*windows, strict=True)
    for (number, row), before, after in zip(rows[1:], start_s, start_s[1:], strict=False):
        if after <= before:
            rule = "must be after the row above: sort the file"
            raise file.error(f"line {number}, start_s", rule, row[0])
    if not any(rate):
        raise file.error("", "holds no window with a rate above 0")
    end_s = (*start_s[1:], 2 * start_s[-1] - start_s[-2])
    return RateWindows(start_s, end_s, rate, is_weibull, shape), file.sha256


def _window(number: int, row: list[str], file: TraceFile) -> tuple[float, float, bool, float]:
    """Start, rate, whether the gaps are Weibull's, and their shape."""
    if len(row) != len(_COLUMNS):
        rule = f"has {len(row)} columns in place of {len(_COLUMNS)}"
        raise file.error(f"line {number}", rule)

    def value(column: int, low: float, high: float) -> float:
        try:
            number_read = float(row[column])
        except ValueError:
            number_read = math.nan
        if not low <= number_read <= high:
            where = f"line {number}, {_COLUMNS[column]}"
            raise file.error(where, f"must be a number from {low:g} to {high:g}", row[column])
        return number_read

    start_s, rate = value(0, 0.0, 1e12), value(1, 0.0, 1e12)
    if rate == 0:  # nobody sent: there is no gap to describe
        return start_s, 0.0, False, 1.0
    name = row[3].strip()
    if name not in _DISTRIBUTIONS:
        rule = f"must be {' or '.join(_DISTRIBUTIONS)}"
        raise InputError(
            source=file.source,
            field=f"line {number}, distribution",
            value=name or NO_VALUE,
            rule=rule,
        )
    return start_s, rate, name == "Weibull", value(4, *_SHAPE_RANGE)
