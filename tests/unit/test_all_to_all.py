"""Expert all-to-all: exchanges with known rates, the network, and what stands in for a table."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from planner.io.devices import load_device
from planner.io.profiles import load_kernel_table
from simulator.all_to_all import all_to_all_s
from simulator.collectives import nccl_s
from simulator.fabric import Fabric, Level
from simulator.interpolate import Provenance
from simulator.table import AllToAllSeries, KernelTable, MessageSeries

if TYPE_CHECKING:
    from simulator.interpolate import FloatArray

H100 = load_device("H100-SXM-80GB")
LINK = H100.link_bytes_per_s
TOKENS = np.array([1, 8, 64, 512, 4096, 32768], dtype=np.int32)
LAUNCH_S, COPY_RATE = 40e-6, 1.5
NETWORK_BYTES_PER_S, NETWORK_LATENCY_S = 50e9, 5e-6
CLUSTER = Fabric(
    node=8,
    levels=(
        Level("domain", 8, LINK, 1e-6, network=False),
        Level("cluster", 256, NETWORK_BYTES_PER_S, NETWORK_LATENCY_S, network=True),
    ),
)
SENT_BYTES = {"dispatch": 1, "combine": 2}
"""DeepEP's default: fp8 out, bf16 back."""


def copies(ranks: int, top_k: int) -> float:
    """Other ranks that a token's experts lie on."""
    return (ranks - 1) * (1 - (1 - 1 / ranks) ** top_k)


def world_s(phase: str, ranks: int, hidden: int, top_k: int, tokens: FloatArray) -> FloatArray:
    """Launch, and one copy per rank over the link."""
    sent_bytes = tokens * hidden * SENT_BYTES[phase] * copies(ranks, top_k)
    return LAUNCH_S + COPY_RATE * sent_bytes / LINK


def series(
    phase: str, ranks: int, hidden: int, top_k: int, experts: int = 256, backend: str = "deepep_ht"
) -> AllToAllSeries:
    """Times of one exchange of the world."""
    return AllToAllSeries(
        backend=backend,
        phase=phase,
        dtype="default",
        ranks=ranks,
        nodes=1,
        hidden_size=hidden,
        top_k=top_k,
        num_experts=experts,
        tokens=TOKENS,
        time_s=world_s(phase, ranks, hidden, top_k, TOKENS.astype(float)),
    )


def table_of(
    family: tuple[AllToAllSeries, ...], nccl: dict[tuple[str, int], MessageSeries] | None = None
) -> KernelTable:
    """A table with nothing but these."""
    return KernelTable("H100-SXM-80GB", "test", "0", {}, (), (), {}, nccl or {}, all_to_all=family)


WORLD = table_of(
    tuple(
        series(phase, ranks, hidden, top_k)
        for phase in ("dispatch", "combine")
        for ranks in (2, 4, 8)
        for hidden in (4096, 7168)
        for top_k in (1, 4, 8)
    )
)


def ask(
    table: KernelTable,
    phase: str = "dispatch",
    ranks: int = 8,
    hidden: int = 7168,
    top_k: int = 8,
    tokens: list[int] | None = None,
    *,
    backend: str = "deepep_ht",
    dtype: str = "default",
    fabric: Fabric | None = None,
) -> tuple[FloatArray, list[int]]:
    """Times and labels of one exchange among 256 experts."""
    at = [1, 100, 10_000, 100_000] if tokens is None else tokens
    time_s, label = all_to_all_s(
        table, H100, backend, phase, dtype, ranks, hidden, top_k, 256, at, fabric
    )
    return time_s, label.tolist()


def test_measured_exchanges_come_back_exactly() -> None:
    """A measured shape at measured tokens; held bandwidth beyond."""
    time_s, label = ask(WORLD, tokens=TOKENS.tolist())
    np.testing.assert_allclose(
        time_s, world_s("dispatch", 8, 7168, 8, TOKENS.astype(float)), rtol=1e-9
    )
    assert label == [Provenance.MEASURED] * len(TOKENS)
    beyond, label = ask(WORLD, tokens=[131072])
    assert beyond[0] == pytest.approx(world_s("dispatch", 8, 7168, 8, np.array(131072.0)), rel=0.01)
    assert label == [Provenance.EXTRAPOLATED]


@pytest.mark.parametrize(
    ("ranks", "hidden", "top_k", "label"),
    [
        (8, 5120, 6, Provenance.INTERPOLATED),
        (6, 7168, 8, Provenance.EXTRAPOLATED),
        (16, 7168, 8, Provenance.EXTRAPOLATED),
        (64, 3000, 2, Provenance.EXTRAPOLATED),
    ],
)
def test_a_world_with_known_rates_is_predicted(
    ranks: int, hidden: int, top_k: int, label: Provenance
) -> None:
    """Shapes and ranks that were not measured."""
    for phase in ("dispatch", "combine"):
        tokens = np.array([1.0, 100, 10_000])
        time_s, labels = ask(WORLD, phase, ranks, hidden, top_k, [1, 100, 10_000])
        np.testing.assert_allclose(time_s, world_s(phase, ranks, hidden, top_k, tokens), rtol=0.03)
        assert labels == [label] * 3


def test_one_rank_sends_nothing() -> None:
    """All experts are at home."""
    time_s, label = ask(WORLD, ranks=1, tokens=[1, 1000])
    assert time_s.tolist() == [0, 0]
    assert label == [Provenance.MEASURED] * 2


@pytest.mark.parametrize(
    ("backend", "crossing"),
    [
        # To one other machine of two, chosen by 8 experts: 2 x (1 - 1/2^8) places, half elsewhere.
        ("deepep_ht", 2 * (1 - 0.5**8) / 2),
        # 8 copies, half of them to the other machine.
        ("deepep_ll", 4.0),
    ],
)
def test_a_backend_measured_on_one_machine_is_carried_across_the_network(
    backend: str, crossing: float
) -> None:
    """The network's own time by hand, on top of the exchange within a domain."""
    table = table_of(tuple(replace(one, backend=backend) for one in WORLD.all_to_all))
    tokens = [1, 4096]
    inside, _ = ask(table, "combine", 16, tokens=tokens, backend=backend)
    across, label = ask(table, "combine", 16, tokens=tokens, backend=backend, fabric=CLUSTER)
    wire_s = NETWORK_LATENCY_S + np.array(tokens) * 7168 * 2 * crossing / NETWORK_BYTES_PER_S
    np.testing.assert_allclose(across - inside, wire_s, rtol=0.02)
    assert label == [Provenance.EXTRAPOLATED] * 2


@pytest.mark.parametrize("ranks", [16, 32, 64])
def test_low_latency_across_machines_from_one_machine(ranks: int) -> None:
    """DeepEP's kernels measured on 2, 4 and 8 machines of H100, predicted from 1 machine alone."""
    full = load_kernel_table("H100-SXM-80GB", "sglang", "0.5.14")
    one = replace(full, all_to_all=tuple(s for s in full.all_to_all if s.nodes == 1))
    errors = []
    for measured in full.all_to_all:
        if (measured.backend, measured.ranks) == ("deepep_ll", ranks):
            known = ~np.isnan(measured.time_s)
            predicted, _ = all_to_all_s(
                one,
                H100,
                "deepep_ll",
                measured.phase,
                measured.dtype,
                ranks,
                measured.hidden_size,
                measured.top_k,
                measured.num_experts,
                measured.tokens[known],
                CLUSTER,
            )
            errors.append(np.abs(predicted / measured.time_s[known] - 1))
    assert np.median(np.concatenate(errors)) < 0.2


def test_another_dtype_takes_the_nearest_one_s_rates() -> None:
    """Half the bytes of the bf16 that was measured, the same launch."""
    bf16 = tuple(replace(one, dtype="bf16") for one in WORLD.all_to_all if one.phase == "combine")
    time_s, label = ask(table_of(bf16), "combine", dtype="fp8", tokens=[1, 32768])
    expected = world_s("combine", 8, 7168, 8, np.array([0.5, 16384]))
    np.testing.assert_allclose(time_s, expected, rtol=0.03)
    assert label == [Provenance.EXTRAPOLATED] * 2


def test_nccl_stands_in_for_a_backend_without_times() -> None:
    """All ranks' copies as one NCCL message; a token's own rank counts too."""
    sizes = np.array([64, 4096, 262144, 16777216, 268435456], dtype=np.int32)
    measured = MessageSeries(elements=sizes, time_s=10e-6 + sizes * 2 / LINK)
    table = table_of((), {("alltoall", 8): measured})
    time_s, label = ask(table, "combine", tokens=[4, 4096])
    elements = np.array([4, 4096]) * 7168 * 8 * (1 - (7 / 8) ** 8)
    expected, _ = nccl_s(table, H100, "alltoall", 8, elements)
    np.testing.assert_allclose(time_s, expected)
    assert label == [Provenance.EXTRAPOLATED] * 2
    across, _ = ask(table, "combine", 16, tokens=[4, 4096], fabric=CLUSTER)
    assert (across > expected).all()


def test_link_alone_where_nothing_was_measured() -> None:
    """Copies to other ranks over the link, by hand, and over the network."""
    time_s, label = ask(table_of(()), "combine", tokens=[4096])
    assert time_s[0] == pytest.approx(4096 * 7168 * 2 * copies(8, 8) / LINK)
    assert label == [Provenance.ROOFLINE]
    across, _ = ask(table_of(()), "combine", 16, tokens=[4096], fabric=CLUSTER)
    assert across[0] > 4096 * 7168 * 2 * 0.99 / NETWORK_BYTES_PER_S


def test_holes_and_noise_leave_times_rising() -> None:
    """Half the points missing, the others noisy, one series empty."""
    random = np.random.default_rng(2)
    family = []
    for index, one in enumerate(WORLD.all_to_all):
        noisy = one.time_s * random.lognormal(0, 0.3, one.time_s.shape)
        holes = random.random(noisy.shape) < (1.0 if index == 4 else 0.5)
        family.append(replace(one, time_s=np.where(holes, np.nan, noisy)))
    for ranks in (2, 4, 8, 12, 16, 100):
        fabric = CLUSTER if ranks > 8 else None
        time_s, _ = ask(
            table_of(tuple(family)), ranks=ranks, tokens=list(range(1, 60_000, 97)), fabric=fabric
        )
        assert (time_s > 0).all()
        assert (np.diff(time_s) >= 0).all()


def test_bad_requests_are_refused() -> None:
    """Sizes below one, phases that do not exist."""
    with pytest.raises(ValueError, match="tokens"):
        ask(WORLD, tokens=[0])
    with pytest.raises(ValueError, match="sizes of the exchange"):
        ask(WORLD, top_k=0)
    with pytest.raises(ValueError, match="phase"):
        ask(WORLD, phase="scatter")
