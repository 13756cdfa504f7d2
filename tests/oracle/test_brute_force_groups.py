"""Spaces with attention data parallel: search against brute force, bounds, certificates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import planner.search
from planner.api import solve
from planner.candidates import Trace
from planner.plan_floors import PlanFloors
from planner.resolve import resolve
from planner.space import enumerate_space
from planner.verify import verify
from planner.verify_master import master_disagrees
from tests.problems import goal, pool, scenario
from tests.property.test_bounds import check_run

if TYPE_CHECKING:
    from planner.problem import Problem
    from planner.scenario import Scenario
    from simulator.plan import Plan

NANOSECONDS = 1_000_000_000
MIXTURES = ("Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V2-Lite")
"""Plain attention, and a latent one."""


def grouped(objective: str, seed: int = 0, **sections: Any) -> Scenario:
    """Four devices in every way that has at most four attention groups."""
    rng = np.random.default_rng(seed)
    space = {
        "tp": [1, 2],
        "pp": [1],
        "dp": [1, 2, 4],
        "max_num_seqs": [2, 8],
        "max_num_batched_tokens": [64, 512],
    }
    return scenario(
        **{
            "model": {"config": MIXTURES[seed % 2], "max_model_len": 512},
            "cluster": pool(4, device="H200-SXM-141GB"),
            "workload": {
                "input_tokens": {"min": 20, "max": int(rng.integers(60, 300))},
                "output_tokens": {"min": 1, "max": int(rng.integers(5, 60))},
                "num_requests": int(rng.integers(20, 60)),
                "arrival": "poisson",
                "request_rate": float(rng.integers(20, 200)),
            },
            "objective": goal(objective),
            "search": {"seed": seed, "space": space},
            **sections,
        }
    )


def rank(problem: Problem, plan: Plan, objective: str) -> tuple[int, ...]:
    """Value in whole nanoseconds, then devices, changed limits and the plan's own order."""
    result = problem.start(plan).finish()
    ttft_s, e2e_s = result.first_token_s - result.arrival_s, result.finish_s - result.arrival_s
    makespan_s = result.finish_s.max() - result.arrival_s.min()
    value_s = {
        "mean_e2e": e2e_s.mean(),
        "p99_ttft": np.quantile(ttft_s, 0.99),
        "throughput": makespan_s,
    }[objective]
    return round(float(value_s) * NANOSECONDS), *plan.tie_key(problem.default_limits)


@pytest.mark.parametrize(
    ("objective", "seed"), [("mean_e2e", 0), ("p99_ttft", 1), ("throughput", 2), ("mean_e2e", 3)]
)
def test_search_equals_brute_force(
    objective: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search finds the plan that simulating them all finds, and proves it."""
    monkeypatch.setattr(planner.search, "_CHECK_EVERY", 13)
    asked = grouped(objective, seed)
    problem = resolve(asked)
    plans = enumerate_space(problem).plans
    assert {plan.shape.dp for plan in plans} == {1, 2, 4}
    best = min(plans, key=lambda plan: rank(problem, plan, objective))
    report = solve(asked)
    assert report.status == "optimal"
    assert report.plan is not None
    assert report.plan.id == problem.plan_text(best)


@pytest.mark.parametrize(
    "engine",
    [
        {"name": "vllm", "version": "0.11.0"},
        {"name": "vllm", "version": "0.24.0"},
        pytest.param({"name": "sglang", "version": "0.5.9"}, marks=pytest.mark.compiles),
        pytest.param({"name": "trtllm", "version": "1.0.0rc3"}, marks=pytest.mark.compiles),
    ],
    ids=lambda engine: f"{engine['name']}-{engine['version']}",
)
def test_bounds_hold_for_compiled_costs(engine: dict[str, str]) -> None:
    """Floors of a group's least cost are below every run of every plan, wherever it is cut."""
    asked = grouped("mean_e2e", 1, engine=engine)
    problem = resolve(asked)
    plans = enumerate_space(problem).plans
    known = PlanFloors.of(problem, plans)
    for plan in plans:
        if plan.shape.dp > 1:
            floors = known.of_class(plan.shape, plan.limits).floors
            check_run(problem.start(plan), floors, problem.start(plan).finish(), stride=40)


def test_certificate_of_groups_is_accepted() -> None:
    """The verifier simulates groups again and finds their bounds from their least cost."""
    texts: list[str] = []
    asked = grouped("mean_e2e", 4)
    solve(asked, on_certificate=texts.append)
    assert "dp2" in texts[0]
    verified, problem = verify(texts[0], source="c.json", sample=None)
    assert (verified.status, verified.simulated) == ("optimal", verified.exact)
    assert master_disagrees(problem, texts[0]) is None


def test_plans_that_share_a_run_run_alike() -> None:
    """Limits that never bind change nothing in groups either, graphs and padding included."""
    space = {
        "tp": [1],
        "pp": [1],
        "dp": [2, 4],
        "max_num_seqs": [64, 128],
        "max_num_batched_tokens": [128, 1024, 2048],
    }
    problem = resolve(grouped("mean_e2e", 1, search={"space": space}))
    plans = [plan for plan in enumerate_space(problem).plans if plan.shape.dp > 1]
    runs = {plan: problem.start(plan) for plan in plans}
    hashes = {plan: run.finish().trajectory_hash() for plan, run in runs.items()}
    shared = 0
    for plan, run in runs.items():
        trace = Trace(plan, run.limits, run.cost, run.usage())
        for other in plans:
            if other != plan and trace.same_for(other, runs[other].limits, runs[other].cost):
                assert hashes[other] == hashes[plan]
                shared += 1
    assert shared > 0
