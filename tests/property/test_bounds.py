"""Bounds are admissible: at no point of any run do they exceed what the run comes to.

Costs are random: monotone, as ``IterationCost`` promises, but neither convex nor smooth, with
jumps and plateaus. A bound that leaned on the shape of the real kernel tables would fail here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.bounds import CostFloors, run_bounds
from planner.candidates import Trace
from planner.resolve import resolve
from planner.scenario import Scenario
from planner.space import enumerate_space
from simulator.kvcache import blocks_for
from simulator.plan import BatchingLimits, Plan
from simulator.run import Run
from simulator.timing import IterationCost
from simulator.workload import Workload
from tests.builders import TICK_S, cases, limits, linear_cost, workload
from tests.problems import mapping, random_sections

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from planner.bounds import Bounds
    from simulator.run import RunResult
    from simulator.state import Limits
    from tests.builders import Case

TOLERANCE = 1e-9
"""Relative; the objective takes off as much before it compares."""

MAX_TOKENS, MAX_SEQS, MAX_CONTEXT = 80, 16, 256


def rising(rng: np.random.Generator, size: int, step_s: float) -> npt.NDArray[np.float64]:
    """A random array that never falls: plateaus, small steps and a few jumps."""
    share = rng.choice([0.05, 0.5, 1.0])
    steps = rng.exponential(step_s, size) * (rng.random(size) < share)
    steps[rng.integers(size, size=2)] += step_s * rng.choice([0.0, 5.0, 50.0])
    return np.cumsum(steps)


def random_cost(rng: np.random.Generator) -> IterationCost:
    """A cost that keeps every promise of ``IterationCost`` and no other."""
    scale_s = 10.0 ** rng.uniform(-5, -3, 4)
    base_s = rng.choice([0.0, 1e-3])
    decode_s = base_s + rising(rng, MAX_TOKENS + 1, scale_s[0])
    mixed_s = decode_s * rng.choice([1.0, 1.3])
    mixed_s += rng.choice([0.0, 1.0]) * rising(rng, MAX_TOKENS + 1, scale_s[0])
    knots = np.unique(np.append(rng.integers(2, MAX_CONTEXT, 5), [1, rng.choice([64, 256])]))
    attention_s = rng.exponential(scale_s[1], (MAX_SEQS + 1, len(knots)))
    attention_s[0] = attention_s[0, 0]  # row 0 is the launch alone
    for axis in (0, 1):
        attention_s = np.maximum.accumulate(attention_s, axis=axis)
    prefill_s = rising(rng, MAX_CONTEXT + 1, scale_s[2])
    mixed_floor_s = float(rng.choice([0.0, 2e-3]))
    return IterationCost(
        decode_s=decode_s,
        mixed_s=mixed_s,
        sampled_s=np.concatenate([[0.0], rising(rng, MAX_SEQS, scale_s[3])]),
        attention_s=np.ascontiguousarray(attention_s),
        context_knots=knots.astype(np.float64),
        prefill_s=prefill_s - prefill_s[0],
        decode_floor_s=float(rng.choice([0.0, 1.0])) * mixed_floor_s,
        mixed_floor_s=mixed_floor_s,
        iteration_host_s=float(rng.choice([0.0, 1e-4])),
    )


@dataclass(frozen=True)
class Setting:
    """What a run needs."""

    workload: Workload
    replicas: int
    limits: Limits
    cost: IterationCost = field(repr=False)

    def start(self) -> Run:
        """A fresh run."""
        return Run(self.workload, self.replicas, self.limits, self.cost)

    def floors(self) -> CostFloors:
        """Floors of its cost."""
        return CostFloors.of(
            self.cost, self.limits.max_num_batched_tokens, self.limits.max_num_seqs
        )


def random_setting(rng: np.random.Generator) -> Setting:
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
    return Setting(
        Workload(arrival_s, prompts, outputs, concurrency),
        int(rng.integers(1, 4)),
        limits(
            seqs=seqs,
            tokens=int(rng.integers(seqs, MAX_TOKENS + 1)),
            blocks=blocks_for(longest, 4) + int(rng.choice([0, 3, 20, 1000])),
            reserve=bool(rng.random() < 0.5),
            ingress_s=float(rng.choice([0.0, 9e-3])),
        ),
        random_cost(rng),
    )


def check_below(bounds: Bounds, result: RunResult) -> None:
    """No bound exceeds the finished run's value, and both leave the same TPOTs undefined."""
    for bound_s, value_s in (
        (bounds.values.ttft_s, result.values.ttft_s),
        (bounds.values.e2e_s, result.values.e2e_s),
        (np.nan_to_num(bounds.values.tpot_s), np.nan_to_num(result.values.tpot_s)),
        (np.array([bounds.makespan_s]), np.array([result.makespan_s])),
    ):
        excess_s = bound_s - value_s * (1 + TOLERANCE)
        # Latencies are differences of times that are rounded at the size of the clock.
        assert excess_s.max() <= 1e-14, (int(excess_s.argmax()), bound_s, value_s)
    assert np.array_equal(np.isnan(bounds.values.tpot_s), np.isnan(result.values.tpot_s))


def check_run(run: Run, floors: CostFloors, result: RunResult, stride: int) -> None:
    """Look at the bounds every ``stride`` iterations, first before the run begins."""
    check_below(run_bounds(run, floors), result)
    while not run.advance(stride):
        check_below(run_bounds(run, floors), result)
    final = run_bounds(run, floors)
    for metric in ("ttft", "tpot", "e2e"):
        np.testing.assert_allclose(final.values.of(metric), result.values.of(metric), rtol=1e-9)
    assert final.makespan_s == pytest.approx(result.makespan_s, rel=1e-9)


@given(case=cases(), seed=st.integers(0, 2**32 - 1), stride=st.sampled_from([1, 2, 7]))
@settings(max_examples=150, deadline=None)
def test_bounds_hold_in_small_runs(case: Case, seed: int, stride: int) -> None:
    """At each cut of a small run under a random cost, bounds are admissible; at its end, exact."""
    cost = random_cost(np.random.default_rng(seed))
    setting = Setting(case.workload, case.replicas, case.limits, cost)
    check_run(setting.start(), setting.floors(), setting.start().finish(), stride)


@given(seed=st.integers(0, 2**32 - 1), stride=st.sampled_from([1, 11, 60]))
@settings(max_examples=150, deadline=None)
def test_bounds_hold_in_queues(seed: int, stride: int) -> None:
    """The same with queues, long prompts in many chunks, and preemptions."""
    setting = random_setting(np.random.default_rng(seed))
    check_run(setting.start(), setting.floors(), setting.start().finish(), stride)


def test_random_settings_preempt() -> None:
    """The random settings do what the properties are about: preempt, queue and cut prompts."""
    results = [random_setting(np.random.default_rng(seed)).start().finish() for seed in range(200)]
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
    setting = Setting(
        workload([1, 40], [4, 3]),
        1,
        limits(blocks=43, block_tokens=1),
        linear_cost(0.0, context_s=TICK_S),
    )
    result = setting.start().finish()
    assert result.preemptions == 1
    assert result.values.e2e_s[1] == 50 * TICK_S
    check_run(setting.start(), setting.floors(), result, stride=1)


@pytest.mark.parametrize("seed", range(12))
def test_bounds_hold_for_compiled_costs(seed: int, tmp_path: Path) -> None:
    """Bounds from the kernel tables' costs hold for every plan of a random small scenario."""
    sections = random_sections(seed, tmp_path)
    problem = resolve(Scenario.model_validate(mapping(**sections), base_dir=tmp_path))
    for plan in enumerate_space(problem).plans:
        run = problem.start(plan)
        floors = CostFloors.of(
            run.cost, plan.limits.max_num_batched_tokens, plan.limits.max_num_seqs
        )
        check_run(run, floors, problem.start(plan).finish(), stride=40)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_compiled_costs_keep_their_promises(tp: int, tmp_path: Path) -> None:
    """Compiled arrays never fall, and prompt tokens never cost less than decode tokens."""
    problem = resolve(Scenario.model_validate(mapping(**random_sections(0, tmp_path))))
    for seqs, tokens in ((2, 8), (8, 512), (1024, 8192)):
        cost = problem.compiler.compile(tp, BatchingLimits(seqs, tokens))
        for array in (cost.decode_s, cost.mixed_s, cost.sampled_s, cost.prefill_s):
            assert np.all(np.diff(array) >= 0)
        assert np.all(np.diff(cost.attention_s, axis=0) >= 0)
        assert np.all(np.diff(cost.attention_s, axis=1) >= 0)
        assert np.all(cost.mixed_s >= cost.decode_s)
        assert cost.mixed_floor_s >= cost.decode_floor_s


def twin_of(setting: Setting, rng: np.random.Generator) -> Setting:
    """The same replicas under other limits, and a cost that differs where batches are large."""
    work = setting.workload
    least = blocks_for(int((work.prompt_tokens + work.output_tokens).max()), 4)
    fewer = int(rng.integers(least, setting.limits.num_blocks + 1))
    blocks = setting.limits.num_blocks + int(rng.choice([0, 0, 1, 30]))
    peak = setting.start().finish().usage.blocks  # what is held, but maybe not what is demanded
    own = setting.limits
    seqs = int(rng.choice([own.max_num_seqs, rng.integers(1, own.max_num_seqs + 5)]))
    seqs = min(seqs, MAX_SEQS, own.max_num_batched_tokens)
    tokens = int(rng.choice([own.max_num_batched_tokens, rng.integers(seqs, MAX_TOKENS + 1)]))
    changed = own._replace(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        num_blocks=int(rng.choice([blocks, fewer, max(least, peak)])),
    )
    cost = setting.cost
    if rng.random() < 0.5:
        beyond = int(rng.integers(2, MAX_TOKENS))
        decode_s, mixed_s = cost.decode_s.copy(), cost.mixed_s.copy()
        decode_s[beyond:] += 1e-3
        mixed_s[beyond:] += 1e-3
        cost = cost._replace(decode_s=decode_s, mixed_s=mixed_s)
    return Setting(setting.workload, setting.replicas, changed, cost)


def plan_of(setting: Setting) -> Plan:
    """The plan that a setting stands for; its width does not matter here."""
    own = setting.limits
    batching = BatchingLimits(own.max_num_seqs, own.max_num_batched_tokens)
    return Plan(setting.replicas, 1, batching)


def trace_of(setting: Setting, run: Run) -> Trace:
    """What is known of ``setting``'s plan after ``run`` has come so far."""
    return Trace(plan_of(setting), setting.limits, setting.cost, run.usage())


def test_twins_share_their_runs() -> None:
    """A prefix that is the same for another plan bounds that plan; a whole run equals its run."""
    prefixes, wholes = 0, 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        setting = random_setting(rng)
        other = twin_of(setting, rng)
        if other.limits == setting.limits:
            continue
        theirs = other.start().finish()
        run, done = setting.start(), False
        while not done:
            done = run.advance(5)
            if not trace_of(setting, run).same_for(plan_of(other), other.limits, other.cost):
                break
            check_below(run_bounds(run, other.floors()), theirs)
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
        setting, other = (Setting(work, 1, limits(seqs=seqs), cost) for seqs in (mine, theirs))
        run = setting.start()
        run.finish()
        return trace_of(setting, run).same_for(plan_of(other), other.limits, cost)

    assert not same(1, 2)
    assert same(8, 9)
    assert same(8, 4)  # four requests: four seats are all that was used
    assert not same(8, 3)
