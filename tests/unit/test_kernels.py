"""Attention, collectives and shared fits: monotone, true to the table, labelled, never absurd."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from planner.errors import InputError
from planner.io import profiles as shipped
from planner.io.devices import load_device
from simulator.attention import (
    context_attention_batch_s,
    context_attention_s,
    context_underfill_s,
    generation_attention_s,
)
from simulator.collectives import all_reduce_s, nccl_s
from simulator.interpolate import (
    Provenance,
    between_neighbours,
    fill_gaps,
    held,
    isotonic,
    isotonic_grid,
    known_part,
)
from simulator.table import AttentionSeries, MessageSeries
from tests.kernels import (
    DEVICE,
    TABLE,
    assert_monotone,
    assert_sane,
    synthetic,
)

LENGTHS = np.unique(np.geomspace(1, 200_000, 120).astype(int))  # contexts end at 131,072
BATCHES = np.unique(np.geomspace(1, 5000, 60).astype(int))  # batches end at 2,048
ELEMENTS = np.unique(np.geomspace(1, 2e9, 150).astype(int))  # messages end at 536,870,912
LAYOUTS = [(8, 1), (32, 8), (7, 1), (28, 4), (16, 16), (30, 5), (96, 8), (128, 1), (9, 3)]

generation_s = partial(generation_attention_s, TABLE, DEVICE)
context_s = partial(context_attention_s, TABLE, DEVICE)
context_batch_s = partial(context_attention_batch_s, TABLE, DEVICE)
underfill_s = partial(context_underfill_s, TABLE, DEVICE)


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


def test_between_neighbours_ignores_the_cell_itself() -> None:
    """Each cell is what the nearest known ones on both sides say; ends have one side only."""
    nan = np.nan
    values = np.array([[0.0, 99.0, nan, 6.0], [1.0, nan, nan, nan]])
    along = between_neighbours(values, 1, np.array([0.0, 1.0, 2.0, 4.0]))
    np.testing.assert_allclose(along, [[nan, 1.5, 68.0, nan], [nan, nan, nan, nan]])


def test_fill_gaps_trusts_what_does_well_nearby() -> None:
    """A gap takes the estimate that is right at its neighbours, not the mean; known cells stay."""
    values = np.array([1.0, 2.0, np.nan, 4.0, 5.0])
    right, wrong = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([3.0, 5.0, 9.0, 1.0, 2.0])
    filled = fill_gaps(values, [right, wrong, np.full(5, np.nan)])
    np.testing.assert_allclose(filled, [1, 2, 3, 4, 5], rtol=1e-3)
    assert np.isnan(fill_gaps(values, [np.full(5, np.nan)])[2])


def test_held_takes_the_cell_before_else_the_next() -> None:
    """Gaps beyond the known cells of a line are held from its nearest one."""
    nan = np.nan
    grid = np.array([[nan, 2.0, nan, 4.0, nan], [nan, nan, nan, nan, nan]])
    expected = [[2.0, 2.0, 2.0, 4.0, 4.0], [nan, nan, nan, nan, nan]]
    np.testing.assert_array_equal(held(grid, 1), expected)


def test_known_part_drops_empty_lines_and_doubles_single_ones() -> None:
    """Sizes never measured leave the axes; an axis of one size gets a second, alike."""
    nan = np.nan
    values = np.array([[1.0, nan, 3.0], [nan, nan, nan]])
    (rows, columns), kept = known_part((np.array([4, 8]), np.array([1, 2, 3])), values)
    assert rows.tolist() == [4, 8]
    assert columns.tolist() == [1, 3]
    np.testing.assert_array_equal(kept, [[1, 3], [1, 3]])


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


def test_generation_of_affine_cost_is_met() -> None:
    """Launch plus KV traffic is met inside the grid, and more KV heads act as more sequences."""
    batch, length = [1, 4, 16], [2, 64, 1024]
    time_s = 1e-5 + 1e-9 * np.outer(batch, length)
    table = synthetic(generation=(attention_series(time_s, batch, length),))
    call = partial(generation_attention_s, table, DEVICE, "bf16", 128)
    np.testing.assert_allclose(call(8, 2, batch, length)[0], time_s, rtol=1e-9)
    inside_s = 1e-5 + 1e-9 * np.outer([3, 9], [50, 700])
    np.testing.assert_allclose(call(8, 2, [3, 9], [50, 700])[0], inside_s, rtol=0.02)
    doubled_s, label = call(16, 4, [2], [64])
    np.testing.assert_allclose(doubled_s, 1e-5 + 1e-9 * 4 * 64)
    assert label[0, 0] == Provenance.EXTRAPOLATED
    beyond_s, label = call(8, 2, [32], [2048])
    np.testing.assert_allclose(beyond_s, 1e-5 + 1e-9 * 32 * 2048, rtol=0.01)
    assert label[0, 0] == Provenance.EXTRAPOLATED


def test_generation_gaps_are_filled_from_other_head_counts() -> None:
    """A step that one series misses is taken from its neighbours in head count."""
    batch, length = [1, 2, 4, 8, 16], [16, 64, 256, 1024, 4096]
    step = 1e-5 + 2e-5 * (np.outer(batch, length) > 3000) + 1e-9 * np.outer(batch, length)
    few, some, many = (
        replace(attention_series(step * (1 + heads / 100), batch, length), heads=heads)
        for heads in (4, 8, 16)
    )
    holed = step * 1.08
    holed[2, 3] = np.nan  # just behind the step, where neighbours in batch and length disagree
    family = (few, replace(some, time_s=holed), many)
    at = ("bf16", 128, 8, 2, [4], [1024])
    predicted_s, label = generation_attention_s(synthetic(generation=family), DEVICE, *at)
    assert predicted_s[0, 0] == pytest.approx(1.08 * step[2, 3], rel=0.03)
    assert label[0, 0] == Provenance.INTERPOLATED


def test_generation_labels() -> None:
    """Labels tell measured, interpolated and extrapolated times apart."""
    assert generation_s("bf16", 128, 8, 1, [8], [1024])[1][0, 0] == Provenance.MEASURED
    assert generation_s("bf16", 128, 8, 1, [8], [1000])[1][0, 0] == Provenance.INTERPOLATED
    assert generation_s("bf16", 128, 7, 1, [8], [1024])[1][0, 0] == Provenance.INTERPOLATED
    assert generation_s("bf16", 128, 15, 15, [8], [1024])[1][0, 0] == Provenance.EXTRAPOLATED
    assert generation_s("bf16", 96, 8, 1, [8], [1024])[1][0, 0] == Provenance.EXTRAPOLATED


def test_generation_of_another_width_or_dtype_moves_like_bytes() -> None:
    """Half the KV bytes per token are half the sequences of what was measured."""
    batch, length = [1, 2, 4, 8], [16, 256, 4096]
    time_s = 1e-5 + 1e-9 * np.outer(batch, length)
    table = synthetic(generation=(attention_series(time_s, batch, length),))
    for kv_dtype, head_dim in (("fp8", 128), ("bf16", 64)):
        args = (table, DEVICE, kv_dtype, head_dim, 8, 2, [4, 8], [4096])
        predicted_s, label = generation_attention_s(*args)
        np.testing.assert_allclose(predicted_s[:, 0], time_s[1:3, -1])
        assert (label == Provenance.EXTRAPOLATED).all()


def test_generation_without_data_is_roofline() -> None:
    """A table without attention gives KV traffic plus arithmetic, by hand."""
    args = (synthetic(), DEVICE, "fp8", 96, 8, 2, [4], [1000])
    time_s, label = generation_attention_s(*args)
    traffic_bytes = 2 * 4000 * 2 * 96 * 1 + 2 * 4 * 8 * 96 * 2
    by_hand_s = traffic_bytes / 3.35e12 + 4 * 4000 * 8 * 96 / DEVICE.bf16_flops
    np.testing.assert_allclose(time_s, [[by_hand_s]])
    assert label[0, 0] == Provenance.ROOFLINE


def test_windows_measured_and_not() -> None:
    """A measured window is used; another is full attention over at most that many tokens."""
    series = next(s for s in TABLE.generation if s.window_tokens == 128 and s.head_dim == 128)
    layout = (series.kv_dtype, 128, series.heads, series.kv_heads)
    measured_s, label = generation_s(*layout, [8], [4096], window_tokens=128)
    at = np.searchsorted(series.batch, 8), np.searchsorted(series.length, 4096)
    assert measured_s[0, 0] == pytest.approx(series.time_s[at], rel=0.05)
    assert label[0, 0] == Provenance.MEASURED
    cut_s, label = generation_s(*layout, [8], [100, 512, 4096], window_tokens=512)
    full_s, _ = generation_s(*layout, [8], [100, 512])
    np.testing.assert_allclose(cut_s[0], [*full_s[0], full_s[0, 1]])
    assert (label == Provenance.EXTRAPOLATED).all()


@pytest.mark.parametrize("window", [0, 128, 700])
def test_context_in_a_window_grows_linearly_beyond_it(window: int) -> None:
    """Beyond an unmeasured window each token costs the same; full attention keeps growing."""
    lengths = [2000, 4000, 6000, 8000]
    each_s, _, _ = context_s("bf16", 128, 8, 1, lengths, window_tokens=window)
    steps = np.diff(each_s)
    growth = steps[-1] / steps[0]
    if window == 700:
        assert growth == pytest.approx(1.0, rel=1e-6)
    elif window:
        assert growth == pytest.approx(1.0, rel=0.15)
    else:
        assert growth > 1.5
    batch_s, _ = context_batch_s("bf16", 128, 8, 1, [1, 4], lengths, window_tokens=window)
    assert_sane(batch_s)
    assert_monotone(batch_s, axis=0)
    assert_monotone(batch_s, axis=1)


@pytest.mark.parametrize("head_dim", [64, 128, 96])
@pytest.mark.parametrize(("heads", "kv_heads"), LAYOUTS)
def test_context_is_monotone_and_sane(head_dim: int, heads: int, kv_heads: int) -> None:
    """Prefill cost is 0 at no tokens, positive after, and grows; so a chunk never costs less."""
    per_sequence_s, launch_s, _ = context_s("bf16", head_dim, heads, kv_heads, LENGTHS)
    assert_sane(per_sequence_s)
    assert_monotone(per_sequence_s)
    assert launch_s >= 0
    assert context_s("bf16", head_dim, heads, kv_heads, [0])[0][0] == 0
    extra_s, _ = underfill_s("bf16", head_dim, heads, kv_heads, [0, *LENGTHS])
    assert extra_s[0] == 0
    assert (extra_s >= 0).all()
    assert_monotone(extra_s)


def test_context_of_constant_utilisation_is_met() -> None:
    """A launch plus work at 60 % is met at, between and beyond the measured lengths."""
    batch, length = np.array([1, 2, 4, 8, 16]), np.array([1, 32, 128, 512, 2048, 8192])
    args = (DEVICE, "bf16", 128, 8, 2)

    def cost_s(batch: np.ndarray, length: np.ndarray) -> np.ndarray:
        return 1e-5 + context_attention_batch_s(synthetic(), *args, batch, length)[0] / 0.6

    table = synthetic(context=(attention_series(cost_s(batch, length), batch, length),))
    between = np.array([1, 3, 7, 16]), np.array([1, 50, 300, 1000, 3000, 8192])
    batch_s, _ = context_attention_batch_s(table, *args, *between)
    np.testing.assert_allclose(batch_s, cost_s(*between), rtol=0.06)  # lengths lie 4 times apart
    lengths = np.array([0, 600, 8192, 30_000])
    each_s, launch_s, label = context_attention_s(table, *args, lengths)
    extra_s, _ = context_underfill_s(table, *args, 4 * lengths[1:])
    sum_s = launch_s + 4 * each_s[1:] + extra_s
    np.testing.assert_allclose(sum_s, cost_s(np.array([4]), lengths[1:])[0], rtol=0.03)
    assert label.tolist() == [
        Provenance.EXTRAPOLATED,
        Provenance.INTERPOLATED,
        Provenance.MEASURED,
        Provenance.EXTRAPOLATED,
    ]


def test_context_sum_meets_the_measured_batches() -> None:
    """Launch, parts of the sequences and underfill meet the batches of width 128: median 3.5 %."""
    errors, without_underfill = [], []
    for series in TABLE.context:
        if series.window_tokens == 0 and series.head_dim == 128:
            layout = (series.kv_dtype, 128, series.heads, series.kv_heads)
            per_sequence_s, launch_s, _ = context_s(*layout, series.length)
            tokens = series.batch[:, None] * series.length
            extra_s = underfill_s(*layout, tokens.ravel())[0].reshape(tokens.shape)
            sum_s = launch_s + series.batch[:, None] * per_sequence_s
            errors.append(np.abs((sum_s + extra_s) / series.time_s - 1))
            without_underfill.append(np.abs(sum_s / series.time_s - 1))
    assert np.nanmedian(errors) < 0.035
    assert np.nanmedian(without_underfill) > 0.05


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
    """One GPU costs nothing; an unknown backend and a broken domain are refused."""
    assert all_reduce_s(TABLE, DEVICE, "graph", 1, [4096])[0].tolist() == [0.0]
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
        load_device("H999")


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
