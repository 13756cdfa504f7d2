"""The plain loop: replicas form, run and finish iterations one by one, in order of time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from simulator.compiled import compiled
from simulator.iteration_log import log_iteration
from simulator.policies.vllm_v1 import schedule
from simulator.state import (
    ARRIVAL,
    COMPUTED,
    EVENT,
    FINISH,
    FINISHED,
    FIRST_TOKEN,
    FREE_BLOCKS,
    GENERATED,
    HEAD,
    HELD_BLOCKS,
    IN_FLIGHT,
    ITERATIONS,
    LAST_TOKEN,
    NEVER_S,
    NEXT_REPLICA,
    NEXT_REQUEST,
    OUTPUT,
    PROMPT,
    REPLICA,
    RUNNING,
    STARTED,
    TAIL,
)
from simulator.timing import iteration_s

if TYPE_CHECKING:
    import numpy.typing as npt

    from simulator.iteration_log import IterationLog
    from simulator.state import Limits, State
    from simulator.timing import IterationCost


class Gaps(NamedTuple):
    """Gaps between tokens of one request, as they occur: equal gaps of a batch are one entry.

    Attributes
    ----------
    gap_s, tokens
        (G,) gap and how many tokens had it.
    used
        (1,) entries filled.

    """

    gap_s: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]
    used: npt.NDArray[np.int64]


def empty_gaps(capacity: int) -> Gaps:
    """Room for ``capacity`` entries; 0 switches the recording off."""
    return Gaps(np.zeros(capacity), np.zeros(capacity, np.int64), np.zeros(1, np.int64))


@compiled
def _send_next(state: State, limits: Limits, now_s: float) -> None:
    """A closed-loop client sends its next request, to the replica whose turn it is."""
    request = state.counters[NEXT_REQUEST]
    if request == state.request.shape[0]:
        return
    state.counters[NEXT_REQUEST] = request + 1
    r = state.counters[NEXT_REPLICA]
    state.counters[NEXT_REPLICA] = (r + 1) % state.replica.shape[0]
    state.time_s[request, ARRIVAL] = now_s
    state.request[request, REPLICA] = r
    state.queue[r, state.replica[r, TAIL]] = request
    state.replica[r, TAIL] += 1
    if not state.replica[r, IN_FLIGHT]:
        state.clock_s[r, EVENT] = min(state.clock_s[r, EVENT], now_s + limits.ingress_s)


@compiled
def _finish_iteration(state: State, limits: Limits, gaps: Gaps, r: int, now_s: float) -> None:
    """Hand out the tokens of the iteration that ends now; finished requests leave."""
    table, time_s = state.request, state.time_s
    running = state.running
    started_s = state.clock_s[r, STARTED]
    recording = gaps.gap_s.size > 0
    steady, kept = 0, 0
    state.replica[r, IN_FLIGHT] = 0
    for slot in range(state.replica[r, RUNNING]):
        request = running[r, slot]
        generated = table[request, GENERATED]
        if kept < slot:
            running[r, kept] = request
        if table[request, COMPUTED] < table[request, PROMPT] + generated:
            kept += 1
            continue
        if generated == 0:
            time_s[request, FIRST_TOKEN] = now_s
        elif time_s[request, LAST_TOKEN] == started_s:
            steady += 1
        elif recording:
            entry = gaps.used[0]
            gaps.gap_s[entry] = now_s - time_s[request, LAST_TOKEN]
            gaps.tokens[entry] = 1
            gaps.used[0] = entry + 1
        time_s[request, LAST_TOKEN] = now_s
        table[request, GENERATED] = generated + 1
        if generated + 1 < table[request, OUTPUT]:
            kept += 1
        else:
            time_s[request, FINISH] = now_s
            state.replica[r, FREE_BLOCKS] += table[request, HELD_BLOCKS]
            table[request, HELD_BLOCKS] = 0
            state.counters[FINISHED] += 1
            _send_next(state, limits, now_s)
    state.replica[r, RUNNING] = kept
    if recording and steady > 0:
        entry = gaps.used[0]
        gaps.gap_s[entry] = now_s - started_s
        gaps.tokens[entry] = steady
        gaps.used[0] = entry + 1


@compiled
def advance(
    state: State,
    limits: Limits,
    cost: IterationCost,
    gaps: Gaps,
    max_iterations: int,
    log: IterationLog | None = None,
) -> bool:
    """Run up to ``max_iterations`` more iterations; the state can be advanced again.

    Events happen in order of time, the lower replica first where two coincide, so the result
    does not depend on how a run is cut into calls. It returns early when ``gaps`` or ``log`` is
    full. numba compiles the loop once without and once with a log.

    Returns
    -------
    bool
        Whether every request has finished.

    """
    counters, clock_s, replica = state.counters, state.clock_s, state.replica
    stop = counters[ITERATIONS] + max_iterations
    seats = state.running.shape[1]
    while counters[FINISHED] < state.request.shape[0]:
        if counters[ITERATIONS] >= stop:
            return False
        if gaps.gap_s.size > 0 and gaps.used[0] + seats + 1 > gaps.gap_s.size:
            return False  # the caller empties the record first
        if log is not None and log.used[0] == log.counts.shape[0]:
            return False
        r = 0
        for other in range(1, replica.shape[0]):
            if clock_s[other, EVENT] < clock_s[r, EVENT]:
                r = other
        now_s = clock_s[r, EVENT]
        if replica[r, IN_FLIGHT]:
            _finish_iteration(state, limits, gaps, r, now_s)
        batch = schedule(state, limits, cost.prefill_s, r, now_s)
        if batch.tokens > 0:
            counters[ITERATIONS] += 1
            replica[r, IN_FLIGHT] = 1
            clock_s[r, STARTED] = now_s
            clock_s[r, EVENT] = now_s + iteration_s(
                cost,
                batch.tokens,
                batch.decodes,
                batch.context_tokens,
                batch.prefill_attention_s,
                batch.sampled,
                batch.has_prefill,
            )
            if log is not None:
                log_iteration(log, state, batch, r)
        elif replica[r, HEAD] < replica[r, TAIL]:
            waiting = state.queue[r, replica[r, HEAD]]
            clock_s[r, EVENT] = state.time_s[waiting, ARRIVAL] + limits.ingress_s
        else:
            clock_s[r, EVENT] = NEVER_S
    return True
