"""The plan space: what can be written down, and which rule excludes what cannot run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulator.plan import BatchingLimits, Plan
from simulator.units import GIB

if TYPE_CHECKING:
    from planner.problem import Problem

HEADS = "attention heads do not divide by tp"
FFN = "MLP width does not divide by tp"
KV_HEADS = "KV heads neither divide by tp nor are divided by it"
NODE = "tp is wider than a node"
COLLECTIVES = "no measured all-reduce at this tp"
BUDGET = "max_num_batched_tokens is below max_num_seqs"
DEVICES = "more devices than the pool has"
PACKING = "more replicas than fit into whole nodes"
WEIGHTS = "weights, activations and overhead exceed device memory"
KV_CACHE = "KV cache cannot hold one request of max_model_len"

RULES = (HEADS, FFN, KV_HEADS, NODE, COLLECTIVES, BUDGET, DEVICES, PACKING, WEIGHTS, KV_CACHE)
"""Rules in the order in which they are tried; a plan counts under the first that excludes it.

Sources: vLLM model_executor/models/llama.py (heads, KV heads), model_executor/layers/linear.py
(widths), config/scheduler.py (token budget), v1/core/kv_cache_utils.py (one full request)."""


@dataclass(frozen=True)
class Space:
    """Every plan of the grid: those that can run, and how many each rule excluded.

    Parameters
    ----------
    plans
        Plans that can run, in canonical tie order.
    excluded
        Plans excluded by rule, rules in order, zero counts left out.
    size
        All plans of the grid.
    """

    plans: tuple[Plan, ...]
    excluded: dict[str, int]
    size: int


def _launch_rule(
    problem: Problem, tp: int, limits: BatchingLimits, *, on_any_node: bool = False
) -> str | None:
    """The first rule of the engine that such a replica breaks whatever the memory."""
    model = problem.model
    for rule, broken in (
        (HEADS, model.num_heads % tp != 0),
        (FFN, model.intermediate_size % tp != 0),
        (KV_HEADS, model.num_kv_heads % tp != 0 and tp % model.num_kv_heads != 0),
        (NODE, tp > problem.devices_per_node and not on_any_node),
        (COLLECTIVES, tp not in problem.compiler.widths),
        (BUDGET, limits.max_num_batched_tokens < limits.max_num_seqs),
    ):
        if broken:
            return rule
    return None


def can_launch(
    problem: Problem, tp: int, limits: BatchingLimits, *, on_any_node: bool = False
) -> bool:
    """Whether the engine starts such a replica, memory and device counts aside.

    With ``on_any_node`` the width of the pool's own nodes does not count either.
    """
    return _launch_rule(problem, tp, limits, on_any_node=on_any_node) is None


def broken_rule(problem: Problem, plan: Plan) -> str | None:
    """The first rule that keeps ``plan`` from running, or ``None`` if it can."""
    rule = _launch_rule(problem, plan.tp, plan.limits)
    if rule is not None:
        return rule
    if plan.devices > problem.num_devices:
        return DEVICES
    if plan.replicas > problem.replicas_that_fit(plan.tp):
        return PACKING
    if problem.memory(plan.tp, plan.limits).num_blocks <= 0:
        return WEIGHTS
    held_tokens = problem.blocks(plan.tp, plan.limits) * problem.memory_rules.block_tokens
    return KV_CACHE if held_tokens < problem.max_model_len else None


def explain_rule(problem: Problem, plan: Plan, rule: str) -> str:
    """The figures behind a broken rule, for a person."""
    if rule == WEIGHTS:
        budget = problem.memory(plan.tp, plan.limits)
        return (
            f"needs {budget.fixed_bytes / GIB:.1f} GiB per device before any KV cache "
            f"(weights {budget.weight_bytes / GIB:.1f}, activations "
            f"{budget.activation_bytes / GIB:.1f}, overhead "
            f"{(budget.overhead_bytes + budget.graph_bytes) / GIB:.1f}); "
            f"{budget.usable_bytes / GIB:.1f} GiB are usable"
        )
    if rule == KV_CACHE:
        held = problem.blocks(plan.tp, plan.limits) * problem.memory_rules.block_tokens
        return f"KV cache holds {held} tokens; max_model_len is {problem.max_model_len}"
    if rule == DEVICES:
        return f"needs {plan.devices} devices; the pool has {problem.num_devices}"
    if rule == PACKING:
        return (
            f"a node of {problem.devices_per_node} devices holds "
            f"{problem.devices_per_node // plan.tp} of them; the pool holds "
            f"{problem.replicas_that_fit(plan.tp)}"
        )
    if rule == NODE:
        return f"tp is {plan.tp}; a node has {problem.devices_per_node} devices"
    if rule == BUDGET:
        limits = plan.limits
        return f"{limits.max_num_batched_tokens} tokens are below {limits.max_num_seqs} sequences"
    model = problem.model
    facts = {HEADS: model.num_heads, FFN: model.intermediate_size, KV_HEADS: model.num_kv_heads}
    return f"tp is {plan.tp}" + (f"; the model has {facts[rule]}" if rule in facts else "")


def enumerate_space(problem: Problem) -> Space:
    """List the grid of ``problem.space`` and sort plans from exclusions."""
    grid = problem.space
    excluded = dict.fromkeys(RULES, 0)
    plans: list[Plan] = []
    size = 0
    for tp in grid.tp:
        for seqs in grid.max_num_seqs:
            for tokens in grid.max_num_batched_tokens:
                for replicas in grid.replicas:
                    size += 1
                    plan = Plan(replicas, tp, BatchingLimits(seqs, tokens))
                    rule = broken_rule(problem, plan)
                    if rule is None:
                        plans.append(plan)
                    else:
                        excluded[rule] += 1
    plans.sort(key=lambda plan: plan.tie_key(problem.default_limits))
    return Space(tuple(plans), {rule: n for rule, n in excluded.items() if n}, size)
