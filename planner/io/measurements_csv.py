"""Measured runs as a CSV, for clients that no reader knows; docs/calibration.md shows one.

====================  =============================================================================
column                meaning
====================  =============================================================================
plan                  plan that served the run, such as ``tp4``; may be left out (``--plan``)
concurrency           requests in flight of a closed loop
request_rate          mean arrivals per second of a Poisson open loop; with neither, all at once
num_prompts           requests completed
input_len             prompt tokens, all alike; or ``input_len_min`` and ``input_len_max``
output_len            output tokens, all alike; or ``output_len_min`` and ``output_len_max``
mean_ttft_ms          any of these, and at least one a row
mean_tpot_ms
mean_e2el_ms
output_throughput
====================  =============================================================================
"""

from __future__ import annotations

import csv
import io
import math
from typing import TYPE_CHECKING, Final

from planner.errors import NO_VALUE, InputError, nearest
from planner.io.measurements import METRICS, Lengths, Measurement

if TYPE_CHECKING:
    from collections.abc import Mapping

_LENGTHS: Final = ("input_len", "output_len")
COLUMNS: Final = (
    *("plan", "concurrency", "request_rate", "num_prompts"),
    *_LENGTHS,
    *(f"{name}_{end}" for name in _LENGTHS for end in ("min", "max")),
    *METRICS,
)
"""Columns that the file may have."""


def read_csv(text: str, source: str) -> list[Measurement]:
    """Measured runs of a CSV, one a row.

    Raises
    ------
    InputError
        If a column is not known, or a row says too little.

    """
    reader = csv.DictReader(io.StringIO(text, newline=""))
    header = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = header
    for name in header:
        if name not in COLUMNS:
            near = nearest(name, COLUMNS)
            hint = f"; did you mean {near!r}?" if near else f" (known: {', '.join(COLUMNS)})"
            raise _bad(source, name, NO_VALUE, f"is no column of measured runs{hint}")
    return [_run(row, f"{source}:{reader.line_num}") for row in reader]


def _run(row: Mapping[str, str | None], source: str) -> Measurement:
    if None in row or None in row.values():
        raise _bad(source, "", NO_VALUE, "has more or fewer cells than the header")
    requests = _number(row, "num_prompts", source)
    if requests is None:
        raise _bad(source, "num_prompts", NO_VALUE, "is missing")
    concurrency, rate = _number(row, "concurrency", source), _number(row, "request_rate", source)
    if concurrency and rate:
        raise _bad(source, "request_rate", rate, "is given beside concurrency: keep one")
    metrics = {name: _number(row, name, source) for name in METRICS}
    return Measurement(
        source=source,
        plan=(row.get("plan") or "").strip(),
        concurrency=int(concurrency or 0),
        request_rate=rate or 0.0,
        num_requests=int(requests),
        prompt=_lengths(row, "input_len", source),
        output=_lengths(row, "output_len", source),
        metrics={name: value for name, value in metrics.items() if value is not None},
    )


def _lengths(row: Mapping[str, str | None], name: str, source: str) -> Lengths:
    fixed = _number(row, name, source)
    low, high = (_number(row, f"{name}_{end}", source) for end in ("min", "max"))
    if low is not None and high is not None:
        return Lengths(int(low), int(high))
    if fixed is None:
        rule = f"is missing (or give {name}_min and {name}_max)"
        raise _bad(source, name, NO_VALUE, rule)
    return Lengths(round(fixed), round(fixed))


def _number(row: Mapping[str, str | None], name: str, source: str) -> float | None:
    """A cell as a number, ``None`` where it is empty or the column is missing."""
    text = (row.get(name) or "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise _bad(source, name, text, "must be a number") from None
    if not math.isfinite(value) or value < 0:
        raise _bad(source, name, text, "must be a finite number, not negative")
    return value


def _bad(source: str, where: str, value: object, rule: str) -> InputError:
    return InputError(source=source, field=where, value=value, rule=rule)
