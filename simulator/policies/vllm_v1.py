"""vLLM's V1 scheduler: decodes and prompt chunks share one batch under one token budget.

Source: vllm/v1/core/sched/scheduler.py (``schedule``, ``_preempt_request``) and
vllm/v1/core/kv_cache_manager.py (``allocate_slots``), policy ``fcfs``, no speculative decoding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.compiled import called, inner
from simulator.kvcache import grow, has_pool, pages_for
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
from simulator.prefix_cache import find, seat
from simulator.state import (
    BOUND_BLOCKS,
    BOUND_SEATS,
    BOUND_TOKENS,
    COMPUTED,
    FREE_BLOCKS,
    HELD_BLOCKS,
    HELD_TOKENS,
    LEAVING_SEATS,
    PROMPT,
    RUNNING,
)

if TYPE_CHECKING:
    from simulator.rules import Rules
    from simulator.state import Limits, State
    from simulator.timing import IterationCost


@inner
def continue_running(state: State, limits: Limits, cost: IterationCost, r: int) -> Batch:
    """Give each running request, in admission order, what it lacks and the budget holds.

    One that cannot get its blocks preempts the last admitted, and in the end itself. A prompt's
    last chunk counts as prefill even if it is a single token, which vLLM's attention kernels would
    treat as a decode: one iteration's attention differs by less than a launch, and all prompt
    attention stays in one account. A request whose tokens are all in flight lacks nothing and is
    passed over.
    """
    table, replica = state.request, state.replica
    running, scheduled = state.running, state.scheduled
    budget = limits.max_num_batched_tokens
    n = replica[r, RUNNING]
    decodes, context, sampled = 0, 0, 0
    has_prefill = False
    i = 0
    while i < n and budget > 0:
        request = running[r, i]
        computed = table[request, COMPUTED]
        lacking = known_tokens(state, request) - computed
        new = min(lacking, budget)
        scheduled[r, i] = new
        if new > 0:
            while n > i and not grow(state, limits, r, request, computed + new):
                n -= 1
                preempt(state, r, running[r, n])
                wait_first(state, r, running[r, n])
            if n == i:  # the request itself was the last one left
                break
            table[request, COMPUTED] = computed + new
            budget -= new
            if new == 1 and computed >= table[request, PROMPT]:
                decodes += 1
                context += computed + 1
            else:
                add_prefill(state, cost, computed, computed + new)
                has_prefill = True
            if new == lacking:
                sampled += 1
                emit(state, r, request)
            else:
                replica[r, BOUND_TOKENS] = 1
        i += 1
    while i < n:
        scheduled[r, i] = 0
        replica[r, BOUND_TOKENS] = 1
        i += 1
    replica[r, RUNNING] = n
    return Batch(limits.max_num_batched_tokens - budget, decodes, context, sampled, has_prefill)


@called
def schedule(
    state: State, limits: Limits, rules: Rules, cost: IterationCost, r: int, seen: int
) -> Batch:
    """Form replica ``r``'s next batch and advance its requests' computed tokens.

    Running requests come first. Only if none of them was preempted are waiting requests
    admitted, strictly in order, while seats, budget and blocks last. A preempted request drops
    its blocks, goes to the front of the waiting queue and recomputes all its tokens.

    Parameters
    ----------
    state, limits, rules, cost
        The run.
    r
        The replica.
    seen
        Position in its queue up to which the scheduler sees requests.

    Returns
    -------
    Batch
        Empty (``tokens == 0``) if there is nothing to do.

    """
    was_running = state.replica[r, RUNNING]
    batch = continue_running(state, limits, cost, r)
    if state.replica[r, RUNNING] < was_running:
        held = limits.num_blocks - state.replica[r, FREE_BLOCKS]
        note_usage(state, limits, r, batch.tokens, held)
        return batch
    return admit(state, limits, rules, cost, r, seen, batch)


@inner
def admit(
    state: State,
    limits: Limits,
    rules: Rules,
    cost: IterationCost,
    r: int,
    seen: int,
    batch: Batch,
) -> Batch:
    """Add waiting requests to a batch of running ones, and note what it uses.

    Of a request whose first blocks are cached the rest is computed, at least its last token
    (``get_computed_blocks``). Cached blocks that are free count as taken.
    """
    table, replica = state.request, state.replica
    budget = limits.max_num_batched_tokens - batch.tokens
    n = replica[r, RUNNING]
    decodes, context, sampled = batch.decodes, batch.context_tokens, batch.sampled
    has_prefill = batch.has_prefill
    demand = limits.num_blocks - replica[r, FREE_BLOCKS]

    admitted = 0
    while True:
        request = head_of_queue(state, r, seen)
        if request < 0 or (rules.prompts_per_step > 0 and admitted == rules.prompts_per_step):
            break
        if budget == 0:
            replica[r, BOUND_TOKENS] = 1
            break
        if n + replica[r, LEAVING_SEATS] >= limits.max_num_seqs:
            replica[r, BOUND_SEATS] = 1
            break
        known = known_tokens(state, request)
        hits, free_hits = 0, 0
        if has_pool(state):
            hits, free_hits = find(state.pool, r, request, (known - 1) // limits.block_tokens)
        found = hits * limits.block_tokens
        new = min(known - found, budget)
        if found + new < known and not rules.chunked:
            replica[r, BOUND_TOKENS] = 1
            break
        held_tokens = known if rules.reserve_full_prompt else found + new
        must_fit = pages_for(limits, held_tokens) - hits + free_hits
        if must_fit > replica[r, FREE_BLOCKS]:
            replica[r, BOUND_BLOCKS] = 1
            break
        demand = max(demand, limits.num_blocks - replica[r, FREE_BLOCKS] + must_fit)
        take_head(state, r)
        if has_pool(state):
            seat(state.pool, r, request, hits, limits.block_tokens)
            replica[r, FREE_BLOCKS] -= free_hits
            table[request, HELD_BLOCKS] = hits
            table[request, HELD_TOKENS] = found
        grow(state, limits, r, request, found + new)
        table[request, COMPUTED] = found + new
        state.running[r, n] = request
        state.scheduled[r, n] = new
        n += 1
        admitted += 1
        budget -= new
        if new == 1 and found >= table[request, PROMPT]:  # preempted and found again
            decodes += 1
            context += found + 1
        else:
            add_prefill(state, cost, found, found + new)
            has_prefill = True
        if found + new == known:
            sampled += 1
            emit(state, r, request)
        else:
            replica[r, BOUND_TOKENS] = 1

    tokens = limits.max_num_batched_tokens - budget
    replica[r, RUNNING] = n
    note_usage(state, limits, r, tokens, demand)
    return Batch(tokens, decodes, context, sampled, has_prefill)
