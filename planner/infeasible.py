"""Why nothing fits, and the smallest change that would."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from planner.engine_settings import OWN_NAMES
from planner.errors import InputError
from planner.objective import ITL, TICKS_PER_S, ExcessObjective
from planner.resolve import resolve
from planner.scenario import Scenario
from planner.search import Search
from planner.space import DEVICES, KV_CACHE, WEIGHTS, broken_rule, can_launch, explain_rule
from simulator.plan import BatchingLimits, Plan, Shape
from simulator.units import GIB, MS_PER_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from planner.objective import Constraint
    from planner.problem import Problem
    from planner.space import Space


def explain_slo(problem: Problem, scenario: Scenario) -> tuple[str, str, bool]:
    """Reason and relaxations where every plan that can run breaks an SLO.

    The plan that exceeds its worst-kept limit least is found with the same search, so the
    relaxation is the least common stretch of all limits under which some plan is feasible.

    A limit may stop that search; the nearest plan that it found then stands in, and where it
    found none, no relaxation is named: that no plan meets the SLOs is proved all the same. The
    last value says whether the text is the same on every machine: not if a clock stopped it.
    """
    nearest = Search(problem, ExcessObjective(problem.constraints)).run()
    best = nearest.best
    if best is None:
        unknown = "the nearest was not found within the search's limits"
        return "no plan meets the SLOs", unknown, nearest.deterministic
    gaps = any(c.metric == ITL for c in problem.constraints)
    result = problem.start(best.plan, record_gaps=gaps).finish()
    outcome = problem.outcome(best.plan, result)
    broken = [c for c in problem.constraints if c.is_broken(outcome)]
    figures = ", ".join(
        f"{c.name} {c.ticks(outcome) / _TICKS_PER_MS:.1f} ms against {c.limit_ms:g} ms"
        for c in broken
    )
    changes = ", ".join(
        f"{c.name}: {_round_up(c.ticks(outcome) / _TICKS_PER_MS):.1f}" for c in broken
    )
    how_near = "the nearest" if nearest.proved else "the nearest found within the search's limits"
    reason = f"no plan meets the SLOs; {how_near}, {problem.plan_text(best.plan)}, has {figures}"
    conflict = conflicting(problem)
    if len(conflict) > 1:
        reason += f"; in conflict: {' and '.join(c.name for c in conflict)}"
    elif len(problem.constraints) > 1:
        reason += f"; {conflict[0].name} alone cannot be met"
    fits = "smallest change that fits" if nearest.proved else "a change that fits"
    others = "".join(f"; or {change}" for change in other_axes(scenario))
    return reason, f"{fits}: {changes}{others}", nearest.deterministic


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
    limits = replace(problem.search_limits, work_limit=_RELAXATION_ITERATIONS)
    asked = replace(problem, search_limits=limits)
    found = Search(asked, ExcessObjective(constraints), constraints, any_plan=True).run()
    return found.best is not None or not found.proved


def other_axes(scenario: Scenario) -> tuple[str, ...]:
    """Changes of rate and of devices that each make some plan feasible, solved to be sure."""
    changes = []
    rate = scenario.workload.request_rate
    if rate is not None:
        lower = _least(lambda n: _is_feasible(scenario, rate=rate * (1 - n / _RATE_STEPS)))
        if lower is not None:
            changes.append(f"workload.request_rate: {_rate(rate, lower):g}")
    nodes = scenario.cluster.pools[0].nodes
    more = _least(lambda n: _is_feasible(scenario, nodes=nodes + n))
    if more is not None:
        changes.append(f"cluster.pools.0.nodes: {nodes + more}")
    return tuple(changes)


def _rate(rate: float, steps: int) -> float:
    """``rate`` less so many steps, in digits that a person would write."""
    return float(f"{rate * (1 - steps / _RATE_STEPS):.4g}")


def _least(is_enough: Callable[[int], bool]) -> int | None:
    """The least of 1 .. ``_RATE_STEPS - 1`` that is enough, found by doubling and bisection.

    Where being enough is not monotone, it is one that is, below which the last one tried is not.
    """
    low, high = 0, 1
    while not is_enough(high):
        low, high = high, 2 * high
        if high >= _RATE_STEPS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _is_feasible(
    scenario: Scenario, *, rate: float | None = None, nodes: int | None = None
) -> bool:
    """Whether the scenario with another rate or number of nodes has a plan, by solving it."""
    data = scenario.model_dump(mode="json", exclude_none=True)
    if rate is not None:
        data["workload"]["request_rate"] = float(f"{rate:.4g}")
    if nodes is not None:
        data["cluster"]["pools"][0]["nodes"] = nodes
    try:
        changed = Scenario.model_validate(data, base_dir=scenario.base_dir, source=scenario.source)
        problem = resolve(changed)
    except InputError:  # such as a second node without a network to it
        return False
    limits = replace(problem.search_limits, work_limit=_RELAXATION_ITERATIONS)
    asked = replace(problem, search_limits=limits)
    excess = ExcessObjective(problem.constraints)
    return Search(asked, excess, problem.constraints, any_plan=True).run().best is not None


_RELAXATION_ITERATIONS: Final = 1_000_000
"""Iterations that each question about a changed scenario may take: seconds."""

_RATE_STEPS: Final = 16
"""Parts of the request rate in which a lower one is looked for, and nodes that may be added."""

_TICKS_PER_MS = TICKS_PER_S / MS_PER_S


def _round_up(value_ms: float) -> float:
    """``value_ms`` to the next tenth: a limit that the plan then meets."""
    return -(-value_ms * 10 // 1) / 10


def explain_empty_space(problem: Problem, space: Space) -> tuple[str, str]:
    """Reason and relaxation where no plan of the grid can run."""
    memory_plans = [
        plan for plan in _grid_shapes(problem) if broken_rule(problem, plan) in (WEIGHTS, KV_CACHE)
    ]
    if not memory_plans:
        counts = ", ".join(f"{n} by: {rule}" for rule, n in space.excluded.items())
        return f"no plan of the grid can run ({counts})", _widen(problem)
    # The plan that lacks least memory is the nearest to running.
    plan = min(memory_plans, key=lambda p: (_missing_bytes(problem, p), p.devices))
    rule = broken_rule(problem, plan) or ""
    reason = (
        f"no plan fits into memory; the nearest, {problem.plan_text(plan)}: "
        f"{explain_rule(problem, plan, rule)}"
    )
    return reason, "smallest change that fits: " + "; or ".join(_memory_changes(problem, plan))


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


def _memory_changes(problem: Problem, plan: Plan) -> list[str]:
    """Changes that would each make ``plan`` fit, smallest first."""
    changes = []
    held = problem.layout(plan.shape).longest(problem.blocks(plan.shape, plan.limits))
    longest = int((problem.workload.prompt_tokens + problem.workload.output_tokens).max())
    if held is not None and held >= longest:
        changes.append(f"model.max_model_len: {held} (the longest request has {longest} tokens)")
    if problem.num_blocks is not None:  # measured: it grows neither with memory nor with devices
        changes.append(f"engine.num_gpu_blocks: {problem.full_request_blocks(plan.shape)}")
        return changes
    pool = problem.pool_of(plan.shape)
    share = problem.needed_bytes(plan.shape, plan.limits) / pool.device.memory_bytes
    if share <= 1.0 and pool.memory_rules.accounting == "share_of_device":
        setting = OWN_NAMES[problem.engine.name]["memory_fraction"]
        changes.append(f"engine.{setting}: {-(-share * 1000 // 1) / 1000:g}")
    for tp in pool.compiler.widths:
        wide = Shape(tp, device=plan.shape.device)
        fits = _missing_bytes(problem, Plan(1, wide, plan.limits)) <= 0
        wider = tp > plan.shape.width
        if wider and fits and can_launch(problem, wide, plan.limits, on_any_node=True):
            there = tp <= min(pool.devices_per_node, pool.num_devices)
            widen = f"{tp} in search.space.tp"
            changes.append(widen if there else f"a pool of {tp} devices in one node, for tp{tp}")
            break
    if not changes:
        missing = _missing_bytes(problem, plan) / GIB
        changes.append(f"{missing:.1f} GiB more per device, or a smaller dtype")
    return changes


def _widen(problem: Problem) -> str:
    pools = problem.pools.values()
    widths = ", ".join(map(str, sorted({tp for pool in pools for tp in pool.compiler.widths})))
    devices = " or ".join(str(pool.num_devices) for pool in pools)
    return (
        f"widen search.space: tp of {widths} that divides the model's heads, replicas that fit "
        f"{devices} devices, max_num_batched_tokens of at least max_num_seqs"
    )
