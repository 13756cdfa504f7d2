"""Distilling kernel tables: only allowed files are opened, and what ships is what was measured."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner.io.kernel_format import FAMILIES
from planner.io.profiles import load_kernel_table
from profiles.distil.families import READERS
from profiles.distil.systems import (
    ALLOWED_TABLES,
    FOLDERS,
    PACKAGE,
    REUSE,
    TARGETS,
    ForbiddenTableError,
    ReusedTableError,
    Target,
    find_systems,
    open_table,
)
from profiles.distil.write import write

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "profiles" / "kernels"
BY_NAME = {(target.folder, target.engine): target for target in TARGETS}
H100 = BY_NAME["h100_sxm", "vllm"]
H100_GEMM = H100.path("gemm", "0.24.0")
MAX_RELATIVE_ERROR = 5.1e-4  # half a step of 0.1 %, stated in the metadata beside the arrays

needs_data = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None or importlib.util.find_spec("pyarrow") is None,
    reason="aiconfigurator_core and pyarrow are not installed (extra 'distil')",
)
each_target = pytest.mark.parametrize(
    "target", TARGETS, ids=lambda one: f"{one.device}-{one.engine}"
)

# Prints every file that a full run opens below the systems folder, as seen by the interpreter.
AUDIT_PROGRAM = """
import sys
from pathlib import Path
from profiles.distil.systems import TARGETS, find_systems
from profiles.distil.write import write

systems = find_systems()
opened = set()

def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        path = Path(arguments[0])
        if path.is_relative_to(systems):
            opened.add(path.relative_to(systems).as_posix())

sys.addaudithook(hook)
for target in TARGETS:
    write(systems, Path(sys.argv[1]), target)
print("\\n".join(sorted(opened)))
"""


def shipped(target: Target) -> Path:
    """The arrays that ship for a target."""
    return KERNELS / target.device / f"{target.engine}-{target.version}.npz"


@pytest.mark.parametrize(
    "name",
    [
        "silicon_sample.csv",
        "data/h100_sxm/silicon_sample.csv",
        f"data/../{H100_GEMM}",
        H100_GEMM.replace("0.24.0", "0.19.0"),
        H100_GEMM.replace("h100_sxm", "b60"),
        "data/h200_sxm/quantize/vllm/0.24.0/scale_matrix_perf.parquet",
        "data/b200_sxm/attention/vllm/0.22.0/reuse.yaml",
        "h100_sxm.yaml",
    ],
)
def test_opener_refuses_everything_off_the_allow_list(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name off the allow-list is refused before the file, which exists, is read."""
    target = tmp_path / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("measured", encoding="utf-8")
    touched: list[Path] = []
    monkeypatch.setattr(Path, "read_bytes", lambda self: touched.append(self) or b"")
    with pytest.raises(ForbiddenTableError, match="allow-list"):
        open_table(tmp_path, name)
    assert touched == []


def test_allow_list_names_kernel_tables_only() -> None:
    """Every allowed file is a kernel performance table of a known kind, never a serving sample."""
    assert len(set(ALLOWED_TABLES)) == len(ALLOWED_TABLES)
    for name in ALLOWED_TABLES:
        data, folder, family, engine, _, file = name.split("/")
        kind = file.removesuffix("_perf.parquet")
        assert data == "data"
        assert folder in {target.folder for target in TARGETS}
        assert FOLDERS[kind] == family
        assert engine in {"vllm", "sglang", "trtllm", "nccl"}
        assert "silicon" not in name


def test_every_kind_of_table_has_a_reader() -> None:
    """Each kind that a target names is read, and every family of the format has a kind."""
    assert {kind for target in TARGETS for kind in target.tables} == set(READERS) == set(FOLDERS)
    assert {reader.family for reader in READERS.values()} == set(FAMILIES)


def test_a_table_that_is_declared_another_versions_is_refused(tmp_path: Path) -> None:
    """A version folder with a reuse file is refused before the table, which exists, is read."""
    target = tmp_path / H100_GEMM
    target.parent.mkdir(parents=True)
    target.write_text("measured", encoding="utf-8")
    (target.parent / REUSE).write_text("reuse: []", encoding="utf-8")
    with pytest.raises(ReusedTableError, match="another version"):
        open_table(tmp_path, H100_GEMM)


@each_target
def test_shipped_metadata_matches_the_arrays(target: Target) -> None:
    """The shipped arrays carry the recorded checksum, licence, versions and tables."""
    blob = shipped(target).read_bytes()
    metadata = json.loads(shipped(target).with_suffix(".json").read_text(encoding="utf-8"))
    assert hashlib.sha256(blob).hexdigest() == metadata["npz_sha256"]
    assert metadata["source"] == {
        "package": "aiconfigurator-core",
        "version": "0.12.0",
        "licence": "Apache-2.0",
    }
    recorded = [table["path"] for table in metadata["tables"]]
    assert recorded == [f"{PACKAGE}/systems/{name}" for name in target.paths]
    assert metadata["versions"] == {k: list(v) for k, v in target.tables.items()}
    assert metadata.get("notes", []) == list(target.notes)
    # A table of another version than the file's is never taken silently.
    others = {v for k, vs in target.tables.items() if k != "nccl" for v in vs} - {target.version}
    assert all(any(version in note for note in target.notes) for version in others)


def test_what_ships_is_what_the_program_lists() -> None:
    """No file ships that the program does not make."""
    files = {file for file in KERNELS.rglob("*") if file.is_file()}
    suffixes = (".npz", ".json")
    assert files == {shipped(target).with_suffix(s) for target in TARGETS for s in suffixes}


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Files that a full run opened, and the folder that it wrote."""
    out = tmp_path_factory.mktemp("kernels")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", AUDIT_PROGRAM, str(out)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split(), out


@needs_data
def test_a_full_run_opens_the_allowed_tables_and_nothing_else(
    full_run: tuple[list[str], Path],
) -> None:
    """The interpreter's own audit of a full run lists exactly the allow-list."""
    assert full_run[0] == sorted(ALLOWED_TABLES)


@needs_data
@each_target
def test_distilling_again_gives_the_shipped_arrays(
    target: Target, full_run: tuple[list[str], Path]
) -> None:
    """A fresh run writes the arrays that ship."""
    # Arrays, not bytes: another zlib may compress the same arrays differently.
    fresh_file = full_run[1] / shipped(target).relative_to(KERNELS)
    with np.load(fresh_file) as fresh, np.load(shipped(target)) as kept:
        assert fresh.files == kept.files
        for key in fresh.files:
            np.testing.assert_array_equal(fresh[key], kept[key])


@needs_data
@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_two_runs_write_the_same_bytes(
    engine: str, full_run: tuple[list[str], Path], tmp_path: Path
) -> None:
    """A second run, in another process, gives the first one's bytes, metadata included."""
    target = BY_NAME["h100_sxm", engine]
    second = write(find_systems(), tmp_path, target)
    first = full_run[1] / second.relative_to(tmp_path)
    assert first.read_bytes() == second.read_bytes()
    assert first.with_suffix(".json").read_text() == second.with_suffix(".json").read_text()


@needs_data
@each_target
def test_shipped_times_match_the_source_rows(target: Target) -> None:
    """Every bf16 GEMM and all-reduce row of the source decodes to within 0.05 %."""
    systems = find_systems()
    table = load_kernel_table(target.device, target.engine, target.version)
    rows = open_table(systems, target.path("gemm", target.version)).columns
    keep = rows["gemm_dtype"] == "bfloat16"
    grid = table.gemm["bf16"]
    cells = tuple(
        np.searchsorted(getattr(grid, axis), rows[axis][keep]) for axis in ("m", "n", "k")
    )
    error = grid.time_s[cells] / (rows["latency"][keep] * 1e-3) - 1
    # A duplicated row keeps the faster one.
    assert np.median(np.abs(error)) < MAX_RELATIVE_ERROR
    assert error.max() < MAX_RELATIVE_ERROR
    (version,) = target.tables["custom_allreduce"]
    messages = open_table(systems, target.path("custom_allreduce", version)).columns
    for index, elements in enumerate(messages["message_size"]):
        backend = str(messages["backend"][index]) if "backend" in messages else "graph"
        series = table.all_reduce[backend.rpartition("_")[2], int(messages["num_gpus"][index])]
        decoded_s = series.time_s[np.searchsorted(series.elements, elements)]
        assert decoded_s < messages["latency"][index] * 1e-3 * (1 + MAX_RELATIVE_ERROR)


@needs_data
def test_expert_and_sparse_times_match_the_source_rows() -> None:
    """SGLang's MoE and sparse-attention rows on H100, looked up one by one, are in the table."""
    systems, target = find_systems(), BY_NAME["h100_sxm", "sglang"]
    table = load_kernel_table(target.device, target.engine, target.version)
    rows = open_table(systems, target.path("moe", target.version)).columns
    fastest: dict[tuple[Any, ...], float] = {}
    names = ("hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    for i in np.flatnonzero(rows["moe_dtype"] == "fp8_block")[::37]:
        key = (*(int(rows[c][i]) for c in names), str(rows["distribution"][i]))
        cell = (*key, int(rows["num_tokens"][i]))
        fastest[cell] = min(fastest.get(cell, np.inf), float(rows["latency"][i]) * 1e-3)
    grid = table.moe["fp8_block"]
    series = zip(grid.layout.tolist(), grid.skew.tolist(), strict=True)
    where = {(*layout[:6], skew): index for index, (layout, skew) in enumerate(series)}
    for (*layout, distribution, tokens), time_s in fastest.items():
        skew = 0.0 if distribution == "balanced" else float(distribution.split("_")[-1])
        row = grid.time_s[where[(*layout, skew)]]
        assert row[np.searchsorted(grid.tokens, tokens)] == pytest.approx(time_s, rel=1e-3)
    rows = open_table(systems, target.path("dsa_context_module", target.version)).columns
    (sparse,) = (
        g
        for g in table.latent
        if (g.phase, g.hidden_size, g.weight_dtype, g.kv_dtype)
        == ("context", 7168, "fp8_block", "fp8")
        and g.index_topk
    )
    keep = (
        (rows["architecture"] == "DeepseekV32ForCausalLM")
        & (rows["kv_cache_dtype"] == "fp8")
        & (rows["step"] == 4096)
    )
    axes = (sparse.prefix, sparse.heads, sparse.batch, sparse.length)
    columns = (rows[c][keep] for c in ("step", "num_heads", "batch_size", "isl"))
    cells = [np.searchsorted(a, c) for a, c in zip(axes, columns, strict=True)]
    quickest: dict[tuple[int, ...], float] = {}
    for *cell, latency_ms in zip(*cells, rows["latency"][keep], strict=True):
        key = tuple(map(int, cell))
        quickest[key] = min(quickest.get(key, np.inf), latency_ms * 1e-3)
    assert quickest
    for key, time_s in quickest.items():
        assert sparse.time_s[key] == pytest.approx(time_s, rel=MAX_RELATIVE_ERROR)
