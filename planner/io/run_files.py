"""Files of a simulated run: a row per request, a row per iteration, a timeline for Perfetto.

Names decide the format: tables are Parquet where the name ends in ``.parquet`` and CSV otherwise;
whatever ends in ``.gz`` is compressed. Every time is rounded to a nanosecond and no file holds a
clock of ours, so equal runs give equal bytes. Files are written whole or not at all.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, cast

import numpy as np

from planner.errors import NO_VALUE, InputError
from planner.io.output import JSON, STDOUT, check_target, deliver_file, is_special
from planner.io.timeline import write_events
from simulator.units import MS_PER_S

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy.typing as npt

    from simulator.iteration_log import Iterations
    from simulator.run import RunResult
    from simulator.workload import Workload

    Table = Mapping[str, npt.NDArray[Any]]
    Writer = Callable[[IO[bytes]], None]

REQUESTS: Final = "--requests"
SERIES: Final = "--series"
TIMELINE: Final = "--timeline"
"""Options of ``planner simulate`` that name these files; messages begin with them."""

_DECIMALS_S, _DECIMALS_MS = 9, 6  # both are nanoseconds
_DECIMALS_SHARE: Final = 6


def check_run_files(targets: Mapping[str, str | None], json: str | None = None) -> None:
    """Refuse files that cannot be written, before any work is done for them.

    Parameters
    ----------
    targets
        File by option; ``None`` where it is not asked for.
    json
        Where the report goes.

    Raises
    ------
    InputError
        When a folder is missing or closed, two targets are one file, a target is standard output,
        or Parquet is asked for and pyarrow is not installed.
    """
    taken = {} if json in (None, STDOUT) else {os.path.realpath(str(json)): JSON}
    for option, target in targets.items():
        if target is None:
            continue
        if target == STDOUT:
            raise _refusal(option, target, "must be a file; only --json can be standard output")
        check_target(target, option)
        if _is_parquet(option, target):
            _pyarrow(option, target)
        path = os.path.realpath(target)
        if path in taken and not is_special(Path(path)):
            raise _refusal(option, target, f"is the file of {taken[path]} too")
        taken[path] = option


def write_requests(target: str, workload: Workload, result: RunResult) -> None:
    """Write a row per request, in the workload's order.

    Raises
    ------
    InputError
        When it cannot be written; what was there before is then untouched.
    """
    _write_table(REQUESTS, target, requests_table(workload, result))


def write_series(target: str, log: Iterations, max_rows: int | None = None) -> None:
    """Write a row per iteration, or at most ``max_rows`` per replica (see :func:`series_table`).

    Raises
    ------
    InputError
        When it cannot be written; what was there before is then untouched.
    """
    _write_table(SERIES, target, series_table(log, max_rows))


def write_timeline(target: str, log: Iterations) -> None:
    """Write the iterations as Chrome trace events, which https://ui.perfetto.dev opens.

    Raises
    ------
    InputError
        When it cannot be written; what was there before is then untouched.
    """
    _deliver(TIMELINE, target, lambda file: write_events(file, log))


def requests_table(workload: Workload, result: RunResult) -> Table:
    """Columns of one row per request, named as in ``vllm bench serve``.

    ``request`` counts in the workload's order: that of arrival, but for sessions, whose second
    turns follow all first ones and so on; ``after`` then is the request whose answer came before,
    -1 for a first turn. ``tpot_ms`` is NaN, an empty field in the file, where there is one output
    token. ``finish_s - arrival_s`` is ``e2el_ms``.
    """
    values = result.values
    sessions = {"after": workload.after} if len(workload.after) else {}
    return {
        "request": np.arange(workload.num_requests),
        "replica": result.replica,
        "arrival_s": np.round(result.arrival_s, _DECIMALS_S),
        "prompt_tokens": workload.prompt_tokens,
        "output_tokens": workload.output_tokens,
        "ttft_ms": np.round(values.ttft_s * MS_PER_S, _DECIMALS_MS),
        "tpot_ms": np.round(values.tpot_s * MS_PER_S, _DECIMALS_MS),
        "e2el_ms": np.round(values.e2e_s * MS_PER_S, _DECIMALS_MS),
        "preemptions": result.preempted,
        "finish_s": np.round(result.finish_s, _DECIMALS_S),
        **sessions,
    }


def series_table(log: Iterations, max_rows: int | None = None) -> Table:
    """Columns of one row per iteration, or per time step of one replica.

    Where a replica ran more than ``max_rows`` iterations, the time from the first start to the
    last is cut into ``max_rows`` equal steps; a row is then what one replica began in one step,
    ``start_s`` is the step's, and steps in which it began nothing have no row. ``iterations``,
    ``busy_s`` and tokens are sums over the row's iterations, ``running``, ``waiting`` and
    ``kv_usage`` (0 to 1) the largest among them.
    """
    start_s, order = log.start_s, np.arange(len(log))
    first = order
    if max_rows is not None and len(log) and np.bincount(log.replica).max() > max_rows:
        step_s = (log.start_s[-1] - log.start_s[0]) / max_rows
        # The last start is where the last step ends, and belongs to it.
        step = np.minimum((log.start_s - log.start_s[0]) // step_s, max_rows - 1)
        start_s = log.start_s[0] + step * step_s
        order = np.lexsort((log.replica, step))
        new_row = (np.diff(step[order]) != 0) | (np.diff(log.replica[order]) != 0)
        first = np.concatenate([[0], np.flatnonzero(new_row) + 1])

    def total(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.add.reduceat(values[order], first) if len(log) else values

    def largest(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.maximum.reduceat(values[order], first) if len(log) else values

    return {
        "start_s": np.round(start_s[order][first], _DECIMALS_S),
        "replica": log.replica[order][first],
        "iterations": total(np.ones(len(log), np.int64)),
        "busy_s": np.round(total(log.end_s - log.start_s), _DECIMALS_S),
        "tokens": total(log.tokens),
        "prompt_tokens": total(log.prompt_tokens),
        "decodes": total(log.decodes),
        "sampled": total(log.sampled),
        "running": largest(log.running),
        "waiting": largest(log.waiting),
        "kv_usage": np.round(largest(log.kv_usage), _DECIMALS_SHARE),
    }


def _write_table(option: str, target: str, table: Table) -> None:
    if _is_parquet(option, target):
        pyarrow = _pyarrow(option, target)
        # from_pandas: NaN is stored as null.
        arrays = {name: pyarrow.array(v, from_pandas=True) for name, v in table.items()}
        parquet = importlib.import_module("pyarrow.parquet")
        _deliver(option, target, lambda file: parquet.write_table(pyarrow.table(arrays), file))
    else:
        _deliver(option, target, lambda file: _write_csv(file, table))


def _write_csv(file: IO[bytes], table: Table) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    columns = [["" if v != v else v for v in column.tolist()] for column in table.values()]
    writer.writerows(zip(*columns, strict=True))
    text.detach()


def _is_parquet(option: str, target: str) -> bool:
    return option != TIMELINE and target.lower().endswith(".parquet")


def _pyarrow(option: str, target: str) -> Any:
    """The library that writes Parquet; it is large, so it is an extra."""
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        rule = "needs pyarrow: pip install 'serveplan[parquet]', or end the name in .csv"
        raise _refusal(option, target, rule) from None


def _deliver(option: str, target: str, write: Writer) -> None:
    deliver_file(target, option, lambda file: _compressed(file, target, write))


def _compressed(file: IO[bytes], target: str, write: Writer) -> None:
    if target.lower().endswith(".gz"):
        # Neither name nor time goes into the header: equal runs give equal bytes.
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
            write(cast("IO[bytes]", packed))  # which it is in all but name
    else:
        write(file)


def _refusal(option: str, target: str, rule: str) -> InputError:
    return InputError(source=f"{option} {target}", field="", value=NO_VALUE, rule=rule)
