"""Learning intervals: quantiles by cluster, left-out coverage, pairs of plans."""

from __future__ import annotations

import numpy as np
import pytest

from bench.intervals import Point, judge, judge_pairs, left_out, pairs_of, quantile
from planner.uncertainty import DENSE


def _points(spread: float, clusters: int = 6, runs: int = 60) -> list[Point]:
    rng = np.random.default_rng(0)
    return [
        Point(f"c{c}", DENSE, (f"c{c}", str(i // 2)), f"tp{1 + i % 2}", 1.0 + error, 1.0)
        for c in range(clusters)
        for i, error in enumerate(rng.normal(0, spread, runs))
    ]


def test_a_cluster_counts_as_the_root_of_its_runs() -> None:
    """A hundred runs against one: ten against one."""
    many = [Point("a", DENSE, (), "tp1", 0.1, 0.0)] * 100
    one = Point("b", DENSE, (), "tp1", 5.0, 0.0)
    assert quantile([*many, one], [0.1] * 100 + [5.0]) == 0.1  # 10 of 11 are above 90 %
    few = [*many[:4], one]
    assert quantile(few, [0.1] * 4 + [5.0]) == 5.0


def test_normal_errors_are_covered_nine_times_in_ten() -> None:
    """Coverage and width as theory has them: 2 x 1.645 against a median of 0.6745."""
    found = judge(_points(0.05))
    assert found["covered_pct"] == pytest.approx(90, abs=4)
    assert found["width_over_median_error"] == pytest.approx(2 * 1.645 / 0.6745, rel=0.12)


def test_no_interval_sees_its_own_cluster() -> None:
    """A cluster that is far off keeps the width of the others."""
    good = _points(0.05)
    bad = [Point("bad", DENSE, ("bad", str(i)), "tp1", 3.0, 1.0) for i in range(50)]
    half = left_out([*good, *bad])
    assert half[-1] < 0.2
    assert half[0] > half[-1]


def test_pairs_are_different_plans_of_one_cell() -> None:
    """Two plans a cell: one pair each."""
    points = _points(0.05, clusters=2, runs=10)
    pairs = pairs_of(points)
    assert len(pairs) == 10
    assert all(a.cell == b.cell and a.plan != b.plan for a, b in pairs)


def test_equal_plans_are_said_to_be_close_and_rightly() -> None:
    """Measured alike, predicted with noise: said of most, and right each time."""
    found = judge_pairs(pairs_of(_points(0.05)))
    assert found["said"] > 0.7 * found["pairs"]
    assert found["right_pct"] == 100.0
