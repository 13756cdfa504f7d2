"""Bounds are admissible: at no point of any run do they exceed what the run comes to.

Costs are random: monotone, as ``IterationCost`` promises, but neither convex nor smooth, with
jumps and plateaus. A bound that leaned on the shape of the real kernel tables would fail here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.bounds import run_bounds
from planner.candidates import Trace
from planner.floors import CostFloors, RequestFloors, cache_tokens, cacheable_tokens
from planner.plan_floors import PlanFloors
from planner.resolve import resolve
from planner.scenario import Scenario
from planner.space import enumerate_space
from planner.support import Support
from simulator.kvcache import blocks_for
from simulator.plan import BatchingLimits, Plan, Shape
from simulator.rules import Rules
from simulator.timing import one_stage, stages_of
from simulator.workload import Workload
from tests.builders import TICK_S, Case, cases, limits, linear_cost, workload
from tests.problems import mapping, random_sections

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from planner.bounds import Bounds
    from simulator.run import Run, RunResult
    from simulator.timing import IterationCost

MAX_TOKENS, MAX_SEQS, MAX_CONTEXT = 80, 16, 256


def rising(rng: np.random.Generator, size: int, step_s: float) -> npt.NDArray[np.float64]:
    """A random array that never falls: plateaus, small steps and a few jumps."""
    share = rng.choice([0.05, 0.5, 1.0])
    steps = rng.exponential(step_s, size) * (rng.random(size) < share)
    steps[rng.integers(size, size=2)] += step_s * rng.choice([0.0, 5.0, 50.0])
    return np.cumsum(steps)


def random_pipeline(rng: np.random.Generator) -> IterationCost:
    """A cost of one to three stages of one or two kinds, often uneven."""
    first = random_cost(rng)
    stages = rng.integers(0, 2, rng.choice([1, 1, 2, 3]))
    if len(stages) == 1:
        return first
    second = random_cost(rng, first.context_knots)
    return stages_of([first, second], stages, rising(rng, MAX_TOKENS + 1, 1e-5))


def random_cost(
    rng: np.random.Generator, knots: npt.NDArray[np.int64] | None = None
) -> IterationCost:
    """A cost that keeps every promise of ``IterationCost`` and no other."""
    scale_s = 10.0 ** rng.uniform(-5, -3, 4)
    base_s = rng.choice([0.0, 1e-3])
    decode_s = base_s + rising(rng, MAX_TOKENS + 1, scale_s[0])
    mixed_s = decode_s * rng.choice([1.0, 1.3])
    mixed_s += rng.choice([0.0, 1.0]) * rising(rng, MAX_TOKENS + 1, scale_s[0])
    if knots is None:
        knots = np.unique(np.append(rng.integers(2, MAX_CONTEXT, 5), [1, rng.choice([64, 256])]))
    attention_s = rng.exponential(scale_s[1], (MAX_SEQS + 1, len(knots)))
    attention_s[0] = attention_s[0, 0]  # row 0 is the launch alone
    for axis in (0, 1):
        attention_s = np.maximum.accumulate(attention_s, axis=axis)
    prefill_s = rising(rng, MAX_CONTEXT + 1, scale_s[2])
    mixed_floor_s = float(rng.choice([0.0, 2e-3]))
    return one_stage(
        decode_s=decode_s,
        mixed_s=mixed_s,
        sampled_s=np.concatenate([[0.0], rising(rng, MAX_SEQS, scale_s[3])]),
        attention_s=np.ascontiguousarray(attention_s),
        context_knots=knots,
        prefill_s=prefill_s - prefill_s[0],
        decode_floor_s=float(rng.choice([0.0, 1.0])) * mixed_floor_s,
        mixed_floor_s=mixed_floor_s,
        iteration_host_s=float(rng.choice([0.0, 1e-4])),
    )


def floors_of(case: Case) -> RequestFloors:
    """Floors of a case's cost and requests."""
    limits, rules = case.limits, case.rules
    support = Support.of(
        case.cost,
        min(limits.max_num_batched_tokens, case.cost.max_tokens),
        limits.max_num_seqs,
        cache_tokens(limits, rules),
        full_tokens=(limits.max_num_batched_tokens,),
        keeps_blocks=rules.prefix_caching,
    )
    costs = CostFloors.of(case.cost, support, keeps_blocks=rules.prefix_caching)
    return RequestFloors.of(costs, case.workload, cacheable_tokens(case.workload, rules))


def random_case(rng: np.random.Generator) -> Case:
    """Longer prompts and more requests than ``cases``: queues build up, KV runs out."""
    n = int(rng.integers(5, 40))
    prompts = rng.integers(1, rng.choice([4, 40, 160]), n)
    outputs = rng.integers(1, rng.choice([2, 20, 80]), n)
    gap_s = rng.choice([0.0, 1e-3, 1e-2])
    arrival_s = np.cumsum(rng.exponential(1.0, n) * gap_s)
    concurrency = int(rng.choice([0, 0, 1, 5]))
    if concurrency:
        arrival_s = np.zeros(n)
    longest = int((prompts + outputs).max())
    seqs = int(rng.integers(1, MAX_SEQS + 1))
    cost = random_pipeline(rng)
    return Case(
        Workload(arrival_s, prompts, outputs, concurrency),
        int(rng.integers(1, 4)),
        limits(
            seqs=seqs,
            tokens=int(rng.integers(seqs, MAX_TOKENS + 1)),
            blocks=blocks_for(longest, 4) + int(rng.choice([0, 3, 20, 1000])),
            ingress_s=float(rng.choice([0.0, 9e-3])),
        ),
        cost,
        Rules(
            reserve_full_prompt=bool(rng.random() < 0.5),
            late_results=bool(rng.random() < 0.5),
            batches_in_flight=len(cost.stages),
        ),
    )


def check_below(bounds: Bounds, result: RunResult) -> None:
    """No bound exceeds the finished run's value, and both leave the same TPOTs undefined.

    Both come from whole picoseconds by the same formulas, so no tolerance is needed.
    """
    for bound_s, value_s in (
        (bounds.values.ttft_s, result.values.ttft_s),
        (bounds.values.e2e_s, result.values.e2e_s),
        (np.nan_to_num(bounds.values.tpot_s), np.nan_to_num(result.values.tpot_s)),
        (np.array([bounds.makespan_s]), np.array([result.makespan_s])),
    ):
        above = np.flatnonzero(bound_s > value_s)
        assert len(above) == 0, (above, bound_s, value_s)
    assert np.array_equal(np.isnan(bounds.values.tpot_s), np.isnan(result.values.tpot_s))


def check_run(run: Run, floors: RequestFloors, result: RunResult, stride: int) -> None:
    """Look at the bounds every ``stride`` iterations, first before the run begins."""
    check_below(run_bounds(run, floors), result)
    while not run.advance(stride):
        check_below(run_bounds(run, floors), result)
    final = run_bounds(run, floors)
    for metric in ("ttft", "tpot", "e2e"):
        assert np.array_equal(final.values.of(metric), result.values.of(metric))
    assert final.makespan_s == result.makespan_s


@given(case=cases(), seed=st.integers(0, 2**32 - 1), stride=st.sampled_from([1, 2, 7]))
@settings(max_examples=150, deadline=None)
def test_bounds_hold_in_small_runs(case: Case, seed: int, stride: int) -> None:
    """At each cut of a small run under a random cost, bounds are admissible; at its end, exact."""
    cost = random_cost(np.random.default_rng(seed))
    case = replace(case, cost=cost)
    check_run(case.start(), floors_of(case), case.start().finish(), stride)


@given(seed=st.integers(0, 2**32 - 1), stride=st.sampled_from([1, 11, 60]))
@settings(max_examples=150, deadline=None)
def test_bounds_hold_in_queues(seed: int, stride: int) -> None:
    """The same with queues, long prompts in many chunks, and preemptions."""
    case = random_case(np.random.default_rng(seed))
    check_run(case.start(), floors_of(case), case.start().finish(), stride)


def test_random_cases_preempt() -> None:
    """The random cases do what the properties are about: preempt, queue and cut prompts."""
    results = [random_case(np.random.default_rng(seed)).start().finish() for seed in range(200)]
    assert sum(r.preemptions > 0 for r in results) > 20
    assert sum(r.usage.seats_bound for r in results) > 20
    assert sum(r.usage.tokens_bound for r in results) > 50


def test_recomputing_can_be_cheaper_than_decoding() -> None:
    """A preempted request gets its next token from a recomputation that reads no cache.

    Blocks of one token, 43 of them; an iteration takes a tick per cached token that decodes read.
    A (prompt 1, output 4) and B (40, 3) are admitted together and hold 41 blocks. Iteration 2
    decodes both: 2 + 41 ticks, all blocks held. Iteration 3: A needs a block and preempts B: 3
    ticks. Iteration 4: A's last token, 4 ticks. Then B recomputes its 42 tokens and emits its
    last: no cache is read. B takes 50 ticks; decoding alone would have read 41 + 42.
    """
    case = Case(
        workload([1, 40], [4, 3]),
        1,
        limits(blocks=43, block_tokens=1),
        linear_cost(0.0, context_s=TICK_S),
    )
    result = case.start().finish()
    assert result.preemptions == 1
    assert result.values.e2e_s[1] == 50 * TICK_S
    check_run(case.start(), floors_of(case), result, stride=1)


@pytest.mark.parametrize("seed", range(12))
def test_bounds_hold_for_compiled_costs(seed: int, tmp_path: Path) -> None:
    """Bounds from the kernel tables' costs hold for every plan of a random small scenario."""
    sections = random_sections(seed, tmp_path)
    problem = resolve(Scenario.model_validate(mapping(**sections), base_dir=tmp_path))
    plans = enumerate_space(problem).plans
    known = PlanFloors.of(problem, plans)
    for plan in plans:
        run, result = problem.start(plan), problem.start(plan).finish()
        family = known.of_family(plan.shape)
        check_below(run_bounds(run, family.floors, family.limits), result)
        check_run(run, known.of_class(plan.shape, plan.limits).floors, result, stride=40)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_compiled_costs_keep_their_promises(tp: int, tmp_path: Path) -> None:
    """Compiled arrays never fall, and prompt tokens never cost less than decode tokens."""
    problem = resolve(Scenario.model_validate(mapping(**random_sections(0, tmp_path))))
    for seqs, tokens in ((2, 8), (8, 512), (1024, 8192)):
        cost = problem.compile(Shape(tp), BatchingLimits(seqs, tokens))
        for array in (cost.decode_ps, cost.mixed_ps, cost.sampled_ps, cost.prefill_ps):
            assert np.all(np.diff(array) >= 0)
        assert np.all(np.diff(cost.attention_ps, axis=1) >= 0)
        assert np.all(np.diff(cost.attention_ps, axis=2) >= 0)
        assert np.all(cost.mixed_ps >= cost.decode_ps)
        assert np.all(cost.mixed_floor_ps >= cost.decode_floor_ps)


def twin_of(case: Case, rng: np.random.Generator) -> Case:
    """The same replicas under other limits, and a cost that differs where batches are large."""
    work = case.workload
    least = blocks_for(int((work.prompt_tokens + work.output_tokens).max()), 4)
    fewer = int(rng.integers(least, case.limits.num_blocks + 1))
    blocks = case.limits.num_blocks + int(rng.choice([0, 0, 1, 30]))
    peak = case.start().finish().usage.blocks  # what is held, but maybe not what is demanded
    own = case.limits
    seqs = int(rng.choice([own.max_num_seqs, rng.integers(1, own.max_num_seqs + 5)]))
    seqs = min(seqs, MAX_SEQS, own.max_num_batched_tokens)
    tokens = int(rng.choice([own.max_num_batched_tokens, rng.integers(seqs, MAX_TOKENS + 1)]))
    changed = own._replace(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        num_blocks=int(rng.choice([blocks, fewer, max(least, peak)])),
    )
    cost = case.cost
    if rng.random() < 0.5:
        beyond = int(rng.integers(2, MAX_TOKENS))
        decode_ps, mixed_ps = cost.decode_ps.copy(), cost.mixed_ps.copy()
        decode_ps[:, beyond:] += 10**9
        mixed_ps[:, beyond:] += 10**9
        cost = cost._replace(decode_ps=decode_ps, mixed_ps=mixed_ps)
    return replace(case, limits=changed, cost=cost)


def plan_of(case: Case) -> Plan:
    """The plan that a case stands for; its width does not matter here."""
    own = case.limits
    batching = BatchingLimits(own.max_num_seqs, own.max_num_batched_tokens)
    return Plan(case.replicas, Shape(1), batching)


def trace_of(case: Case, run: Run) -> Trace:
    """What is known of ``case``'s plan after ``run`` has come so far."""
    return Trace(plan_of(case), case.limits, case.cost, run.usage())


def test_twins_share_their_runs() -> None:
    """A prefix that is the same for another plan bounds that plan; a whole run equals its run."""
    prefixes, wholes = 0, 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        case = random_case(rng)
        other = twin_of(case, rng)
        if other.limits == case.limits:
            continue
        theirs = other.start().finish()
        run, done = case.start(), False
        while not done:
            done = run.advance(5)
            if not trace_of(case, run).same_for(plan_of(other), other.limits, other.cost):
                break
            check_below(run_bounds(run, floors_of(other), other.limits), theirs)
            prefixes += not done
            if done:
                assert run.result().trajectory_hash() == theirs.trajectory_hash()
                wholes += 1
    assert prefixes > 200
    assert wholes > 30


def test_a_bound_limit_makes_no_twin() -> None:
    """One seat held a request back, so two seats are not the same; of 8 or 9 both are idle."""
    rng = np.random.default_rng(0)
    cost = random_cost(rng)
    work = Workload(np.zeros(4), np.full(4, 5), np.full(4, 3))

    def same(mine: int, theirs: int) -> bool:
        case, other = (Case(work, 1, limits(seqs=seqs), cost) for seqs in (mine, theirs))
        run = case.start()
        run.finish()
        return trace_of(case, run).same_for(plan_of(other), other.limits, cost)

    assert not same(1, 2)
    assert same(8, 9)
    assert same(8, 4)  # four requests: four seats are all that was used
    assert not same(8, 3)
