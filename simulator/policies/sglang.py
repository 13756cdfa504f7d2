"""SGLang's scheduler: prompts run first and alone, and the output they may still need is reserved.

Source: sglang/srt/managers/scheduler.py (``get_next_batch_to_run``, ``update_running_batch``) and
scheduler_pp_mixin.py of 0.5.9, policy fcfs, no speculative decoding; 0.5.5 to 0.5.14 form batches
alike but for ``Rules.prefill_tokens``. ``sglang_prefill`` fills batches of prompts,
``sglang_running`` has the decodes.

With pipeline stages the engine has as many micro-batches as batches in flight. They take turns, and
each has running requests of its own (``State.policy_request``); the request whose prompt is partly
computed belongs to none. ``State.running`` holds them all in the order of their admission.

Where SGLang would fail, a step is taken that it might have taken: a request whose output can never
be reserved is admitted by an empty replica (SGLang shortens the output), a chunk without memory
waits for the decodes, and a last request that finds no page is retracted too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.compiled import called, inner
from simulator.policies.batch import Batch, note_usage
from simulator.policies.sglang_prefill import FULL, prefill
from simulator.policies.sglang_running import CHUNKED, decode, members, members_pages, retract
from simulator.state import FREE_BLOCKS, IN_FLIGHT, NEXT_SLOT, OLDEST, POLICY_B, RUNNING

if TYPE_CHECKING:
    from simulator.rules import Rules
    from simulator.state import Limits, State
    from simulator.timing import IterationCost

# Column of State.replica: the micro-batch whose turn it is.
_TURN = POLICY_B

# Columns of State.policy_slot after FULL. Of each micro-batch: finished requests that it still
# counts as running; its running requests when its last batch was formed, and whether that batch
# only decoded. Of each slot: which micro-batch is in flight there.
_STALE, _LIVE, _DECODED, _MICRO_BATCH = range(FULL + 1, FULL + 5)


@inner
def _decode(state: State, limits: Limits, rules: Rules, r: int, m: int, stale: int) -> Batch:
    """Drop ``stale`` requests from micro-batch ``m`` and let the others decode, if pages last."""
    slot, ratio = state.policy_slot, state.ratio
    live, need = members(state, r, m), members_pages(state, limits, r, m)
    if need > state.replica[r, FREE_BLOCKS]:
        retract(state, limits, r, m)
        need = members_pages(state, limits, r, m)
    else:
        ratio[r] = max(rules.least_new_token_ratio, ratio[r] - rules.ratio_decay)
    if stale > 0 or members(state, r, m) < live:
        slot[r, m, FULL] = 0
    slot[r, m, _DECODED] = 1
    if need > state.replica[r, FREE_BLOCKS]:
        return Batch(0, 0, 0, 0, False)
    return decode(state, limits, r, m)


@inner
def _with_prompts(
    state: State, limits: Limits, rules: Rules, r: int, m: int, running: int, batch: Batch
) -> Batch:
    """A batch of prompts in micro-batch ``m``, with its decodes if they are mixed.

    The batch takes the place of a running one that is empty, or that it takes along, and with it
    the mark that nobody is admitted. An unfinished prompt is dropped from it, as what finishes.
    """
    slot = state.policy_slot
    slot[r, m, _DECODED] = 0
    if running == 0 or state.replica[r, CHUNKED] > 0 or rules.mixed:
        slot[r, m, FULL] = 0
    if not (rules.mixed and rules.chunked):
        return batch
    more = decode(state, limits, r, m)
    return Batch(
        batch.tokens + more.tokens,
        more.decodes,
        more.context_tokens,
        batch.sampled + more.sampled,
        True,
    )


@inner
def _form(
    state: State, limits: Limits, rules: Rules, cost: IterationCost, r: int, m: int, seen: int
) -> Batch:
    """Form micro-batch ``m``'s next batch.

    A micro-batch that found no seat or memory admits nobody until one of its requests is dropped.
    What finishes in a decode is dropped by the next one, after that one's look at the queue; what
    finishes in a batch with prompts, before the next look. Results that come a step late
    (``Rules.late_results``) are dropped a step later.
    """
    slot = state.policy_slot
    stale, hidden = slot[r, m, _STALE], 0
    finished = slot[r, m, _LIVE] - members(state, r, m)
    if rules.late_results:
        hidden = finished
    elif slot[r, m, _DECODED]:
        stale += finished
    elif finished > 0:
        slot[r, m, FULL] = 0
    batch = Batch(0, 0, 0, 0, False)
    for _ in range(2):  # where nothing runs, the engine comes round again at once
        running = members(state, r, m) + stale + hidden
        batch = prefill(state, limits, rules, cost, r, m, seen, running)
        if batch.tokens > 0:
            batch = _with_prompts(state, limits, rules, r, m, running, batch)
            stale = 0 if rules.mixed else stale + hidden
            break
        if members(state, r, m) > 0:
            batch = _decode(state, limits, rules, r, m, stale)
        stale = hidden
        if batch.tokens > 0:
            break
        stale = 0
        slot[r, m, FULL] = 0
        if state.replica[r, RUNNING] == 0:
            state.ratio[r] = rules.new_token_ratio  # self_check_during_idle
    slot[r, m, _STALE] = stale
    slot[r, m, _LIVE] = members(state, r, m)
    held = limits.num_blocks - state.replica[r, FREE_BLOCKS]
    note_usage(state, limits, r, batch.tokens, held)
    return batch


@called
def schedule(
    state: State, limits: Limits, rules: Rules, cost: IterationCost, r: int, seen: int
) -> Batch:
    """Form replica ``r``'s next batch and advance its requests' computed tokens.

    If a prompt is partly computed or a waiting request is admitted, the batch computes prompts
    alone (with the decodes under ``Rules.mixed``); if not, it decodes a token for every running
    request. A request is admitted if its tokens and the output reserved for it are fewer than what
    is free beside the output reserved for the running ones, a share of which decays as they
    decode. Decodes that find no page retract requests to the end of the queue.

    Parameters
    ----------
    state, limits, rules, cost
        The run; ``limits.max_num_seqs`` is ``max_running_requests``, of which each micro-batch has
        an equal part, and the token budget ``chunked_prefill_size``, which counts no decodes
        (without chunks it stands beside ``Rules.prefill_tokens``). ``Rules.chunk_unit`` is the
        page; ``Rules.mixed`` needs chunks.
    r
        The replica.
    seen
        Position in its queue up to which the scheduler sees requests.

    Returns
    -------
    Batch
        Empty (``tokens == 0``) if there is nothing to do.

    """
    replica, slot = state.replica, state.policy_slot
    for i in range(replica[r, RUNNING]):
        state.scheduled[r, i] = 0
    batch = Batch(0, 0, 0, 0, False)
    for _ in range(rules.batches_in_flight):
        m = replica[r, _TURN]
        if replica[r, IN_FLIGHT] > 0 and slot[r, replica[r, OLDEST], _MICRO_BATCH] == m:
            break  # the engine waits for this micro-batch's last results
        replica[r, _TURN] = m + 1 if m + 1 < rules.batches_in_flight else 0
        batch = _form(state, limits, rules, cost, r, m, seen)
        if batch.tokens > 0:
            slot[r, replica[r, NEXT_SLOT], _MICRO_BATCH] = m
            break
    return batch
