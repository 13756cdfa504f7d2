"""The loop for attention groups in lockstep: each schedules alone, all begin and end together.

A replica with attention data parallel (``Shape.dp`` above 1) has a scheduler in each of its
attention groups, which forms batches by the engine's policy from a queue, seats and pages of its
own. The groups' iterations begin together, when all have finished the last one, and last as long
as `simulator.lockstep_cost.lockstep_ps` says; a group without work runs along. They stop when none
has work.

Groups are numbered through all replicas, replica ``g`` of R having numbers ``g``, ``g + R``,
``g + 2 R`` and so on: a router that takes groups in turn takes replicas in turn, and the groups of
each in turn. Every table of ``State`` has a row per group here.

TensorRT-LLM can hold prompts back until every group has one (``Lockstep.hold_iterations``): groups
that compute prompts at different times make all others wait each time.

What engines do besides: vLLM goes on with dummy batches for up to 31 iterations after the last
request (v1/engine/core.py, the all-reduce that says that all are done), and its router knows of the
groups' loads every 100 ms; TensorRT-LLM deals requests out to groups when one can take them, not
when they arrive. None of that is modelled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from simulator.compiled import called, compiled, inner
from simulator.engine import clear_batch, finish_batch, first_replica, let_leave
from simulator.iteration_log import log_iteration
from simulator.lockstep_cost import (
    BATCH_COLUMNS,
    CONTEXT,
    DECODES,
    HAS_PREFILL,
    PREFILL_PS,
    SAMPLED,
    TOKENS,
    lockstep_ps,
)
from simulator.policies import schedule
from simulator.policies.batch import Batch
from simulator.sends import next_send_ps, route_until
from simulator.state import (
    ENDS,
    FINISHED,
    HEAD,
    IN_FLIGHT,
    ITERATIONS,
    LEAVING_SEATS,
    NEVER_PS,
    OLDEST,
    RUNNING,
    SEEN,
    STACKED,
    STARTED,
    STUCK,
    TAIL,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from simulator.engine import Gaps
    from simulator.iteration_log import IterationLog
    from simulator.lockstep_cost import Lockstep
    from simulator.rules import Rules
    from simulator.state import Limits, State
    from simulator.timing import IterationCost

    Ints = npt.NDArray[np.int64]

_FOR_ALL, _FOR_MORE = range(2)  # columns of Groups.waits


class Groups(NamedTuple):
    """What the loop keeps of D groups of each of R replicas beside the state.

    Attributes
    ----------
    batches
        (D, 6) batches being formed, columns of `simulator.lockstep_cost`.
    waits
        (R, 2) iterations for which prompts have been held back: for a prompt in every group, and
        for more of them.

    """

    batches: Ints
    waits: Ints


def empty_groups(replicas: int, groups: int) -> Groups:
    """Nothing formed, nobody waiting."""
    return Groups(np.zeros((groups, BATCH_COLUMNS), np.int64), np.zeros((replicas, 2), np.int64))


@inner
def _seen(state: State, r: int, late: bool) -> int:
    """Position in group ``r``'s queue up to which its scheduler sees requests."""
    seen: int = state.slot[r, state.replica[r, OLDEST], SEEN] if late else NEVER_PS
    return seen


@inner
def _holds_back(
    state: State, limits: Limits, together: Lockstep, groups: Groups, first: int, late: bool
) -> bool:
    """Whether no group may admit a prompt now, by TensorRT-LLM's ``attention_dp_config``.

    _torch/pyexecutor/py_executor.py, ``_balance_adp_requests``. A group without requests has a
    dummy that generates. Whether a waiting prompt finds pages is left out.
    """
    if together.hold_iterations == 0:
        return False
    replica, waits = state.replica, groups.waits
    stride = waits.shape[0]
    all_can, all_generate = True, True
    for d in range(groups.batches.shape[0]):
        r = first + d * stride
        waiting = replica[r, STACKED] > 0 or replica[r, HEAD] < min(
            _seen(state, r, late), replica[r, TAIL]
        )
        seated = replica[r, RUNNING] + replica[r, LEAVING_SEATS]
        all_can = all_can and waiting and seated < limits.max_num_seqs
        all_generate = all_generate and (replica[r, RUNNING] > 0 or not waiting)
    if all_can:
        waits[first, _FOR_ALL] = 0
        waits[first, _FOR_MORE] += 1
        if all_generate and waits[first, _FOR_MORE] <= together.gather_iterations:
            return True
        waits[first, _FOR_MORE] = 0
        return False
    waits[first, _FOR_ALL] += 1
    if all_generate and waits[first, _FOR_ALL] < together.hold_iterations:
        return True
    waits[first, _FOR_ALL] = 0
    return False


@inner
def _form_batches(
    state: State,
    limits: Limits,
    rules: Rules,
    cost: IterationCost,
    together: Lockstep,
    groups: Groups,
    first: int,
    late: bool,
) -> tuple[int, bool]:
    """Let every group of the replica whose first one is ``first`` form a batch.

    Returns
    -------
    tokens, left
        Of all batches, and whether a finished request left what it held.

    """
    batches, stride = groups.batches, groups.waits.shape[0]
    holds = _holds_back(state, limits, together, groups, first, late)
    total, left = 0, False
    for d in range(batches.shape[0]):
        r = first + d * stride
        clear_batch(state, r)
        seen = 0 if holds else _seen(state, r, late)
        batch = schedule(state, limits, rules, cost, r, seen)
        left |= let_leave(state, r)
        total += batch.tokens
        batches[d, TOKENS] = batch.tokens
        batches[d, DECODES] = batch.decodes
        batches[d, CONTEXT] = batch.context_tokens
        batches[d, SAMPLED] = batch.sampled
        batches[d, PREFILL_PS] = state.prefill_ps[0]
        batches[d, HAS_PREFILL] = batch.has_prefill
    return total, left


@called
def _start(state: State, groups: Groups, first: int, now_ps: int, end_ps: int) -> None:
    """Set all groups of a replica going; also those without work are busy until the end."""
    batches, stride = groups.batches, groups.waits.shape[0]
    for d in range(batches.shape[0]):
        r = first + d * stride
        state.slot[r, 0, STARTED] = now_ps
        state.slot[r, 0, ENDS] = end_ps
        state.slot[r, 0, SEEN] = state.replica[r, TAIL]
        state.stage_ps[r, 0] = end_ps
        state.event_ps[r] = end_ps
        state.replica[r, IN_FLIGHT] = 1
        state.counters[ITERATIONS] += batches[d, TOKENS] > 0


@inner
def _step(
    state: State,
    limits: Limits,
    rules: Rules,
    cost: IterationCost,
    together: Lockstep,
    gaps: Gaps,
    log: IterationLog | None,
    groups: Groups,
    first: int,
    now_ps: int,
) -> None:
    """Let the replica whose first group is ``first`` do what it has to do at its next event."""
    batches, stride = groups.batches, groups.waits.shape[0]
    late = False
    for d in range(batches.shape[0]):
        r = first + d * stride
        if state.replica[r, IN_FLIGHT] > 0:
            finish_batch(state, limits, rules, gaps, r, now_ps)
            late = rules.late_results
    route_until(state, limits, rules, now_ps)
    tokens, is_done = 0, False
    while not is_done:
        tokens, left = _form_batches(state, limits, rules, cost, together, groups, first, late)
        is_done = tokens > 0 or not (left or late)
        late = False  # nothing to overlap with: the schedulers see everything
    if tokens == 0:
        for d in range(batches.shape[0]):
            state.event_ps[first + d * stride] = NEVER_PS
        return
    end_ps = now_ps + lockstep_ps(cost, together, batches)
    _start(state, groups, first, now_ps, end_ps)
    if log is not None:
        for d in range(batches.shape[0]):
            if batches[d, TOKENS] > 0:
                batch = Batch(
                    batches[d, TOKENS],
                    batches[d, DECODES],
                    batches[d, CONTEXT],
                    batches[d, SAMPLED],
                    batches[d, HAS_PREFILL] > 0,
                )
                log_iteration(log, state, batch, first + d * stride, 0, now_ps)


@compiled
def advance(
    state: State,
    limits: Limits,
    rules: Rules,
    cost: IterationCost,
    together: Lockstep,
    gaps: Gaps,
    groups: Groups,
    max_iterations: int,
    log: IterationLog | None = None,
) -> bool:
    """Run about ``max_iterations`` more iterations of groups, as ``engine.advance`` does.

    Parameters
    ----------
    state, limits, rules, cost, gaps, max_iterations, log
        As there, a group for a replica; one that has no work counts no iteration. An iteration of
        a replica is not cut, so there may be some more.
    together
        What the groups do in lockstep.
    groups
        What the loop keeps of them.

    Returns
    -------
    bool
        Whether every request has finished.

    """
    counters, event_ps = state.counters, state.event_ps
    stop = counters[ITERATIONS] + max_iterations
    number = groups.batches.shape[0]
    room = number * state.running.shape[1] + 1
    while counters[FINISHED] < state.request.shape[0]:
        if counters[ITERATIONS] >= stop:
            return False
        if gaps.gap_ps.size > 0 and gaps.used[0] + room > gaps.gap_ps.size:
            return False  # the caller empties the record first
        if log is not None and log.used[0] + number > log.counts.shape[0]:
            return False
        r = first_replica(event_ps)
        send_ps = next_send_ps(state, limits)
        if send_ps <= event_ps[r]:
            if send_ps == NEVER_PS:
                counters[STUCK] = 1
                return False
            route_until(state, limits, rules, send_ps)
        else:
            first = r % groups.waits.shape[0]
            _step(state, limits, rules, cost, together, gaps, log, groups, first, event_ps[r])
    return True
