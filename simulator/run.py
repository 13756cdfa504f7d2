"""One run of one plan: from a workload and a compiled cost to per-request times."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from simulator.engine import advance, empty_gaps
from simulator.iteration_log import IterationLog, Iterations, empty_log, iterations_of
from simulator.kvcache import pages_for
from simulator.metrics import Latencies, latencies, makespan_s
from simulator.state import (
    ARRIVAL,
    BOUND_BLOCKS,
    BOUND_SEATS,
    BOUND_TOKENS,
    FINISH,
    FIRST_TOKEN,
    ITERATIONS,
    OUTPUT,
    PEAK_BLOCKS,
    PEAK_DEMAND,
    PEAK_SEATS,
    PEAK_TOKENS,
    PREEMPTIONS,
    REPLICA,
    initial_state,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from simulator.state import Limits, State
    from simulator.timing import IterationCost
    from simulator.workload import Workload

_RECORD_ENTRIES = 1 << 16
"""Entries of the gap record that are handed to the loop at a time (1 MiB)."""

_LOG_ENTRIES = 1 << 14
"""Iterations of the log that are handed to the loop at a time (1.1 MiB)."""


@dataclass(frozen=True)
class Usage:
    """What a run used of its limits, over all replicas.

    ``seats``, ``tokens`` and ``blocks`` are peaks; ``demanded_blocks`` also counts what admission
    asked for. ``*_bound`` says whether that limit ever held a request back.
    """

    seats: int
    tokens: int
    blocks: int
    demanded_blocks: int
    seats_bound: bool
    tokens_bound: bool
    blocks_bound: bool


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Parameters
    ----------
    arrival_s, first_token_s, finish_s
        (N,) per-request times, seconds.
    values
        Latencies from those times.
    makespan_s
        First arrival to last token.
    iterations, preemptions
        Counts over all replicas.
    usage
        What the run used of its limits.
    gaps
        Gaps between tokens and their counts, or ``None`` if not recorded.
    replica, preempted
        (N,) per request: the replica that served it, and how often it was preempted.
    log
        What every iteration did, or ``None`` if not recorded.

    """

    arrival_s: npt.NDArray[np.float64]
    first_token_s: npt.NDArray[np.float64]
    finish_s: npt.NDArray[np.float64]
    values: Latencies
    makespan_s: float
    iterations: int
    preemptions: int
    usage: Usage
    gaps: tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]] | None
    replica: npt.NDArray[np.int64]
    preempted: npt.NDArray[np.int64]
    log: Iterations | None

    def trajectory_hash(self) -> str:
        """Digest of every request's times: equal for plans that behave identically."""
        digest = hashlib.blake2b(digest_size=16)
        for times in (self.arrival_s, self.first_token_s, self.finish_s):
            digest.update(times.tobytes())
        return digest.hexdigest()


class Run:
    """A run that can be advanced piecewise, looked at, and abandoned.

    Parameters
    ----------
    workload, replicas, limits, cost
        What runs, on how many replicas, under which limits, at what cost per iteration.
    record_gaps
        Whether to keep the gaps between tokens (for ITL).

    Raises
    ------
    ValueError
        If a request cannot fit into a replica's KV blocks even alone, or exceeds the compiled
        context.

    """

    def __init__(
        self,
        workload: Workload,
        replicas: int,
        limits: Limits,
        cost: IterationCost,
        *,
        record_gaps: bool = False,
    ) -> None:
        _check(workload, limits, cost)
        self.workload = workload
        self.limits = limits
        self.cost = cost
        self.state: State = initial_state(workload, replicas, limits)
        self._gaps = empty_gaps(_RECORD_ENTRIES + self.state.running.shape[1] if record_gaps else 0)
        self._kept: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]] = []
        self._log: IterationLog | None = None
        self._kept_log: list[IterationLog] = []

    def record_iterations(self) -> None:
        """Keep what every iteration does, from the next one on; takes 72 bytes each."""
        self._log = empty_log(_LOG_ENTRIES)

    @property
    def iterations(self) -> int:
        """Iterations run so far."""
        return int(self.state.counters[ITERATIONS])

    def advance(self, max_iterations: int) -> bool:
        """Run up to ``max_iterations`` more; say whether every request has finished."""
        stop = self.iterations + max_iterations
        done = False
        while not done and self.iterations < stop:
            left = stop - self.iterations
            done = bool(advance(self.state, self.limits, self.cost, self._gaps, left, self._log))
            self._drain_gaps()
            self._drain_log()
        return done

    def finish(self) -> RunResult:
        """Run to the end and say what happened."""
        while not self.advance(np.iinfo(np.int32).max):
            pass
        return self.result()

    def usage(self) -> Usage:
        """What the run has used of its limits so far."""
        most = self.state.replica.max(axis=0)
        return Usage(
            seats=int(most[PEAK_SEATS]),
            tokens=int(most[PEAK_TOKENS]),
            blocks=int(most[PEAK_BLOCKS]),
            demanded_blocks=int(most[PEAK_DEMAND]),
            seats_bound=bool(most[BOUND_SEATS]),
            tokens_bound=bool(most[BOUND_TOKENS]),
            blocks_bound=bool(most[BOUND_BLOCKS]),
        )

    def result(self) -> RunResult:
        """The finished run; call only after :meth:`advance` returned true."""
        request, time_s = self.state.request, self.state.time_s
        gaps = None
        if self._gaps.gap_s.size:
            gap_s, tokens = zip(*self._kept, strict=True)
            gaps = (np.concatenate(gap_s), np.concatenate(tokens))
        log = None
        if self._log is not None:
            log = iterations_of(self._kept_log, self.state, self.limits)
        arrival_s, first_s, finish_s = (
            np.ascontiguousarray(time_s[:, column]) for column in (ARRIVAL, FIRST_TOKEN, FINISH)
        )
        return RunResult(
            arrival_s=arrival_s,
            first_token_s=first_s,
            finish_s=finish_s,
            values=latencies(arrival_s, first_s, finish_s, request[:, OUTPUT]),
            makespan_s=makespan_s(float(arrival_s.min()), finish_s),
            iterations=self.iterations,
            preemptions=int(request[:, PREEMPTIONS].sum()),
            usage=self.usage(),
            gaps=gaps,
            replica=request[:, REPLICA].copy(),
            preempted=request[:, PREEMPTIONS].copy(),
            log=log,
        )

    def _drain_gaps(self) -> None:
        used = int(self._gaps.used[0])
        if self._gaps.gap_s.size:
            self._kept.append((self._gaps.gap_s[:used].copy(), self._gaps.tokens[:used].copy()))
            self._gaps.used[0] = 0

    def _drain_log(self) -> None:
        if self._log is not None:
            used = int(self._log.used[0])
            times_s, counts = self._log.times_s[:used].copy(), self._log.counts[:used].copy()
            self._kept_log.append(IterationLog(times_s, counts, self._log.used.copy()))
            self._log.used[0] = 0


def _check(workload: Workload, limits: Limits, cost: IterationCost) -> None:
    """Refuse what the loops would run into without noticing."""
    seqs, tokens = limits.max_num_seqs, limits.max_num_batched_tokens
    if not 1 <= seqs <= tokens:
        raise ValueError(
            f"max_num_seqs is {seqs}; it must be from 1 to max_num_batched_tokens ({tokens})"
        )
    longest = int((workload.prompt_tokens + workload.output_tokens).max())
    if pages_for(limits, longest) > limits.num_blocks:
        raise ValueError(
            f"a request of {longest} tokens needs more than the {limits.num_blocks} KV blocks"
        )
    seats = min(seqs, workload.num_requests)
    for name, needed, compiled in (
        ("tokens of one request", longest, len(cost.prefill_s)),
        ("tokens of one iteration", tokens, min(len(cost.decode_s), len(cost.mixed_s))),
        ("sequences", seats, min(len(cost.sampled_s), len(cost.attention_s))),
    ):
        if needed >= compiled:
            raise ValueError(f"{needed} {name} occur; the cost is compiled for {compiled - 1}")
