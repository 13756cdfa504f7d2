"""Intervals of predictions, and runners-up inside the noise."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

from planner.objective import Objective
from planner.resolve import resolve
from planner.uncertainty import (
    BUSY,
    DENSE,
    half_widths,
    metrics_interval,
    noise_between_plans,
    regime_of,
    too_close,
)
from simulator.plan import parse_plan
from tests.problems import scenario

if TYPE_CHECKING:
    from planner.problem import Problem

_METRICS = {
    "request_throughput": 2.0,
    "output_throughput": 400.0,
    "mean_ttft_ms": 100.0,
    "mean_tpot_ms": 10.0,
    "mean_e2el_ms": 1000.0,
    "overloaded": False,
}


@pytest.fixture(scope="module")
def problem() -> Problem:
    """A small dense model under a trace."""
    return resolve(scenario())


def test_intervals_hold_the_prediction(problem: Problem) -> None:
    """Every interval lies round its metric and is as wide as its regime says."""
    plan = parse_plan("tp1", problem.default_limits)
    found = metrics_interval(problem, plan, _METRICS)
    half = half_widths(problem, plan, _METRICS)
    for name, around in found.items():
        assert around["low"] < _METRICS[name] < around["high"]
    assert found["mean_tpot_ms"]["high"] == pytest.approx(10.0 * math.exp(half["tpot"]))
    e2e = math.log(found["mean_e2el_ms"]["high"] / 1000.0)
    assert e2e == pytest.approx(0.1 * half["ttft"] + 0.9 * half["tpot"])


def test_a_throughput_that_arrivals_set_has_no_interval(problem: Problem) -> None:
    """Requests that come at their own pace leave at it, unless the server is overloaded."""
    plan = parse_plan("tp1", problem.default_limits)
    spread = np.arange(float(problem.workload.num_requests))
    paced = dataclasses.replace(
        problem, workload=dataclasses.replace(problem.workload, arrival_s=spread)
    )
    assert "output_throughput" in metrics_interval(problem, plan, _METRICS)
    assert "output_throughput" not in metrics_interval(paced, plan, _METRICS)
    overloaded = {**_METRICS, "overloaded": True}
    assert "output_throughput" in metrics_interval(paced, plan, overloaded)


def test_a_busy_front_end_is_a_regime_of_its_own(problem: Problem) -> None:
    """Counted per server: two servers take twice as many requests."""
    one, two = (parse_plan(text, problem.default_limits) for text in ("tp1", "2xtp1"))
    busy = {**_METRICS, "request_throughput": 20.0}
    assert regime_of(problem, one, _METRICS, "ttft") == DENSE
    assert regime_of(problem, one, busy, "ttft") == BUSY
    assert regime_of(problem, two, busy, "ttft") == DENSE
    assert regime_of(problem, one, busy, "output_throughput") == DENSE


def test_only_close_plans_are_too_close(problem: Problem) -> None:
    """Inside the noise it names both with their commands; beyond it or where equal it does not."""
    one, two = (parse_plan(text, problem.default_limits) for text in ("tp1", "2xtp1"))
    noise = noise_between_plans(
        problem.objective, _METRICS["mean_ttft_ms"] / _METRICS["mean_e2el_ms"]
    )
    assert noise is not None
    near = too_close(problem, (one, 100.0), (two, 100.0 * math.exp(0.5 * noise)), _METRICS)
    assert near is not None
    assert set(near.measure) == {"tp1", "2xtp1"}
    assert "cannot be told apart" in near.warning("tp1")
    assert all(near.measure.values())
    assert too_close(problem, (one, 100.0), (two, 100.0 * math.exp(1.1 * noise)), _METRICS) is None
    assert too_close(problem, (one, 100.0), (two, 100.0), _METRICS) is None


def test_devices_are_counted_not_predicted(problem: Problem) -> None:
    """No noise where the objective is a count."""
    assert noise_between_plans(Objective("devices", 1), 0.5) is None
    assert noise_between_plans(Objective("throughput", 1), 0.5) is not None
    one = parse_plan("tp1", problem.default_limits)
    counted = dataclasses.replace(problem, objective=Objective("devices", 1))
    assert too_close(counted, (one, 1.0), (one, 2.0), _METRICS) is None


def test_noise_of_e2e_weighs_its_parts() -> None:
    """All of E2E latency in its later tokens: TPOT's noise; all before the first: TTFT's."""
    names = ("mean_tpot", "mean_e2e", "p99_ttft", "mean_e2e")
    tpot, no_ttft, ttft, only_ttft = (
        noise_between_plans(Objective(name, 1), share)
        for name, share in zip(names, (0.5, 0.0, 0.5, 1.0), strict=True)
    )
    assert tpot is not None
    assert ttft is not None
    assert tpot == no_ttft < ttft == only_ttft
