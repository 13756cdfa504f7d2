"""Lower bounds on what a plan can do, from floors of its iteration cost and how far its run is.

Every bound here is admissible: never above the simulated value. The arguments use only the
scheduler's rules and *values* of the compiled cost, evaluated over every batch size, never its
formula, so a new calibration or table cannot break them. They rest on these facts, which
``tests/property/test_bounds.py`` checks on random costs and plans; ``docs/search.md`` has the
proofs:

1. The cost never falls when tokens, sequences or context grow (``IterationCost`` says so).
2. Admission and prompt computation are first come first served within a replica, and every prompt
   token that no cache holds is computed at least once, in an iteration that counts as prefill.
3. A request's tokens after the first each need an iteration of their own, and that iteration
   attends to the request's whole context, or recomputes it.
4. Under vLLM's V1 scheduler, when a request is admitted, all before it on its replica that are not
   finished hold a seat and the blocks of their whole prompts.
5. A round-robin router sends requests of an open loop to replicas in turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from planner.floors import CostFloors as CostFloors
from planner.floors import all_known, cache_tokens, keeps_order
from simulator.compiled import compiled
from simulator.metrics import Latencies, latencies
from simulator.rules import ROUND_ROBIN
from simulator.state import (
    ARRIVAL,
    COMPUTED,
    FINISH,
    FIRST_TOKEN,
    GENERATED,
    IN_FLIGHT,
    NEVER_PS,
    NEXT_SLOT,
    OUTPUT,
    PREEMPTIONS,
    PROMPT,
    REPLICA,
    STARTED,
)
from simulator.timing import in_s

if TYPE_CHECKING:
    import numpy.typing as npt

    from planner.floors import RequestFloors
    from simulator.run import Run
    from simulator.state import Limits
    from simulator.workload import Workload

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bounds:
    """Lower bounds on a run's latencies and makespan."""

    values: Latencies
    makespan_s: float


@compiled
def _push(heap_ps: Ints, pages: Ints, size: int, at_ps: int, held: int) -> int:
    """Add a resident that leaves at ``at_ps`` with ``held`` pages; the new size."""
    i = size
    while i > 0:
        parent = (i - 1) >> 1
        if heap_ps[parent] <= at_ps:
            break
        heap_ps[i], pages[i] = heap_ps[parent], pages[parent]
        i = parent
    heap_ps[i], pages[i] = at_ps, held
    return size + 1


@compiled
def _pop(heap_ps: Ints, pages: Ints, size: int) -> int:
    """Remove the resident that leaves first; the new size."""
    n = size - 1
    at_ps, held = heap_ps[n], pages[n]
    i = 0
    while 2 * i + 1 < n:
        child = 2 * i + 1
        if child + 1 < n and heap_ps[child + 1] < heap_ps[child]:
            child += 1
        if at_ps <= heap_ps[child]:
            break
        heap_ps[i], pages[i] = heap_ps[child], pages[child]
        i = child
    heap_ps[i], pages[i] = at_ps, held
    return n


@compiled
def _queue(
    members: Ints,
    request: Ints,
    time_ps: Ints,
    event_ps: int,
    idle_ps: int,
    ingress_ps: int,
    alone_ps: Ints,
    cached: Ints,
    share: Ints,
    work_ps: Ints,
    decode_ps: Ints,
    pages: Ints,
    own_pages: Ints,
    capacity: Ints,
    heap_ps: Ints,
    heap_pages: Ints,
    first_ps: Ints,
    last_ps: Ints,
) -> int:
    """Bounds for the requests of one replica, first come first served; when all its work is done.

    Whatever has happened counts exactly. No batch ends before the replica's next event and none
    starts before ``idle_ps``. A request is admitted once seats and pages suffice beside those of
    earlier ones that are not finished (fact 4), prompts follow one another (fact 2).

    ``members`` are the replica's requests in the order of its queue; ``share`` is ``(theta, phi)``,
    the share of time of a token by its context. Per request, (N,): ``pages`` that it holds when
    later ones are admitted and ``own_pages`` that its own admission needs. ``capacity`` has the
    replica's seats and pages, and whether pages keep their content. ``heap_ps`` and
    ``heap_pages``, (N,), are scratch: when each resident leaves, and the pages it holds.
    """
    residents, held = 0, 0
    now = 0 if idle_ps == NEVER_PS else idle_ps
    admit_ps, prompts_ps, all_ps = now, now, now
    for i in members:
        if time_ps[i, FINISH] != NEVER_PS:
            continue
        prompt, output, generated = request[i, PROMPT], request[i, OUTPUT], request[i, GENERATED]
        visible = time_ps[i, ARRIVAL] + ingress_ps
        if generated > 0:
            # The token after those generated may be in flight: it ends no earlier than the event.
            after = generated + 1
            last = event_ps + decode_ps[prompt + output] - decode_ps[prompt + after]
            work = 0
        else:
            after = 1
            found = min(request[i, COMPUTED], prompt)
            is_new = found == 0 and request[i, PREEMPTIONS] == 0
            from_start = is_new
            if found == 0 and not is_new:  # once preempted it may find its own blocks again
                from_start = capacity[2] == 0
                found = 0 if from_start else prompt - 1
            start = max(now, visible)
            if is_new:
                found = cached[i]
                admit_ps = max(admit_ps, visible)
                while residents > 0 and (
                    residents >= capacity[0] or held + own_pages[i] > capacity[1]
                ):
                    admit_ps = max(admit_ps, heap_ps[0])
                    held -= heap_pages[0]
                    residents = _pop(heap_ps, heap_pages, residents)
                start = admit_ps
            work = work_ps[prompt] - work_ps[found]
            prompts_ps = max(prompts_ps, start) + work
            first = prompts_ps
            if from_start:
                first = max(first, start + alone_ps[i])
            first_ps[i] = first - time_ps[i, ARRIVAL]
            last = first + decode_ps[prompt + output] - decode_ps[prompt + 1]
        last_ps[i] = last - time_ps[i, ARRIVAL]
        residents = _push(heap_ps, heap_pages, residents, last, pages[i])
        held += pages[i]
        left = output - after
        if left > 0:
            contexts = left * (2 * prompt + after + output - 1) // 2
            work += share[0] * contexts + share[1] * left
        all_ps = max(all_ps, visible) + work
    return all_ps


@compiled
def _from_state(
    order: Ints,
    starts: Ints,
    request: Ints,
    time_ps: Ints,
    event_ps: Ints,
    idle_ps: Ints,
    ingress_ps: int,
    alone_ps: Ints,
    cached: Ints,
    share: Ints,
    work_ps: Ints,
    decode_ps: Ints,
    pages: Ints,
    own_pages: Ints,
    capacity: Ints,
    heap_ps: Ints,
    heap_pages: Ints,
    first_ps: Ints,
    last_ps: Ints,
) -> int:
    """Fill ``first_ps`` and ``last_ps`` with bounds from arrival to first and last token.

    ``order`` has the requests of each replica, those of replica ``r`` from ``starts[r]`` on.
    Returns when the last replica can have done all its work.
    """
    for i in range(request.shape[0]):
        prompt, output = request[i, PROMPT], request[i, OUTPUT]
        if request[i, GENERATED] > 0 or time_ps[i, FINISH] != NEVER_PS:
            first_ps[i] = time_ps[i, FIRST_TOKEN] - time_ps[i, ARRIVAL]
            if time_ps[i, FINISH] != NEVER_PS:
                last_ps[i] = time_ps[i, FINISH] - time_ps[i, ARRIVAL]
        else:  # holds also where nothing is known of its replica
            first_ps[i] = ingress_ps + alone_ps[i]
            last_ps[i] = first_ps[i] + decode_ps[prompt + output] - decode_ps[prompt + 1]
    all_ps = 0
    for r in range(event_ps.size):
        done_ps = _queue(
            order[starts[r] : starts[r + 1]],
            request,
            time_ps,
            event_ps[r],
            idle_ps[r],
            ingress_ps,
            alone_ps,
            cached,
            share,
            work_ps,
            decode_ps,
            pages,
            own_pages,
            capacity,
            heap_ps,
            heap_pages,
            first_ps,
            last_ps,
        )
        all_ps = max(all_ps, done_ps)
    return all_ps


def _idle_ps(run: Run) -> Ints:
    """Before when each replica starts no further batch; shape (R,).

    That is its next event, unless its pipeline has room: then a request that arrives may start
    one at any time after the last start.
    """
    state = run.state
    in_flight = state.replica[:, IN_FLIGHT]
    has_room = (in_flight > 0) & (in_flight < run.rules.batches_in_flight)
    newest = (state.replica[:, NEXT_SLOT] - 1) % run.rules.batches_in_flight
    started = state.slot[np.arange(len(newest)), newest, STARTED]
    return np.where(has_room, np.minimum(started, state.event_ps), state.event_ps)


def _queues(run: Run) -> tuple[Ints, Ints]:
    """Requests by replica, each replica's in the order of its queue, and where each begins."""
    state, workload = run.state, run.workload
    replicas = len(state.event_ps)
    replica = state.request[:, REPLICA]
    if all_known(workload):
        if run.rules.router == ROUND_ROBIN:  # fact 5
            replica = np.arange(workload.num_requests) % replicas
        order = np.argsort(replica, kind="stable")
    else:
        arrival_ps = state.time_ps[:, ARRIVAL]
        waiting = (replica >= 0) & (state.request[:, GENERATED] == 0)
        pairs = np.stack([replica[waiting], arrival_ps[waiting]])
        if len(workload.after) and np.unique(pairs, axis=1).shape[1] < pairs.shape[1]:
            # Turns that are sent at once may stand in any order: each is bounded by itself.
            replica = np.where(waiting, -1, replica)
        order = np.lexsort((arrival_ps, replica))
    return order, np.searchsorted(replica[order], np.arange(replicas + 1))


def run_bounds(run: Run, floors: RequestFloors, limits: Limits | None = None) -> Bounds:
    """Bounds on the finished run, given how far it has come; also of a run not begun.

    Parameters
    ----------
    run
        The run, advanced any number of iterations.
    floors
        Floors of its cost, or of a cost that is nowhere above it.
    limits
        Limits for what has not happened yet, if not the run's own, or looser ones.
    """
    state, workload, limits = run.state, run.workload, limits or run.limits
    request, rules = state.request, run.rules
    first_ps, last_ps = (np.zeros(workload.num_requests, np.int64) for _ in range(2))
    order, starts = _queues(run)
    none = np.zeros(workload.num_requests, np.int64)
    seats, blocks, pages = workload.num_requests, 1, none
    if keeps_order(rules):
        seats = limits.max_num_seqs
        if cache_tokens(limits, rules) < np.iinfo(np.int64).max >> 8:
            blocks = limits.num_blocks
            known = request[:, PROMPT] + request[:, GENERATED]
            pages = limits.growing * -(-known // limits.block_tokens)
    all_ps = _from_state(
        order,
        starts,
        request,
        state.time_ps,
        state.event_ps,
        _idle_ps(run),
        limits.ingress_ps,
        floors.alone_ps,
        floors.cached,
        np.array(floors.share_ps),
        floors.costs.prompt_work_ps,
        floors.costs.decode_ps,
        pages,
        pages if rules.reserve_full_prompt else np.minimum(pages, limits.growing),
        np.array([seats, blocks, int(rules.prefix_caching)]),
        *np.zeros((2, workload.num_requests), np.int64),
        first_ps,
        last_ps,
    )
    values = latencies(np.zeros_like(first_ps), first_ps, last_ps, workload.output_tokens)
    arrival_ps = state.time_ps[:, ARRIVAL]
    known_ps = arrival_ps != NEVER_PS
    ends_ps = (arrival_ps[known_ps] + last_ps[known_ps]).max()
    return Bounds(values, float(in_s(max(ends_ps, all_ps) - arrival_ps[known_ps].min())))


def gap_bounds(workload: Workload, floors: CostFloors) -> tuple[Floats, Ints]:
    """Lower bounds on the gaps between tokens, seconds, and how many gaps have each.

    A gap ends with an iteration that emits a token at the request's context (fact 3), so sorted
    floors are below sorted gaps, entry by entry.
    """
    decode_ps = floors.decode_ps
    starts = np.bincount(workload.prompt_tokens + 1, minlength=len(decode_ps))
    ends = np.bincount(workload.prompt_tokens + workload.output_tokens, minlength=len(decode_ps))
    tokens = np.cumsum(starts - ends)[: len(decode_ps) - 1]
    return in_s(np.diff(decode_ps)), tokens
