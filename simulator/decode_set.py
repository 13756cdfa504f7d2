"""The decoding requests of a replica as sums, so that a token for all of them is one addition.

A request that decodes emits one token in every iteration of its replica. So its progress is the
replica's count of such iterations and a constant, its finish is known when it joins, and the blocks
that an iteration needs depend only on how many sequences have which length modulo the block. The
jump engine keeps requests in this form and writes them back when it needs them one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from simulator.compiled import called, inner
from simulator.kvcache import blocks_for, pages_for
from simulator.state import (
    COMPUTED,
    EMITTED,
    FINISH,
    GENERATED,
    HELD_BLOCKS,
    HELD_TOKENS,
    IN_FLIGHT,
    LAST_TOKEN,
    NEVER_PS,
    OLDEST,
    OUTPUT,
    PROMPT,
    RUNNING,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from simulator.state import Limits, State

    Ints = npt.NDArray[np.int64]

# Columns of DecodeSets.sums, (R, 6) int64: whether the replica's requests are in this form; decode
# iterations it has finished; requests that decode, and the tokens they have computed; entries of
# ``order``; the request whose prompt is partly computed, or -1.
ACTIVE, STEPS, DECODES, CONTEXT, MEMBERS, PARTIAL = range(6)
_SUM_COLUMNS = 6

_JOINED = -1
"""In HELD_TOKENS: the request's COMPUTED and GENERATED are relative to STEPS."""


class DecodeSets(NamedTuple):
    """Decoding requests of R replicas with S seats and blocks of B tokens.

    Attributes
    ----------
    sums
        Table whose columns are named above.
    lengths
        (R, B) decoding sequences by (computed tokens - steps) modulo the block.
    order
        (R, 2 S) running requests in admission order, with some that have finished between them.
    due, due_request
        (R, S) heap of the step count at which each decoding request finishes.

    """

    sums: Ints
    lengths: Ints
    order: Ints
    due: Ints
    due_request: Ints


def empty_sets(replicas: int, seats: int, block_tokens: int) -> DecodeSets:
    """No replica in this form."""
    return DecodeSets(
        *(
            np.zeros((replicas, columns), np.int64)
            for columns in (_SUM_COLUMNS, block_tokens, 2 * seats, seats, seats)
        )
    )


@inner
def join(state: State, sets: DecodeSets, r: int, request: int) -> None:
    """Take a request whose known tokens but the last are computed among the decoding ones."""
    sums, table = sets.sums, state.request
    steps = sums[r, STEPS]
    computed = table[request, COMPUTED]
    sets.lengths[r, (computed - steps) % sets.lengths.shape[1]] += 1
    table[request, COMPUTED] = computed - steps
    table[request, GENERATED] -= steps
    table[request, HELD_TOKENS] = _JOINED
    i = sums[r, DECODES]
    sums[r, DECODES] = i + 1
    sums[r, CONTEXT] += computed
    due = table[request, OUTPUT] - table[request, GENERATED]
    while i > 0:
        parent = (i - 1) >> 1
        if sets.due[r, parent] <= due:
            break
        sets.due[r, i] = sets.due[r, parent]
        sets.due_request[r, i] = sets.due_request[r, parent]
        i = parent
    sets.due[r, i], sets.due_request[r, i] = due, request


@inner
def next_due(sets: DecodeSets, r: int) -> int:
    """Step count at which the first decoding request finishes; there must be one."""
    return sets.due[r, 0]


@inner
def take_due(state: State, sets: DecodeSets, limits: Limits, r: int) -> int:
    """Take out the decoding request that finishes first, with its columns written back."""
    sums, table, due, ids = sets.sums, state.request, sets.due, sets.due_request
    first = ids[r, 0]
    n = sums[r, DECODES] - 1
    sums[r, DECODES] = n
    last, request = due[r, n], ids[r, n]
    i = 0
    while 2 * i + 1 < n:
        child = 2 * i + 1
        if child + 1 < n and due[r, child + 1] < due[r, child]:
            child += 1
        if last <= due[r, child]:
            break
        due[r, i], ids[r, i] = due[r, child], ids[r, child]
        i = child
    due[r, i], ids[r, i] = last, request
    sets.lengths[r, table[first, COMPUTED] % sets.lengths.shape[1]] -= 1
    computed = table[first, COMPUTED] + sums[r, STEPS]
    sums[r, CONTEXT] -= computed
    _write_back(state, limits, first, sums[r, STEPS], computed)
    return first


@inner
def _write_back(state: State, limits: Limits, request: int, steps: int, computed: int) -> None:
    """Restore a request's own columns, with ``computed`` tokens computed."""
    table = state.request
    table[request, COMPUTED] = computed
    table[request, GENERATED] += steps
    table[request, HELD_BLOCKS] = pages_for(limits, computed)
    table[request, HELD_TOKENS] = blocks_for(computed, limits.block_tokens) * limits.block_tokens


@inner
def blocks_needed(sets: DecodeSets, limits: Limits, r: int, first: int, count: int) -> int:
    """Pages that iterations ``first`` to ``first + count - 1`` from now need, 0 being the next."""
    block = sets.lengths.shape[1]
    crossings = (count // block) * sets.sums[r, DECODES]
    length = -(sets.sums[r, STEPS] + first) % block
    for _ in range(count % block):
        crossings += sets.lengths[r, length]
        length = length - 1 if length > 0 else block - 1
    return limits.growing * crossings


@inner
def iterations_that_fit(sets: DecodeSets, limits: Limits, r: int, most: int, free: int) -> int:
    """How many iterations, up to ``most``, need no more than ``free`` pages."""
    surely = limits.growing * sets.sums[r, DECODES] * (most // limits.block_tokens + 1)
    if surely <= free or blocks_needed(sets, limits, r, 0, most) <= free:
        return most
    low, high = 0, most  # low fit, high do not
    while high - low > 1:
        middle = (low + high) >> 1
        if blocks_needed(sets, limits, r, 0, middle) <= free:
            low = middle
        else:
            high = middle
    return low


@inner
def append(state: State, sets: DecodeSets, r: int, request: int) -> None:
    """Put a request at the end of the order of admission."""
    if sets.sums[r, MEMBERS] == sets.order.shape[1]:
        _close_ranks(state, sets, r)
    members = sets.sums[r, MEMBERS]
    sets.order[r, members] = request
    sets.sums[r, MEMBERS] = members + 1


@inner
def _close_ranks(state: State, sets: DecodeSets, r: int) -> None:
    order, kept = sets.order, 0
    for i in range(sets.sums[r, MEMBERS]):
        request = order[r, i]
        if state.time_ps[request, FINISH] == NEVER_PS:
            order[r, kept] = request
            kept += 1
    sets.sums[r, MEMBERS] = kept


@called
def enter(state: State, sets: DecodeSets, r: int) -> bool:
    """Bring a replica without a batch in flight into this form, if its requests allow it.

    They do if all decode, but for one admitted last whose tokens are partly computed.
    """
    table, running, n = state.request, state.running, state.replica[r, RUNNING]
    partial = -1
    for i in range(n):
        request = running[r, i]
        computed, prompt = table[request, COMPUTED], table[request, PROMPT]
        if computed < prompt or computed + 1 < prompt + table[request, GENERATED]:
            if i + 1 < n:
                return False
            partial = request
    sums = sets.sums
    sums[r, ACTIVE] = 1
    sums[r, STEPS : MEMBERS + 1] = 0
    sums[r, PARTIAL] = partial
    sets.lengths[r, :] = 0
    for i in range(n):
        append(state, sets, r, running[r, i])
        if running[r, i] != partial:
            join(state, sets, r, running[r, i])
    return True


@called
def leave(state: State, sets: DecodeSets, limits: Limits, r: int, emitted_ps: int) -> None:
    """Write a replica's requests back one by one, as the plain loop has them.

    Parameters
    ----------
    state, sets, limits, r
        The replica; a batch may be in flight.
    emitted_ps
        When its decoding requests last emitted a token.

    """
    sums, table = sets.sums, state.request
    _close_ranks(state, sets, r)
    in_flight = state.replica[r, IN_FLIGHT]
    slot = state.replica[r, OLDEST]
    if in_flight > 0:  # decoding requests were admitted before those that emit their first token
        emitting, emitted = state.emitting, state.slot[r, slot, EMITTED]
        for k in range(emitted - 1, -1, -1):
            emitting[r, slot, sums[r, DECODES] + k] = emitting[r, slot, k]
        state.slot[r, slot, EMITTED] = emitted + sums[r, DECODES]
    joined = 0
    for i in range(sums[r, MEMBERS]):
        request = sets.order[r, i]
        state.running[r, i] = request
        if table[request, HELD_TOKENS] != _JOINED:
            continue
        computed = table[request, COMPUTED] + sums[r, STEPS] + in_flight
        _write_back(state, limits, request, sums[r, STEPS], computed)
        state.time_ps[request, LAST_TOKEN] = emitted_ps
        if in_flight > 0:
            state.emitting[r, slot, joined] = request
        joined += 1
    sums[r, ACTIVE] = 0
