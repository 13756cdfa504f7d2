"""vLLM's V0 scheduler: prompts first in batches of their own, or chunks beside decodes.

Source: vllm 0.6.0, vllm/core/scheduler.py (``_schedule_default``, ``_schedule_chunked_prefill``,
``_schedule_running``, ``_schedule_prefills``) and vllm/core/block_manager_v1.py (``can_allocate``,
``can_append_slots``); one sequence per request, preemption by recomputation. Left out: the decode
that asynchronous output processing runs once more for a finished request (its seat and blocks are
free one iteration later), and its separate scheduler per pipeline stage: here all batches in
flight share the running requests. vLLM refuses more seats than the token budget; with fewer, as
here, its running requests always stand in order of admission.
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
    in_flight_in_part,
    known_tokens,
    note_part,
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
    HEAD,
    PEAK_DEMAND,
    PROMPT,
    RUNNING,
    STACKED,
)

if TYPE_CHECKING:
    from simulator.rules import Rules
    from simulator.state import Limits, State
    from simulator.timing import IterationCost


@called
def schedule(
    state: State, limits: Limits, rules: Rules, cost: IterationCost, r: int, seen: int
) -> Batch:
    """Form replica ``r``'s next batch and advance its requests' computed tokens.

    Without chunking a batch is either whole prompts of waiting requests, whenever one of them can
    be admitted, or one token of every running request. With chunking running requests come
    first and waiting ones share what is left of the budget, even after a preemption. A preempted
    request drops its blocks and recomputes all its tokens; it waits ahead of the queue, but with
    chunking only after this step's admissions.

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
    replica = state.replica
    if rules.chunked:
        batch = _continue_running(state, limits, rules, cost, r)
        preempted = replica[r, STACKED]
        replica[r, STACKED] = 0  # out of sight of this step's admissions
        batch = admit(state, limits, rules, cost, r, seen, batch)
        # They return to the ring and not to the stack: with requests that overtook them they may
        # be more than there are seats.
        for k in range(preempted):
            replica[r, HEAD] -= 1
            state.queue[r, replica[r, HEAD] % state.queue.shape[1]] = state.preempted[r, k]
    else:
        for i in range(replica[r, RUNNING]):
            state.scheduled[r, i] = 0
        batch = admit(state, limits, rules, cost, r, seen, empty_batch())
        if batch.tokens == 0:
            batch = _continue_running(state, limits, rules, cost, r)
    note_part(state, rules, r)
    held = limits.num_blocks - replica[r, FREE_BLOCKS]
    note_usage(state, limits, r, batch.tokens, held + wanted_free(limits))
    return batch


@inner
def empty_batch() -> Batch:
    """A batch to begin with."""
    none = 0
    return Batch(none, none, none, none, none > 0)


@inner
def _continue_running(
    state: State, limits: Limits, rules: Rules, cost: IterationCost, r: int
) -> Batch:
    """Give each running request, in order of admission, what it lacks and the budget holds.

    One that finds no free block preempts the last admitted, and in the end itself. Requests in
    flight are passed over. Without chunking each lacks one token, and nothing limits them.
    """
    table, replica = state.request, state.replica
    running, scheduled = state.running, state.scheduled
    n = replica[r, RUNNING]
    budget = limits.max_num_batched_tokens if rules.chunked else n
    tokens, decodes, context, sampled = 0, 0, 0, 0
    i = 0
    while i < n and tokens < budget:
        request = running[r, i]
        computed = table[request, COMPUTED]
        lacking = known_tokens(state, request) - computed
        new = min(lacking, budget - tokens)
        if new > 0 and in_flight_in_part(state, r, request):
            new = 0
        scheduled[r, i] = new
        if new > 0:
            while n > i and not append_blocks(state, limits, r, request, computed + new, n == 1):
                n -= 1
                preempt(state, r, running[r, n])
                wait_first(state, r, running[r, n])
            if n == i:  # the request itself was the last one left
                break
            table[request, COMPUTED] = computed + new
            tokens += new
            if new == 1 and computed >= table[request, PROMPT]:
                decodes += 1
                context += computed + 1
            else:
                add_prefill(state, cost, computed, computed + new)
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
    return Batch(tokens, decodes, context, sampled, tokens > decodes)


@inner
def wanted_free(limits: Limits) -> int:
    """Pages of one block in each group of layers."""
    return limits.growing + limits.windowed


@inner
def append_blocks(
    state: State, limits: Limits, r: int, request: int, tokens: int, alone: bool
) -> bool:
    """Let a running request hold blocks for ``tokens`` tokens, if one block is free for it.

    vLLM wants a free block (of each group of layers) even where the tokens fit into those held
    (``can_append_slots``). One ``alone`` may fill the cache to its last block; vLLM would have it
    preempt itself and recompute all its tokens for each further one, or each chunk, for ever.
    """
    if wanted_free(limits) > state.replica[r, FREE_BLOCKS] and not alone:
        return False
    return grow(state, limits, r, request, tokens)


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
    """Add waiting requests to a batch, strictly in order, while blocks, seats and budget last.

    A request takes the blocks of all its known tokens at once, however few of them this batch
    computes, and must leave the watermark free. Where several limits refuse it, the one noted is
    one that still does after any number of decodes; vLLM looks at blocks first, to the same effect.
    """
    table, replica = state.request, state.replica
    watermark = int(rules.watermark * limits.num_blocks)
    budget = limits.max_num_batched_tokens
    n = replica[r, RUNNING]
    tokens, sampled = batch.tokens, batch.sampled
    while True:
        request = head_of_queue(state, r, seen)
        if request < 0:
            break
        known = known_tokens(state, request)
        if n >= limits.max_num_seqs:
            replica[r, BOUND_SEATS] = 1
            break
        new = min(known, budget - tokens)
        if new <= 0 or (new < known and not rules.chunked):
            replica[r, BOUND_TOKENS] = 1
            break
        must_fit = pages_for(limits, known) + watermark
        if must_fit > replica[r, FREE_BLOCKS]:
            replica[r, BOUND_BLOCKS] = 1
            break
        asked = limits.num_blocks - replica[r, FREE_BLOCKS] + must_fit
        replica[r, PEAK_DEMAND] = max(replica[r, PEAK_DEMAND], asked)
        take_head(state, r)
        grow(state, limits, r, request, known)
        table[request, COMPUTED] = new
        state.running[r, n] = request
        state.scheduled[r, n] = new
        n += 1
        tokens += new
        add_prefill(state, cost, 0, new)
        if new == known:
            sampled += 1
            emit(state, r, request)
        else:
            replica[r, BOUND_TOKENS] = 1
    replica[r, RUNNING] = n
    return Batch(tokens, batch.decodes, batch.context_tokens, sampled, tokens > batch.decodes)
