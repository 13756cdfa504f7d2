"""What an autoscaling controller holds: answers within a deadline, remembered and warm-started.

>>> with Session(Scenario.load("llama-3.1-70b_8xh100")) as session:  # doctest: +SKIP
...     report = session.plan(rate=5.2, deadline_s=0.5)

One worker thread computes; callers wait for it, never longer than their deadline, and callers who
ask the same share one computation. The simulator's loops release the interpreter's lock (numba,
``nogil``), so other threads run on beside them; a second worker would gain little, since half of a
computation is Python (measured: docs/autoscaling.md).
"""

from __future__ import annotations

import math
import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, cast

from planner.errors import InfeasibleError, InputError, RefusalError
from planner.report import PlanReport
from planner.resolve import resolve
from planner.session_cache import Recent
from planner.session_capacity import capacity, constraints_of, holds, least
from planner.session_jobs import Jobs
from planner.session_search import Facts
from planner.session_solve import Answer, Asked, search, stay_or_switch, unproved
from planner.session_workload import Workloads
from planner.space import broken_rule, explain_rule
from simulator.plan import Plan, parse_plan

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from typing_extensions import Self

    from planner.problem import Problem
    from planner.scenario import Scenario
    from planner.session_jobs import Job
    from planner.session_switching import Switching

MAX_ANSWERS: Final = 1024
"""Answers kept by default; a report takes some 20 KiB."""
MAX_FACT_BYTES: Final = 512 << 20
"""Bytes of floors kept by default: all 362 replicas of the bundled scenario take 142 MB."""


class Session:
    """Answers about one scenario at changing rates and mixes; safe to use from many threads.

    Making one reads the scenario's files and solves it, which takes seconds; no later call reads
    or writes a file. Close it, or use it as a context manager, to end its thread.

    Parameters
    ----------
    scenario
        What to plan for.
    switching
        What a change of plan costs; ``None``: nothing, the best plan is always the answer.
    max_answers
        Answers to keep, least recently used forgotten first.
    max_fact_bytes
        Bytes of what is known of each plan's cost to keep beside them.

    Raises
    ------
    InputError
        When the scenario is bad.
    LimitError
        When a limit of the scenario stopped the first search before any plan was found.

    """

    def __init__(
        self,
        scenario: Scenario,
        *,
        switching: Switching | None = None,
        max_answers: int = MAX_ANSWERS,
        max_fact_bytes: int = MAX_FACT_BYTES,
    ) -> None:
        self._switching = switching
        self._problem = resolve(scenario)
        self._workloads = Workloads(scenario, self._problem)
        self._facts = Facts(max_fact_bytes)
        self._jobs: Jobs[PlanReport] = Jobs(max_answers)
        self._answers = self._jobs.answers
        self._plans: Recent[str, Plan] = Recent(max_answers)
        self._allowed = frozenset(self._facts.space(self._problem).plans)
        self._base: tuple[Answer, ...] = ()
        try:
            self.plan()
            self._base = (self._answers.items()[-1][1],)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """The session itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """End the worker once it has finished what it computes; waiting callers get an error."""
        self._jobs.close()

    # -- calls

    def scenario(
        self, *, rate: float | None = None, mix: Mapping[str, Any] | None = None
    ) -> Scenario:
        """The scenario that a call with this rate and mix is about; raises as :meth:`plan` does."""
        return self._workloads.scenario(rate, mix)

    def plan(
        self,
        *,
        rate: float | None = None,
        mix: Mapping[str, Any] | None = None,
        current: PlanReport | str | None = None,
        deadline_s: float | None = None,
    ) -> PlanReport:
        """The plan to run at a rate and mix.

        Parameters
        ----------
        rate
            Requests per second; ``None``: the scenario's own.
        mix
            ``input_tokens`` and ``output_tokens`` as a scenario writes them; ``None``: its own.
        current
            The plan that runs now, by its text or the report that named it. It is kept, as
            ``feasible``, unless a better one gains more than the session's ``switching`` costs.
        deadline_s
            Longest wait. After it the answer is the best known: the first plan simulated for this
            workload, else the answer to the nearest rate; it is ``feasible``, not deterministic,
            and its warnings say so. The search goes on, for the next call.

        Returns
        -------
        PlanReport
            Without deadline and switching, plan, objective, bound and metrics of a fresh
            ``solve`` of :meth:`scenario`; ``search`` and ``alternatives`` say what was looked at
            this time.

        Raises
        ------
        InputError
            When the rate, the mix or the deadline is no valid value.
        RefusalError
            When the current plan is none of the scenario's space.
        LimitError
            When the scenario's own limits stopped the search before any plan was found.

        """
        began_s = time.monotonic()
        if deadline_s is not None and not 0 <= deadline_s < math.inf:
            rule = "must be a number of seconds of at least 0"
            raise InputError(source="deadline_s", field="", value=deadline_s, rule=rule)
        running = None if current is None else self._plan_of(current)
        workload = self._workloads.key(rate, mix)
        known = self._answers.get((workload, running))
        if known is not None:
            return cast("PlanReport", known.report)
        asked = Asked(
            workload,
            self._workloads.scenario(rate, mix),
            self._workloads.rate if rate is None else rate,
            self._workloads.key(1.0, mix),
            running,
        )
        job = self._jobs.join(asked.key, lambda job: self._solve(asked, job))
        left_s = None
        if deadline_s is not None:
            left_s = max(0.0, deadline_s - (time.monotonic() - began_s))
        try:
            return cast("PlanReport", self._jobs.wait(asked.key, job, left_s).report)
        except FutureTimeoutError:
            return self._late(job, asked)

    def capacity(
        self,
        plan: PlanReport | str,
        slo: Mapping[str, Any] | None = None,
        *,
        mix: Mapping[str, Any] | None = None,
    ) -> float:
        """The largest rate at which a plan keeps up and holds the SLO, requests per second.

        The workload is played four times over, so that a queue that grows slowly does not pass.
        The rate holds, and one at most 1 % above it does not; both are simulated.

        Parameters
        ----------
        plan
            The plan, by its text or the report that named it.
        slo
            As in a scenario, for example ``{"ttft_ms": {"p99": 2000}}``; ``None``: the scenario's
            own, and where it has none just keeping up.
        mix
            As in :meth:`plan`.

        Returns
        -------
        float
            The rate; 0 where none holds.

        Raises
        ------
        InputError
            When the SLO or the mix is not valid, or no rate can be set.
        RefusalError
            When the plan is none of the scenario's space, or every rate holds.

        """
        chosen = self._plan_of(plan)
        constraints = constraints_of(slo, self._problem.constraints)
        start = self._workloads.rate
        key = "capacity", chosen, constraints, self._workloads.key(None, mix)

        def compute(_: Job[PlanReport]) -> float:
            return capacity(
                lambda rate: holds(self._problem_at(rate, mix), chosen, constraints), start
            )

        self._workloads.scenario(start, mix)  # an error is the caller's, before anything waits
        return float(self._jobs.known_or(key, compute))

    def replicas_for(
        self,
        plan: PlanReport | str,
        rate: float,
        slo: Mapping[str, Any] | None = None,
        *,
        mix: Mapping[str, Any] | None = None,
    ) -> int:
        """The fewest replicas of a plan's kind that keep up with a rate and hold the SLO.

        Parameters
        ----------
        plan
            The plan, by its text or the report that named it; its own number of replicas does not
            count.
        rate, slo, mix
            As in :meth:`plan` and :meth:`capacity`.

        Raises
        ------
        InputError
            When the rate, the SLO or the mix is not valid.
        RefusalError
            When the plan is none of the scenario's space.
        InfeasibleError
            When all that the pool holds are too few.

        """
        chosen = self._plan_of(plan)
        constraints = constraints_of(slo, self._problem.constraints)
        scenario = self._workloads.scenario(rate, mix)
        most = self._problem.replicas_that_fit(chosen.shape)
        key = "replicas", replace(chosen, replicas=1), constraints, self._workloads.key(rate, mix)

        def compute(_: Job[PlanReport]) -> int:
            problem = self._workloads.problem(scenario)
            found = least(lambda n: holds(problem, replace(chosen, replicas=n), constraints), most)
            return found or 0

        number = int(self._jobs.known_or(key, compute))
        if number == 0:
            text = self._problem.plan_text(replace(chosen, replicas=most))
            raise InfeasibleError(f"{text}, all that the pool holds, does not hold {rate:g}/s", "")
        return number

    # -- deadlines

    def _late(self, job: Job[PlanReport], asked: Asked) -> PlanReport:
        """The best report at hand when a deadline has passed."""
        if job.so_far is not None:
            note = "the deadline passed before the search had ended: a better plan may exist"
            return unproved(job.so_far, note)
        nearest = self._nearest(asked)
        note = f"the deadline passed: this is the answer at {nearest.rate:g} requests/s"
        return unproved(nearest.report, note)

    def _nearest(self, asked: Asked) -> Answer:
        """The known answer of the nearest rate; one that stays with the current plan goes first."""

        def distance(answer: Answer) -> tuple[bool, bool, bool, float]:
            plan = None if answer.best is None else answer.best.plan
            moves = asked.current is not None and plan != asked.current
            other_mix = answer.mix != asked.mix
            return plan is None, moves, other_mix, abs(math.log(answer.rate / asked.rate))

        answers = [known for _, known in self._answers.items() if isinstance(known, Answer)]
        return min((*answers, *self._base), key=distance)

    # -- in the worker

    def _solve(self, asked: Asked, job: Job[PlanReport]) -> Answer:
        """Answer one question, leaving the best report so far in the job."""
        best = self._answers.get((asked.workload, None))
        if best is None:
            first = asked.current
            if first is None and self._base:
                nearest = self._nearest(asked).best
                first = None if nearest is None else nearest.plan
            problem = self._workloads.problem(asked.scenario)
            best = search(
                problem, asked, self._facts, first, lambda report: setattr(job, "so_far", report)
            )
            self._answers.put((asked.workload, None), best)
        if asked.current is None or self._switching is None:
            return cast("Answer", best)
        problem = self._workloads.problem(asked.scenario)
        return stay_or_switch(problem, self._facts, self._switching, asked.current, best)

    def _problem_at(self, rate: float, mix: Mapping[str, Any] | None) -> Problem:
        return self._workloads.problem(self._workloads.scenario(rate, mix))

    def _plan_of(self, plan: PlanReport | str) -> Plan:
        """A plan of the space, from a report or a text; what is compiled stays bounded so."""
        if isinstance(plan, PlanReport):
            if plan.plan is None:
                raise RefusalError("the report names no plan")
            name = plan.plan.id
        else:
            name = plan
        known = self._plans.get(name)
        if known is not None:
            return known
        try:
            parsed = parse_plan(name, self._problem.default_limits)
        except ValueError as error:
            rule = f"is not a plan: {error}"
            raise InputError(source="plan", field="", value=name, rule=rule) from None
        if parsed not in self._allowed:
            why, broken = "search.space does not offer it", broken_rule(self._problem, parsed)
            if broken is not None:
                why = f"{broken}: {explain_rule(self._problem, parsed, broken)}"
            raise RefusalError(f"plan {name}: {why}")
        self._plans.put(name, parsed)
        return parsed
