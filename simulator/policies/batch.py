"""What policies share: the batch that they form, and the moves that they make."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from simulator.compiled import inner
from simulator.kvcache import release
from simulator.state import (
    BOUND_BLOCKS,
    COMPUTED,
    EMITTED,
    FREE_BLOCKS,
    GENERATED,
    HEAD,
    IN_FLIGHT,
    LEAVING_SEATS,
    NEXT_SLOT,
    OLDEST,
    PEAK_BLOCKS,
    PEAK_DEMAND,
    PEAK_SEATS,
    PEAK_TOKENS,
    PREEMPTIONS,
    PROMPT,
    RUNNING,
    STACKED,
    TAIL,
)

if TYPE_CHECKING:
    from simulator.rules import Rules
    from simulator.state import Limits, State
    from simulator.timing import IterationCost


class Batch(NamedTuple):
    """What one iteration computes; its prompt attention is in ``State.prefill_ps``."""

    tokens: int
    decodes: int
    context_tokens: int
    sampled: int
    has_prefill: bool


@inner
def known_tokens(state: State, request: int) -> int:
    """Prompt and generated tokens of a request: what it must have computed to emit the next."""
    return state.request[request, PROMPT] + state.request[request, GENERATED]


@inner
def add_prefill(state: State, cost: IterationCost, first: int, last: int) -> None:
    """Count the prompt attention of tokens ``first`` to ``last`` of a sequence into the batch."""
    for kind in range(state.prefill_ps.size):
        state.prefill_ps[kind] += cost.prefill_ps[kind, last] - cost.prefill_ps[kind, first]


@inner
def emit(state: State, r: int, request: int) -> None:
    """Note that a request emits a token when the batch being formed ends."""
    slot = state.replica[r, NEXT_SLOT]
    count = state.slot[r, slot, EMITTED]
    state.emitting[r, slot, count] = request
    state.slot[r, slot, EMITTED] = count + 1


@inner
def head_of_queue(state: State, r: int, seen: int) -> int:
    """The waiting request that is next in line, preempted ones first, or -1.

    ``seen`` is the position in the queue up to which the scheduler sees it.
    """
    stacked = state.replica[r, STACKED]
    if stacked > 0:
        return state.preempted[r, stacked - 1]
    head = state.replica[r, HEAD]
    if head < min(seen, state.replica[r, TAIL]):
        return state.queue[r, head % state.queue.shape[1]]
    return -1


@inner
def take_head(state: State, r: int) -> None:
    """Remove the waiting request that is next in line."""
    if state.replica[r, STACKED] > 0:
        state.replica[r, STACKED] -= 1
    else:
        state.replica[r, HEAD] += 1


@inner
def preempt(state: State, r: int, request: int) -> None:
    """Take everything from a running request: it recomputes all its tokens when it is resumed.

    The caller removes it from the running requests and says where it waits.
    """
    state.replica[r, FREE_BLOCKS] += release(state, request)
    state.request[request, COMPUTED] = 0
    state.request[request, PREEMPTIONS] += 1
    state.replica[r, BOUND_BLOCKS] = 1
    _take_back(state, r, request)


@inner
def _take_back(state: State, r: int, request: int) -> None:
    """Let no batch in flight emit a token of a request, nor count as computing its prompt."""
    emitting, seats = state.emitting, state.emitting.shape[2]
    for k in range(state.replica[r, IN_FLIGHT]):
        slot = (state.replica[r, OLDEST] + k) % emitting.shape[1]
        emitted = state.slot[r, slot, EMITTED]
        used = min(emitted + 1, seats)  # with the one of note_part
        kept = 0
        for i in range(used):
            if emitting[r, slot, i] != request:
                emitting[r, slot, kept] = emitting[r, slot, i]
                kept += 1
            elif i < emitted:
                state.slot[r, slot, EMITTED] -= 1
        if kept < used:
            emitting[r, slot, kept] = -1


@inner
def wait_first(state: State, r: int, request: int) -> None:
    """Put a preempted request at the front of the queue."""
    state.preempted[r, state.replica[r, STACKED]] = request
    state.replica[r, STACKED] += 1


@inner
def wait_last(state: State, r: int, request: int) -> None:
    """Put a preempted request at the end of the queue."""
    state.queue[r, state.replica[r, TAIL] % state.queue.shape[1]] = request
    state.replica[r, TAIL] += 1


@inner
def note_usage(state: State, limits: Limits, r: int, tokens: int, demand: int) -> None:
    """Keep the largest use of each limit.

    Parameters
    ----------
    state, limits, r
        The replica that has just formed a batch.
    tokens
        Of the batch.
    demand
        Blocks held, with those that the last admission asked for.

    """
    replica = state.replica
    held = limits.num_blocks - replica[r, FREE_BLOCKS]
    seats = replica[r, RUNNING] + replica[r, LEAVING_SEATS]
    replica[r, PEAK_SEATS] = max(replica[r, PEAK_SEATS], seats)
    replica[r, PEAK_TOKENS] = max(replica[r, PEAK_TOKENS], tokens)
    replica[r, PEAK_BLOCKS] = max(replica[r, PEAK_BLOCKS], held)
    replica[r, PEAK_DEMAND] = max(replica[r, PEAK_DEMAND], demand)


@inner
def note_part(state: State, rules: Rules, r: int) -> None:
    """Note whose prompt the batch just formed computes only in part: one request at most.

    It stands behind those that emit. Only pipelines need it: a request whose known tokens are all
    computed is in flight until it emits, but one with a chunk in flight does not show it.
    """
    if rules.batches_in_flight == 1:
        return
    slot = state.replica[r, NEXT_SLOT]
    count = state.slot[r, slot, EMITTED]
    if count == state.emitting.shape[2]:
        return  # every seat emits
    state.emitting[r, slot, count] = -1
    for i in range(state.replica[r, RUNNING]):
        request = state.running[r, i]
        known = known_tokens(state, request)
        if state.scheduled[r, i] > 0 and state.request[request, COMPUTED] < known:
            state.emitting[r, slot, count] = request


@inner
def in_flight_in_part(state: State, r: int, request: int) -> bool:
    """Whether a batch in flight computes part of a request's prompt, by :func:`note_part`."""
    depth, seats = state.emitting.shape[1], state.emitting.shape[2]
    for k in range(state.replica[r, IN_FLIGHT]):
        slot = (state.replica[r, OLDEST] + k) % depth
        count = state.slot[r, slot, EMITTED]
        if count < seats and state.emitting[r, slot, count] == request:
            return True
    return False
