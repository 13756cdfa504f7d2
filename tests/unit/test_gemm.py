"""Times of dense products: monotone, true to the table, smooth in shape, labelled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from simulator.gemm import gemm_s
from simulator.interpolate import Provenance
from simulator.table import GemmGrid, KernelTable
from tests.kernels import (
    DEVICE,
    MAX_MOVE,
    SHAPE_STEP,
    TABLE,
    TOKENS,
    assert_monotone,
    assert_sane,
    synthetic,
)


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


def gemm_of_constant_utilisation(dtype: str, widths: list[int], inners: list[int]) -> KernelTable:
    """A grid whose times are half of launch plus work; the launch is the smallest product's."""
    m, empty = np.array([1, 64, 4096]), synthetic()
    shapes = [[gemm_s(empty, DEVICE, dtype, m, n, k)[0] for k in inners] for n in widths]
    work_s = np.moveaxis(np.array(shapes), 2, 0)
    time_s = (work_s.min() + work_s) / 2
    return synthetic(gemm={dtype: GemmGrid(m, np.array(widths), np.array(inners), time_s)})


def test_gemm_of_constant_utilisation_is_exact_everywhere() -> None:
    """Where every measured shape runs at one share of launch plus work, so do all others."""
    table = gemm_of_constant_utilisation("bf16", [256, 1024], [512, 4096])
    launch_s = table.gemm["bf16"].time_s.min()
    for n, k in [(256, 512), (600, 1000), (99, 9000)]:
        tokens = [1, 64, 4096, 50_000]
        work_s, _ = gemm_s(synthetic(), DEVICE, "bf16", tokens, n, k)
        predicted_s, _ = gemm_s(table, DEVICE, "bf16", tokens, n, k)
        np.testing.assert_allclose(predicted_s, (launch_s + work_s) / 2, rtol=1e-9)


def test_gemm_gaps_are_filled_from_all_sides() -> None:
    """Half of a grid of constant utilisation restores the other half, and single points work."""
    table = gemm_of_constant_utilisation("bf16", [128, 256, 512, 1024], [128, 512, 2048, 8192])
    grid = table.gemm["bf16"]
    shown = np.random.default_rng(5).random(grid.time_s.shape) < 0.5
    shown.flat[np.nanargmin(grid.time_s)] = True
    holed = replace(grid, time_s=np.where(shown, grid.time_s, np.nan))
    predicted_s, _ = gemm_s(synthetic(gemm={"bf16": holed}), DEVICE, "bf16", grid.m, 256, 2048)
    np.testing.assert_allclose(predicted_s, grid.time_s[:, 1, 2], rtol=1e-9)
    shown[:] = False
    shown[1, 2, 1] = True
    lone = replace(grid, time_s=np.where(shown, grid.time_s, np.nan))
    predicted_s, label = gemm_s(synthetic(gemm={"bf16": lone}), DEVICE, "bf16", [64, 500], 512, 512)
    assert predicted_s[0] == pytest.approx(grid.time_s[1, 2, 1])
    assert label.tolist() == [Provenance.MEASURED, Provenance.EXTRAPOLATED]


def test_gemm_counts_tokens_in_tiles() -> None:
    """Within one tile of 64 rows time is flat; the step to the next tile comes after its edge."""
    m, time_s = np.array([64, 256]), np.array([10e-6, 40e-6]).reshape(2, 1, 1)
    table = synthetic(gemm={"bf16": GemmGrid(m, np.array([512]), np.array([512]), time_s)})
    predicted_s, _ = gemm_s(table, DEVICE, "bf16", [64, 65, 128, 129, 192, 256], 512, 512)
    np.testing.assert_allclose(predicted_s * 1e6, [10, 20, 20, 30, 30, 40], rtol=1e-3)


def test_gemm_borrows_the_precision_of_like_arithmetic() -> None:
    """4-bit weights multiplied as bf16 run at bf16's utilisation with a quarter of its weights."""
    table = gemm_of_constant_utilisation("bf16", [256, 8192], [512, 8192])
    launch_s = table.gemm["bf16"].time_s.min()
    time_s, label = gemm_s(table, DEVICE, "int4", [1, 4096], 8192, 8192)
    work_s, _ = gemm_s(synthetic(), DEVICE, "int4", [1, 4096], 8192, 8192)
    np.testing.assert_allclose(time_s, (launch_s + work_s) / 2, rtol=1e-9)
    assert (label == Provenance.EXTRAPOLATED).all()
    assert time_s[0] < 0.35 * gemm_s(table, DEVICE, "bf16", [1], 8192, 8192)[0][0]
    block_s, label = gemm_s(
        replace(TABLE, gemm={"fp8": TABLE.gemm["fp8"]}), DEVICE, "fp8_block", 64, 4096, 4096
    )
    np.testing.assert_allclose(block_s, gemm_s(TABLE, DEVICE, "fp8", 64, 4096, 4096)[0], rtol=1e-3)
    assert label[0] == Provenance.EXTRAPOLATED


def test_gemm_reference_without_a_peak_of_its_own() -> None:
    """A measured int8 grid serves a device that has no fp8 peak (Ampere)."""
    time_s = np.full((2, 2, 2), 20e-6)
    grid = GemmGrid(np.array([1, 64]), np.array([512, 1024]), np.array([512, 1024]), time_s)
    ampere = replace(DEVICE, fp8_flops=0.0)
    predicted_s, label = gemm_s(synthetic(gemm={"int8": grid}), ampere, "int8", [1, 64], 512, 512)
    np.testing.assert_allclose(predicted_s, 20e-6)
    assert (label == Provenance.MEASURED).all()


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "fp8_block"])
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
    """A precision of which nothing is measured gives arithmetic plus traffic, by hand."""
    time_s, label = gemm_s(synthetic(), DEVICE, "fp8", [1, 8192], 4096, 4096)
    tokens = np.array([1, 8192])
    traffic_s = (tokens * 4096 + 4096 * 4096 + 2 * tokens * 4096) / 3.35e12
    arithmetic_s = 2 * tokens * 4096 * 4096 / DEVICE.fp8_flops
    np.testing.assert_allclose(time_s, traffic_s + arithmetic_s)
    assert (label == Provenance.ROOFLINE).all()


def test_gemm_refuses_empty_work() -> None:
    """A product over no tokens has no time."""
    with pytest.raises(ValueError, match="at least 1"):
        gemm_s(TABLE, DEVICE, "bf16", [0], 8, 8)
