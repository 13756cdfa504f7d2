"""SGLang's running requests: whose they are, their decodes, and who gives way when pages run out.

Source: sglang/srt/managers/schedule_batch.py (``check_decode_mem``, ``retract_decode``) of 0.5.9.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.compiled import inner
from simulator.kvcache import grow, pages_for
from simulator.policies.batch import Batch, emit, preempt, wait_last
from simulator.state import (
    BOUND_BLOCKS,
    COMPUTED,
    FREE_BLOCKS,
    GENERATED,
    HELD_BLOCKS,
    HELD_TOKENS,
    LEAVING_BLOCKS,
    OUTPUT,
    POLICY_A,
    PROMPT,
    RUNNING,
)

if TYPE_CHECKING:
    from simulator.state import Limits, State

_RETRACT_DECODE_STEPS = 20
"""Decode steps that a retraction counts on per request left (SGLANG_RETRACT_DECODE_STEPS)."""

# Column of State.replica: one more than the request whose prompt is partly computed, or 0.
CHUNKED = POLICY_A


@inner
def is_member(state: State, r: int, m: int, request: int) -> bool:
    """Whether a running request decodes in micro-batch ``m``."""
    if request == state.replica[r, CHUNKED] - 1:
        return False
    return state.policy_request.size == 0 or state.policy_request[request] == m


@inner
def members(state: State, r: int, m: int) -> int:
    """Requests that decode in micro-batch ``m``."""
    if state.policy_request.size == 0:
        return state.replica[r, RUNNING] - (state.replica[r, CHUNKED] > 0)
    count = 0
    for i in range(state.replica[r, RUNNING]):
        if is_member(state, r, m, state.running[r, i]):
            count += 1
    return count


@inner
def _pages_to_decode(state: State, limits: Limits, request: int) -> int:
    """Pages that a request lacks for its next token."""
    tokens = state.request[request, COMPUTED] + 1
    if tokens <= state.request[request, HELD_TOKENS]:
        return 0
    return pages_for(limits, tokens) - state.request[request, HELD_BLOCKS]


@inner
def members_pages(state: State, limits: Limits, r: int, m: int) -> int:
    """Pages that the decodes of micro-batch ``m`` lack."""
    pages = 0
    for i in range(state.replica[r, RUNNING]):
        if is_member(state, r, m, state.running[r, i]):
            pages += _pages_to_decode(state, limits, state.running[r, i])
    return pages


@inner
def decode(state: State, limits: Limits, r: int, m: int) -> Batch:
    """Let every member of micro-batch ``m`` that runs no prompt decode; the pages are free."""
    table = state.request
    decodes, context = 0, 0
    for i in range(state.replica[r, RUNNING]):
        request = state.running[r, i]
        if state.scheduled[r, i] > 0 or not is_member(state, r, m, request):
            continue
        computed = table[request, COMPUTED] + 1
        grow(state, limits, r, request, computed)
        table[request, COMPUTED] = computed
        state.scheduled[r, i] = 1
        decodes += 1
        context += computed
        emit(state, r, request)
    return Batch(decodes, decodes, context, decodes, False)


@inner
def _victim(state: State, r: int, m: int) -> int:
    """Position of the member to retract: fewest outputs, longest prompt, admitted last."""
    table, running = state.request, state.running
    victim = -1
    for i in range(state.replica[r, RUNNING]):
        if not is_member(state, r, m, running[r, i]):
            continue
        if victim >= 0:
            more = table[running[r, i], GENERATED] - table[running[r, victim], GENERATED]
            longer = table[running[r, i], PROMPT] - table[running[r, victim], PROMPT]
            if more > 0 or (more == 0 and longer < 0):
                continue
        victim = i
    return victim


@inner
def retract(state: State, limits: Limits, r: int, m: int) -> None:
    """Take members of micro-batch ``m``, short of pages, out until the others' decodes fit.

    They go to the end of the queue. The share of outputs that admission reserves becomes what the
    others seem to need.
    """
    table, replica, running = state.request, state.replica, state.running
    replica[r, BOUND_BLOCKS] = 1
    live, need = members(state, r, m), members_pages(state, limits, r, m)
    while need > replica[r, FREE_BLOCKS]:
        if live == 1 and replica[r, LEAVING_BLOCKS] > 0:
            break  # what has finished is about to make room
        victim = _victim(state, r, m)
        request = running[r, victim]
        need -= _pages_to_decode(state, limits, request)
        preempt(state, r, request)
        wait_last(state, r, request)
        live -= 1
        replica[r, RUNNING] -= 1
        for i in range(victim, replica[r, RUNNING]):
            running[r, i] = running[r, i + 1]
    if live == 0:
        return
    outputs, generated = 0, 0
    for i in range(replica[r, RUNNING]):
        if is_member(state, r, m, running[r, i]):
            outputs += table[running[r, i], OUTPUT]
            generated += table[running[r, i], GENERATED]
    state.ratio[r] = min(1.0, (generated + _RETRACT_DECODE_STEPS * live) / (outputs + 1))
