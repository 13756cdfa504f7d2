"""Why not that plan: its value or bound against the best, where its time goes, what binds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from planner.api import simulate_requests
from planner.candidates import Fate
from planner.compare import Comparison, compare_sides, side_of
from planner.errors import LimitError
from planner.layouts import is_theoretical
from planner.operators import operator_times_ms
from planner.plan_text import read_plan
from planner.resolve import resolve
from planner.search import Search
from planner.space import broken_rule, explain_rule

if TYPE_CHECKING:
    from planner.candidates import Candidate
    from planner.problem import Problem
    from planner.scenario import Scenario
    from simulator.plan import Plan
    from simulator.run import Usage

_SETTLED: Final = {
    Fate.BOUNDED: "its bound alone ruled it out; the search never simulated it",
    Fate.ABORTED: "its simulation was stopped once its bound passed the best plan's value",
    Fate.SIMULATED: "it was simulated to the end",
    Fate.IDENTICAL: "it runs exactly as a plan that was simulated; the limits that differ never "
    "bind",
    Fate.BREAKS_SLO: "it was proved to break an SLO",
    Fate.OPEN: "the search stopped before it was settled",
}


@dataclass(frozen=True)
class LimitUse:
    """One limit of a replica: the most that a run used of it, and whether it held anything back."""

    name: str
    limit: int
    peak: int
    binds: bool


@dataclass(frozen=True)
class Explanation:
    """Why a plan is not the best, or that it is.

    Parameters
    ----------
    plan, best
        The plan asked about and the best one; ``best`` is ``None`` where no plan is feasible.
    verdict
        One line for a person.
    cannot_run
        The rule that keeps the plan from running, with its figures; ``None`` if it can, and the
        fields below are empty if it cannot.
    settled
        How the search dealt with it; ``None`` for a plan outside the searched space.
    bound
        What the search knew of its objective, a value or a bound, in the objective's unit.
    breaks
        Constraints that it breaks.
    comparison
        The best plan and this one, quantity by quantity.
    operators
        Milliseconds of each operator in a mean iteration, of the best plan and this one.
    limits
        What a replica of it used of its limits.
    """

    plan: str
    best: str | None
    verdict: str
    cannot_run: str | None = None
    settled: str | None = None
    bound: float | None = None
    breaks: tuple[str, ...] = ()
    comparison: Comparison | None = None
    operators: tuple[tuple[str, float, float], ...] = ()
    limits: tuple[LimitUse, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data; operators by name."""
        data = asdict(self)
        data["operators"] = {
            name: {"best_ms": best, "plan_ms": own} for name, best, own in self.operators
        }
        return data


def explain(scenario: Scenario, plan_text: str) -> Explanation:
    """Solve ``scenario`` and hold a plan against the best.

    Parameters
    ----------
    scenario, plan_text
        The scenario, and the plan asked about.

    Raises
    ------
    InputError
        When the scenario or the plan's text is bad.
    LimitError
        When a limit stopped the search before any plan was found.

    """
    problem = resolve(scenario)
    plan = read_plan(problem, plan_text)
    text = problem.plan_text(plan)
    rule = broken_rule(problem, plan)
    if rule is not None:
        reason = f"{rule}: {explain_rule(problem, plan, rule)}"
        return Explanation(text, None, f"{text} cannot run: {reason}", cannot_run=reason)
    found = Search(problem, problem.objective, problem.constraints).run()
    if found.best is None and not found.proved:
        raise LimitError(f"stopped by {found.stopped_by} before any plan was found")
    known = next((c for c in found.candidates if c.plan == plan), None)
    return _hold_against(scenario, problem, plan, known, found.best)


def _hold_against(
    scenario: Scenario,
    problem: Problem,
    plan: Plan,
    known: Candidate | None,
    best: Candidate | None,
) -> Explanation:
    """The plan simulated, beside the best where there is one."""
    objective, text = problem.objective, problem.plan_text(plan)
    own = simulate_requests(scenario, text)
    value = objective.value(objective.score(problem.outcome(plan, own.result))[0])
    times = operator_times_ms(problem, plan, own.result)
    settled = None if known is None else _SETTLED[known.fate]
    bound = None if known is None else objective.value(known.score[0])
    limits = _limits(problem, plan, own.result.usage)
    if best is None:
        comparison, operators = None, tuple((name, 0.0, ms) for name, ms in times.items())
        best_text, best_value = None, value
    else:
        best_text, best_value = problem.plan_text(best.plan), objective.value(best.score[0])
        winner = simulate_requests(scenario, best_text)
        comparison = compare_sides(side_of(best_text, winner.report), side_of(text, own.report))
        best_times = operator_times_ms(problem, best.plan, winner.result)
        names = sorted(times.keys() | best_times.keys(), key=lambda n: -times.get(n, 0.0))
        operators = tuple((n, best_times.get(n, 0.0), times.get(n, 0.0)) for n in names)
    return Explanation(
        plan=text,
        best=best_text,
        verdict=_verdict(problem, text, value, best_text, best_value, own.report.breaks)
        + _on_paper([plan] if best is None else [plan, best.plan], problem),
        settled=settled,
        bound=bound,
        breaks=own.report.breaks,
        comparison=comparison,
        operators=operators,
        limits=limits,
    )


def _verdict(
    problem: Problem,
    text: str,
    value: float,
    best: str | None,
    best_value: float,
    breaks: tuple[str, ...],
) -> str:
    """One line: best, equal, worse by how much, or what it breaks."""
    objective = problem.objective
    if breaks:
        return f"{text} breaks {', '.join(breaks)}"
    if best is None:
        return f"{text} breaks no SLO, but the search found no plan"
    if text == best:
        return f"{text} is the best plan: {objective.name} {value:.4g} {objective.unit}"
    if value == best_value:
        return f"{text} ties with {best}, which comes first by {objective.tie_break}"
    apart = 100 * abs(value - best_value) / abs(best_value) if best_value else 0.0
    is_better = (value < best_value) == (objective.sense == "minimize")
    line = (
        f"{text} is {apart:.1f} % {'better' if is_better else 'worse'} than {best}: "
        f"{objective.name} {value:.4g} against {best_value:.4g} {objective.unit}"
    )
    # The search proves its best plan over the space alone.
    return f"{line}; it is outside search.space: widen that" if is_better else line


def _on_paper(plans: list[Plan], problem: Problem) -> str:
    """Which of ``plans`` the engine version cannot launch, each once; empty where it can all."""
    found = {problem.plan_text(p): None for p in plans if is_theoretical(problem, p.shape)}
    return f" (theoretical: {', '.join(found)})" if found else ""


def _limits(problem: Problem, plan: Plan, usage: Usage) -> tuple[LimitUse, ...]:
    blocks = problem.blocks(plan.shape, plan.limits)
    return (
        LimitUse("max_num_seqs", plan.limits.max_num_seqs, usage.seats, usage.seats_bound),
        LimitUse(
            "max_num_batched_tokens",
            plan.limits.max_num_batched_tokens,
            usage.tokens,
            usage.tokens_bound,
        ),
        LimitUse("kv_cache_blocks", blocks, usage.blocks, usage.blocks_bound),
    )
