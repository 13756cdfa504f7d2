"""Shipped kernel tables: what they hold agrees with physics, and they are read lazily."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from planner.io import profiles
from planner.io.kernel_format import STEP_TIME_S, decode
from simulator.precision import PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from simulator.table import AttentionSeries, KernelTable

KERNELS = Path(__file__).parents[2] / "profiles" / "kernels"
SHIPPED = profiles.available_kernel_tables()
H100 = ("H100-SXM-80GB", "vllm", "0.24.0")
SMALL = ("A100-SXM4-80GB", "vllm", "0.14.0")  # the smallest file
H100_BF16 = 989e12  # FLOP/s and bytes/s of the H100 SXM datasheet
H100_BYTES = 3.35e12
TOTAL_BYTES = 15_000_000
AXES = ("m", "n", "k", "batch", "length", "heads", "tokens", "prefix", "elements")
OPERATIONS = {"all_gather", "all_reduce", "alltoall", "reduce_scatter"}
SHORTEST_S, LONGEST_S = 1e-6, 10.0

each_table = pytest.mark.parametrize("key", SHIPPED, ids="-".join)


def timed(table: KernelTable) -> Iterator[tuple[str, Any]]:
    """Every grid and series of a table with its family's name."""
    for family in ("gemm", "all_reduce", "nccl", "moe", "latent_bmm"):
        yield from ((family, grid) for grid in getattr(table, family).values())
    for family in ("context", "generation", "latent", "recurrent", "all_to_all"):
        yield from ((family, grid) for grid in getattr(table, family))


def attention(series: tuple[AttentionSeries, ...], heads: int, kv_heads: int) -> AttentionSeries:
    """Full bf16 attention of head width 128."""
    (found,) = (
        s
        for s in series
        if (s.head_dim, s.window_tokens, s.kv_dtype) == (128, 0, "bf16")
        and (s.heads, s.kv_heads) == (heads, kv_heads)
    )
    return found


def near(axis: NDArray[np.int32], value: int) -> int:
    """Index of a value that an axis has."""
    index = int(np.searchsorted(axis, value))
    assert axis[index] == value
    return index


@each_table
def test_shipped_times_are_plausible(key: tuple[str, str, str]) -> None:
    """Every time lies between 1 us and 10 s, every axis ascends, every name is known."""
    table = profiles.load_kernel_table(*key)
    assert (table.device, table.engine, table.engine_version) == key
    for family, grid in timed(table):
        known = grid.time_s[~np.isnan(grid.time_s)]
        assert known.size, family
        assert known.min() > SHORTEST_S, family
        assert known.max() < LONGEST_S, family
        assert not grid.time_s.flags.writeable
        axes = [
            a for a in ("m", "n", "k", "batch", "length", "heads", "tokens") if hasattr(grid, a)
        ]
        for axis in (getattr(grid, name) for name in axes):
            assert not isinstance(axis, np.ndarray) or (np.diff(axis) > 0).all()
    for precision in (*table.gemm, *table.moe, *(p for _, p in table.latent_bmm)):
        assert precision in PRECISIONS
    assert {mode for mode, _ in table.all_reduce} <= {"graph", "eager"}
    assert {op for op, _ in table.nccl} == {
        "all_gather",
        "all_reduce",
        "alltoall",
        "reduce_scatter",
    }


@each_table
def test_large_products_run_near_the_datasheet(key: tuple[str, str, str]) -> None:
    """A bf16 product of 8192 cubed takes no less than the tensor cores' time, nor thrice that."""
    grid = profiles.load_kernel_table(*key).gemm["bf16"]
    time_s = grid.time_s[near(grid.m, 8192), near(grid.n, 8192), near(grid.k, 8192)]
    peak = {
        "A100": 312e12,
        "H100": 989e12,
        "H200": 989e12,
        "B200": 2250e12,
        "B300": 2250e12,
        "GB200": 2500e12,
        "GB300": 2500e12,
        "L40S": 362e12,
        "RTX": 504e12,
    }[key[0].split("-")[0]]
    assert 1 < time_s * peak / (2 * 8192**3) < 3


def test_every_system_ships_three_engines_in_little_space() -> None:
    """Nine devices by three engines, and all files together stay under 15 MB."""
    assert len(SHIPPED) == 27
    assert {engine for _, engine, _ in SHIPPED} == {"vllm", "sglang", "trtllm"}
    assert sum(file.stat().st_size for file in KERNELS.rglob("*.*")) < TOTAL_BYTES


def test_h100_dense_kernels_agree_with_physics() -> None:
    """GEMM, attention and collectives on H100 run at the rates its datasheet lets one expect."""
    table = profiles.load_kernel_table(*H100)
    grid = table.gemm["bf16"]
    cell = tuple(near(getattr(grid, axis), 8192) for axis in ("m", "n", "k"))
    assert grid.time_s[cell] == pytest.approx(2 * 8192**3 / (0.7 * H100_BF16), rel=0.2)
    assert table.gemm["fp8"].time_s[cell] == pytest.approx(grid.time_s[cell] / 2, rel=0.2)
    # One token through 8192 x 8192 reads the weights: between 50 and 100 % of the bandwidth.
    token_s = grid.time_s[(near(grid.m, 1), *cell[1:])]
    assert 0.5 < 2 * 8192**2 / H100_BYTES / token_s < 1.0
    prefill = attention(table.context, 32, 8)
    flops = 4 * 8192**2 / 2 * 32 * 128
    rate = flops / prefill.time_s[near(prefill.batch, 1), near(prefill.length, 8192)]
    assert 0.5 * H100_BF16 < rate < 0.8 * H100_BF16
    decode_series = attention(table.generation, 32, 8)
    cell_s = decode_series.time_s[near(decode_series.batch, 64), near(decode_series.length, 8192)]
    assert 0.8 * H100_BYTES < 64 * 8192 * 8 * 128 * 2 * 2 / cell_s < H100_BYTES
    for series in (table.nccl["all_reduce", 8], table.all_reduce["graph", 8]):
        # Elements are of 2 bytes; NVLink carries 450 GB/s each way, more with in-switch reduction.
        bus = 2 * 7 / 8 * 2 * float(series.elements[-1]) / series.time_s[-1]
        assert 350e9 < bus < 500e9


def test_h100_expert_and_latent_kernels_agree_with_physics() -> None:
    """MoE, latent attention, linear attention and all-to-all run at rates one can expect."""
    table = profiles.load_kernel_table(*H100)
    moe = table.moe["bf16"]
    (row,) = (
        i
        for i, layout in enumerate(moe.layout.tolist())
        if layout == [4096, 14336, 2, 8, 1, 1, 1] and moe.skew[i] == 0
    )
    many_s = moe.time_s[row, near(moe.tokens, 16384)]
    assert 0.4 < 2 * 3 * 2 * 16384 * 4096 * 14336 / H100_BF16 / many_s < 0.8
    few_s = moe.time_s[row, near(moe.tokens, 128)]  # all eight experts are read
    assert 0.6 < 2 * 3 * 8 * 4096 * 14336 / H100_BYTES / few_s < 1.0
    module, sparse = (
        next(
            g
            for g in table.latent
            if g.phase == "context" and g.module and g.index_topk == topk
            if (g.hidden_size, g.weight_dtype, g.kv_dtype) == (7168, "bf16", "bf16")
        )
        for topk in (0, 2048)
    )
    assert sparse.prefix.tolist() == [0, 128]
    head = near(module.heads, 128)
    projections = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128**2 * 7168
    flops = 2 * 4096 * projections + 2 * (192 + 128) * 128 * 4096**2 / 2
    module_s = module.time_s[0, head, near(module.batch, 1), near(module.length, 4096)]
    assert 0.4 < flops / H100_BF16 / module_s < 0.8
    bmm = table.latent_bmm["pre", "bf16"]
    bmm_s = bmm.time_s[near(bmm.heads, 128), near(bmm.tokens, 8192)]
    assert 0.15 < 2 * 8192 * 128 * 128 * 512 / H100_BF16 / bmm_s < 0.8
    scan = next(
        s
        for s in table.recurrent
        if (s.kernel, s.phase, s.widths) == ("scan", "generation", (16, 128, 32, 128, 4))
    )
    # Decoding reads and writes the float32 state of every sequence.
    state_s = scan.time_s[near(scan.batch, 256), 0]
    assert 0.7 < 2 * 4 * 256 * 32 * 128 * 128 / H100_BYTES / state_s < 1.0
    dispatch = next(
        s
        for s in table.all_to_all
        if (s.backend, s.phase, s.hidden_size, s.num_experts)
        == ("deepep_ht", "dispatch", 7168, 256)
    )
    sent_bytes = 2 * 7168 * dispatch.top_k * 7 / 8 * float(dispatch.tokens[-1])
    assert 200e9 < sent_bytes / dispatch.time_s[-1] < 500e9  # NVLink: 450 GB/s each way


@each_table
def test_more_work_takes_longer(key: tuple[str, str, str]) -> None:
    """From the least work of a series to the most, the time grows in most series of a family.

    Not in all: single cells of the source are off, and more often in small ones.
    """
    growth: dict[str, list[float]] = {}
    for family, grid in timed(profiles.load_kernel_table(*key)):
        along = np.moveaxis(grid.time_s, 0, -1) if family == "gemm" else grid.time_s
        for row in along.reshape(-1, along.shape[-1]):
            known = row[~np.isnan(row)]
            if len(known) > 1:
                growth.setdefault(family, []).append(known[-1] / known[0])
    assert {family for family, ratios in growth.items() if np.median(ratios) <= 1} == set()


def test_nothing_is_read_before_a_table_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing what ships reads no file, and a table is read once per process."""
    folder = shutil.copytree(KERNELS / SMALL[0], tmp_path / "kernels" / SMALL[0])
    monkeypatch.setattr(profiles, "files", lambda _: tmp_path)
    opened: list[Path] = []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: opened.append(self) or read(self))
    assert {key[0] for key in profiles.available_kernel_tables()} == {SMALL[0]}
    assert opened == []
    profiles.load_kernel_table.cache_clear()
    try:
        first = profiles.load_kernel_table(*SMALL)
        assert profiles.load_kernel_table(*SMALL) is first
        assert opened == [folder / "vllm-0.14.0.npz"]
    finally:
        profiles.load_kernel_table.cache_clear()  # it was read from the copy


def test_decoding_follows_left_plus_above_minus_diagonal() -> None:
    """A hand-computed grid: steps 5, 7 over 4, missing decode from their differences."""
    # Row 0: 5 - 0 = 5, 7 - 5 = 2. Row 1: 4 - 5 = -1. Signs in the lowest bit: 10, 4, 1.
    low = np.array([10, 4, 1], np.uint8)
    missing = np.packbits([0, 0, 0, 1])
    (time_s,) = decode([(2, 2)], missing, low, np.zeros(3, np.uint8))
    np.testing.assert_array_equal(time_s, [[*STEP_TIME_S[[5, 7]]], [STEP_TIME_S[4], np.nan]])


def test_steps_are_a_thousandth_apart() -> None:
    """Neighbouring latencies differ by 0.1 %: half of that is the error of a stored one."""
    ratios = [high / low for low, high in pairwise(STEP_TIME_S[::5000].tolist())]
    np.testing.assert_allclose(ratios, np.exp(5), rtol=1e-12)
    assert STEP_TIME_S[1] / STEP_TIME_S[0] - 1 == pytest.approx(1e-3, rel=1e-3)
