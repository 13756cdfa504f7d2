"""Random layers on shipped tables: experts and their all-to-all always have a sensible time."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.io.devices import load_device
from planner.io.profiles import load_kernel_table
from simulator.all_to_all import all_to_all_s
from simulator.fabric import Fabric, Level
from simulator.interpolate import Provenance
from simulator.moe import moe_s
from simulator.precision import PRECISIONS

TABLES = [
    ("H100-SXM-80GB", "vllm", "0.24.0"),
    ("A100-SXM4-80GB", "vllm", "0.14.0"),
    ("B200-SXM-180GB", "trtllm", "1.3.0rc20"),
]
TOKENS = np.unique(np.geomspace(1, 300_000, 60).astype(np.int64))
ROUNDING = 1e-12
"""Relative; exponentials of equal logarithms may differ by as much."""
POWERS_OF_TWO = st.integers(0, 6).map(lambda power: 2**power)


@settings(max_examples=150, deadline=None)
@given(
    where=st.sampled_from(TABLES),
    dtype=st.sampled_from(sorted(PRECISIONS)),
    hidden=st.integers(1, 20_000),
    width=st.integers(1, 40_000),
    experts=st.integers(1, 2048),
    top_k=st.integers(1, 32),
    tp=POWERS_OF_TWO,
    ep=POWERS_OF_TWO,
    gated=st.booleans(),
    skew=st.floats(0, 3),
)
def test_experts_always_have_a_rising_time(
    where: tuple[str, str, str],
    dtype: str,
    hidden: int,
    width: int,
    experts: int,
    top_k: int,
    tp: int,
    ep: int,
    gated: bool,
    skew: float,
) -> None:
    """Finite, positive, never falling with tokens, and labelled."""
    time_s, label = moe_s(
        load_kernel_table(*where),
        load_device(where[0]),
        dtype,
        hidden,
        width,
        min(top_k, experts),
        experts,
        tp,
        ep,
        gated,
        skew,
        TOKENS,
    )
    assert np.isfinite(time_s).all()
    assert (time_s > 0).all()
    assert (np.diff(time_s) >= -ROUNDING * time_s[:-1]).all()
    assert set(label.tolist()) <= {int(one) for one in Provenance}


@settings(max_examples=150, deadline=None)
@given(
    where=st.sampled_from([*TABLES, ("GB200-NVL72", "trtllm", "1.3.0rc20")]),
    backend=st.sampled_from(["deepep_ll", "deepep_ht", "nvlink_two_sided", "none"]),
    phase=st.sampled_from(["dispatch", "combine"]),
    dtype=st.sampled_from([*sorted(PRECISIONS), "default"]),
    ranks=st.integers(1, 300),
    hidden=st.integers(1, 20_000),
    experts=st.integers(1, 2048),
    top_k=st.integers(1, 32),
    network=st.booleans(),
)
def test_exchanges_always_have_a_rising_time(
    where: tuple[str, str, str],
    backend: str,
    phase: str,
    dtype: str,
    ranks: int,
    hidden: int,
    experts: int,
    top_k: int,
    network: bool,
) -> None:
    """Finite, not negative, never falling with tokens, with or without a network."""
    device = load_device(where[0])
    levels = (
        Level("domain", device.scaleup_domain, device.link_bytes_per_s, 1e-6, network=False),
        Level("cluster", 4096, 50e9, 5e-6, network=True),
    )
    time_s, label = all_to_all_s(
        load_kernel_table(*where),
        device,
        backend,
        phase,
        dtype,
        ranks,
        hidden,
        min(top_k, experts),
        experts,
        TOKENS,
        Fabric(min(8, device.scaleup_domain), levels) if network else None,
    )
    assert np.isfinite(time_s).all()
    assert ((time_s > 0) | (ranks == 1)).all()
    assert (np.diff(time_s) >= -ROUNDING * time_s[:-1]).all()
    assert set(label.tolist()) <= {int(one) for one in Provenance}
