"""Parts of the autoscaling example; ``test_bench_autoscaling_day`` runs it."""

from __future__ import annotations

import pytest

from bench.autoscaling import Day, mix_of


@pytest.fixture(scope="module")
def day() -> Day:
    """The first two hours."""
    return Day(2.0)


def test_mix() -> None:
    """The mean is the clients' mean, and a mix of two varies more than either."""
    assert mix_of(0.0)["input_tokens"] == {"mean": 600, "cv": 1.0, "max": 14000}
    assert mix_of(1.0)["output_tokens"]["mean"] == 120
    half = mix_of(0.5)["input_tokens"]
    assert half["mean"] == 2800
    assert half["cv"] > 0.9


def test_day(day: Day) -> None:
    """A controller sees only minutes that have passed; every request counts once."""
    assert day.seen(10) == max(day.rates[5:10])
    assert int(day.starts[-1]) == len(day.problem.workload.arrival_s)
    assert 0 <= day.share(10) <= 1
