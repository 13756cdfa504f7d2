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
=============  ==================================================================  ==========

ServeGen's files hold rates and no requests: :func:`planner.io.trace_rates.read_rates`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from planner.errors import NO_VALUE, InputError
from planner.io.trace_csv import KNOWN_HEADERS, csv_batches, read_header
from planner.io.trace_file import MAX_ROWS, TraceFile
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

    def __len__(self) -> int:
        return len(self.arrival_s)


def read_trace(path: Path, *, source: str, num_requests: int | None = None) -> RawTrace:
    """Read a trace of any format in the table above.

    Rows that say zero output tokens are skipped and counted; so are rows with zero prompt tokens,
    except in a plain trace, which its author can mend. One core reads 0.3 to 0.6 M rows of
    CSV a second, 0.2 M of Mooncake with its hashes and 1.5 M of Parquet (files of 1 M rows); the
    peak is 160 to 250 MiB, of which 48 bytes are for each row kept.

    Parameters
    ----------
    path
        The file.
    source
        Name of the trace in error messages.
    num_requests
        Keep only this many requests from the start; ``None`` keeps all. The whole file is
        checked in either case.

    Raises
    ------
    InputError
        When the file cannot be read, its format is unknown, a row breaks a rule (with its line),
        or there are fewer usable requests than asked for.

    """
    file = TraceFile(path, source)
    name, units_per_s, batches = _open(file)
    rows = _Rows(file, name, units_per_s)
    for batch in batches:
        rows.add(batch)
    return rows.trace(num_requests)


def _open(file: TraceFile) -> tuple[str, int, Iterator[Batch]]:
    """Format of the file, units of its time in a second, and its rows."""
    if file.magic == PARQUET_MAGIC:
        return "plain", 1, parquet_batches(file)
    number, line = file.first_line()
    if not line:
        raise file.error("", f"is empty; a trace starts with the header {KNOWN_HEADERS}")
    if line.lstrip().startswith("["):
        return "sharegpt", 1, sharegpt_batches(file)
    if line.lstrip().startswith("{"):
        keys = read_keys(line, number, file)
        return keys.format, keys.units_per_s, jsonl_batches(file, keys)
    if is_rates(line):
        rule = (
            "holds arrival rates and no requests: name it as workload.rates, with input_tokens "
            "and output_tokens"
        )
        raise file.error("", rule)
    layout = read_header(line, number, file)
    return layout.format, layout.units_per_s, csv_batches(file, layout)


class _Rows:
    """Rows gathered batch by batch, and checked across them."""

    def __init__(self, file: TraceFile, name: str, units_per_s: int) -> None:
        self.file = file
        self.format = name
        self.units_per_s = units_per_s
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
        arrival_s = (batch.time - self.first_time) / self.units_per_s
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
        usable = ~(no_prompt | no_output)
        self.kept.append(
            (arrival_s[usable], batch.prompt_tokens[usable], batch.output_tokens[usable])
        )

    def trace(self, num_requests: int | None) -> RawTrace:
        """The rows as a trace of the first ``num_requests`` usable ones."""
        if not self.rows_read:
            what = "a header and no rows" if self.format != "sharegpt" else "no conversation"
            raise self.file.error("", f"holds {what}")
        arrival_s, prompt, output = (
            np.concatenate(c)[:num_requests] for c in zip(*self.kept, strict=True)
        )
        if len(arrival_s) == 0:
            raise self.file.error("", "holds no request with output tokens")
        if num_requests is not None and len(arrival_s) < num_requests:
            rule = (
                "requests were asked for (workload.num_requests), but the trace has "
                f"{len(arrival_s)}"
            )
            raise self.file.error("", rule, num_requests)
        return RawTrace(
            arrival_s=_read_only(arrival_s),
            prompt_tokens=_read_only(prompt),
            output_tokens=_read_only(output),
            rows_read=self.rows_read,
            rows_skipped={why: n for why, n in self.skipped.items() if n},
            format=self.format,
            sha256=self.file.sha256,
            source=self.file.source,
            has_arrivals=self.format != "sharegpt",
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
