"""The bounds again, from a certificate's supports alone: no code shared with the search's bounds.

From claims that hold (``planner/verify_support.py``) the bounds of all requests follow by the
recursions below, which are written per request where the search has whole arrays, and with whole
arrays where it has loops. ``docs/search.md`` has the formulas of both.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from planner.objective import Outcome
from planner.verify_support import SLOPE_UNIT, cached_context
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
        whole_ps[inside] += hops * np.array([int(cost.send_ps[n:].min()) for n in inside])
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


class _Replica:
    """One replica's queue, taken up request by request."""

    def __init__(self, run: Run, floors: Floors, r: int) -> None:
        self.now_ps = _free_ps(run, r)
        self.event_ps = int(run.state.event_ps[r])
        self.admit_ps = self.prompts_ps = self.all_ps = self.now_ps
        self.floors = floors
        self.keeps = run.rules.prefix_caching
        limits, rules = floors.limits, run.rules
        self.seats, self.pages, self.block_tokens = len(run.state.request), 1, 0
        if rules.policy == VLLM_V1:
            self.seats = limits.max_num_seqs
            if cached_context(limits, rules) is not None:
                self.pages, self.block_tokens = limits.num_blocks, limits.block_tokens
        self.reserves = rules.reserve_full_prompt
        self.growing = limits.growing
        self.residents: list[tuple[int, int]] = []
        self.held = 0

    def take(self, row: list[int], arrival_ps: int, i: int) -> tuple[int | None, int]:
        """First (``None`` if it was emitted) and last token of the next request, at best."""
        floors = self.floors
        prompt, output, generated = row[PROMPT], row[OUTPUT], row[GENERATED]
        visible_ps = arrival_ps + floors.limits.ingress_ps
        first_ps, work_ps, emitted = None, 0, generated + 1
        held = self._pages(prompt + generated)
        if generated > 0:
            begin_ps = self.event_ps
        else:
            emitted = 1
            start_ps = max(self.now_ps, visible_ps)
            found, alone_ps = min(row[COMPUTED], prompt), 0
            if found == 0 and row[PREEMPTIONS] == 0:
                start_ps = self._admit(visible_ps, held)
                found, alone_ps = int(floors.cached[i]), int(floors.alone_ps[i])
            elif found == 0 and self.keeps:
                found = prompt - 1
            elif found == 0:
                alone_ps = int(floors.alone_ps[i])
            work_ps = int(floors.work_ps[prompt] - floors.work_ps[found])
            self.prompts_ps = max(self.prompts_ps, start_ps) + work_ps
            first_ps = max(self.prompts_ps, start_ps + alone_ps if alone_ps else 0)
            begin_ps = first_ps
        rest_ps = floors.emitted_ps[prompt + output] - floors.emitted_ps[prompt + emitted]
        last_ps = begin_ps + int(rest_ps)
        heapq.heappush(self.residents, (last_ps, held))
        self.held += held
        theta, phi = floors.share
        left = range(prompt + emitted, prompt + output)
        work_ps += theta * sum(left) + phi * len(left)
        self.all_ps = max(self.all_ps, visible_ps) + work_ps
        return first_ps, last_ps

    def _pages(self, tokens: int) -> int:
        if not self.block_tokens:
            return 0
        return self.growing * -(-tokens // self.block_tokens)

    def _admit(self, visible_ps: int, pages: int) -> int:
        """When seats and pages suffice, those before it having left as early as they can."""
        needed = pages if self.reserves else min(pages, self.growing)
        self.admit_ps = max(self.admit_ps, visible_ps)
        while self.residents and (
            len(self.residents) >= self.seats or self.held + needed > self.pages
        ):
            left_ps, freed = heapq.heappop(self.residents)
            self.admit_ps = max(self.admit_ps, left_ps)
            self.held -= freed
        return self.admit_ps


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
    rows, arrivals = request.tolist(), arrival_ps.tolist()
    all_ps = 0
    for r, queue in enumerate(_queues(run)):
        replica = _Replica(run, floors, r)
        for i in queue:
            if finished[i]:
                continue
            first, last = replica.take(rows[i], arrivals[i], i)
            if first is not None:
                first_ps[i] = first - arrivals[i]
            last_ps[i] = last - arrivals[i]
        all_ps = max(all_ps, replica.all_ps)
    some = np.flatnonzero(finished | (request[:, GENERATED] > 0))
    first_ps[some] = time_ps[some, FIRST_TOKEN] - arrival_ps[some]
    some = np.flatnonzero(finished)
    last_ps[some] = time_ps[some, FINISH] - arrival_ps[some]

    known = arrival_ps != NEVER_PS
    ends_ps = arrival_ps[known] + last_ps[known]
    return Outcome(
        latencies(np.zeros_like(first_ps), first_ps, last_ps, run.workload.output_tokens),
        float(in_s(np.int64(max(int(ends_ps.max()), all_ps)) - arrival_ps[known].min())),
        plan.devices,
        micros_per_hour,
        exact=False,
        gaps=_gaps(run, floors) if with_gaps else None,
    )
