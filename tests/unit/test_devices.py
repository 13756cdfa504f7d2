"""Every device: its table loads whole, its costs are sane, its oddities are said aloud."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from planner.errors import InputError
from planner.io import profiles
from planner.io.devices import device_names, kernel_table_for, load_device, measured_device
from planner.io.engines import EngineProfile, load_engine
from planner.io.hf_config import read_model
from planner.resolve import resolve
from simulator.cost import CostCompiler
from simulator.engine_rules import HostConstants
from simulator.interpolate import Provenance
from simulator.ops import head_gemm, layer_gemms
from simulator.plan import BatchingLimits, Shape
from simulator.precision import PRECISIONS
from simulator.units import GIB
from tests import problems
from tests.builders import iteration_s

if TYPE_CHECKING:
    from simulator.model import ModelShape

ROOT = Path(__file__).parents[2]
NEWEST = "0.24.0"
VERSIONS = ("0.10.2", NEWEST)
MEASURED = sorted({device for device, _, _ in profiles.available_kernel_tables()})
MODELS = ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B")
TRAY = (1, 2, 4)
NODE = (*TRAY, 8)
WIDTHS = {
    "GB200-NVL72": TRAY,  # measured within one tray; the others in a node
    "GB300-NVL72": TRAY,
    "GH200-144GB": (1, 2),
    "GH200-96GB": (1,),
}
NO_FP8 = "A100-SXM4-80GB"
CAUTIONS = {"L40S": "all-reduce times on L40S", "GB200-NVL72": "bf16 GEMM times of GB200-NVL72"}
LIMITS = BatchingLimits(256, 2048)
MAX_CONTEXT = 4096
CONTEXT = 1024  # tokens held by the sequence of the sanity checks
NEAR = (1.1, 1.5)  # decode of one sequence over the time to read the weights at datasheet speed
ROOMY = 70  # GiB: the engine's larger default limits begin here
FASTER = ["A100-SXM4-80GB", "H100-SXM-80GB", "H200-SXM-141GB", "B200-SXM-180GB"]

each_device = pytest.mark.parametrize("device", device_names())
each_measured_device = pytest.mark.parametrize("device", MEASURED)


def engine_on(device: str, version: str = NEWEST) -> EngineProfile:
    """The engine as it is on a device: on the measured one where the device is estimated."""
    return load_engine("vllm", version, device=measured_device(device))


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
        load_device(device),
        kernel_table_for(device, "vllm", engine.kernel_table_version),
        HostConstants(),
        engine.graphs,
        nccl_all_reduce_from_bytes=engine.nccl_all_reduce_from_bytes,
        max_tokens=LIMITS.max_num_batched_tokens,
        max_seqs=LIMITS.max_num_seqs,
        max_context=MAX_CONTEXT,
    )


def decode_s(device: str, model: ModelShape, tp: int) -> float:
    """One decode iteration of one sequence."""
    return iteration_s(
        compiler(device, model).compile(Shape(tp), LIMITS), 1, 1, CONTEXT, 0.0, 1, False
    )


def read_weights_s(device: str, model: ModelShape, tp: int) -> float:
    """Time to read one rank's projections and head at datasheet bandwidth."""
    layers = [op for layer in model.layers for op in layer_gemms(model, layer, Shape(tp))]
    read_bytes = sum(
        op.n * op.k * PRECISIONS[op.dtype].weight_bytes
        for op in (*layers, head_gemm(model, Shape(tp)))
    )
    return read_bytes / load_device(device).memory_bandwidth_bytes_per_s


def pool(device: str) -> dict[str, Any]:
    """A scenario's cluster of one node of eight."""
    return {"pools": [{"device": device, "nodes": 1, "devices_per_node": 8}]}


def test_every_table_is_a_catalogued_devices() -> None:
    """What ships for a device is of one that is catalogued as measured."""
    assert len(MEASURED) == 9
    assert [name for name in device_names() if measured_device(name) == name] == MEASURED


@each_measured_device
def test_table_loads_with_all_families(device: str) -> None:
    """All families are there, no series is empty, and each starts at its smallest cell."""
    table = profiles.load_kernel_table(device, "vllm", engine_on(device).kernel_table_version)
    assert set(table.gemm) >= ({"bf16"} if device == NO_FP8 else {"bf16", "fp8"})
    for dtype in ("bf16", "fp8"):
        if dtype not in table.gemm:
            continue
        grid = table.gemm[dtype]
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
        cost = costs.compile(Shape(tp), LIMITS)
        for array in (cost.decode_ps, cost.mixed_ps, cost.sampled_ps, cost.prefill_ps):
            assert (array[:, 1:] > 0).all()
            assert (np.diff(array) >= 0).all()
        assert (cost.attention_ps > 0).all()
        assert (np.diff(cost.attention_ps, axis=1) >= 0).all()
        assert (np.diff(cost.attention_ps, axis=2) >= 0).all()
        assert (cost.mixed_ps >= cost.decode_ps).all()
        labels = costs.provenance(
            Shape(tp), tokens=512, sequences=32, context=CONTEXT, longest=2048
        )
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
    if load_device(device).fp8_flops == 0:
        return
    model = shape(MODELS[1], "fp8")
    assert decode_s(device, model, 1) < 0.75 * decode_s(device, shape(MODELS[1]), 1)
    labels = compiler(device, model).provenance(Shape(1), 512, 32, CONTEXT, 2048)
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
        for name in device_names():
            device = load_device(name)
            limits = engine_on(name, version).default_limits(device)
            small = device.memory_bytes < ROOMY * GIB or "A100" in name
            expected = BatchingLimits(256, 2048) if small else BatchingLimits(1024, 8192)
            assert limits == expected


@pytest.mark.parametrize("version", VERSIONS)
@each_measured_device
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


def test_reports_say_that_a_table_is_estimated() -> None:
    """A scenario on a device without a table runs on its relative's, and says so."""
    problem = resolve(problems.scenario(cluster=pool("A30")))
    assert any(
        "kernel times of A30 are estimated from A100-SXM4-80GB" in warning
        for warning in problem.warnings
    )
    assert any("vLLM 0.14.0 stand in for 0.24.0" in warning for warning in problem.warnings)
    assert problem.provenance["kernel_table"]["device"] == "A100-SXM4-80GB"


def test_fp8_weights_are_refused_without_fp8_tensor_cores() -> None:
    """A100 multiplies no fp8: the scenario is refused in one line, and bf16 is not."""
    model = {"config": problems.LLAMA_8B, "max_model_len": 1024}
    with pytest.raises(InputError, match=r"weight_dtype: 'fp8' needs fp8 tensor cores") as caught:
        resolve(problems.scenario(cluster=pool(NO_FP8), model=model | {"weight_dtype": "fp8"}))
    assert "\n" not in str(caught.value)
    assert resolve(problems.scenario(cluster=pool(NO_FP8), model=model)).pool.device.fp8_flops == 0
    assert resolve(
        problems.scenario(cluster=pool("H200-SXM-141GB"), model=model | {"weight_dtype": "fp8"})
    )


def test_a_device_without_a_price_takes_the_scenarios() -> None:
    """No price is no cost, and a scenario's own price counts."""
    assert resolve(problems.scenario(cluster=pool("B300-SXM"))).pool.price_per_hour is None
    priced = pool("B300-SXM")
    priced["pools"][0]["price_per_hour"] = 9.0
    assert resolve(problems.scenario(cluster=priced)).pool.price_per_hour == 9.0


@pytest.mark.parametrize(
    ("device", "engine", "version", "field"),
    [
        ("A100-SXM4-80GB", "vllm", "0.24.0", "version"),
        ("L40S", "lmdeploy", "0.24.0", "engine"),
        ("B60", "vllm", "0.24.0", "device"),
    ],
)
def test_unknown_tables_are_refused(device: str, engine: str, version: str, field: str) -> None:
    """A device, engine or version without a table is refused with what there is instead."""
    with pytest.raises(InputError, match=rf"kernels: {field}: .* must be one of") as caught:
        profiles.load_kernel_table(device, engine, version)
    assert "\n" not in str(caught.value)
