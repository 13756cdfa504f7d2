"""The bounds again, from a certificate's support alone: no code shared with ``planner/bounds``.

A support is a list of claims about an iteration cost, each of which is checked here at every batch
size. From claims that hold, the bounds of all requests follow by the recursions below, written with
whole arrays where the search has loops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from planner.objective import Outcome
from simulator.metrics import latencies
from simulator.rules import VLLM_V1
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
    PROMPT,
    REPLICA,
    STARTED,
)
from simulator.timing import in_s

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from planner.problem import Problem
    from simulator.plan import BatchingLimits, Plan
    from simulator.run import Run
    from simulator.timing import IterationCost

    Ints = npt.NDArray[np.int64]

_SLOPE_UNIT = 1024
"""Slopes of support lines count in this part of a picosecond per token."""


def budget_of(problem: Problem, cost: IterationCost, limits: BatchingLimits) -> int:
    """Most tokens of one iteration: only vLLM's V1 scheduler keeps every batch to its budget."""
    if problem.rules.policy == VLLM_V1:
        return min(limits.max_num_batched_tokens, cost.max_tokens)
    return cost.max_tokens


def wrong_claim(
    support: Mapping[str, Any], cost: IterationCost, budget: int, seqs: int
) -> str | None:
    """The first claim of ``support`` that does not hold for ``cost``, or ``None``."""
    for array in (cost.decode_ps, cost.mixed_ps, cost.sampled_ps, cost.prefill_ps):
        if np.any(np.diff(array) < 0):
            return "the cost falls as a batch grows"
    if support["budget_tokens"] != budget:
        return f"budget_tokens is {support['budget_tokens']}, not {budget}"
    if len(support["kinds"]) != len(cost.host_ps):
        return f"kinds lists {len(support['kinds'])} kinds of stage, not {len(cost.host_ps)}"
    for kind, stage in enumerate(support["kinds"]):
        wrong = _wrong_stage(stage, cost, kind, budget)
        if wrong is not None:
            return f"kinds.{kind}.{wrong}"
    return _wrong_decode(support, cost, seqs)


def _wrong_stage(
    stage: Mapping[str, Any], cost: IterationCost, kind: int, budget: int
) -> str | None:
    tokens, mixed_ps = np.arange(1, budget + 1), cost.mixed_ps[kind, 1 : budget + 1]
    launch_ps, host_ps = int(cost.attention_ps[kind, 0, 0]), int(cost.host_ps[kind])
    least_pass_ps = max(int(mixed_ps[0]) + launch_ps, int(cost.mixed_floor_ps[kind])) + host_ps
    for name, most in (
        ("each_ps", launch_ps + host_ps),
        ("first_token_ps", int(cost.sampled_ps[kind, 1])),
        ("pass_ps", least_pass_ps + int(cost.sampled_ps[kind, 0])),
    ):
        if stage[name] != most:
            return f"{name} is {stage[name]}, not {most}"
    for slope, start_ps in stage["lines"]:
        if start_ps + stage["each_ps"] < 0:
            return f"lines: [{slope}, {start_ps}] starts below zero"
        above = np.flatnonzero(slope * tokens + start_ps * _SLOPE_UNIT > mixed_ps * _SLOPE_UNIT)
        if len(above):
            return f"lines: [{slope}, {start_ps}] is above the cost of {above[0] + 1} tokens"
    above = np.flatnonzero(stage["work_ps"] * tokens > mixed_ps + stage["each_ps"])
    if len(above):
        return f"work_ps is above the cost of {above[0] + 1} tokens"
    return None


def _wrong_decode(support: Mapping[str, Any], cost: IterationCost, seqs: int) -> str | None:
    contexts, floors_ps = support["contexts"], support["decode_ps"]
    if contexts[0] != 1 or np.any(np.diff(contexts) <= 0) or len(contexts) != len(floors_ps):
        return "contexts do not ascend from 1, or differ in number from decode_ps"
    batches = np.arange(1, min(seqs, cost.max_seqs, cost.max_tokens) + 1)
    own_ps = cost.decode_ps[0, 1] + cost.attention_ps[0, 0, 0]
    pays = len(cost.stages) == 1 and np.diff(cost.prefill_ps[0]).max() <= own_ps
    for context, floor_ps in zip(contexts, floors_ps, strict=True):
        decode_ps, again_ps = np.zeros(len(batches), np.int64), 0
        for stage, kind in enumerate(cost.stages):
            if stage > 0:
                decode_ps += cost.send_ps[batches]
                again_ps += int(cost.send_ps[1])
            always_ps = cost.host_ps[kind] + cost.sampled_ps[kind, 1]
            decode_ps += _decode_stage_ps(cost, int(kind), batches, context) + always_ps
            alone_ps = cost.mixed_ps[kind, 1] + cost.attention_ps[kind, 0, 0]
            alone_ps += cost.prefill_ps[kind, context] * pays
            again_ps += int(max(alone_ps, cost.mixed_floor_ps[kind]) + always_ps)
        least_ps = min(int(decode_ps.min()), again_ps)
        if floor_ps > least_ps:
            return f"decode_ps at context {context} is {floor_ps}, above {least_ps}"
    return None


def _decode_stage_ps(cost: IterationCost, kind: int, batches: Ints, context: int) -> Ints:
    """Least device time of decode batches of each size, one sequence of which has ``context``."""
    held = context + batches - 1  # the others hold at least one token each
    column = np.searchsorted(cost.context_knots, held // batches, side="right") - 1
    beyond = np.maximum(0, held - cost.context_knots[column] * batches)
    slope_ps = cost.attention_slope_ps[kind, batches, column]
    attention_ps = cost.attention_ps[kind, batches, column] + slope_ps * beyond
    device_ps = cost.decode_ps[kind, batches] + attention_ps
    least_ps: Ints = np.maximum(device_ps, cost.decode_floor_ps[kind])
    return least_ps


class Floors(NamedTuple):
    """Least times by tokens, (L + 1,) and (L + 2,): see ``planner.bounds.CostFloors``."""

    prompt_ps: Ints
    work_ps: Ints
    emitted_ps: Ints


def floors_of(support: Mapping[str, Any] | None, cost: IterationCost) -> Floors:
    """What follows from a support; zeros where there is none."""
    longest = cost.max_context
    tokens = np.arange(longest + 1)
    if support is None:
        return Floors(0 * tokens, 0 * tokens, np.zeros(longest + 2, np.int64))
    budget, kinds = support["budget_tokens"], [int(kind) for kind in cost.stages]
    sends_ps = int(cost.send_ps[1]) * (len(kinds) - 1) if len(kinds) > 1 else 0
    chunks = np.maximum(2, (tokens + budget - 1) // budget)
    whole = tokens <= budget
    prompts, works = [0 * tokens], {}
    for place, kind in enumerate(kinds):
        stage, each_ps = support["kinds"][kind], support["kinds"][kind]["each_ps"]
        lines = [a * tokens // _SLOPE_UNIT + chunks * (b + each_ps) for a, b in stage["lines"]]
        prompt_ps = np.max(np.array([0 * tokens, *lines]), axis=0)
        one_chunk_ps = cost.mixed_ps[kind, tokens[whole]] + each_ps
        prompt_ps[whole] = np.minimum(prompt_ps[whole], one_chunk_ps)
        others = kinds[:place] + kinds[place + 1 :]
        others_ps = sends_ps + sum(support["kinds"][other]["pass_ps"] for other in others)
        attention_ps = cost.prefill_ps[kind]
        prompts.append(prompt_ps + attention_ps + stage["first_token_ps"] + others_ps)
        works[kind] = stage["work_ps"] * tokens + attention_ps
    slowest = max(sorted(works), key=lambda kind: int(works[kind][-1]))
    starts = np.minimum([*support["contexts"], longest + 1], longest + 1)
    per_token_ps = np.repeat(np.array(support["decode_ps"]), np.diff(starts))
    emitted_ps = np.concatenate([[0, 0], np.cumsum(per_token_ps)])
    return Floors(np.max(np.array(prompts), axis=0), works[slowest], emitted_ps)


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


def lower_outcome(run: Run, plan: Plan, floors: Floors, *, with_gaps: bool = False) -> Outcome:
    """The least that ``plan`` can come to after what ``run`` has done."""
    request, time_ps = run.state.request, run.state.time_ps
    event_ps = run.state.event_ps
    prompt, output, replica = request[:, PROMPT], request[:, OUTPUT], request[:, REPLICA]
    arrival_ps = time_ps[:, ARRIVAL]
    finished = time_ps[:, FINISH] != NEVER_PS
    begun = ~finished & (request[:, GENERATED] > 0) & (replica >= 0)
    sent = ~finished & ~begun & (replica >= 0)
    after_first_ps = floors.emitted_ps[prompt + output] - floors.emitted_ps[prompt + 1]

    first_ps = run.limits.ingress_ps + floors.prompt_ps[prompt]
    last_ps = first_ps + after_first_ps
    for r in range(len(event_ps)):
        mine = np.flatnonzero(sent & (replica == r))
        now_ps = _free_ps(run, r)
        computed = np.minimum(request[mine, COMPUTED], prompt[mine])
        work_ps = floors.work_ps[prompt[mine]] - floors.work_ps[computed]
        seen_ps = arrival_ps[mine] + run.limits.ingress_ps
        # First come first served: done[k] = max(done[k - 1], seen[k]) + work[k], unrolled.
        total_ps = np.cumsum(work_ps)
        if len(mine):
            start_ps = np.maximum.accumulate(seen_ps - (total_ps - work_ps))
            done_ps = total_ps + np.maximum(start_ps, now_ps)
            alone_ps = np.maximum(seen_ps, now_ps) + floors.prompt_ps[prompt[mine]]
            done_ps = np.where(computed == 0, np.maximum(done_ps, alone_ps), done_ps)
            first_ps[mine] = done_ps - arrival_ps[mine]
            last_ps[mine] = first_ps[mine] + after_first_ps[mine]
    some = np.flatnonzero(finished | begun)
    first_ps[some] = time_ps[some, FIRST_TOKEN] - arrival_ps[some]
    some = np.flatnonzero(finished)
    last_ps[some] = time_ps[some, FINISH] - arrival_ps[some]
    some = np.flatnonzero(begun)
    rest_ps = (
        floors.emitted_ps[prompt[some] + output[some]]
        - floors.emitted_ps[prompt[some] + request[some, GENERATED] + 1]
    )
    last_ps[some] = event_ps[replica[some]] + rest_ps - arrival_ps[some]

    known = arrival_ps != NEVER_PS
    ends_ps = arrival_ps[known] + last_ps[known]
    return Outcome(
        latencies(np.zeros_like(first_ps), first_ps, last_ps, run.workload.output_tokens),
        float(in_s(ends_ps.max() - arrival_ps[known].min())),
        plan.devices,
        exact=False,
        gaps=_gaps(run, floors) if with_gaps else None,
    )
