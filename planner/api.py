"""The library's calls: a scenario in, a report out; no printing, no global state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from planner.alternatives import alternatives_of, close_runner_up
from planner.candidates import Candidate, Fate
from planner.certificate import certificate, to_text
from planner.errors import InfeasibleError, InputError, LimitError, RefusalError
from planner.infeasible import explain_empty_space, explain_slo
from planner.provenance import operator_labels, provenance_of, warnings_of
from planner.report import (
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
from planner.uncertainty import metrics_interval
from simulator.plan import parse_plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from planner.problem import Problem
    from planner.scenario import Scenario
    from planner.search_result import Progress, SearchResult
    from simulator.plan import Plan
    from simulator.run import RunResult
    from simulator.workload import Workload


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
    alternatives = alternatives_of(problem, found, best, only_simulated=only_simulated)
    close = close_runner_up(problem, (plan, value), alternatives, metrics)
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


def _gap(value: float, bound: float | None) -> float | None:
    if bound is None:
        return None
    return abs(value - bound) / value if value else 0.0


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
    if scenario is not None:
        why = (
            explain_slo(problem, scenario)
            if found.space.plans
            else explain_empty_space(problem, found.space, scenario)
        )
        infeasible, deterministic = why.to_dict(), why.deterministic
    else:
        what = "meets the SLOs" if found.space.plans else "of the grid can run"
        infeasible, deterministic = (
            {
                "reason": f"no plan {what}",
                "relaxation": "planner solve says which change would fit",
            },
            True,
        )
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
        infeasible=infeasible,
        deterministic=deterministic,
    )
