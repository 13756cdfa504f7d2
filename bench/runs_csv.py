"""Measured runs (columns of ``runs_columns.md``) as cases: a scenario and the plan measured.

From a row only identity, load and settings are read here, never a metric.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from bench.assumptions import assumed_of
from bench.clients import Client, client_of
from bench.names import Names, resolve_names
from bench.uncovered import UncoveredError
from planner.errors import PlannerError
from planner.resolve import resolve
from planner.scenario import Scenario
from planner.space import broken_rule
from simulator.plan import Shape, parse_plan
from simulator.units import MS_PER_S

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from planner.problem import Problem
    from simulator.engine_rules import HostConstants
    from simulator.plan import Plan

__all__ = ["Case", "Cluster", "UncoveredError", "case_of", "is_scored", "parse_where", "read_rows"]

Row = dict[str, str]

_SETTINGS: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "vllm": {
        "max_num_seqs": ("max_num_seqs", "count"),
        "max_num_batched_tokens": ("max_num_batched_tokens", "count"),
        "memory_fraction": ("gpu_memory_utilization", "share"),
        "block_size": ("block_size", "count"),
        "chunked_prefill": ("enable_chunked_prefill", "switch"),
        "async_scheduling": ("async_scheduling", "switch"),
    },
    "sglang": {
        "max_num_seqs": ("max_running_requests", "count"),
        "max_num_batched_tokens": ("max_prefill_tokens", "count"),
        "chunked_prefill_size": ("chunked_prefill_size", "count"),
        "memory_fraction": ("mem_fraction_static", "share"),
        "block_size": ("page_size", "count"),
        "async_scheduling": ("async_scheduling", "switch"),
    },
    "trtllm": {
        "max_num_seqs": ("max_batch_size", "count"),
        "max_num_batched_tokens": ("max_num_tokens", "count"),
        "memory_fraction": ("kv_cache_free_gpu_memory_fraction", "share"),
        "chunked_prefill": ("enable_chunked_context", "switch"),
        "scheduler_policy": ("capacity_scheduler_policy", "word"),
        "block_size": ("tokens_per_block", "count"),
        "async_scheduling": ("async_scheduling", "switch"),
    },
}
"""Per engine: column, the engine's own name of the setting, and how it is written.

Prefix caching is left to the engine's default: no two prompts of these clients begin alike."""

_FLAGGED: Final = ("max_num_seqs", "max_num_batched_tokens", "memory_fraction", "kv_cache_dtype")
"""Settings that matter; a row that leaves one empty runs under the engine's default and says so."""


@dataclass(frozen=True, order=True)
class Cluster:
    """Runs that share everything that host constants may depend on."""

    model: str
    device: str
    engine: str
    version: str

    @property
    def label(self) -> str:
        """One word for tables and files."""
        return "|".join((self.model, self.device, self.engine, self.version))


@dataclass(frozen=True)
class Case:
    """A covered row.

    Parameters
    ----------
    row
        The row; its metrics are read by nobody but the scorer and the fit.
    names, client
        What its names stand for, and how it was loaded.
    scenario, plan
        What reproduces it, and the text of the plan measured.
    rules
        Scheduling rules in place of the engine version's own (`bench.assumptions`).
    defaulted
        Settings that matter and that the row leaves to the engine's default.

    """

    row: Row
    names: Names
    client: Client
    scenario: Scenario
    plan: str
    rules: Mapping[str, Any]
    defaulted: tuple[str, ...]

    @property
    def cluster(self) -> Cluster:
        """The cluster that the row belongs to."""
        return cluster_of(self.row)

    def problem(self, host: HostConstants | None = None) -> tuple[Problem, Plan]:
        """The resolved problem and the plan measured.

        Parameters
        ----------
        host
            Host constants in place of the engine version's own.

        Raises
        ------
        UncoveredError
            If the planner knows no such plan, or its engine cannot launch it, or it does not fit.

        """
        try:
            problem = resolve(self.scenario, host=host)
            problem = replace(problem, rules=problem.rules._replace(**self.rules))
            plan = _parsed(self.plan, problem)
            rule = broken_rule(problem, plan)
        except (PlannerError, ValueError) as error:
            raise UncoveredError(str(error)) from error
        if rule is not None:
            raise UncoveredError(rule)
        return problem, plan

    def predict(
        self, host: HostConstants | None = None, *, record_gaps: bool = False
    ) -> dict[str, float]:
        """Simulated metrics, named as the columns of ``runs_columns.md``.

        Parameters
        ----------
        host
            Host constants in place of the engine version's own.
        record_gaps
            Whether gaps between tokens are wanted also where the row has none.

        Raises
        ------
        UncoveredError
            If the planner cannot run the plan.

        """
        problem, plan = self.problem(host)
        record_gaps = record_gaps or self.row.get("itl_median_ms", "") != ""
        found = self._metrics(problem, plan, record_gaps)
        steps = _count(self.row, "scheduler_recv_interval")
        if steps > 1:
            # SGLang then takes requests in at every so many decode steps (managers/scheduler.py,
            # recv_skipper): half of them pass on average before a new one is seen.
            wait_s = steps / 2 * found["tpot_ms"] / MS_PER_S
            late = replace(problem, ingress_s=problem.ingress_s + wait_s)
            found = self._metrics(late, plan, record_gaps)
        return found

    def _metrics(self, problem: Problem, plan: Plan, record_gaps: bool) -> dict[str, float]:
        try:
            run = problem.start(plan, record_gaps=record_gaps)
        except ValueError as error:
            raise UncoveredError(str(error)) from error
        return self.client.metrics(run.finish(), problem.workload)


def _parsed(text: str, problem: Problem) -> Plan:
    try:
        return parse_plan(text, problem.default_limits)
    except ValueError as error:
        form = re.sub(r"[0-9]+", "N", text)
        raise UncoveredError(f"plans of the form {form} are not simulated") from error


def read_rows(path: Path, where: Mapping[str, str]) -> list[Row]:
    """Rows whose columns equal ``where``, in file order."""
    with path.open(newline="", encoding="utf-8") as file:
        return [r for r in csv.DictReader(file) if all(r.get(k) == v for k, v in where.items())]


def parse_where(text: str) -> dict[str, str]:
    """``a=x,b=y`` as a mapping; empty text selects every row."""
    pairs = [item.partition("=") for item in text.split(",") if item]
    return {key.strip(): value.strip() for key, _, value in pairs}


def is_scored(row: Mapping[str, str]) -> bool:
    """Whether a row counts: by ``scorable`` and ``duplicate_of`` alone."""
    return row.get("scorable") != "no" and not row.get("duplicate_of")


def cluster_of(row: Mapping[str, str]) -> Cluster:
    """The cluster of a row, under the names that the row uses."""
    return Cluster(row["model"], row["hardware"], row["engine"], row.get("engine_version") or "")


def case_of(row: Row, *, kv_cache_dtype: str | None = None, calibration: str | None = None) -> Case:
    """The case of one row.

    Parameters
    ----------
    row
        A row of the runs file.
    kv_cache_dtype
        Replaces the row's own.
    calibration
        ``none`` for kernel tables alone.

    Raises
    ------
    UncoveredError
        When a name or a setting of the row is not modelled.

    """
    if row.get("spec_decode", "") not in ("", "none"):
        raise UncoveredError("speculative decoding")
    client = client_of(row)
    release = resolve_names(row).release
    assumed = assumed_of(row, client, release)
    if client.concurrency:
        client = replace(client, concurrency=client.concurrency + assumed.more_in_flight)
    kv_cache_dtype = kv_cache_dtype or assumed.kv_cache_dtype
    names = resolve_names(
        {**row, "kv_cache_dtype": kv_cache_dtype or row.get("kv_cache_dtype", "")}
    )
    engine: dict[str, Any] = {"name": names.release.engine, "version": names.release.version}
    held = row
    if assumed.budget_prompts and not row.get("max_num_batched_tokens"):
        held = {**row, "max_num_batched_tokens": str(assumed.budget_prompts * _longest_in(client))}
    engine |= _settings(held, client, names.release.engine)
    if calibration is not None:
        engine["calibration"] = calibration
    shape, replicas = _shape(row)
    if assumed.hold_iterations and shape.dp > 1:
        engine["attention_dp_config"] = {
            "enable_balance": True,
            "timeout_iters": assumed.hold_iterations,
            "batching_wait_iters": 0,
        }
    longest = max(_count(row, "max_model_len"), client.longest_tokens)
    data: dict[str, Any] = {
        "schema_version": 1,
        "model": names.checkpoint.reaching(longest).section(longest),
        "cluster": {
            "pools": [
                {"device": names.device, "nodes": 1, "devices_per_node": replicas * shape.devices}
            ]
        },
        "engine": engine,
        "workload": client.workload(),
        "objective": {"minimize": "mean_e2e"},
        "search": {
            "space": {
                "tp": [shape.tp],
                "pp": [shape.pp],
                "dp": [shape.dp],
                "ep": [shape.ep],
                "replicas": [replicas],
            }
        },
    }
    try:
        scenario = Scenario.model_validate(data)
    except PlannerError as error:
        raise UncoveredError(str(error)) from error
    defaulted = [column for column in _FLAGGED if not row.get(column)]
    return Case(
        row=row,
        names=names,
        client=client,
        scenario=scenario,
        plan=(f"{replicas}x" if replicas > 1 else "") + shape.text,
        rules=assumed.rules,
        defaulted=(*defaulted, *client.assumed),
    )


def _settings(row: Row, client: Client, engine: str) -> dict[str, Any]:
    """The engine's settings that the row states, under the engine's own names."""
    out: dict[str, Any] = {}
    for column, (setting, kind) in _SETTINGS[engine].items():
        text = row.get(column, "").strip()
        if not text:
            continue
        if kind == "count":
            out[setting] = _count(row, column)
        elif kind == "share":
            out[setting] = float(text)
        else:
            out[setting] = text == "on" if kind == "switch" else text
    if engine == "trtllm" and {"max_batch_size", "max_num_tokens"} <= out.keys():
        # Every running request takes a token of each step: no more run than the budget has tokens.
        out["max_batch_size"] = min(out["max_batch_size"], out["max_num_tokens"])
    if client.arrival == "static_batch":
        # A static batch is computed whole: its prompts are one step.
        column = "chunked_prefill_size" if engine == "sglang" else "max_num_batched_tokens"
        out.setdefault(_SETTINGS[engine][column][0], client.requests * client.longest_tokens)
        if engine == "trtllm":
            out["capacity_scheduler_policy"] = "static_batch"
    return out


def _shape(row: Row) -> tuple[Shape, int]:
    """How a replica is spread over devices, and how many there are.

    ``dp`` counts attention groups of one replica where experts are spread over them or the row
    says so, else replicas.
    """
    tp, pp, dp, ep = (max(_count(row, column), 1) for column in ("tp", "pp", "dp", "ep"))
    if ep == 1 and row.get("expert_parallel") == "on":
        ep = tp * dp
    joined = row.get("attention_dp") == "on" or ep > tp
    try:
        return (Shape(tp, pp, dp, ep), 1) if joined else (Shape(tp, pp, 1, ep), dp)
    except ValueError as error:
        raise UncoveredError(str(error)) from error


def _longest_in(client: Client) -> int:
    """Longest prompt of a client of fixed lengths, tokens."""
    return int(client.input_tokens["max"])


def _count(row: Row, column: str) -> int:
    """A whole number, or 0 where the row is silent."""
    text = row.get(column) or ""
    try:
        return int(float(text)) if text else 0
    except ValueError:
        raise UncoveredError(f"{column} is {text}") from None
