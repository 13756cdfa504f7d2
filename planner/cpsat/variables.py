"""Variables of the master: how many replicas of each class are deployed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ortools.sat.python import cp_model

    from simulator.plan import BatchingLimits, Shape


@dataclass(frozen=True)
class ReplicaClass:
    """One way to build a replica.

    Parameters
    ----------
    shape, limits
        Its shape and batching limits.
    counts
        Numbers of replicas that the scenario allows, ascending.
    need_bytes, capacity_bytes
        Bytes that one of its ranks must hold (weights, activations, overhead and the KV of one
        full request), and bytes that the engine may use.
    most
        Replicas of it that fit into whole nodes; ``None`` where nodes do not matter.
    """

    shape: Shape
    limits: BatchingLimits
    counts: tuple[int, ...]
    need_bytes: int
    capacity_bytes: int
    most: int | None = None


@dataclass(frozen=True)
class Variables:
    """Decision variables over a list of classes.

    Parameters
    ----------
    count
        Replicas of each class; 0 where it is not used.
    used
        Whether a class is used.
    column
        For each class and allowed count, whether exactly that many are deployed.
    """

    count: list[cp_model.IntVar]
    used: list[cp_model.IntVar]
    column: dict[tuple[int, int], cp_model.IntVar]

    @classmethod
    def create(cls, model: cp_model.CpModel, classes: Sequence[ReplicaClass]) -> Variables:
        """Add the variables of ``classes`` to ``model``, linked to one another."""
        count, used, column = [], [], {}
        for c, replica_class in enumerate(classes):
            most = replica_class.counts[-1]
            count.append(model.new_int_var(0, most, f"count_{c}"))
            used.append(model.new_bool_var(f"used_{c}"))
            for n in replica_class.counts:
                column[c, n] = model.new_bool_var(f"column_{c}_{n}")
            columns = [column[c, n] for n in replica_class.counts]
            model.add(sum(columns) == used[c])
            model.add(sum(n * column[c, n] for n in replica_class.counts) == count[c])
        return cls(count, used, column)
