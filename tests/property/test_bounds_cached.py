"""Bounds with a prefix cache, sessions and every router: never above what the run comes to."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from planner.floors import cacheable_tokens
from simulator.prefix_cache import FOUND_TOKENS
from simulator.rules import ROUTERS
from simulator.state import PREEMPTIONS
from simulator.workload import Workload
from tests.property.test_bounds import check_run, floors_of
from tests.property.test_bounds import random_case as plain_case
from tests.property.test_prefix_cache import random_case as cached_case

if TYPE_CHECKING:
    from tests.builders import Case


@given(seed=st.integers(0, 2**32 - 1), stride=st.sampled_from([1, 7, 40]))
@settings(max_examples=150, deadline=None)
def test_bounds_hold_with_a_prefix_cache(seed: int, stride: int) -> None:
    """Prompts that are found take no time, and preempted requests find their own blocks."""
    case = cached_case(np.random.default_rng(seed))
    check_run(case.start(), floors_of(case), case.start().finish(), stride)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_no_first_admission_finds_more_than_was_cacheable(seed: int) -> None:
    """The most that a request can find covers what it found when it was first admitted."""
    case = cached_case(np.random.default_rng(seed))
    run = case.start()
    run.finish()
    found = run.state.pool.request[:, FOUND_TOKENS]
    fresh = run.state.request[:, PREEMPTIONS] == 0
    assert np.all(found[fresh] <= cacheable_tokens(case.workload, case.rules)[fresh])


def session_case(rng: np.random.Generator) -> Case:
    """A random case whose requests are turns of sessions that begin in a random order."""
    case = plain_case(rng)
    n = case.workload.num_requests
    after = np.full(n, -1)
    open_turns: list[int] = []
    for i in range(n):
        if open_turns and rng.random() < 0.6:
            after[i] = open_turns.pop(int(rng.integers(len(open_turns))))
        open_turns.append(i)
    gap_s = float(rng.choice([0.0, 1e-3, 1e-2]))
    arrival_s = np.where(after < 0, np.cumsum(rng.exponential(1.0, n)) * gap_s, 0.0)
    think_s = np.where(after < 0, 0.0, rng.exponential(gap_s, n) * (rng.random(n) < 0.7))
    work = Workload(
        arrival_s,
        case.workload.prompt_tokens,
        case.workload.output_tokens,
        after=after,
        think_s=think_s,
    )
    return replace(case, workload=work)


@given(seed=st.integers(0, 2**32 - 1), stride=st.sampled_from([1, 7, 40]))
@example(seed=453, stride=1)
@example(seed=778, stride=1)
@settings(max_examples=100, deadline=None)
def test_bounds_hold_in_sessions(seed: int, stride: int) -> None:
    """Turns that are sent late are served late; the examples have turns sent at one instant."""
    case = session_case(np.random.default_rng(seed))
    check_run(case.start(), floors_of(case), case.start().finish(), stride)


@given(seed=st.integers(0, 2**32 - 1), router=st.integers(0, len(ROUTERS) - 2))
@settings(max_examples=100, deadline=None)
def test_bounds_hold_for_every_router(seed: int, router: int) -> None:
    """What is not routed yet is bounded by its replica only where that is known."""
    case = plain_case(np.random.default_rng(seed))
    case = replace(case, rules=case.rules._replace(router=router))
    check_run(case.start(), floors_of(case), case.start().finish(), 11)
