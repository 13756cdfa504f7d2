"""Schedules of small runs, batch by batch, for tables that a reader can check by hand.

They come from the engine as plain Python, which can be watched and needs no compiling; that the
compiled one goes through the same states is a test of its own (``tests/property``).
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import numba

from simulator.engine import empty_gaps
from simulator.iteration_log import empty_log
from simulator.state import FREE_BLOCKS, RUNNING, STACKED, STARTED, initial_state
from simulator.timing import in_ps
from tests.builders import GATED, TICK_S, linear_cost

if TYPE_CHECKING:
    from collections.abc import Callable

    from simulator.iteration_log import IterationLog
    from simulator.policies.batch import Batch
    from simulator.rules import Rules
    from simulator.state import Limits, State
    from simulator.timing import IterationCost
    from simulator.workload import Workload

_ITERATIONS = 10_000
"""No table is longer; a run that is does not end."""

TICK_PS = int(in_ps(TICK_S))


def _plain_engine() -> Any:
    """The engine's module from a second copy of the simulator, imported without compiling."""

    def take_out() -> dict[str, Any]:
        names = [name for name in sys.modules if name.partition(".")[0] == "simulator"]
        return {name: sys.modules.pop(name) for name in names}

    settings: Any = numba.config
    compiled, before = take_out(), settings.DISABLE_JIT
    settings.DISABLE_JIT = True
    try:
        return importlib.import_module("simulator.engine")
    finally:
        settings.DISABLE_JIT = before
        take_out()
        sys.modules.update(compiled)


_ENGINE = _plain_engine()


class Row(NamedTuple):
    """One batch of one replica, once it is formed.

    Attributes
    ----------
    tick
        When it starts.
    replica
        Where.
    batch
        Requests and the tokens that they compute, in the order in which they run; running
        requests that compute nothing are left out.
    free
        KV pages left; pages of requests that leave are free from the next batch on if the engine
        overlaps scheduling (``Rules.late_results``), and counted here.
    waiting_first
        Preempted requests ahead of the queue, its head first.

    """

    tick: float
    replica: int
    batch: list[tuple[int, int]]
    free: int
    waiting_first: list[int]


def watch(
    state: State,
    under: Limits,
    rules: Rules,
    cost: IterationCost,
    see: Callable[[Batch, int, int], None],
) -> None:
    """Run to the end in plain Python and show every batch as it starts.

    Parameters
    ----------
    state, under, rules, cost
        The run.
    see
        Called with the batch, its replica and its slot once it is under way.

    Raises
    ------
    AssertionError
        If a waiting request can never be admitted, or the run does not end.

    """

    def log_iteration(
        _log: IterationLog, _state: State, batch: Batch, r: int, slot: int, _now_ps: int
    ) -> None:
        see(batch, int(r), int(slot))

    log, gaps = empty_log(rules.batches_in_flight), empty_gaps(0)
    with mock.patch.object(_ENGINE, "log_iteration", log_iteration):
        done = _ENGINE.advance(state, under, rules, cost, gaps, _ITERATIONS, log)
    assert done, "a waiting request can never be admitted, or the run does not end"


def play(
    what: Workload,
    under: Limits,
    rules: Rules = GATED,
    replicas: int = 1,
    cost: IterationCost | None = None,
) -> tuple[list[Row], State]:
    """Run to the end and note every batch; the rows and the state at the end.

    Parameters
    ----------
    what, under, rules, replicas
        The run.
    cost
        Time of the iterations, by default one tick each.

    """
    cost = linear_cost(TICK_S) if cost is None else cost
    state = initial_state(what, replicas, under, rules, cost)
    rows: list[Row] = []

    def note(_batch: Batch, r: int, slot: int) -> None:
        n, stacked = state.replica[r, RUNNING], state.replica[r, STACKED]
        tokens = zip(state.running[r, :n].tolist(), state.scheduled[r, :n].tolist(), strict=True)
        rows.append(
            Row(
                tick=int(state.slot[r, slot, STARTED]) / TICK_PS,
                replica=r,
                batch=[(request, new) for request, new in tokens if new > 0],
                free=int(state.replica[r, FREE_BLOCKS]),
                waiting_first=state.preempted[r, :stacked][::-1].tolist(),
            )
        )

    watch(state, under, rules, cost, note)
    return rows, state


def ticks(state: State, column: int) -> list[float]:
    """One column of the request times, in ticks."""
    return [int(time_ps) / TICK_PS for time_ps in state.time_ps[:, column]]
