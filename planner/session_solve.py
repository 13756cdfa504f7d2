"""What a session's worker does: find the best plan, and say whether the current one stays."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from planner.api import infeasible_report, report_of, search_summary
from planner.candidates import Candidate, Fate
from planner.errors import LimitError
from planner.search_result import SearchResult
from planner.session_search import SessionSearch

if TYPE_CHECKING:
    from collections.abc import Callable

    from planner.problem import Problem
    from planner.report import PlanReport
    from planner.scenario import Scenario
    from planner.session_search import Facts
    from planner.session_switching import Switching
    from simulator.plan import Plan
    from simulator.run import RunResult


@dataclass(frozen=True)
class Asked:
    """One question about a plan.

    Parameters
    ----------
    workload
        Key of rate and mix.
    scenario
        The scenario with them.
    rate, mix
        Requests per second, and the key of the mix alone.
    current
        The plan that runs now.

    """

    workload: str
    scenario: Scenario
    rate: float
    mix: str
    current: Plan | None

    @property
    def key(self) -> tuple[str, Plan | None]:
        """What its answer is remembered by."""
        return self.workload, self.current


@dataclass(frozen=True)
class Answer:
    """A report, the plan in it as a candidate, and the rate and mix that it is for."""

    report: PlanReport
    best: Candidate | None
    rate: float
    mix: str


def search(
    problem: Problem,
    asked: Asked,
    facts: Facts,
    first: Plan | None,
    so_far: Callable[[PlanReport], None],
) -> Answer:
    """The best plan, whatever runs now.

    Parameters
    ----------
    problem, asked
        The question, resolved and as it was put.
    facts
        What earlier searches have shown; this one adds to it.
    first
        A plan to simulate first: the current one, or the answer to the nearest rate.
    so_far
        Called with that plan's report where it keeps every constraint, before the search.

    Raises
    ------
    LimitError
        When the scenario's own limits stopped the search before any plan was found.

    """
    run, early = None, None
    if first is not None:
        run = problem.start(first, record_gaps=True).finish()
        candidate = _candidate(problem, first, run)
        if not candidate.broken:
            known = _found(problem, facts, candidate, stopped_by="time_limit")
            early = report_of(problem, known, candidate, search_summary(known), result=run)
            so_far(early)
    found = SessionSearch(problem, facts, first).run()
    if found.best is None:
        if not found.proved:
            raise LimitError(f"stopped by {found.stopped_by} before any plan was found")
        return Answer(infeasible_report(problem, found), None, asked.rate, asked.mix)
    is_first = found.best.plan == first
    report = report_of(
        problem,
        found,
        found.best,
        search_summary(found),
        result=run if is_first else None,
        metrics=dict(early.metrics) if is_first and early is not None else None,
        only_simulated=True,
    )
    return Answer(report, _without_run(found.best), asked.rate, asked.mix)


def stay_or_switch(
    problem: Problem, facts: Facts, switching: Switching, current: Plan, best: Answer
) -> Answer:
    """The current plan where the best one does not gain what the switch takes, else the best."""
    if best.best is None or best.best.plan == current:
        return best
    run = problem.start(current, record_gaps=True).finish()
    candidate = _candidate(problem, current, run)
    objective = problem.objective
    value, best_value = (objective.value(c.score[0]) for c in (candidate, best.best))
    needed = switching.needed_gain(current, best.best.plan)
    worse = _share_worse(value, best_value, maximize=objective.sense == "maximize")
    if candidate.broken or worse > needed:
        return best
    found = _found(problem, facts, candidate, best.best)
    report = report_of(problem, found, candidate, search_summary(found), result=run)
    text = problem.plan_text(best.best.plan)
    note = (
        f"kept: {text} is {100 * worse:.1f} % better; a switch to it must gain more than "
        f"{100 * needed:.1f} %"
    )
    report = replace(report, warnings=(*report.warnings, note))
    return Answer(report, _without_run(candidate), best.rate, best.mix)


def _found(
    problem: Problem,
    facts: Facts,
    chosen: Candidate,
    best: Candidate | None = None,
    stopped_by: str | None = None,
) -> SearchResult:
    """What is known where ``chosen`` was simulated, and ``best`` searched for."""
    return SearchResult(
        space=facts.space(problem),
        best=chosen,
        candidates=(chosen,) if best is None else (chosen, best),
        proved=False,
        bound=None if best is None else best.score[0],
        iterations=chosen.iterations,
        stopped_by=stopped_by,
        floors=None,
    )


def _candidate(problem: Problem, plan: Plan, run: RunResult) -> Candidate:
    """A plan that was simulated to the end."""
    outcome = problem.outcome(plan, run)
    return Candidate(
        plan,
        rank=0,
        score=problem.objective.score(outcome),
        exact=True,
        fate=Fate.SIMULATED,
        iterations=run.iterations,
        broken=tuple(c.name for c in problem.constraints if c.is_broken(outcome)),
    )


def _without_run(candidate: Candidate) -> Candidate:
    """The candidate without its simulation, which is as large as the workload."""
    return replace(candidate, result=None)


def _share_worse(value: float, best: float, *, maximize: bool) -> float:
    """By what share of ``best`` a value is worse; infinite against a best of 0."""
    larger, smaller = (best, value) if maximize else (value, best)
    if larger <= smaller:
        return 0.0
    return larger / smaller - 1 if smaller > 0 else math.inf


def unproved(report: PlanReport, note: str) -> PlanReport:
    """A report as one that a deadline cut short."""
    status = "infeasible" if report.plan is None else "feasible"
    warnings = (*report.warnings, note)
    return replace(
        report, status=status, bound=None, gap=None, deterministic=False, warnings=warnings
    )
