"""Request traces: when requests arrived, and how long prompts and outputs were."""

from __future__ import annotations

import csv
import hashlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from planner.errors import NO_VALUE, InputError
from planner.io.yaml_file import decode, read_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

ZERO_OUTPUT: Final = "zero output tokens"
"""Why a row is skipped: the request failed, or was never answered."""

_FORMATS: Final = {
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"): "azure",
    ("arrival_s", "prompt_tokens", "output_tokens"): "plain",
}
"""Name of each known format by its header."""

_MAX_TOKENS: Final = 2**31 - 1

_DATE_TIME: Final = r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,9})?"
_TIMESTAMP: Final = re.compile(rf"({_DATE_TIME})(?:\+00:00|Z)?", re.ASCII)
_TIMESTAMP_COLUMN: Final = re.compile(rf"{_DATE_TIME}(?:\n{_DATE_TIME})*", re.ASCII)


@dataclass(frozen=True)
class RawTrace:
    """A trace as read, before any rescaling.

    Parameters
    ----------
    arrival_s
        Arrivals in seconds after the first row of the file, ascending; read-only float64.
    prompt_tokens, output_tokens
        Lengths, tokens, at least 1; read-only int64.
    rows_read
        Rows in the file, the header and blank lines not counted.
    rows_skipped
        Rows left out, by reason.
    format
        ``azure`` or ``plain``.
    sha256
        Hex digest of the file's bytes.
    source
        Name of the trace in error messages.

    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    rows_read: int
    rows_skipped: dict[str, int] = field(default_factory=dict)
    format: str = "plain"
    sha256: str = ""
    source: str = "<trace>"

    def __len__(self) -> int:
        return len(self.arrival_s)


def read_trace(path: Path, *, source: str, num_requests: int | None = None) -> RawTrace:
    """Read a trace; its format is known by its header.

    Parameters
    ----------
    path
        CSV file, either ``TIMESTAMP,ContextTokens,GeneratedTokens`` (Azure: date and time with
        up to nine digits of a second) or ``arrival_s,prompt_tokens,output_tokens``.
    source
        Name of the trace in error messages.
    num_requests
        Keep only this many requests from the start; ``None`` keeps all. The whole file is
        checked in either case.

    Raises
    ------
    InputError
        When the file cannot be read, its header is unknown, a row breaks a rule (with its line),
        or there are fewer usable requests than asked for.

    """
    data = read_bytes(path, source=source)
    table = _Table(decode(data, source=source), source)
    arrival_s = table.timestamps() if table.format == "azure" else table.seconds()
    table.check_sorted(arrival_s)
    prompt_tokens = table.tokens(1, at_least=1)
    output_tokens = table.tokens(2, at_least=0)
    kept = output_tokens > 0
    skipped = len(kept) - int(kept.sum())
    usable = np.flatnonzero(kept)[:num_requests]
    if len(usable) == 0:
        raise table.error("", "holds no request with output tokens")
    if num_requests is not None and len(usable) < num_requests:
        rule = f"requests were asked for (workload.num_requests), but the trace has {len(usable)}"
        raise table.error("", rule, num_requests)
    return RawTrace(
        arrival_s=_read_only(arrival_s[usable] - arrival_s[0]),
        prompt_tokens=_read_only(prompt_tokens[usable]),
        output_tokens=_read_only(output_tokens[usable]),
        rows_read=len(kept),
        rows_skipped={ZERO_OUTPUT: skipped} if skipped else {},
        format=table.format,
        sha256=hashlib.sha256(data).hexdigest(),
        source=source,
    )


def rescale(
    arrival_s: NDArray[np.float64], request_rate: float, *, source: str = "<trace>"
) -> NDArray[np.float64]:
    """Stretch arrivals to a mean rate; their order and relative gaps (bursts) stay.

    The mean rate of ``n`` arrivals over ``span`` seconds is ``(n - 1) / span``.

    Parameters
    ----------
    arrival_s
        Ascending arrivals, seconds.
    request_rate
        Mean rate to reach, requests per second.
    source
        Name of the trace in error messages.

    Returns
    -------
    ndarray
        Arrivals in seconds after the first; read-only float64.

    Raises
    ------
    InputError
        When the rate is not a positive finite number, or the arrivals have none to scale.

    """
    where: dict[str, Any] = {"source": source, "field": "request_rate"}
    if not 0 < request_rate < np.inf:
        raise InputError(**where, value=request_rate, rule="must be a finite number above 0")
    span_s = float(arrival_s[-1] - arrival_s[0]) if len(arrival_s) else 0.0
    if span_s <= 0:
        rule = "cannot rescale arrivals that are all at one time: use arrival: poisson"
        raise InputError(**where, value=NO_VALUE, rule=rule)
    target_s = (len(arrival_s) - 1) / request_rate
    return _read_only((arrival_s - arrival_s[0]) * (target_s / span_s))


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    """``array`` itself, closed to writing."""
    array.setflags(write=False)
    return array


class _Table:
    """Columns of a trace file as text, with the lines that they stand on.

    Parameters
    ----------
    text
        The whole file.
    source
        Its name in error messages.

    """

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        try:
            rows = list(csv.reader(text.split("\n")))
        except csv.Error as error:
            raise self.error("", f"CSV: {error}") from None
        # A trace without blank lines, the common case, needs no list of line numbers.
        lines = range(1, len(rows) + 1) if all(rows) else _numbers_of_filled(rows)
        rows = rows if all(rows) else list(filter(None, rows))
        known = " or ".join(",".join(header) for header in _FORMATS)
        if not rows:
            raise self.error("", f"is empty; a trace starts with the header {known}")
        header = tuple(cell.strip() for cell in rows[0])
        if header not in _FORMATS:
            rule = f"is not a known header; known: {known}"
            raise self.error(f"line {lines[0]}", rule, ",".join(header))
        if len(rows) == 1:
            raise self.error("", "holds a header and no rows")
        widths = list(map(len, rows))
        if widths.count(len(header)) != len(rows):
            row = next(i for i, width in enumerate(widths) if width != len(header))
            rule = f"has {widths[row]} columns in place of {len(header)}"
            raise self.error(f"line {lines[row]}", rule)
        self.header = header
        self.format = _FORMATS[header]
        self.lines = lines[1:]
        self.columns = list(zip(*rows[1:], strict=True))

    def error(self, where: str, rule: str, value: object = NO_VALUE) -> InputError:
        """Error about the file or a place in it."""
        return InputError(source=self.source, field=where, value=value, rule=rule)

    def cell_error(self, row: int, column: int, rule: str) -> InputError:
        """Error about one cell, by its row in the columns."""
        where = f"line {self.lines[row]}, {self.header[column]}"
        return self.error(where, rule, self.columns[column][row])

    def tokens(self, column: int, *, at_least: int) -> NDArray[np.int64]:
        """Column of whole token counts."""
        cells = self.columns[column]
        try:
            # int() alone would also take "1_000" and other alphabets' digits.
            plain = all(map(str.isdigit, cells)) and all(map(str.isascii, cells))
            values = np.array(list(map(int, cells)) if plain else [], dtype=np.int64)
        except (ValueError, OverflowError):
            values = np.empty(0, dtype=np.int64)
        if len(values) != len(cells):
            row = next(i for i, c in enumerate(cells) if not re.fullmatch(r"\d{1,10}", c, re.ASCII))
            rule = (
                "must not be negative"
                if cells[row].strip().startswith("-")
                else ("must be a whole number of tokens")
            )
            raise self.cell_error(row, column, rule)
        for bad, rule in (
            (values < at_least, f"must be at least {at_least}"),
            (values > _MAX_TOKENS, f"must be at most {_MAX_TOKENS}"),
        ):
            if bad.any():
                raise self.cell_error(int(bad.argmax()), column, rule)
        return values

    def seconds(self) -> NDArray[np.float64]:
        """First column as seconds."""
        cells = self.columns[0]
        try:
            values = np.array(list(map(float, cells)))
        except ValueError:
            row = next(i for i, cell in enumerate(cells) if not _is_float(cell))
            raise self.cell_error(row, 0, "must be a number of seconds") from None
        bad = ~(np.abs(values) <= 1e12)  # also true for NaN
        if bad.any():
            rule = "must be a finite number of seconds"
            raise self.cell_error(int(bad.argmax()), 0, rule)
        return values

    def timestamps(self) -> NDArray[np.float64]:
        """First column as seconds after its first row, exact to a nanosecond before rounding."""
        cells = self.columns[0]
        rule = "must be a UTC date and time such as 2023-11-16 18:15:46.6805900"
        texts = list(cells)
        # One match over the whole column is several times faster than one per cell.
        if not _TIMESTAMP_COLUMN.fullmatch("\n".join(cells)):
            for row, cell in enumerate(cells):
                match = _TIMESTAMP.fullmatch(cell)
                if match is None:
                    raise self.cell_error(row, 0, rule)
                texts[row] = match[1]
        try:
            stamps_ns = np.array(texts, dtype="datetime64[ns]").astype(np.int64)
        except ValueError:  # such as a month 13
            row = next(i for i, text in enumerate(texts) if not _is_date(text))
            raise self.cell_error(row, 0, rule) from None
        return np.asarray((stamps_ns - stamps_ns[0]) / 1e9)

    def check_sorted(self, arrival_s: NDArray[np.float64]) -> None:
        """Refuse rows that arrive before the row above them."""
        backwards = np.flatnonzero(np.diff(arrival_s) < 0)
        if len(backwards):
            raise self.cell_error(
                int(backwards[0]) + 1, 0, "is before the row above: sort the trace"
            )


def _numbers_of_filled(rows: list[list[str]]) -> list[int]:
    """Line numbers, from 1, of the rows that hold something."""
    return [number for number, row in enumerate(rows, 1) if row]


def _is_float(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _is_date(text: str) -> bool:
    try:
        np.datetime64(text, "ns")
    except ValueError:
        return False
    return True
