"""The search against brute force: every plan listed by plain loops and simulated to its end.

The brute side knows neither the master nor the search, bounds or scores: it has its own rules,
its own formulas on the finished runs' times and its own order of ties.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

import planner.search
from planner.api import solve
from planner.objective import Constraint, Objective
from planner.resolve import resolve
from planner.scenario import Scenario
from planner.search import Search
from simulator.plan import BatchingLimits, Plan
from tests.problems import OBJECTIVES, goal, mapping, random_sections

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy.typing as npt

    from planner.problem import Problem
    from planner.report import PlanReport

MEASURED_WIDTHS = (1, 2, 4, 8)
NANOSECONDS = 1_000_000_000
FINE_CHECKS = 13
"""Iterations between looks at a bound: small runs are never looked at with the search's 2048."""


@dataclass(frozen=True)
class Simulated:
    """One plan that can run and its finished times, (N,) seconds each."""

    plan: Plan
    ttft_s: npt.NDArray[np.float64]
    tpot_s: npt.NDArray[np.float64]
    e2e_s: npt.NDArray[np.float64]
    makespan_s: float

    def nanoseconds(self, statistic: str, metric: str) -> int:
        """A statistic in whole nanoseconds, the resolution in which plans are compared."""
        values_s = {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2e": self.e2e_s}[metric]
        if len(values_s) == 0:
            return 0
        value_s = values_s.mean() if statistic == "mean" else np.quantile(values_s, 0.99)
        return round(float(value_s) * NANOSECONDS)

    def rank(self, objective: str, problem: Problem) -> tuple[int, ...]:
        """Value, secondary value, devices, changed defaults, then the plan's own order."""
        plan, defaults = self.plan, problem.pool.default_limits
        devices = plan.replicas * plan.shape.tp * plan.shape.pp
        if objective == "devices":
            value = (devices, self.nanoseconds("mean", "e2e"))
        elif objective == "throughput":
            value = (round(self.makespan_s * NANOSECONDS), devices)
        else:
            statistic, metric = objective.split("_")
            value = (self.nanoseconds(statistic, metric), devices)
        seqs, tokens = plan.limits.max_num_seqs, plan.limits.max_num_batched_tokens
        changed = (seqs != defaults.max_num_seqs) + (tokens != defaults.max_num_batched_tokens)
        return (*value, devices, changed, plan.shape.pp, plan.replicas, seqs, tokens)

    def keeps(self, slo: Mapping[tuple[str, str], float]) -> bool:
        """Whether every limit, milliseconds, is kept."""
        return all(
            self.nanoseconds(statistic, metric) <= round(limit_ms * 1e6)
            for (metric, statistic), limit_ms in slo.items()
        )


def simulate_all(problem: Problem) -> list[Simulated]:
    """Every plan of the grid that can run, simulated to its end."""
    model, grid = problem.model, problem.space
    found = []
    for shape in grid.shapes:
        tp, pp = shape.tp, shape.pp
        (layer,) = model.layer_counts
        divides = layer.mixer.num_heads % tp == 0 and layer.ffn.intermediate_size % tp == 0
        kv_heads = layer.mixer.num_kv_heads % tp == 0 or tp % layer.mixer.num_kv_heads == 0
        known = tp in MEASURED_WIDTHS and tp * pp <= problem.pool.devices_per_node
        if not (divides and kv_heads and known and pp <= model.num_layers):
            continue
        for seqs in grid.max_num_seqs:
            for tokens in grid.max_num_batched_tokens:
                limits = BatchingLimits(seqs, tokens)
                held_tokens = problem.blocks(shape, limits) * problem.pool.memory_rules.block_tokens
                if tokens < seqs or held_tokens < problem.max_model_len:
                    continue
                counts = [n for n in grid.replicas if n * tp * pp <= problem.pool.num_devices]
                found.extend(simulate_one(problem, Plan(n, shape, limits)) for n in counts)
    return found


def simulate_one(problem: Problem, plan: Plan) -> Simulated:
    """Run ``plan`` to its end; latencies from the times of arrival, first and last token."""
    result = problem.start(plan).finish()
    ttft_s = result.first_token_s - result.arrival_s
    gaps = problem.workload.output_tokens - 1
    several = gaps > 0
    tpot_s = (result.finish_s - result.first_token_s)[several] / gaps[several]
    makespan_s = result.finish_s.max() - result.arrival_s.min()
    return Simulated(plan, ttft_s, tpot_s, result.finish_s - result.arrival_s, float(makespan_s))


def value_of(objective: str, primary: int, problem: Problem) -> float:
    """The value in the report's unit."""
    if objective == "throughput":
        return float(problem.workload.output_tokens.sum() / (primary / NANOSECONDS))
    return float(primary) if objective == "devices" else primary / 1e6


def draw_slo(simulated: list[Simulated], rng: np.random.Generator) -> dict[tuple[str, str], float]:
    """One or two limits drawn around the plans' values, some below all of them.

    A limit exactly at a plan's value, which that plan keeps, is the most common.
    """
    slo = {}
    for _ in range(int(rng.integers(1, 3))):
        metric = ("ttft", "tpot", "e2e")[int(rng.integers(3))]
        statistic = ("mean", "p99")[int(rng.integers(2))]
        values = sorted(s.nanoseconds(statistic, metric) for s in simulated)
        at = values[int(rng.integers(len(values)))]
        limit = (at, at, values[0] - 1)[int(rng.integers(3))]
        slo[metric, statistic] = max(1, limit) / 1e6
    return slo


def with_slo(slo: Mapping[tuple[str, str], float]) -> dict[str, dict[str, float]] | None:
    """The scenario's SLO section."""
    section: dict[str, dict[str, float]] = {}
    for (metric, statistic), limit_ms in slo.items():
        section.setdefault(f"{metric}_ms", {})[statistic] = limit_ms
    return section or None


def check_counts(report: PlanReport, feasible: int, grid: int) -> None:
    """Every plan of the grid is counted once, under what became of it."""
    search = report.search
    settled = (
        search.excluded_by_bound
        + search.aborted
        + search.identical
        + search.simulated
        + search.breaks_slo
    )
    assert (search.feasible, settled, search.space) == (feasible, feasible, grid)
    assert sum(search.excluded_by_rule.values()) == grid - feasible


@pytest.mark.parametrize("seed", range(48))
def test_solve_equals_brute_force(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One solve names brute force's plan and value, or finds none where brute force finds none."""
    if seed % 3:
        monkeypatch.setattr(planner.search, "_CHECK_EVERY", FINE_CHECKS)
    objective = OBJECTIVES[seed // 2 % len(OBJECTIVES)]
    sections = random_sections(seed, tmp_path)
    sections["objective"] = goal(objective)
    bare = Scenario.model_validate(mapping(**sections), base_dir=tmp_path)
    problem = resolve(bare)
    simulated = simulate_all(problem)
    rng = np.random.default_rng(1000 + seed)
    slo = draw_slo(simulated, rng) if simulated and seed % 2 else {}
    sections["slo"] = with_slo(slo)
    scenario = Scenario.model_validate(mapping(**sections), base_dir=tmp_path)

    report = solve(scenario, exhaustive=seed % 4 == 0)

    allowed = [s for s in simulated if s.keeps(slo)]
    grid = problem.space
    sizes = (grid.shapes, grid.replicas, grid.max_num_seqs, grid.max_num_batched_tokens)
    check_counts(report, len(simulated), int(np.prod([len(s) for s in sizes])))
    if not allowed:
        assert report.status == "infeasible"
        return
    best = min(allowed, key=lambda s: s.rank(objective, problem))
    primary = best.rank(objective, problem)[0]
    assert report.status == "optimal"
    assert report.plan is not None
    assert report.objective is not None
    assert report.plan.id == problem.plan_text(best.plan)
    assert report.objective.value == pytest.approx(value_of(objective, primary, problem), rel=1e-12)
    assert report.bound == report.objective.value
    by_id = {problem.plan_text(s.plan): s for s in simulated}
    for row in report.alternatives:
        theirs = by_id[row.id]
        assert row.value == pytest.approx(
            value_of(objective, theirs.rank(objective, problem)[0], problem), rel=1e-12
        )
        assert bool(row.breaks) == (not theirs.keeps(slo))
        assert row.breaks or row.loss_pct >= 0.0
    if seed % 4 == 0:
        every = report.search.exhaustive
        assert every is not None
        assert (every["agrees"], every["complete"]) == (True, True)
        assert every["best"] == report.plan.id


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", [100, 101, 102, 103])
def test_search_equals_brute_force_for_every_objective(
    seed: int, objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On each kind of arrival each objective finds brute force's plan, with SLOs and without."""
    monkeypatch.setattr(planner.search, "_CHECK_EVERY", FINE_CHECKS)
    sections = random_sections(seed, tmp_path)
    problem = resolve(Scenario.model_validate(mapping(**sections), base_dir=tmp_path))
    problem = replace(
        problem, objective=Objective(objective, int(problem.workload.output_tokens.sum()))
    )
    simulated = simulate_all(problem)
    rng = np.random.default_rng(seed)
    for slo in ({}, draw_slo(simulated, rng), draw_slo(simulated, rng)):
        constraints = tuple(Constraint(m, s, limit_ms) for (m, s), limit_ms in slo.items())
        found = Search(problem, problem.objective, constraints).run()
        allowed = [s for s in simulated if s.keeps(slo)]
        assert found.proved
        if not allowed:
            assert found.best is None
            continue
        best = min(allowed, key=lambda s: s.rank(objective, problem))
        assert found.best is not None
        assert (found.best.plan, *found.best.score) == (
            best.plan,
            *best.rank(objective, problem)[:2],
        )


def test_the_seeds_cover_what_they_claim(tmp_path: Path) -> None:
    """Among the random scenarios are preemptions, empty spaces and every kind of arrival."""
    preempted, empty, modes = 0, 0, set()
    for seed in range(48):
        sections = random_sections(seed, tmp_path)
        scenario = Scenario.model_validate(mapping(**sections), base_dir=tmp_path)
        problem = resolve(scenario)
        modes.add(scenario.workload.arrival_mode)
        plans = [s.plan for s in simulate_all(problem)]
        preempted += any(problem.start(p).finish().preemptions for p in plans)
        empty += not plans
    assert modes == {"poisson", "all_at_once", "closed_loop", "trace"}
    assert preempted >= 10
    assert empty >= 1
