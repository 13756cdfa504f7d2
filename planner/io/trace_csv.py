"""Traces in CSV: Azure 2023 and 2024, BurstGPT, block hashes, and the plain three columns."""

from __future__ import annotations

import csv
import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from planner.io.trace_file import Batch, Hashes, check_seconds, check_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from planner.errors import InputError
    from planner.io.trace_file import TraceFile

PLAIN_COLUMNS: Final = ("arrival_s", "prompt_tokens", "output_tokens")
"""Columns of a plain trace, in CSV and Parquet alike."""

_AZURE: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT: Final = ("Timestamp", "Request tokens", "Response tokens")
_BLOCKS: Final = ("arrival_s", "input_tokens", "output_tokens")
_BLOCK_IDS: Final = "block16_hash_ids_input_then_output"
BLOCK_IDS_TOKENS: Final = 16
"""Tokens of one block in that column, whose name says so."""

_HEADERS: Final[dict[tuple[str, ...], tuple[str, tuple[str, ...]]]] = {
    _AZURE: ("azure", _AZURE),
    PLAIN_COLUMNS: ("plain", PLAIN_COLUMNS),
    (
        "Timestamp",
        "Model",
        "Request tokens",
        "Response tokens",
        "Total tokens",
        "Log Type",
    ): ("burstgpt", _BURSTGPT),
    (
        "Timestamp",
        "Session ID",
        "Elapsed time",
        "Model",
        "Request tokens",
        "Response tokens",
        "Total tokens",
        "Log Type",
    ): ("burstgpt", _BURSTGPT),
    (
        "request",
        "arrival_s",
        "input_tokens",
        "output_tokens",
        "input_full_blocks",
        "reusable_blocks_infinite_cache",
        _BLOCK_IDS,
    ): ("block_hashes", _BLOCKS),
}
"""Format, and its columns of time, prompt and output, by each known header."""

KNOWN_HEADERS: Final = " or ".join(",".join(header) for header in (_AZURE, PLAIN_COLUMNS))
"""The headers that a message offers: of the formats that a user might write by hand."""

NS_PER_S: Final = 10**9

_DATE_TIME: Final = r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,9})?"
_TIMESTAMP: Final = re.compile(rf"({_DATE_TIME})(?:\+00:00|Z)?", re.ASCII)
_TIMESTAMP_COLUMN: Final = re.compile(rf"{_DATE_TIME}(?:\n{_DATE_TIME})*", re.ASCII)


@dataclass(frozen=True)
class CsvLayout:
    """What the header of a CSV trace says.

    Parameters
    ----------
    format
        ``azure``, ``burstgpt``, ``block_hashes`` or ``plain``.
    columns
        Names of the columns of time, prompt tokens, output tokens and, where they are read,
        hashes.
    places
        Their places in a row, from 0.
    width
        Columns of every row.

    """

    format: str
    columns: tuple[str, ...]
    places: tuple[int, ...]
    width: int

    @property
    def units_per_s(self) -> int:
        """Units of ``Batch.time`` in a second."""
        return NS_PER_S if self.format == "azure" else 1


def read_header(line: str, number: int, file: TraceFile, *, content: bool) -> CsvLayout:
    """Layout of a CSV trace by its header, or the error that names the known ones.

    ``content`` says whether hashes are read, where the format has them.
    """
    header = tuple(cell.strip() for cell in next(csv.reader([line])))
    if header not in _HEADERS:
        rule = f"is not a known header; known: {KNOWN_HEADERS}"
        raise file.error(f"line {number}", rule, ",".join(header))
    name, columns = _HEADERS[header]
    if content and _BLOCK_IDS in header:
        columns = (*columns, _BLOCK_IDS)
    return CsvLayout(name, columns, tuple(map(header.index, columns)), len(header))


def csv_batches(file: TraceFile, layout: CsvLayout) -> Iterator[Batch]:
    """Rows of a CSV trace as numbers; blank lines are left out.

    Raises
    ------
    InputError
        When a row has another number of columns, or a cell is not what its column holds.

    """
    is_header = True
    for first, text_lines in file.chunks():
        number, lines = first, text_lines
        if is_header:
            skip = next((i + 1 for i, line in enumerate(lines) if line.strip()), len(lines))
            number, lines, is_header = number + skip, lines[skip:], False
        cells = _Cells(lines, number, file, layout)
        if cells.columns:
            yield cells.batch()


class _Cells:
    """Some rows as text, and the lines that they stand on."""

    def __init__(self, lines: list[str], number: int, file: TraceFile, layout: CsvLayout) -> None:
        self.file = file
        self.layout = layout
        self.lines: Sequence[int] = range(number, number + len(lines))
        self.columns = self.split(lines) or self.parse(lines)

    def split(self, lines: list[str]) -> list[Sequence[str]] | None:
        """The columns where every line is plain: no quotes, no blank, the right width.

        A list per row costs more than twice the time (0.38 against 0.17 s for 200,000 lines),
        most of it in the garbage collector.
        """
        width = self.layout.width
        text = ",".join(lines)
        if '"' in text or "\r" in text or {line.count(",") for line in lines} != {width - 1}:
            return None
        cells = text.split(",")
        return [cells[place::width] for place in self.layout.places]

    def parse(self, lines: list[str]) -> list[Sequence[str]]:
        """The columns of any lines, or the error of the first bad one."""
        try:
            rows = list(csv.reader(lines))
        except csv.Error as error:
            raise self.file.error("", f"CSV: {error}") from None
        if len(rows) != len(lines):
            start = next(i for i, line in enumerate(lines) if line.count('"') % 2)
            raise self.file.error(f"line {self.lines[start]}", "has a quote that is not closed")
        self.lines = [line for line, row in zip(self.lines, rows, strict=True) if row]
        rows = list(filter(None, rows))
        for line, row in zip(self.lines, rows, strict=True):
            if len(row) != self.layout.width:
                rule = f"has {len(row)} columns in place of {self.layout.width}"
                raise self.file.error(f"line {line}", rule)
        columns = list(zip(*rows, strict=True))
        return [columns[place] for place in self.layout.places] if rows else []

    def batch(self) -> Batch:
        """The rows as numbers."""
        time = self.timestamps_ns() if self.layout.format == "azure" else self.seconds()
        prompt = self.tokens(1)
        hashes = self.hashes(prompt) if len(self.layout.columns) > 3 else None
        return Batch(time, prompt, self.tokens(2), self.error, hashes)

    def error(self, row: int, column: int, rule: str) -> InputError:
        """Error about one cell."""
        where = f"line {self.lines[row]}, {self.layout.columns[column]}"
        return self.file.error(where, rule, self.columns[column][row])

    def tokens(self, column: int) -> NDArray[np.int64]:
        """Column of whole token counts."""
        cells = self.columns[column]
        # int() alone would also take "1_000" and other alphabets' digits.
        if not (all(map(str.isdigit, cells)) and all(map(str.isascii, cells))):
            row = next(i for i, c in enumerate(cells) if not re.fullmatch(r"\d+", c, re.ASCII))
            is_negative = cells[row].strip().startswith("-")
            rule = "must not be negative" if is_negative else "must be a whole number of tokens"
            raise self.error(row, column, rule)
        try:
            values = np.array(list(map(int, cells)), dtype=np.int64)
        except (ValueError, OverflowError):  # more digits than an int64 holds
            values = np.array([int(cell) if len(cell) < 19 else 2**62 for cell in cells])
        return check_tokens(values, column, self.error)

    def hashes(self, prompt: NDArray[np.int64]) -> Hashes:
        """Fourth column, of the full blocks of prompts: those of the answer are left out."""
        rows = [cell.split() for cell in self.columns[3]]
        counts = prompt // BLOCK_IDS_TOKENS
        for row, ids in enumerate(rows):
            if len(ids) < counts[row]:
                rule = f"has {len(ids)} ids; {prompt[row]} prompt tokens have {counts[row]} blocks"
                raise self.error(row, 3, rule)
            if not all(id_.isdigit() and id_.isascii() and len(id_) < 19 for id_ in ids):
                raise self.error(row, 3, "must be whole numbers below 1e18 with spaces between")
        kept = (map(int, ids[:n]) for ids, n in zip(rows, counts.tolist(), strict=True))
        return Hashes(np.fromiter(itertools.chain.from_iterable(kept), np.int64), counts)

    def seconds(self) -> NDArray[np.float64]:
        """First column as seconds."""
        cells = self.columns[0]
        try:
            values = np.array(list(map(float, cells)))
        except ValueError:
            row = next(i for i, cell in enumerate(cells) if not _is_float(cell))
            raise self.error(row, 0, "must be a number of seconds") from None
        return check_seconds(values, self.error)

    def timestamps_ns(self) -> NDArray[np.int64]:
        """First column as nanoseconds since 1970."""
        cells = self.columns[0]
        rule = "must be a UTC date and time such as 2023-11-16 18:15:46.6805900"
        texts = list(cells)
        # One match over the whole column is several times faster than one per cell.
        if not _TIMESTAMP_COLUMN.fullmatch("\n".join(cells)):
            for row, cell in enumerate(cells):
                match = _TIMESTAMP.fullmatch(cell)
                if match is None:
                    raise self.error(row, 0, rule)
                texts[row] = match[1]
        try:
            return np.array(texts, dtype="datetime64[ns]").astype(np.int64)
        except ValueError:  # such as a month 13
            row = next(i for i, text in enumerate(texts) if not _is_date(text))
            raise self.error(row, 0, rule) from None


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
