"""Measured serving runs as files state them: servers, their requests as served, and outcomes.

A folder holds ``serving_runs_h100_*.csv`` (one run a row; several rows of ``*_detail.csv`` are the
servers behind it), ``serving_runs_rtx_*.csv`` (one run of one server a row) and the requests of
each server under ``requests_*/``. The suffix of the files does not matter. A run that cannot be
read is listed with the reason; a file without a needed column is an input error.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from bench.measured_server import Requests, Server, ServingRun
from planner.errors import NO_VALUE, InputError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]

Row = dict[str, str]

HASHED_TOKENS: Final = 16
"""Tokens of one block hash (column ``block16_hash_ids_input_then_output``)."""

_NS_PER_S: Final = 1e9
_MS_PER_S: Final = 1e3

_RUN_COLUMNS: Final = ("engine", "hf", "workload", "rate", "plan", "status")
_SERVER_COLUMNS: Final = (
    "kind",
    "engine",
    "engine_version",
    "model_hf",
    "weights",
    "kv_cache",
    "gpu",
    "plan",
    "tp",
    "ep",
    "workload",
    "rate_tag",
    "max_model_len",
    "gpu_mem_util",
    "custom_all_reduce",
    "other_flags",
    "per_request_file",
    "n_requests",
    "served_output_tokens",
    "mean_ttft_s",
    "mean_tpot_s",
    "mean_e2e_s",
    "status",
)
_CARD_COLUMNS: Final = (
    "run",
    "hardware",
    "model",
    "engine",
    "tp",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "gpu_memory_utilization",
    "num_gpu_blocks",
    "block_size",
    "prefix_caching",
)
_SERVED_COLUMNS: Final = ("arrival_ns", "input_tokens", "output_tokens")
_TIMED_COLUMNS: Final = (
    "queued_s",
    "input_tokens",
    "output_tokens",
    "ttft_ms",
    "tpot_ms",
    "e2e_ms",
    "finish_s",
)


@dataclass
class Found:
    """What a folder holds: runs, and for each that could not be read its name and the reason."""

    runs: list[ServingRun] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def read_folder(folder: Path) -> Found:
    """Every serving run below ``folder``.

    Raises
    ------
    InputError
        If the folder holds none, or a file lacks a column.

    """
    found = Found()
    files = sorted(p for p in folder.glob("serving_runs_*.csv") if not _is_detail(p))
    if not files:
        raise InputError(
            source=str(folder),
            field="serving_runs_*.csv",
            value=NO_VALUE,
            rule="at least one such file is needed",
        )
    for path in files:
        rows = _rows(path, ())
        if rows and "hardware" in rows[0]:
            _read_cards(path, found)
        else:
            _read_shared(path, found)
    return found


def _is_detail(path: Path) -> bool:
    return path.stem.endswith("_detail")


def _read_shared(path: Path, found: Found) -> None:
    """Runs whose servers are in a detail file beside."""
    runs = _rows(path, _RUN_COLUMNS)
    details = _rows(path.with_name(f"{path.stem}_detail.csv"), _SERVER_COLUMNS)
    by_run: dict[tuple[str, ...], list[Row]] = {}
    for row in details:
        if row["kind"] == "server":
            key = (row["engine"], row["model_hf"], row["workload"], row["rate_tag"], row["plan"])
            by_run.setdefault(key, []).append(row)
    for row in runs:
        key = (row["engine"], row["hf"], row["workload"], row["rate"], row["plan"])
        name = " ".join((row["engine"], row["hf"].split("/")[-1], *key[2:]))
        servers = by_run.get(key, [])
        broken = sorted({r["status"] for r in (row, *servers)} - {"ok"})
        if broken:
            found.skipped.append((name, f"status {broken[0]}"))
        elif not servers:
            found.skipped.append((name, "no row of the detail file describes its servers"))
        else:
            found.runs.append(_shared_run(name, row, servers, path.parent))


def _shared_run(name: str, row: Row, servers: list[Row], folder: Path) -> ServingRun:
    first = servers[0]
    return ServingRun(
        name=name,
        engine=first["engine"],
        engine_version=_version(first["engine_version"]),
        model=_bare(first["model_hf"]),
        weights=_bare(first["weights"]),
        kv_cache=_bare(first["kv_cache"]),
        device=first["gpu"],
        trace=row["workload"],
        rate=row["rate"],
        servers=tuple(_shared_server(server, folder) for server in servers),
        measured_s=_pooled_s(servers),
        pooled_tpot=True,
    )


def _pooled_s(servers: list[Row]) -> dict[str, float]:
    """Means over all requests of a run, from those of its servers; TPOT over tokens."""
    requests = np.array([float(row["n_requests"]) for row in servers])
    later_tokens = np.array([float(row["served_output_tokens"]) for row in servers]) - requests
    weights = {"ttft": requests, "tpot": later_tokens, "e2e": requests}
    out = {}
    for metric, weight in weights.items():
        means = [_number(row[f"mean_{metric}_s"]) for row in servers]
        known = [mean for mean in means if mean is not None]
        if len(known) == len(servers):
            out[metric] = float(np.average(known, weights=weight))
    return out


def _shared_server(row: Row, folder: Path) -> Server:
    path = folder / row["per_request_file"]
    served = _rows(path, _SERVED_COLUMNS)
    arrival_s = _column(served, "arrival_ns", path) / _NS_PER_S
    return Server(
        tp=int(row["tp"]),
        ep=_whole(row["ep"]) or 1,
        requests=_requests(arrival_s, served, path),
        max_model_len=_whole(row["max_model_len"]),
        memory_fraction=_number(row["gpu_mem_util"]),
        custom_all_reduce=row["custom_all_reduce"] != "disabled",
        cuda_graphs="--disable-cuda-graph" not in row["other_flags"]
        and "--enforce-eager" not in row["other_flags"],
    )


def _read_cards(path: Path, found: Found) -> None:
    """Runs of one server each, with the times of every request."""
    for row in _rows(path, _CARD_COLUMNS):
        if row.get("dp", "1") not in ("", "1"):
            found.skipped.append((row["run"], f"attention data parallel {row['dp']}"))
            continue
        file = path.parent / "requests_rtx" / f"{row['run']}.csv"
        found.runs.append(_card_run(row, file))


def _card_run(row: Row, path: Path) -> ServingRun:
    engine, _, version = row["engine"].partition(" ")
    timed = _rows(path, _TIMED_COLUMNS)
    queued_s = _column(timed, "queued_s", path)
    several = _column(timed, "output_tokens", path) > 1
    # The engine's own clock starts when the request is queued: its TTFT and E2E do too.
    measured = {
        "ttft": _column(timed, "ttft_ms", path).mean() / _MS_PER_S,
        "tpot": _column(timed, "tpot_ms", path)[several].mean() / _MS_PER_S,
        "e2e": _column(timed, "e2e_ms", path).mean() / _MS_PER_S,
        "makespan": _column(timed, "finish_s", path).max() - queued_s.min(),
    }
    server = Server(
        tp=int(row["tp"]),
        ep=int(row["tp"]) if row.get("ep", "").lower() == "true" else 1,
        requests=_requests(queued_s, timed, path),
        max_model_len=_whole(row["max_model_len"]),
        memory_fraction=_number(row["gpu_memory_utilization"]),
        max_num_seqs=_whole(row["max_num_seqs"]),
        max_num_batched_tokens=_whole(row["max_num_batched_tokens"]),
        block_tokens=_whole(row["block_size"]),
        num_blocks=_whole(row["num_gpu_blocks"]),
        prefix_caching={"true": True, "false": False}.get(row["prefix_caching"].lower()),
    )
    return ServingRun(
        name=row["run"],
        engine=engine,
        engine_version=version,
        model=row["model"],
        weights=row.get("dtype", ""),
        kv_cache=row.get("kv_cache_dtype", ""),
        device=row["hardware"],
        trace=path.parent.name,
        rate=row.get("arrival_rate_rps", ""),
        servers=(server,),
        measured_s={metric: float(value) for metric, value in measured.items()},
        pooled_tpot=False,
    )


def _requests(arrival_s: Floats, rows: list[Row], path: Path) -> Requests:
    """Requests sorted by arrival; a row without output still took one token to say so."""
    order = np.argsort(arrival_s, kind="stable")
    prompts = _column(rows, "input_tokens", path).astype(np.int64)
    outputs = _column(rows, "output_tokens", path).astype(np.int64)
    return Requests(arrival_s[order], np.maximum(prompts, 1)[order], np.maximum(outputs, 1)[order])


def read_contents(folder: Path | None) -> list[tuple[Ints, Ints, list[Ints]]]:
    """Block hashes of request lists: prompt lengths, output lengths, ids of full prompt blocks.

    Every ``*.csv`` of ``folder/sharegpt_block_hashes`` is one list; a run's requests are known by
    their lengths.
    """
    out = []
    for path in sorted((folder / "sharegpt_block_hashes").glob("*.csv")) if folder else []:
        ids = "block16_hash_ids_input_then_output"
        rows = _rows(path, ("input_tokens", "output_tokens", "input_full_blocks", ids))
        full = _column(rows, "input_full_blocks", path).astype(np.int64)
        blocks = [
            np.array(row[ids].split()[:count], np.int64)
            for row, count in zip(rows, full, strict=True)
        ]
        prompts, outputs = (
            _column(rows, column, path).astype(np.int64)
            for column in ("input_tokens", "output_tokens")
        )
        out.append((prompts, outputs, blocks))
    return out


def _rows(path: Path, columns: tuple[str, ...]) -> list[Row]:
    if not path.exists():
        raise InputError(source=str(path), field="file", value=NO_VALUE, rule="must exist")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [c for c in columns if c not in (reader.fieldnames or ())]
        if missing:
            raise InputError(
                source=str(path), field=missing[0], value=NO_VALUE, rule="this column is needed"
            )
        return [{key: (value or "").strip() for key, value in r.items() if key} for r in reader]


def _column(rows: list[Row], column: str, path: Path) -> Floats:
    try:
        values = np.array([float(row[column]) for row in rows])
    except ValueError:
        raise InputError(
            source=str(path), field=column, value=NO_VALUE, rule="must hold numbers"
        ) from None
    if not len(values) or not np.isfinite(values).all():
        raise InputError(
            source=str(path), field=column, value=NO_VALUE, rule="must hold finite numbers"
        )
    return values


def _number(text: str) -> float | None:
    """The number that a cell is, or ``None`` for words (``model default``, ``not recorded``)."""
    try:
        return float(text)
    except ValueError:
        return None


def _whole(text: str) -> int | None:
    value = _number(text)
    return None if value is None else int(value)


def _bare(text: str) -> str:
    """A cell without its remark in parentheses: ``bf16 (default)`` is ``bf16``."""
    return re.sub(r"\s*\(.*", "", text)


def _version(text: str) -> str:
    """First version number of a cell: ``>=0.4.4.post2 (dockerfile)`` is ``0.4.4.post2``."""
    found = re.search(r"\d+(?:\.\w+)+", text)
    return found[0] if found else ""
