"""Mixture-of-experts times: routing and roofline by hand, a world with known rates, real tables."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from planner.io.devices import load_device
from planner.io.profiles import load_kernel_table
from simulator.interpolate import Provenance
from simulator.moe import STAND_INS, moe_s
from simulator.moe_routing import most_loaded_rank
from simulator.precision import PRECISIONS
from simulator.scattered import fit_rates
from simulator.table import KernelTable, MoeGrid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulator.interpolate import FloatArray
    from simulator.table import MoeGrid as Grid

H100 = load_device("H100-SXM-80GB")
BANDWIDTH = H100.memory_bandwidth_bytes_per_s
TOKENS = np.array([1, 4, 16, 64, 256, 1024, 4096, 16384], dtype=np.int32)
LAUNCH_S, WEIGHT_RATE, FLOP_RATE = 30e-6, 1.1, 1.5
"""The world's rates: seconds per launch, and per second at the datasheet's bandwidth and peak."""

LAYOUTS = [
    (hidden, width, top_k, experts, tp, ep, 1)
    for hidden, width, top_k, experts in (
        (2048, 768, 8, 128),
        (4096, 1536, 8, 128),
        (4096, 14336, 2, 8),
        (7168, 2048, 8, 256),
        (6144, 2560, 8, 160),
    )
    for tp, ep in ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (1, 8))
]


def world_s(layout: tuple[int, ...], tokens: FloatArray, dtype: str = "bf16") -> FloatArray:
    """Launch, weights of active experts, and arithmetic; balanced routing."""
    hidden, width, top_k, experts, tp, ep, gated = layout
    copies = np.maximum(tokens * top_k / ep, 1.0)
    active = np.minimum(copies, experts / ep)
    weights = (2 + gated) * hidden * width / tp
    return (
        LAUNCH_S
        + WEIGHT_RATE * active * weights * PRECISIONS[dtype].weight_bytes / BANDWIDTH
        + FLOP_RATE * 2 * copies * weights / H100.flops(dtype)
    )


def grid_of(layouts: Sequence[tuple[int, ...]], skew: float = 0.0) -> Grid:
    """A grid of the world's times."""
    tokens = TOKENS.astype(np.float64)
    return MoeGrid(
        layout=np.array(layouts, dtype=np.int32),
        skew=np.full(len(layouts), skew),
        tokens=TOKENS,
        time_s=np.array([world_s(layout, tokens) for layout in layouts]),
    )


def table_of(**grids: Grid) -> KernelTable:
    """A table with nothing but experts."""
    return KernelTable("H100-SXM-80GB", "test", "0", {}, (), (), {}, {}, moe=grids)


def ask(
    table: KernelTable,
    layout: tuple[int, ...],
    tokens: list[int],
    *,
    dtype: str = "bf16",
    skew: float = 0.0,
) -> tuple[FloatArray, list[int]]:
    """Times and labels of one layout."""
    hidden, width, top_k, experts, tp, ep, gated = layout
    time_s, label = moe_s(
        table, H100, dtype, hidden, width, top_k, experts, tp, ep, bool(gated), skew, tokens
    )
    return time_s, label.tolist()


def routed(
    tokens: float, top_k: float, experts: float, ep: float, skew: float
) -> tuple[float, float]:
    """Active experts and copies on the most loaded rank."""
    active, copies = most_loaded_rank(
        np.array(top_k), np.array(experts), np.array(ep), skew, np.array(tokens)
    )
    return float(active), float(copies)


@pytest.mark.parametrize(
    ("tokens", "ep", "active", "copies"),
    [
        (1, 1, 8, 8),  # one token visits 8 experts
        (16, 1, 128, 128),  # 16 x 8 copies go round 128 experts once
        (4096, 1, 128, 32768),
        (16, 8, 16, 16),  # an eighth of both
        (4096, 8, 16, 4096),
        (1, 128, 1, 1),  # the first token's first expert is on the measured rank
    ],
)
def test_balanced_routing_by_hand(tokens: int, ep: int, active: float, copies: float) -> None:
    """Copies go round the experts and are shared equally by the ranks."""
    assert routed(tokens, 8, 128, ep, 0.0) == (active, copies)


def test_power_law_leaves_experts_idle_and_loads_one_rank() -> None:
    """Skew: fewer experts hit than copies allow, more than the mean on one rank."""
    active, copies = routed(256, 8, 128, 1, 1.2)
    assert copies == pytest.approx(2048)
    assert 64 < active < 128
    assert routed(8, 8, 128, 1, 1.2)[0] < routed(8, 8, 128, 1, 0.0)[0] == 64
    assert 256 < routed(256, 8, 128, 8, 1.2)[1] < 2048
    # One expert per rank cannot be sent more copies than there are tokens.
    assert routed(256, 8, 128, 128, 3.0)[1] <= 256


def test_power_law_does_not_jump_where_its_range_changes() -> None:
    """One copy per expert is no cliff."""
    before, after = routed(15.99, 8, 128, 1, 1.2), routed(16.01, 8, 128, 1, 1.2)
    np.testing.assert_allclose(before, after, rtol=5e-3)


def test_rates_are_recovered_and_never_negative() -> None:
    """The fit finds the true terms, also through holes."""
    random = np.random.default_rng(0)
    terms = random.uniform(0.5, 2, (4, 30, 5))
    time_s = 2 * terms[0] + 0.5 * terms[2]
    np.testing.assert_allclose(fit_rates(terms, time_s), [2, 0, 0.5, 0], atol=1e-9)
    holed = np.where(random.random(time_s.shape) < 0.3, np.nan, time_s)
    np.testing.assert_allclose(fit_rates(terms, holed), [2, 0, 0.5, 0], atol=1e-9)
    assert (fit_rates(terms, terms[1] * random.uniform(0.2, 5, (30, 5))) >= 0).all()
    # A term that is always zero (nothing measured across nodes) gets no rate.
    assert fit_rates(np.stack([terms[0], 0 * terms[1]]), terms[0]).tolist() == pytest.approx([1, 0])


def test_measured_times_come_back_exactly() -> None:
    """A measured layout at measured tokens is its own prediction."""
    layout = LAYOUTS[9]
    time_s, label = ask(table_of(bf16=grid_of(LAYOUTS)), layout, TOKENS.tolist())
    np.testing.assert_allclose(time_s, world_s(layout, TOKENS.astype(float)), rtol=1e-12)
    assert label == [Provenance.MEASURED] * len(TOKENS)


@pytest.mark.parametrize(
    ("layout", "label"),
    [
        ((2304, 800, 8, 128, 1, 1, 1), Provenance.INTERPOLATED),
        ((4096, 1536, 8, 128, 1, 8, 1), Provenance.MEASURED),
        ((512, 100000, 64, 2048, 1, 1, 1), Provenance.EXTRAPOLATED),
    ],
)
def test_a_world_with_known_rates_is_predicted(layout: tuple[int, ...], label: Provenance) -> None:
    """Unseen layouts of a world without noise, and their labels."""
    tokens = [1, 3, 10, 100, 300, 5000, 16384, 100_000]
    time_s, labels = ask(table_of(bf16=grid_of(LAYOUTS)), layout, tokens)
    np.testing.assert_allclose(time_s, world_s(layout, np.array(tokens, float)), rtol=0.03)
    expected = [label, Provenance.INTERPOLATED, *[Provenance.INTERPOLATED] * 4, label]
    assert labels[:7] == [max(label, one) for one in expected]
    assert labels[7] == Provenance.EXTRAPOLATED


def test_a_measured_excess_carries_over_to_near_layouts_only() -> None:
    """One model thrice as slow slows its likes, not others."""
    slow = grid_of(LAYOUTS)
    mixtral = slow.layout[:, 1] == 14336
    slow = replace(slow, time_s=np.where(mixtral[:, None], 3 * slow.time_s, slow.time_s))
    table = table_of(bf16=slow)
    near, _ = ask(table, (4096, 13000, 2, 8, 2, 1, 1), [64, 4096])
    far, _ = ask(table, (2048, 800, 8, 128, 2, 1, 1), [64, 4096])
    plain = table_of(bf16=grid_of(LAYOUTS))
    np.testing.assert_allclose(
        near, 3 * ask(plain, (4096, 13000, 2, 8, 2, 1, 1), [64, 4096])[0], rtol=0.1
    )
    np.testing.assert_allclose(
        far, ask(plain, (2048, 800, 8, 128, 2, 1, 1), [64, 4096])[0], rtol=0.1
    )


def test_one_shape_measured_with_a_poor_kernel_does_not_spoil_its_neighbours() -> None:
    """An outlier among near layouts is outvoted."""
    grid = grid_of(LAYOUTS)
    poor = np.flatnonzero((grid.layout == (4096, 1536, 8, 128, 2, 1, 1)).all(axis=1))
    time_s = grid.time_s.copy()
    time_s[poor] *= 4
    unseen = (4096, 1400, 8, 128, 1, 1, 1)
    time_s, _ = ask(table_of(bf16=replace(grid, time_s=time_s)), unseen, [1, 64, 4096])
    np.testing.assert_allclose(time_s, world_s(unseen, np.array([1.0, 64, 4096])), rtol=0.05)


def test_noise_never_makes_more_tokens_faster() -> None:
    """Times never fall with tokens, whatever was measured."""
    random = np.random.default_rng(3)
    grid = grid_of(LAYOUTS)
    noisy = replace(grid, time_s=grid.time_s * random.lognormal(0, 0.3, grid.time_s.shape))
    for layout in (LAYOUTS[0], (3000, 900, 4, 64, 2, 1, 0)):
        time_s, _ = ask(table_of(bf16=noisy), layout, list(range(1, 40_000, 37)))
        assert (np.diff(time_s) >= 0).all()


def test_holes_and_empty_rows_are_bridged() -> None:
    """Half the points and one whole row missing."""
    random = np.random.default_rng(4)
    grid = grid_of(LAYOUTS)
    time_s = np.where(random.random(grid.time_s.shape) < 0.5, np.nan, grid.time_s)
    time_s[3] = np.nan
    table = table_of(bf16=replace(grid, time_s=time_s))
    for layout in (*LAYOUTS[:8], (2500, 900, 8, 100, 1, 1, 1)):
        tokens = [1, 2, 16, 100, 1000, 16384, 50_000]
        predicted, _ = ask(table, layout, tokens)
        np.testing.assert_allclose(predicted, world_s(layout, np.array(tokens, float)), rtol=0.05)


def test_skews_are_joined_and_held() -> None:
    """Between measured exponents geometrically, outside held."""
    grid = grid_of(LAYOUTS)
    both = MoeGrid(
        layout=np.concatenate([grid.layout, grid.layout]),
        skew=np.repeat([0.0, 1.0], len(LAYOUTS)),
        tokens=TOKENS,
        time_s=np.concatenate([grid.time_s, 4 * grid.time_s]),
    )
    table, layout = table_of(bf16=both), LAYOUTS[2]
    balanced = world_s(layout, np.array([64.0]))
    for skew, factor, label in (
        (0.0, 1.0, Provenance.MEASURED),
        (0.5, 2.0, Provenance.INTERPOLATED),
        (1.0, 4.0, Provenance.MEASURED),
        (1.5, 4.0, Provenance.EXTRAPOLATED),
    ):
        time_s, labels = ask(table, layout, [64], skew=skew)
        np.testing.assert_allclose(time_s, factor * balanced, rtol=1e-9)
        assert labels == [label]


@pytest.mark.parametrize("dtype", ["fp8", "int4"])
def test_a_missing_precision_moves_its_own_bytes_at_a_sibling_s_rates(dtype: str) -> None:
    """bf16 rates on the bytes and FLOPs of another precision."""
    layout, tokens = LAYOUTS[1], [1, 16, 4096]
    time_s, labels = ask(table_of(bf16=grid_of(LAYOUTS)), layout, tokens, dtype=dtype)
    np.testing.assert_allclose(time_s, world_s(layout, np.array(tokens, float), dtype), rtol=0.03)
    assert labels == [Provenance.EXTRAPOLATED] * 3


def test_a_precision_with_one_measured_shape_leans_on_its_sibling_far_away() -> None:
    """One shape says little about others."""
    kimi = [layout for layout in LAYOUTS if layout[0] == 7168]
    slow = grid_of(kimi)
    slow = replace(slow, time_s=5 * slow.time_s)
    unseen = (1024, 512, 2, 16, 1, 1, 1)
    alone, _ = ask(table_of(fp8=slow), unseen, [64], dtype="fp8")
    helped, labels = ask(table_of(fp8=slow, bf16=grid_of(LAYOUTS)), unseen, [64], dtype="fp8")
    assert helped[0] < 0.5 * alone[0]
    assert labels == [Provenance.EXTRAPOLATED]


def test_roofline_without_any_grid() -> None:
    """Bytes and FLOPs by hand."""
    # 16 tokens, 8 of 128 experts: every expert is read once, 3 matrices of 2048 x 768 bf16 each;
    # 128 copies read 2048 + 768 and write 2048 + 2 x 768 elements.
    weights_bytes = 128 * 3 * 2048 * 768 * 2
    copies_bytes = 128 * (2048 + 768 + 2048 + 2 * 768) * 2
    time_s, labels = ask(table_of(), (2048, 768, 8, 128, 1, 1, 1), [16])
    assert time_s[0] == pytest.approx((weights_bytes + copies_bytes) / BANDWIDTH)
    assert labels == [Provenance.ROOFLINE]
    # Many tokens: 2 FLOPs per weight and copy.
    time_s, _ = ask(table_of(), (2048, 768, 8, 128, 1, 1, 1), [100_000])
    assert time_s[0] == pytest.approx(2 * 800_000 * 3 * 2048 * 768 / H100.bf16_flops)


def test_bad_sizes_are_refused() -> None:
    """Tokens, widths and skew out of range."""
    table = table_of(bf16=grid_of(LAYOUTS))
    with pytest.raises(ValueError, match="tokens"):
        ask(table, LAYOUTS[0], [0])
    with pytest.raises(ValueError, match="sizes of the layer"):
        ask(table, (2048, 0, 8, 128, 1, 1, 1), [1])
    with pytest.raises(ValueError, match="skew"):
        ask(table, LAYOUTS[0], [1], skew=-0.1)


def test_every_precision_has_stand_ins() -> None:
    """A new precision cannot be forgotten."""
    assert set(STAND_INS) == set(PRECISIONS)
    assert all(set(names) <= set(PRECISIONS) for names in STAND_INS.values())


def test_one_percent_of_any_width_moves_the_time_by_at_most_three() -> None:
    """No cliff between, at or beside measured layouts of a real table."""
    table = load_kernel_table("H100-SXM-80GB", "vllm", "0.24.0")
    random = np.random.default_rng(5)
    tokens = [1, 30, 700, 9000, 50_000]
    moves = []
    for dtype in sorted(table.moe):
        measured = table.moe[dtype].layout
        for _ in range(12):
            start = measured[random.integers(len(measured))].astype(float)
            start[:2] *= random.choice([1.0, 1.005, 1.13, 1.4])
            before, _ = ask(table, tuple(start), tokens, dtype=dtype)
            for column in range(4):
                moved = start.copy()
                moved[column] *= 1.01
                after, _ = ask(table, tuple(moved), tokens, dtype=dtype)
                moves.append(float(np.abs(np.log(after / before)).max()))
    # Where two near layouts run different kernels, the way from one to the other is steeper.
    assert np.quantile(moves, 0.98) < 0.03
    assert max(moves) < 0.06
