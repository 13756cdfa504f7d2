"""Whether a certificate's supports lie below the costs they speak of, at every batch size.

Shares no code with ``planner/support.py``, which found them: each claim is evaluated where it could
be wrong, by formulas of this module's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from simulator.rules import VLLM_V1

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from planner.problem import Problem
    from simulator.plan import BatchingLimits
    from simulator.rules import Rules
    from simulator.state import Limits
    from simulator.timing import IterationCost

    Ints = npt.NDArray[np.int64]

SLOPE_UNIT: Final = 1024
"""Slopes of support lines count in this part of a picosecond per token."""


def lowest_cost(costs: Sequence[IterationCost]) -> IterationCost:
    """The least of each value over the costs that have it."""
    fields = {}
    for name in costs[0]._fields:
        arrays = [np.asarray(getattr(cost, name)) for cost in costs]
        sizes = np.max([array.shape for array in arrays], axis=0)
        lowest = np.full(sizes, np.iinfo(np.int64).max)
        for array in arrays:
            part = tuple(slice(0, n) for n in array.shape)
            lowest[part] = np.minimum(lowest[part], array)
        fields[name] = lowest
    return costs[0]._replace(**fields)


def widest_limits(each: Sequence[Limits]) -> Limits:
    """Limits that none of ``each`` exceeds."""
    names = ("max_num_seqs", "max_num_batched_tokens", "num_blocks")
    return each[0]._replace(**{name: max(getattr(one, name) for one in each) for name in names})


def cached_context(limits: Limits, rules: Rules) -> int | None:
    """Most tokens that the KV blocks hold, where every token has a block of its own."""
    if rules.prefix_caching or limits.windowed or limits.fixed or not limits.growing:
        return None
    return limits.num_blocks // limits.growing * limits.block_tokens


def budgets_of(problem: Problem, members: Sequence[BatchingLimits]) -> list[int]:
    """Tokens of batches that cut a prompt; only vLLM's V1 scheduler cuts at the budget alone."""
    if problem.rules.policy != VLLM_V1:
        return []
    return sorted({limits.max_num_batched_tokens for limits in members})


def wrong_claim(
    support: Mapping[str, Any],
    cost: IterationCost,
    limits: Limits,
    rules: Rules,
    budgets: Sequence[int],
) -> str | None:
    """The first claim of ``support`` that does not hold for ``cost``, or ``None``."""
    for array in (cost.decode_ps, cost.mixed_ps, cost.sampled_ps, cost.prefill_ps):
        if np.any(np.diff(array) < 0):
            return "the cost falls as a batch grows"
    own = rules.policy == VLLM_V1
    budget = min(limits.max_num_batched_tokens, cost.max_tokens) if own else cost.max_tokens
    if support["budget_tokens"] != budget:
        return f"budget_tokens is {support['budget_tokens']}, not {budget}"
    if list(support["full_tokens"]) != list(budgets):
        return f"full_tokens is {support['full_tokens']}, not {list(budgets)}"
    if len(support["kinds"]) != len(cost.host_ps):
        return f"kinds lists {len(support['kinds'])} kinds of stage, not {len(cost.host_ps)}"
    seqs = min(limits.max_num_seqs, cost.max_seqs, cost.max_tokens)
    for kind, stage in enumerate(support["kinds"]):
        wrong = _wrong_stage(stage, cost, kind, budget) or _wrong_shares(
            stage, cost, kind, seqs, limits, rules
        )
        if wrong is not None:
            return f"kinds.{kind}.{wrong}"
    return _wrong_decode(support, cost, seqs, pays_again=not rules.prefix_caching)


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
        above = np.flatnonzero(slope * tokens + start_ps * SLOPE_UNIT > mixed_ps * SLOPE_UNIT)
        if len(above):
            return f"lines: [{slope}, {start_ps}] is above the cost of {above[0] + 1} tokens"
    above = np.flatnonzero(stage["work_ps"] * tokens > mixed_ps + stage["each_ps"])
    if len(above):
        return f"work_ps is above the cost of {above[0] + 1} tokens"
    return None


def _wrong_shares(
    stage: Mapping[str, Any],
    cost: IterationCost,
    kind: int,
    seqs: int,
    limits: Limits,
    rules: Rules,
) -> str | None:
    """Each share against every number of sequences, at both ends of every column of context."""
    work_ps = stage["work_ps"]
    room = cached_context(limits, rules)
    batches = np.arange(1, seqs + 1)
    most = batches * cost.max_context
    if room is not None:
        most = np.maximum(batches, np.minimum(most, room))
    for theta, phi in stage["shares"]:
        charged = f"shares: [{theta}, {phi}]"
        if min(theta, phi) < 0:
            return f"{charged} is negative"
        again = work_ps - theta * cost.max_context if rules.prefix_caching else work_ps
        if phi > again or not (rules.prefix_caching or (theta <= phi and 2 * theta <= work_ps)):
            return f"{charged} is above the cost of computing a context again"
        for column, knot in enumerate(cost.context_knots):
            beyond = column + 1 < len(cost.context_knots)
            following = cost.context_knots[column + 1] if beyond else cost.max_context + 1
            for held in (knot * batches, np.minimum(following * batches - 1, most)):
                seen = (held >= knot * batches) & (held <= most)
                slope_ps = cost.attention_slope_ps[kind, batches, column]
                attention_ps = cost.attention_ps[kind, batches, column]
                attention_ps = attention_ps + slope_ps * (held - knot * batches)
                alone_ps = cost.decode_ps[kind, batches] + attention_ps
                alone_ps = np.maximum(alone_ps, cost.decode_floor_ps[kind]) + cost.host_ps[kind]
                joined_ps = work_ps * batches + attention_ps - cost.attention_ps[kind, 0, 0]
                claimed_ps = theta * held + phi * batches
                above = np.flatnonzero(seen & (claimed_ps > np.minimum(alone_ps, joined_ps)))
                if len(above):
                    return f"{charged} is above the cost of {above[0] + 1} sequences"
    return None


def _wrong_decode(
    support: Mapping[str, Any], cost: IterationCost, seqs: int, *, pays_again: bool
) -> str | None:
    contexts, floors_ps = support["contexts"], support["decode_ps"]
    if contexts[0] != 1 or np.any(np.diff(contexts) <= 0) or len(contexts) != len(floors_ps):
        return "contexts do not ascend from 1, or differ in number from decode_ps"
    batches = np.arange(1, seqs + 1)
    own_ps = cost.decode_ps[0, 1] + cost.attention_ps[0, 0, 0]
    single = len(cost.stages) == 1
    pays = pays_again and single and np.diff(cost.prefill_ps[0]).max() <= own_ps
    kinds, counts = np.unique(cost.stages, return_counts=True)
    for context, floor_ps in zip(contexts, floors_ps, strict=True):
        decode_ps, again_ps = np.zeros(len(batches), np.int64), 0
        if not single:
            decode_ps = (len(cost.stages) - 1) * cost.send_ps[batches]
            again_ps = (len(cost.stages) - 1) * int(cost.send_ps[1])
        for kind, count in zip(kinds, counts, strict=True):
            always_ps = cost.host_ps[kind] + cost.sampled_ps[kind, 1]
            stage_ps = _decode_stage_ps(cost, int(kind), batches, context) + always_ps
            decode_ps = decode_ps + count * stage_ps
            alone_ps = cost.mixed_ps[kind, 1] + cost.attention_ps[kind, 0, 0]
            alone_ps += cost.prefill_ps[kind, context] * pays
            again_ps += int(count * (max(alone_ps, cost.mixed_floor_ps[kind]) + always_ps))
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
