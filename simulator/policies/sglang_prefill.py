"""SGLang's batches of prompts: what they hold, and the free memory that each prompt must find.

Source: sglang/srt/managers/schedule_policy.py (``PrefillAdder``) and scheduler.py
(``_get_new_batch_prefill_raw``) of 0.5.9. One page that 0.5.14 adds to a candidate's need is left
out: with the default page it is one token per request.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from simulator.compiled import inner
from simulator.kvcache import blocks_for, grow, pages_for
from simulator.policies.batch import (
    Batch,
    add_prefill,
    emit,
    head_of_queue,
    known_tokens,
    take_head,
)
from simulator.policies.sglang_running import CHUNKED, is_member, members_pages
from simulator.state import (
    BOUND_BLOCKS,
    BOUND_SEATS,
    BOUND_TOKENS,
    COMPUTED,
    FREE_BLOCKS,
    GENERATED,
    HELD_TOKENS,
    LEAVING_SEATS,
    OUTPUT,
    PEAK_DEMAND,
    PEAK_SEATS,
    PEAK_TOKENS,
    RUNNING,
)

if TYPE_CHECKING:
    from simulator.rules import Rules
    from simulator.state import Limits, State
    from simulator.timing import IterationCost

# Column of State.policy_slot by micro-batch: whether it admits nobody (``batch_is_full``).
FULL = 0

_NO_LIMIT = 1 << 62


class _Pass(NamedTuple):
    """What is left while prompts are added to a batch, and what it has.

    Attributes
    ----------
    spare
        Tokens of memory that nobody has reserved; it may be negative.
    prompts, chunk
        Tokens left of ``Rules.prefill_tokens`` and of the token budget.
    seats, pages
        Requests that the micro-batch may still take, pages that its decodes need in this batch.
    tokens, sampled
        Of the batch.

    """

    spare: float
    prompts: int
    chunk: int
    seats: int
    pages: int
    tokens: int
    sampled: int


@inner
def _seats(limits: Limits, rules: Rules) -> int:
    """Running requests of one micro-batch."""
    return max(1, limits.max_num_seqs // rules.batches_in_flight)


@inner
def _in_pages(limits: Limits, tokens: int) -> int:
    """Tokens rounded up to whole pages."""
    return blocks_for(tokens, limits.block_tokens) * limits.block_tokens


@inner
def _room(limits: Limits, tokens: int) -> int:
    """What ``tokens`` of one sequence take of the pages, in tokens of one group of layers."""
    blocks = blocks_for(tokens, limits.block_tokens)
    others = pages_for(limits, tokens) - limits.growing * blocks
    return limits.growing * tokens + others * limits.block_tokens


@inner
def _reserved_output(state: State, rules: Rules, r: int, m: int) -> float:
    """Output tokens reserved for the running requests of micro-batch ``m``."""
    tokens = 0
    for i in range(state.replica[r, RUNNING]):
        request = state.running[r, i]
        if is_member(state, r, m, request):
            left = state.request[request, OUTPUT] - state.request[request, GENERATED]
            tokens += min(left, rules.reserved_output_tokens)
    return tokens * state.ratio[r]  # a single product: it rounds once, on every machine alike


@inner
def _open(state: State, limits: Limits, rules: Rules, r: int, m: int, running: int) -> _Pass:
    """Limits of a batch of prompts in a micro-batch that counts ``running`` requests."""
    decodes, pages = 0, 0
    if rules.mixed and rules.chunked:
        decodes, pages = running, members_pages(state, limits, r, m)
    budget = limits.max_num_batched_tokens
    chunk = budget - decodes if rules.chunked else _NO_LIMIT
    prompts = rules.prefill_tokens if rules.prefill_tokens > 0 else _NO_LIMIT
    prompts = (prompts if rules.chunked else min(prompts, budget)) - decodes
    reserved = limits.growing * _reserved_output(state, rules, r, m) + decodes
    spare = state.replica[r, FREE_BLOCKS] * limits.block_tokens - reserved
    return _Pass(spare, prompts, chunk, _seats(limits, rules) - running, pages, 0, 0)


@inner
def _note_memory(state: State, limits: Limits, r: int, spare: float) -> None:
    """Keep the blocks without which so little would have been left."""
    demand = limits.num_blocks - math.ceil(spare / limits.block_tokens) + 1
    demand = min(demand, limits.num_blocks)
    state.replica[r, PEAK_DEMAND] = max(state.replica[r, PEAK_DEMAND], demand)


@inner
def _run(
    state: State,
    limits: Limits,
    rules: Rules,
    cost: IterationCost,
    r: int,
    m: int,
    i: int,
    new: int,
    so_far: _Pass,
) -> _Pass:
    """Run ``new`` tokens of running request ``i``'s prompt in micro-batch ``m``.

    The last of them reserve its output, without what an earlier stay has generated of it.
    """
    request = state.running[r, i]
    computed = state.request[request, COMPUTED]
    grow(state, limits, r, request, computed + new)
    add_prefill(state, cost, computed, computed + new)
    state.request[request, COMPUTED] = computed + new
    state.scheduled[r, i] = new
    taken = _in_pages(limits, new)
    held, sampled = taken, 0
    if computed + new == known_tokens(state, request):
        emit(state, r, request)
        sampled = 1
        held += min(state.request[request, OUTPUT], rules.reserved_output_tokens)
        state.replica[r, CHUNKED] = 0
        if state.policy_request.size > 0:
            state.policy_request[request] = m
    else:
        state.replica[r, CHUNKED] = request + 1
    spare = so_far.spare - (_room(limits, held) if computed == 0 else limits.growing * held)
    _note_memory(state, limits, r, spare)
    return _Pass(
        spare,
        so_far.prompts - taken,
        so_far.chunk - taken,
        so_far.seats - 1,
        so_far.pages,
        so_far.tokens + new,
        so_far.sampled + sampled,
    )


@inner
def _next_chunk(state: State, limits: Limits, r: int, request: int, so_far: _Pass) -> int:
    """Tokens of the partly computed prompt that run now; none if no page is free for them.

    Without unreserved memory the engine takes the whole chunk, since its decodes wait for it.
    """
    table, replica = state.request, state.replica
    left = known_tokens(state, request) - table[request, COMPUTED]
    new = min(left, so_far.chunk)
    if new < left:
        replica[r, BOUND_TOKENS] = 1
    unreserved = int(so_far.spare / max(1, limits.growing))
    if unreserved < new:
        replica[r, BOUND_BLOCKS] = 1
        new = unreserved if unreserved > 0 else new
    free = table[request, HELD_TOKENS] - table[request, COMPUTED]
    blocks = (replica[r, FREE_BLOCKS] - so_far.pages) // max(1, limits.growing + limits.windowed)
    free += blocks * limits.block_tokens
    if free < new:
        replica[r, BOUND_BLOCKS] = 1
    return min(new, free)


@inner
def _note_tokens(
    state: State, limits: Limits, rules: Rules, r: int, so_far: _Pass, more: int
) -> None:
    """Keep the largest use of the budget; without chunks it must exceed what it holds."""
    budget = limits.max_num_batched_tokens
    used = (budget if rules.chunked else _NO_LIMIT + 1) - so_far.chunk + more
    state.replica[r, PEAK_TOKENS] = max(state.replica[r, PEAK_TOKENS], min(used, budget))


@inner
def _admissible(
    state: State, limits: Limits, rules: Rules, r: int, m: int, request: int, so_far: _Pass
) -> int:
    """Tokens of a waiting request that run now, or 0; lack of memory makes the micro-batch full."""
    table, replica = state.request, state.replica
    known = known_tokens(state, request)
    left = min(table[request, OUTPUT] - table[request, GENERATED], rules.reserved_output_tokens)
    spare = so_far.spare - _room(limits, known + left)
    _note_memory(state, limits, r, spare)
    if spare <= 0:
        replica[r, BOUND_BLOCKS] = 1
        if replica[r, RUNNING] > 0:
            state.policy_slot[r, m, FULL] = 1
            return 0
    taken, new = _in_pages(limits, known), known
    if taken > so_far.chunk:
        new = min(known, max(0, so_far.chunk) // rules.chunk_unit * rules.chunk_unit)
    if new < known:
        replica[r, BOUND_TOKENS] = 1
    if (taken >= so_far.prompts and so_far.tokens > 0) or new == 0:
        replica[r, BOUND_TOKENS] = 1
        # With a seat less the micro-batch would have been full.
        seats = (_seats(limits, rules) - so_far.seats + 1) * rules.batches_in_flight
        replica[r, PEAK_SEATS] = max(replica[r, PEAK_SEATS], seats)
        return 0
    if pages_for(limits, new) > replica[r, FREE_BLOCKS] - so_far.pages:
        replica[r, BOUND_BLOCKS] = 1
        state.policy_slot[r, m, FULL] = 1
        return 0
    return new


@inner
def _admit(
    state: State,
    limits: Limits,
    rules: Rules,
    cost: IterationCost,
    r: int,
    m: int,
    seen: int,
    so_far: _Pass,
) -> _Pass:
    """Add waiting requests to the batch, strictly in order, until something holds one back."""
    replica, slot = state.replica, state.policy_slot
    while not slot[r, m, FULL]:
        request = head_of_queue(state, r, seen)
        if request < 0:
            break
        # A smaller budget would not have come to look at this request.
        _note_tokens(state, limits, rules, r, so_far, 1)
        i = replica[r, RUNNING]
        if so_far.seats <= 0 or i + replica[r, LEAVING_SEATS] >= limits.max_num_seqs:
            slot[r, m, FULL] = 1
            replica[r, BOUND_SEATS] = 1
            break
        new = _admissible(state, limits, rules, r, m, request, so_far)
        if new == 0:
            break
        take_head(state, r)
        state.running[r, i] = request
        replica[r, RUNNING] = i + 1
        so_far = _run(state, limits, rules, cost, r, m, i, new, so_far)
        if so_far.spare <= 0:
            slot[r, m, FULL] = 1
            replica[r, BOUND_BLOCKS] = 1
            break
        if so_far.prompts <= 0 or so_far.chunk <= 0:
            if head_of_queue(state, r, seen) >= 0:
                replica[r, BOUND_TOKENS] = 1
            break
    return so_far


@inner
def prefill(
    state: State,
    limits: Limits,
    rules: Rules,
    cost: IterationCost,
    r: int,
    m: int,
    seen: int,
    running: int,
) -> Batch:
    """Continue the partly computed prompt and admit waiting requests to micro-batch ``m``.

    Parameters
    ----------
    state, limits, rules, cost, r, seen
        As for a policy.
    m, running
        The micro-batch, and the requests that it counts as running.

    Returns
    -------
    Batch
        Prompts alone; empty if there is nothing to run, or no memory for it.

    """
    replica, slot = state.replica, state.policy_slot
    none = Batch(0, 0, 0, 0, False)
    chunked = replica[r, CHUNKED] - 1
    if chunked < 0 and (slot[r, m, FULL] or head_of_queue(state, r, seen) < 0):
        return none
    so_far = _open(state, limits, rules, r, m, running)
    if so_far.pages > replica[r, FREE_BLOCKS]:
        return none
    if chunked >= 0:
        if so_far.seats <= 0:
            slot[r, m, FULL] = 1
            replica[r, BOUND_SEATS] = 1
            return none
        new = _next_chunk(state, limits, r, chunked, so_far)
        if new <= 0:
            return none
        i = 0
        while state.running[r, i] != chunked:
            i += 1
        so_far = _run(state, limits, rules, cost, r, m, i, new, so_far)
    so_far = _admit(state, limits, rules, cost, r, m, seen, so_far)
    _note_tokens(state, limits, rules, r, so_far, 0)
    seats = (_seats(limits, rules) - so_far.seats) * rules.batches_in_flight
    replica[r, PEAK_SEATS] = max(replica[r, PEAK_SEATS], seats)
    return Batch(so_far.tokens, 0, 0, so_far.sampled, so_far.tokens > 0)
