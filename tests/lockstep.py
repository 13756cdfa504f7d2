"""Costs of attention groups in lockstep for tests, and their schedules in plain Python."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import numba
import numpy as np

from simulator.engine import empty_gaps
from simulator.engine_rules import LockstepRules
from simulator.iteration_log import empty_log
from simulator.lockstep import empty_groups
from simulator.lockstep_cost import lockstep_of
from simulator.state import RUNNING, initial_state
from tests.builders import GATED
from tests.schedules import TICK_PS

if TYPE_CHECKING:
    import numpy.typing as npt

    from simulator.engine_rules import Padding
    from simulator.iteration_log import IterationLog
    from simulator.lockstep_cost import Lockstep
    from simulator.policies.batch import Batch
    from simulator.rules import Rules
    from simulator.state import Limits, State
    from simulator.timing import IterationCost
    from simulator.workload import Workload

    Floats = npt.NDArray[np.float64]

_ITERATIONS = 10_000


def _plain(name: str) -> Any:
    """A module from a second copy of the simulator, imported without compiling."""

    def take_out() -> dict[str, Any]:
        names = [name for name in sys.modules if name.partition(".")[0] == "simulator"]
        return {name: sys.modules.pop(name) for name in names}

    settings: Any = numba.config
    compiled, before = take_out(), settings.DISABLE_JIT
    settings.DISABLE_JIT = True
    try:
        return importlib.import_module(name)
    finally:
        settings.DISABLE_JIT = before
        take_out()
        sys.modules.update(compiled)


_LOCKSTEP = _plain("simulator.lockstep")


def rules_of(
    *,
    padding: Padding = "none",
    padding_with_prompts: Padding = "none",
    idle_tokens: int = 0,
    hold_iterations: int = 0,
    gather_iterations: int = 0,
) -> LockstepRules:
    """Rules of an engine; limits are a group's own."""
    return LockstepRules(
        padding=padding,
        padding_with_prompts=padding_with_prompts,
        idle_tokens=idle_tokens,
        shares_seqs=False,
        shares_tokens=False,
        graphs_with_prompts=True,
        router="round_robin",
        hold_iterations=hold_iterations,
        gather_iterations=gather_iterations,
    )


def together(
    own_s: Floats,
    shared_s: Floats,
    *,
    groups: int,
    rules: LockstepRules | None = None,
    sizes: npt.NDArray[np.int64] | None = None,
) -> Lockstep:
    """What groups do in lockstep, alike with prompts and without; no graphs unless given."""
    none = np.zeros(len(own_s), np.int64)
    return lockstep_of(
        own_decode_s=own_s,
        own_mixed_s=own_s,
        shared_decode_s=shared_s,
        shared_mixed_s=shared_s,
        decode_sizes=none if sizes is None else sizes,
        mixed_sizes=none,
        groups=groups,
        rules=rules or rules_of(),
    )


class GroupRow(NamedTuple):
    """One batch of one group: start tick, group, (request, tokens) in running order."""

    tick: float
    group: int
    batch: list[tuple[int, int]]


def play_groups(
    what: Workload,
    under: Limits,
    cost: IterationCost,
    joined: Lockstep,
    rules: Rules = GATED,
    replicas: int = 1,
) -> tuple[list[GroupRow], State]:
    """Run to the end in plain Python; every batch that is not empty, and the state at the end."""
    state = initial_state(what, replicas * joined.groups, under, rules, cost)
    groups = empty_groups(replicas, joined.groups)
    rows: list[GroupRow] = []

    def note(
        _log: IterationLog, _state: State, _batch: Batch, r: int, _slot: int, now_ps: int
    ) -> None:
        n = state.replica[r, RUNNING]
        tokens = zip(state.running[r, :n].tolist(), state.scheduled[r, :n].tolist(), strict=True)
        rows.append(GroupRow(int(now_ps) / TICK_PS, int(r), [(i, k) for i, k in tokens if k > 0]))

    log, gaps = empty_log(joined.groups), empty_gaps(0)
    with mock.patch.object(_LOCKSTEP, "log_iteration", note):
        done = _LOCKSTEP.advance(state, under, rules, cost, joined, gaps, groups, _ITERATIONS, log)
    assert done, "a waiting request can never be admitted, or the run does not end"
    return rows, state
