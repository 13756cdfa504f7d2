"""Changes of an infeasible scenario under which some plan is feasible, each verified by solving it.

A change is the scenario's own fields with other values, by their dotted path; applied together they
make it feasible. Changes are looked for along one axis each, the nearest first.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from planner.errors import InputError
from planner.objective import ExcessObjective
from planner.resolve import resolve
from planner.scenario import Scenario
from planner.search import Search
from planner.space import enumerate_space

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from simulator.plan import Plan

    Change = Mapping[str, Any]
    """New values by dotted path; ``None`` leaves the field out."""

RELAXATION_ITERATIONS: Final = 1_000_000
"""Iterations that each question about a changed scenario may take: seconds."""

_MOST_NODES: Final = 16
"""Nodes that may be added to a pool, and values that are tried for a list of the search space."""

_LESS: Final = 0.95
"""What is left of a rate, or of the clients, after each step down."""

_MOST_STEPS: Final = 128
"""Steps down: to a thousandth."""

_PINS: Final[Mapping[str, Callable[[Plan], int]]] = {
    "tp": lambda plan: plan.shape.tp,
    "pp": lambda plan: plan.shape.pp,
    "dp": lambda plan: plan.shape.dp,
    "ep": lambda plan: plan.shape.ep,
    "replicas": lambda plan: plan.replicas,
    "max_num_seqs": lambda plan: plan.limits.max_num_seqs,
    "max_num_batched_tokens": lambda plan: plan.limits.max_num_batched_tokens,
}
"""Lists of ``search.space``, and what of a plan each of them holds."""

_FORBID: Final = "search.space.forbid"


def text_of(change: Change) -> str:
    """A change as a person would write it."""
    return ", ".join(f"{path}: {_written(value)}" for path, value in change.items())


def _written(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def changed(scenario: Scenario, change: Change) -> Scenario:
    """The scenario with a change.

    Raises
    ------
    InputError
        When the values are none that it can have.
    """
    data = scenario.model_dump(mode="json", exclude_unset=True, by_alias=True)
    for path, value in change.items():
        *parents, name = path.split(".")
        section: Any = data
        for parent in parents:
            section = section[int(parent)] if isinstance(section, list) else section[parent]
        if value is None:
            section.pop(name, None)
        else:
            section[name] = value
    return Scenario.model_validate(data, base_dir=scenario.base_dir, source=scenario.source)


def feasible_plan(scenario: Scenario, change: Change) -> Plan | None:
    """A plan of the changed scenario that keeps every constraint, found by solving it."""
    try:
        problem = resolve(changed(scenario, change))
    except InputError:  # such as a second node without a network to it
        return None
    if not problem.constraints:  # what can run is feasible
        return next(iter(enumerate_space(problem).plans), None)
    limits = replace(problem.search_limits, work_limit=RELAXATION_ITERATIONS)
    asked = replace(problem, search_limits=limits)
    excess = ExcessObjective(problem.constraints)
    found = Search(asked, excess, problem.constraints, any_plan=True).run()
    return None if found.best is None else found.best.plan


def can_run(scenario: Scenario, change: Change) -> tuple[Plan, ...]:
    """Plans of the changed scenario that can run, whatever they do."""
    try:
        return enumerate_space(resolve(changed(scenario, change))).plans
    except InputError:
        return ()


def verified(scenario: Scenario, changes: Iterable[Change]) -> Iterator[Change]:
    """Those changes that solving confirms."""
    return (change for change in changes if feasible_plan(scenario, change) is not None)


def pins(scenario: Scenario) -> tuple[str, ...]:
    """Paths of what the scenario's search space states."""
    stated = scenario.search.space.model_fields_set
    lists = [f"search.space.{name}" for name in _PINS if name in stated]
    return (*lists, _FORBID) if scenario.search.space.forbid else tuple(lists)


def conflicting_pins(scenario: Scenario) -> tuple[str, ...]:
    """A smallest set of stated lists that leave no plan together; empty where none is to blame.

    A deletion filter: each in turn is left out for good where the others still conflict.
    """
    every = pins(scenario)
    if not can_run(scenario, dict.fromkeys(every)):
        return ()
    left_out: list[str] = []
    for path in every:
        if not can_run(scenario, dict.fromkeys([*left_out, path])):
            left_out.append(path)
    return tuple(path for path in every if path not in left_out)


def wider_space(scenario: Scenario, paths: Iterable[str]) -> Iterator[Change]:
    """For each stated list the value whose addition makes some plan feasible, nearest to the list.

    Where no single list is to blame, one value for each of them together.
    """
    paths = tuple(paths)
    found = False
    for path in paths:
        change = _nearest_value(scenario, [path])
        if change is not None:
            found = True
            yield change
    if not found and len(paths) > 1:
        together = _nearest_value(scenario, paths)
        if together is not None:
            yield together


def _nearest_value(scenario: Scenario, paths: Iterable[str]) -> Change | None:
    """The stated lists with the values of the nearest plan that is feasible once they are wider."""
    paths = tuple(paths)
    space = scenario.search.space
    free: dict[str, Any] = dict.fromkeys(paths)
    if paths == (_FORBID,):
        patterns = space.forbid
        for i in range(len(patterns)):
            without = {_FORBID: [p for j, p in enumerate(patterns) if j != i] or None}
            if feasible_plan(scenario, without) is not None:
                return without
        return free if feasible_plan(scenario, free) is not None else None
    names = [path.rpartition(".")[2] for path in paths if path != _FORBID]

    def with_values(plan: Plan) -> dict[str, Any]:
        widened = {
            f"search.space.{name}": sorted({*getattr(space, name), _PINS[name](plan)})
            for name in names
        }
        return {**widened, **({_FORBID: None} if _FORBID in paths else {})}

    def distance(plan: Plan) -> float:
        return sum(
            min(abs(math.log(_PINS[name](plan) / value)) for value in getattr(space, name))
            for name in names
        )

    if feasible_plan(scenario, free) is None:
        return None
    nearest = sorted(can_run(scenario, free), key=distance)
    tried: list[dict[str, Any]] = []
    for plan in nearest:
        change = with_values(plan)
        if change not in tried:
            tried.append(change)
            if feasible_plan(scenario, change) is not None:
                return change
        if len(tried) == _MOST_NODES:
            break
    return None


def less_load(scenario: Scenario) -> Iterator[Change]:
    """The largest rate, or number of clients, below the scenario's that some plan can bear."""
    rate, clients = scenario.workload.request_rate, scenario.workload.concurrency
    if rate is not None:
        lower = _least(scenario, lambda n: {"workload.request_rate": _part(rate, n)}, _MOST_STEPS)
        if lower is not None:
            yield lower
    if clients is not None:
        fewer = _least(
            scenario,
            lambda n: {"workload.concurrency": max(1, int(_part(clients, n)))},
            _MOST_STEPS,
        )
        if fewer is not None:
            yield fewer


def more_devices(scenario: Scenario) -> Iterator[Change]:
    """Fewest nodes to add to a pool, one pool at a time."""
    for i, pool in enumerate(scenario.cluster.pools):
        path, nodes = f"cluster.pools.{i}.nodes", pool.nodes

        def with_more(n: int, path: str = path, nodes: int = nodes) -> Change:
            return {path: nodes + n}

        more = _least(scenario, with_more, _MOST_NODES)
        if more is not None:
            yield more


def wider_nodes(scenario: Scenario) -> Iterator[Change]:
    """Fewest devices in each node of a pool, twice as many or twice that, one pool at a time."""
    for i, pool in enumerate(scenario.cluster.pools):
        path = f"cluster.pools.{i}.devices_per_node"
        wider = ({path: times * pool.devices_per_node} for times in (2, 4, 8))
        yield from islice(verified(scenario, wider), 1)


def _part(rate: float, steps: int) -> float:
    """``rate`` after so many steps down, in digits that a person would write."""
    return float(f"{rate * _LESS**steps:.4g}")


def _least(scenario: Scenario, change: Callable[[int], Change], most: int) -> Change | None:
    """The change by the least of 1 .. ``most`` that is enough, by doubling and bisection.

    Where being enough is not monotone, it is one that is, below which the last one tried is not;
    none where ``most`` is not.
    """

    def is_enough(n: int) -> bool:
        return feasible_plan(scenario, change(n)) is not None

    if not is_enough(most):
        return None
    low, high = 0, 1
    while high < most and not is_enough(high):
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return change(high)
