"""How sure a prediction is: intervals of its metrics, and plans that cannot be told apart.

Widths come from ``profiles/uncertainty/errors.json``: errors of predictions on public measured
runs, each cluster (model, device, engine version) judged by constants that did not see it, made by
`bench.intervals`. They hold for means; percentiles were not measured, so they get no interval.

Regimes, by what tells errors apart: dense models, mixtures of experts, and, for latencies, servers
that take so many requests per second that their front end is no longer free, whatever the model
(what was measured of throughput comes mostly from offline runs, without a front end).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field

from planner.export.flags import launch_commands
from planner.io.data_file import Entry, read_checked
from planner.layouts import is_theoretical
from simulator.model import Experts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from planner.objective import Objective
    from planner.problem import Problem
    from simulator.plan import Plan

THROUGHPUT: Final = "output_throughput"
METRICS: Final = ("tpot", "ttft", THROUGHPUT)
"""Metrics whose errors were measured."""
DENSE: Final = "dense"
EXPERTS: Final = "experts"
BUSY: Final = "busy_front_end"

_FOLDER, _NAME = "uncertainty", "errors.json"
ERRORS_FILE: Final = Path(str(files("profiles"))) / _FOLDER / _NAME

_ESTIMATED_LOG: Final = 0.3
"""What is added, as an independent error, where a device's kernel times are scaled from another's:
the 90 % quantile of scaled GEMM and attention times is 25 to 50 % off, their median 10 to 20 %
(bench/figures.json, device_estimates); over the many kernels of an iteration part of it cancels."""

_ALL_FROM: Final = 1e-9
"""Objective values closer than this relative distance are equal."""


class _Width(Entry):
    half_width_log: Annotated[float, Field(gt=0, lt=5)]
    runs: Annotated[int, Field(ge=0)]
    clusters: Annotated[int, Field(ge=0)]


class _Errors(Entry):
    schema_version: Literal[1]
    source: str
    coverage: Annotated[float, Field(gt=0, lt=1)]
    busy_requests_per_s: Annotated[float, Field(gt=0)]
    half_widths: dict[str, dict[str, _Width]]
    between_plans_log: dict[str, float]


@lru_cache(maxsize=1)
def _errors() -> _Errors:
    return read_checked(_FOLDER, _NAME, _Errors)


def regime_of(problem: Problem, plan: Plan, metrics: Mapping[str, float], metric: str) -> str:
    """The regime of one of `METRICS` of a simulated plan."""
    per_server = metrics["request_throughput"] / plan.replicas
    if metric != THROUGHPUT and per_server >= _errors().busy_requests_per_s:
        return BUSY
    has_experts = any(isinstance(layer.ffn, Experts) for layer in problem.model.layer_counts)
    return EXPERTS if has_experts else DENSE


def half_widths(problem: Problem, plan: Plan, metrics: Mapping[str, float]) -> dict[str, float]:
    """Half width of the 90 % interval of each metric, as a logarithm."""
    own = {
        name: by[regime_of(problem, plan, metrics, name)].half_width_log
        for name, by in _errors().half_widths.items()
    }
    if problem.pool_of(plan.shape).compiler.is_estimated:
        own = {name: math.hypot(half, _ESTIMATED_LOG) for name, half in own.items()}
    return own


def metrics_interval(
    problem: Problem, plan: Plan, metrics: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """90 % intervals of the mean metrics of a simulated plan.

    Parameters
    ----------
    problem, plan
        What was simulated.
    metrics
        Its metrics (`planner.report.run_metrics`).

    Returns
    -------
    dict
        ``{"low": ..., "high": ...}`` by metric, in the metric's unit. A throughput that the
        arrivals set, and not the server, has none.

    """
    half = half_widths(problem, plan, metrics)
    found = {"mean_ttft_ms": half["ttft"]}
    if "mean_tpot_ms" in metrics:
        found["mean_tpot_ms"] = half["tpot"]
    # E2E is TTFT and the later tokens; errors of both may point the same way.
    share = _ttft_share(metrics)
    found["mean_e2el_ms"] = share * half["ttft"] + (1 - share) * half["tpot"]
    work = problem.workload
    if work.concurrency or metrics["overloaded"] or not work.arrival_s.any():
        found[THROUGHPUT] = half[THROUGHPUT]
    return {
        name: {
            "low": metrics[name] * math.exp(-width),
            "high": metrics[name] * math.exp(width),
        }
        for name, width in found.items()
    }


@dataclass(frozen=True)
class TooClose:
    """A runner-up that the predictions cannot tell from the chosen plan.

    Parameters
    ----------
    plan
        The runner-up.
    gap_pct
        Predicted distance of the two, percent.
    noise_pct
        Error of predicted distances between plans under one load (90 % quantile), percent.
    measure
        Commands that launch each of the two, by plan; none of a theoretical one.

    """

    plan: str
    gap_pct: float
    noise_pct: float
    measure: Mapping[str, tuple[str, ...]]

    def warning(self, best: str) -> str:
        """One line for people."""
        return (
            f"{best} and {self.plan} cannot be told apart: {self.gap_pct:.1f} % apart as "
            f"predicted, where such distances are off by up to {self.noise_pct:.0f} %; measure both"
        )


def noise_between_plans(objective: Objective, ttft_share: float) -> float | None:
    """Noise of the distance between two plans' objective values, as a logarithm.

    Parameters
    ----------
    objective
        Its first quantity counts.
    ttft_share
        Share of TTFT in E2E latency: both errors may point the same way.

    Returns
    -------
    float
        ``None`` for what is counted and not predicted, and for what was not measured.
    """
    between = _errors().between_plans_log
    if objective.name in ("throughput", "makespan", "cost_per_million_tokens"):
        return between[THROUGHPUT]
    metric = objective.name.rpartition("_")[2]
    if metric == "e2e":
        return ttft_share * between["ttft"] + (1 - ttft_share) * between["tpot"]
    return between.get("tpot" if metric == "itl" else metric)


def _ttft_share(metrics: Mapping[str, float]) -> float:
    return min(metrics["mean_ttft_ms"] / metrics["mean_e2el_ms"], 1.0)


def too_close(
    problem: Problem,
    best: tuple[Plan, float],
    runner_up: tuple[Plan, float],
    metrics: Mapping[str, float],
) -> TooClose | None:
    """Whether the runner-up is inside the noise; ``None``: it is not.

    Parameters
    ----------
    problem
        What was solved.
    best, runner_up
        Plans and their objective values.
    metrics
        The best plan's metrics (`planner.report.run_metrics`).

    """
    noise = noise_between_plans(problem.objective, _ttft_share(metrics))
    if noise is None or min(best[1], runner_up[1]) <= 0:
        return None
    gap = abs(math.log(runner_up[1] / best[1]))
    if gap >= noise or gap < _ALL_FROM:
        return None
    return TooClose(
        plan=problem.plan_text(runner_up[0]),
        gap_pct=100 * math.expm1(gap),
        noise_pct=100 * math.expm1(noise),
        measure={
            problem.plan_text(plan): ()
            if is_theoretical(problem, plan.shape)
            else tuple(launch_commands(problem, plan))
            for plan, _ in (best, runner_up)
        },
    )
