"""Rules that a deployment must keep: one rule, one method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from ortools.sat.python import cp_model

    from planner.cpsat.variables import ReplicaClass, Variables


@dataclass(frozen=True)
class Constraints:
    """Adds the rules to a model.

    Parameters
    ----------
    model, variables, classes
        What they are added to and speak of.
    """

    model: cp_model.CpModel
    variables: Variables
    classes: Sequence[ReplicaClass]

    def one_class(self) -> None:
        """A deployment is made of exactly one class in this version."""
        self.model.add_exactly_one(self.variables.used)

    def device_count(self, num_devices: Mapping[str, int]) -> None:
        """Replicas may not take more devices than their pool has."""
        for device, most in num_devices.items():
            taken = [
                c.shape.devices * n
                for c, n in zip(self.classes, self.variables.count, strict=True)
                if c.shape.device == device
            ]
            if taken:
                self.model.add(sum(taken) <= most)

    def node_packing(self) -> None:
        """No replica spans two nodes, so the remainder of each node stays idle."""
        for replica_class, count in zip(self.classes, self.variables.count, strict=True):
            if replica_class.most is not None:
                self.model.add(count <= replica_class.most)

    def memory(self) -> None:
        """What a rank must hold has to fit where its class is used."""
        for replica_class, used in zip(self.classes, self.variables.used, strict=True):
            self.model.add(replica_class.need_bytes * used <= replica_class.capacity_bytes)

    def forbid(self, columns: Collection[tuple[int, int]]) -> None:
        """Leave out columns that are proved to break an SLO."""
        for column in sorted(columns):
            self.model.add(self.variables.column[column] == 0)
