"""A trace file read piece by piece, so that ten million rows never stand in memory as text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import numpy as np

from planner.errors import NO_VALUE, InputError
from planner.io.yaml_file import read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

CHUNK_BYTES: Final = 4 * 2**20
"""Text held at once. Rows of text take about ten times their bytes as Python objects; from 1 to
16 MiB the speed does not change by more than 5 %."""

MAX_LINE_BYTES: Final = 64 * 2**20
"""Longest line read. A Mooncake row of a million tokens has 20 kB; what is longer is a file
without line ends."""

MAX_ROWS: Final = 10_000_000
"""Rows of the longest trace read: the most requests that a scenario may simulate."""

MAX_TOKENS: Final = 2**31 - 1
"""Longest prompt or output, tokens: what the simulator's 32-bit fields can hold."""

MAX_SECONDS: Final = 1e12
"""Latest time, seconds: beyond it a float64 no longer resolves a tenth of a millisecond."""


MAX_HASHES: Final = 2**24
"""Most content hashes kept of a trace: 128 MiB, and about 1 GiB at the peak of what turns them into
blocks. Mooncake's conversation trace has 289 thousand."""


class Where(Protocol):
    """Raises the error of one cell: (row of the batch, column 0 to 2, rule)."""

    def __call__(self, row: int, column: int, rule: str) -> InputError:
        """Error that names the line and the column of the cell, and shows it."""


class Hashes(NamedTuple):
    """What prompts consist of, as the file says it.

    Parameters
    ----------
    ids
        (M,) int64 hashes of the prompts' parts, one prompt after another. Equal ids stand for
        equal tokens; the part before may differ.
    counts
        (N,) int64 how many of them each prompt has.

    """

    ids: NDArray[np.int64]
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Some consecutive rows of a trace, as numbers.

    Parameters
    ----------
    time
        (N,) arrivals in the file's own unit; int64 where that is whole, so that the first row can
        be subtracted before anything is rounded.
    prompt_tokens, output_tokens
        (N,) int64, from 0 to ``MAX_TOKENS``.
    where
        Raises the error of a cell of this batch.
    hashes
        What the prompts consist of; ``None`` where the file does not say or nobody asked.

    """

    time: NDArray[Any]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    where: Where
    hashes: Hashes | None = None


class TraceFile:
    """Text of a trace in chunks of whole lines, and its digest.

    Parameters
    ----------
    path
        The file.
    source
        Its name in error messages.

    Raises
    ------
    InputError
        When the file cannot be read or is not UTF-8.

    """

    def __init__(self, path: Path, source: str) -> None:
        self.path = path
        self.source = source
        self.sha256 = ""
        try:
            with path.open("rb") as file:
                self.magic = file.read(4)
        except (OSError, ValueError):
            self.magic = read_bytes(path, source=source)[:4]  # says why it cannot be read

    def first_line(self) -> tuple[int, str]:
        """First line that is not blank, with its number; (0, "") in an empty file."""
        for number, lines in self.chunks():
            for i, line in enumerate(lines):
                if line.strip():
                    return number + i, line
        return 0, ""

    def chunks(self) -> Iterator[tuple[int, list[str]]]:
        """Lines without their ends, with the number of the first; ``sha256`` is set at the end."""
        digest, number, rest = hashlib.sha256(), 1, b""
        with self.path.open("rb") as file:
            while block := file.read(CHUNK_BYTES):
                digest.update(block)
                data = rest + block
                end = data.rfind(b"\n") + 1
                rest = data[end:]
                if len(rest) > MAX_LINE_BYTES:
                    line = number + data.count(b"\n", 0, end)
                    rule = f"is longer than {MAX_LINE_BYTES >> 20} MiB: write a row per line"
                    raise self.error(f"line {line}", rule)
                if end:
                    lines = self.lines(data[:end], number)
                    yield number, lines
                    number += len(lines)
        if rest:
            yield number, self.lines(rest, number)
        self.sha256 = digest.hexdigest()

    def lines(self, data: bytes, number: int) -> list[str]:
        """Lines of ``data``, which starts with line ``number``."""
        try:
            text = data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            line = number + data.count(b"\n", 0, error.start)
            raise self.error(f"line {line}", "is not UTF-8 text") from None
        # Not splitlines(), which also breaks at form feeds inside a line.
        lines = text.replace("\r\n", "\n").split("\n")
        if not lines[-1]:
            lines.pop()
        return lines

    def error(self, where: str, rule: str, value: object = NO_VALUE) -> InputError:
        """Error about the file or a place in it."""
        return InputError(source=self.source, field=where, value=value, rule=rule)


def check_tokens(values: NDArray[np.int64], column: int, where: Where) -> NDArray[np.int64]:
    """``values``, or the error of the first that no engine could count."""
    if len(values) and (values.min() < 0 or values.max() > MAX_TOKENS):
        row = int(((values < 0) | (values > MAX_TOKENS)).argmax())
        rule = "must not be negative" if values[row] < 0 else f"must be at most {MAX_TOKENS}"
        raise where(row, column, rule)
    return values


def check_seconds(values: NDArray[np.float64], where: Where) -> NDArray[np.float64]:
    """``values``, or the error of the first that is no time."""
    bad = ~(np.abs(values) <= MAX_SECONDS)  # also true for NaN
    if bad.any():
        raise where(int(bad.argmax()), 0, "must be a finite number of seconds")
    return values
