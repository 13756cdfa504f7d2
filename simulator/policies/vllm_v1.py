"""vLLM's V1 scheduler: decodes and prompt chunks share one batch under one token budget.

Source: vllm/v1/core/sched/scheduler.py (``schedule``, ``_preempt_request``) and
vllm/v1/core/kv_cache_manager.py (``allocate_slots``), policy ``fcfs``, chunked prefill on, no
prefix cache, no speculative decoding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from simulator.compiled import compiled
from simulator.kvcache import blocks_for, pages_for
from simulator.state import (
    ARRIVAL,
    BOUND_BLOCKS,
    BOUND_SEATS,
    BOUND_TOKENS,
    COMPUTED,
    FREE_BLOCKS,
    GENERATED,
    HEAD,
    HELD_BLOCKS,
    HELD_TOKENS,
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
    import numpy as np
    import numpy.typing as npt

    from simulator.state import Limits, State


class Batch(NamedTuple):
    """What one iteration computes: the arguments of ``timing.iteration_s``."""

    tokens: int
    decodes: int
    context_tokens: int
    prefill_attention_s: float
    sampled: int
    has_prefill: bool


@compiled
def _hold(
    table: npt.NDArray[np.int64], limits: Limits, request: int, tokens: int, pages: int
) -> None:
    """Note that a request holds ``pages``, enough for ``tokens`` and the rest of their block."""
    table[request, HELD_BLOCKS] = pages
    table[request, HELD_TOKENS] = blocks_for(tokens, limits.block_tokens) * limits.block_tokens


@compiled
def _preempt_last(state: State, r: int, n: int) -> int:
    """Preempt the last of ``n`` running requests; return the blocks that it gives back."""
    victim = state.running[r, n - 1]
    freed = state.request[victim, HELD_BLOCKS]
    state.request[victim, HELD_BLOCKS] = 0
    state.request[victim, HELD_TOKENS] = 0
    state.request[victim, COMPUTED] = 0
    state.request[victim, PREEMPTIONS] += 1
    state.preempted[r, state.replica[r, STACKED]] = victim
    state.replica[r, STACKED] += 1
    state.replica[r, BOUND_BLOCKS] = 1
    return freed


@compiled
def _head_of_queue(state: State, limits: Limits, r: int, now_s: float) -> int:
    """The waiting request that is next in line, or -1."""
    stacked = state.replica[r, STACKED]
    if stacked > 0:
        return state.preempted[r, stacked - 1]
    head = state.replica[r, HEAD]
    if head < state.replica[r, TAIL]:
        request = state.queue[r, head]
        if state.time_s[request, ARRIVAL] + limits.ingress_s <= now_s:
            return request
    return -1


@compiled
def _continue_running(
    state: State, limits: Limits, prefill_s: npt.NDArray[np.float64], r: int
) -> tuple[Batch, int]:
    """Give each running request, in admission order, what it lacks and the budget holds.

    One that cannot get its blocks preempts the last admitted, and in the end itself. The budget
    reaches everyone: it is at least the number of seats, and only the last request can lack more
    than one token. A prompt's last chunk counts as prefill even if it is a single token, which
    vLLM's attention kernels would treat as a decode: one iteration's attention differs by less
    than a launch, and all prompt attention stays in one account.

    Returns
    -------
    batch, free
        What is computed so far, and the blocks that are left.

    """
    table, replica = state.request, state.replica
    running, scheduled = state.running, state.scheduled
    budget = limits.max_num_batched_tokens
    free = replica[r, FREE_BLOCKS]
    n = replica[r, RUNNING]
    decodes, context, sampled = 0, 0, 0
    attention_s, has_prefill = 0.0, False
    i = 0
    while i < n:
        request = running[r, i]
        computed = table[request, COMPUTED]
        prompt = table[request, PROMPT]
        lacking = prompt + table[request, GENERATED] - computed
        new = min(lacking, budget)
        if computed + new > table[request, HELD_TOKENS]:
            held = table[request, HELD_BLOCKS]
            need = pages_for(limits, computed + new) - held
            while need > free and n > i:
                free += _preempt_last(state, r, n)
                n -= 1
            if n == i:  # the request itself was the last one left
                break
            free -= need
            _hold(table, limits, request, computed + new, held + need)
        table[request, COMPUTED] = computed + new
        scheduled[r, i] = new
        budget -= new
        if new == 1 and computed >= prompt:
            decodes += 1
            context += computed + 1
        else:
            attention_s += prefill_s[computed + new] - prefill_s[computed]
            has_prefill = True
        if new == lacking:
            sampled += 1
        else:
            replica[r, BOUND_TOKENS] = 1
        i += 1
    replica[r, RUNNING] = n
    tokens = limits.max_num_batched_tokens - budget
    return Batch(tokens, decodes, context, attention_s, sampled, has_prefill), free


@compiled
def schedule(
    state: State, limits: Limits, prefill_s: npt.NDArray[np.float64], r: int, now_s: float
) -> Batch:
    """Form replica ``r``'s next batch at ``now_s`` and advance its requests' computed tokens.

    Running requests come first. Only if none of them was preempted are waiting requests
    admitted, strictly in order, while seats, budget and blocks last. A preempted request drops
    its blocks, goes to the front of the waiting queue and recomputes all its tokens.

    Returns
    -------
    Batch
        Empty (``tokens == 0``) if there is nothing to do.

    """
    table, replica = state.request, state.replica
    was_running = replica[r, RUNNING]
    batch, free = _continue_running(state, limits, prefill_s, r)
    budget = limits.max_num_batched_tokens - batch.tokens
    n = replica[r, RUNNING]
    sampled, attention_s, has_prefill = batch.sampled, batch.prefill_attention_s, batch.has_prefill
    demand = limits.num_blocks - free

    admitting = n == was_running
    while admitting:
        request = _head_of_queue(state, limits, r, now_s)
        if request < 0:
            break
        if budget == 0:
            replica[r, BOUND_TOKENS] = 1
            break
        if n == limits.max_num_seqs:
            replica[r, BOUND_SEATS] = 1
            break
        known = table[request, PROMPT] + table[request, GENERATED]
        new = min(known, budget)
        must_fit = pages_for(limits, known if limits.reserve_full_prompt else new)
        if must_fit > free:
            replica[r, BOUND_BLOCKS] = 1
            break
        demand = max(demand, limits.num_blocks - free + must_fit)
        if replica[r, STACKED] > 0:
            replica[r, STACKED] -= 1
        else:
            replica[r, HEAD] += 1
        held = pages_for(limits, new)
        free -= held
        _hold(table, limits, request, new, held)
        table[request, COMPUTED] = new
        state.running[r, n] = request
        state.scheduled[r, n] = new
        n += 1
        budget -= new
        attention_s += prefill_s[new]
        has_prefill = True
        if new == known:
            sampled += 1
        else:
            replica[r, BOUND_TOKENS] = 1

    tokens = limits.max_num_batched_tokens - budget
    replica[r, RUNNING] = n
    replica[r, FREE_BLOCKS] = free
    replica[r, PEAK_SEATS] = max(replica[r, PEAK_SEATS], n)
    replica[r, PEAK_TOKENS] = max(replica[r, PEAK_TOKENS], tokens)
    replica[r, PEAK_BLOCKS] = max(replica[r, PEAK_BLOCKS], limits.num_blocks - free)
    replica[r, PEAK_DEMAND] = max(replica[r, PEAK_DEMAND], demand)
    return Batch(tokens, batch.decodes, batch.context_tokens, attention_s, sampled, has_prefill)
