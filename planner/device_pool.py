"""A pool of devices of one kind, with all that the engine and the cost of a plan owe to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulator.cost import CostCompiler
    from simulator.device import Device
    from simulator.fabric import Fabric
    from simulator.memory import MemoryRules
    from simulator.plan import BatchingLimits


@dataclass(frozen=True)
class DevicePool:
    """Devices of one kind.

    Parameters
    ----------
    device, num_devices, devices_per_node, fabric
        The devices, and the links between them.
    price_per_hour
        USD per device and hour, or ``None``.
    memory_rules
        What the engine takes of a device's memory.
    default_limits
        The engine's own batching limits on this device.
    compiler
        Maker of iteration costs.
    """

    device: Device
    num_devices: int
    devices_per_node: int
    fabric: Fabric
    price_per_hour: float | None
    memory_rules: MemoryRules
    default_limits: BatchingLimits
    compiler: CostCompiler

    def replicas_that_fit(self, devices: int) -> int:
        """Replicas of so many devices that it holds: several to a node, or each on whole nodes."""
        nodes = self.num_devices // self.devices_per_node
        if devices <= self.devices_per_node:
            return nodes * (self.devices_per_node // devices)
        return nodes // -(-devices // self.devices_per_node)
