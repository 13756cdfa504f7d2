"""Floors of one plan, and of a whole family of plans that differ in their batching limits only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from planner.floors import CostFloors, RequestFloors, cache_tokens, cacheable_tokens
from planner.support import Support, least_cost
from simulator.plan import BatchingLimits, Plan
from simulator.rules import VLLM_V1

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    import numpy.typing as npt

    from planner.problem import Problem
    from simulator.plan import Shape
    from simulator.state import Limits
    from simulator.timing import IterationCost

    Ints = npt.NDArray[np.int64]
    Members = tuple[BatchingLimits, ...]


@dataclass(frozen=True)
class Floored:
    """What bounds take: floors of requests, and the limits of a replica."""

    floors: RequestFloors
    limits: Limits


@dataclass
class PlanFloors:
    """Floors of a problem's plans, each derived once.

    Parameters
    ----------
    problem
        The problem.
    members
        For each shape, the batching limits of its plans that can run.
    costs
        Floors of each shape's cost under one or all of its limits, which hold whatever the
        workload: who searches again may hand on those of an earlier search.
    """

    problem: Problem
    members: dict[Shape, Members]
    costs: dict[tuple[Shape, Members], CostFloors] = field(default_factory=dict)
    classes: dict[tuple[Shape, BatchingLimits], Floored] = field(default_factory=dict)
    families: dict[Shape, Floored] = field(default_factory=dict)
    _cached: Ints | None = None

    @classmethod
    def of(cls, problem: Problem, plans: Iterable[Plan]) -> PlanFloors:
        """Floors of ``plans``, still to be derived."""
        members: dict[Shape, dict[BatchingLimits, None]] = {}
        for plan in plans:
            members.setdefault(plan.shape, {})[plan.limits] = None
        return cls(problem, {shape: tuple(limits) for shape, limits in members.items()})

    def of_class(self, shape: Shape, limits: BatchingLimits) -> Floored:
        """Floors of replicas of this shape under these limits."""
        key = shape, limits
        if key not in self.classes:
            cost = self.problem.compile(shape, limits)
            own = self.problem.replica_limits(Plan(1, shape, limits))
            self.classes[key] = self._derive(shape, cost, own, (limits,))
        return self.classes[key]

    def of_family(self, shape: Shape) -> Floored:
        """Floors that hold for replicas of this shape under any limits in the space."""
        if shape not in self.families:
            members = self.members[shape]
            cost, limits = loosest(self.problem, shape, members)
            self.families[shape] = self._derive(shape, cost, limits, members)
        return self.families[shape]

    def _derive(
        self, shape: Shape, cost: IterationCost, limits: Limits, members: Members
    ) -> Floored:
        problem, rules = self.problem, self.problem.rules
        if self._cached is None:
            self._cached = cacheable_tokens(problem.workload, rules)
        key = shape, members
        if key not in self.costs:
            support = Support.of(
                cost,
                budget_tokens(problem, cost, limits),
                limits.max_num_seqs,
                cache_tokens(limits, rules),
                full_tokens=full_tokens(problem, members),
                keeps_blocks=rules.prefix_caching,
            )
            self.costs[key] = CostFloors.of(cost, support, keeps_blocks=rules.prefix_caching)
        floors = RequestFloors.of(self.costs[key], problem.workload, self._cached)
        return Floored(floors, limits)


def budget_tokens(problem: Problem, cost: IterationCost, limits: Limits) -> int:
    """Most tokens of one iteration: only vLLM's V1 scheduler keeps every batch to its budget."""
    if problem.rules.policy == VLLM_V1:
        return min(limits.max_num_batched_tokens, cost.max_tokens)
    return cost.max_tokens


def full_tokens(problem: Problem, members: Members) -> tuple[int, ...]:
    """Budgets at which prompts are cut, where the scheduler cuts them nowhere else."""
    if problem.rules.policy != VLLM_V1:
        return ()
    return tuple(sorted({limits.max_num_batched_tokens for limits in members}))


def loosest(problem: Problem, shape: Shape, members: Members) -> tuple[IterationCost, Limits]:
    """A cost nowhere above, and limits nowhere below, those of replicas of ``shape``."""
    cost = least_cost([problem.compile(shape, limits) for limits in members])
    each = [problem.replica_limits(Plan(1, shape, limits)) for limits in members]
    most = each[0]._replace(
        max_num_seqs=max(one.max_num_seqs for one in each),
        max_num_batched_tokens=max(one.max_num_batched_tokens for one in each),
        num_blocks=max(one.num_blocks for one in each),
    )
    return cost, most
