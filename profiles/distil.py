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

GEMM: Final = "data/h100_sxm/gemm/vllm/0.24.0/gemm_perf.parquet"
CONTEXT: Final = "data/h100_sxm/attention/vllm/0.24.0/context_attention_perf.parquet"
GENERATION: Final = "data/h100_sxm/attention/vllm/0.24.0/generation_attention_perf.parquet"
ALL_REDUCE: Final = "data/h100_sxm/comm/vllm/0.24.0/custom_allreduce_perf.parquet"
NCCL: Final = "data/h100_sxm/comm/nccl/2.29.2/nccl_perf.parquet"

ALLOWED_TABLES: Final = (GEMM, CONTEXT, GENERATION, ALL_REDUCE, NCCL)
"""Every file this program may open, relative to the package's ``systems`` folder."""

DEVICE: Final = "H100-SXM-80GB"
ENGINE: Final = "vllm"
ENGINE_VERSION: Final = "0.24.0"

CODE_MAX: Final = np.iinfo(np.uint16).max
"""Largest code; codes 1..CODE_MAX span a table's log-latency range and 0 means missing."""

DTYPE_NAMES: Final = {"bfloat16": "bf16", "fp8": "fp8"}
"""Source dtype names to ours; ``fp8_block`` is left out: the model knows per-tensor fp8 only."""
KV_DTYPES: Final = ("bf16", "fp8")
BACKENDS: Final = {"vllm_graph": "graph", "vllm_eager": "eager"}
NCCL_OPS: Final = ("all_gather", "all_reduce", "alltoall", "reduce_scatter")
NCCL_DTYPE: Final = "half"

Columns = dict[str, "NDArray[Any]"]


class ForbiddenTableError(ValueError):
    """A file outside `ALLOWED_TABLES` was asked for."""


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

    """
    if name not in ALLOWED_TABLES:
        raise ForbiddenTableError(f"{name!r} is not on the allow-list of kernel tables")
    import pyarrow as pa
    import pyarrow.parquet as pq

    blob = (systems / name).read_bytes()
    table = pq.read_table(pa.BufferReader(blob))
    columns = {c: np.asarray(table[c].to_pylist()) for c in table.column_names}
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
    """GEMM grids: axes ``gemm_{m,n,k}`` and codes (M, N, K) for each kept dtype."""
    axes = [_axis(columns[c]) for c in ("m", "n", "k")]
    out: Columns = dict(zip(("gemm_m", "gemm_n", "gemm_k"), axes, strict=True))
    for source, ours in DTYPE_NAMES.items():
        rows = columns["gemm_dtype"] == source
        keys = [columns[c][rows] for c in ("m", "n", "k")]
        time_s = columns["latency"][rows] * S_PER_MS
        out.update(_grid(f"gemm_{ours}", dense(keys, axes, time_s)))
    return out


def attention_arrays(columns: Columns, family: str) -> Columns:
    """Attention series: codes (S, B, L), and (S, 5) keys.

    A key is head dim, window, index into `KV_DTYPES`, query heads and KV heads of one rank. The
    length axis counts the tokens attended to: the new ones (``isl``) plus those cached (``step``).
    """
    kv_code = np.array([KV_DTYPES.index(DTYPE_NAMES[v]) for v in columns["kv_cache_dtype"]])
    parts = ("head_dim", "window_size", "num_heads", "num_key_value_heads")
    head_dim, window, heads, kv_heads = (columns[c] for c in parts)
    key_rows = np.stack([head_dim, window, kv_code, heads, kv_heads], axis=1).astype(np.int32)
    keys, series = np.unique(key_rows, axis=0, return_inverse=True)
    length = columns["isl"] + columns["step"]
    axes: list[NDArray[Any]] = [np.arange(len(keys)), _axis(columns["batch_size"]), _axis(length)]
    time_s = columns["latency"] * S_PER_MS
    grid = dense([series.reshape(-1), columns["batch_size"], length], axes, time_s)
    out = {f"{family}_key": keys, f"{family}_batch": axes[1], f"{family}_length": axes[2]}
    return out | _grid(family, grid)


def message_arrays(columns: Columns, family: str, codes: NDArray[Any]) -> Columns:
    """Collective series: times (S, E) over message elements, and (S, 2) keys (``codes``, GPUs)."""
    key_rows = np.stack([codes, columns["num_gpus"]], axis=1).astype(np.int32)
    keys, series = np.unique(key_rows, axis=0, return_inverse=True)
    axes: list[NDArray[Any]] = [np.arange(len(keys)), _axis(columns["message_size"])]
    grid = dense([series.reshape(-1), columns["message_size"]], axes, columns["latency"] * S_PER_MS)
    return {f"{family}_key": keys, f"{family}_elements": axes[1]} | _grid(family, grid)


def distil(sources: Mapping[str, SourceTable]) -> Columns:
    """All arrays of the shipped file from the opened tables."""
    arrays = gemm_arrays(sources[GEMM].columns)
    arrays |= attention_arrays(sources[CONTEXT].columns, "context")
    arrays |= attention_arrays(sources[GENERATION].columns, "generation")
    custom = sources[ALL_REDUCE].columns
    names = list(BACKENDS)
    arrays |= message_arrays(
        custom, "all_reduce", np.array([names.index(b) for b in custom["backend"]])
    )
    nccl = sources[NCCL].columns
    kept = {c: v[nccl["nccl_dtype"] == NCCL_DTYPE] for c, v in nccl.items()}
    return arrays | message_arrays(
        kept, "nccl", np.array([NCCL_OPS.index(op) for op in kept["op_name"]])
    )


def metadata(sources: Mapping[str, SourceTable], version: str, npz: bytes) -> dict[str, Any]:
    """What the JSON beside the arrays says: origin, licence, encoding and checksum."""
    tables = [
        {"path": f"{PACKAGE}/systems/{s.name}", "rows": s.rows, "sha256": s.sha256}
        for s in sources.values()
    ]
    return {
        "schema_version": 1,
        "device": DEVICE,
        "engine": ENGINE,
        "engine_version": ENGINE_VERSION,
        "source": {"package": DISTRIBUTION, "version": version, "licence": LICENCE},
        "tables": tables,
        "left_out": ["gemm_dtype fp8_block", "nccl_dtype int8"],
        "gemm_dtypes": list(DTYPE_NAMES.values()),
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


def write(systems: Path, out: Path) -> Path:
    """Distil the tables under ``systems`` into ``out``; the same input gives the same bytes.

    Returns
    -------
    Path
        The ``.npz`` written; the ``.json`` lies beside it.

    """
    sources = {name: open_table(systems, name) for name in ALLOWED_TABLES}
    buffer = io.BytesIO()
    arrays: dict[str, Any] = distil(sources)
    np.savez_compressed(buffer, **arrays)
    npz = buffer.getvalue()
    folder = out / DEVICE
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{ENGINE}-{ENGINE_VERSION}.npz"
    target.write_bytes(npz)
    text = json.dumps(metadata(sources, source_version(systems), npz), indent=2)
    (folder / f"{ENGINE}-{ENGINE_VERSION}.json").write_text(text + "\n", encoding="utf-8")
    return target


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--data", type=Path, help="a 'systems' folder; default: installed package")
    arguments = parser.parse_args()
    target = write(arguments.data or find_systems(), arguments.out)
    print(f"{target}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
