"""The CP-SAT master: the deployment of least value, and the proof that none is lower."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from ortools.sat.python import cp_model

from planner.cpsat.constraints import Constraints
from planner.cpsat.objective import Column, Objective
from planner.cpsat.variables import ReplicaClass, Variables

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

DETERMINISTIC_LIMIT: Final = 60.0
"""Deterministic time units that one solve may take; models here need under 0.1."""


class MasterStatus(str, Enum):
    """How a solve ended."""

    OPTIMAL = "optimal"
    INFEASIBLE = "infeasible"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class MasterResult:
    """Outcome of one lexicographic solve.

    Parameters
    ----------
    status
        ``OPTIMAL`` only if the solver proved every level.
    column
        The class and count chosen, or ``None``.
    """

    status: MasterStatus
    column: Column | None


def solve_master(
    classes: Sequence[ReplicaClass],
    num_devices: Mapping[str, int],
    levels: Sequence[Mapping[Column, int]],
    forbidden: Collection[Column] = (),
) -> MasterResult:
    """Find the allowed column of least value.

    Parameters
    ----------
    classes
        Ways to build a replica.
    num_devices
        Devices of each pool, by `Shape.device`.
    levels
        Value of every column, most important level first.
    forbidden
        Columns proved to break an SLO.

    Returns
    -------
    MasterResult
        With one worker and a deterministic time limit the answer is the same everywhere.
    """
    if not classes:
        return MasterResult(MasterStatus.INFEASIBLE, None)
    model = cp_model.CpModel()
    variables = Variables.create(model, classes)
    constraints = Constraints(model, variables, classes)
    constraints.one_class()
    constraints.device_count(num_devices)
    constraints.node_packing()
    constraints.memory()
    constraints.forbid(forbidden)
    objective = Objective(model, variables, tuple(levels))
    chosen: Column | None = None
    for level in range(len(objective.levels)):
        objective.minimize(level)
        solver = _solver()
        status = solver.solve(model)
        if status == cp_model.INFEASIBLE:
            return MasterResult(MasterStatus.INFEASIBLE, None)
        if status != cp_model.OPTIMAL:
            return MasterResult(MasterStatus.UNKNOWN, None)
        chosen = next(c for c, v in sorted(variables.column.items()) if solver.boolean_value(v))
        objective.hold(level, chosen)
    return MasterResult(MasterStatus.OPTIMAL, chosen)


def _solver() -> cp_model.CpSolver:
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.linearization_level = 1
    # One column is chosen, so probing finds nothing; 690 classes take a third of the time without.
    solver.parameters.cp_model_probing_level = 0
    solver.parameters.max_deterministic_time = DETERMINISTIC_LIMIT
    return solver
