"""Kernel times: monotone, true to the table, smooth in shape, labelled, never absurd."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from planner.errors import InputError
from planner.io import profiles as shipped
from simulator.attention import context_attention_s, generation_attention_s
from simulator.collectives import all_reduce_s, nccl_s
from simulator.gemm import gemm_s
from simulator.interpolate import Provenance, isotonic, isotonic_grid
from simulator.table import AttentionSeries, GemmGrid, KernelTable, MessageSeries

TABLE = shipped.load_kernel_table("H100-SXM-80GB", "vllm", "0.24.0")
DEVICE = shipped.load_device("H100-SXM-80GB")
BEYOND_M = 100_000  # the table ends at 32,768 tokens
TOKENS = np.unique(np.geomspace(1, BEYOND_M, 300).astype(int))
LENGTHS = np.unique(np.geomspace(1, 200_000, 120).astype(int))  # contexts end at 131,072
BATCHES = np.unique(np.geomspace(1, 5000, 60).astype(int))  # batches end at 2,048
ELEMENTS = np.unique(np.geomspace(1, 2e9, 150).astype(int))  # messages end at 536,870,912
LAYOUTS = [(8, 1), (32, 8), (7, 1), (28, 4), (16, 16), (30, 5), (96, 8), (128, 1), (9, 3)]
SHAPE_STEP = 0.01  # contract: a shape moved by 1 % ...
MAX_MOVE = 0.03  # ... moves no prediction by more than 3 %

generation_s = partial(generation_attention_s, TABLE, DEVICE)
context_s = partial(context_attention_s, TABLE, DEVICE)


def assert_sane(time_s: np.ndarray) -> None:
    """No NaN, infinity, zero or negative time."""
    assert np.isfinite(time_s).all()
    assert (time_s > 0).all()


def assert_monotone(time_s: np.ndarray, axis: int = -1) -> None:
    """No step down along ``axis``, rounding aside."""
    steps = np.diff(time_s, axis=axis)
    assert (steps >= -1e-12 * np.abs(time_s).max()).all()


def synthetic(**families: object) -> KernelTable:
    """A table with only the given families."""
    empty = KernelTable("d", "e", "v", gemm={}, context=(), generation=(), all_reduce={}, nccl={})
    return replace(empty, **families)


def attention_series(time_s: np.ndarray, batch: list[int], length: list[int]) -> AttentionSeries:
    """A bf16 series of width 128 with 8 query and 2 KV heads."""
    return AttentionSeries(128, 0, "bf16", 8, 2, np.array(batch), np.array(length), time_s)


def test_isotonic_equals_the_max_min_formula() -> None:
    """Pool-adjacent-violators agrees with the textbook max-min formula on random sequences."""
    random = np.random.default_rng(1)
    for size in (1, 2, 5, 12):
        values = random.normal(size=size)
        expected = [
            max(min(values[i : k + 1].mean() for k in range(j, size)) for i in range(j + 1))
            for j in range(size)
        ]
        np.testing.assert_allclose(isotonic(values), expected, atol=1e-12)


def test_isotonic_spike_does_not_raise_the_tail() -> None:
    """One spike leaves later, larger points where they were measured."""
    np.testing.assert_allclose(isotonic(np.array([1.0, 9.0, 3.0, 7.0, 8.0])), [1, 6, 6, 7, 8])


def test_isotonic_grid_keeps_monotone_grids_and_gaps() -> None:
    """A monotone grid with a gap is unchanged, and a violation is halved between its sides."""
    grid = np.array([[1.0, 2.0], [3.0, np.nan]])
    np.testing.assert_array_equal(isotonic_grid(grid), grid)
    np.testing.assert_allclose(isotonic_grid(np.array([[1.0, 4.0, 2.0]])), [[1.0, 3.0, 3.0]])


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize(("n", "k"), [(8192, 8192), (5000, 3000), (128_256, 8192), (16, 7)])
def test_gemm_is_monotone_and_sane(dtype: str, n: int, k: int) -> None:
    """On, between and outside grid shapes, time is positive and grows with tokens."""
    time_s, label = gemm_s(TABLE, DEVICE, dtype, TOKENS, n, k)
    assert_sane(time_s)
    assert_monotone(time_s)
    assert (label[TOKENS > 32_768] == Provenance.EXTRAPOLATED).all()


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_gemm_reproduces_the_table(dtype: str) -> None:
    """At grid points only the monotone fit moves a time: under 1 % in the median, 10 % at p95."""
    grid = TABLE.gemm[dtype]
    errors = []
    for i in range(0, len(grid.n) - 1, 3):  # the last shape, 65,536 squared, was not measured
        for j in range(0, len(grid.k) - 1, 3):
            time_s, label = gemm_s(TABLE, DEVICE, dtype, grid.m, int(grid.n[i]), int(grid.k[j]))
            assert (label == Provenance.MEASURED).all()
            errors.append(np.abs(time_s / grid.time_s[:, i, j] - 1))
    assert np.median(errors) < 0.01
    assert np.quantile(errors, 0.95) < 0.10


def test_gemm_of_constant_utilisation_is_exact_everywhere() -> None:
    """Where every measured shape runs at 70 % of the roofline, so does every predicted one."""
    empty = synthetic()
    m, n, k = np.array([1, 64, 4096]), np.array([256, 1024]), np.array([512, 4096])
    time_s = np.empty((len(m), len(n), len(k)))
    for i, width in enumerate(n):
        for j, inner in enumerate(k):
            time_s[:, i, j] = gemm_s(empty, DEVICE, "bf16", m, int(width), int(inner))[0] / 0.7
    table = synthetic(gemm={"bf16": GemmGrid(m, n, k, time_s)})
    for width, inner in [(256, 512), (600, 1000), (99, 9000)]:
        tokens = [1, 64, 4096, 50_000]
        roofline_s, _ = gemm_s(empty, DEVICE, "bf16", tokens, width, inner)
        predicted_s, _ = gemm_s(table, DEVICE, "bf16", tokens, width, inner)
        np.testing.assert_allclose(predicted_s, roofline_s / 0.7, rtol=1e-9)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("n", [5120, 28_672, 14_336, 7168])
def test_gemm_is_smooth_in_shape(dtype: str, n: int) -> None:
    """Moving n or k by 1 % moves the time by under 3 % at every token count."""
    base_s, _ = gemm_s(TABLE, DEVICE, dtype, TOKENS, n, 8192)
    for step in (1 - SHAPE_STEP, 1 + SHAPE_STEP):
        for moved in ((round(n * step), 8192), (n, round(8192 * step))):
            moved_s, _ = gemm_s(TABLE, DEVICE, dtype, TOKENS, *moved)
            assert np.abs(moved_s / base_s - 1).max() < MAX_MOVE


def test_gemm_labels() -> None:
    """Labels tell measured, interpolated and extrapolated tokens and shapes apart."""
    _, label = gemm_s(TABLE, DEVICE, "bf16", [16, 20, 40_000], 8192, 8192)
    assert label.tolist() == [
        Provenance.MEASURED,
        Provenance.INTERPOLATED,
        Provenance.EXTRAPOLATED,
    ]
    assert gemm_s(TABLE, DEVICE, "bf16", [16], 8200, 8192)[1][0] == Provenance.INTERPOLATED
    assert gemm_s(TABLE, DEVICE, "bf16", [16], 128_256, 8192)[1][0] == Provenance.EXTRAPOLATED
    # The one shape that was never measured.
    assert gemm_s(TABLE, DEVICE, "bf16", [16], 65_536, 65_536)[1][0] == Provenance.EXTRAPOLATED


def test_gemm_without_data_is_roofline() -> None:
    """A dtype the table lacks gives the larger of arithmetic and traffic time, by hand."""
    time_s, label = gemm_s(synthetic(), DEVICE, "fp8", [1, 8192], 4096, 4096)
    traffic_s = (4096 + 4096 * 4096 + 2 * 4096) / 3.35e12
    arithmetic_s = 2 * 8192 * 4096 * 4096 / 1978e12
    np.testing.assert_allclose(time_s, [traffic_s, arithmetic_s])
    assert (label == Provenance.ROOFLINE).all()


def test_gemm_refuses_empty_work() -> None:
    """A product over no tokens has no time."""
    with pytest.raises(ValueError, match="at least 1"):
        gemm_s(TABLE, DEVICE, "bf16", [0], 8, 8)


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256, 512, 96])
@pytest.mark.parametrize(("heads", "kv_heads"), LAYOUTS)
def test_generation_is_monotone_and_sane(
    kv_dtype: str, head_dim: int, heads: int, kv_heads: int
) -> None:
    """Any head layout, batch and context gives a positive time that grows with both."""
    time_s, label = generation_s(kv_dtype, head_dim, heads, kv_heads, BATCHES, LENGTHS)
    assert_sane(time_s)
    assert_monotone(time_s, axis=0)
    assert_monotone(time_s, axis=1)
    assert label.dtype == np.int8
    assert label[-1, -1] >= Provenance.EXTRAPOLATED


def test_generation_reproduces_the_table() -> None:
    """At measured points of head width 128 only the monotone fit moves a time: p95 under 3 %."""
    errors = []
    for series in TABLE.generation:
        if series.window_tokens == 0 and series.head_dim == 128:
            time_s, label = generation_s(
                series.kv_dtype, 128, series.heads, series.kv_heads, series.batch, series.length
            )
            known = ~np.isnan(series.time_s)
            assert (label[known] == Provenance.MEASURED).all()
            assert (label[~known] == Provenance.EXTRAPOLATED).all()
            errors.append(np.abs(time_s / series.time_s - 1)[known])
    assert np.quantile(np.concatenate(errors), 0.95) < 0.03


def test_generation_of_affine_cost_is_exact() -> None:
    """Launch plus KV traffic is met inside the grid, and more KV heads act as more sequences."""
    batch, length = [1, 4, 16], [2, 64, 1024]
    time_s = 1e-5 + 1e-9 * np.outer(batch, length)
    table = synthetic(generation=(attention_series(time_s, batch, length),))
    call = partial(generation_attention_s, table, DEVICE, "bf16", 128)
    inside_s = 1e-5 + 1e-9 * np.outer([3, 9], [50, 700])
    np.testing.assert_allclose(call(8, 2, [3, 9], [50, 700])[0], inside_s)
    doubled_s, label = call(16, 4, [3], [50])
    np.testing.assert_allclose(doubled_s, 1e-5 + 1e-9 * 6 * 50)
    assert label[0, 0] == Provenance.EXTRAPOLATED
    beyond_s, _ = call(8, 2, [32], [2048])
    np.testing.assert_allclose(beyond_s, 4 * time_s[-1, -1])


def test_generation_labels() -> None:
    """Labels tell measured, interpolated, extrapolated and roofline times apart."""
    assert generation_s("bf16", 128, 8, 1, [8], [1024])[1][0, 0] == Provenance.MEASURED
    assert generation_s("bf16", 128, 8, 1, [8], [1000])[1][0, 0] == Provenance.INTERPOLATED
    assert generation_s("bf16", 128, 7, 1, [8], [1024])[1][0, 0] == Provenance.INTERPOLATED
    assert generation_s("bf16", 128, 16, 16, [8], [1024])[1][0, 0] == Provenance.EXTRAPOLATED
    assert generation_s("bf16", 96, 8, 1, [8], [1024])[1][0, 0] == Provenance.ROOFLINE


def test_generation_without_data_is_roofline() -> None:
    """A head width the table lacks gives KV traffic plus arithmetic, by hand."""
    time_s, _ = generation_s("fp8", 96, 8, 2, [4], [1000])
    by_hand_s = 2 * 4000 * 2 * 96 * 1 / 3.35e12 + 4 * 4000 * 8 * 96 / 989e12
    np.testing.assert_allclose(time_s, [[by_hand_s]])


@pytest.mark.parametrize("head_dim", [64, 128, 96])
@pytest.mark.parametrize(("heads", "kv_heads"), LAYOUTS)
def test_context_is_monotone_and_sane(head_dim: int, heads: int, kv_heads: int) -> None:
    """Prefill cost is 0 at no tokens, positive after, and grows; so a chunk never costs less."""
    per_sequence_s, launch_s, _ = context_s("bf16", head_dim, heads, kv_heads, LENGTHS)
    assert_sane(per_sequence_s)
    assert_monotone(per_sequence_s)
    assert launch_s >= 0
    assert context_s("bf16", head_dim, heads, kv_heads, [0])[0][0] == 0


def test_context_of_quadratic_cost_is_exact() -> None:
    """A launch plus quadratic work is met between, at and beyond the measured lengths."""
    batch, length = [1, 8], [1, 64, 1024]
    time_s = 1e-5 + 1e-10 * np.outer(batch, np.square(length))
    table = synthetic(context=(attention_series(time_s, batch, length),))
    lengths = np.array([1, 30, 64, 500, 4096])
    per_sequence_s, launch_s, label = context_attention_s(table, DEVICE, "bf16", 128, 8, 2, lengths)
    # The launch is the one-token time, so F misses the eighth of it that one token really costs.
    np.testing.assert_allclose(per_sequence_s[2:], 1e-10 * lengths[2:] ** 2, rtol=1e-3)
    assert launch_s == pytest.approx(1e-5, rel=1e-3)
    assert label[3:].tolist() == [Provenance.INTERPOLATED, Provenance.EXTRAPOLATED]


def test_context_predicts_full_batches() -> None:
    """Launch plus marginal costs meets the largest measured batches of width 128: median 3 %."""
    errors = []
    for series in TABLE.context:
        if series.window_tokens == 0 and series.head_dim == 128:
            per_sequence_s, launch_s, _ = context_s(
                series.kv_dtype, 128, series.heads, series.kv_heads, series.length
            )
            half = len(series.batch) // 2
            predicted_s = launch_s + series.batch[half:, None] * per_sequence_s
            errors.append(np.abs(predicted_s / series.time_s[half:] - 1))
    assert np.nanmedian(errors) < 0.03


@pytest.mark.parametrize("backend", ["graph", "eager"])
@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_all_reduce_is_monotone_true_and_labelled(backend: str, gpus: int) -> None:
    """All-reduce grows with the message, meets the table and flags both ends."""
    time_s, label = all_reduce_s(TABLE, DEVICE, backend, gpus, ELEMENTS)
    assert_sane(time_s)
    assert_monotone(time_s)
    assert label[0] == label[-1] == Provenance.EXTRAPOLATED
    series = TABLE.all_reduce[backend, gpus]
    error = all_reduce_s(TABLE, DEVICE, backend, gpus, series.elements)[0] / series.time_s - 1
    assert np.abs(error).max() < 0.10


@pytest.mark.parametrize("op", ["all_gather", "all_reduce", "alltoall", "reduce_scatter"])
@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_nccl_is_monotone_and_sane(op: str, gpus: int) -> None:
    """Every NCCL operation gives a positive time that grows with the message."""
    time_s, _ = nccl_s(TABLE, DEVICE, op, gpus, ELEMENTS)
    assert_sane(time_s)
    assert_monotone(time_s)


def test_collectives_between_and_beyond_sizes() -> None:
    """A power law is met between sizes, latency is held below and bandwidth beyond."""
    series = MessageSeries(np.array([100, 10_000]), np.array([1e-5, 1e-4]))
    table = synthetic(nccl={("all_gather", 2): series})
    time_s, label = nccl_s(table, DEVICE, "all_gather", 2, [10, 1000, 20_000])
    np.testing.assert_allclose(time_s, [1e-5, 10**-4.5, 2e-4])
    assert label.tolist() == [
        Provenance.EXTRAPOLATED,
        Provenance.INTERPOLATED,
        Provenance.EXTRAPOLATED,
    ]


def test_collectives_refuse_what_was_not_measured() -> None:
    """One GPU costs nothing; 3 GPUs, an unknown backend and a broken domain are refused."""
    assert all_reduce_s(TABLE, DEVICE, "graph", 1, [4096])[0].tolist() == [0.0]
    with pytest.raises(ValueError, match=r"measured on \[2, 4, 8\] GPUs, not on 3"):
        all_reduce_s(TABLE, DEVICE, "graph", 3, [4096])
    with pytest.raises(ValueError, match="nvls"):
        all_reduce_s(TABLE, DEVICE, "nvls", 2, [4096])
    with pytest.raises(ValueError, match="scale-up domain of 4"):
        nccl_s(TABLE, replace(DEVICE, scaleup_domain=4), "all_reduce", 8, [4096])


def test_profiles_name_what_ships() -> None:
    """The shipped table is listed, and an unknown device or version is refused by name."""
    assert ("H100-SXM-80GB", "vllm", "0.24.0") in shipped.available_kernel_tables()
    assert DEVICE.memory_bytes == pytest.approx(79.22 * 2**30, abs=1)
    with pytest.raises(InputError, match=r"0\.6\.0"):
        shipped.load_kernel_table("H100-SXM-80GB", "vllm", "0.6.0")
    with pytest.raises(InputError, match="H999"):
        shipped.load_device("H999")


def test_profiles_refuse_altered_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel file with one byte changed fails its checksum."""
    source = Path(shipped.__file__).parents[2] / "profiles" / "kernels"
    copy = shutil.copytree(source, tmp_path / "kernels")
    target = copy / "H100-SXM-80GB" / "vllm-0.24.0.npz"
    blob = bytearray(target.read_bytes())
    blob[-1] ^= 1
    target.write_bytes(blob)
    monkeypatch.setattr(shipped, "files", lambda _: tmp_path)
    with pytest.raises(InputError, match="sha256"):
        shipped.load_kernel_table.__wrapped__("H100-SXM-80GB", "vllm", "0.24.0")
