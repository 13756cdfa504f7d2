"""The autoscaling example over its whole day: the order of costs at the same service."""

from __future__ import annotations

import pytest

from bench.autoscaling import GOAL, compare


@pytest.mark.slow
def test_order_of_costs() -> None:
    """At the goal the planner costs less than the untuned rule, and that less than one plan."""
    outcomes = compare(24.0)
    static, threshold, planner, tuned = (one.device_hours for one in outcomes)
    assert min(one.attainment for one in outcomes) >= GOAL
    assert planner < 0.8 * threshold
    assert threshold < static
    assert planner < 1.1 * tuned
