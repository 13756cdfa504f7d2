"""What joins the devices of one pool, level by level, as small numbers for the simulator."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Level:
    """Groups of devices that one kind of link joins.

    Parameters
    ----------
    name
        ``domain`` (NVLink), ``numa`` or ``node`` (PCIe), ``rack`` or ``cluster`` (network).
    devices
        Devices in one group.
    bytes_per_s
        Bytes per second that each device can send to the rest of its group while every other
        device does so too, one direction.
    latency_s
        From one device to another across this level.
    network
        Whether the link is a network between machines that need not share NVLink.

    """

    name: str
    devices: int
    bytes_per_s: float
    latency_s: float
    network: bool


@dataclass(frozen=True)
class Fabric:
    """Links of one pool of equal devices; a group of devices fills the inner levels first.

    Parameters
    ----------
    node
        Devices in one machine (a tray of a rack-wide NVLink domain is one).
    levels
        By size of their groups, ascending; those inside a machine or an NVLink domain come before
        those of the network.

    """

    node: int
    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        """Refuse levels that do not nest."""
        sizes = [level.devices for level in self.levels]
        kinds = [level.network for level in self.levels]
        if self.node < 1 or sizes != sorted(set(sizes)) or kinds != sorted(kinds):
            raise ValueError(f"levels do not nest: {self.levels} around nodes of {self.node}")

    @property
    def local(self) -> int:
        """Devices of the largest group that needs no network: a machine or an NVLink domain."""
        return max((level.devices for level in self.levels if not level.network), default=1)

    @property
    def devices(self) -> int:
        """Devices that can reach each other at all."""
        return max((level.devices for level in self.levels), default=1)

    def network(self, devices: int) -> tuple[float, float]:
        """Bytes per second and device, and latency in seconds, of a group that needs the network.

        The slowest network level that the group crosses sets the pace (an oversubscribed spine
        above full-rate leaf switches), the widest one the latency.

        Raises
        ------
        ValueError
            If the group fits into one machine or domain, or is larger than the fabric.

        """
        if not self.local < devices <= self.devices:
            raise ValueError(
                f"{devices} devices are not a group across the network: one machine or domain "
                f"holds {self.local}, the fabric {self.devices}"
            )
        crossed: list[Level] = []
        for level in self.levels:
            if level.network and (not crossed or crossed[-1].devices < devices):
                crossed.append(level)
        return min(level.bytes_per_s for level in crossed), crossed[-1].latency_s
