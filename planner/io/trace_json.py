"""Traces in JSON: Mooncake, APEX and LLMServingSim by line, ShareGPT with token counts."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from planner.io.trace_array import JsonArray
from planner.io.trace_file import MAX_SECONDS, MAX_TOKENS, Batch, Hashes, check_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from planner.errors import InputError
    from planner.io.trace_file import TraceFile


@dataclass(frozen=True)
class JsonLayout:
    """Names of a JSON trace's keys, and its unit of time.

    Parameters
    ----------
    format
        Name of the format.
    columns
        Keys of time, prompt tokens and output tokens; an empty time: the file holds none.
    units_per_s
        Units of the time in a second.
    hashes
        Key of the hashes of the prompt's parts; empty: the file holds none.
    hash_tokens
        Tokens of one part; the last of a prompt may have fewer.

    """

    format: str
    columns: tuple[str, str, str]
    units_per_s: int = 1
    hashes: str = ""
    hash_tokens: int = 0


_BY_LINE: Final = (
    JsonLayout("mooncake", ("timestamp", "input_length", "output_length"), 10**3, "hash_ids", 512),
    JsonLayout("apex", ("StartTimeOffset", "ContextTokens", "GeneratedTokens"), 10**9),
    JsonLayout(
        "llmservingsim",
        ("arrival_time_ns", "input_toks", "output_toks"),
        10**9,
        "input_tok_ids",
        1,  # the tokens themselves
    ),
)
"""Formats with one object per line; keys and units as in the files that the projects publish."""

_SHAREGPT: Final = JsonLayout("sharegpt", ("", "prompt_len", "output_len"))
_TURN_TOKENS: Final = "num_tokens"
_BATCH_ITEMS: Final = 2**12
"""Elements of an array that are turned into numbers at once; each may hold a long conversation."""

KNOWN_KEYS: Final = " or ".join(",".join(layout.columns) for layout in _BY_LINE)
"""Keys by which a format with one object per line is known."""


def read_keys(line: str, number: int, file: TraceFile) -> JsonLayout:
    """Layout of a trace with one object per line, by the keys of the first."""
    row = _parse(line, number, file)
    for layout in _BY_LINE:
        if set(layout.columns) <= row.keys():
            return layout
    # A key may be missing from the first row alone; the format that is nearest says which.
    near = max(_BY_LINE, key=lambda layout: len(row.keys() & set(layout.columns)))
    if len(row.keys() & set(near.columns)) == 2:
        missing = next(key for key in near.columns if key not in row)
        raise file.error(f"line {number}", f"has no {missing!r}, which a {near.format} trace needs")
    raise file.error(f"line {number}", f"has the keys of no known trace; known: {KNOWN_KEYS}")


def jsonl_batches(file: TraceFile, layout: JsonLayout, *, content: bool) -> Iterator[Batch]:
    """Rows of a trace with one object per line, with hashes if ``content``; no blank lines.

    Raises
    ------
    InputError
        When a line is not one JSON object, lacks a key, or a value is not what its key holds.

    """
    for first, lines in file.chunks():
        filled = [(first + i, line) for i, line in enumerate(lines) if line.strip()]
        if filled:
            numbers = [number for number, _ in filled]
            rows = _parse_lines([line for _, line in filled]) or [
                _parse(line, number, file) for number, line in filled
            ]
            values = _Values(rows, [f"line {n}" for n in numbers], file, layout)
            yield values.batch(content=content and bool(layout.hashes))


def sharegpt_batches(file: TraceFile) -> Iterator[Batch]:
    """Conversations of one JSON array, each its first prompt and the answer to it.

    An element holds ``prompt_len`` and ``output_len``, or ``conversations`` whose turns each hold
    ``num_tokens``; as in the engines' own benchmark clients the first two turns are the request.
    There are no times in it: ``Batch.time`` is zero.

    Raises
    ------
    InputError
        When the file is not a JSON array of such objects.

    """
    elements = enumerate(JsonArray(file).elements(), 1)
    while batch := list(itertools.islice(elements, _BATCH_ITEMS)):
        rows = [_first_exchange(row, number, file) for number, row in batch]
        yield _Values(rows, [f"item {number}" for number, _ in batch], file, _SHAREGPT).batch()


def _first_exchange(row: Any, number: int, file: TraceFile) -> dict[str, Any]:
    """An element as ``prompt_len`` and ``output_len``."""
    if isinstance(row, dict) and {"prompt_len", "output_len"} <= row.keys():
        return row
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns[:2]):
        rule = "must be an object with prompt_len and output_len, or with conversations"
        raise file.error(f"item {number}", rule)
    if len(turns) < 2:  # a prompt that nobody answered
        return {"prompt_len": turns[0].get(_TURN_TOKENS, 0) if turns else 0, "output_len": 0}
    if any(_TURN_TOKENS not in turn for turn in turns[:2]):
        rule = (
            f"has text without token counts: add {_TURN_TOKENS} to each turn, or write "
            "prompt_len and output_len (counting needs the model's tokenizer)"
        )
        raise file.error(f"item {number}", rule)
    return {"prompt_len": turns[0][_TURN_TOKENS], "output_len": turns[1][_TURN_TOKENS]}


def _parse_lines(lines: list[str]) -> list[dict[str, Any]] | None:
    """Objects of all lines where each is one object; ``None``: look at them one by one.

    One call takes half the time of one call per line.
    """
    if not all(line[0] == "{" and line[-1] == "}" for line in lines):
        return None
    try:
        rows: list[dict[str, Any]] = json.loads(f"[{','.join(lines)}]")
    except (RecursionError, ValueError):
        return None
    return rows if len(rows) == len(lines) else None


def _parse(line: str, number: int, file: TraceFile) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise file.error(f"line {number}", f"JSON: {error.msg}") from None
    except (RecursionError, ValueError):  # too deep, or a number of thousands of digits
        raise file.error(f"line {number}", "JSON: cannot be read") from None
    if not isinstance(row, dict):
        raise file.error(f"line {number}", "must be a JSON object")
    return row


class _Values:
    """Some rows as objects, and the places that they stand at."""

    def __init__(
        self,
        rows: list[dict[str, Any]],
        places: Sequence[str],
        file: TraceFile,
        layout: JsonLayout,
    ) -> None:
        self.rows = rows
        self.places = places
        self.file = file
        self.layout = layout

    def batch(self, *, content: bool = False) -> Batch:
        """The rows as numbers."""
        time = self.time() if self.layout.columns[0] else np.zeros(len(self.rows))
        prompt = self.tokens(1)
        hashes = self.hashes(prompt) if content else None
        return Batch(time, prompt, self.tokens(2), self.error, hashes)

    def hashes(self, prompt: NDArray[np.int64]) -> Hashes:
        """Hashes of the prompts' parts; a row without any has a prompt of its own."""
        key = self.layout.hashes
        lists = [row.get(key, []) for row in self.rows]
        if set(map(type, lists)) != {list}:
            row = next(i for i, ids in enumerate(lists) if type(ids) is not list)
            raise self.file.error(f"{self.places[row]}, {key}", "must be a list of whole numbers")
        counts = np.array(list(map(len, lists)), dtype=np.int64)
        parts = -(-prompt // self.layout.hash_tokens)
        bad = (counts != parts) & (counts > 0)
        if bad.any():
            row = int(bad.argmax())
            unit = f"parts of {self.layout.hash_tokens}" if self.layout.hash_tokens > 1 else "ids"
            rule = (
                f"has {counts[row]} entries; {prompt[row]} prompt tokens have {parts[row]} {unit}"
            )
            raise self.file.error(f"{self.places[row]}, {key}", rule)
        return Hashes(self.flat(lists), counts)

    def flat(self, lists: list[list[Any]]) -> NDArray[np.int64]:
        """All hashes, one after another."""
        flat = list(itertools.chain.from_iterable(lists))
        try:
            if set(map(type, flat)) <= {int}:
                return np.array(flat, dtype=np.int64)
        except OverflowError:
            pass
        row = next(
            i
            for i, ids in enumerate(lists)
            if not all(type(v) is int and abs(v) < 2**63 for v in ids)
        )
        where = f"{self.places[row]}, {self.layout.hashes}"
        raise self.file.error(where, "must be a list of whole numbers below 2**63")

    def error(self, row: int, column: int, rule: str) -> InputError:
        """Error about one value."""
        key = self.layout.columns[column]
        return self.file.error(f"{self.places[row]}, {key}", rule, self.rows[row].get(key))

    def values(self, column: int) -> list[Any]:
        """One key's values."""
        key = self.layout.columns[column]
        for row, values in enumerate(self.rows):
            if key not in values:
                raise self.file.error(f"{self.places[row]}, {key}", "required key is missing")
        return [row[key] for row in self.rows]

    def tokens(self, column: int) -> NDArray[np.int64]:
        """Column of whole token counts."""
        values = self.values(column)
        # By type: True is an int, and 7.0 would pass as one.
        if set(map(type, values)) != {int}:
            row = next(i for i, value in enumerate(values) if type(value) is not int)
            raise self.error(row, column, "must be a whole number of tokens")
        try:
            counts = np.array(values, dtype=np.int64)
        except OverflowError:
            limit = MAX_TOKENS + 1
            counts = np.array([max(-1, min(value, limit)) for value in values], dtype=np.int64)
        return check_tokens(counts, column, self.error)

    def time(self) -> NDArray[Any]:
        """Arrivals in the file's unit: int64 where every one of them is whole."""
        values = self.values(0)
        kinds = set(map(type, values))
        if not kinds <= {int, float}:
            row = next(i for i, value in enumerate(values) if type(value) not in (int, float))
            raise self.error(row, 0, "must be a number")
        limit = MAX_SECONDS * self.layout.units_per_s
        try:
            times = np.array(values, dtype=np.int64 if kinds == {int} else np.float64)
        except OverflowError:  # a whole number that neither holds
            times = np.array([float(value) if abs(value) < 2**62 else np.inf for value in values])
        bad = ~(np.abs(times) <= limit)  # also true for NaN
        if bad.any():
            raise self.error(int(bad.argmax()), 0, "must be a finite number")
        return times
