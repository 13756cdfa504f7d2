"""Distil published kernel tables into the compact files that ship with this package.

Run as ``python -m profiles.distil --out profiles/kernels [--data SYSTEMS_DIR]`` with the extra
``distil`` installed. The wheel ``aiconfigurator-core`` (Apache-2.0) carries hundreds of measured
kernel tables and also measured *serving* points; only the kernel tables named in `ALLOWED_TABLES`
are ever opened, because accuracy is judged on serving points and must not have seen any.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from simulator.units import S_PER_MS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

PACKAGE: Final = "aiconfigurator_core"
DISTRIBUTION: Final = "aiconfigurator-core"
LICENCE: Final = "Apache-2.0"

ENGINE: Final = "vllm"


@dataclass(frozen=True)
class System:
    """One system of the package, and the version of each table that is taken from it.

    Parameters
    ----------
    folder
        The system's folder in the package.
    device
        Its name in our device catalogue.
    engine_version
        The engine version that the file stands for, and whose GEMM and attention it holds.
    all_reduce
        Version folder of the engine's own all-reduce.
    nccl
        Version of NCCL: the newest with every operation on every width that the all-reduce has.
    notes
        What a reader must know where a table is not what its name says.
    """

    folder: str
    device: str
    engine_version: str
    all_reduce: str
    nccl: str
    notes: tuple[str, ...] = ()

    @property
    def tables(self) -> dict[str, str]:
        """By family, the one file it is read from, relative to the ``systems`` folder."""
        base, engine, version = f"data/{self.folder}", ENGINE, self.engine_version
        attention = f"{base}/attention/{engine}/{version}"
        return {
            "gemm": f"{base}/gemm/{engine}/{version}/gemm_perf.parquet",
            "context": f"{attention}/context_attention_perf.parquet",
            "generation": f"{attention}/generation_attention_perf.parquet",
            "all_reduce": f"{base}/comm/{engine}/{self.all_reduce}/custom_allreduce_perf.parquet",
            "nccl": f"{base}/comm/nccl/{self.nccl}/nccl_perf.parquet",
        }


SYSTEMS: Final = (
    System("h100_sxm", "H100-SXM-80GB", "0.24.0", "0.24.0", "2.29.2"),
    System("h200_sxm", "H200-SXM-141GB", "0.24.0", "0.24.0", "2.29.2"),
    System("b200_sxm", "B200-SXM-180GB", "0.24.0", "0.24.0", "2.29.2"),
    System(
        "a100_sxm",
        "A100-SXM4-80GB",
        "0.14.0",
        "0.14.0",
        "2.27.3",
        notes=("vLLM 0.14.0 is the only version measured on this system: bf16, head width 128",),
    ),
    System(
        "l40s",
        "L40S",
        "0.24.0",
        "0.22.0",
        "2.27.3",
        notes=(
            "all-reduce: 0.22.0 is the newest version folder of this system; its rows name 0.14.0 "
            "as the version measured, and equal those of the 0.14.0 folder",
        ),
    ),
    System("gb200", "GB200-NVL72", "0.24.0", "0.24.0", "2.29.2"),
    System("b300_sxm", "B300-SXM", "0.24.0", "0.24.0", "2.29.2"),
    System("gb300", "GB300-NVL72", "0.24.0", "0.24.0", "2.29.2"),
    System("rtx_pro_6000_server", "RTX-PRO-6000-Server", "0.24.0", "0.24.0", "2.29.2"),
)
"""Every system that is distilled; a new one is a line here."""

ALLOWED_TABLES: Final = tuple(name for system in SYSTEMS for name in system.tables.values())
"""Every file this program may open, relative to the package's ``systems`` folder."""

REUSE: Final = "reuse.yaml"
"""A file of this name in a version folder says that its tables are another version's."""

CODE_MAX: Final = np.iinfo(np.uint16).max
"""Largest code; codes 1..CODE_MAX span a table's log-latency range and 0 means missing."""

DTYPE_NAMES: Final = {"bfloat16": "bf16", "fp8": "fp8"}
"""Source dtype names to ours; ``fp8_block`` is left out: the model knows per-tensor fp8 only."""
KV_DTYPES: Final = ("bf16", "fp8")
ONLY_FULL_ATTENTION: Final = 0
"""Window of every row of a table without that column: such a table has full attention only."""
BACKENDS: Final = {"vllm_graph": "graph", "vllm_eager": "eager"}
NCCL_OPS: Final = ("all_gather", "all_reduce", "alltoall", "reduce_scatter")
NCCL_DTYPE: Final = "half"

Columns = dict[str, "NDArray[Any]"]
Axes = tuple["NDArray[np.int32]", "NDArray[np.int32]"]


class ForbiddenTableError(ValueError):
    """A file outside `ALLOWED_TABLES` was asked for."""


class ReusedTableError(ValueError):
    """A version folder holds another version's tables, and `SYSTEMS` does not say which."""


@dataclass(frozen=True)
class SourceTable:
    """One opened table: its columns, and what the metadata says about it."""

    name: str
    rows: int
    sha256: str
    columns: Columns


def find_systems() -> Path:
    """The ``systems`` folder of the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"{DISTRIBUTION} is not installed: install the extra 'distil' or pass --data"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "systems"


def source_version(systems: Path) -> str:
    """Version of the unpacked wheel, from its dist-info folder's *name*: nothing is opened."""
    found = sorted(systems.parent.parent.glob(f"{PACKAGE}-*.dist-info"))
    if len(found) != 1:
        raise SystemExit(
            f"expected one {PACKAGE}-*.dist-info beside the package, found {len(found)}"
        )
    return found[0].name.removesuffix(".dist-info").removeprefix(f"{PACKAGE}-")


def open_table(systems: Path, name: str) -> SourceTable:
    """Read one allowed parquet table.

    Raises
    ------
    ForbiddenTableError
        If ``name`` is not literally in `ALLOWED_TABLES`; checked before the file is touched.
    ReusedTableError
        If its folder declares reuse: `SYSTEMS` must then name the version that was measured.

    """
    if name not in ALLOWED_TABLES:
        raise ForbiddenTableError(f"{name!r} is not on the allow-list of kernel tables")
    if (systems / name).with_name(REUSE).exists():
        raise ReusedTableError(f"{name!r} is declared another version's: name that one instead")
    import pyarrow as pa
    import pyarrow.parquet as pq

    blob = (systems / name).read_bytes()
    table = pq.read_table(pa.BufferReader(blob))
    columns = {c: table[c].to_numpy() for c in table.column_names}
    return SourceTable(name, int(table.num_rows), hashlib.sha256(blob).hexdigest(), columns)


def quantise(time_s: NDArray[np.float64]) -> tuple[NDArray[np.uint16], NDArray[np.float64]]:
    """Encode latencies as 16-bit steps of log latency.

    A kernel family spans under six decades, so half a step is below 0.01 % of the value, two
    orders under the repeatability of the measurements.

    Parameters
    ----------
    time_s
        Any shape; NaN marks a missing cell.

    Returns
    -------
    codes, log_range
        Codes in the input's shape (0 = missing), and ``[min, max]`` of the log latency.

    """
    log_time = np.log(time_s)
    low, high = float(np.nanmin(log_time)), float(np.nanmax(log_time))
    steps = np.rint((log_time - low) / (high - low) * (CODE_MAX - 1)) + 1
    codes = np.where(np.isnan(log_time), 0, steps).astype(np.uint16)
    return codes, np.array([low, high])


def dense(
    keys: Sequence[NDArray[Any]], axes: Sequence[NDArray[Any]], time_s: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Scatter rows into a grid, NaN where no row is.

    Where several kernels were timed for one key the fastest stays: an engine that offers several
    picks among them by its own tuning, and a slower one would be a choice no deployment makes.
    """
    grid = np.full(tuple(len(a) for a in axes), np.inf)
    index = tuple(np.searchsorted(a, k) for a, k in zip(axes, keys, strict=True))
    np.minimum.at(grid, index, time_s)
    return np.where(np.isinf(grid), np.nan, grid)


def _grid(name: str, time_s: NDArray[np.float64]) -> Columns:
    codes, log_range = quantise(time_s)
    return {f"{name}_codes": codes, f"{name}_log_range": log_range}


def _axis(values: NDArray[Any]) -> NDArray[np.int32]:
    return np.unique(values).astype(np.int32)


def gemm_arrays(columns: Columns) -> Columns:
    """GEMM grids: axes ``gemm_{m,n,k}`` and codes (M, N, K) for each kept dtype that was timed."""
    axes = [_axis(columns[c]) for c in ("m", "n", "k")]
    out: Columns = dict(zip(("gemm_m", "gemm_n", "gemm_k"), axes, strict=True))
    for source, ours in DTYPE_NAMES.items():
        rows = columns["gemm_dtype"] == source
        if rows.any():
            keys = [columns[c][rows] for c in ("m", "n", "k")]
            time_s = columns["latency"][rows] * S_PER_MS
            out.update(_grid(f"gemm_{ours}", dense(keys, axes, time_s)))
    return out


def attention_grid(columns: Columns) -> tuple[NDArray[np.int32], Axes, NDArray[np.float64]]:
    """Attention series: (S, 5) keys, axes of batch and length, and seconds (S, B, L).

    A key is head dim, window, index into `KV_DTYPES`, query heads and KV heads of one rank. The
    length axis counts the tokens attended to: the new ones (``isl``) plus those cached (``step``).
    """
    kv_code = np.array([KV_DTYPES.index(DTYPE_NAMES[v]) for v in columns["kv_cache_dtype"]])
    window = columns.get("window_size", np.full(len(kv_code), ONLY_FULL_ATTENTION))
    head_dim, heads, kv_heads = (
        columns[c] for c in ("head_dim", "num_heads", "num_key_value_heads")
    )
    key_rows = np.stack([head_dim, window, kv_code, heads, kv_heads], axis=1).astype(np.int32)
    keys, series = np.unique(key_rows, axis=0, return_inverse=True)
    length = columns["isl"] + columns["step"]
    axes = (_axis(columns["batch_size"]), _axis(length))
    time_s = columns["latency"] * S_PER_MS
    rows = [series.reshape(-1), columns["batch_size"], length]
    return keys, axes, dense(rows, [np.arange(len(keys)), *axes], time_s)


def anchored(grid: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which series were timed at their smallest cell, shape (S,).

    That cell is the launch cost, to which everything else in a series is related. Some consumer
    parts lack it for a few layouts whose kernel refused most sizes.
    """
    return ~np.isnan(grid[:, 0, 0])


def attention_arrays(columns: Columns, family: str) -> Columns:
    """Attention series that are anchored: codes (S, B, L), (S, 5) keys and the axes."""
    keys, (batch, length), grid = attention_grid(columns)
    kept = anchored(grid)
    out = {f"{family}_key": keys[kept], f"{family}_batch": batch, f"{family}_length": length}
    return out | _grid(family, grid[kept])


def message_arrays(columns: Columns, family: str, codes: NDArray[Any]) -> Columns:
    """Collective series: times (S, E) over message elements, and (S, 2) keys (``codes``, GPUs)."""
    key_rows = np.stack([codes, columns["num_gpus"]], axis=1).astype(np.int32)
    keys, series = np.unique(key_rows, axis=0, return_inverse=True)
    axes: list[NDArray[Any]] = [np.arange(len(keys)), _axis(columns["message_size"])]
    grid = dense([series.reshape(-1), columns["message_size"]], axes, columns["latency"] * S_PER_MS)
    return {f"{family}_key": keys, f"{family}_elements": axes[1]} | _grid(family, grid)


def distil(sources: Mapping[str, SourceTable]) -> Columns:
    """All arrays of one shipped file from its opened tables by family."""
    arrays = gemm_arrays(sources["gemm"].columns)
    arrays |= attention_arrays(sources["context"].columns, "context")
    arrays |= attention_arrays(sources["generation"].columns, "generation")
    custom = sources["all_reduce"].columns
    names = list(BACKENDS)
    arrays |= message_arrays(
        custom, "all_reduce", np.array([names.index(b) for b in custom["backend"]])
    )
    nccl = sources["nccl"].columns
    kept = {c: v[nccl["nccl_dtype"] == NCCL_DTYPE] for c, v in nccl.items()}
    return arrays | message_arrays(
        kept, "nccl", np.array([NCCL_OPS.index(op) for op in kept["op_name"]])
    )


def left_out(sources: Mapping[str, SourceTable]) -> list[str]:
    """What the opened tables hold and the shipped file does not."""
    gemm = set(sources["gemm"].columns["gemm_dtype"]) - set(DTYPE_NAMES)
    nccl = set(sources["nccl"].columns["nccl_dtype"]) - {NCCL_DTYPE}
    out = [f"gemm_dtype {name}" for name in sorted(gemm)]
    out += [f"nccl_dtype {name}" for name in sorted(nccl)]
    for family in ("context", "generation"):
        keys, _, grid = attention_grid(sources[family].columns)
        out += [
            f"{family} series without its smallest cell: head_dim {dim}, window {window}, "
            f"{KV_DTYPES[code]} KV, {heads} heads, {kv_heads} KV heads"
            for dim, window, code, heads, kv_heads in keys[~anchored(grid)].tolist()
        ]
    return out


def metadata(
    system: System,
    sources: Mapping[str, SourceTable],
    arrays: Columns,
    version: str,
    npz: bytes,
) -> dict[str, Any]:
    """What the JSON beside the arrays says: origin, licence, encoding and checksum."""
    tables = [
        {"path": f"{PACKAGE}/systems/{s.name}", "rows": s.rows, "sha256": s.sha256}
        for s in sources.values()
    ]
    data: dict[str, Any] = {
        "schema_version": 1,
        "device": system.device,
        "engine": ENGINE,
        "engine_version": system.engine_version,
        "source": {"package": DISTRIBUTION, "version": version, "licence": LICENCE},
        "tables": tables,
        "left_out": left_out(sources),
        "gemm_dtypes": [name for name in DTYPE_NAMES.values() if f"gemm_{name}_codes" in arrays],
        "kv_dtypes": list(KV_DTYPES),
        "backends": list(BACKENDS.values()),
        "nccl_ops": list(NCCL_OPS),
        "code_max": int(CODE_MAX),
        "quantisation": (
            "seconds = exp(min + (code - 1) / (code_max - 1) * (max - min)), [min, max] in "
            "*_log_range, code 0 = not measured; error below 0.01 % of the value"
        ),
        "npz_sha256": hashlib.sha256(npz).hexdigest(),
    }
    return data | ({"notes": list(system.notes)} if system.notes else {})


def write(systems: Path, out: Path, system: System) -> Path:
    """Distil one system's tables under ``systems`` into ``out``; same input, same bytes.

    Returns
    -------
    Path
        The ``.npz`` written; the ``.json`` lies beside it.

    """
    sources = {family: open_table(systems, name) for family, name in system.tables.items()}
    buffer = io.BytesIO()
    arrays: dict[str, Any] = distil(sources)
    np.savez_compressed(buffer, **arrays)
    npz = buffer.getvalue()
    folder = out / system.device
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{ENGINE}-{system.engine_version}.npz"
    target.write_bytes(npz)
    text = json.dumps(metadata(system, sources, arrays, source_version(systems), npz), indent=2)
    target.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    return target


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--data", type=Path, help="a 'systems' folder; default: installed package")
    arguments = parser.parse_args()
    for system in SYSTEMS:
        target = write(arguments.data or find_systems(), arguments.out, system)
        print(f"{target}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
