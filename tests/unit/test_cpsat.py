"""The master: each rule alone, ties by level, and the same answer as a plain argmin."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest
from ortools.sat.python import cp_model

from planner.cpsat.constraints import Constraints
from planner.cpsat.model import MasterStatus, solve_master
from planner.cpsat.objective import Objective
from planner.cpsat.variables import ReplicaClass, Variables
from simulator.plan import BatchingLimits, Shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from planner.cpsat.objective import Column


def replica_class(
    tp: int,
    counts: tuple[int, ...] = (1, 2),
    need: int = 10,
    capacity: int = 10,
    device: str = "",
) -> ReplicaClass:
    """A class whose batching limits, which no rule looks at, are arbitrary."""
    return ReplicaClass(Shape(tp, device=device), BatchingLimits(8, 512), counts, need, capacity)


class OneRule:
    """A model with variables and nothing else, to which a test adds the one rule it is about."""

    def __init__(self, classes: Sequence[ReplicaClass]) -> None:
        self.model = cp_model.CpModel()
        self.variables = Variables.create(self.model, classes)
        self.rules = Constraints(self.model, self.variables, classes)

    def use(self, column: Column) -> None:
        """Demand a column."""
        self.model.add(self.variables.column[column] == 1)

    def is_feasible(self) -> bool:
        """Whether anything keeps all that was added."""
        status = cp_model.CpSolver().solve(self.model)
        assert status in (cp_model.OPTIMAL, cp_model.INFEASIBLE)
        return status == cp_model.OPTIMAL


def test_variables_tie_a_column_to_its_class_and_count() -> None:
    """The column of three replicas of class 1 means: class 1 used, three of them, none of 0."""
    one = OneRule([replica_class(1), replica_class(2, counts=(1, 3))])
    one.use((1, 3))
    one.model.add(one.variables.used[0] == 0)
    solver = cp_model.CpSolver()
    assert solver.solve(one.model) == cp_model.OPTIMAL
    assert [solver.value(n) for n in one.variables.count] == [0, 3]
    assert [solver.value(used) for used in one.variables.used] == [0, 1]


def test_a_count_outside_the_list_is_no_deployment() -> None:
    """With counts (1, 3), two replicas cannot be had."""
    one = OneRule([replica_class(1, counts=(1, 3))])
    one.model.add(one.variables.count[0] == 2)
    assert not one.is_feasible()


@pytest.mark.parametrize(("wanted", "feasible"), [([0], True), ([0, 1], False), ([], False)])
def test_one_class(wanted: list[int], feasible: bool) -> None:
    """One class is a deployment; two are not, nor is none."""
    one = OneRule([replica_class(1), replica_class(2)])
    one.rules.one_class()
    for c, used in enumerate(one.variables.used):
        one.model.add(used == (c in wanted))
    assert one.is_feasible() == feasible


@pytest.mark.parametrize(("num_devices", "feasible"), [(8, True), (7, False)])
def test_device_count(num_devices: int, feasible: bool) -> None:
    """Two replicas of width 4 take eight devices: eight are enough, seven are not."""
    one = OneRule([replica_class(4)])
    one.rules.device_count({"": num_devices})
    one.use((0, 2))
    assert one.is_feasible() == feasible


def test_device_count_adds_up_over_classes() -> None:
    """2 x 1 and 1 x 4 devices are six: five are too few though each class alone fits."""
    for num_devices, feasible in ((6, True), (5, False)):
        one = OneRule([replica_class(1), replica_class(4)])
        one.rules.device_count({"": num_devices})
        one.use((0, 2))
        one.use((1, 1))
        assert one.is_feasible() == feasible


@pytest.mark.parametrize(("l40s", "feasible"), [(2, True), (1, False)])
def test_device_count_of_each_pool(l40s: int, feasible: bool) -> None:
    """Devices that another pool has to spare do not help."""
    one = OneRule([replica_class(1, device="L40S"), replica_class(4, device="H100-SXM-80GB")])
    one.rules.device_count({"H100-SXM-80GB": 4, "L40S": l40s})
    one.use((0, 2))
    one.use((1, 1))
    assert one.is_feasible() == feasible


@pytest.mark.parametrize(("most", "feasible"), [(None, True), (2, True), (1, False)])
def test_node_packing(most: int | None, feasible: bool) -> None:
    """Two replicas need room for two in whole nodes, however many devices the pool has."""
    one = OneRule([dataclasses.replace(replica_class(4), most=most)])
    one.rules.node_packing()
    one.use((0, 2))
    assert one.is_feasible() == feasible


@pytest.mark.parametrize(("need", "feasible"), [(10, True), (11, False)])
def test_memory(need: int, feasible: bool) -> None:
    """Ten bytes fit into ten, eleven do not."""
    one = OneRule([replica_class(1, need=need, capacity=10)])
    one.rules.memory()
    one.use((0, 1))
    assert one.is_feasible() == feasible


def test_memory_of_an_unused_class_does_not_matter() -> None:
    """A class that does not fit only has to stay unused."""
    one = OneRule([replica_class(1, need=11, capacity=10), replica_class(2)])
    one.rules.memory()
    one.use((1, 1))
    assert one.is_feasible()


@pytest.mark.parametrize(("column", "feasible"), [((0, 2), True), ((0, 1), False)])
def test_forbid(column: Column, feasible: bool) -> None:
    """Only the forbidden column is lost."""
    one = OneRule([replica_class(1)])
    one.rules.forbid([(0, 1)])
    one.use(column)
    assert one.is_feasible() == feasible


def test_objective_counts_from_the_least_value() -> None:
    """Values 10**18 apart from 10**18 + 3 are told apart: the common part is taken off."""
    huge = 10**18
    classes = [replica_class(1)]
    model = cp_model.CpModel()
    variables = Variables.create(model, classes)
    Constraints(model, variables, classes).one_class()
    objective = Objective(model, variables, ({(0, 1): huge + 3, (0, 2): huge},))
    objective.minimize(0)
    solver = cp_model.CpSolver()
    assert solver.solve(model) == cp_model.OPTIMAL
    assert (solver.boolean_value(variables.column[0, 2]), solver.objective_value) == (True, 0.0)


def test_later_levels_decide_ties() -> None:
    """Of the columns least at level 0, the one that is least at level 1, then at level 2."""
    classes = [replica_class(1, counts=(1, 2, 3, 4))]
    levels = [
        {(0, 1): 9, (0, 2): 5, (0, 3): 5, (0, 4): 5},
        {(0, 1): 0, (0, 2): 8, (0, 3): 7, (0, 4): 7},
        {(0, 1): 0, (0, 2): 0, (0, 3): 2, (0, 4): 1},
    ]
    chosen = [solve_master(classes, {"": 8}, levels[:depth]).column for depth in (1, 2, 3)]
    assert chosen[0] in {(0, 2), (0, 3), (0, 4)}
    assert chosen[1] in {(0, 3), (0, 4)}
    assert chosen[2] == (0, 4)


def test_no_class_and_no_column_are_infeasible() -> None:
    """Without a class, or with every column forbidden, there is no deployment."""
    assert solve_master([], {"": 8}, [{}]).status is MasterStatus.INFEASIBLE
    classes = [replica_class(1)]
    values = {(0, 1): 0, (0, 2): 0}
    result = solve_master(classes, {"": 8}, [values], forbidden=list(values))
    assert (result.status, result.column) == (MasterStatus.INFEASIBLE, None)


def argmin(
    classes: Sequence[ReplicaClass],
    num_devices: int,
    levels: Sequence[Mapping[Column, int]],
    forbidden: Sequence[Column],
) -> Column | None:
    """The master's answer in plain Python."""
    allowed = [
        (c, n)
        for c, one in enumerate(classes)
        for n in one.counts
        if one.shape.devices * n <= num_devices
        and one.need_bytes <= one.capacity_bytes
        and (c, n) not in forbidden
    ]
    return min(allowed, key=lambda column: [level[column] for level in levels], default=None)


@pytest.mark.parametrize("seed", range(40))
def test_master_equals_a_plain_argmin(seed: int) -> None:
    """On random tables with ties and every rule at work the master names the argmin, twice."""
    rng = np.random.default_rng(seed)
    gib = 2**30
    counts = tuple(sorted({int(n) for n in rng.integers(1, 9, 4)}))
    classes = [
        replica_class(
            int(rng.choice([1, 2, 4, 8])), counts, int(rng.integers(50, 90)) * gib, 80 * gib
        )
        for _ in range(int(rng.integers(1, 13)))
    ]
    columns = [(c, n) for c in range(len(classes)) for n in counts]
    spread = int(rng.choice([2, 1000, 10**12]))  # 2: ties everywhere; 10**12 ns: 17 minutes
    values = rng.integers(0, spread, (2, len(columns)))
    order = rng.permutation(len(columns))  # a total order, as the canonical one is
    levels = [dict(zip(columns, map(int, level), strict=True)) for level in (*values, order)]
    forbidden = [column for column in columns if rng.random() < 0.3]
    num_devices = int(rng.integers(1, 17))

    first = solve_master(classes, {"": num_devices}, levels, forbidden)
    again = solve_master(classes, {"": num_devices}, levels, forbidden[::-1])

    expected = argmin(classes, num_devices, levels, forbidden)
    assert first == again
    assert first.column == expected
    optimal = MasterStatus.INFEASIBLE if expected is None else MasterStatus.OPTIMAL
    assert first.status is optimal
