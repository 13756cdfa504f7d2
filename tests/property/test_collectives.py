"""Collectives over random sizes, widths and fabrics: monotone, finite, bounded by neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.io.devices import load_device
from planner.io.profiles import available_kernel_tables, load_kernel_table
from simulator.collectives import all_reduce_s, nccl_s, send_s
from simulator.fabric import Fabric, Level

TABLES = available_kernel_tables()
OPS = ("all_gather", "all_reduce", "alltoall", "reduce_scatter")
RATES = st.floats(1e8, 1e12)
LATENCIES = st.floats(0, 1e-3)


@st.composite
def fabrics(draw: st.DrawFn) -> Fabric:
    """Machines of 1 to 16 devices, NVLink domains of 1 to 4 machines, racks and a spine."""
    node = draw(st.integers(1, 16))
    local = node * draw(st.integers(1, 4))
    sizes = [("domain", local)]
    rack = local * draw(st.integers(1, 4))
    sizes += [("rack", rack), ("cluster", rack * draw(st.integers(1, 8)))]
    levels: list[Level] = []
    latency_s = 0.0
    for name, size in sizes:
        if size > max([1, *(level.devices for level in levels)]):
            latency_s += draw(LATENCIES)
            levels.append(Level(name, size, draw(RATES), latency_s, name != "domain"))
    return Fabric(node, tuple(levels))


sizes = st.lists(st.integers(1, 2**31), min_size=2, max_size=12).map(sorted)


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(TABLES), op=st.sampled_from(OPS), fabric=fabrics(), size=sizes,
       data=st.data())  # fmt: skip
def test_time_rises_with_the_message(
    key: tuple[str, str, str], op: str, fabric: Fabric, size: list[int], data: st.DataObject
) -> None:
    """No larger message is cheaper, at any width on any fabric; no time is negative or NaN."""
    table, device = load_kernel_table(*key), load_device(key[0])
    gpus = data.draw(st.integers(1, fabric.devices))
    times = [nccl_s(table, device, op, gpus, size, fabric)[0]]
    times += [all_reduce_s(table, device, "graph", gpus, size, fabric)[0]]
    times += [send_s(table, size, fabric, network=fabric.devices > fabric.local)[0]]
    for time_s in times:
        assert np.isfinite(time_s).all()
        assert (time_s >= 0).all()
        assert (np.diff(time_s) >= -1e-12 * time_s[1:]).all()


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(TABLES), op=st.sampled_from(OPS), fabric=fabrics(), size=sizes,
       data=st.data())  # fmt: skip
def test_time_rises_with_the_devices(
    key: tuple[str, str, str], op: str, fabric: Fabric, size: list[int], data: st.DataObject
) -> None:
    """The same result on more devices is no cheaper once measured widths are passed.

    Measured widths may break this themselves: in-switch reduction makes 8 H100 faster than 4.
    """
    table, device = load_kernel_table(*key), load_device(key[0])
    measured = max([g for kind, g in table.nccl if kind == op and g <= fabric.local], default=1)
    low = data.draw(st.integers(min(measured, fabric.devices), fabric.devices))
    high = data.draw(st.integers(low, fabric.devices))
    narrow = nccl_s(table, device, op, low, size, fabric)[0]
    wide = nccl_s(table, device, op, high, size, fabric)[0]
    assert (wide >= narrow * (1 - 1e-12)).all()


@pytest.mark.parametrize("gpus", [3, 5, 6, 7])
@settings(max_examples=40, deadline=None)
@given(key=st.sampled_from([key for key in TABLES if "NVL72" not in key[0]]), size=sizes,
       op=st.sampled_from(OPS))  # fmt: skip
def test_widths_between_measured_ones_lie_between_them(
    gpus: int, key: tuple[str, str, str], size: list[int], op: str
) -> None:
    """3, 5, 6 and 7 devices cost something between their measured neighbours."""
    table, device = load_kernel_table(*key), load_device(key[0])
    low, high = (2, 4) if gpus < 4 else (4, 8)
    ends = [nccl_s(table, device, op, width, size)[0] for width in (low, high)]
    time_s = nccl_s(table, device, op, gpus, size)[0]
    assert (time_s >= np.minimum(*ends) * (1 - 1e-9)).all()
    assert (time_s <= np.maximum(*ends) * (1 + 1e-9)).all()
