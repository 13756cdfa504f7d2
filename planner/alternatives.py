"""The runners-up of an answer, each simulated to its end."""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING, Final

from planner.layouts import is_theoretical
from planner.objective import needs_gaps
from planner.report import Alternative
from planner.uncertainty import TooClose, too_close
from simulator.plan import parse_plan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from planner.candidates import Candidate
    from planner.problem import Problem
    from planner.search_result import SearchResult
    from simulator.plan import Plan, Shape

_MAX_ALTERNATIVES: Final = 6
"""Runners-up in a report."""


def alternatives_of(
    problem: Problem, found: SearchResult, best: Candidate, *, only_simulated: bool = False
) -> tuple[Alternative, ...]:
    """The most promising plan of every other shape, and the chosen shape with engine defaults.

    Where the defaults are not in the space, or are what was chosen, the next best limits of the
    chosen shape stand in.
    A shape's plan is the first in the order of what is known of it; where that is only a bound,
    it is simulated now, so that every value shown is one. A search that a limit stopped lists
    only what it had simulated.
    """
    objective = problem.objective
    chosen_value = objective.value(best.score[0])
    shapes: dict[tuple[int, Shape], Candidate] = {}
    may_simulate = found.stopped_by is None and not only_simulated

    def order(candidate: Candidate) -> tuple[bool, bool, object]:
        default = candidate.plan.limits == problem.pool_of(candidate.plan.shape).default_limits
        chosen_shape = candidate.plan.same_devices(best.plan)
        return not (default and chosen_shape), bool(candidate.broken), candidate.key

    for candidate in sorted(found.candidates, key=order):
        same_as_best = candidate.twin == best.plan or candidate.plan == best.plan
        if not same_as_best and (candidate.exact or may_simulate):
            shapes.setdefault((candidate.plan.replicas, candidate.plan.shape), candidate)
    return tuple(
        Alternative(
            id=problem.plan_text(plan),
            devices=plan.devices,
            value=value,
            loss_pct=loss_pct,
            breaks=broken,
            theoretical=is_theoretical(problem, plan.shape),
        )
        for plan, value, loss_pct, broken in _nearest(problem, shapes.values(), chosen_value)
    )


def _nearest(
    problem: Problem, candidates: Iterable[Candidate], chosen_value: float
) -> list[tuple[Plan, float, float, tuple[str, ...]]]:
    """The best candidates with value, loss in percent and broken constraints, each simulated.

    In order of what is known of them, until no bound left could come before those found.
    """
    objective = problem.objective
    with_gaps = needs_gaps(objective, problem.constraints)
    found: list[tuple[bool, float, str, Plan, float, tuple[str, ...]]] = []

    def loss_pct(primary: int) -> float:
        value = objective.value(primary)
        worse = chosen_value - value if objective.sense == "maximize" else value - chosen_value
        return 100.0 * worse / chosen_value if chosen_value else 0.0

    for candidate in sorted(candidates, key=lambda c: (bool(c.broken), c.score[0], c.rank)):
        least = bool(candidate.broken), loss_pct(candidate.score[0])
        if len(found) >= _MAX_ALTERNATIVES and found[_MAX_ALTERNATIVES - 1][:2] < least:
            break
        primary, broken, plan = candidate.score[0], candidate.broken, candidate.plan
        if not candidate.exact:
            result = problem.start(plan, record_gaps=with_gaps).finish()
            outcome = problem.outcome(plan, result)
            primary = objective.score(outcome)[0]
            broken = tuple(c.name for c in problem.constraints if c.is_broken(outcome))
        row = (
            bool(broken),
            loss_pct(primary),
            problem.plan_text(plan),
            plan,
            objective.value(primary),
            broken,
        )
        insort(found, row, key=lambda row: row[:3])
    return [(plan, value, loss, broken) for _, loss, _, plan, value, broken in found][
        :_MAX_ALTERNATIVES
    ]


def close_runner_up(
    problem: Problem,
    best: tuple[Plan, float],
    alternatives: tuple[Alternative, ...],
    metrics: dict[str, float],
) -> TooClose | None:
    """The best plan of another shape that meets every constraint, where it is inside the noise."""
    for other in alternatives:
        if not other.breaks:
            runner_up = parse_plan(other.id, problem.default_limits)
            if not runner_up.same_devices(best[0]):
                return too_close(problem, best, (runner_up, other.value), metrics)
    return None
