"""Every objective, alone and in lists, on one to three pools, against simulation of every plan.

``SERVEPLAN_ORACLE=300`` (or 5000, for a night) sets how many random scenarios are looked at.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import pytest

import planner.search
from planner.objective import Constraint, Objective
from planner.resolve import resolve
from planner.scenario import Scenario
from planner.search import Search
from planner.space import enumerate_space
from tests.problems import engine, mapping, pools, random_sections

if TYPE_CHECKING:
    from pathlib import Path

    from planner.problem import Problem
    from simulator.plan import Plan
    from simulator.run import RunResult

SCENARIOS = int(os.environ.get("SERVEPLAN_ORACLE", "40"))
FINE_CHECKS = 13
PRICE = 3.9
NS = 1_000_000_000
NAMES = (
    "mean_ttft",
    "p50_ttft",
    "p99.9_ttft",
    "mean_tpot",
    "p90_tpot",
    "mean_itl",
    "p99_itl",
    "mean_e2e",
    "p95_e2e",
    "makespan",
    "throughput",
    "goodput",
    "slo_attainment",
    "devices",
    "cost_per_hour",
    "cost_per_million_tokens",
)


def ticks(name: str, problem: Problem, plan: Plan, run: RunResult, limit_s: float) -> int:
    """One quantity of a finished run, by formulas of this file alone; less is better."""
    devices = plan.replicas * plan.shape.tp * plan.shape.pp
    outputs = problem.workload.output_tokens
    span_ns = round(float(run.finish_s.max() - run.arrival_s.min()) * NS)
    late = run.first_token_s - run.arrival_s > limit_s
    price = problem.pools[plan.shape.device].price_per_hour
    assert price is not None
    micros = round(price * 1_000_000) * devices
    good = int((~late).sum())
    plain = {
        "makespan": span_ns,
        "throughput": span_ns,
        "devices": devices,
        "cost_per_hour": micros,
        "cost_per_million_tokens": micros * span_ns // (3600 * int(outputs.sum())),
        "slo_attainment": int(late.sum()),
        "goodput": min(span_ns // good, 1 << 48) if good else 1 << 48,
    }
    if name in plain:
        return plain[name]
    statistic, metric = name.split("_")
    if metric == "itl":
        assert run.gaps is not None
        values = np.repeat(*run.gaps)
    else:
        several = outputs > 1
        decode_s = (run.finish_s - run.first_token_s)[several] / (outputs[several] - 1)
        values = {
            "ttft": run.first_token_s - run.arrival_s,
            "e2e": run.finish_s - run.arrival_s,
            "tpot": decode_s,
        }[metric]
    if len(values) == 0:
        return 0
    value = values.mean() if statistic == "mean" else np.percentile(values, float(statistic[1:]))
    return round(float(value) * NS)


def order(problem: Problem, plan: Plan) -> tuple[int | str, ...]:
    """Place among plans of equal score."""
    own, defaults = plan.limits, problem.pools[plan.shape.device].default_limits
    seqs, tokens = own.max_num_seqs, own.max_num_batched_tokens
    changed = (seqs != defaults.max_num_seqs) + (tokens != defaults.max_num_batched_tokens)
    devices = plan.replicas * plan.shape.tp * plan.shape.pp
    return devices, changed, plan.shape.pp, plan.replicas, seqs, tokens, plan.shape.device


@pytest.mark.parametrize("seed", range(500, 500 + SCENARIOS))
def test_search_equals_simulation_of_every_plan(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and plan are those of the best of all runs; where none keeps the SLO, there is none."""
    monkeypatch.setattr(planner.search, "_CHECK_EVERY", FINE_CHECKS)
    rng = np.random.default_rng(seed)
    sections = random_sections(seed, tmp_path)
    if seed % 2:
        sections |= {"cluster": pools(seed), "engine": engine()}
    else:
        sections["cluster"]["pools"][0]["price_per_hour"] = PRICE
    problem = resolve(Scenario.model_validate(mapping(**sections), base_dir=tmp_path))
    plans = enumerate_space(problem).plans
    if not plans:
        pytest.skip("no plan of this grid can run")
    names = list(rng.choice(NAMES, int(rng.choice([1, 1, 2, 3])), replace=False))
    names[0] = NAMES[seed % len(NAMES)]
    names = list(dict.fromkeys(map(str, names)))
    last = "mean_e2e" if "devices" in names else "devices"
    runs = {plan: problem.start(plan, record_gaps=True).finish() for plan in plans}
    # Half a picosecond beside the grid of times: no rounding of this file's can decide.
    median_s = np.median(list(chain(*(r.values.ttft_s for r in runs.values()))))
    limit_s = (round(float(median_s) * 1e12) + 0.5) / 1e12
    goal = Objective(
        names[0],
        int(problem.workload.output_tokens.sum()),
        tuple(names[1:]),
        {"ttft": limit_s},
        problem.workload.num_requests,
    )

    def score(plan: Plan) -> tuple[int, ...]:
        return tuple(ticks(n, problem, plan, runs[plan], limit_s) for n in (*names, last))

    constraints: tuple[Constraint, ...] = ()
    allowed = list(plans)
    if seed % 3 == 0:
        means = {p: ticks("mean_e2e", problem, p, runs[p], limit_s) for p in plans}
        at = sorted(means.values())[int(rng.integers(len(means)))] - int(rng.integers(2))
        constraints = (Constraint("e2e", "mean", at / 1e6),)
        allowed = [p for p in plans if means[p] <= at]

    found = Search(replace(problem, objective=goal), goal, constraints).run()

    assert found.proved
    if not allowed:
        assert found.best is None
        return
    best = min(allowed, key=lambda p: (score(p), order(problem, p)))
    assert found.best is not None
    assert (problem.plan_text(found.best.plan), found.best.score) == (
        problem.plan_text(best),
        score(best),
    )
