"""Groups of plans to choose from, the runs behind them, and how the two join.

From both files only identity, plans, loads and settings are taken: a measured value cannot leave
this module, because none is ever put into what it returns. ``bench.choice_score`` reads the values.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final

from planner.errors import NO_VALUE, InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

Row = dict[str, str]

SETTINGS: Final = (
    *("run_id", "source", "date", "hardware", "n_gpus", "model", "quantization", "engine"),
    *("engine_version", "tp", "pp", "dp", "ep", "isl", "osl", "load_kind", "load", "checkpoint"),
    *("weight_dtype", "kv_cache_dtype", "arrival", "num_prompts", "warmup_requests"),
    *("input_len_min", "input_len_max", "input_len_mean", "output_len_min", "output_len_max"),
    *("output_len_mean", "output_len_p50", "output_len_p90", "output_len_p99", "ignore_eos"),
    *("prefix_cache", "max_num_seqs", "max_num_batched_tokens", "chunked_prefill"),
    *("chunked_prefill_size", "max_model_len", "memory_fraction", "memory_fraction_kind"),
    *("cuda_graph", "async_scheduling", "expert_parallel", "attention_dp", "spec_decode"),
    *("plan_uncertain", "scheduler_recv_interval", "stream_interval", "block_size"),
    *("moe_backend", "attention_backend", "scheduler_policy", "delay_batching", "statistic"),
    *("metric_window", "basis"),
)
"""Columns of a run that say what was run; the others, metrics above all, are dropped on reading."""

SERVER_LIMITS: Final = (
    "kv_cache_dtype",
    "max_num_seqs",
    "max_num_batched_tokens",
    "memory_fraction",
)
"""Server settings that decide batches; where a run leaves one empty, a default stands in."""

ITL_GROUPS: Final = "itl_slo_best_throughput"
TPOT_GROUPS: Final = "tpot_slo_best_throughput"

_RUN_COLUMNS: Final = ("model", "hardware", "engine", "quantization", "isl", "osl", "tp", "load")
_GROUP_COLUMNS: Final = (
    *("group_id", "group_type", "model", "hardware", "engine", "quantization", "isl", "osl"),
    *("load_or_slo", "plan", "n_gpus"),
)
_SHAPE: Final = re.compile(r"tp(\d+)(?:pp(\d+))?(?:dp(\d+))?(?:ep(\d+))?")
_LIMIT: Final = re.compile(r"(TPOT|median ITL)\s*<=\s*([\d.]+)\s*ms")
_LOAD: Final = re.compile(r"(?:static_batch|concurrency)=([\d.]+)")
_LIMIT_METRICS: Final = {"TPOT": "tpot_ms", "median ITL": "itl_median_ms"}

JoinKey = tuple[str, str, str, str, str, "Shape"]


@dataclass(frozen=True, order=True)
class Shape:
    """Widths of a plan in the order in which ties go: tensor parallel alone comes first."""

    pp: int
    dp: int
    ep: int
    tp: int

    @property
    def is_pure_tp(self) -> bool:
        """Whether nothing but tensor parallelism splits the model."""
        return self.pp == self.dp == self.ep == 1


@dataclass(frozen=True)
class Run:
    """One measured run without its measurements.

    Parameters
    ----------
    settings
        The columns of :data:`SETTINGS`; empty text where the file says nothing.
    shape
        Its plan.
    """

    settings: Row
    shape: Shape

    @cached_property
    def key(self) -> tuple[str, ...]:
        """All settings but the run's own name: runs of equal keys are the same experiment."""
        return tuple(self.settings[name] for name in SETTINGS if name != "run_id")


@dataclass(frozen=True)
class Candidate:
    """One plan of a group; ``shape`` is ``None`` where the plan's text is not understood."""

    plan: str
    shape: Shape | None
    n_gpus: int
    source: str
    osl: str
    date: str

    @property
    def tie_key(self) -> tuple[int, Shape, str]:
        """Place among plans of equal prediction: fewer GPUs, then less besides TP."""
        return self.n_gpus, self.shape or Shape(0, 0, 0, 0), self.plan


@dataclass(frozen=True)
class Group:
    """Plans measured on the same model, hardware, engine and load.

    Parameters
    ----------
    group_id, group_type, model, hardware, engine, engine_version, quantization, isl
        Identity, as the file has it; ``engine_version`` may be empty.
    load_or_slo, objective
        The load or limit, and what was measured, as the file has them.
    mixed_date
        Whether its plans were measured more than a week apart.
    candidates
        Its plans in the order of ties.
    """

    group_id: str
    group_type: str
    model: str
    hardware: str
    engine: str
    engine_version: str
    quantization: str
    isl: str
    load_or_slo: str
    objective: str
    mixed_date: bool
    candidates: tuple[Candidate, ...]

    @property
    def is_slo(self) -> bool:
        """Whether the best load within a limit counts, rather than one load."""
        return self.group_type in (ITL_GROUPS, TPOT_GROUPS)

    @property
    def is_latency(self) -> bool:
        """Whether a lower value is better."""
        return "latency" in self.group_type

    @property
    def limit(self) -> tuple[str, float] | None:
        """Metric that is limited, and its limit in ms; ``None`` where nothing is.

        Raises
        ------
        ValueError
            If the text of an SLO group states no limit that is understood.
        """
        if not self.is_slo or self.load_or_slo.lower() == "no slo":
            return None
        match = _LIMIT.fullmatch(self.load_or_slo)
        if match is None:
            raise ValueError(f"limit {self.load_or_slo!r} is not understood")
        return _LIMIT_METRICS[match[1]], float(match[2])

    @property
    def load(self) -> float | None:
        """Load that a static or fixed-concurrency group is measured at, requests."""
        match = None if self.is_slo else _LOAD.match(self.load_or_slo)
        return float(match[1]) if match else None

    def same_gpus(self) -> list[Group]:
        """Each set of two or more of its plans with equal GPU counts, as a group of its own."""
        sets: dict[int, list[Candidate]] = {}
        for candidate in self.candidates:
            sets.setdefault(candidate.n_gpus, []).append(candidate)
        return [replace(self, candidates=tuple(c)) for c in sets.values() if len(c) > 1]

    @property
    def cluster(self) -> str:
        """Model, device and engine: groups of one cluster repeat the same few configurations."""
        return " | ".join((self.model, self.hardware, self.engine))

    @property
    def sources(self) -> str:
        """Where its plans were published."""
        return " + ".join(sorted({candidate.source for candidate in self.candidates}))


def parse_shape(text: str) -> Shape | None:
    """Widths of a plan's text ``tpA[ppB][dpC][epD]``, or ``None`` for another form."""
    match = _SHAPE.fullmatch(text.strip())
    if match is None:
        return None
    tp, pp, dp, ep = (int(width or 1) for width in match.groups())
    return Shape(pp, dp, ep, tp)


def read_groups(path: Path) -> list[Group]:
    """Groups of a cases file in the order of their ids, without what was measured.

    Raises
    ------
    InputError
        If a column is missing, ``n_gpus`` is no number, or a group lists a plan twice.
    """
    by_id: dict[str, list[Row]] = {}
    for row in read_table(path, _GROUP_COLUMNS):
        by_id.setdefault(row["group_id"], []).append(row)
    return [_group(path, by_id[group_id]) for group_id in sorted(by_id)]


def read_runs(path: Path) -> list[Run]:
    """Runs to simulate: every row but those marked unscorable or a duplicate of another.

    Raises
    ------
    InputError
        If a column is missing or a width is no number.
    """
    runs = []
    for number, row in enumerate(read_table(path, _RUN_COLUMNS), start=2):
        if row.get("scorable") == "no" or row.get("duplicate_of"):
            continue
        settings = {name: row.get(name, "") for name in SETTINGS}
        try:
            pp, dp, ep, tp = (int(float(settings[w] or 1)) for w in ("pp", "dp", "ep", "tp"))
        except ValueError:
            widths = "/".join(settings[w] for w in ("tp", "pp", "dp", "ep"))
            raise InputError(
                source=str(path),
                field=f"line {number}, tp/pp/dp/ep",
                value=widths,
                rule="must be whole numbers",
            ) from None
        runs.append(Run(settings, Shape(pp, dp, ep, tp)))
    return runs


def read_table(path: Path, needed: Sequence[str]) -> list[Row]:
    """Rows of a CSV file with text stripped.

    Raises
    ------
    InputError
        If the file is absent or lacks one of the ``needed`` columns.
    """
    if not path.is_file():
        raise InputError(source=str(path), field="", value=NO_VALUE, rule="no such file")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [name for name in needed if name not in (reader.fieldnames or ())]
        if missing:
            rule = f"needs the column {', '.join(missing)}"
            raise InputError(source=str(path), field="header", value=NO_VALUE, rule=rule)
        return [{k: (v or "").strip() for k, v in row.items() if k is not None} for row in reader]


class RunIndex:
    """Finds the runs behind a group's plan."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self._by_key: dict[JoinKey, list[Run]] = {}
        for run in runs:
            s = run.settings
            key = (s["model"], s["hardware"], s["engine"], s["quantization"], s["isl"], run.shape)
            self._by_key.setdefault(key, []).append(run)

    def runs_of(self, group: Group, candidate: Candidate) -> list[Run]:
        """Runs of one plan of a group, in an order that does not depend on the file's.

        They agree in model, hardware, engine, quantization, isl and plan; in osl unless the group
        limits ITL (there every run has its own mean length); in engine version where the group
        states one; in load where the group has one. Among these the plan's own source comes
        first, and any other stands in where it has none. The checkpoint plays no part.
        """
        if candidate.shape is None:
            return []
        identity = (group.model, group.hardware, group.engine, group.quantization, group.isl)
        found = self._by_key.get((*identity, candidate.shape), [])
        if group.group_type != ITL_GROUPS:
            found = [run for run in found if run.settings["osl"] == candidate.osl]
        if group.engine_version:
            version = group.engine_version
            found = [run for run in found if run.settings["engine_version"] == version]
        if group.load is not None:
            found = [run for run in found if _number(run.settings["load"]) == group.load]
        own = [run for run in found if run.settings["source"] == candidate.source]
        return sorted(own or found, key=lambda run: run.key)


def _group(path: Path, rows: list[Row]) -> Group:
    first = rows[0]
    candidates = sorted((_candidate(path, row) for row in rows), key=lambda c: c.tie_key)
    plans = [candidate.plan for candidate in candidates]
    if len(set(plans)) < len(plans):
        raise InputError(
            source=str(path),
            field=f"group {first['group_id']}",
            value=", ".join(plans),
            rule="must list each plan once",
        )
    return Group(
        group_id=first["group_id"],
        group_type=first["group_type"],
        model=first["model"],
        hardware=first["hardware"],
        engine=first["engine"],
        engine_version=first.get("engine_version", ""),
        quantization=first["quantization"],
        isl=first["isl"],
        load_or_slo=first["load_or_slo"],
        objective=first.get("objective", ""),
        mixed_date=first.get("mixed_date") == "yes",
        candidates=tuple(candidates),
    )


def _candidate(path: Path, row: Row) -> Candidate:
    n_gpus = _number(row["n_gpus"])
    if n_gpus is None:
        raise InputError(
            source=str(path),
            field=f"group {row['group_id']}, n_gpus",
            value=row["n_gpus"],
            rule="must be a whole number",
        )
    return Candidate(
        plan=row["plan"],
        shape=parse_shape(row["plan"]),
        n_gpus=int(n_gpus),
        source=row.get("source", ""),
        osl=row["osl"],
        date=row.get("date", ""),
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
