"""From the client to a replica's queue: sends, ingress, and the router."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.compiled import inner
from simulator.rules import LEAST_LOADED, PREFIX_AWARE, ROUND_ROBIN
from simulator.state import (
    ARRIVAL,
    IN_FLIGHT,
    NEVER_PS,
    NEXT_KNOWN,
    NEXT_REPLICA,
    NEXT_REQUEST,
    OUTSTANDING,
    OUTSTANDING_TOKENS,
    PENDING,
    PROMPT,
    REPLICA,
    TAIL,
)

if TYPE_CHECKING:
    from simulator.rules import Rules
    from simulator.state import Limits, State

_IMBALANCE = 64
"""More requests than the least loaded replica has so many send a request there rather than to the
replica that knows its prefix: ``balance_abs_threshold`` of SGLang's router, policy ``cache_aware``.
"""


@inner
def send_next(state: State, limits: Limits, finished: int, now_ps: int) -> None:
    """What the client sends when ``finished`` is done: its successor, or a closed loop's next."""
    if state.successor.size > 0:
        request = state.successor[finished]
        if request >= 0:
            _send(state, limits, request, now_ps + state.think_ps[request])
    elif state.pending.size > 0 and state.counters[NEXT_REQUEST] < state.request.shape[0]:
        request = state.counters[NEXT_REQUEST]
        state.counters[NEXT_REQUEST] += 1
        _send(state, limits, request, now_ps)


@inner
def _is_before(time_ps: int, request: int, other_ps: int, other: int) -> bool:
    """Order of sends: by time, then the lower request."""
    return time_ps < other_ps or (time_ps == other_ps and request < other)


@inner
def _send(state: State, limits: Limits, request: int, at_ps: int) -> None:
    """Put a send on the heap; the lower request first where two coincide."""
    state.time_ps[request, ARRIVAL] = at_ps
    visible_ps = at_ps + limits.ingress_ps
    times, ids = state.pending_ps, state.pending
    i = state.counters[PENDING]
    state.counters[PENDING] = i + 1
    while i > 0:
        parent = (i - 1) >> 1
        if _is_before(times[parent], ids[parent], visible_ps, request):
            break
        times[i], ids[i] = times[parent], ids[parent]
        i = parent
    times[i], ids[i] = visible_ps, request


@inner
def _take_pending(state: State) -> int:
    """Remove the first send from the heap."""
    times, ids = state.pending_ps, state.pending
    first = ids[0]
    n = state.counters[PENDING] - 1
    state.counters[PENDING] = n
    time_ps, request = times[n], ids[n]
    i = 0
    while 2 * i + 1 < n:
        child = 2 * i + 1
        other = child + 1
        if other < n and _is_before(times[other], ids[other], times[child], ids[child]):
            child = other
        if _is_before(time_ps, request, times[child], ids[child]):
            break
        times[i], ids[i] = times[child], ids[child]
        i = child
    times[i], ids[i] = time_ps, request
    return first


@inner
def next_send_ps(state: State, limits: Limits) -> int:
    """When the next request reaches a scheduler, as far as is known."""
    at = NEVER_PS
    if state.counters[PENDING] > 0:
        at = state.pending_ps[0]
    known = state.counters[NEXT_KNOWN]
    if known < state.known.size:
        at = min(at, state.time_ps[state.known[known], ARRIVAL] + limits.ingress_ps)
    return at


@inner
def route_until(state: State, limits: Limits, rules: Rules, now_ps: int) -> None:
    """Queue every request that reaches a scheduler by ``now_ps``, in order of time.

    A replica that could start a batch is woken at the request's own time.
    """
    while True:
        at = next_send_ps(state, limits)
        if at > now_ps or at == NEVER_PS:
            return
        known = state.counters[NEXT_KNOWN]
        if state.counters[PENDING] > 0 and state.pending_ps[0] == at:
            request = _take_pending(state)
        else:
            request = state.known[known]
            state.counters[NEXT_KNOWN] = known + 1
        r = _replica_for(state, rules, request)
        replica = state.replica
        state.request[request, REPLICA] = r
        state.queue[r, replica[r, TAIL] % state.queue.shape[1]] = request
        replica[r, TAIL] += 1
        replica[r, OUTSTANDING] += 1
        replica[r, OUTSTANDING_TOKENS] += state.request[request, PROMPT]
        if replica[r, IN_FLIGHT] < rules.batches_in_flight:
            state.event_ps[r] = min(state.event_ps[r], at)


@inner
def _replica_for(state: State, rules: Rules, request: int) -> int:
    """The router's choice; of equally good replicas the first."""
    replicas = state.replica.shape[0]
    if rules.router == ROUND_ROBIN:
        r = state.counters[NEXT_REPLICA]
        state.counters[NEXT_REPLICA] = r + 1 if r + 1 < replicas else 0
        return r
    best = 0
    for r in range(1, replicas):
        if rules.router == LEAST_LOADED:
            better = state.replica[r, OUTSTANDING_TOKENS] < state.replica[best, OUTSTANDING_TOKENS]
        else:
            better = state.replica[r, OUTSTANDING] < state.replica[best, OUTSTANDING]
        if better:
            best = r
    return _with_prefix(state, request, best) if rules.router == PREFIX_AWARE else best


@inner
def _with_prefix(state: State, request: int, shortest: int) -> int:
    """The replica that was sent the longest prefix of a request's blocks before.

    The router sees what it sent where, not what is still cached there. Of equal prefixes, the
    replica with fewer requests; one that lags too far behind the ``shortest`` queue yields to it.
    """
    sent, ids, replica = state.pool.sent, state.pool.ids, state.replica
    first, last = state.pool.starts[request], state.pool.starts[request + 1]
    best, longest = shortest, 0
    for r in range(sent.shape[0]):
        end = first
        while end < last and sent[r, ids[end]]:
            end += 1
        shorter = replica[r, OUTSTANDING] < replica[best, OUTSTANDING]
        if end - first > longest or (longest > 0 and end - first == longest and shorter):
            best, longest = r, end - first
    if replica[best, OUTSTANDING] > replica[shortest, OUTSTANDING] + _IMBALANCE:
        best = shortest
    for i in range(first, last):
        sent[best, ids[i]] = 1
    return best
