"""Measured runs (columns of ``runs_columns.md``) as scenarios: which rows are covered, and how.

From a row only identity, load and settings are read here, never a metric.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from planner.errors import PlannerError
from planner.scenario import Scenario

if TYPE_CHECKING:
    from pathlib import Path

Row = dict[str, str]

_DTYPES = ("bf16", "fp8")


@dataclass(frozen=True)
class Case:
    """A covered row: the scenario that reproduces it and the plan that was measured."""

    row: Row
    scenario: Scenario
    plan: str


class UncoveredError(Exception):
    """A row that the planner cannot simulate; the text says why."""


def read_rows(path: Path, where: dict[str, str]) -> list[Row]:
    """Rows whose columns equal ``where``, in file order."""
    with path.open(newline="", encoding="utf-8") as file:
        return [r for r in csv.DictReader(file) if all(r.get(k) == v for k, v in where.items())]


def parse_where(text: str) -> dict[str, str]:
    """``a=x,b=y`` as a mapping; empty text selects every row."""
    pairs = [item.partition("=") for item in text.split(",") if item]
    return {key.strip(): value.strip() for key, _, value in pairs}


def case_of(row: Row, *, kv_cache_dtype: str | None = None, calibration: str | None = None) -> Case:
    """The scenario of one row.

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
        When a setting of the row is not modelled.
    """
    if row["engine"] != "vllm":
        raise UncoveredError(f"engine {row['engine']}")
    if row["arrival"] != "closed_loop_burst":
        raise UncoveredError(f"arrival {row['arrival'] or 'unknown'}")
    if row["pp"] not in ("", "1") or row["dp"] not in ("", "1") or row["ep"] not in ("", "1"):
        raise UncoveredError("pipeline, data or expert parallel")
    if row["spec_decode"] not in ("", "none"):
        raise UncoveredError("speculative decoding")
    if row["weight_dtype"] not in _DTYPES:
        raise UncoveredError(f"weight dtype {row['weight_dtype'] or 'unknown'}")
    kv_dtype = kv_cache_dtype or row["kv_cache_dtype"] or "auto"
    tp, concurrency = _whole(row, "tp"), _whole(row, "load")
    data: dict[str, Any] = {
        "schema_version": 1,
        "model": {
            "config": row["model"],
            "weight_dtype": row["weight_dtype"],
            "kv_cache_dtype": kv_dtype,
            "max_model_len": _whole(row, "max_model_len"),
        },
        "cluster": {"pools": [{"device": row["hardware"], "nodes": 1, "devices_per_node": tp}]},
        "engine": {
            "name": row["engine"],
            "version": row["engine_version"],
            "max_num_seqs": _whole(row, "max_num_seqs"),
            "max_num_batched_tokens": _whole(row, "max_num_batched_tokens"),
        },
        "workload": {
            "input_tokens": _range(row, "input_len"),
            "output_tokens": _range(row, "output_len"),
            "num_requests": _whole(row, "num_prompts"),
            "concurrency": concurrency,
        },
        "objective": {"minimize": "mean_e2e"},
        "search": {"space": {"tp": [tp], "replicas": [1]}},
    }
    if row["memory_fraction"]:
        data["engine"]["gpu_memory_utilization"] = float(row["memory_fraction"])
    if row["block_size"]:
        data["engine"]["block_size"] = _whole(row, "block_size")
    if calibration is not None:
        data["engine"]["calibration"] = calibration
    try:
        return Case(row, Scenario.model_validate(data), f"tp{tp}")
    except PlannerError as error:
        raise UncoveredError(str(error)) from error


def _whole(row: Row, column: str) -> int:
    if not row[column]:
        raise UncoveredError(f"{column} unknown")
    return int(float(row[column]))


def _range(row: Row, stem: str) -> dict[str, int]:
    return {"min": _whole(row, f"{stem}_min"), "max": _whole(row, f"{stem}_max")}
