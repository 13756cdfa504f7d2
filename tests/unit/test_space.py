"""The plan space: every plan of the grid is there once, runnable or under one rule."""

from __future__ import annotations

from planner.api import solve
from planner.resolve import resolve
from planner.space import PACKING, enumerate_space
from tests.problems import pool, scenario


def test_no_replica_spans_two_nodes() -> None:
    """Two nodes of three devices hold one tp2 replica each, though 3 x 2 devices are there."""
    spec = scenario(cluster=pool(3, nodes=2), search={"space": {"tp": [1, 2]}})
    space = enumerate_space(resolve(spec))
    shapes = {(plan.replicas, plan.shape.tp) for plan in space.plans}
    assert max(r for r, tp in shapes if tp == 2) == 2
    assert max(r for r, tp in shapes if tp == 1) == 6
    assert space.excluded[PACKING] > 0
    assert space.size == len(space.plans) + sum(space.excluded.values())
    report = solve(spec, exhaustive=True)  # the master agrees, or it would name an unknown plan
    assert report.status == "optimal"
    assert report.search.exhaustive is not None
    assert report.search.exhaustive["agrees"]
