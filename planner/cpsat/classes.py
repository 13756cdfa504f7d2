"""The master's classes: every replica that the engine can launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.cpsat.variables import ReplicaClass
from planner.space import forbidding, grid_classes
from simulator.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from planner.problem import Problem


def master_classes(problem: Problem) -> list[ReplicaClass]:
    """Classes that the engine can launch; memory and device counts are the master's to judge."""
    grid = problem.space
    classes = []
    for shape, limits, rule in grid_classes(problem):
        if rule is not None:
            continue
        budget = problem.memory(shape, limits)
        need = problem.needed_bytes(shape, limits)
        if problem.num_blocks is not None:  # measured: the memory model does not judge
            held = problem.num_blocks >= problem.full_request_blocks(shape)
            need = 0 if held and budget.num_blocks > 0 else budget.usable_bytes + 1
        most = problem.replicas_that_fit(shape)
        classes.append(ReplicaClass(shape, limits, grid.replicas, need, budget.usable_bytes, most))
    return classes


def pool_sizes(problem: Problem) -> dict[str, int]:
    """Devices of each pool, by `Shape.device`."""
    return {name: pool.num_devices for name, pool in problem.pools.items()}


def forbidden_columns(problem: Problem, classes: Sequence[ReplicaClass]) -> list[tuple[int, int]]:
    """Class and count of every plan that the scenario leaves out by its text."""
    if not problem.space.forbid:
        return []
    return [
        (i, replicas)
        for i, one in enumerate(classes)
        for replicas in one.counts
        if forbidding(problem, Plan(replicas, one.shape, one.limits)) is not None
    ]
