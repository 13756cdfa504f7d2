"""Attention groups in lockstep: what holds for every run, and bounds that are never above it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.lockstep_cost import graph_sizes_by_tokens, least_cost, lockstep_of
from simulator.run import Run
from simulator.state import FREE_BLOCKS, GENERATED, IN_FLIGHT, RUNNING
from simulator.timing import in_s
from tests.builders import cases
from tests.lockstep import play_groups, rules_of, together
from tests.property.test_bounds import MAX_TOKENS, check_run, floors_of, random_case, rising
from tests.property.test_prefix_cache import random_case as cached_case

if TYPE_CHECKING:
    from simulator.engine_rules import Padding
    from simulator.lockstep_cost import Lockstep
    from simulator.run import RunResult
    from simulator.timing import IterationCost
    from tests.builders import Case

EXAMPLES = settings(max_examples=100, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def in_lockstep(case: Case, joined: Lockstep) -> Run:
    """A fresh run of the case with as many groups in each replica."""
    what = (case.workload, case.replicas, case.limits, case.cost, case.rules)
    return Run(*what, together=joined)


def random_groups(rng: np.random.Generator, alone: IterationCost) -> tuple[IterationCost, Lockstep]:
    """Two or three groups of one kind, padded and with graphs in every way, and the least cost."""
    groups = int(rng.integers(2, 4))
    captured = tuple(sorted({int(n) for n in rng.integers(1, MAX_TOKENS, rng.integers(0, 4))}))
    with_prompts = captured if rng.random() < 0.5 else ()
    paddings: tuple[Padding, ...] = ("none", "widest", "widest_if_half")
    rules = rules_of(
        padding=paddings[rng.integers(3)],
        padding_with_prompts=paddings[rng.integers(3)],
        idle_tokens=int(rng.integers(2)),
        hold_iterations=int(rng.choice([0, 0, 1, 4])),
        gather_iterations=int(rng.integers(3)),
    )
    tokens = alone.max_tokens
    shared_s = rising(rng, groups * tokens + 1, 10.0 ** rng.uniform(-5, -3))
    joined = lockstep_of(
        own_decode_s=in_s(alone.decode_ps[0]),
        own_mixed_s=in_s(alone.mixed_ps[0]),
        shared_decode_s=shared_s,
        shared_mixed_s=shared_s * rng.choice([1.0, 1.3]),
        decode_sizes=graph_sizes_by_tokens(captured, tokens, padded=bool(rng.integers(2))),
        mixed_sizes=graph_sizes_by_tokens(with_prompts, tokens, padded=bool(rng.integers(2))),
        groups=groups,
        rules=rules,
    )
    return least_cost(alone, joined), joined


@given(case=cases(), late=st.booleans())
@EXAMPLES
def test_one_group_is_a_replica(case: Case, late: bool) -> None:
    """A single group whose experts cost nothing runs picosecond by picosecond as the engine."""
    case = replace(case, rules=case.rules._replace(late_results=late))
    own_s = in_s(case.cost.decode_ps[0])
    alone = together(own_s, np.zeros(len(own_s)), groups=1)
    ours, theirs = in_lockstep(case, alone).finish(), case.start().finish()
    assert ours.trajectory_hash() == theirs.trajectory_hash()
    assert np.array_equal(ours.replica, theirs.replica)
    assert (ours.iterations, ours.usage) == (theirs.iterations, theirs.usage)


@given(seed=SEEDS, late=st.booleans())
@EXAMPLES
def test_groups_of_equal_work_run_as_one(seed: int, late: bool) -> None:
    """Every request twice, one for each group: both groups run as a replica with one of them."""
    case = random_case(np.random.default_rng(seed))
    work = case.workload
    if work.concurrency or len(case.cost.stages) > 1:
        return
    case = replace(case, replicas=1, rules=case.rules._replace(late_results=late))
    own_s = in_s(case.cost.decode_ps[0])
    own_mixed_s = in_s(case.cost.mixed_ps[0])
    twice = replace(
        work,
        arrival_s=np.repeat(work.arrival_s, 2),
        prompt_tokens=np.repeat(work.prompt_tokens, 2),
        output_tokens=np.repeat(work.output_tokens, 2),
    )
    none = np.zeros(len(own_s), np.int64)
    joined = lockstep_of(
        own_decode_s=own_s,
        own_mixed_s=own_mixed_s,
        shared_decode_s=np.zeros(2 * len(own_s)),
        shared_mixed_s=np.zeros(2 * len(own_s)),
        decode_sizes=none,
        mixed_sizes=none,
        groups=2,
        rules=rules_of(),
    )
    one, two = case.start().finish(), in_lockstep(replace(case, workload=twice), joined).finish()
    for group in (0, 1):
        assert np.array_equal(two.finish_s[group::2], one.finish_s)
        assert np.array_equal(two.first_token_s[group::2], one.first_token_s)


@given(seed=SEEDS)
@EXAMPLES
def test_one_group_with_a_prefix_cache_is_a_replica(seed: int) -> None:
    """Shared blocks, evictions and all."""
    case = cached_case(np.random.default_rng(seed))
    if len(case.cost.stages) > 1:
        return
    own_s = in_s(case.cost.decode_ps[0])
    none = np.zeros(len(own_s), np.int64)
    alone = lockstep_of(
        own_decode_s=own_s,
        own_mixed_s=in_s(case.cost.mixed_ps[0]),
        shared_decode_s=np.zeros(len(own_s)),
        shared_mixed_s=np.zeros(len(own_s)),
        decode_sizes=none,
        mixed_sizes=none,
        groups=1,
        rules=rules_of(),
    )
    ours, theirs = in_lockstep(case, alone).finish(), case.start().finish()
    assert ours.trajectory_hash() == theirs.trajectory_hash()
    assert np.array_equal(ours.cached_tokens, theirs.cached_tokens)


@given(seed=SEEDS, stride=st.sampled_from([1, 3, 40]))
@EXAMPLES
def test_bounds_hold(seed: int, stride: int) -> None:
    """Floors of the least cost never exceed the run, wherever it is cut; at its end all is back."""
    rng = np.random.default_rng(seed)
    case = random_case(rng)
    if len(case.cost.stages) > 1:
        return
    least, joined = random_groups(rng, case.cost)
    case = replace(case, cost=least)
    limits = case.limits
    floors = floors_of(case)
    whole = in_lockstep(case, joined)
    result = whole.finish()
    check_run(in_lockstep(case, joined), floors, result, stride)
    assert np.array_equal(whole.state.request[:, GENERATED], case.workload.output_tokens)
    if not case.rules.late_results:
        assert (whole.state.replica[:, FREE_BLOCKS] == limits.num_blocks).all()
    assert (whole.state.replica[:, RUNNING] == 0).all()


@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_compiled_and_plain_python_agree(seed: int) -> None:
    """The compiled loop ends in the state of the same code as plain Python, gaps recorded too."""
    rng = np.random.default_rng(seed)
    case = random_case(rng)
    if len(case.cost.stages) > 1 or case.replicas * case.workload.num_requests > 60:
        return
    least, joined = random_groups(rng, case.cost)
    _, state = play_groups(
        case.workload, case.limits, least, joined, case.rules, replicas=case.replicas
    )
    run = in_lockstep(replace(case, cost=least), joined)
    run.finish()
    assert np.array_equal(run.state.time_ps, state.time_ps)
    assert np.array_equal(run.state.replica[:, IN_FLIGHT], state.replica[:, IN_FLIGHT])


def test_either_engine_runs_groups_alike() -> None:
    """Groups have one loop, which both entry points take, cut anywhere or not at all."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        case = random_case(rng)
        if len(case.cost.stages) > 1:
            continue
        least, joined = random_groups(rng, case.cost)
        what = (case.workload, case.replicas, case.limits, least, case.rules)
        one, plain = Run(*what, together=joined), Run(*what, together=joined, plain=True)
        while not one.advance(7):
            pass
        assert one.result().trajectory_hash() == plain.finish().trajectory_hash()


def recorded(*, iterations: bool) -> tuple[Case, RunResult]:
    """A case of several groups and its run with gaps recorded, and iterations where asked."""
    rng = np.random.default_rng(3)
    case = random_case(rng)
    least, joined = random_groups(rng, case.cost)
    what = (case.workload, case.replicas, case.limits, least, case.rules)
    run = Run(*what, together=joined, record_gaps=True)
    if iterations:
        run.record_iterations()
    return case, run.finish()


def test_gaps_are_recorded() -> None:
    """Each token after a request's first has its gap; replicas are counted, not groups."""
    case, result = recorded(iterations=False)
    assert result.gaps is not None
    assert result.gaps[1].sum() == (case.workload.output_tokens - 1).sum()
    assert result.replica.max() < case.replicas


@pytest.mark.compiles
def test_iterations_are_recorded() -> None:
    """Batches of groups add up to all tokens; the log compiles the loop a second time."""
    case, result = recorded(iterations=True)
    assert result.log is not None
    assert len(result.log) == result.iterations
    assert result.log.sampled.sum() == case.workload.output_tokens.sum()
