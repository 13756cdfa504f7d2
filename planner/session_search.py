"""A search that starts from what earlier searches over the same plans have shown.

Three facts hold whatever the workload and are kept: which plans can run, the floors of each plan's
cost, and that CP-SAT chooses among just these plans. One holds whatever the arrivals of the same
lengths: what each plan needs at least where no request waits for another. A plan that this alone
puts behind the best plan known, or that breaks a constraint even so, is not looked at again.

Simulations are never reused from one workload to another.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from planner.bounds import gap_bounds
from planner.candidates import Candidate, Fate
from planner.objective import Outcome, needs_gaps
from planner.plan_floors import PlanFloors
from planner.search import Search
from planner.session_cache import Recent
from planner.space import enumerate_space
from simulator.metrics import latencies
from simulator.timing import in_ps, in_s

if TYPE_CHECKING:
    from planner.floors import CostFloors
    from planner.objective import Score
    from planner.problem import Problem
    from planner.search_result import SearchResult
    from planner.space import Space
    from simulator.plan import BatchingLimits, Plan, Shape

    Alone = tuple[Score, tuple[str, ...]]
    """Bound on the score of a plan whose requests never wait, and the constraints it breaks."""

_LENGTHS_KEPT: Final = 16
"""Sets of lengths whose unloaded bounds are kept; some 200 bytes per plan each."""


class _Floors(dict[Any, Any]):
    """Floors by shape and limits of one search, which come from what is kept and go there."""

    def __init__(self, kept: Recent[Any, CostFloors]) -> None:
        super().__init__()
        self._kept = kept

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        found = self._kept.get(key)
        if found is not None:
            super().__setitem__(key, found)
        return found is not None

    def __setitem__(self, key: Any, floors: CostFloors) -> None:
        super().__setitem__(key, floors)
        self._kept.put(key, floors)


def _floor_bytes(floors: CostFloors) -> int:
    return floors.prompt_ps.nbytes + floors.prompt_work_ps.nbytes + floors.decode_ps.nbytes


class Facts:
    """What searches over one scenario's plans share; safe to use from several threads.

    Parameters
    ----------
    max_bytes
        Most bytes of floors to keep. A replica's take 24 bytes per token of ``max_model_len``, and
        a grid has hundreds; those forgotten are derived again when a search needs them.

    """

    def __init__(self, max_bytes: int) -> None:
        self.floors: Recent[Any, CostFloors] = Recent(max_bytes, _floor_bytes)
        self.confirmed: set[int] = set()
        self._spaces: Recent[int, Space] = Recent(_LENGTHS_KEPT)
        self._alone: Recent[bytes, dict[Plan, Alone]] = Recent(_LENGTHS_KEPT)

    def space(self, problem: Problem) -> Space:
        """The plans that can run; of a workload only its longest prompt can matter to that."""
        key = space_key(problem)
        space = self._spaces.get(key)
        if space is None:
            space = enumerate_space(problem)
            self._spaces.put(key, space)
        return space

    def alone(self, problem: Problem) -> dict[Plan, Alone]:
        """By plan, what is known of it at the lengths of ``problem``; filled by the searches."""
        work = problem.workload
        digest = hashlib.blake2b(work.prompt_tokens.tobytes(), digest_size=16)
        digest.update(work.output_tokens.tobytes())
        key = digest.digest()
        known = self._alone.get(key)
        if known is None:
            known = {}
            self._alone.put(key, known)
        return known


def space_key(problem: Problem) -> int:
    """What the space of plans depends on in a workload: the longest prompt that is not cut."""
    return 0 if problem.rules.chunked else problem.longest_prefill


class SessionSearch(Search):
    """A search that takes :class:`Facts` and adds to them.

    Parameters
    ----------
    problem
        What is searched.
    facts
        What earlier searches over the same plans have shown.
    first
        A plan to simulate before any other, such as the last answer.

    """

    def __init__(self, problem: Problem, facts: Facts, first: Plan | None = None) -> None:
        super().__init__(problem, problem.objective, problem.constraints, first=first)
        self._facts = facts
        self._alone = facts.alone(problem)
        self._outcomes: dict[tuple[Shape, BatchingLimits], Outcome] = {}
        self._live: list[Candidate] = []
        self._with_gaps = needs_gaps(problem.objective, problem.constraints)

    def run(self) -> SearchResult:
        """Search until the proof closes or a limit stops it."""
        found = super().run()
        if found.stopped_by is None:
            self._facts.confirmed.add(space_key(self.problem))
        return found

    def _space(self) -> Space:
        return self._facts.space(self.problem)

    def _plan_floors(self) -> PlanFloors:
        """Floors of every plan, those of costs taken from earlier searches."""
        if self._known is None:
            self._known = PlanFloors.of(self.problem, (c.plan for c in self._candidates))
            self._known.costs = _Floors(self._facts.floors)
        return self._known

    def _open(self) -> list[Candidate]:
        """Plans that might still win; what has fallen behind the best plan never comes back."""
        self._live = [c for c in self._live if self._beats_best(c)]
        return self._live

    def _evaluate_first(self) -> None:
        """Simulate the plan that was the last answer, unless its bound alone rules it out."""
        self._live = list(self._candidates)
        for candidate in self._candidates:
            if candidate.plan == self.first:
                self._bound(candidate)
                if candidate.fate is Fate.OPEN:
                    self._evaluate(candidate)

    def _solve_master(self) -> Candidate | None:
        """The master's choice: the best plan, where it is known which plans it has.

        Its columns are the plans of the space, and its values their scores or bounds; once a solve
        has confirmed the first, the least of the second needs no solver.
        """
        if space_key(self.problem) not in self._facts.confirmed:
            return super()._solve_master()
        return self._best

    def _bound(self, candidate: Candidate) -> None:
        """Bound by what is known whatever the arrivals, and by this workload's if that is open."""
        self._check_limits()
        if candidate.plan not in self._alone:
            self._alone[candidate.plan] = self._bound_alone(candidate.plan)
        score, candidate.broken = self._alone[candidate.plan]
        candidate.score = max(candidate.score, score)
        if candidate.broken:
            candidate.fate = Fate.BREAKS_SLO
        elif self._beats_best(candidate):
            super()._bound(candidate)

    def _bound_alone(self, plan: Plan) -> Alone:
        """The bound of a plan whose requests each find an idle replica."""
        key = plan.shape, plan.limits
        if key not in self._outcomes:
            self._outcomes[key] = self._outcome_alone(plan)
        outcome = replace(
            self._outcomes[key],
            devices=plan.devices,
            micros_per_hour=self.problem.micros_per_hour(plan),
        )
        broken = tuple(c.name for c in self.constraints if c.is_broken(outcome))
        return self.scorer.score(outcome), broken

    def _outcome_alone(self, plan: Plan) -> Outcome:
        """What one replica of ``plan`` does at best, which no number of them betters."""
        work, floors = self.problem.workload, self._floors_of(plan)
        prompt, output = work.prompt_tokens, work.output_tokens
        first_ps = int(in_ps(self.problem.ingress_s)) + floors.prompt_ps[prompt]
        last_ps = first_ps + floors.decode_ps[prompt + output] - floors.decode_ps[prompt + 1]
        values = latencies(np.zeros_like(first_ps), first_ps, last_ps, output)
        gaps = gap_bounds(work, floors) if self._with_gaps else None
        return Outcome(
            values,
            float(in_s(last_ps.max())),
            plan.devices,
            self.problem.micros_per_hour(plan),
            exact=False,
            gaps=gaps,
        )
