"""The search: simulate in order of bound, feed values back, stop when nothing can win."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Final

from planner.bounds import gap_bounds, run_bounds
from planner.candidates import UNKNOWN_SCORE, Candidate, Fate, Trace
from planner.cpsat.classes import forbidden_columns, master_classes, pool_sizes
from planner.cpsat.model import MasterStatus, solve_master
from planner.errors import PlannerError
from planner.objective import ITL, Outcome
from planner.plan_floors import PlanFloors
from planner.search_result import Progress, SearchResult
from planner.space import enumerate_space

if TYPE_CHECKING:
    from collections.abc import Callable

    from planner.floors import CostFloors
    from planner.objective import Constraint, Scorer
    from planner.plan_floors import Floored
    from planner.problem import Problem
    from planner.space import Space
    from simulator.plan import Plan, Shape
    from simulator.run import Run, RunResult

_CHECK_EVERY: Final = 256
"""Iterations between two looks at a run's bound, at least. Mixtral-8x22B on 8 H100, saturated, mean
TPOT: 8.8 % of all iterations are simulated in 8.3 CPU s, with 2048 (part off) 14.8 % in 9.9."""

_CHECK_PART: Final = 8
"""A step is this part of the run so far, if that is more: what is simulated beyond the look that
would have ruled a plan out stays below an eighth, and looks grow with the logarithm of a run."""


class LimitReachedError(Exception):
    """A limit was reached."""


@dataclass
class Search:
    """One search over one problem.

    Parameters
    ----------
    problem
        What is searched.
    scorer, constraints
        What orders plans, and what a plan must keep.
    exhaustive
        Simulate every plan to the end: no bound, no early stop, no shared run, no limit.
    on_progress
        Called as plans are settled.
    first
        A plan to simulate before any other, such as an earlier answer.
    any_plan
        Stop at the first plan that keeps every constraint: whether there is one is the question.
    """

    problem: Problem
    scorer: Scorer
    constraints: tuple[Constraint, ...] = ()
    exhaustive: bool = False
    on_progress: Callable[[Progress], None] | None = None
    first: Plan | None = None
    any_plan: bool = False
    _best: Candidate | None = field(default=None, init=False)
    _candidates: tuple[Candidate, ...] = field(default=(), init=False)
    _iterations: int = field(default=0, init=False)
    _deadline_s: float = field(default=float("inf"), init=False)
    _known: PlanFloors | None = field(default=None, init=False)
    _fresh: dict[tuple[Shape, int], Run] = field(default_factory=dict, init=False)

    def run(self) -> SearchResult:
        """Search until the proof closes or a limit stops it."""
        space = self._space()
        if space.plans:
            # The first run on a machine compiles the simulator; a limit on the search does not pay.
            self.problem.start(space.plans[0]).advance(1)
        self._deadline_s = time.monotonic() + self.problem.search_limits.time_limit_s
        self._candidates = tuple(
            Candidate(plan, rank, UNKNOWN_SCORE) for rank, plan in enumerate(space.plans)
        )
        stopped_by = None
        try:
            self._evaluate_first()
            if not self.exhaustive:
                self._bound_families()
            self._close()
        except LimitReachedError as stop:
            stopped_by = str(stop)
        except KeyboardInterrupt:
            stopped_by = "interrupt"
        return self._result(space, stopped_by)

    def _space(self) -> Space:
        """The plans that can run."""
        return enumerate_space(self.problem)

    def _evaluate_first(self) -> None:
        """Simulate the plan that is to come before any other."""
        for candidate in self._candidates:
            if candidate.plan == self.first:
                self._evaluate(candidate)

    # -- the loop

    def _close(self) -> None:
        """Alternate master and simulation until the master's choice is a simulated plan."""
        while True:
            before = self._iterations
            queue = [(c.key, c) for c in self._open()]
            heapify(queue)
            while queue:
                key, candidate = heappop(queue)
                if not self._beats_best(candidate):
                    continue
                if not self.exhaustive and not candidate.has_own_bound:
                    self._bound(candidate)
                if candidate.key > key:
                    heappush(queue, (candidate.key, candidate))
                elif candidate.fate is Fate.OPEN:
                    self._evaluate(candidate)
            # One solve costs many simulations, so the master is asked when nothing is left to
            # settle; what it could still choose was then settled the wrong way.
            chosen = self._solve_master()
            if chosen is self._best:  # also where neither has a plan: none keeps every rule
                return
            if self._iterations == before:
                raise PlannerError(f"master and search disagree: {chosen} against {self._best}")

    def _open(self) -> list[Candidate]:
        return [c for c in self._candidates if c.fate is Fate.OPEN]

    def _beats_best(self, candidate: Candidate) -> bool:
        """Whether ``candidate``, still open, might be better than the best plan known."""
        if candidate.fate is not Fate.OPEN:
            return False
        return self.exhaustive or self._best is None or candidate.key < self._best.key

    def _solve_master(self) -> Candidate | None:
        """The column of least value, or ``None`` if no column keeps every rule."""
        classes = master_classes(self.problem)
        index = {(c.shape, c.limits): i for i, c in enumerate(classes)}
        columns = {
            (index[c.plan.shape, c.plan.limits], c.plan.replicas): c for c in self._candidates
        }
        # One level for the place of each column in this order takes three times as long to solve.
        known = min((len(c.score) for c in self._candidates), default=0)
        levels = [{k: c.score[level] for k, c in columns.items()} for level in range(known)]
        levels.append({k: c.rank for k, c in columns.items()})
        forbidden = [k for k, c in columns.items() if c.fate is Fate.BREAKS_SLO]
        forbidden += forbidden_columns(self.problem, classes)
        result = solve_master(classes, pool_sizes(self.problem), levels, forbidden)
        if result.status is MasterStatus.UNKNOWN:
            raise LimitReachedError("master_limit")
        if result.column is None:
            return None
        if result.column not in columns:
            raise PlannerError(
                f"the master chose {classes[result.column[0]]}, which the rules exclude"
            )
        return columns[result.column]

    # -- one plan

    def _bound_families(self) -> None:
        """Give every plan the bound of its family, which holds whatever the batching limits."""
        for (shape, _), members in self._families.items():
            self._check_limits()
            plan, known = members[0].plan, self._plan_floors().of_family(shape)
            outcome = self._lower(self._not_begun(plan), plan, known)
            score = self.scorer.score(outcome)
            for candidate in (c for c in members if c.fate is Fate.OPEN):
                candidate.score = max(candidate.score, score)
                self._note_broken(candidate, outcome)

    def _bound(self, candidate: Candidate) -> None:
        """Give ``candidate`` the bound of its own limits."""
        self._check_limits()
        candidate.has_own_bound = True
        outcome = self._lower(self._not_begun(candidate.plan), candidate.plan)
        breaks = self._note_broken(candidate, outcome)
        candidate.raise_own(self.scorer.score(outcome), breaks=breaks)

    def _evaluate(self, candidate: Candidate) -> None:
        """Simulate ``candidate`` until it is finished or cannot win."""
        self._check_limits()  # short runs end before the look below
        run = self.problem.start(candidate.plan, record_gaps=self._records_gaps)
        done = False
        try:
            while not done:
                done = run.advance(max(_CHECK_EVERY, run.iterations // _CHECK_PART))
                if not done:
                    self._check_limits(run.iterations)
                    if not self.exhaustive and self._settle_early(candidate, run):
                        break
        finally:
            candidate.iterations = run.iterations
            self._iterations += run.iterations
        if done:
            self._settle(candidate, run.result())
        if not self.exhaustive:
            self._settle_twins(candidate, run)
        self._report()

    def _settle_early(self, candidate: Candidate, run: Run) -> bool:
        """Whether the run's bound already rules ``candidate`` out."""
        outcome = self._lower(run, candidate.plan)
        candidate.raise_to(self.scorer.score(outcome), candidate.plan, run.iterations)
        if self._note_broken(candidate, outcome):
            candidate.seen, candidate.seen_at = candidate.plan, run.iterations
            return True
        if self._best is not None and candidate.key > self._best.key:
            candidate.fate = Fate.ABORTED
            return True
        return False

    def _settle(self, candidate: Candidate, result: RunResult) -> None:
        """Record a finished run."""
        outcome = self.problem.outcome(candidate.plan, result)
        candidate.result = result
        candidate.score = self.scorer.score(outcome)
        candidate.exact = True
        if self._note_broken(candidate, outcome):
            return
        candidate.fate = Fate.SIMULATED
        self._offer(candidate)

    def _settle_twins(self, candidate: Candidate, run: Run) -> None:
        """Give what was learnt of ``candidate`` to the plans that run exactly alike."""
        trace = Trace(candidate.plan, run.limits, run.cost, run.usage())
        for other in self._families[candidate.plan.shape, candidate.plan.replicas]:
            if other.fate is not Fate.OPEN:
                continue
            limits = self.problem.replica_limits(other.plan)
            cost = self.problem.compile(other.plan.shape, other.plan.limits)
            if not trace.same_for(other.plan, limits, cost):
                continue
            if candidate.exact:
                other.twin, other.score, other.exact = candidate.plan, candidate.score, True
                other.fate, other.broken = candidate.fate, candidate.broken
                if candidate.fate is Fate.SIMULATED:
                    other.fate = Fate.IDENTICAL
                    self._offer(other)
                continue
            # The same prefix, but the rest of its run has its own limits and so its own bound.
            outcome = self._lower(run, other.plan)
            other.raise_to(self.scorer.score(outcome), candidate.plan, run.iterations)
            if self._note_broken(other, outcome):
                other.seen, other.seen_at = candidate.plan, run.iterations
            elif not self._beats_best(other):
                other.fate, other.twin = Fate.ABORTED, candidate.plan

    def _offer(self, candidate: Candidate) -> None:
        if self._best is None or candidate.key < self._best.key:
            self._best = candidate
            if self.any_plan:
                raise LimitReachedError("any_plan")

    def _note_broken(self, candidate: Candidate, outcome: Outcome) -> bool:
        """Mark ``candidate`` if ``outcome`` proves that it breaks a constraint."""
        candidate.broken = tuple(c.name for c in self.constraints if c.is_broken(outcome))
        if candidate.broken:
            candidate.fate = Fate.BREAKS_SLO
        return bool(candidate.broken)

    def _lower(self, run: Run, plan: Plan, floored: Floored | None = None) -> Outcome:
        """What a run of ``plan`` that has come as far as ``run`` can do at best."""
        known = floored or self._plan_floors().of_class(plan.shape, plan.limits)
        bounds = run_bounds(run, known.floors, known.limits)
        gaps = None
        if self._records_gaps:
            gaps = gap_bounds(self.problem.workload, known.floors.costs)
        return Outcome(
            bounds.values,
            bounds.makespan_s,
            plan.devices,
            self.problem.micros_per_hour(plan),
            exact=False,
            gaps=gaps,
        )

    @cached_property
    def _families(self) -> dict[tuple[Shape, int], list[Candidate]]:
        """Candidates that differ in their batching limits only."""
        families: dict[tuple[Shape, int], list[Candidate]] = {}
        for candidate in self._candidates:
            plan = candidate.plan
            families.setdefault((plan.shape, plan.replicas), []).append(candidate)
        return families

    def _not_begun(self, plan: Plan) -> Run:
        """A run that is as far as that of ``plan`` before it begins, whatever the limits."""
        key = plan.shape, plan.replicas
        if key not in self._fresh:
            self._fresh[key] = self.problem.start(plan)
        return self._fresh[key]

    def _plan_floors(self) -> PlanFloors:
        """Floors of every plan, each derived when it is first asked for."""
        if self._known is None:
            self._known = PlanFloors.of(self.problem, (c.plan for c in self._candidates))
        return self._known

    def _floors_of(self, plan: Plan) -> CostFloors:
        """Floors of a plan's cost, which hold whatever the workload."""
        return self._plan_floors().of_class(plan.shape, plan.limits).floors.costs

    @property
    def _records_gaps(self) -> bool:
        """Whether anything asks for the gaps between tokens, which makes runs slower."""
        return self.scorer.needs_gaps or any(c.metric == ITL for c in self.constraints)

    # -- limits and results

    def _check_limits(self, running: int = 0) -> None:
        """Stop where a limit is reached; ``running`` iterations are not yet counted."""
        if self.exhaustive:
            return
        limit = self.problem.search_limits.work_limit
        if limit is not None and self._iterations + running >= limit:
            raise LimitReachedError("work_limit")
        if time.monotonic() >= self._deadline_s:
            raise LimitReachedError("time_limit")

    def _report(self) -> None:
        if self.on_progress is None:
            return
        best = self._best
        self.on_progress(
            Progress(
                incumbent=best.plan if best else None,
                score=best.score if best else None,
                bound=self._primary_bound(),
                plans_left=sum(self._beats_best(c) for c in self._candidates),
                iterations=self._iterations,
            )
        )

    def _primary_bound(self) -> int | None:
        """Primary score that no feasible plan can beat."""
        known = [c.score[0] for c in self._open()] + ([self._best.score[0]] if self._best else [])
        return min(known, default=None)

    def _result(self, space: Space, stopped_by: str | None) -> SearchResult:
        bound = self._primary_bound()
        if stopped_by is None:
            for candidate in self._candidates:
                if candidate.fate is Fate.OPEN:
                    candidate.fate = Fate.BOUNDED
        return SearchResult(
            space=space,
            best=self._best,
            candidates=self._candidates,
            proved=stopped_by is None,
            bound=bound,
            iterations=self._iterations,
            stopped_by=stopped_by,
            floors=self._plan_floors(),
        )
