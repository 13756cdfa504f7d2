"""Request traces: when requests arrived, and how long prompts and outputs were.

One function reads them all; what a file is, its first line says.

=============  ==================================================================  ==========
format         columns or keys                                                     time
=============  ==================================================================  ==========
plain          CSV or Parquet ``arrival_s,prompt_tokens,output_tokens``            s
azure          CSV ``TIMESTAMP,ContextTokens,GeneratedTokens`` (2023, 2024)        date, UTC
burstgpt       CSV ``Timestamp,...,Request tokens,Response tokens,...``            s
mooncake       JSON lines ``timestamp,input_length,output_length``                 ms
apex           JSON lines ``StartTimeOffset,ContextTokens,GeneratedTokens``        ns
llmservingsim  JSON lines ``arrival_time_ns,input_toks,output_toks``               ns
sharegpt       JSON array with token counts (:mod:`planner.io.trace_json`)         none
block_hashes   CSV ``request,arrival_s,input_tokens,...,block16_hash_ids_...``     s
=============  ==================================================================  ==========

Three of them say which prompts begin alike: Mooncake's ``hash_ids`` (512 tokens each), the
``block16_hash_ids_input_then_output`` of block_hashes (16) and LLMServingSim's ``input_tok_ids``
(the tokens themselves). :func:`planner.io.block_ids.block_ids_for` turns them into an engine's
blocks.

ServeGen's files hold rates and no requests: :func:`planner.io.trace_rates.read_rates`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from planner.errors import NO_VALUE, InputError
from planner.io.trace_csv import BLOCK_IDS_TOKENS, KNOWN_HEADERS, csv_batches, read_header
from planner.io.trace_file import MAX_HASHES, MAX_ROWS, Hashes, TraceFile
from planner.io.trace_json import jsonl_batches, read_keys, sharegpt_batches
from planner.io.trace_parquet import PARQUET_MAGIC, parquet_batches
from planner.io.trace_rates import is_rates

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from planner.io.trace_file import Batch

ZERO_OUTPUT: Final = "zero output tokens"
"""Why a row is skipped: the request failed, or was never answered."""

ZERO_PROMPT: Final = "zero prompt tokens"
"""Why a row of a published log is skipped: no engine serves it."""


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
        As in the table of this module.
    sha256
        Hex digest of the file's bytes.
    source
        Name of the trace in error messages.
    has_arrivals
        Whether the file says when requests arrived; without, ``arrival_s`` is zero.
    hashes
        What the prompts consist of, where the file says so and it was asked for.
    hash_tokens
        Tokens of one part of a prompt, which one hash stands for; 0 without hashes.

    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    rows_read: int
    rows_skipped: dict[str, int] = field(default_factory=dict)
    format: str = "plain"
    sha256: str = ""
    source: str = "<trace>"
    has_arrivals: bool = True
    hashes: Hashes | None = None
    hash_tokens: int = 0

    def __len__(self) -> int:
        return len(self.arrival_s)


def read_trace(
    path: Path, *, source: str, num_requests: int | None = None, content: bool = False
) -> RawTrace:
    """Read a trace of any format in the table above.

    Rows that say zero output tokens are skipped and counted; so are rows with zero prompt tokens,
    except in a plain trace, which its author can mend. One core reads 0.3 to 0.6 M rows of
    CSV a second, 0.2 M of Mooncake with its hashes and 1.5 M of Parquet. The peak is 160 to
    250 MiB for a million rows, 620 MiB (CSV) and 710 MiB (Parquet) for ten million, the most that
    are read: 48 bytes for each row kept.

    Parameters
    ----------
    path
        The file.
    source
        Name of the trace in error messages.
    num_requests
        Keep only this many requests from the start; ``None`` keeps all. The whole file is
        checked in either case.
    content
        Whether to keep what the file says about the content of prompts, 8 bytes a hash.

    Raises
    ------
    InputError
        When the file cannot be read, its format is unknown, a row breaks a rule (with its line),
        there are fewer usable requests than asked for, or more than ``MAX_ROWS`` rows.

    """
    file = TraceFile(path, source)
    rows = _Rows(_open(file, content), num_requests)
    for batch in rows.opened.batches:
        rows.add(batch)
    return rows.trace()


class _Opened(NamedTuple):
    """A file whose format is known."""

    file: TraceFile
    format: str
    units_per_s: int
    batches: Iterator[Batch]
    hash_tokens: int = 0


def _open(file: TraceFile, content: bool) -> _Opened:
    """Format of the file, units of its time in a second, and its rows."""
    if file.magic == PARQUET_MAGIC:
        return _Opened(file, "plain", 1, parquet_batches(file))
    number, line = file.first_line()
    if not line:
        raise file.error("", f"is empty; a trace starts with the header {KNOWN_HEADERS}")
    if line.lstrip().startswith("["):
        return _Opened(file, "sharegpt", 1, sharegpt_batches(file))
    if line.lstrip().startswith("{"):
        keys = read_keys(line, number, file)
        batches = jsonl_batches(file, keys, content=content)
        return _Opened(file, keys.format, keys.units_per_s, batches, keys.hash_tokens)
    if is_rates(line):
        rule = (
            "holds arrival rates and no requests: name it as workload.rates, with input_tokens "
            "and output_tokens"
        )
        raise file.error("", rule)
    layout = read_header(line, number, file, content=content)
    batches = csv_batches(file, layout)
    return _Opened(file, layout.format, layout.units_per_s, batches, BLOCK_IDS_TOKENS)


class _Rows:
    """Rows gathered batch by batch, and checked across them."""

    def __init__(self, opened: _Opened, num_requests: int | None) -> None:
        self.opened = opened
        self.file = opened.file
        self.format = opened.format
        self.num_requests = num_requests
        self.usable = 0
        self.num_hashes = 0
        self.first_time: Any = None
        self.last_s = 0.0
        self.rows_read = 0
        self.skipped = {ZERO_PROMPT: 0, ZERO_OUTPUT: 0}
        self.kept: list[tuple[NDArray[Any], ...]] = []

    def add(self, batch: Batch) -> None:
        """Check order and emptiness of some rows, and keep those that a run can use."""
        if len(batch.time) == 0:
            return
        if self.first_time is None:
            self.first_time = batch.time[0]
        # Subtracted before it is divided: nanoseconds since 1970 do not fit a float64.
        arrival_s = (batch.time - self.first_time) / self.opened.units_per_s
        backwards = np.diff(arrival_s, prepend=self.last_s) < 0
        if backwards.any():
            rule = "is before the row above: sort the trace"
            raise batch.where(int(backwards.argmax()), 0, rule)
        self.last_s = float(arrival_s[-1])
        self.rows_read += len(arrival_s)
        if self.rows_read > MAX_ROWS:
            rule = f"has more than {MAX_ROWS:,} rows, the most that one run holds: cut it"
            raise self.file.error("", rule)
        no_prompt, no_output = batch.prompt_tokens == 0, batch.output_tokens == 0
        if self.format == "plain" and no_prompt.any():
            raise batch.where(int(no_prompt.argmax()), 1, "must be at least 1")
        self.skipped[ZERO_OUTPUT] += int(no_output.sum())
        self.skipped[ZERO_PROMPT] += int((no_prompt & ~no_output).sum())
        usable = np.flatnonzero(~(no_prompt | no_output))
        room = None if self.num_requests is None else max(0, self.num_requests - self.usable)
        self.usable += len(usable)
        self.keep(batch, arrival_s, usable[:room])

    def keep(self, batch: Batch, arrival_s: NDArray[np.float64], rows: NDArray[np.int64]) -> None:
        """Keep some rows of a batch."""
        columns = [arrival_s[rows], batch.prompt_tokens[rows], batch.output_tokens[rows]]
        if batch.hashes is not None:
            ids, counts = batch.hashes
            is_kept = np.zeros(len(counts), np.bool_)
            is_kept[rows] = True
            columns += [ids[np.repeat(is_kept, counts)], counts[rows]]
            self.num_hashes += len(columns[3])
            if self.num_hashes > MAX_HASHES:
                rule = (
                    f"has more than {MAX_HASHES:,} content hashes, the most that are kept: "
                    "set workload.num_requests, or cut the trace"
                )
                raise self.file.error("", rule)
        self.kept.append(tuple(columns))

    def trace(self) -> RawTrace:
        """The rows that were kept as a trace."""
        if not self.rows_read:
            what = "a header and no rows" if self.format != "sharegpt" else "no conversation"
            raise self.file.error("", f"holds {what}")
        if self.usable == 0:
            raise self.file.error("", "holds no request with output tokens")
        if self.num_requests is not None and self.usable < self.num_requests:
            rule = (
                f"requests were asked for (workload.num_requests), but the trace has {self.usable}"
            )
            raise self.file.error("", rule, self.num_requests)
        columns = [np.concatenate(column) for column in zip(*self.kept, strict=True)]
        self.kept.clear()
        arrival_s, prompt, output, *hashes = map(_read_only, columns)
        return RawTrace(
            arrival_s=arrival_s,
            prompt_tokens=prompt,
            output_tokens=output,
            rows_read=self.rows_read,
            rows_skipped={why: n for why, n in self.skipped.items() if n},
            format=self.format,
            sha256=self.file.sha256,
            source=self.file.source,
            has_arrivals=self.format != "sharegpt",
            hashes=Hashes(*hashes) if hashes else None,
            hash_tokens=self.opened.hash_tokens if hashes else 0,
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
