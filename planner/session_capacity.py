"""How much a plan carries: the largest rate that holds the SLO, and the replicas for a rate.

Both answers are simulated at both ends: the rate or number named holds, the next one does not.
Holding is not monotone in either, so beyond that next one another might hold again; what is named
is the first boundary from below that bisection meets.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import numpy as np

from planner.errors import InputError, RefusalError
from planner.objective import Constraint
from planner.scenario_goals import SloSpec
from simulator.metrics import overloaded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from planner.problem import Problem
    from simulator.plan import Plan
    from simulator.workload import Workload

RESOLUTION: Final = 0.01
"""Relative distance of the rates between which a capacity lies."""
_REPEATS: Final = 4
"""Times that the requests are played one after the other: a queue that grows slowly passes once."""
_MOST_DOUBLINGS: Final = 10
"""A factor of a thousand from the rate to begin with, either way."""


def constraints_of(
    slo: Mapping[str, object] | None, own: tuple[Constraint, ...]
) -> tuple[Constraint, ...]:
    """Constraints of an ``slo`` section; of ``None`` the scenario's ``own``.

    Raises
    ------
    InputError
        When the section is not valid.

    """
    if slo is None:
        return own
    try:
        spec = SloSpec.model_validate(slo)
    except ValueError as error:
        first = str(error).splitlines()[-1]
        raise InputError(
            source="slo", field="", value=dict(slo), rule=f"is no SLO: {first}"
        ) from None
    return tuple(
        Constraint(name.removesuffix("_ms"), statistic, limit_ms)
        for name, limits in spec
        if limits is not None
        for statistic, limit_ms in limits.items()
    )


def repeated(workload: Workload, times: int) -> Workload:
    """The requests played ``times`` times, one mean gap between the plays, contents new each time.

    Raises
    ------
    RefusalError
        When requests are not sent by the clock: then no rate can be set.

    """
    if workload.concurrency or len(workload.after):
        raise RefusalError("a capacity needs requests sent by the clock, not by answers")
    n = workload.num_requests
    span_s = float(workload.arrival_s[-1] - workload.arrival_s[0])
    period_s = span_s * n / max(1, n - 1)
    plays = np.repeat(np.arange(times), n)
    ids, starts = workload.block_ids, workload.block_starts
    if len(ids):
        new = int(ids.max()) + 1
        starts = np.concatenate(
            [starts[:1], *(starts[1:] + play * len(ids) for play in range(times))]
        )
        ids = np.concatenate([ids + play * new for play in range(times)])
    return dataclasses.replace(
        workload,
        arrival_s=np.tile(workload.arrival_s, times) + plays * period_s,
        prompt_tokens=np.tile(workload.prompt_tokens, times),
        output_tokens=np.tile(workload.output_tokens, times),
        block_ids=ids,
        block_starts=starts,
    )


def holds(problem: Problem, plan: Plan, constraints: tuple[Constraint, ...]) -> bool:
    """Whether ``plan`` keeps up with the requests of ``problem`` and keeps every constraint."""
    long = dataclasses.replace(problem, workload=repeated(problem.workload, _REPEATS))
    gaps = any(c.metric == "itl" for c in constraints)
    result = long.start(plan, record_gaps=gaps).finish()
    outcome = problem.outcome(plan, result)
    if any(c.is_broken(outcome) for c in constraints):
        return False
    return not overloaded(result.values, result.arrival_s, long.workload)


def capacity(holds_at: Callable[[float], bool], start: float) -> float:
    """The largest rate that holds, to :data:`RESOLUTION`; 0 where none does.

    Parameters
    ----------
    holds_at
        Whether a rate holds.
    start
        Where to begin: doubled or halved until a rate that holds is below one that does not.

    Raises
    ------
    RefusalError
        When every rate holds: a burst of all requests at once is within the SLO.

    """
    low = high = start
    if holds_at(start):
        for _ in range(_MOST_DOUBLINGS):
            high = 2 * low
            if not holds_at(high):
                break
            low = high
        else:
            raise RefusalError("every rate holds: the workload is too short, or the SLO too lax")
    else:
        for _ in range(_MOST_DOUBLINGS):
            low = high / 2
            if holds_at(low):
                break
            high = low
        else:
            return 0.0
    while high > low * (1 + RESOLUTION):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds_at(middle) else (low, middle)
    return low


def least(holds_with: Callable[[int], bool], most: int) -> int | None:
    """The least of 1 .. ``most`` that holds, the one below it not; ``None``: ``most`` does not."""
    if not holds_with(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds_with(middle) else (middle, high)
    return high
