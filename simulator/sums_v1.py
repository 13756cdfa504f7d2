"""vLLM's V1 scheduler for a replica whose decoding requests are kept as sums.

The counterpart of ``engine.finish_batch`` and ``policies.vllm_v1.schedule``: the same moves, at a
cost that does not grow with the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.compiled import inner
from simulator.decode_set import (
    CONTEXT,
    DECODES,
    PARTIAL,
    STEPS,
    append,
    blocks_needed,
    join,
    next_due,
    take_due,
)
from simulator.engine import finish_request
from simulator.kvcache import grow, pages_for
from simulator.policies import Batch
from simulator.policies.batch import add_prefill, emit, known_tokens
from simulator.policies.vllm_v1 import admit
from simulator.state import (
    BOUND_TOKENS,
    COMPUTED,
    EMITTED,
    FIRST_TOKEN,
    FREE_BLOCKS,
    GENERATED,
    HELD_BLOCKS,
    HELD_TOKENS,
    IN_FLIGHT,
    OLDEST,
    OUTPUT,
    PROMPT,
    RUNNING,
)

if TYPE_CHECKING:
    from simulator.decode_set import DecodeSets
    from simulator.rules import Rules
    from simulator.state import Limits, State
    from simulator.timing import IterationCost


@inner
def end_batch(
    state: State, sets: DecodeSets, limits: Limits, rules: Rules, r: int, now_ps: int
) -> None:
    """End the batch of a replica whose decoding requests are sums."""
    sums, table, time_ps = sets.sums, state.request, state.time_ps
    sums[r, STEPS] += 1
    sums[r, CONTEXT] += sums[r, DECODES]
    while sums[r, DECODES] > 0 and next_due(sets, r) == sums[r, STEPS]:
        request = take_due(state, sets, limits, r)
        state.replica[r, RUNNING] -= 1
        finish_request(state, limits, rules, r, request, now_ps)
    slot = state.replica[r, OLDEST]
    for k in range(state.slot[r, slot, EMITTED]):
        request = state.emitting[r, slot, k]
        if sums[r, PARTIAL] == request:
            sums[r, PARTIAL] = -1
        if table[request, GENERATED] == 0:
            time_ps[request, FIRST_TOKEN] = now_ps
        table[request, GENERATED] += 1
        if table[request, GENERATED] == table[request, OUTPUT]:
            state.replica[r, RUNNING] -= 1
            finish_request(state, limits, rules, r, request, now_ps)
        else:
            join(state, sets, r, request)
    state.replica[r, IN_FLIGHT] = 0


@inner
def schedule_sums(
    state: State,
    sets: DecodeSets,
    limits: Limits,
    rules: Rules,
    cost: IterationCost,
    r: int,
    seen: int,
) -> tuple[bool, Batch]:
    """What vLLM's V1 scheduler does for a replica whose decoding requests are sums.

    Returns
    -------
    done, batch
        Not done, and nothing changed, where it would preempt.

    """
    sums, table, replica = sets.sums, state.request, state.replica
    decodes, partial = sums[r, DECODES], sums[r, PARTIAL]
    budget = limits.max_num_batched_tokens - decodes
    need = blocks_needed(sets, limits, r, 0, 1)
    new, own = 0, 0
    if partial >= 0:
        new = min(known_tokens(state, partial) - table[partial, COMPUTED], budget)
        if table[partial, COMPUTED] + new > table[partial, HELD_TOKENS]:
            own = pages_for(limits, table[partial, COMPUTED] + new) - table[partial, HELD_BLOCKS]
    if need + own > replica[r, FREE_BLOCKS]:
        return False, Batch(0, 0, 0, 0, False)
    replica[r, FREE_BLOCKS] -= need
    batch = Batch(decodes, decodes, sums[r, CONTEXT] + decodes, decodes, False)
    if partial >= 0:
        computed = table[partial, COMPUTED]
        lacking = known_tokens(state, partial) - computed
        if new > 0:
            grow(state, limits, r, partial, computed + new)
            table[partial, COMPUTED] = computed + new
        is_decode = new == 1 and computed >= table[partial, PROMPT]
        if new > 0 and not is_decode:
            add_prefill(state, cost, computed, computed + new)
        if new == lacking:
            emit(state, r, partial)
        else:
            replica[r, BOUND_TOKENS] = 1
        batch = Batch(
            decodes + new,
            decodes + is_decode,
            batch.context_tokens + (computed + 1 if is_decode else 0),
            decodes + (new == lacking),
            new > 0 and not is_decode,
        )
    running = replica[r, RUNNING]
    batch = admit(state, limits, rules, cost, r, seen, batch)
    for i in range(running, replica[r, RUNNING]):
        request = state.running[r, i]
        append(state, sets, r, request)
        if table[request, COMPUTED] < known_tokens(state, request):
            sums[r, PARTIAL] = request
    return True, batch
