"""What a solve or a simulation says: frozen data for programs, rendered elsewhere for people."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from planner.errors import InputError
from planner.export.flags import launch_commands
from planner.io.json_file import read_object
from planner.layouts import is_theoretical
from simulator.metrics import overloaded, summary
from simulator.units import GIB

if TYPE_CHECKING:
    from collections.abc import Mapping

    from planner.problem import Problem
    from planner.uncertainty import TooClose
    from simulator.plan import Plan
    from simulator.run import RunResult

SCHEMA_VERSION: Final = 1
_SIGNIFICANT_DIGITS: Final = 10
"""Digits of a number in JSON: more than any figure means, few enough to agree across CPUs."""


@dataclass(frozen=True)
class PlanSummary:
    """The plan as the contract's ``plan`` object.

    ``cost_per_hour`` is in USD, or ``None`` without a price. ``launch`` has one command per
    replica; ``memory`` is in GiB per device, and its KV tokens count one replica. ``theoretical``
    says that the engine version cannot launch the plan, for which there are no commands then; it is
    written only where it is true. ``device`` names the pool that it runs in, where there are
    several, and is left out where there is one.
    """

    id: str
    replicas: int
    tp: int
    pp: int
    dp: int
    ep: int
    devices: int
    max_num_seqs: int
    max_num_batched_tokens: int
    cost_per_hour: float | None
    memory: Mapping[str, float]
    launch: tuple[str, ...]
    theoretical: bool = False
    device: str = ""

    @classmethod
    def of(cls, problem: Problem, plan: Plan) -> PlanSummary:
        """Describe ``plan``."""
        budget, price = (
            problem.memory(plan.shape, plan.limits),
            problem.pool_of(plan.shape).price_per_hour,
        )
        theoretical = is_theoretical(problem, plan.shape)
        blocks = problem.blocks(plan.shape, plan.limits)
        return cls(
            id=problem.plan_text(plan),
            replicas=plan.replicas,
            tp=plan.shape.tp,
            pp=plan.shape.pp,
            dp=plan.shape.dp,
            ep=plan.shape.ep,
            devices=plan.devices,
            max_num_seqs=plan.limits.max_num_seqs,
            max_num_batched_tokens=plan.limits.max_num_batched_tokens,
            cost_per_hour=None if price is None else price * plan.devices,
            memory={
                "usable_gib": budget.usable_bytes / GIB,
                "weights_gib": budget.weight_bytes / GIB,
                "activations_gib": budget.activation_bytes / GIB,
                "overhead_gib": (budget.overhead_bytes + budget.graph_bytes) / GIB,
                "kv_cache_gib": blocks * budget.block_bytes / GIB,
                "kv_cache_tokens": problem.tokens_held(plan.shape, blocks),
            },
            launch=() if theoretical else launch_commands(problem, plan),
            theoretical=theoretical,
            device=plan.shape.device,
        )


@dataclass(frozen=True)
class Alternative:
    """A runner-up.

    Parameters
    ----------
    id, devices
        The plan.
    value
        Its simulated objective value, in the report's unit.
    loss_pct
        How much worse than the chosen plan, percent of the chosen plan's value.
    breaks
        Constraints that it breaks, for which it is no candidate.
    theoretical
        Whether the engine version cannot launch it; written only where it is true.
    """

    id: str
    devices: int
    value: float
    loss_pct: float
    breaks: tuple[str, ...]
    theoretical: bool = False


@dataclass(frozen=True)
class ObjectiveSummary:
    """What was optimised and the value reached."""

    name: str
    sense: str
    value: float
    unit: str
    tie_break: str


@dataclass(frozen=True)
class SearchSummary:
    """How the answer was reached.

    Parameters
    ----------
    space, feasible
        Plans of the grid, and those that can run.
    excluded_by_rule
        Plans per rule that excludes them.
    excluded_by_bound
        Plans whose bound alone rules them out, never simulated.
    aborted, identical, simulated
        Plans stopped when their bound passed the best value, settled by a run identical to
        theirs, and simulated to the end.
    breaks_slo
        Plans proved to break a constraint.
    iterations
        Iterations simulated by the search.
    exhaustive
        With ``--exhaustive``: iterations of simulating every plan, of the distinct trajectories
        among them, the share that the search needed of the latter, and whether both name the
        same plan with the same value.
    seconds
        Wall-clock seconds of the solve, only where asked for: it differs between runs.
    """

    space: int
    feasible: int
    excluded_by_rule: Mapping[str, int]
    excluded_by_bound: int
    aborted: int
    identical: int
    simulated: int
    breaks_slo: int
    iterations: int
    exhaustive: Mapping[str, Any] | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class PlanReport:
    """Answer of a solve.

    Parameters
    ----------
    status
        ``optimal`` (proved), ``feasible`` (stopped by a limit) or ``infeasible`` (proved).
    plan, objective, metrics
        The plan, its value and its behaviour; ``None`` or empty where infeasible.
    bound, gap
        Value that no plan can beat, in the objective's unit, and relative distance to it.
    alternatives
        Runners-up, best first.
    search, provenance, warnings
        How it was found, from what data, and what to know about it.
    infeasible
        Where infeasible ``reason`` and ``relaxation`` in words, ``conflict``, the scenario's fields
        that exclude one another, and ``changes``: values of fields by their dotted path, each set
        of which alone makes some plan feasible.
    metrics_interval
        90 % interval of each metric whose error was measured (`planner.uncertainty`).
    too_close
        The runner-up, where predictions cannot tell it from the plan.
    deterministic
        False only where a time limit or Ctrl-C stopped the search.
    """

    status: str
    plan: PlanSummary | None
    objective: ObjectiveSummary | None
    bound: float | None
    gap: float | None
    metrics: Mapping[str, float]
    alternatives: tuple[Alternative, ...]
    search: SearchSummary
    provenance: Mapping[str, object]
    warnings: tuple[str, ...]
    infeasible: Mapping[str, Any] | None = None
    metrics_interval: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    too_close: TooClose | None = None
    deterministic: bool = True
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain data, keys as in the contract; numbers rounded to ten digits."""
        data: dict[str, Any] = _plain(dataclasses.asdict(self))
        if self.search.seconds is None:
            del data["search"]["seconds"]
        for plan in (data["plan"], *data["alternatives"]):
            _without_unset(plan)
        return data

    def to_json(self) -> str:
        """Canonical JSON text: equal reports give equal bytes."""
        return dump_json(self.to_dict())


@dataclass(frozen=True)
class SimulationReport:
    """Answer of a simulation of one plan."""

    plan: PlanSummary
    metrics: Mapping[str, float]
    breaks: tuple[str, ...]
    provenance: Mapping[str, object]
    warnings: tuple[str, ...]
    metrics_interval: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    status: str = "simulated"
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain data; numbers rounded to ten digits."""
        data: dict[str, Any] = _plain(dataclasses.asdict(self))
        _without_unset(data["plan"])
        return data

    def to_json(self) -> str:
        """Canonical JSON text."""
        return dump_json(self.to_dict())


def run_metrics(problem: Problem, plan: Plan, result: RunResult) -> dict[str, float]:
    """Metrics of a finished run, with what it used of its limits and what it costs."""
    usage = result.usage
    out = summary(
        result.values,
        problem.workload,
        result.makespan_s,
        result.gaps,
        problem.goodput_limits_s,
    )
    out["preemptions"] = result.preemptions
    out["iterations"] = result.iterations
    out["peak_running"] = usage.seats
    out["peak_kv_usage"] = usage.blocks / problem.blocks(plan.shape, plan.limits)
    out["overloaded"] = overloaded(result.values, result.arrival_s, problem.workload)
    price = problem.pool_of(plan.shape).price_per_hour
    if price is not None:
        tokens_per_hour = out["output_throughput"] * 3600
        cost = price * plan.devices
        out["cost_per_million_output_tokens"] = cost / tokens_per_hour * 1e6
    return out


def plan_of_report(path: str) -> str:
    """The plan's text in a report that ``solve --json`` wrote.

    Raises
    ------
    InputError
        When the file is no such report, or no plan was found in it.
    """
    plan = read_object(Path(path), source=path).get("plan")
    name = plan.get("id") if isinstance(plan, dict) else None
    if not isinstance(name, str):
        rule = "names no plan: give a report of a solve that found one"
        raise InputError(source=path, field="plan.id", value=name, rule=rule)
    return name


def dump_json(data: object) -> str:
    """Indented JSON with sorted keys and a final newline."""
    return json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _without_unset(plan: dict[str, Any] | None) -> None:
    """Leave out of a plan what is only written where it says something."""
    for name in ("theoretical", "device"):
        if plan is not None and name in plan and not plan[name]:
            del plan[name]


def _plain(value: Any) -> Any:
    """Tuples as lists, floats rounded, everything else as it is."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{_SIGNIFICANT_DIGITS}g}")
    return value
