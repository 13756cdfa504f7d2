"""The log of iterations against the state that it is taken from, on random runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import event, given, settings

import simulator.run
from simulator.state import (
    ARRIVAL,
    COMPUTED,
    ENDS,
    FINISH,
    FREE_BLOCKS,
    GENERATED,
    NEVER_PS,
    PROMPT,
    REPLICA,
    RUNNING,
    STARTED,
    initial_state,
)
from simulator.timing import in_s
from tests.builders import bytes_of, cases
from tests.schedules import watch

if TYPE_CHECKING:
    from simulator.iteration_log import Iterations
    from simulator.policies.batch import Batch
    from simulator.run import Run
    from tests.builders import Case

EXAMPLES = settings(max_examples=150, deadline=None)
ARRAYS = (
    "replica",
    "start_s",
    "end_s",
    "tokens",
    "decodes",
    "sampled",
    "running",
    "waiting",
    "free_blocks",
)


def logged_run(case: Case) -> Run:
    """A fresh run of the case that keeps every iteration."""
    run = case.start(record_gaps=True)
    run.record_iterations()
    return run


def rows(log: Iterations) -> list[tuple[float, ...]]:
    """The log, iteration by iteration."""
    return list(zip(*(getattr(log, name).tolist() for name in ARRAYS), strict=True))


@EXAMPLES
@given(case=cases())
def test_every_row_is_what_the_state_shows(case: Case) -> None:
    """Each row is read off the state again, step by step; recomputed tokens are counted too."""
    state = initial_state(case.workload, case.replicas, case.limits, case.rules, case.cost)
    expected, recomputed = [], 0
    computed = state.request[:, COMPUTED].copy()

    def note(_batch: Batch, r: int, slot: int) -> None:
        nonlocal computed, recomputed
        n = int(state.replica[r, RUNNING])
        batch, new = state.running[r, :n], state.scheduled[r, :n]
        prompt, done = state.request[batch, PROMPT], state.request[batch, COMPUTED]
        known = prompt + state.request[batch, GENERATED]
        fresh = np.zeros(len(computed), np.int64)
        fresh[batch] = new
        recomputed += int((computed + fresh - state.request[:, COMPUTED]).sum())
        computed = state.request[:, COMPUTED].copy()
        started_ps, ends_ps = state.slot[r, slot, [STARTED, ENDS]]
        sent = (state.request[:, REPLICA] == r) & (state.time_ps[:, ARRIVAL] != NEVER_PS)
        queued_ps = np.where(sent, state.time_ps[:, ARRIVAL], 0) + case.limits.ingress_ps
        waiting = sent & (queued_ps <= started_ps) & (state.time_ps[:, FINISH] == NEVER_PS)
        waiting[batch] = False
        expected.append(
            (
                r,
                float(in_s(started_ps)),
                float(in_s(ends_ps)),
                int(new.sum()),
                int(((new == 1) & (done - 1 >= prompt)).sum()),
                int((done == known).sum()),
                n,
                int(waiting.sum()),
                int(state.replica[r, FREE_BLOCKS]),
            )
        )

    watch(state, case.limits, case.rules, case.cost, note)
    result = logged_run(case).finish()
    event(f"preemptions: {min(result.preemptions, 3)}")
    assert result.log is not None
    assert rows(result.log) == expected
    once = int((case.workload.prompt_tokens + case.workload.output_tokens - 1).sum())
    assert result.log.tokens.sum() == once + recomputed


@EXAMPLES
@given(case=cases())
def test_the_log_agrees_with_the_times_of_requests(case: Case) -> None:
    """Tokens come out where iterations end, all of them, and the last end is the makespan."""
    run = logged_run(case)
    result = run.finish()
    log = result.log
    assert log is not None
    assert len(log) == result.iterations
    assert log.sampled.sum() == case.workload.output_tokens.sum()
    assert log.end_s.max() - result.arrival_s.min() == result.makespan_s
    assert (log.running.max(), log.tokens.max()) == (result.usage.seats, result.usage.tokens)
    assert case.limits.num_blocks - log.free_blocks.min() == result.usage.blocks
    assert (log.prompt_tokens >= 0).all()
    assert (log.waiting >= 0).all()
    for r in range(case.replicas):
        start_s, end_s = log.start_s[log.replica == r], log.end_s[log.replica == r]
        assert (end_s > start_s).all()
        assert (start_s[1:] >= end_s[:-1]).all()
        mine = result.replica == r
        assert np.isin(result.first_token_s[mine], end_s).all()
        assert np.isin(result.finish_s[mine], end_s).all()


@EXAMPLES
@given(case=cases())
def test_logging_changes_nothing(case: Case) -> None:
    """A run with a log goes through the states of one without, bit by bit."""
    plain = case.start(record_gaps=True)
    logged = logged_run(case)
    assert plain.finish().trajectory_hash() == logged.finish().trajectory_hash()
    assert bytes_of(plain.state) == bytes_of(logged.state)


@settings(max_examples=50, deadline=None)
@given(case=cases())
def test_a_small_buffer_gives_the_same_log(case: Case) -> None:
    """Emptying the buffer every third iteration, and cutting the run, loses nothing."""
    whole = logged_run(case).finish().log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulator.run, "_LOG_ENTRIES", 3)
        run = logged_run(case)
        while not run.advance(7):
            pass
    pieces = run.result().log
    assert whole is not None
    assert pieces is not None
    assert rows(pieces) == rows(whole)
    assert len(run._kept_log) >= len(whole) // 3
