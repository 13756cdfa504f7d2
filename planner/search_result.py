"""Where a search stands, and what it found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.candidates import Candidate, Fate
    from planner.objective import Score
    from planner.plan_floors import PlanFloors
    from planner.space import Space
    from simulator.plan import Plan


@dataclass(frozen=True)
class Progress:
    """Where a search stands.

    Best plan so far and its score, primary score that no plan can beat, plans not settled, and
    iterations simulated.
    """

    incumbent: Plan | None
    score: Score | None
    bound: int | None
    plans_left: int
    iterations: int


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Parameters
    ----------
    space, best
        The plan space, and the best plan, or ``None``.
    candidates
        Every plan that can run, in canonical tie order.
    proved
        Whether nothing left can beat ``best``, or, without one, whether none is feasible.
    bound
        Primary score that no feasible plan can beat, or ``None`` without a feasible plan.
    iterations
        Iterations simulated.
    stopped_by
        ``time_limit``, ``work_limit``, ``interrupt``, or ``None``.
    floors
        What the bounds rest on; ``None`` for a result that is put together without a search.
    """

    space: Space
    best: Candidate | None
    candidates: tuple[Candidate, ...]
    proved: bool
    bound: int | None
    iterations: int
    stopped_by: str | None
    floors: PlanFloors | None

    @property
    def deterministic(self) -> bool:
        """Whether the same search ends the same way everywhere."""
        return self.stopped_by not in ("time_limit", "interrupt")

    def count(self, fate: Fate) -> int:
        """Plans settled in this way."""
        return sum(c.fate is fate for c in self.candidates)
