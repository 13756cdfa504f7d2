"""TensorRT-LLM's schedulers: first who fits into the KV blocks, then who fits into the batch.

Source: cpp/tensorrt_llm/batch_manager/capacityScheduler.cpp, scheduledBlocksManager.h and
microBatchScheduler.cpp, which the PyTorch backend binds (policies GUARANTEED_NO_EVICT and
MAX_UTILIZATION, chunking first come first served, beam 1, no draft tokens). STATIC_BATCH, contexts
only where nothing generates, is the policy ``static``.

The engine keeps one list of requests in the order of their arrival. What it has taken from that
list is ``State.running`` here, in the same order, and may wait there without blocks for its first
chunk; a paused request keeps its place, which is ahead of the queue. Requests in flight in another
micro-batch are passed over: ``State.policy_request`` holds the number of the last batch that
carried a request, ``POLICY_A`` that of the replica's last batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.compiled import called, inner
from simulator.kvcache import grow, pages_for
from simulator.policies.batch import (
    Batch,
    add_prefill,
    emit,
    head_of_queue,
    known_tokens,
    note_usage,
    preempt,
    take_head,
    wait_first,
)
from simulator.state import (
    BOUND_BLOCKS,
    BOUND_SEATS,
    BOUND_TOKENS,
    COMPUTED,
    FREE_BLOCKS,
    GENERATED,
    HELD_BLOCKS,
    IN_FLIGHT,
    LEAVING_SEATS,
    OUTPUT,
    PEAK_SEATS,
    POLICY_A,
    PROMPT,
    RUNNING,
)

if TYPE_CHECKING:
    from simulator.rules import Rules
    from simulator.state import Limits, State
    from simulator.timing import IterationCost


@inner
def _generates(state: State, request: int) -> bool:
    """Whether all its known tokens are computed but the last generated one, or that one too."""
    computed = state.request[request, COMPUTED]
    behind = known_tokens(state, request) - computed
    return behind <= 1 and computed >= state.request[request, PROMPT]


@inner
def _in_flight(state: State, r: int, request: int) -> bool:
    """Whether a batch that has not ended carries the request."""
    carriers = state.policy_request
    if carriers.size == 0:  # the only batch in flight is the one being formed
        return False
    return carriers[request] > state.replica[r, POLICY_A] - state.replica[r, IN_FLIGHT]


@inner
def _pages_to_completion(state: State, limits: Limits, request: int) -> int:
    """Pages that a request lacks to hold its prompt and its whole output."""
    whole = state.request[request, PROMPT] + state.request[request, OUTPUT]
    return pages_for(limits, whole) - state.request[request, HELD_BLOCKS]


@inner
def _pages_for_one_step(state: State, limits: Limits, rules: Rules, request: int) -> int:
    """Pages that a request lacks for its next step, and the one after it with pipeline stages.

    A prompt takes all its pages with its first chunk. No request looks beyond its last token.
    """
    table = state.request
    held = table[request, HELD_BLOCKS]
    known = known_tokens(state, request)
    if held == 0:
        return pages_for(limits, known)
    if not _generates(state, request):
        return 0
    steps = 2 if rules.batches_in_flight > 1 else 1
    whole = table[request, PROMPT] + table[request, OUTPUT]
    return max(0, pages_for(limits, min(known - 1 + steps, whole)) - held)


@inner
def _reserve(state: State, limits: Limits, r: int) -> int:
    """Pages left once every running request has what it lacks to completion."""
    left = state.replica[r, FREE_BLOCKS]
    for i in range(state.replica[r, RUNNING]):
        left -= _pages_to_completion(state, limits, state.running[r, i])
    return left


@inner
def _make_room(state: State, limits: Limits, rules: Rules, r: int) -> tuple[int, int, bool]:
    """Find pages for every running request's next step, in order; pause the last started if short.

    Whatever stands behind a paused request in the list waits too. A request in flight is paused
    when its batch has ended, if there is still no room.

    Returns
    -------
    fitting, left, short
        How many running requests may run, pages left beside theirs, whether there were too few.

    """
    running, replica = state.running, state.replica
    left, n = replica[r, FREE_BLOCKS], replica[r, RUNNING]
    short = False
    i = 0
    while i < n:
        need = _pages_for_one_step(state, limits, rules, running[r, i])
        if need <= left:
            left -= need
            i += 1
            continue
        short = True
        replica[r, BOUND_BLOCKS] = 1
        last = n - 1
        while last >= i and state.request[running[r, last], HELD_BLOCKS] == 0:
            last -= 1
        # Nothing to free, or not before its batch has ended: this one and those behind it wait.
        if last < i or _in_flight(state, r, running[r, last]):
            break
        left += state.request[running[r, last], HELD_BLOCKS]
        preempt(state, r, running[r, last])
        while n > last:
            n -= 1
            wait_first(state, r, running[r, n])
    replica[r, RUNNING] = n
    return i, left, short


@inner
def _generate(state: State, limits: Limits, r: int, fitting: int) -> Batch:
    """Give each generating request its next token while the budget and the batch size last."""
    table, replica = state.request, state.replica
    decodes, context = 0, 0
    for i in range(fitting):
        request = state.running[r, i]
        if not _generates(state, request) or _in_flight(state, r, request):
            continue
        if decodes == limits.max_num_batched_tokens:
            replica[r, BOUND_TOKENS] = 1
            break
        if decodes == limits.max_num_seqs:
            replica[r, BOUND_SEATS] = 1
            break
        computed = table[request, COMPUTED] + 1
        grow(state, limits, r, request, computed)
        table[request, COMPUTED] = computed
        state.scheduled[r, i] = 1
        decodes += 1
        context += computed
        emit(state, r, request)
    return Batch(decodes, decodes, context, decodes, False)


@inner
def _chunk(rules: Rules, lacking: int, room: int) -> int:
    """Prompt tokens that run of ``lacking`` ones; 0 if they must wait."""
    if lacking <= room:
        return lacking
    return room // rules.chunk_unit * rules.chunk_unit if rules.chunked else 0


@inner
def _compute(state: State, limits: Limits, cost: IterationCost, r: int, i: int, new: int) -> bool:
    """Run ``new`` prompt tokens of running request ``i``; whether it emits a token then."""
    request = state.running[r, i]
    computed = state.request[request, COMPUTED]
    known = known_tokens(state, request)
    grow(state, limits, r, request, known)
    add_prefill(state, cost, computed, computed + new)
    state.request[request, COMPUTED] = computed + new
    state.scheduled[r, i] = new
    if computed + new < known:
        return False
    emit(state, r, request)
    return True


@inner
def _continue(
    state: State,
    limits: Limits,
    rules: Rules,
    cost: IterationCost,
    r: int,
    fitting: int,
    batch: Batch,
) -> tuple[Batch, int]:
    """Run more of the prompts that running requests lack; the batch, and the requests it counts.

    A prompt that gets no token counts as one all the same.
    """
    replica, count = state.replica, batch.decodes
    tokens, sampled = batch.tokens, batch.sampled
    for i in range(fitting):
        request = state.running[r, i]
        if _generates(state, request) or _in_flight(state, r, request):
            continue
        if count == limits.max_num_seqs:
            replica[r, BOUND_SEATS] = 1
            break
        count += 1
        lacking = known_tokens(state, request) - state.request[request, COMPUTED]
        new = _chunk(rules, lacking, limits.max_num_batched_tokens - tokens)
        if new < lacking:
            replica[r, BOUND_TOKENS] = 1
        if new > 0 and _compute(state, limits, cost, r, i, new):
            sampled += 1
        tokens += new
    prompts = tokens > batch.tokens
    return Batch(tokens, batch.decodes, batch.context_tokens, sampled, prompts), count


@inner
def _seat_is_free(state: State, limits: Limits, rules: Rules, r: int, count: int) -> bool:
    """Whether one more request can join a batch of ``count`` and the list of running ones."""
    listed = state.replica[r, RUNNING] + state.replica[r, LEAVING_SEATS]
    if count < limits.max_num_seqs and listed < limits.max_num_seqs * rules.batches_in_flight:
        return True
    state.replica[r, BOUND_SEATS] = 1
    return False


@inner
def _admit(
    state: State,
    limits: Limits,
    rules: Rules,
    cost: IterationCost,
    r: int,
    seen: int,
    left: int,
    count: int,
    batch: Batch,
) -> tuple[Batch, int]:
    """Take waiting requests, in order, while seats, pages and tokens last.

    Parameters
    ----------
    state, limits, rules, cost, r, seen
        As for a policy.
    left, count, batch
        Pages left, requests that the batch counts, and the batch so far.

    Returns
    -------
    batch, left
        The batch with their prompts, and the pages left then.

    """
    replica = state.replica
    tokens, sampled = batch.tokens, batch.sampled
    while True:
        request = head_of_queue(state, r, seen)
        if request < 0 or not _seat_is_free(state, limits, rules, r, count):
            break
        known, n = known_tokens(state, request), replica[r, RUNNING]
        room = limits.max_num_batched_tokens - tokens
        new = _chunk(rules, known, room)
        if new == 0 and n == 0 and state.request[request, GENERATED] > 0:
            new = known
        if new < known and (room == 0 or not rules.chunked):
            replica[r, BOUND_TOKENS] = 1
            break
        if rules.evict:
            need = pages_for(limits, known)
        else:
            need = _pages_to_completion(state, limits, request)
        if need > left:
            replica[r, BOUND_BLOCKS] = 1
            break
        if new < known:
            replica[r, BOUND_TOKENS] = 1
        take_head(state, r)
        state.running[r, n] = request
        state.scheduled[r, n] = 0
        replica[r, RUNNING] = n + 1
        left -= need
        count += 1
        if new > 0 and _compute(state, limits, cost, r, n, new):
            sampled += 1
        tokens += new
    prompts = tokens > batch.decodes
    return Batch(tokens, batch.decodes, batch.context_tokens, sampled, prompts), left


@called
def schedule(
    state: State, limits: Limits, rules: Rules, cost: IterationCost, r: int, seen: int
) -> Batch:
    """Form replica ``r``'s next batch and advance its requests' computed tokens.

    Generating requests come first, then prompts in the order of arrival, in one batch under one
    token budget. Without eviction a request is admitted only if all its pages to completion are
    free beside those that the running ones still lack; with it (MAX_UTILIZATION), if its prompt
    fits now, and the last started request is paused when a running one finds no page.

    A prompt that the budget cuts gets whole units (``Rules.chunk_unit``), which may be none; a
    shorter one behind it can still run. Without chunks the first prompt that does not fit holds
    back everything behind it. A paused request whose tokens exceed the budget runs alone then, so
    that it ever resumes (the engine drops the output that does not fit).

    Parameters
    ----------
    state, limits, rules, cost
        The run; ``limits.max_num_seqs`` (``max_batch_size``) and the budget hold for each of the
        batches in flight.
    r
        The replica.
    seen
        Position in its queue up to which the scheduler sees requests.

    Returns
    -------
    Batch
        Empty (``tokens == 0``) if there is nothing to do.

    """
    replica = state.replica
    for i in range(replica[r, RUNNING]):
        state.scheduled[r, i] = 0
    if rules.evict:
        fitting, left, short = _make_room(state, limits, rules, r)
    else:
        fitting, left, short = replica[r, RUNNING], _reserve(state, limits, r), False
    batch = _generate(state, limits, r, fitting)
    batch, count = _continue(state, limits, rules, cost, r, fitting, batch)
    if not short:
        batch, left = _admit(state, limits, rules, cost, r, seen, left, count, batch)
    if batch.tokens > 0 and state.policy_request.size > 0:
        replica[r, POLICY_A] += 1
        for i in range(replica[r, RUNNING]):
            if state.scheduled[r, i] > 0:
                state.policy_request[state.running[r, i]] = replica[r, POLICY_A]
    note_usage(state, limits, r, batch.tokens, limits.num_blocks - left)
    seats = replica[r, RUNNING] + replica[r, LEAVING_SEATS]
    replica[r, PEAK_SEATS] = max(replica[r, PEAK_SEATS], seats)
    return batch
