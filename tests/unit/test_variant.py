"""Kernel times of devices that nobody measured: sane, continuous, and near where they can be."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from planner.io.devices import device_names, kernel_table_for, load_device, measured_device
from planner.io.profiles import available_kernel_tables
from simulator.device import Device
from simulator.gemm import gemm_s
from simulator.variant import scaled_s, scaled_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from simulator.table import KernelTable

H100, H200, A100 = "H100-SXM-80GB", "H200-SXM-141GB", "A100-SXM4-80GB"
VARIANTS = [name for name in device_names() if measured_device(name) != name]
SHIPPED = available_kernel_tables()
TOKENS = np.unique(np.geomspace(1, 60_000, 120).astype(int))
SAME = {"rtol": 1e-12, "atol": 0}

every_variant = pytest.mark.parametrize("name", VARIANTS)


def newest(device: str, engine: str = "vllm") -> str:
    """The one version of an engine whose table ships for a device."""
    (version,) = (v for d, e, v in SHIPPED if (d, e) == (measured_device(device), engine))
    return version


def table_of(device: str, engine: str = "vllm") -> KernelTable:
    """The device's table, shipped or estimated."""
    return kernel_table_for(device, engine, newest(device, engine))


def grids(table: KernelTable) -> Iterator[tuple[str, Any]]:
    """Every grid and series of a table, with its family and identity."""
    for family in ("gemm", "all_reduce", "nccl", "moe", "latent_bmm"):
        for key, grid in getattr(table, family).items():
            yield f"{family} {key}", grid
    for family in ("context", "generation", "latent", "recurrent", "all_to_all"):
        for one in getattr(table, family):
            labels = [v for v in vars(one).values() if not isinstance(v, np.ndarray)]
            yield f"{family} {labels}", one


@every_variant
def test_every_engines_table_is_estimated(name: str) -> None:
    """All that was measured and can run has a positive time, and says whose it is."""
    source = measured_device(name)
    engines = {engine for device, engine, _ in SHIPPED if device == source}
    assert "vllm" in engines
    for engine in engines:
        measured, table = table_of(source, engine), table_of(name, engine)
        assert (table.device, table.estimated_from) == (name, source)
        assert (table.engine, table.engine_version) == (engine, measured.engine_version)
        assert measured.estimated_from == ""
        kinds = dict(grids(measured))
        for kind, grid in grids(table):
            assert not grid.time_s.flags.writeable
            known = grid.time_s[~np.isnan(grid.time_s)]
            assert known.size
            assert (known > 0).all()
            assert np.isfinite(known).all()
            if not kind.startswith(("all_reduce", "nccl")):
                assert (np.isnan(grid.time_s) == np.isnan(kinds[kind].time_s)).all()


@every_variant
def test_precisions_are_those_that_both_run(name: str) -> None:
    """Nothing is invented, and what the target cannot multiply is gone."""
    device, source = load_device(name), measured_device(name)
    table, measured = table_of(name), table_of(source)
    for family in ("gemm", "moe"):
        have, had = set(getattr(table, family)), set(getattr(measured, family))
        assert have == {dtype for dtype in had if device.flops(dtype)}
    kv = {one.kv_dtype for one in (*table.context, *table.generation)}
    assert ("fp8" in kv) <= (device.fp8_flops > 0)
    assert "bf16" in table.gemm


def test_a_device_scales_to_itself() -> None:
    """The same facts give the same times, whatever the formula takes a time apart into."""
    table, device = table_of(H100), load_device(H100)
    same = scaled_table(table, device, replace(device, name="twin"))
    twins = dict(grids(same))
    assert same.estimated_from == H100
    assert twins.keys() == dict(grids(table)).keys()
    for kind, grid in grids(table):
        np.testing.assert_allclose(twins[kind].time_s, grid.time_s, **SAME, err_msg=kind)


@every_variant
def test_products_stay_monotone(name: str) -> None:
    """More tokens never take less time on an estimated table."""
    table, device = table_of(name), load_device(name)
    for dtype in ("bf16", "fp8"):
        if dtype in table.gemm:
            time_s, _ = gemm_s(table, device, dtype, TOKENS, 7168, 5120)
            assert (np.diff(time_s) >= -1e-12 * time_s[1:]).all()


@pytest.mark.parametrize(
    "faster",
    [
        {"memory_bandwidth_bytes_per_s": 4.2e12},
        {"sustained_bf16_flops": 9.9e14, "sustained_fp8_flops": 1.9e15},
        {"sm_hz": 3e11},
    ],
)
def test_a_faster_device_is_slower_nowhere(faster: dict[str, float]) -> None:
    """More bandwidth, arithmetic or multiprocessors: no cell takes longer, and some take less."""
    table, device = table_of(H100), load_device(H100)
    improved = dict(grids(scaled_table(table, device, replace(device, **faster))))
    gained = set()
    for kind, grid in grids(table):
        ratio = improved[kind].time_s / grid.time_s
        assert np.nanmax(ratio) <= 1 + 1e-12, kind
        if np.nanmin(ratio) < 0.99:
            gained.add(kind.split()[0])
    assert {"gemm", "generation", "context", "moe", "latent"} <= gained
    assert not gained & {"all_reduce", "nccl"}


def test_decode_follows_the_bandwidth() -> None:
    """Reading a long cache takes as much longer as the memory is slower; a launch stays."""
    slow = replace(load_device(H100), memory_bandwidth_bytes_per_s=3.35e12 / 2)
    table = table_of(H100)
    halved = scaled_table(table, load_device(H100), slow)
    for before, after in zip(table.generation, halved.generation, strict=True):
        # Few query heads per KV head: more of them make arithmetic count, which stays.
        if (before.head_dim, before.window_tokens) == (128, 0) and before.heads < 4:
            ratio = after.time_s / before.time_s
            assert ratio.flat[np.nanargmin(before.time_s)] == pytest.approx(1)
            assert 1.5 < ratio.flat[np.nanargmax(before.time_s)] <= 2


def test_the_formula_by_hand() -> None:
    """10 us floor, 20 us ideal of which all fits, 30 us rest; then a cell with no room for it."""
    time_s = np.array([10e-6, 60e-6, 15e-6, np.nan])
    from_s, to_s = np.array([5e-6, 20e-6, 20e-6, 1e-6]), np.array([9e-6, 60e-6, 60e-6, 1e-6])
    scaled = scaled_s(time_s, from_s, to_s, 0.5)
    np.testing.assert_allclose(scaled, [10e-6, (10 + 60 + 15) * 1e-6, (10 + 15) * 1e-6, np.nan])


def test_the_formula_is_continuous() -> None:
    """A little more measured time or ideal time moves the estimate a little, whatever bounds it."""
    time_s = np.linspace(4e-6, 80e-6, 20_001)
    ideal_s = np.full(time_s.shape, 30e-6)
    by_time = np.diff(scaled_s(time_s, ideal_s, 3 * ideal_s, 0.4)) / np.diff(time_s)
    assert by_time.min() > 0.4 - 1e-6
    assert by_time.max() < 3 + 1e-6
    ideal_s = np.linspace(1e-9, 60e-6, 20_001)
    time_s = np.concatenate([[4e-6], np.full(20_000, 40e-6)])
    by_ideal = np.diff(scaled_s(time_s, ideal_s, 3 * ideal_s, 0.4)[1:]) / np.diff(ideal_s[1:])
    assert np.abs(by_ideal).max() < 3


def median_error(predicted: KernelTable, real: KernelTable) -> dict[str, float]:
    """Median relative error by family over the cells of grids with equal axes."""
    errors: dict[str, list[np.ndarray]] = {}
    reals = dict(grids(real))
    for kind, grid in grids(predicted):
        other = reals.get(kind)
        if other is not None and other.time_s.shape == grid.time_s.shape:
            error = np.abs(grid.time_s / other.time_s - 1)
            errors.setdefault(kind.split()[0], []).append(error[~np.isnan(error)])
    return {family: float(np.median(np.concatenate(parts))) for family, parts in errors.items()}


@pytest.mark.parametrize(("source", "target"), [(H100, H200), (H200, H100)])
def test_the_same_gpu_with_another_memory(source: str, target: str) -> None:
    """H100 and H200 predict each other; the roofline ratio alone is an order worse for decode."""
    predicted = scaled_table(table_of(source), load_device(source), load_device(target))
    errors = median_error(predicted, table_of(target))
    bars = {"gemm": 0.06, "context": 0.04, "generation": 0.03, "moe": 0.07, "latent": 0.05}
    for family, bar in bars.items():
        assert errors[family] < bar, family


def test_another_architecture_is_rougher() -> None:
    """A100 from H100, three years apart: within a third, and much nearer than unscaled."""
    measured, real = table_of(H100), table_of(A100)
    errors = median_error(scaled_table(measured, load_device(H100), load_device(A100)), real)
    unscaled = median_error(measured, real)
    assert max(errors[family] for family in ("generation", "context")) < 0.33
    for family in ("generation", "context"):
        assert errors[family] < 0.75 * unscaled[family]


def test_bridged_boards_use_both_links() -> None:
    """A pair of H100 NVL goes over its bridge; more devices go over PCIe, with its latency."""
    name, box = "H100-NVL-94GB", "RTX-PRO-6000-Server"
    table, nvlink, pcie = table_of(name), table_of(H100), table_of(box)
    bridge = load_device(H100).link_bytes_per_s / load_device(name).link_bytes_per_s
    for key, series in table.nccl.items():
        source = (nvlink if key[1] == 2 else pcie).nccl[key]
        ratio = series.time_s / source.time_s
        smallest = np.nanargmin(source.time_s)
        assert ratio[smallest] == pytest.approx(1)
        assert ratio[-1] == pytest.approx(bridge if key[1] == 2 else 1, rel=0.02)
    assert {gpus for _, gpus in table.nccl} == {2, 4, 8}


def test_pcie_boards_take_a_pcie_boxs_collectives() -> None:
    """Nothing of the SXM relative's NVLink is left."""
    table, box = table_of("H100-PCIe-80GB"), table_of("RTX-PRO-6000-Server")
    for key, series in box.all_reduce.items():
        np.testing.assert_allclose(table.all_reduce[key].time_s, series.time_s, **SAME)
    assert not table.all_to_all


def test_a_lone_superchip_keeps_the_narrowest_collective() -> None:
    """One GPU per node: the pair's launch and latency stay, for groups across nodes."""
    assert {gpus for _, gpus in table_of("GH200-96GB").nccl} == {2}
    assert {gpus for _, gpus in table_of("GH200-144GB").all_reduce} == {2}


def test_an_unknown_multiprocessor_rate_is_refused() -> None:
    """A device without the fact cannot be scaled from or to."""
    bare = Device("bare", 1, 1e12, 1e14, 0.0, 1e10, 1, 1e-6, 1e12, None)
    with pytest.raises(ValueError, match="rate of bare is not known"):
        scaled_table(table_of(H100), load_device(H100), bare)
