"""Every shipped device: its table loads whole, its costs are sane, its oddities are said aloud."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from planner.errors import InputError
from planner.io import profiles
from planner.io.engines import EngineProfile, load_engine
from planner.io.hf_config import read_model
from planner.resolve import resolve
from simulator.cost import CostCompiler, HostConstants
from simulator.interpolate import Provenance
from simulator.ops import head_gemm, layer_gemms
from simulator.plan import BatchingLimits
from simulator.units import DTYPE_BYTES
from tests import problems

if TYPE_CHECKING:
    from collections.abc import Callable

    from simulator.model import ModelShape

ROOT = Path(__file__).parents[2]
NEWEST = "0.24.0"
VERSIONS = ("0.10.2", NEWEST)
DEVICES = sorted({device for device, _, _ in profiles.available_kernel_tables()})
MODELS = ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B")
TRAY = (1, 2, 4)
NODE = (*TRAY, 8)
WIDTHS = {
    "GB200-NVL72": TRAY,
    "GB300-NVL72": TRAY,
}  # measured within one tray; the others in a node
NO_FP8 = "A100-SXM4-80GB"
CAUTIONS = {"L40S": "all-reduce times on L40S", "GB200-NVL72": "bf16 GEMM times of GB200-NVL72"}
LIMITS = BatchingLimits(256, 2048)
MAX_CONTEXT = 4096
CONTEXT = 1024  # tokens held by the sequence of the sanity checks
NEAR = (1.1, 1.5)  # decode of one sequence over the time to read the weights at datasheet speed
FASTER = ["A100-SXM4-80GB", "H100-SXM-80GB", "H200-SXM-141GB", "B200-SXM-180GB"]

each_device = pytest.mark.parametrize("device", DEVICES)


def engine_on(device: str, version: str = NEWEST) -> EngineProfile:
    """The engine as it is on a device."""
    return load_engine("vllm", version, device=device)


def shape(name: str, weight_dtype: str | None = None) -> ModelShape:
    """A catalogued model."""
    return read_model(
        name,
        base_dir=ROOT,
        weight_dtype=weight_dtype,
        kv_cache_dtype="auto",
        max_model_len=MAX_CONTEXT,
        source="test",
    )


def compiler(device: str, model: ModelShape, version: str = NEWEST) -> CostCompiler:
    """Kernel times alone, without host constants."""
    engine = engine_on(device, version)
    return CostCompiler(
        model,
        profiles.load_device(device),
        profiles.load_kernel_table(device, "vllm", engine.kernel_table_version),
        HostConstants(),
        engine.graphs,
        nccl_all_reduce_from_bytes=engine.nccl_all_reduce_from_bytes,
        max_tokens=LIMITS.max_num_batched_tokens,
        max_seqs=LIMITS.max_num_seqs,
        max_context=MAX_CONTEXT,
    )


def decode_s(device: str, model: ModelShape, tp: int) -> float:
    """One decode iteration of one sequence."""
    cost = compiler(device, model).compile(tp, LIMITS)
    column = int(np.searchsorted(cost.context_knots, CONTEXT))
    return float(cost.decode_s[1] + cost.attention_s[1, column] + cost.sampled_s[1])


def read_weights_s(device: str, model: ModelShape, tp: int) -> float:
    """Time to read one rank's projections and head at datasheet bandwidth."""
    layer = sum(op.n * op.k * DTYPE_BYTES[op.dtype] for op in layer_gemms(model, tp))
    head = head_gemm(model, tp)
    read_bytes = model.num_layers * layer + head.n * head.k * DTYPE_BYTES[head.dtype]
    return read_bytes / profiles.load_device(device).memory_bandwidth_bytes_per_s


def pool(device: str) -> dict[str, Any]:
    """A scenario's cluster of one node of eight."""
    return {"pools": [{"device": device, "nodes": 1, "devices_per_node": 8}]}


def test_every_catalogued_device_has_a_table() -> None:
    """Devices and tables are the same nine, and every fact says where it comes from."""
    text = (ROOT / profiles.DEVICES_FILE).read_text(encoding="utf-8")
    entries = json.loads(text)["devices"]
    assert sorted(entry["name"] for entry in entries) == DEVICES
    assert len(DEVICES) == 9
    for entry in entries:
        for field, fact in entry.items():
            if field != "name":
                assert fact["source"], (entry["name"], field)


@each_device
def test_table_loads_with_all_families(device: str) -> None:
    """All families are there, no series is empty, and each starts at its smallest cell."""
    table = profiles.load_kernel_table(device, "vllm", engine_on(device).kernel_table_version)
    assert set(table.gemm) == ({"bf16"} if device == NO_FP8 else {"bf16", "fp8"})
    for grid in table.gemm.values():
        measured = ~np.isnan(grid.time_s)
        assert measured.any(axis=(1, 2)).all()  # every token count
        assert measured.any(axis=0).sum() >= len(grid.n) * len(grid.k) - 1  # all shapes but one
    for series in (*table.context, *table.generation):
        assert not np.isnan(series.time_s[0, 0])
    widths = set(WIDTHS.get(device, NODE)) - {1}
    assert {gpus for _, gpus in table.all_reduce} == widths
    for kind in ("graph", "eager"):
        assert {gpus for name, gpus in table.all_reduce if name == kind} == widths
    for op in ("all_gather", "all_reduce"):
        assert {gpus for name, gpus in table.nccl if name == op} >= widths
    times = [
        *(grid.time_s for grid in table.gemm.values()),
        *(one.time_s for one in (*table.context, *table.generation)),
        *(one.time_s for one in (*table.all_reduce.values(), *table.nccl.values())),
    ]
    for time_s in times:
        known = time_s[~np.isnan(time_s)]
        assert known.size > 1
        assert (known > 0).all()
        assert known.max() < 2.0  # seconds: a table in the wrong unit would be far off


@each_device
@pytest.mark.parametrize("name", MODELS)
def test_costs_are_finite_positive_and_monotone(device: str, name: str) -> None:
    """Iteration costs compile at every measured width and never fall with more work."""
    costs = compiler(device, shape(name))
    assert costs.widths == WIDTHS.get(device, NODE)
    for tp in costs.widths:
        cost = costs.compile(tp, LIMITS)
        for array in (cost.decode_s, cost.mixed_s, cost.sampled_s, cost.prefill_s):
            assert np.isfinite(array).all()
            assert (array[1:] > 0).all()
            assert (np.diff(array) >= 0).all()
        assert np.isfinite(cost.attention_s).all()
        assert (cost.attention_s > 0).all()
        assert (np.diff(cost.attention_s, axis=0) >= 0).all()
        assert (np.diff(cost.attention_s, axis=1) >= 0).all()
        assert (cost.mixed_s >= cost.decode_s).all()
        labels = costs.provenance(tp, tokens=512, sequences=32, context=CONTEXT, longest=2048)
        assert max(labels.values()) < Provenance.ROOFLINE


@each_device
def test_decoding_one_sequence_reads_the_weights(device: str) -> None:
    """On one device a decode iteration takes little more than reading the weights."""
    model = shape(MODELS[1])
    low, high = NEAR
    assert low < decode_s(device, model, 1) / read_weights_s(device, model, 1) < high


@each_device
def test_fp8_weights_decode_faster_where_the_device_has_fp8(device: str) -> None:
    """Half the bytes are read in less time, from measured kernels; a device without is left out."""
    if device == NO_FP8:
        return
    model = shape(MODELS[1], "fp8")
    assert decode_s(device, model, 1) < 0.75 * decode_s(device, shape(MODELS[1]), 1)
    labels = compiler(device, model).provenance(1, 512, 32, CONTEXT, 2048)
    assert max(labels.values()) < Provenance.ROOFLINE


@pytest.mark.parametrize("tp", NODE)
def test_devices_rank_as_their_bandwidths(tp: int) -> None:
    """One sequence decodes faster on H100 than on A100, then H200, then B200."""
    model = shape(MODELS[1])
    times = [decode_s(device, model, tp) for device in FASTER]
    assert times == sorted(times, reverse=True)


def test_default_limits_by_device() -> None:
    """Up to 0.24 the large tier starts at 70 GiB and leaves A100 out; there is no larger one."""
    for version in VERSIONS:
        for name in DEVICES:
            limits = engine_on(name, version).default_limits(profiles.load_device(name))
            small = name in (NO_FP8, "L40S")
            expected = BatchingLimits(256, 2048) if small else BatchingLimits(1024, 8192)
            assert limits == expected


@pytest.mark.parametrize("version", VERSIONS)
@each_device
def test_a_table_that_stands_in_is_named(device: str, version: str) -> None:
    """The table shipped is the engine's own, or a warning names whose it is."""
    engine = engine_on(device, version)
    table = profiles.load_kernel_table(device, "vllm", engine.kernel_table_version)
    assert table.engine_version == engine.kernel_table_version
    if table.engine_version != version:
        assert any(f"vLLM {table.engine_version} stand in for" in w for w in engine.warnings)
    if device in CAUTIONS:
        assert any(CAUTIONS[device] in warning for warning in engine.warnings)


@pytest.mark.parametrize("calibration", [None, "none"])
def test_reports_carry_the_warning(calibration: str | None) -> None:
    """A scenario on A100 says whose kernels stand in, with host constants and without."""
    engine = {"name": "vllm", "version": NEWEST, "calibration": calibration}
    problem = resolve(problems.scenario(cluster=pool(NO_FP8), engine=engine))
    assert any("vLLM 0.14.0 stand in for 0.24.0" in warning for warning in problem.warnings)
    assert problem.provenance["kernel_table"]["version"] == "0.14.0"


def test_fp8_weights_are_refused_without_fp8_tensor_cores() -> None:
    """A100 multiplies no fp8: the scenario is refused in one line, and bf16 is not."""
    model = {"config": problems.LLAMA_8B, "max_model_len": 1024}
    with pytest.raises(InputError, match=r"weight_dtype: 'fp8' needs fp8 tensor cores") as caught:
        resolve(problems.scenario(cluster=pool(NO_FP8), model=model | {"weight_dtype": "fp8"}))
    assert "\n" not in str(caught.value)
    assert resolve(problems.scenario(cluster=pool(NO_FP8), model=model)).device.fp8_flops == 0
    assert resolve(
        problems.scenario(cluster=pool("H200-SXM-141GB"), model=model | {"weight_dtype": "fp8"})
    )


def test_a_device_without_a_price_takes_the_scenarios() -> None:
    """No price is no cost, and a scenario's own price counts."""
    assert resolve(problems.scenario(cluster=pool("B300-SXM"))).price_per_hour is None
    priced = pool("B300-SXM")
    priced["pools"][0]["price_per_hour"] = 9.0
    assert resolve(problems.scenario(cluster=priced)).price_per_hour == 9.0


def truncated(blob: bytes) -> bytes:
    """The first half of a file."""
    return blob[: len(blob) // 2]


def flipped(blob: bytes) -> bytes:
    """A file with one bit of its middle turned."""
    middle = len(blob) // 2
    return blob[:middle] + bytes([blob[middle] ^ 1]) + blob[middle + 1 :]


def other_schema(blob: bytes) -> bytes:
    """The metadata of a later format."""
    return json.dumps(json.loads(blob) | {"schema_version": 2}).encode()


def other_device(blob: bytes) -> bytes:
    """The metadata of another device."""
    return json.dumps(json.loads(blob) | {"device": "H100-SXM-80GB"}).encode()


@pytest.mark.parametrize(
    ("suffix", "damage", "field"),
    [
        ("npz", truncated, "sha256"),
        ("npz", flipped, "sha256"),
        ("npz", lambda _: None, "sha256"),
        ("json", other_schema, "schema_version"),
        ("json", other_device, "device"),
        ("json", truncated, "is not JSON"),
        ("json", lambda _: b"[]", "must be a mapping"),
        ("json", lambda _: b"\xff", "is not JSON"),
    ],
)
def test_damaged_tables_are_refused_in_one_line(
    suffix: str,
    damage: Callable[[bytes], bytes | None],
    field: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Truncated, altered, missing or foreign files of one device are named; others still load."""
    copy = shutil.copytree(ROOT / "profiles" / "kernels", tmp_path / "kernels")
    target = copy / "L40S" / f"vllm-{NEWEST}.{suffix}"
    left = damage(target.read_bytes())
    target.unlink()
    if left is not None:
        target.write_bytes(left)
    monkeypatch.setattr(profiles, "files", lambda _: tmp_path)
    with pytest.raises(InputError, match=field) as caught:
        profiles.load_kernel_table.__wrapped__("L40S", "vllm", NEWEST)
    assert f"kernels/L40S/vllm-{NEWEST}.{suffix}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert profiles.load_kernel_table.__wrapped__("A100-SXM4-80GB", "vllm", "0.14.0")


@pytest.mark.parametrize(
    ("device", "engine", "version", "field"),
    [
        ("A100-SXM4-80GB", "vllm", "0.24.0", "version"),
        ("L40S", "sglang", "0.24.0", "engine"),
        ("B60", "vllm", "0.24.0", "device"),
    ],
)
def test_unknown_tables_are_refused(device: str, engine: str, version: str, field: str) -> None:
    """A device, engine or version without a table is refused with what there is instead."""
    with pytest.raises(InputError, match=rf"kernels: {field}: .* must be one of") as caught:
        profiles.load_kernel_table(device, engine, version)
    assert "\n" not in str(caught.value)
