"""A pool of devices as a graph of its links, and what the simulator needs of it.

The graph holds what a person would draw: devices, NVLink switches, PCIe roots, machines, NICs,
leaf switches (racks) and the spine. `fabric_of` reads from it, level by level, what one device can
send to the rest of its group while all others do the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import networkx as nx

from planner.errors import InputError
from planner.io.interconnects import load_interconnect
from simulator.fabric import Fabric, Level

if TYPE_CHECKING:
    from planner.io.interconnects import Interconnect
    from simulator.device import Device

PCIE_BYTES_PER_S: Final = 64e9
"""PCIe 5.0 x16 in one direction (aiconfigurator systems/h100_sxm.yaml, ``pcie_bw``), for a device
whose own slot is not known."""

NUMA_DOMAINS: Final = 2
"""Sockets of a PCIe machine, each with half of the devices below its root complex (two-socket
servers: the usual host for 4 devices and more)."""

NUMA_DEVICES: Final = 4
"""Fewest devices that a PCIe machine spreads over its sockets."""

NVLINK_LATENCY_S: Final = 0.6e-6
PCIE_LATENCY_S: Final = 1.0e-6
"""One hop of NCCL's low-latency protocol over each link (NVIDIA/nccl src/graph/tuning.cc,
``hwLat``: 0.47 to 0.6 us and 1.0 us). Collectives take theirs from the kernel table instead."""

MACHINE_DEVICES: Final = 16
"""Widest NVLink domain inside one machine (DGX-2); a wider one joins the trays of a rack."""

MAX_DEVICES_PER_NODE: Final = 1024
"""Refused beyond this: more than any NVLink domain built (576), and the graph stays small."""

Vertex = tuple[Any, ...]
"""Kind and indices: ``("device", 3)``, ``("nvswitch", 0)``, ``("root", 0, 1)``, ``("node", 0)``,
``("nic", 0, 2)``, ``("leaf", 0)``, ``("spine",)``."""


@dataclass(frozen=True)
class Pool:
    """Equal machines and what joins them.

    Parameters
    ----------
    device
        What each machine holds.
    nodes, devices_per_node
        Machines, and devices in each.
    interconnect
        Network between the machines, or ``None``.
    nodes_per_rack
        Machines below one leaf switch; ``None`` for one leaf switch over all.
    oversubscription
        Bandwidth of a leaf switch's machines over that of its links to the spine.

    """

    device: Device
    nodes: int
    devices_per_node: int
    interconnect: Interconnect | None
    nodes_per_rack: int | None = None
    oversubscription: float = 1.0

    def __post_init__(self) -> None:
        """Refuse counts that make no pool."""
        if min(self.nodes, self.devices_per_node, self.nodes_per_rack or 1) < 1:
            raise ValueError("nodes, devices_per_node and nodes_per_rack must be at least 1")
        if self.oversubscription < 1:
            raise ValueError(f"oversubscription is {self.oversubscription}; it must be >= 1")

    @property
    def devices(self) -> int:
        """Devices of the whole pool."""
        return self.nodes * self.devices_per_node

    @property
    def nvlink(self) -> int:
        """Devices that NVLink joins; 1 where there is none."""
        rack_wide = self.device.nvlink_domain > MACHINE_DEVICES
        return min(self.device.nvlink_domain, self.devices if rack_wide else self.devices_per_node)

    @property
    def pcie_bytes_per_s(self) -> float:
        """Bandwidth of a device's slot in one direction."""
        return self.device.pcie_bytes_per_s or PCIE_BYTES_PER_S

    @property
    def local(self) -> int:
        """Devices that need no network between them."""
        return max(self.nvlink, self.devices_per_node)

    @property
    def sockets(self) -> int:
        """PCIe roots of a machine that devices are spread over."""
        split = self.devices_per_node >= NUMA_DEVICES and self.devices_per_node % NUMA_DOMAINS == 0
        return NUMA_DOMAINS if split else 1

    def groups(self) -> dict[str, int]:
        """Devices in one group of each level, innermost first; only levels that join something."""
        sizes = {"domain": self.nvlink}
        if self.nvlink < self.devices_per_node:
            sizes["numa"] = self.devices_per_node // self.sockets if self.sockets > 1 else 1
            sizes["node"] = self.devices_per_node
        if self.interconnect is not None:
            # A rack smaller than an NVLink domain joins nothing that NVLink does not.
            sizes["rack"] = (self.nodes_per_rack or 0) * self.devices_per_node
            sizes["cluster"] = self.devices
        kept: dict[str, int] = {}
        widest = 1
        for name, size in sizes.items():
            if size > widest:
                kept[name] = widest = min(size, self.devices)
        return kept


def pool_fabric(
    device: Device,
    nodes: int,
    devices_per_node: int,
    interconnect: str | None,
    *,
    nodes_per_rack: int | None = None,
    oversubscription: float = 1.0,
    source: str,
    field: str,
) -> Fabric:
    """Fabric of a scenario's pool.

    Parameters
    ----------
    device, nodes, devices_per_node
        As in the scenario.
    interconnect
        Name of the network, see `load_interconnect`; ``None`` for none.
    nodes_per_rack, oversubscription
        As for `Pool`.
    source, field
        File and dotted path of the pool, for the error message.

    Raises
    ------
    InputError
        If the network is not known, or a machine holds more devices than any does.

    """
    if devices_per_node > MAX_DEVICES_PER_NODE:
        raise InputError(
            source=source,
            field=f"{field}.devices_per_node",
            value=devices_per_node,
            rule=f"must be at most {MAX_DEVICES_PER_NODE}; write several nodes instead",
        )
    network = load_interconnect(interconnect, source=source, field=f"{field}.interconnect")
    pool = Pool(device, nodes, devices_per_node, network, nodes_per_rack, oversubscription)
    return fabric_of(pool)


@lru_cache(maxsize=32)
def fabric_of(pool: Pool) -> Fabric:
    """What the simulator needs of a pool's graph.

    Each level's bandwidth is the narrowest share on the best path between two devices that only
    this level joins; its latency is that path's. Machines are equal, so a few of them show every
    level, and the pool may be as large as it likes.
    """
    groups = pool.groups()
    graph = cluster_graph(_sample(pool))
    inside = graph.subgraph(v for v in graph if v[0] not in ("nic", "leaf", "spine"))
    levels: list[Level] = []
    inner = 1
    for name, size in groups.items():
        # The first device outside the inner group is the nearest that only this level reaches.
        network = name in ("rack", "cluster")
        part = graph if network else inside
        path = nx.shortest_path(part, ("device", 0), ("device", inner), weight="cost")
        links = [graph.edges[pair] for pair in nx.utils.pairwise(path)]
        levels.append(
            Level(
                name=name,
                devices=size,
                bytes_per_s=min(link["share_bytes_per_s"] for link in links),
                latency_s=sum(link["latency_s"] for link in links),
                network=network,
            )
        )
        inner = size
    return Fabric(node=pool.devices_per_node, levels=tuple(levels))


def _sample(pool: Pool) -> Pool:
    """A pool with the same levels and few machines: one more than its widest proper group has."""
    widest = max([size for size in pool.groups().values() if size < pool.devices], default=1)
    return replace(pool, nodes=min(pool.nodes, -(-widest // pool.devices_per_node) + 1))


def cluster_graph(pool: Pool) -> nx.Graph[Vertex]:
    """A pool's links as an undirected graph.

    Edges carry ``bytes_per_s`` (one direction), ``share_bytes_per_s`` (what is left to one device
    when all devices below use all parallel links), ``latency_s``, and ``cost`` (inverse share, by
    which paths are chosen).
    """
    graph: nx.Graph[Vertex] = nx.Graph()
    for node in range(pool.nodes):
        _add_node(graph, pool, node)
    if pool.interconnect is not None and pool.nodes > 1:
        _add_network(graph, pool, pool.interconnect)
    return graph


def _add_node(graph: nx.Graph[Vertex], pool: Pool, node: int) -> None:
    """One machine: its devices, their PCIe roots and their NVLink switch."""
    per_node, sockets = pool.devices_per_node, pool.sockets
    pcie = pool.pcie_bytes_per_s
    for socket in range(sockets):
        # Sockets are joined at what their devices can send: a slower bridge between them is a
        # property of the host, which the kernel table's widest collective has measured.
        bridge = pcie * per_node / sockets
        _link(graph, ("root", node, socket), ("node", node), bridge, per_node // sockets, 0.0)
    for index in range(per_node):
        device = ("device", node * per_node + index)
        root = ("root", node, index * sockets // per_node)
        _link(graph, device, root, pcie, 1, PCIE_LATENCY_S / 2)
        if pool.nvlink > 1:
            switch = ("nvswitch", device[1] // pool.nvlink)
            bandwidth = pool.device.link_bytes_per_s
            _link(graph, device, switch, bandwidth, 1, NVLINK_LATENCY_S / 2)


def _add_network(graph: nx.Graph[Vertex], pool: Pool, network: Interconnect) -> None:
    """NICs of all machines, their leaf switches and the spine."""
    nics = network.nics(pool.devices_per_node)
    per_nic = pool.devices_per_node / nics
    per_rack = pool.nodes_per_rack or pool.nodes
    node_bytes_per_s = nics * network.nic_bytes_per_s
    pcie = pool.pcie_bytes_per_s
    for node in range(pool.nodes):
        for index in range(nics):
            nic = ("nic", node, index)
            # GPUDirect: a NIC reads its devices' memory over their PCIe slots. The latency of the
            # whole crossing is booked on the NICs.
            for device in _devices_of_nic(pool, node, index, nics):
                _link(graph, ("device", device), nic, pcie, 1, 0.0)
            leaf = ("leaf", node // per_rack)
            _link(graph, nic, leaf, network.nic_bytes_per_s, per_nic, network.latency_s / 2)
    if pool.nodes > per_rack:
        uplink = per_rack * node_bytes_per_s / pool.oversubscription
        for rack in range(-(-pool.nodes // per_rack)):
            _link(graph, ("leaf", rack), ("spine",), uplink, per_rack * pool.devices_per_node, 0.0)


def _devices_of_nic(pool: Pool, node: int, index: int, nics: int) -> range:
    """Devices that use one NIC of a machine, as indices in the pool."""
    per_node = pool.devices_per_node
    first = node * per_node + index * per_node // nics
    last = node * per_node + max((index + 1) * per_node // nics, index * per_node // nics + 1)
    return range(first, last)


def _link(
    graph: nx.Graph[Vertex],
    low: Vertex,
    high: Vertex,
    bytes_per_s: float,
    devices: float,
    latency_s: float,
) -> None:
    """Add one link that ``devices`` (a fraction where several links serve one) share."""
    share = bytes_per_s / devices
    graph.add_edge(
        low,
        high,
        bytes_per_s=bytes_per_s,
        share_bytes_per_s=share,
        latency_s=latency_s,
        cost=1.0 / share,
    )
