"""The bounds again, from a certificate's supports alone: no code shared with the search's bounds.

From claims that hold (``planner/verify_support.py``) the bounds of all requests follow by the
recursions below, which are derived and written anew. ``docs/search.md`` has the formulas of both.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from planner.objective import Outcome
from planner.verify_support import SLOPE_UNIT, cached_context
from simulator.compiled import allocating
from simulator.metrics import latencies
from simulator.rules import ROUND_ROBIN, VLLM_V1
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
    from collections.abc import Iterator, Mapping

    import numpy.typing as npt

    from simulator.plan import Plan
    from simulator.rules import Rules
    from simulator.run import Run
    from simulator.state import Limits
    from simulator.timing import IterationCost
    from simulator.workload import Workload

    Ints = npt.NDArray[np.int64]

_FAR_PS: Final = 1 << 61


class Floors(NamedTuple):
    """Least times of one class or family; ``limits`` are a replica's, or looser ones.

    ``alone_ps`` and ``cached`` are per request, (N,); ``work_ps`` by prompt tokens, (L + 1,), and
    ``emitted_ps`` by context, (L + 2,), are running sums; ``share`` is ``(theta, phi)``.
    """

    limits: Limits
    alone_ps: Ints
    cached: Ints
    work_ps: Ints
    emitted_ps: Ints
    share: tuple[int, int]


def floors_of(
    support: Mapping[str, Any],
    cost: IterationCost,
    limits: Limits,
    workload: Workload,
    cached: Ints,
) -> Floors:
    """What follows from a support."""
    longest = cost.max_context
    tokens = np.arange(longest + 1)
    stages = [int(kind) for kind in cost.stages]
    works = {
        kind: support["kinds"][kind]["work_ps"] * tokens + cost.prefill_ps[kind]
        for kind in sorted(set(stages))
    }
    slowest = max(works, key=lambda kind: int(works[kind][-1]))
    starts = np.minimum([*support["contexts"], longest + 1], longest + 1)
    per_token_ps = np.repeat(np.array(support["decode_ps"]), np.diff(starts))
    return Floors(
        limits,
        _alone_ps(support, cost, workload.prompt_tokens, cached),
        cached,
        works[slowest],
        np.concatenate([[0, 0], np.cumsum(per_token_ps)]),
        _dearest_share(support["kinds"][slowest]["shares"], workload),
    )


def _dearest_share(shares: list[list[int]], workload: Workload) -> tuple[int, int]:
    """The share that charges most for all tokens after the first; of equal ones the first."""
    more = workload.output_tokens - 1
    contexts = int((more * (2 * workload.prompt_tokens + workload.output_tokens) // 2).sum())
    best, dearest = (0, 0), -1
    for theta, phi in shares:
        charged = theta * contexts + phi * int(more.sum())
        if charged > dearest:
            best, dearest = (theta, phi), charged
    return best


def _alone_ps(support: Mapping[str, Any], cost: IterationCost, prompt: Ints, cached: Ints) -> Ints:
    """(N,) least time from admission to first token: the prompt in one piece, or cut."""
    stages, kinds = [int(kind) for kind in cost.stages], support["kinds"]
    samples_ps = kinds[stages[-1]]["first_token_ps"]
    tokens, hops = prompt - cached, len(stages) - 1
    sizes = np.arange(cost.max_context + 1)
    room = support["budget_tokens"]
    whole_ps = np.full(len(sizes), _FAR_PS)
    inside = sizes[: room + 1]
    whole_ps[inside] = samples_ps + sum(
        cost.mixed_ps[kind, inside] + kinds[kind]["each_ps"] for kind in stages
    )
    if hops:
        whole_ps[inside] += hops * _least_of_more(cost.send_ps)[inside]
    whole_ps = _least_of_more(whole_ps)[tokens]
    for kind in stages:
        whole_ps = whole_ps + cost.prefill_ps[kind, prompt] - cost.prefill_ps[kind, cached]
    alone_ps = np.zeros(len(prompt), np.int64)
    for kind in sorted(set(stages)):
        if support["full_tokens"]:
            cuts = [_full_chunks_ps(support, cost, kind, b, sizes) for b in support["full_tokens"]]
            cut_ps = np.min(np.array(cuts), axis=0)
        else:
            cut_ps = _line_chunks_ps(support, cost, kind, sizes)
        cut_ps = _least_of_more(cut_ps + samples_ps)[tokens]
        cut_ps = cut_ps + cost.prefill_ps[kind, prompt] - cost.prefill_ps[kind, cached]
        alone_ps = np.maximum(alone_ps, np.minimum(whole_ps, cut_ps))
    return alone_ps


def _least_of_more(floors_ps: Ints) -> Ints:
    least: Ints = np.flip(np.minimum.accumulate(np.flip(floors_ps)))
    return least


def _full_chunks_ps(
    support: Mapping[str, Any], cost: IterationCost, kind: int, budget: int, sizes: Ints
) -> Ints:
    """Cut prompts whose chunks but the last fill a batch, counted where ``kind`` is last."""
    stages = [int(stage) for stage in cost.stages]
    at = max(i for i, stage in enumerate(stages) if stage == kind)
    each = [support["kinds"][stage]["each_ps"] for stage in stages]
    full = [int(cost.mixed_ps[stage, budget]) + each[i] for i, stage in enumerate(stages)]
    before_ps = sum(full[:at])
    if len(stages) > 1:
        before_ps += at * int(cost.send_ps[budget:].min())
        before_ps += (len(stages) - 1 - at) * int(cost.send_ps[1:].min())
    chunks = np.maximum(2, (sizes + budget - 1) // budget)
    least_ps = np.full(len(sizes), _FAR_PS)
    for more in (0, 1):
        last = np.ones(len(sizes), np.int64) if more else sizes - (chunks - 1) * budget
        last = np.maximum(1, last)
        time_ps = (chunks + more - 1) * full[at] + sum(
            cost.mixed_ps[stages[i], last] + each[i] for i in range(at, len(stages))
        )
        least_ps = np.minimum(least_ps, time_ps)
    cut_ps: Ints = before_ps + least_ps
    return cut_ps


def _line_chunks_ps(
    support: Mapping[str, Any], cost: IterationCost, kind: int, sizes: Ints
) -> Ints:
    """Cut prompts whose chunks are anything, by the lines below the cost."""
    stages, stage = [int(one) for one in cost.stages], support["kinds"][kind]
    budget, each_ps = support["budget_tokens"], stage["each_ps"]
    chunks = np.maximum(2, (sizes + budget - 1) // budget)
    lines = [a * sizes // SLOPE_UNIT + chunks * (b + each_ps) for a, b in stage["lines"]]
    cut_ps = np.max(np.array([0 * sizes, *lines]), axis=0)
    others = sum(support["kinds"][one]["pass_ps"] for one in stages) - stage["pass_ps"]
    if len(stages) > 1:
        others += (len(stages) - 1) * int(cost.send_ps[1:].min())
    total_ps: Ints = cut_ps + others
    return total_ps


def cacheable(workload: Workload, rules: Rules) -> Ints:
    """(N,) prompt tokens that a first admission may find: leading blocks that others have too."""
    cached = np.zeros(workload.num_requests, np.int64)
    if not rules.prefix_caching or not workload.block_tokens:
        return cached
    ids = [
        workload.block_ids[a:b].tolist()
        for a, b in zip(workload.block_starts[:-1], workload.block_starts[1:], strict=True)
    ]
    in_order = workload.concurrency == 0 and not len(workload.after)
    holders: dict[int, int] = {}
    for blocks in ids:
        for block in blocks:
            holders[block] = holders.get(block, 0) + 1
    seen: set[int] = set()
    for i, blocks in enumerate(ids):
        for block in blocks:
            if not (block in seen if in_order else holders[block] > 1):
                break
            cached[i] += workload.block_tokens
        seen.update(blocks)
    return np.minimum(cached, workload.prompt_tokens - 1)


def _gaps(run: Run, floors: Floors) -> tuple[npt.NDArray[np.float64], Ints]:
    """Floors of the gaps between tokens by context, seconds, and how many gaps have each."""
    per_token_ps = floors.emitted_ps[1:] - floors.emitted_ps[:-1]
    number = np.zeros(len(per_token_ps) + 1, np.int64)
    np.add.at(number, run.workload.prompt_tokens + 1, 1)
    np.add.at(number, run.workload.prompt_tokens + run.workload.output_tokens, -1)
    return in_s(per_token_ps), np.cumsum(number)[:-1]


def _free_ps(run: Run, r: int) -> int:
    """Replica ``r`` starts no further batch before; 0 if it is idle.

    A pipeline with room may take a batch at any time after the last one was started.
    """
    state, depth = run.state, run.rules.batches_in_flight
    event_ps = int(state.event_ps[r])
    if event_ps == NEVER_PS:
        return 0
    if 0 < state.replica[r, IN_FLIGHT] < depth:
        newest = (state.replica[r, NEXT_SLOT] - 1) % depth
        return min(event_ps, int(state.slot[r, newest, STARTED]))
    return event_ps


def _queues(run: Run) -> Iterator[list[int]]:
    """The requests of each replica in the order of its queue, as far as they are known."""
    workload, replicas = run.workload, len(run.state.event_ps)
    replica = run.state.request[:, REPLICA].tolist()
    numbers = range(workload.num_requests)
    if workload.concurrency == 0 and not len(workload.after):
        if run.rules.router == ROUND_ROBIN:
            replica = [i % replicas for i in numbers]
        order = list(numbers)
    else:
        arrival = run.state.time_ps[:, ARRIVAL].tolist()
        generated = run.state.request[:, GENERATED].tolist()
        waiting = [i for i in numbers if replica[i] >= 0 and generated[i] == 0]
        if len(workload.after) and len({(replica[i], arrival[i]) for i in waiting}) < len(waiting):
            for i in waiting:  # sent at once: their order is not known
                replica[i] = -1
        order = sorted(numbers, key=lambda i: (arrival[i], i))
    for r in range(replicas):
        yield [i for i in order if replica[i] == r]


class _Seats(NamedTuple):
    """What a replica's requests share: seats, pages and how contents use them.

    ``block_tokens`` is 0 where pages do not matter; ``keeps`` says that a preempted request may
    find its blocks again, ``reserves`` that a prompt is admitted with all its pages.
    """

    seats: int
    pages: int
    block_tokens: int
    growing: int
    keeps: bool
    reserves: bool

    @classmethod
    def of(cls, run: Run, limits: Limits) -> _Seats:
        rules, seats, pages, block_tokens = run.rules, len(run.state.request), 1, 0
        if rules.policy == VLLM_V1:
            seats = limits.max_num_seqs
            if cached_context(limits, rules) is not None:
                pages, block_tokens = limits.num_blocks, limits.block_tokens
        return cls(
            seats,
            pages,
            block_tokens,
            limits.growing,
            bool(rules.prefix_caching),
            bool(rules.reserve_full_prompt),
        )


@allocating
def _take_up(
    queue: Ints,
    request: Ints,
    time_ps: Ints,
    event_ps: int,
    now_ps: int,
    ingress_ps: int,
    room: _Seats,
    alone: Ints,
    cached: Ints,
    work: Ints,
    emitted: Ints,
    theta: int,
    phi: int,
    first_ps: Ints,
    last_ps: Ints,
) -> int:
    """One replica's queue, request by request: when its work is done, at best.

    ``first_ps`` and ``last_ps``, (N,), get the least time from arrival to first and last token.
    Requests in ``queue`` are not finished.
    """
    admit_ps, prompts_ps, all_ps, held = now_ps, now_ps, now_ps, 0
    residents = [(now_ps, 0) for _ in range(0)]
    for i in queue:
        prompt, output, generated = request[i, PROMPT], request[i, OUTPUT], request[i, GENERATED]
        arrival_ps = time_ps[i, ARRIVAL]
        visible_ps = arrival_ps + ingress_ps
        mine = 0
        if room.block_tokens > 0:
            mine = room.growing * -(-(prompt + generated) // room.block_tokens)
        work_ps, after, begin_ps = 0, generated + 1, event_ps
        if generated == 0:
            after = 1
            start_ps = max(now_ps, visible_ps)
            found, alone_ps = min(request[i, COMPUTED], prompt), 0
            if found == 0 and request[i, PREEMPTIONS] == 0:
                needed = mine if room.reserves else min(mine, room.growing)
                admit_ps = max(admit_ps, visible_ps)
                # Seats and pages suffice once enough of those before it have left.
                while len(residents) > 0 and (
                    len(residents) >= room.seats or held + needed > room.pages
                ):
                    left_ps, freed = heapq.heappop(residents)
                    admit_ps = max(admit_ps, left_ps)
                    held -= freed
                start_ps, found, alone_ps = admit_ps, cached[i], alone[i]
            elif found == 0 and room.keeps:
                found = prompt - 1
            elif found == 0:
                alone_ps = alone[i]
            work_ps = work[prompt] - work[found]
            prompts_ps = max(prompts_ps, start_ps) + work_ps
            begin_ps = max(prompts_ps, start_ps + alone_ps if alone_ps > 0 else 0)
            first_ps[i] = begin_ps - arrival_ps
        end_ps = begin_ps + emitted[prompt + output] - emitted[prompt + after]
        last_ps[i] = end_ps - arrival_ps
        heapq.heappush(residents, (end_ps, mine))
        held += mine
        left = max(0, output - after)
        contexts = left * (prompt + after) + left * (left - 1) // 2  # p + after .. p + output - 1
        all_ps = max(all_ps, visible_ps) + work_ps + theta * contexts + phi * left
    return all_ps


def lower_outcome(
    run: Run, plan: Plan, floors: Floors, micros_per_hour: int, *, with_gaps: bool = False
) -> Outcome:
    """The least that ``plan``, at that price, can come to after what ``run`` has done."""
    request, time_ps = run.state.request, run.state.time_ps
    prompt, output = request[:, PROMPT], request[:, OUTPUT]
    arrival_ps = time_ps[:, ARRIVAL]
    first_ps = floors.limits.ingress_ps + floors.alone_ps
    last_ps = first_ps + floors.emitted_ps[prompt + output] - floors.emitted_ps[prompt + 1]
    finished = time_ps[:, FINISH] != NEVER_PS
    all_ps, room = 0, _Seats.of(run, floors.limits)
    for r, known in enumerate(_queues(run)):
        queue = np.array(known, np.int64)
        done_ps = _take_up(
            queue[~finished[queue]],
            request,
            time_ps,
            int(run.state.event_ps[r]),
            _free_ps(run, r),
            floors.limits.ingress_ps,
            room,
            floors.alone_ps,
            floors.cached,
            floors.work_ps,
            floors.emitted_ps,
            *floors.share,
            first_ps,
            last_ps,
        )
        all_ps = max(all_ps, int(done_ps))
    some = np.flatnonzero(finished | (request[:, GENERATED] > 0))
    first_ps[some] = time_ps[some, FIRST_TOKEN] - arrival_ps[some]
    some = np.flatnonzero(finished)
    last_ps[some] = time_ps[some, FINISH] - arrival_ps[some]

    arrived = arrival_ps != NEVER_PS
    ends_ps = arrival_ps[arrived] + last_ps[arrived]
    return Outcome(
        latencies(np.zeros_like(first_ps), first_ps, last_ps, run.workload.output_tokens),
        float(in_s(np.int64(max(int(ends_ps.max()), all_ps)) - arrival_ps[arrived].min())),
        plan.devices,
        micros_per_hour,
        exact=False,
        gaps=_gaps(run, floors) if with_gaps else None,
    )
