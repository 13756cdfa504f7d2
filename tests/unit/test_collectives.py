"""Collectives: the table where it was measured, public multi-node runs and theory elsewhere."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pytest

from planner.io.devices import load_device
from planner.io.profiles import available_kernel_tables, load_kernel_table
from planner.topology import pool_fabric
from simulator import collectives
from simulator.collectives import all_reduce_s, nccl_s, send_s
from simulator.fabric import Fabric, Level
from simulator.interpolate import Provenance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from simulator.table import KernelTable, MessageSeries

TABLES = available_kernel_tables()
NVLINK = ("A100-SXM4-80GB", "B200-SXM-180GB", "B300-SXM", "H100-SXM-80GB", "H200-SXM-141GB")
OPS = ("all_gather", "all_reduce", "alltoall", "reduce_scatter")
KIB, MIB, GIB = 2**10, 2**20, 2**30
SIZES = 2.0 ** np.arange(30)


def vllm_table(device: str) -> KernelTable:
    """The newest table of vLLM on one device."""
    return load_kernel_table(*max(key for key in TABLES if key[:2] == (device, "vllm")))


@lru_cache
def fabric(device: str, nodes: int, per_node: int, network: str | None) -> Fabric:
    """What joins a pool, as the planner resolves it."""
    facts = load_device(device)
    return pool_fabric(facts, nodes, per_node, network, source="test", field="pool")


# --- measured widths -------------------------------------------------------------------------


@pytest.mark.parametrize("key", TABLES, ids="/".join)
def test_tables_are_met_within_their_noise(key: tuple[str, str, str]) -> None:
    """At measured points the time is the table's; only points that fall with size are moved.

    Over all tables half of the points are not moved at all, 90 % by at most 7.8 % (L40S) and the
    worst by a factor of two: a spike that neither neighbour shares.
    """
    table, device = load_kernel_table(*key), load_device(key[0])
    machine = fabric(key[0], 1, 8, None) if "NVL72" not in key[0] else fabric(key[0], 18, 4, None)
    errors: list[float] = []
    for family, call in ((table.all_reduce, all_reduce_s), (table.nccl, nccl_s)):
        for (kind, gpus), series in family.items():
            known = ~np.isnan(series.time_s)
            elements = series.elements[known]
            plain, label = call(table, device, kind, gpus, elements)
            joined, joined_label = call(table, device, kind, gpus, elements, machine)
            np.testing.assert_array_equal(plain, joined)
            assert set(label.tolist()) == set(joined_label.tolist()) == {Provenance.MEASURED}
            errors.extend(np.abs(plain / series.time_s[known] - 1).tolist())
    assert np.median(errors) < 0.005
    assert np.percentile(errors, 90) < 0.09


def left_out(
    series: Mapping[int, MessageSeries], op: str, width: int, keep: tuple[int, ...]
) -> tuple[float, float]:
    """Median absolute and median signed error of one width predicted from others."""
    size = series[width].elements[~np.isnan(series[width].time_s)].astype(np.float64)
    kept = {gpus: series[gpus] for gpus in keep}
    time_s, _ = collectives._local_s(kept, op, width, size, 8)
    ratio = time_s / collectives._measured_s(series[width], size) - 1
    return float(np.median(np.abs(ratio))), float(np.median(ratio))


@pytest.mark.parametrize("device", NVLINK)
def test_leaving_out_a_width_on_nvlink(device: str) -> None:
    """4 from 2 and 8, and 8 from 2 and 4, with NVLink.

    Median errors of the five operations: 4 left out 2 to 9 %, 8 left out 3 to 15 %, the most for
    alltoall; A100 3, 5, 5, 6, 9 and 4, 5, 5, 6, 15; H100 4, 4, 5, 5, 8 and 4, 6, 7, 8, 12.
    """
    table = vllm_table(device)
    families = [(table.all_reduce, "graph", "all_reduce")]
    families += [(table.nccl, op, op) for op in OPS]
    for family, kind, op in families:
        series = {gpus: one for (name, gpus), one in family.items() if name == kind}
        assert left_out(series, op, 4, (2, 8))[0] < 0.12, kind
        assert left_out(series, op, 8, (2, 4))[0] < 0.18, kind


def test_leaving_out_a_width_over_pcie() -> None:
    """4 from 2 and 8 within 20 % in a PCIe machine; 8 from 2 and 4 depends on the host.

    RTX PRO 6000: 8 left out 5 to 24 %. L40S: 28 to 69 %, because the second socket of the measured
    host cuts the bandwidth to a half or a quarter, which no run inside one socket can show.
    """
    for device, bound in (("RTX-PRO-6000-Server", 0.10), ("L40S", 0.25)):
        table = vllm_table(device)
        for op in OPS:
            series = {gpus: one for (name, gpus), one in table.nccl.items() if name == op}
            assert left_out(series, op, 4, (2, 8))[0] < bound, (device, op)
    table = vllm_table("RTX-PRO-6000-Server")
    series = {gpus: one for (name, gpus), one in table.nccl.items() if name == "all_reduce"}
    assert left_out(series, "all_reduce", 8, (2, 4))[0] < 0.12


def test_wider_groups_of_a_rack_meet_the_widths_measured_there() -> None:
    """TensorRT-LLM's all-reduce on 8 and 16 GB300 in an NVL72 rack, from 2 and 4: 18 and 13 %."""
    version = max(key[2] for key in TABLES if key[:2] == ("GB300-NVL72", "trtllm"))
    table = load_kernel_table("GB300-NVL72", "trtllm", version)
    series = {gpus: one for (_, gpus), one in table.all_reduce.items()}
    if 16 not in series:
        pytest.skip("this table holds no widths beyond a tray")
    narrow = {gpus: series[gpus] for gpus in (2, 4)}
    for width, bound in ((8, 0.22), (16, 0.18)):
        size = series[width].elements.astype(np.float64)
        time_s, _ = collectives._local_s(narrow, "all_reduce", width, size, 4)
        measured_s = collectives._measured_s(series[width], size)
        assert np.median(np.abs(time_s / measured_s - 1)) < bound


# --- public runs on several machines ---------------------------------------------------------
#
# nccl-tests, out of place, bytes -> microseconds. Networks' latencies were fitted on the smallest
# message of one run each (profiles/hardware/interconnects.json) and eth_100g's efficiency on the
# only run there is; nothing else was: every row below that is not in FITTED is held out.

PUBLIC: dict[str, tuple[str, str, int, int, str | None, str, dict[int, float]]] = {
    "2 x 8 A100, 1600 Gbit/s RoCE (OCI)": (
        "A100-SXM4-80GB", "all_reduce", 2, 8, "roce_200g",
        "github.com/oracle-quickstart/oci-hpc-oke README.md @001cbb9",
        {8: 36.47, 64 * KIB: 51.69, MIB: 85.58, 8 * MIB: 174.3, 64 * MIB: 821.7, GIB: 9187.8,
         8 * GIB: 67689},
    ),
    "2 x p4de.24xlarge, 8 A100, 400 Gbit/s EFA": (
        "A100-SXM4-80GB", "all_reduce", 2, 8, "efa_p4",
        "github.com/aws-samples/awsome-distributed-training micro-benchmarks/nccl-tests @0162aac",
        {8: 164.3, 64 * KIB: 227.4, MIB: 309.4, 8 * MIB: 762.8, 64 * MIB: 2644.6, GIB: 26217},
    ),
    "2 x p5.48xlarge, 8 H100, 3200 Gbit/s EFA": (
        "H100-SXM-80GB", "all_reduce", 2, 8, "efa_p5",
        "github.com/aws-samples/awsome-distributed-training micro-benchmarks/nccl-tests @0162aac",
        {8: 69.12, 64 * KIB: 135.1, MIB: 123.2, 8 * MIB: 204.8, 64 * MIB: 601.5, GIB: 4607.6,
         8 * GIB: 33605},
    ),
    "2 x a3-megagpu-8g, 8 H100, 1600 Gbit/s TCPXO": (
        "H100-SXM-80GB", "all_reduce", 2, 8, "gcp_tcpxo",
        "github.com/lessizzmore/create-a3mega-ztan-fork ztan-NCCL-test-result @02dd8f4",
        {16: 123.2, 64 * KIB: 159.4, MIB: 203.2, 8 * MIB: 571.9, 64 * MIB: 1261.6, GIB: 6759.0,
         8 * GIB: 47535},
    ),
    "2 x a3-ultragpu-8g, 8 H200, 3200 Gbit/s RoCE, all_gather": (
        "H200-SXM-141GB", "all_gather", 2, 8, "roce_400g",
        "github.com/skypilot-org/skypilot examples/gcp_gpu_direct_tcpx @088eebc",
        {KIB: 28.39, 64 * KIB: 40.62, MIB: 58.46, 8 * MIB: 86.92, 64 * MIB: 278.1, GIB: 3123.9,
         8 * GIB: 24724},
    ),
    "2 x 8 H200, 8 x 400 Gbit/s InfiniBand (CoreWeave)": (
        "H200-SXM-141GB", "all_reduce", 2, 8, "ib_400g",
        "github.com/skypilot-org/skypilot examples/coreweave_infiniband @01da235",
        {512 * MIB: 2387.7, GIB: 4416.5, 8 * GIB: 33460},
    ),
    "2 x 8 H100, 8 x 400 Gbit/s InfiniBand (Together)": (
        "H100-SXM-80GB", "all_reduce", 2, 8, "ib_400g",
        "github.com/skypilot-org/skypilot examples/together_infiniband @18b9158",
        {512 * MIB: 2407.5, GIB: 4524.3, 8 * GIB: 34462},
    ),
    "4 x p6-b200, 8 B200, 3200 Gbit/s EFA": (
        # From the printed algbw; timed through torch.distributed.
        "B200-SXM-180GB", "all_reduce", 4, 8, "efa_p6",
        "github.com/stas00/ml-engineering network/benchmarks/README.md @0cc3de5",
        {32 * KIB: 99.3, MIB: 162.8, 8 * MIB: 321.2, 64 * MIB: 657.5, GIB: 5684.2,
         8 * GIB: 44245},
    ),
    "3 x 8 A100, 4 x 200 Gbit/s InfiniBand": (
        # Printed as a peak of 96 GB/s busbw up to 128 MiB.
        "A100-SXM4-80GB", "all_reduce", 3, 8, "4xib_200g",
        "github.com/NVIDIA/nccl-tests issue 119",
        {128 * MIB: 2680.0},
    ),
    "2 x 8 H200, TCP": (
        "H200-SXM-141GB", "all_reduce", 2, 8, "eth_100g",
        "github.com/skypilot-org/skypilot examples/coreweave_infiniband @01da235",
        {512 * MIB: 269865, 8 * GIB: 4280791},
    ),
    "72 GB200 of one NVL72 rack": (
        "GB200-NVL72", "all_reduce", 18, 4, None,
        "github.com/coreweave/nccl-tests pull request 43",
        {512 * MIB: 1806.7, GIB: 3108.8, 8 * GIB: 20299},
    ),
}  # fmt: skip
FITTED = {
    8: ("roce_200g", "efa_p4", "efa_p5"),
    16: ("gcp_tcpxo",),
    512 * MIB: ("eth_100g",),
    8 * GIB: ("eth_100g",),
}
MISSES = {
    ("gcp_tcpxo", 8 * MIB): 0.45,
    ("gcp_tcpxo", 64 * MIB): 0.35,
    ("efa_p5", 64 * KIB): 0.45,
    ("efa_p6", 8 * MIB): 0.30,
    ("roce_400g", 64 * KIB): 0.30,
    ("roce_400g", MIB): 0.30,
    ("", 8 * GIB): 0.35,
}
"""Held-out points that are off by more than 25 %, or nearly so, with their bounds. NCCL changes
protocols at the small ones, and host-driven TCPXO and EFA take longer to reach their rate: the
model is too fast there. At 8 GiB on 72 GB200 it is too slow: the table ends at 512 MiB on 4."""


def public_errors() -> dict[tuple[str, int], float]:
    """Relative error of every public figure."""
    errors: dict[tuple[str, int], float] = {}
    for name, (device, op, nodes, per_node, network, _, rows) in PUBLIC.items():
        joined = fabric(device, nodes, per_node, network)
        elements = np.maximum(1, np.array(list(rows)) // 2)
        gpus = nodes * per_node
        table, facts = vllm_table(device), load_device(device)
        time_s, label = nccl_s(table, facts, op, gpus, elements, joined)
        assert set(label.tolist()) == {Provenance.EXTRAPOLATED}
        ratios = time_s * 1e6 / np.array(list(rows.values())) - 1
        errors |= {(name, size): float(e) for size, e in zip(rows, ratios, strict=True)}
    return errors


def test_public_runs_on_several_machines() -> None:
    """46 held-out figures of 10 public runs: 40 within 25 %, median 8 %; the 6 fitted within 6 %.

    A run of 3 and 4 p4d.24xlarge (NVIDIA/nccl issue 527) is not in the list: it was published as a
    fault, "slow bus bandwidth", and is 22 to 26 % slower than the model.
    """
    fitted: list[float] = []
    held_out: list[float] = []
    for (name, size), error in public_errors().items():
        network = PUBLIC[name][4]
        if network in FITTED.get(size, ()):
            fitted.append(abs(error))
            continue
        held_out.append(abs(error))
        bound = MISSES.get((network or "", size), 0.25)
        assert abs(error) < bound, f"{name}, {size} bytes: {error:+.0%}"
    assert max(fitted) < 0.07
    assert np.median(held_out) < 0.10
    assert np.mean(np.array(held_out) < 0.25) > 0.85


# --- theory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", NVLINK)
@pytest.mark.parametrize("op", ["all_gather", "all_reduce", "reduce_scatter"])
def test_no_jump_where_a_group_leaves_its_machine(device: str, op: str) -> None:
    """16 devices cost no more than 8 by theory's volumes, plus what the link itself takes.

    With a link between machines as fast as NVLink: at most ``(15/16) / (7/8)`` of the time on 8,
    plus the link's latency and pipelining. With any link: at most the time on 8 plus the link
    alone, ``(sqrt(L) + sqrt(wire))**2``. Never less than on 8.
    """
    table, facts = vllm_table(device), load_device(device)
    inside = Level("domain", 8, facts.link_bytes_per_s, 0.0, network=False)
    eight, _ = nccl_s(table, facts, op, 8, SIZES)
    for share, latency_s in ((1.0, 0.0), (1.0, 2e-6), (0.1, 7e-6), (0.01, 1e-4)):
        link = share * facts.link_bytes_per_s
        between = Level("cluster", 16, link, latency_s, network=True)
        sixteen, _ = nccl_s(table, facts, op, 16, SIZES, Fabric(8, (inside, between)))
        hops_s = 2 * latency_s if op == "all_reduce" else latency_s
        if op != "all_reduce":  # the ring passes 7 more devices
            widths = {gpus: one for (kind, gpus), one in table.nccl.items() if kind == op}
            hops_s += 7 * collectives._hop_s(widths, op, 8)
        wire_s = (1 if op == "all_reduce" else 15 / 16) * 2 * SIZES / (8 * link)
        assert np.all(sixteen >= eight)
        assert np.all(sixteen <= eight + (np.sqrt(hops_s) + np.sqrt(wire_s)) ** 2 + 1e-12)
        if share == 1.0:
            pipelining_s = hops_s + 2 * np.sqrt(hops_s * wire_s)
            assert np.all(sixteen <= eight * (15 / 16) / (7 / 8) + pipelining_s + 1e-12)


def test_engine_kernel_gives_way_to_nccl_beyond_its_widths() -> None:
    """Past its widest measured width the all-reduce is NCCL's, and never cheaper than there."""
    device = "GB200-NVL72"
    table, facts, rack = vllm_table(device), load_device(device), fabric(device, 18, 4, None)
    for gpus in (8, 16, 72):
        time_s, label = all_reduce_s(table, facts, "graph", gpus, SIZES, rack)
        nccl = nccl_s(table, facts, "all_reduce", gpus, SIZES, rack)[0]
        assert np.all(time_s >= nccl)
        assert np.all(time_s >= all_reduce_s(table, facts, "graph", 4, SIZES, rack)[0])
        assert set(label.tolist()) == {Provenance.EXTRAPOLATED}


def test_smaller_machines_cross_the_network_earlier() -> None:
    """8 devices on two machines of 4 use the network, though 8 were measured in one."""
    device = "H100-SXM-80GB"
    table, facts = vllm_table(device), load_device(device)
    split = fabric(device, 2, 4, "ib_400g")
    for op in OPS:
        apart, label = nccl_s(table, facts, op, 8, SIZES, split)
        together, _ = nccl_s(table, facts, op, 4, SIZES, split)
        assert np.all(apart > together)
        assert set(label.tolist()) == {Provenance.EXTRAPOLATED}
    apart, _ = all_reduce_s(table, facts, "graph", 8, SIZES, split)
    assert np.all(apart >= all_reduce_s(table, facts, "graph", 8, SIZES)[0].min())


def test_machines_with_one_device_each() -> None:
    """No stage inside the machine: launch, latency and wire."""
    device = "H100-SXM-80GB"
    table, facts = vllm_table(device), load_device(device)
    lone = fabric(device, 4, 1, "ib_400g")
    launch_s = nccl_s(table, facts, "all_reduce", 2, [1])[0][0]
    for gpus, crossings, volume in ((2, 2, 1.0), (4, 4, 1.5)):
        time_s, _ = nccl_s(table, facts, "all_reduce", gpus, [1, 2**29], lone)
        assert time_s[0] == pytest.approx(launch_s + crossings * 7.2e-6, rel=0.02)
        assert time_s[1] == pytest.approx(volume * 2**30 / 47e9, rel=0.10)


def test_sends_take_latency_and_the_slowest_link() -> None:
    """A send is monotone, never cheaper across machines, and ends at the link's rate."""
    device = "H100-SXM-80GB"
    table = vllm_table(device)
    pair = fabric(device, 2, 8, "ib_400g")
    inside, label = send_s(table, SIZES)
    across, _ = send_s(table, SIZES, pair, network=True)
    assert set(label.tolist()) == {Provenance.EXTRAPOLATED}
    assert np.all(np.diff(inside) >= 0)
    assert np.all(np.diff(across) >= 0)
    assert np.all(across >= inside)
    assert across[-1] == pytest.approx(2 * SIZES[-1] / 47e9, rel=0.01)
    assert across[0] - inside[0] == pytest.approx(7.2e-6, rel=0.01)
    gather, _ = nccl_s(table, load_device(device), "all_gather", 2, 2 * SIZES)
    np.testing.assert_array_equal(inside, gather)


def test_sends_agree_with_a_public_run() -> None:
    """sendrecv_perf on A100, 1 GiB at 195 GB/s (github.com/li-plus/playground cuda/nccl.md)."""
    time_s, _ = send_s(vllm_table("A100-SXM4-80GB"), [2**29])
    assert time_s[0] == pytest.approx(5503e-6, rel=0.35)


def test_what_cannot_run_is_refused() -> None:
    """Too wide for the domain or the fabric, never measured, or without a network."""
    device = "H100-SXM-80GB"
    table, facts = vllm_table(device), load_device(device)
    with pytest.raises(ValueError, match="leaves the scale-up domain of 8"):
        nccl_s(table, facts, "all_reduce", 16, [1])
    alone, pair = fabric(device, 2, 8, None), fabric(device, 2, 8, "ib_400g")
    for joined, reach in ((alone, 8), (pair, 16)):
        with pytest.raises(ValueError, match=f"leaves the fabric of {reach}"):
            all_reduce_s(table, facts, "graph", 17, [1], joined)
    with pytest.raises(ValueError, match="no times of collective 'broadcast'"):
        nccl_s(table, facts, "broadcast", 16, [1], pair)
    with pytest.raises(ValueError, match="no times of collective 'nvls'"):
        all_reduce_s(table, facts, "nvls", 3, [1])
    with pytest.raises(ValueError, match="needs a fabric with a network"):
        send_s(table, [1], alone, network=True)
    with pytest.raises(ValueError, match="at least 1"):
        send_s(table, [0])
    with pytest.raises(ValueError, match="all_gather on 2"):
        send_s(replace(table, nccl={}), [1])


def test_one_device_needs_no_collective() -> None:
    """A group of one costs nothing, whatever joins it to others."""
    device = "L40S"
    table, facts = vllm_table(device), load_device(device)
    for joined in (None, fabric(device, 2, 8, "eth_100g"), fabric(device, 2, 1, "eth_100g")):
        assert all_reduce_s(table, facts, "graph", 1, [4096], joined)[0].tolist() == [0.0]
        assert nccl_s(table, facts, "alltoall", 1, [4096], joined)[0].tolist() == [0.0]
