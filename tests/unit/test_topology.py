"""Pools as graphs, and what the simulator gets of them."""

from __future__ import annotations

import json
from importlib.resources import files

import networkx as nx
import pytest

from planner.errors import InputError
from planner.io.devices import device_names, load_device
from planner.io.interconnects import INTERCONNECTS_FILE, load_interconnect
from planner.topology import MAX_DEVICES_PER_NODE, Pool, cluster_graph, fabric_of, pool_fabric
from simulator.fabric import Fabric, Level


def pool(
    device: str,
    nodes: int,
    per_node: int,
    network: str | None = None,
    nodes_per_rack: int | None = None,
    oversubscription: float = 1.0,
) -> Pool:
    """A pool of a catalogued device on a named network."""
    interconnect = load_interconnect(network)
    facts = load_device(device)
    return Pool(facts, nodes, per_node, interconnect, nodes_per_rack, oversubscription)


def shape(fabric: Fabric) -> list[tuple[str, int, float]]:
    """Level names, group sizes and GB/s per device."""
    return [(one.name, one.devices, round(one.bytes_per_s / 1e9, 3)) for one in fabric.levels]


def test_hgx_machines_on_infiniband() -> None:
    """NVLink inside, one 400 Gbit/s NIC at 94 % per device outside."""
    fabric = fabric_of(pool("H100-SXM-80GB", 4, 8, "ib_400g"))
    assert shape(fabric) == [("domain", 8, 450.0), ("cluster", 32, 47.0)]
    assert (fabric.local, fabric.devices, fabric.node) == (8, 32, 8)
    assert fabric.levels[-1].latency_s == pytest.approx(7.2e-6)
    assert fabric.network(16) == pytest.approx((47e9, 7.2e-6))


def test_nvl72_domain_spans_its_trays() -> None:
    """18 trays of 4 are one domain; a second rack is reached over the NICs only."""
    one = fabric_of(pool("GB200-NVL72", 18, 4))
    assert shape(one) == [("domain", 72, 900.0)]
    assert (one.local, one.node) == (72, 4)
    two = fabric_of(pool("GB200-NVL72", 36, 4, "ib_400g"))
    assert shape(two) == [("domain", 72, 900.0), ("cluster", 144, 47.0)]
    small = fabric_of(pool("GB200-NVL72", 2, 4, "ib_400g"))
    assert shape(small) == [("domain", 8, 900.0)]


def test_nvlink_of_a_baseboard_ends_at_its_machine() -> None:
    """Two machines with 4 of 8 H100 are two domains: only rack-wide NVLink spans machines."""
    fabric = fabric_of(pool("H100-SXM-80GB", 2, 4, "ib_400g"))
    assert shape(fabric) == [("domain", 4, 450.0), ("cluster", 8, 47.0)]


def test_pcie_box_has_two_numa_domains() -> None:
    """Without NVLink devices meet below a root complex, then across the machine, then outside."""
    fabric = fabric_of(pool("L40S", 2, 8, "eth_100g"))
    assert shape(fabric)[:2] == [("numa", 4, 32.0), ("node", 8, 32.0)]
    assert shape(fabric)[2] == ("cluster", 16, 0.25)
    assert fabric.local == 8
    latency = [level.latency_s for level in fabric.levels]
    assert latency == sorted(latency)
    pair = fabric_of(pool("L40S", 1, 2))
    assert shape(pair) == [("node", 2, 32.0)]


def test_fast_nics_do_not_shortcut_a_pcie_machine() -> None:
    """Devices of one machine meet over PCIe, also where the network would be faster."""
    fabric = fabric_of(pool("L40S", 2, 8, "ib_800g"))
    assert shape(fabric)[1] == ("node", 8, 32.0)
    assert shape(fabric)[2] == ("cluster", 16, 32.0), "the NIC reads the device over its slot"


def test_nvlink_bridges_inside_a_pcie_machine() -> None:
    """A pair on a bridge, four below a socket, eight in the machine."""
    fabric = fabric_of(pool("H100-NVL-94GB", 1, 8))
    assert [name for name, _, _ in shape(fabric)] == ["domain", "numa", "node"]
    assert [size for _, size, _ in shape(fabric)] == [2, 4, 8]
    rates = [rate for _, _, rate in shape(fabric)]
    assert rates == sorted(rates, reverse=True)


def test_machines_without_a_network_stay_alone() -> None:
    """No interconnect: nothing reaches beyond one machine."""
    for name in (None, "none"):
        fabric = fabric_of(pool("H100-SXM-80GB", 4, 8, name))
        assert (fabric.local, fabric.devices) == (8, 8)
    lone = fabric_of(pool("GH200-96GB", 4, 1, "none"))
    assert (lone.levels, lone.local, lone.devices) == ((), 1, 1)


def test_oversubscribed_spine_sets_the_pace_across_racks() -> None:
    """Inside a rack full rate, across racks a quarter of it."""
    fabric = fabric_of(pool("H100-SXM-80GB", 64, 8, "ib_400g", 16, 4.0))
    assert shape(fabric)[1:] == [("rack", 128, 47.0), ("cluster", 512, 11.75)]
    assert fabric.network(128)[0] == pytest.approx(47e9)
    assert fabric.network(129)[0] == pytest.approx(11.75e9)


@pytest.mark.parametrize(
    ("name", "per_device_gb_s"),
    [("efa_p5", 47.0), ("efa_p4", 5.875), ("4xib_200g", 11.75), ("1xib_400g", 5.875)],
)
def test_nics_are_shared_or_bundled(name: str, per_device_gb_s: float) -> None:
    """Four NICs per device add up; fewer NICs than devices are shared."""
    fabric = fabric_of(pool("H100-SXM-80GB", 2, 8, name))
    assert fabric.levels[-1].bytes_per_s / 1e9 == pytest.approx(per_device_gb_s)


def test_graph_holds_every_part() -> None:
    """Devices, switches, roots, machines, NICs, leaves and the spine, all connected."""
    graph = cluster_graph(pool("H100-SXM-80GB", 4, 8, "ib_400g", 2))
    kinds = [vertex[0] for vertex in graph]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    expected = {"device": 32, "nvswitch": 4, "root": 8, "node": 4, "nic": 32, "leaf": 2, "spine": 1}
    assert counts == expected
    assert nx.is_connected(graph)
    apart = cluster_graph(pool("H100-SXM-80GB", 4, 8))
    assert nx.number_connected_components(apart) == 4


def test_every_device_has_a_fabric() -> None:
    """Each catalogued device, alone, in a machine and in two on a network."""
    for name in device_names():
        for nodes, per_node in ((1, 1), (1, 8), (2, 8), (3, 4)):
            fabric = fabric_of(pool(name, nodes, per_node, "ib_400g"))
            assert fabric.devices == nodes * per_node
            assert all(level.bytes_per_s > 0 and level.latency_s > 0 for level in fabric.levels)
            rates = [level.bytes_per_s for level in fabric.levels]
            assert rates == sorted(rates, reverse=True)


def test_large_pools_cost_no_more_than_small_ones() -> None:
    """A million machines resolve from a few of them."""
    fabric = fabric_of(pool("B200-SXM-180GB", 1_000_000, 8, "ib_400g"))
    assert fabric.devices == 8_000_000
    assert fabric.levels[-1].bytes_per_s == pytest.approx(47e9)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ib_400", r"ib_400.* must be one of: efa_p4, .*none.*did you mean ib_400g\?"),
        ("0xib_400g", "must be one of"),
        ("4xnothing", "must be one of"),
        ("", "must be one of"),
    ],
)
def test_unknown_networks_are_refused_in_one_line(name: str, said: str) -> None:
    """The message names the file, the field, the value and what would be right."""
    device = load_device("H100-SXM-80GB")
    with pytest.raises(InputError, match=said) as caught:
        pool_fabric(device, 2, 8, name, source="a.yaml", field="cluster.pools[0]")
    text = str(caught.value)
    assert text.startswith("a.yaml: cluster.pools[0].interconnect: ")
    assert "\n" not in text


def test_impossible_machines_are_refused() -> None:
    """No machine holds thousands of devices; a pool holds at least one."""
    device = load_device("H100-SXM-80GB")
    with pytest.raises(InputError, match=r"pools\[0\]\.devices_per_node: 2000000000 must be at"):
        pool_fabric(device, 1, 2_000_000_000, None, source="a.yaml", field="cluster.pools[0]")
    fabric = pool_fabric(device, 1, MAX_DEVICES_PER_NODE, None, source="a.yaml", field="pool")
    assert fabric.local == MAX_DEVICES_PER_NODE
    with pytest.raises(ValueError, match="at least 1"):
        Pool(device, 0, 8, None)
    with pytest.raises(ValueError, match="oversubscription"):
        Pool(device, 2, 8, None, oversubscription=0.5)


def test_fabrics_must_nest() -> None:
    """Levels that shrink, or a machine's level outside the network, are refused."""
    inside = Level("domain", 8, 1e9, 1e-6, network=False)
    outside = Level("cluster", 16, 1e9, 1e-6, network=True)
    assert Fabric(8, (inside, outside)).local == 8
    for levels in ((outside, inside), (inside, inside), (Level("rack", 4, 1e9, 0, True), inside)):
        with pytest.raises(ValueError, match="nest"):
            Fabric(8, levels)
    with pytest.raises(ValueError, match="not a group across the network"):
        Fabric(8, (inside, outside)).network(8)


def test_every_figure_has_a_source() -> None:
    """Each number of the data file says where it comes from."""
    text = (files("profiles") / "hardware" / "interconnects.json").read_text("utf-8")
    entries = json.loads(text)["interconnects"]
    assert len({entry["name"] for entry in entries}) == len(entries) >= 10
    for entry in entries:
        assert load_interconnect(entry["name"]) is not None, INTERCONNECTS_FILE
        for key in ("nics", "gbit_per_s", "latency_us", "efficiency"):
            assert len(entry[key]["source"]) > 10, entry["name"]
        assert 0 < entry["efficiency"]["value"] <= 1
