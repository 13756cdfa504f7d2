"""Recurrent layers: true to the table, monotone, labelled, smooth in every shape."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from planner.io import profiles as shipped
from planner.io.devices import load_device
from simulator.interpolate import Provenance
from simulator.model import GatedDeltaNet, Mamba2
from simulator.recurrent import (
    CONTEXT,
    CONVOLUTION,
    GATED_DELTA_NET,
    GENERATION,
    KERNELS,
    MAMBA2,
    SCAN,
    canonical,
    recurrent_context_s,
    recurrent_generation_s,
    recurrent_surface,
)
from simulator.table import KernelTable, RecurrentSeries

H100 = load_device("H100-SXM-80GB")
VERSIONS = {"vllm": "0.24.0", "sglang": "0.5.14", "trtllm": "1.3.0rc20"}
QWEN = GatedDeltaNet(16, 32, 128, 128, 4)  # Qwen3.5-35B-A3B and Qwen3-Next
NEMOTRON = Mamba2(64, 64, 128, 8, 4)  # Nemotron 3 Nano
BATCHES = np.unique(np.geomspace(1, 5000, 60).astype(int))  # tables end at 1,024
LENGTHS = np.arange(0, 60_000, 97)  # tables end at 32,768
WIDTHS = (16, 128, 32, 128, 4)


@cache
def table(engine: str) -> KernelTable:
    """The shipped table of H100."""
    return shipped.load_kernel_table("H100-SXM-80GB", engine, VERSIONS[engine])


def series(
    kernel: str, phase: str, time_s: list[list[float]], **changes: object
) -> RecurrentSeries:
    """Of Qwen's widths, at batches 1 and 4 and lengths 1 and 100 (1 in decode)."""
    length = [1, 100] if phase == CONTEXT else [1]
    one = RecurrentSeries(
        GATED_DELTA_NET,
        kernel,
        phase,
        WIDTHS,
        np.array([1, 4]),
        np.array(length),
        np.array(time_s),
    )
    return replace(one, **changes)


def only(*recurrent: RecurrentSeries) -> KernelTable:
    """A table of nothing else."""
    return KernelTable("d", "e", "v", {}, (), (), {}, {}, recurrent=recurrent)


SMALL = only(
    series(CONVOLUTION, GENERATION, [[1e-6], [2e-6]]),
    series(SCAN, GENERATION, [[4e-6], [13e-6]]),
    series(CONVOLUTION, CONTEXT, [[1e-6, 3e-6], [1e-6, 4e-6]]),
    series(SCAN, CONTEXT, [[10e-6, 30e-6], [10e-6, 40e-6]]),
)


def test_decode_adds_convolution_and_scan_and_grows_with_the_batch() -> None:
    """Decode adds convolution and scan and grows with the batch."""
    time_s, label = recurrent_generation_s(SMALL, H100, QWEN, 1, [1, 2, 4, 8])
    assert time_s == pytest.approx(1e-6 * np.array([5, 25 / 3, 15, 30]))
    assert label.tolist() == [
        Provenance.MEASURED,
        Provenance.INTERPOLATED,
        Provenance.MEASURED,
        Provenance.EXTRAPOLATED,
    ]


def test_a_prompt_costs_what_one_alone_took() -> None:
    """A prompt costs what one alone took."""
    time_s, launch_s, label = recurrent_context_s(SMALL, H100, QWEN, 1, [0, 1, 100, 200])
    assert launch_s == pytest.approx(11e-6)
    assert time_s == pytest.approx(1e-6 * np.array([0, 0, 22, 44]))
    assert label[2] == Provenance.MEASURED
    assert label[3] == Provenance.EXTRAPOLATED


@pytest.mark.parametrize("engine", VERSIONS)
@pytest.mark.parametrize("mixer", [QWEN, NEMOTRON])
@pytest.mark.parametrize("tp", [1, 2, 8, 32])
def test_times_are_sane_and_monotone(engine: str, mixer: GatedDeltaNet | Mamba2, tp: int) -> None:
    """Times are sane and monotone."""
    decode_s, _ = recurrent_generation_s(table(engine), H100, mixer, tp, BATCHES)
    prompt_s, launch_s, _ = recurrent_context_s(table(engine), H100, mixer, tp, LENGTHS)
    for time_s in (decode_s, prompt_s):
        assert np.isfinite(time_s).all()
        assert (np.diff(time_s) >= -1e-12 * time_s[-1]).all()
    assert (decode_s > 0).all()
    assert launch_s > 0
    assert prompt_s[0] == 0


def test_measured_layouts_are_read_from_the_table() -> None:
    """Measured layouts are read from the table."""
    measured = table("vllm")
    for one in measured.recurrent:
        surface = recurrent_surface(measured, H100, one.kind, one.kernel, one.phase, one.widths)
        known = ~np.isnan(one.time_s)
        assert surface.at(one.batch, one.length)[known] == pytest.approx(one.time_s[known])


def test_more_ranks_hold_fewer_heads() -> None:
    """More ranks hold fewer heads."""
    one, two = (recurrent_generation_s(table("vllm"), H100, QWEN, tp, [256])[0][0] for tp in (1, 2))
    assert 1.8 < one / two < 2.1  # streaming 256 states of 2 MiB, or of half that


def test_a_layout_between_measured_ones_is_interpolated() -> None:
    """A layout between measured ones is interpolated."""
    odd = replace(QWEN, num_value_heads=40)
    time_s, label = recurrent_generation_s(table("vllm"), H100, odd, 1, [256])
    low, high = (
        recurrent_generation_s(table("vllm"), H100, replace(QWEN, num_value_heads=n), 1, [256])[0]
        for n in (32, 48)
    )
    assert low < time_s < high
    assert label == Provenance.INTERPOLATED


def test_a_hole_is_filled_from_its_neighbours() -> None:
    """A hole is filled from its neighbours."""
    measured = table("vllm")
    at = next(
        i
        for i, one in enumerate(measured.recurrent)
        if (one.kernel, one.phase, one.widths) == (SCAN, CONTEXT, WIDTHS)
    )
    one = measured.recurrent[at]
    time_s = one.time_s.copy()
    time_s[3, 9] = np.nan
    holed = list(measured.recurrent)
    holed[at] = replace(one, time_s=time_s)
    surface = recurrent_surface(
        replace(measured, recurrent=tuple(holed)), H100, one.kind, SCAN, CONTEXT, WIDTHS
    )
    filled_s = surface.at(one.batch, one.length)[3, 9]
    assert filled_s != one.time_s[3, 9]
    assert filled_s == pytest.approx(one.time_s[3, 9], rel=0.1)


def test_a_state_space_scan_is_lent_by_linear_attention() -> None:
    """A state space scan is lent by linear attention."""
    widths = canonical(MAMBA2, (64, 64, 128, 8, 4))
    assert widths == (8, 128, 64, 64, 4)
    same = GatedDeltaNet(8, 64, 128, 64, 4)
    lent_s, label = recurrent_generation_s(table("vllm"), H100, NEMOTRON, 1, BATCHES)
    own_s, _ = recurrent_generation_s(table("vllm"), H100, same, 1, BATCHES)
    assert lent_s == pytest.approx(own_s)
    assert (label == Provenance.EXTRAPOLATED).all()


def test_its_own_convolution_serves_where_it_was_measured() -> None:
    """Its own convolution serves where it was measured."""
    one = next(
        one
        for one in table("trtllm").recurrent
        if (one.kind, one.phase) == (MAMBA2, GENERATION) and one.widths[0] == 64
    )
    widths = canonical(MAMBA2, one.widths)
    surface = recurrent_surface(table("trtllm"), H100, MAMBA2, CONVOLUTION, GENERATION, widths)
    assert surface.at(one.batch, one.length) == pytest.approx(one.time_s)
    assert (surface.label == Provenance.MEASURED).all()


def test_nothing_measured_leaves_the_roofline() -> None:
    """Nothing measured leaves the roofline."""
    time_s, label = recurrent_generation_s(only(), H100, QWEN, 1, [1, 1000])
    state_bytes = 32 * 128 * 128 * 4  # float32
    streamed_s = 2 * 1000 * state_bytes / H100.memory_bandwidth_bytes_per_s
    assert streamed_s < time_s[1] < 1.2 * streamed_s
    assert (label == Provenance.ROOFLINE).all()
    prompt_s, _, label = recurrent_context_s(only(), H100, QWEN, 1, LENGTHS)
    assert (np.diff(prompt_s) >= 0).all()
    assert (label == Provenance.ROOFLINE).all()


@pytest.mark.parametrize("engine", VERSIONS)
@pytest.mark.parametrize("field", ["key_head_dim", "value_head_dim"])
def test_a_width_moved_by_a_hundredth_moves_no_time_much(engine: str, field: str) -> None:
    """A width moved by a hundredth moves no time much."""
    batches, lengths = [1, 16, 256, 900], [100, 1000, 8192]
    decode_s = recurrent_generation_s(table(engine), H100, QWEN, 1, batches)[0]
    prompt_s = recurrent_context_s(table(engine), H100, QWEN, 1, lengths)[0]
    for width in (127, 129):
        moved = replace(QWEN, **{field: width})
        after_s = recurrent_generation_s(table(engine), H100, moved, 1, batches)[0]
        assert np.abs(after_s / decode_s - 1).max() < 0.03
        after_s = recurrent_context_s(table(engine), H100, moved, 1, lengths)[0]
        assert np.abs(after_s / prompt_s - 1).max() < 0.03


def test_a_series_without_any_time_is_passed_over() -> None:
    """A series without any time is passed over."""
    empty = tuple(replace(one, time_s=one.time_s * np.nan) for one in SMALL.recurrent)
    _, label = recurrent_generation_s(replace(SMALL, recurrent=empty), H100, QWEN, 1, [1])
    assert label == Provenance.ROOFLINE
    assert {one.kernel for one in empty} == set(KERNELS)


def test_sizes_out_of_range_are_refused() -> None:
    """Sizes out of range are refused."""
    with pytest.raises(ValueError, match="batch"):
        recurrent_generation_s(SMALL, H100, QWEN, 1, [0])
    with pytest.raises(ValueError, match="tp"):
        recurrent_generation_s(SMALL, H100, QWEN, 0, [1])
    with pytest.raises(ValueError, match="length"):
        recurrent_context_s(SMALL, H100, QWEN, 1, [-1])
