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
SHIPPED = ROOT / "profiles" / "kernels" / distil.DEVICE
NAME = f"{distil.ENGINE}-{distil.ENGINE_VERSION}"
MAX_RELATIVE_ERROR = 1e-4  # 0.01 %, stated in the metadata beside the arrays
MAX_NPZ_BYTES = 1_000_000  # shipped files stay below 1 MB each

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
distil.write(systems, Path(sys.argv[1]))
print("\\n".join(sorted(opened)))
"""


@pytest.mark.parametrize(
    "name",
    [
        "silicon_sample.csv",
        "data/h100_sxm/silicon_sample.csv",
        f"data/../{distil.GEMM}",
        distil.GEMM.replace("0.24.0", "0.19.0"),
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


def test_shipped_metadata_matches_the_arrays() -> None:
    """The shipped arrays carry the recorded checksum, licence and version, and stay small."""
    blob = (SHIPPED / f"{NAME}.npz").read_bytes()
    metadata = json.loads((SHIPPED / f"{NAME}.json").read_text(encoding="utf-8"))
    assert hashlib.sha256(blob).hexdigest() == metadata["npz_sha256"]
    assert metadata["source"] == {
        "package": "aiconfigurator-core",
        "version": "0.12.0",
        "licence": "Apache-2.0",
    }
    assert len(metadata["tables"]) == len(distil.ALLOWED_TABLES)
    assert len(blob) < MAX_NPZ_BYTES


@needs_data
def test_distilling_again_gives_the_shipped_arrays(tmp_path: Path) -> None:
    """Two runs write the same bytes, and the arrays are those that ship."""
    systems = distil.find_systems()
    first = distil.write(systems, tmp_path / "a")
    second = distil.write(systems, tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    assert first.with_suffix(".json").read_text() == second.with_suffix(".json").read_text()
    # Arrays, not bytes: another zlib may compress the same arrays differently.
    with np.load(first) as fresh, np.load(SHIPPED / f"{NAME}.npz") as shipped:
        assert sorted(fresh.files) == sorted(shipped.files)
        for key in fresh.files:
            np.testing.assert_array_equal(fresh[key], shipped[key])


@needs_data
def test_shipped_times_match_the_source_rows() -> None:
    """Every bf16 GEMM and all-reduce row of the source decodes to within 0.01 %."""
    systems = distil.find_systems()
    table = load_kernel_table(distil.DEVICE, distil.ENGINE, distil.ENGINE_VERSION)
    rows = distil.open_table(systems, distil.GEMM).columns
    keep = rows["gemm_dtype"] == "bfloat16"
    grid = table.gemm["bf16"]
    cells = tuple(
        np.searchsorted(getattr(grid, axis), rows[axis][keep]) for axis in ("m", "n", "k")
    )
    error = grid.time_s[cells] / (rows["latency"][keep] * 1e-3) - 1
    assert np.abs(error).max() < MAX_RELATIVE_ERROR
    messages = distil.open_table(systems, distil.ALL_REDUCE).columns
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
