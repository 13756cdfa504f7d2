"""Why nothing fits, and the smallest changes that would."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from planner.engine_settings import OWN_NAMES
from planner.objective import ITL, TICKS_PER_S, ExcessObjective
from planner.relaxations import (
    RELAXATION_ITERATIONS,
    conflicting_pins,
    less_load,
    more_devices,
    pins,
    text_of,
    verified,
    wider_nodes,
    wider_space,
)
from planner.search import Search
from planner.space import DEVICES, KV_CACHE, WEIGHTS, broken_rule, can_launch, explain_rule
from simulator.plan import BatchingLimits, Plan, Shape
from simulator.units import MS_PER_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from planner.objective import Constraint
    from planner.problem import Problem
    from planner.relaxations import Change
    from planner.scenario import Scenario
    from planner.space import Space


@dataclass(frozen=True)
class Infeasibility:
    """Why a scenario has no plan.

    Parameters
    ----------
    reason
        In words, with figures.
    conflict
        The scenario's fields that exclude one another: without any one of them there is a plan.
    changes
        Changes of fields by their path that were each solved, the nearest along each axis.
    exact
        Whether the first change is the smallest along its axis.
    deterministic
        Whether the same text comes out on every machine: not if a clock stopped a search.
    """

    reason: str
    conflict: tuple[str, ...]
    changes: tuple[Change, ...]
    exact: bool = True
    deterministic: bool = True

    @property
    def relaxation(self) -> str:
        """The changes in words."""
        if not self.changes:
            return "no change along one axis was found that fits"
        fits = "smallest change that fits" if self.exact else "a change that fits"
        return f"{fits}: {'; or '.join(map(text_of, self.changes))}"

    def to_dict(self) -> dict[str, Any]:
        """What a report has of it."""
        return {
            "reason": self.reason,
            "relaxation": self.relaxation,
            "conflict": list(self.conflict),
            "changes": [dict(change) for change in self.changes],
        }


def explain_slo(problem: Problem, scenario: Scenario) -> Infeasibility:
    """Where every plan that can run breaks an SLO.

    The plan that exceeds its worst-kept limit least is found with the same search, so the
    relaxation is the least common stretch of all limits under which some plan is feasible.

    A limit may stop that search; the nearest plan that it found then stands in, and where it
    found none, no such relaxation is named: that no plan meets the SLOs is proved all the same.
    """
    nearest = Search(problem, ExcessObjective(problem.constraints)).run()
    conflict = tuple(c.name for c in conflicting(problem))
    wider = wider_space(scenario, pins(scenario))
    others = chain(less_load(scenario), more_devices(scenario), wider)
    best = nearest.best
    if best is None:
        reason = "no plan meets the SLOs; the nearest was not found within the search's limits"
        return Infeasibility(
            reason, conflict, tuple(others), exact=False, deterministic=nearest.deterministic
        )
    gaps = any(c.metric == ITL for c in problem.constraints)
    outcome = problem.outcome(best.plan, problem.start(best.plan, record_gaps=gaps).finish())
    broken = [c for c in problem.constraints if c.is_broken(outcome)]
    figures = ", ".join(
        f"{c.name} {c.ticks(outcome) / _TICKS_PER_MS:.1f} ms against {c.limit_ms:g} ms"
        for c in broken
    )
    limits = {c.name: _round_up(c.ticks(outcome) / _TICKS_PER_MS) for c in broken}
    how_near = "the nearest" if nearest.proved else "the nearest found within the search's limits"
    reason = f"no plan meets the SLOs; {how_near}, {problem.plan_text(best.plan)}, has {figures}"
    if len(conflict) > 1:
        reason += f"; in conflict: {' and '.join(conflict)}"
    elif len(problem.constraints) > 1:
        reason += f"; {conflict[0]} alone cannot be met"
    return Infeasibility(
        reason,
        conflict,
        (limits, *others),
        exact=nearest.proved,
        deterministic=nearest.deterministic,
    )


def conflicting(problem: Problem) -> tuple[Constraint, ...]:
    """A smallest set of SLOs that no plan meets together: without any one of them some plan does.

    A deletion filter: each SLO in turn is left out for good where the others still conflict.
    """
    kept = problem.constraints
    for constraint in problem.constraints:
        others = tuple(c for c in kept if c is not constraint)
        if others and not _has_plan(problem, others):
            kept = others
    return kept


def _has_plan(problem: Problem, constraints: tuple[Constraint, ...]) -> bool:
    """Whether some plan meets ``constraints``; true also where that was not settled in time."""
    limits = replace(problem.search_limits, work_limit=RELAXATION_ITERATIONS)
    asked = replace(problem, search_limits=limits)
    found = Search(asked, ExcessObjective(constraints), constraints, any_plan=True).run()
    return found.best is not None or not found.proved


_TICKS_PER_MS: Final = TICKS_PER_S / MS_PER_S


def _round_up(value_ms: float) -> float:
    """``value_ms`` to the next tenth: a limit that the plan then meets."""
    return -(-value_ms * 10 // 1) / 10


def explain_empty_space(problem: Problem, space: Space, scenario: Scenario) -> Infeasibility:
    """Where no plan of the grid can run."""
    memory_plans = [
        plan for plan in _grid_shapes(problem) if broken_rule(problem, plan) in (WEIGHTS, KV_CACHE)
    ]
    if not memory_plans:
        counts = ", ".join(f"{n} by: {rule}" for rule, n in space.excluded.items())
        counts = counts or "no pool has devices for any shape"
        conflict = conflicting_pins(scenario)
        wider = wider_space(scenario, conflict)
        return Infeasibility(
            f"no plan of the grid can run ({counts})",
            conflict or ("cluster.pools", "model"),
            (*wider, *wider_nodes(scenario), *more_devices(scenario)),
        )
    # The plan that lacks least memory is the nearest to running.
    plan = min(memory_plans, key=lambda p: (_missing_bytes(problem, p), p.devices))
    rule = broken_rule(problem, plan) or ""
    reason = (
        f"no plan fits into memory; the nearest, {problem.plan_text(plan)}: "
        f"{explain_rule(problem, plan, rule)}"
    )
    own = "engine.num_gpu_blocks" if problem.num_blocks is not None else "cluster.pools"
    conflict = (own, "model.max_model_len" if rule == KV_CACHE else "model.config")
    pinned = conflicting_pins(scenario)
    changes = list(verified(scenario, _memory_changes(problem, scenario, plan)))
    changes += [one for one in wider_space(scenario, pinned) if one not in changes]
    return Infeasibility(reason, (*conflict, *pinned), tuple(changes))


def _grid_shapes(problem: Problem) -> list[Plan]:
    """One replica of every class of the grid that has enough devices."""
    grid = problem.space
    plans = [
        Plan(grid.replicas[0], shape, BatchingLimits(seqs, tokens))
        for shape in grid.shapes
        for seqs in grid.max_num_seqs
        for tokens in grid.max_num_batched_tokens
    ]
    return [plan for plan in plans if broken_rule(problem, plan) != DEVICES]


def _missing_bytes(problem: Problem, plan: Plan) -> int:
    needed = problem.needed_bytes(plan.shape, plan.limits)
    return needed - problem.memory(plan.shape, plan.limits).usable_bytes


def _memory_changes(problem: Problem, scenario: Scenario, plan: Plan) -> Iterator[Change]:
    """Changes that would each make room for ``plan``, or for a wider one, smallest first."""
    held = problem.layout(plan.shape).longest(problem.blocks(plan.shape, plan.limits))
    longest = int((problem.workload.prompt_tokens + problem.workload.output_tokens).max())
    if held is not None and held >= longest:
        yield {"model.max_model_len": held}
    if problem.num_blocks is not None:  # measured: it grows neither with memory nor with devices
        yield {"engine.num_gpu_blocks": problem.full_request_blocks(plan.shape)}
        return
    pool = problem.pool_of(plan.shape)
    share = problem.needed_bytes(plan.shape, plan.limits) / pool.device.memory_bytes
    if share <= 1.0 and pool.memory_rules.accounting == "share_of_device":
        setting = OWN_NAMES[problem.engine.name]["memory_fraction"]
        yield {f"engine.{setting}": -(-share * 1000 // 1) / 1000}
    index = list(problem.pools).index(plan.shape.device)
    for tp in pool.compiler.widths:
        wide = Shape(tp, plan.shape.pp, device=plan.shape.device)
        if tp <= plan.shape.tp or _missing_bytes(problem, Plan(1, wide, plan.limits)) > 0:
            continue
        if can_launch(problem, wide, plan.limits, on_any_node=True):
            stated = scenario.search.space.tp
            change: dict[str, Any] = {}
            if stated is not None and tp not in stated:
                change["search.space.tp"] = sorted({*stated, tp})
            if wide.devices > min(pool.devices_per_node, pool.num_devices):
                change[f"cluster.pools.{index}.devices_per_node"] = wide.devices
            yield change
            break
    if scenario.model.weight_dtype in (None, "bf16") and pool.device.flops("fp8") > 0:
        yield {"model.weight_dtype": "fp8"}
