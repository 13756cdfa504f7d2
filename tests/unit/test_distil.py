"""The distilled kernel files: encoding, allow-list and reproducibility."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from planner.io.profiles import load_kernel_table
from profiles import distil

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "profiles" / "kernels"
H100 = distil.SYSTEMS[0]
MAX_RELATIVE_ERROR = 1e-4  # 0.01 %, stated in the metadata beside the arrays
MAX_NPZ_BYTES = 1_000_000  # shipped files stay below 1 MB each
H100_ARRAYS = "142bbaf1bb8c44e2a368384b5dcfc682ba34a563be80dd537a094b975be97843"

needs_data = pytest.mark.skipif(
    importlib.util.find_spec(distil.PACKAGE) is None or importlib.util.find_spec("pyarrow") is None,
    reason="aiconfigurator_core and pyarrow are not installed (extra 'distil')",
)

# Prints every file that a full run opens below the systems folder, as seen by the interpreter.
AUDIT_PROGRAM = """
import sys
from pathlib import Path
from profiles import distil

systems = distil.find_systems()
opened = set()

def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        path = Path(arguments[0])
        if path.is_relative_to(systems):
            opened.add(path.relative_to(systems).as_posix())

sys.addaudithook(hook)
for system in distil.SYSTEMS:
    distil.write(systems, Path(sys.argv[1]), system)
print("\\n".join(sorted(opened)))
"""

each_system = pytest.mark.parametrize("system", distil.SYSTEMS, ids=lambda one: one.device)


def shipped(system: distil.System) -> Path:
    """The arrays that ship for a system."""
    return KERNELS / system.device / f"{distil.ENGINE}-{system.engine_version}.npz"


@pytest.mark.parametrize(
    "name",
    [
        "silicon_sample.csv",
        "data/h100_sxm/silicon_sample.csv",
        f"data/../{H100.tables['gemm']}",
        H100.tables["gemm"].replace("0.24.0", "0.19.0"),
        H100.tables["gemm"].replace("h100_sxm", "b60"),
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
    with pytest.raises(distil.ForbiddenTableError, match="allow-list"):
        distil.open_table(tmp_path, name)
    assert touched == []


def test_allow_list_names_kernel_tables_only() -> None:
    """Every allowed file is a kernel performance table, never a serving sample."""
    assert all(name.endswith("_perf.parquet") for name in distil.ALLOWED_TABLES)
    assert not any("silicon" in name for name in distil.ALLOWED_TABLES)
    assert len(set(distil.ALLOWED_TABLES)) == len(distil.ALLOWED_TABLES) == 5 * len(distil.SYSTEMS)


def test_a_table_that_is_declared_another_versions_is_refused(tmp_path: Path) -> None:
    """A version folder with a reuse file is refused before the table, which exists, is read."""
    target = tmp_path / H100.tables["context"]
    target.parent.mkdir(parents=True)
    target.write_text("measured", encoding="utf-8")
    (target.parent / distil.REUSE).write_text("reuse: []", encoding="utf-8")
    with pytest.raises(distil.ReusedTableError, match="another version"):
        distil.open_table(tmp_path, H100.tables["context"])


def test_a_series_without_its_smallest_cell_is_left_out() -> None:
    """Only a series timed at one sequence of one token stays; the metadata names the other."""
    columns = {
        "batch_size": np.array([1, 2, 2]),
        "isl": np.array([1, 1, 1]),
        "step": np.array([0, 0, 4]),
        "head_dim": np.full(3, 128),
        "num_heads": np.array([8, 8, 64]),
        "num_key_value_heads": np.array([1, 1, 1]),
        "kv_cache_dtype": np.array(["bfloat16", "bfloat16", "fp8"], dtype=object),
        "latency": np.array([1.0, 2.0, 3.0]),
    }
    arrays = distil.attention_arrays(columns, "generation")
    assert arrays["generation_key"].tolist() == [[128, 0, 0, 8, 1]]
    table = distil.SourceTable("t", 3, "", columns)
    dtypes = {"gemm_dtype": np.array(["nvfp4"]), "nccl_dtype": np.array(["half"])}
    other = distil.SourceTable("t", 1, "", dtypes)
    sources = {"gemm": other, "nccl": other, "context": table, "generation": table}
    assert distil.left_out(sources) == ["gemm_dtype nvfp4"] + [
        f"{family} series without its smallest cell: head_dim 128, window 0, fp8 KV, 64 heads, "
        "1 KV heads"
        for family in ("context", "generation")
    ]


def test_quantisation_error_is_below_the_stated_bound() -> None:
    """Six decades of latency survive 16-bit coding to within 0.01 %, and gaps stay gaps."""
    random = np.random.default_rng(0)
    time_s = np.exp(random.uniform(np.log(1e-6), np.log(0.4), size=20_000))
    time_s[::7] = np.nan
    codes, (low, high) = distil.quantise(time_s)
    decoded = np.exp(low + (codes.astype(float) - 1) / (distil.CODE_MAX - 1) * (high - low))
    known = ~np.isnan(time_s)
    assert np.abs(decoded[known] / time_s[known] - 1).max() < MAX_RELATIVE_ERROR
    assert (codes[~known] == 0).all()
    assert (codes[known] > 0).all()


def test_dense_keeps_the_fastest_of_several_kernels() -> None:
    """Two kernels timed for one key leave the faster one, and an absent key is NaN."""
    axis = np.array([1, 2, 4])
    grid = distil.dense([np.array([2, 1, 2])], [axis], np.array([5.0, 1.0, 3.0]))
    np.testing.assert_array_equal(grid, [1.0, 3.0, np.nan])


@each_system
def test_shipped_metadata_matches_the_arrays(system: distil.System) -> None:
    """The shipped arrays carry the recorded checksum, licence and tables, and stay small."""
    blob = shipped(system).read_bytes()
    metadata = json.loads(shipped(system).with_suffix(".json").read_text(encoding="utf-8"))
    assert hashlib.sha256(blob).hexdigest() == metadata["npz_sha256"]
    assert metadata["source"] == {
        "package": "aiconfigurator-core",
        "version": "0.12.0",
        "licence": "Apache-2.0",
    }
    recorded = [table["path"] for table in metadata["tables"]]
    assert recorded == [f"{distil.PACKAGE}/systems/{name}" for name in system.tables.values()]
    assert metadata.get("notes", []) == list(system.notes)
    if len({system.engine_version, system.all_reduce}) > 1:
        assert any(system.all_reduce in note for note in system.notes)  # never silently
    assert len(blob) < MAX_NPZ_BYTES


def test_what_ships_is_what_the_program_lists() -> None:
    """No file ships that the program does not make, and the H100 arrays are the first release's."""
    files = {file for file in KERNELS.rglob("*") if file.is_file()}
    assert files == {
        shipped(system).with_suffix(suffix)
        for system in distil.SYSTEMS
        for suffix in (".npz", ".json")
    }
    assert hashlib.sha256(shipped(H100).read_bytes()).hexdigest() == H100_ARRAYS


@needs_data
@each_system
def test_distilling_again_gives_the_shipped_arrays(system: distil.System, tmp_path: Path) -> None:
    """Two runs write the same bytes, and the arrays are those that ship."""
    systems = distil.find_systems()
    first = distil.write(systems, tmp_path / "a", system)
    second = distil.write(systems, tmp_path / "b", system)
    assert first.read_bytes() == second.read_bytes()
    assert first.with_suffix(".json").read_text() == second.with_suffix(".json").read_text()
    # Arrays, not bytes: another zlib may compress the same arrays differently.
    with np.load(first) as fresh, np.load(shipped(system)) as kept:
        assert sorted(fresh.files) == sorted(kept.files)
        for key in fresh.files:
            np.testing.assert_array_equal(fresh[key], kept[key])


@needs_data
@each_system
def test_shipped_times_match_the_source_rows(system: distil.System) -> None:
    """Every bf16 GEMM and all-reduce row of the source decodes to within 0.01 %."""
    systems = distil.find_systems()
    table = load_kernel_table(system.device, distil.ENGINE, system.engine_version)
    rows = distil.open_table(systems, system.tables["gemm"]).columns
    keep = rows["gemm_dtype"] == "bfloat16"
    grid = table.gemm["bf16"]
    cells = tuple(
        np.searchsorted(getattr(grid, axis), rows[axis][keep]) for axis in ("m", "n", "k")
    )
    error = grid.time_s[cells] / (rows["latency"][keep] * 1e-3) - 1
    assert np.abs(error).max() < MAX_RELATIVE_ERROR
    messages = distil.open_table(systems, system.tables["all_reduce"]).columns
    for index, elements in enumerate(messages["message_size"]):
        backend = distil.BACKENDS[messages["backend"][index]]
        series = table.all_reduce[backend, int(messages["num_gpus"][index])]
        decoded_s = series.time_s[np.searchsorted(series.elements, elements)]
        expected_s = messages["latency"][index] * 1e-3
        assert decoded_s == pytest.approx(expected_s, rel=MAX_RELATIVE_ERROR)


@needs_data
def test_a_full_run_opens_the_allowed_tables_and_nothing_else(tmp_path: Path) -> None:
    """The interpreter's own audit of a full run lists exactly the allow-list."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", AUDIT_PROGRAM, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == sorted(distil.ALLOWED_TABLES)
