"""The library's calls: a scenario in, a report out; no printing, no global state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from planner.candidates import Candidate, Fate
from planner.certificate import certificate, to_text
from planner.errors import InfeasibleError, InputError, LimitError, RefusalError
from planner.infeasible import explain_empty_space, explain_slo
from planner.layouts import is_theoretical
from planner.objective import needs_gaps
from planner.provenance import operator_labels, provenance_of, warnings_of
from planner.report import (
    Alternative,
    ObjectiveSummary,
    PlanReport,
    PlanSummary,
    SearchSummary,
    SimulationReport,
    run_metrics,
)
from planner.resolve import resolve
from planner.search import Search
from planner.space import KV_CACHE, WEIGHTS, broken_rule, explain_rule
from planner.uncertainty import TooClose, metrics_interval, too_close
from simulator.plan import parse_plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from planner.problem import Problem
    from planner.scenario import Scenario
    from planner.search_result import Progress, SearchResult
    from simulator.plan import Plan, Shape
    from simulator.run import RunResult
    from simulator.workload import Workload

_MAX_ALTERNATIVES: Final = 6
"""Runners-up in a report."""


def solve(
    scenario: Scenario,
    *,
    exhaustive: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    on_certificate: Callable[[str], None] | None = None,
    warm_start: str | None = None,
) -> PlanReport:
    """Find the best plan and prove it.

    Parameters
    ----------
    scenario
        What to plan for.
    exhaustive
        Also simulate every plan to the end and compare.
    on_progress
        Called as plans are settled.
    on_certificate
        Called with the certificate's text, which ``planner verify`` checks.
    warm_start
        Text of a plan to simulate first, such as an earlier answer; one that is not in the space
        changes nothing.

    Returns
    -------
    PlanReport
        With status ``optimal``, ``feasible`` (a limit stopped the search) or ``infeasible``.

    Raises
    ------
    InputError
        When the scenario is bad.
    LimitError
        When a limit stopped the search before any plan was found.
    """
    problem = resolve(scenario)
    found = Search(
        problem,
        problem.objective,
        problem.constraints,
        on_progress=on_progress,
        first=None if warm_start is None else parse_plan(warm_start, problem.default_limits),
    ).run()
    if on_certificate is not None and (found.best is not None or found.proved):
        on_certificate(to_text(certificate(scenario, problem, found)))
    if found.best is None:
        if not found.proved:
            raise LimitError(
                f"stopped by {found.stopped_by} before any plan was found; raise "
                "search.time_limit_s or search.work_limit"
            )
        return infeasible_report(problem, found, scenario)
    summary = search_summary(found)
    if exhaustive:
        summary = replace(summary, exhaustive=_exhaust(problem, found, on_progress))
    return report_of(problem, found, found.best, summary)


@dataclass(frozen=True)
class Simulation:
    """A simulated plan, request by request.

    Parameters
    ----------
    report
        The answer of :func:`simulate`.
    workload
        The requests, in order of arrival.
    result
        Times of each request in the same order; with ``result.log``, if asked for, what every
        iteration did.
    """

    report: SimulationReport
    workload: Workload
    result: RunResult


def simulate(scenario: Scenario, plan_text: str) -> SimulationReport:
    """Simulate one plan; raises as :func:`simulate_requests` does."""
    return simulate_requests(scenario, plan_text).report


def simulate_requests(
    scenario: Scenario, plan_text: str, *, record_iterations: bool = False
) -> Simulation:
    """Simulate one plan and keep what became of every request.

    Parameters
    ----------
    scenario, plan_text
        The workload and the plan, for example ``2xtp4:seqs=256``.
    record_iterations
        Whether to keep what every iteration did, too.

    Raises
    ------
    InputError
        When the scenario or the plan's text is bad.
    RefusalError
        When the engine cannot launch the plan.
    InfeasibleError
        When the plan does not fit into memory.
    """
    problem = resolve(scenario)
    try:
        plan = parse_plan(plan_text, problem.default_limits)
    except ValueError as error:
        raise InputError(
            source="--plan", field="", value=plan_text, rule=f"is not a plan: {error}"
        ) from None
    _require_compiled(problem, plan)
    rule = broken_rule(problem, plan)
    if rule is not None:
        text = f"plan {plan_text}: {rule}: {explain_rule(problem, plan, rule)}"
        if rule in (WEIGHTS, KV_CACHE):
            raise InfeasibleError(text, "")
        raise RefusalError(text)
    run = problem.start(plan, record_gaps=True)
    if record_iterations:
        run.record_iterations()
    result = run.finish()
    outcome = problem.outcome(plan, result)
    labels = operator_labels(problem, plan, result)
    metrics = run_metrics(problem, plan, result)
    report = SimulationReport(
        plan=PlanSummary.of(problem, plan),
        metrics=metrics,
        metrics_interval=metrics_interval(problem, plan, metrics),
        breaks=tuple(c.name for c in problem.constraints if c.is_broken(outcome)),
        provenance=provenance_of(problem, plan, result, labels),
        warnings=warnings_of(problem, plan, labels),
    )
    return Simulation(report, problem.workload, result)


def _require_compiled(problem: Problem, plan: Plan) -> None:
    """Refuse limits beyond what the scenario's own space lets the planner compile."""
    largest = problem.pool_of(plan.shape).compiler.max_limits
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        value, most = getattr(plan.limits, name), getattr(largest, name)
        if value > most:
            raise RefusalError(
                f"plan {problem.plan_text(plan)}: {name} is {value}; the scenario's "
                f"search.space.{name} ends at {most}"
            )


def report_of(
    problem: Problem,
    found: SearchResult,
    best: Candidate,
    summary: SearchSummary,
    *,
    result: RunResult | None = None,
    metrics: dict[str, float] | None = None,
    only_simulated: bool = False,
) -> PlanReport:
    """Report of a plan that a search found.

    Parameters
    ----------
    problem, found, best, summary
        What was searched, what was found, the plan to report and how it was reached.
    result
        The plan's run with the gaps between tokens, where there is one.
    metrics
        The metrics of that run, where they are known.
    only_simulated
        Whether to list just those runners-up that the search simulated to the end; left out, a
        runner-up that is known by its bound is simulated for the report.

    """
    objective = problem.objective
    plan = best.plan
    if result is None:
        # Run again with the gaps between tokens recorded, which the search has no use for.
        result = problem.start(plan, record_gaps=True).finish()
    labels = operator_labels(problem, plan, result)
    value = objective.value(best.score[0])
    bound = None if found.bound is None else objective.value(found.bound)
    if metrics is None:
        metrics = run_metrics(problem, plan, result)
    alternatives = _alternatives(problem, found, best, only_simulated=only_simulated)
    close = _close_runner_up(problem, (plan, value), alternatives, metrics)
    return PlanReport(
        status="optimal" if found.proved else "feasible",
        plan=PlanSummary.of(problem, plan),
        objective=ObjectiveSummary(
            objective.name, objective.sense, value, objective.unit, objective.tie_break
        ),
        bound=bound,
        gap=_gap(value, bound),
        metrics=metrics,
        metrics_interval=metrics_interval(problem, plan, metrics),
        too_close=close,
        alternatives=alternatives,
        search=summary,
        provenance=provenance_of(problem, plan, result, labels),
        warnings=(
            *warnings_of(problem, plan, labels),
            *((close.warning(problem.plan_text(plan)),) if close else ()),
        ),
        deterministic=found.deterministic,
    )


def _close_runner_up(
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


def _gap(value: float, bound: float | None) -> float | None:
    if bound is None:
        return None
    return abs(value - bound) / value if value else 0.0


def _alternatives(
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
    with_gaps = needs_gaps(objective, problem.constraints)
    may_simulate = found.stopped_by is None and not only_simulated

    def order(candidate: Candidate) -> tuple[bool, bool, object]:
        default = candidate.plan.limits == problem.pool_of(candidate.plan.shape).default_limits
        chosen_shape = candidate.plan.same_devices(best.plan)
        return not (default and chosen_shape), bool(candidate.broken), candidate.key

    for candidate in sorted(found.candidates, key=order):
        same_as_best = candidate.twin == best.plan or candidate.plan == best.plan
        if not same_as_best and (candidate.exact or may_simulate):
            shapes.setdefault((candidate.plan.replicas, candidate.plan.shape), candidate)
    rows = []
    for candidate in shapes.values():
        score, broken = candidate.score, candidate.broken
        if not candidate.exact:
            result = problem.start(candidate.plan, record_gaps=with_gaps).finish()
            outcome = problem.outcome(candidate.plan, result)
            score = objective.score(outcome)
            broken = tuple(c.name for c in problem.constraints if c.is_broken(outcome))
        value = objective.value(score[0])
        worse = chosen_value - value if objective.sense == "maximize" else value - chosen_value
        rows.append(
            Alternative(
                id=problem.plan_text(candidate.plan),
                devices=candidate.plan.devices,
                value=value,
                loss_pct=100.0 * worse / chosen_value if chosen_value else 0.0,
                breaks=broken,
                theoretical=is_theoretical(problem, candidate.plan.shape),
            )
        )
    rows.sort(key=lambda row: (bool(row.breaks), row.loss_pct, row.id))
    return tuple(rows[:_MAX_ALTERNATIVES])


def search_summary(found: SearchResult) -> SearchSummary:
    """How an answer was reached."""
    return SearchSummary(
        space=found.space.size,
        feasible=len(found.space.plans),
        excluded_by_rule=found.space.excluded,
        excluded_by_bound=found.count(Fate.BOUNDED),
        aborted=found.count(Fate.ABORTED),
        identical=found.count(Fate.IDENTICAL),
        simulated=found.count(Fate.SIMULATED),
        breaks_slo=found.count(Fate.BREAKS_SLO),
        iterations=found.iterations,
    )


def _exhaust(
    problem: Problem, found: SearchResult, on_progress: Callable[[Progress], None] | None
) -> dict[str, Any]:
    """Simulate every plan to the end and compare with what the search found."""
    every = Search(
        problem,
        problem.objective,
        problem.constraints,
        exhaustive=True,
        on_progress=on_progress,
    ).run()
    distinct: dict[str, int] = {}
    for candidate in every.candidates:
        if candidate.result is not None:
            distinct[candidate.result.trajectory_hash()] = candidate.iterations
    mine, theirs = found.best, every.best
    return {
        "complete": every.proved,
        "iterations": every.iterations,
        "distinct_iterations": sum(distinct.values()),
        "search_share": found.iterations / max(1, sum(distinct.values())),
        "best": None if theirs is None else problem.plan_text(theirs.plan),
        "agrees": mine is not None
        and theirs is not None
        and (mine.plan, mine.score) == (theirs.plan, theirs.score),
    }


def infeasible_report(
    problem: Problem, found: SearchResult, scenario: Scenario | None = None
) -> PlanReport:
    """Report of a search that proved that no plan is feasible.

    With ``scenario`` the nearest plan and the changes that would fit are searched for, which takes
    as long as many solves.
    """
    deterministic = True
    if found.space.plans and scenario is None:
        reason, relaxation = "no plan meets the SLOs", "planner solve says which change would fit"
    elif found.space.plans and scenario is not None:
        reason, relaxation, deterministic = explain_slo(problem, scenario)
    else:
        reason, relaxation = explain_empty_space(problem, found.space)
    return PlanReport(
        status="infeasible",
        plan=None,
        objective=None,
        bound=None,
        gap=None,
        metrics={},
        alternatives=(),
        search=search_summary(found),
        provenance=problem.provenance,
        warnings=problem.warnings,
        infeasible={"reason": reason, "relaxation": relaxation},
        deterministic=deterministic,
    )
