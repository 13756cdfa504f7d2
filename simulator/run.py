"""One run of one plan: from a workload and a compiled cost to per-request times."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from simulator import jump, lockstep
from simulator.ahead import nothing_ahead
from simulator.engine import advance, empty_gaps
from simulator.iteration_log import IterationLog, Iterations, empty_log, iterations_of
from simulator.kvcache import pages_for
from simulator.metrics import Latencies, latencies, makespan_s
from simulator.prefix_cache import FOUND_TOKENS
from simulator.rules import VLLM_V1, of_policy
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
    STUCK,
    initial_state,
)
from simulator.timing import in_s

if TYPE_CHECKING:
    import numpy.typing as npt

    from simulator.lockstep_cost import Lockstep
    from simulator.rules import Rules
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
    cached_tokens
        (N,) tokens that each request found in the prefix cache when it was first admitted.
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
    cached_tokens: npt.NDArray[np.int64]
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
    rules
        The engine's batching rules.
    together
        What the attention groups of a replica do in lockstep: limits, cost and router are then one
        group's. ``None``: a replica is one group.
    record_gaps
        Whether to keep the gaps between tokens (for ITL).
    plain
        Whether to use the plain loop throughout; otherwise the jump engine does what is not
        recorded, with the same result.

    Raises
    ------
    ValueError
        If a request cannot fit into a replica's KV blocks even alone, or exceeds the compiled
        context, or if the rules ask for a prefix cache that is not modelled.

    """

    def __init__(
        self,
        workload: Workload,
        replicas: int,
        limits: Limits,
        cost: IterationCost,
        rules: Rules,
        *,
        together: Lockstep | None = None,
        record_gaps: bool = False,
        plain: bool = False,
    ) -> None:
        _check(workload, limits, cost, rules)
        if together is not None and rules.batches_in_flight > 1:
            raise ValueError("attention groups in pipeline stages are not simulated")
        self.workload = workload
        self.limits = limits
        self.cost = cost
        self.rules = of_policy(rules)
        self.replicas, self._together = replicas, together
        groups = 1 if together is None else together.groups
        self.state: State = initial_state(workload, replicas * groups, limits, rules, cost)
        self._groups = lockstep.empty_groups(replicas, groups)
        self._plain = plain or record_gaps
        self._ahead = nothing_ahead(self.state, limits)
        at_once = groups * self.state.running.shape[1]
        self._gaps = empty_gaps(_RECORD_ENTRIES + at_once if record_gaps else 0)
        self._kept: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
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
        """Run ``max_iterations`` more, or some beyond; say whether every request has finished."""
        stop = self.iterations + max_iterations
        done = False
        while not done and self.iterations < stop:
            done = self._advance(stop - self.iterations)
            self._drain_gaps()
            self._drain_log()
            if self.state.counters[STUCK]:
                raise ValueError("a waiting request can never be admitted under these limits")
        return done

    def _advance(self, max_iterations: int) -> bool:
        """One call of the loop that fits what is recorded; it may return early."""
        if self._together is not None:
            held = self.limits, self.rules, self.cost, self._together, self._gaps, self._groups
            return bool(lockstep.advance(self.state, *held, max_iterations, self._log))
        what = self.limits, self.rules, self.cost, self._gaps, max_iterations
        if self._plain or self._log is not None:
            return bool(advance(self.state, *what, self._log))
        return bool(jump.advance(self.state, self._ahead, *what))

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
        request = self.state.request
        gaps = None
        if self._gaps.gap_ps.size:
            gap_ps, tokens = zip(*self._kept, strict=True)
            gaps = (in_s(np.concatenate(gap_ps)), np.concatenate(tokens))
        log = None
        if self._log is not None:
            log = iterations_of(self._kept_log, self.state, self.limits)
        arrival, first, finish = (
            np.ascontiguousarray(self.state.time_ps[:, column])
            for column in (ARRIVAL, FIRST_TOKEN, FINISH)
        )
        return RunResult(
            arrival_s=in_s(arrival),
            first_token_s=in_s(first),
            finish_s=in_s(finish),
            values=latencies(arrival, first, finish, request[:, OUTPUT]),
            makespan_s=makespan_s(arrival, finish),
            iterations=self.iterations,
            preemptions=int(request[:, PREEMPTIONS].sum()),
            usage=self.usage(),
            gaps=gaps,
            replica=request[:, REPLICA] % self.replicas,
            preempted=request[:, PREEMPTIONS].copy(),
            cached_tokens=self._cached_tokens(),
            log=log,
        )

    def _cached_tokens(self) -> npt.NDArray[np.int64]:
        if self.rules.prefix_caching:
            return self.state.pool.request[:, FOUND_TOKENS].copy()
        return np.zeros(self.workload.num_requests, np.int64)

    def _drain_gaps(self) -> None:
        used = int(self._gaps.used[0])
        if self._gaps.gap_ps.size:
            self._kept.append((self._gaps.gap_ps[:used].copy(), self._gaps.tokens[:used].copy()))
            self._gaps.used[0] = 0

    def _drain_log(self) -> None:
        if self._log is not None:
            used = int(self._log.used[0])
            times_ps, counts = self._log.times_ps[:used].copy(), self._log.counts[:used].copy()
            self._kept_log.append(IterationLog(times_ps, counts, self._log.used.copy()))
            self._log.used[0] = 0


def _check_cache(workload: Workload, limits: Limits, rules: Rules) -> None:
    """Refuse a prefix cache other than vLLM V1's for layers that keep every token."""
    if rules.policy != VLLM_V1:
        raise ValueError("a prefix cache is modelled for vLLM's V1 scheduler only")
    if (limits.growing, limits.windowed, limits.fixed) != (1, 0, 0):
        raise ValueError("a prefix cache is modelled for layers that all keep every token only")
    if workload.block_tokens not in (0, limits.block_tokens):
        raise ValueError(
            f"prompts have ids of {workload.block_tokens} tokens each; KV blocks hold "
            f"{limits.block_tokens}"
        )


def _check(workload: Workload, limits: Limits, cost: IterationCost, rules: Rules) -> None:
    """Refuse what the loops would run into without noticing."""
    seqs, tokens = limits.max_num_seqs, limits.max_num_batched_tokens
    if seqs < 1 or tokens < 1:
        raise ValueError(f"max_num_seqs is {seqs} and the token budget {tokens}; both must be >= 1")
    if rules.prefix_caching:
        _check_cache(workload, limits, rules)
    longest = int((workload.prompt_tokens + workload.output_tokens).max())
    kept_free = int(rules.watermark * limits.num_blocks)
    if pages_for(limits, longest) + kept_free > limits.num_blocks:
        raise ValueError(
            f"a request of {longest} tokens needs more than the "
            f"{limits.num_blocks - kept_free} KV blocks that it can be given"
        )
    seats = min(seqs, workload.num_requests)
    # With chunks, the chunk caps a batch whatever else does.
    largest = max(tokens, 0 if rules.chunked else rules.prefill_tokens, seats)
    for name, needed, compiled in (
        ("tokens of one request", longest, cost.max_context),
        ("tokens of one iteration", largest, cost.max_tokens),
        ("sequences", seats, cost.max_seqs),
    ):
        if needed > compiled:
            raise ValueError(f"{needed} {name} occur; the cost is compiled for {compiled}")
