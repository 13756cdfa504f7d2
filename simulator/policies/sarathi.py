"""Sarathi-Serve's scheduler: all decodes first, then prompt chunks up to a fixed batch size.

Source: sarathi/core/scheduler/sarathi_scheduler.py (``_schedule``), base_scheduler.py
(``schedule``, ``_preempt``) and block_space_manager/base_block_space_manager.py
(``can_allocate``, ``can_append_slot``), chunks of fixed size. The token budget is Sarathi's
``chunk_size``. Its memory manager is that of an early vLLM, hence the shared functions. It sorts
running requests by arrival; here they always stand so, since whoever is preempted is the last of
them and goes ahead of the queue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.compiled import called, inner
from simulator.policies.batch import (
    Batch,
    add_prefill,
    emit,
    in_flight_in_part,
    known_tokens,
    note_part,
    note_usage,
    preempt,
    wait_first,
)
from simulator.policies.vllm_v0 import admit, append_blocks, wanted_free
from simulator.state import BOUND_TOKENS, COMPUTED, FREE_BLOCKS, PROMPT, RUNNING

if TYPE_CHECKING:
    from simulator.rules import Rules
    from simulator.state import Limits, State
    from simulator.timing import IterationCost


@called
def schedule(
    state: State, limits: Limits, rules: Rules, cost: IterationCost, r: int, seen: int
) -> Batch:
    """Form replica ``r``'s next batch and advance its requests' computed tokens.

    Three passes: one token for every running request that decodes, whatever the budget; chunks
    of running prompts, in order of arrival; then waiting requests, also after a preemption. A
    preempted request drops its blocks, goes to the front of the queue, where this very step may
    admit it again, and recomputes all its tokens. Requests in flight in another batch are passed
    over, but their blocks are not safe from those that arrived earlier.

    Parameters
    ----------
    state, limits, rules, cost
        The run; ``rules.chunked`` must hold.
    r
        The replica.
    seen
        Position in its queue up to which the scheduler sees requests.

    Returns
    -------
    Batch
        Empty (``tokens == 0``) if there is nothing to do.

    """
    batch = _decode(state, limits, r)
    batch = _continue_prompts(state, limits, cost, r, batch)
    batch = admit(state, limits, rules, cost, r, seen, batch)
    note_part(state, rules, r)
    held = limits.num_blocks - state.replica[r, FREE_BLOCKS]
    note_usage(state, limits, r, batch.tokens, held + wanted_free(limits))
    return batch


@inner
def _decode(state: State, limits: Limits, r: int) -> Batch:
    """Let every running request decode that has computed all but its last token.

    One that finds no free block preempts the last arrival, and in the end itself. A recomputed
    prompt whose last chunk is a single token counts as a decode.
    """
    table, replica = state.request, state.replica
    running, scheduled = state.running, state.scheduled
    n = replica[r, RUNNING]
    decodes, context = 0, 0
    i = 0
    while i < n:
        request = running[r, i]
        computed = table[request, COMPUTED]
        scheduled[r, i] = 0
        decoding = computed >= table[request, PROMPT]
        lacking = known_tokens(state, request) - computed
        if decoding and lacking == 1 and not in_flight_in_part(state, r, request):
            while n > i and not append_blocks(state, limits, r, request, computed + 1, n == 1):
                n -= 1
                preempt(state, r, running[r, n])
                wait_first(state, r, running[r, n])
            if n == i:  # the request itself was the last one left
                break
            table[request, COMPUTED] = computed + 1
            scheduled[r, i] = 1
            decodes += 1
            context += computed + 1
            emit(state, r, request)
        i += 1
    replica[r, RUNNING] = n
    return Batch(decodes, decodes, context, decodes, decodes < 0)


@inner
def _continue_prompts(
    state: State, limits: Limits, cost: IterationCost, r: int, batch: Batch
) -> Batch:
    """Add chunks of running prompts, whose blocks they hold already."""
    table, replica = state.request, state.replica
    budget = limits.max_num_batched_tokens
    tokens, sampled = batch.tokens, batch.sampled
    for i in range(replica[r, RUNNING]):
        request = state.running[r, i]
        computed = table[request, COMPUTED]
        lacking = known_tokens(state, request) - computed
        if lacking == 0 or in_flight_in_part(state, r, request):
            continue
        new = min(lacking, budget - tokens)
        if new < lacking:
            replica[r, BOUND_TOKENS] = 1
        if new <= 0:
            continue
        table[request, COMPUTED] = computed + new
        state.scheduled[r, i] = new
        tokens += new
        add_prefill(state, cost, computed, computed + new)
        if new == lacking:
            sampled += 1
            emit(state, r, request)
    return Batch(tokens, batch.decodes, batch.context_tokens, sampled, tokens > batch.decodes)
