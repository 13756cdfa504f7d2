"""Iterations as Chrome trace events (JSON), which Perfetto and chrome://tracing open.

One process per replica; in it one slice per iteration and counter tracks of running and waiting
requests and of the KV pages in use. Where a pipeline has several batches in flight, each is on a
track of its own. Format: "Trace Event Format" (Chromium project), events ``X``
(complete), ``C`` (counter) and ``M`` (names), times in microseconds.
"""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from simulator.iteration_log import Iterations

    Ints = npt.NDArray[np.int64]

_NS_PER_S: Final = 1_000_000_000
_DECIMALS_PERCENT: Final = 2


def write_events(file: IO[bytes], log: Iterations) -> None:
    """Write all events of ``log``, replica by replica; equal logs give equal bytes."""
    file.write(b'{"displayTimeUnit":"ms","traceEvents":[')
    separator = "\n"
    for replica in range(log.replicas):
        for event in _replica_events(log, replica):
            file.write(f"{separator}{event}".encode())
            separator = ",\n"
    file.write(b"\n]}\n")


def _replica_events(log: Iterations, replica: int) -> Iterator[str]:
    """Every event of one replica: names, slices, then counters."""
    mine = np.flatnonzero(log.replica == replica)
    start, end = _nanoseconds(log.start_s[mine]), _nanoseconds(log.end_s[mine])
    lane = _lanes(start, end)
    # Perfetto takes process 0 for the idle process; a thread number must not recur elsewhere.
    tracks = [
        f'"pid":{replica + 1},"tid":{replica + 1 + number * log.replicas}'
        for number in range(max(lane, default=0) + 1)
    ]
    where = tracks[0]
    yield _name("process", where, f"replica {replica}")
    for number, track in enumerate(tracks):
        yield _name("thread", track, f"in flight {number + 1}" if number else "iterations")
    prompt, decodes = log.prompt_tokens[mine], log.decodes[mine]
    running, waiting, free = log.running[mine], log.waiting[mine], log.free_blocks[mine]
    columns = (start, end, log.tokens[mine], prompt, decodes, log.sampled[mine])
    rows = (*columns, running, waiting, free)
    for number, start_ns, end_ns, tokens, p, d, s, run, wait, pages in zip(
        lane, *(column.tolist() for column in rows), strict=True
    ):
        name = "decode" if p == 0 else "prefill+decode" if d else "prefill"
        yield (
            f'{{"ph":"X","name":"{name}",{tracks[number]},"ts":{_us(start_ns)},'
            f'"dur":{_us(end_ns - start_ns)},"args":{{"tokens":{tokens},"prompt_tokens":{p},'
            f'"decodes":{d},"sampled":{s},"running":{run},"waiting":{wait},"free_pages":{pages}}}}}'
        )
    # A replica without an iteration in flight runs nothing and nothing waits for it.
    last_end = np.maximum.accumulate(end)
    idle = np.append(start[1:] > last_end[:-1], True)[: len(end)]
    # Ends come first, so that of two equal times the start that follows has the last word.
    at = np.concatenate([last_end[idle], start])
    in_time = np.argsort(at, kind="stable")
    for name, unit, levels in (
        ("running", "requests", running),
        ("waiting", "requests", waiting),
        ("KV cache", "percent", np.round(100 * log.kv_usage[mine], _DECIMALS_PERCENT)),
    ):
        level = np.concatenate([np.zeros(int(idle.sum()), levels.dtype), levels])[in_time]
        changed = np.append(True, np.diff(level) != 0)[: len(level)]
        for ns, value in zip(at[in_time][changed].tolist(), level[changed].tolist(), strict=True):
            yield (
                f'{{"ph":"C","name":"{name}",{where},"ts":{_us(ns)},"args":{{"{unit}":{value}}}}}'
            )


def _name(kind: str, where: str, name: str) -> str:
    """Event that names a process or a thread."""
    return f'{{"ph":"M","name":"{kind}_name",{where},"args":{{"name":"{name}"}}}}'


def _lanes(start: Ints, end: Ints) -> list[int]:
    """Track of each iteration: the first whose last one has ended, as slices must not cross."""
    lanes: list[int] = []
    free_at: list[int] = []
    for begin, finish in zip(start.tolist(), end.tolist(), strict=True):
        lane = next((i for i, at in enumerate(free_at) if at <= begin), len(free_at))
        if lane == len(free_at):
            free_at.append(finish)
        free_at[lane] = finish
        lanes.append(lane)
    return lanes


def _nanoseconds(time_s: npt.NDArray[np.float64]) -> Ints:
    return np.rint(time_s * _NS_PER_S).astype(np.int64)


def _us(ns: int) -> str:
    """Microseconds with three decimals."""
    return f"{ns // 1000}.{ns % 1000:03d}"
