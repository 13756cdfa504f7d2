"""The jump engine against the plain loop: the same state to the picosecond, for every policy."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import event, given, settings
from hypothesis import strategies as st

from simulator.rules import (
    ROUTERS,
    SARATHI,
    SGLANG,
    TRTLLM,
    VLLM_V0,
    VLLM_V1,
    Rules,
)
from simulator.run import Run
from simulator.timing import IterationCost, one_stage, stages_of
from simulator.workload import Workload
from tests.builders import TICK_S, limits, linear_cost
from tests.policies import each_policy

MAX_SEATS, MAX_TOKENS, MAX_CONTEXT = 64, 256, 512


def random_rules(rng: np.random.Generator, policy: int, stages: int) -> Rules:
    """Rules of one policy; switches that it does not read stay off."""
    common: dict[str, Any] = {
        "policy": policy,
        "late_results": bool(rng.integers(2)) and policy in (VLLM_V1, SGLANG, TRTLLM),
        "router": int(rng.integers(len(ROUTERS) - 1)),
        "batches_in_flight": int(rng.integers(1, stages + 2)) if stages > 1 else 1,
    }
    if policy == VLLM_V1:
        return Rules(
            **common,
            reserve_full_prompt=bool(rng.integers(2)),
            prompts_per_step=int(rng.choice([0, 0, 1])),
        )
    if policy in (VLLM_V0, SARATHI):
        chunked = policy == SARATHI or bool(rng.integers(2))
        return Rules(**common, chunked=chunked, watermark=0.01)
    if policy == SGLANG:
        return Rules(
            **common,
            mixed=bool(rng.integers(2)),
            prefill_tokens=int(rng.choice([0, 70])),
            new_token_ratio=0.7,
            least_new_token_ratio=0.098,
            ratio_decay=0.01,
            reserved_output_tokens=int(rng.choice([20, 4096])),
            own_micro_batches=stages > 1,
        )
    if policy == TRTLLM:
        return Rules(**common, evict=bool(rng.integers(2)), chunked=bool(rng.integers(2)))
    return Rules(**common)


def random_cost(rng: np.random.Generator) -> IterationCost:
    """Linear in everything, or with floors and a concave attention of several columns."""
    if rng.integers(2):
        steps = rng.integers(0, 3, 4)
        return linear_cost(
            TICK_S,
            token_s=TICK_S / 8 * steps[0],
            sequence_s=TICK_S / 16 * steps[1],
            context_s=TICK_S / 32 * steps[2],
            prompt_s=TICK_S / 64 * steps[3],
        )
    knots = np.array([1, 5, 17, 33, 100, MAX_CONTEXT])
    tokens = np.arange(MAX_TOKENS + 1)
    return one_stage(
        decode_s=tokens * TICK_S / 64,
        mixed_s=tokens * TICK_S / 32,
        sampled_s=np.zeros(MAX_SEATS + 1),
        attention_s=np.outer(np.arange(MAX_SEATS + 1), np.sqrt(knots)) * TICK_S / 64,
        context_knots=knots,
        prefill_s=np.arange(MAX_CONTEXT + 1) ** 1.5 * TICK_S / 64,
        decode_floor_s=float(rng.choice([0.0, 0.5, 1.0, 2.0])) * TICK_S,
        mixed_floor_s=TICK_S,
        iteration_host_s=TICK_S / 2,
    )


def random_workload(rng: np.random.Generator) -> Workload:
    """Open loop with ties, everything at once, a closed loop, or sessions."""
    n = int(rng.integers(1, 40))
    prompts, outputs = rng.integers(1, 60, n), rng.integers(1, 80, n)
    kind = rng.integers(4)
    arrivals = np.zeros(n)
    if kind == 0:
        arrivals = np.cumsum(rng.integers(0, rng.choice([2, 10, 60]), n)) * TICK_S / 4
    if kind == 1:
        return Workload(arrivals, prompts, outputs, int(rng.integers(1, n + 1)))
    if kind == 2:
        after = np.where(np.arange(n) < 1 + n // 3, -1, np.arange(n) - 1 - n // 3)
        think_s = np.where(after < 0, 0, rng.integers(0, 40, n)) * TICK_S / 4
        return Workload(arrivals, prompts, outputs, after=after, think_s=think_s)
    return Workload(arrivals, prompts, outputs)


def random_runs(rng: np.random.Generator, policy: int, stages: int) -> tuple[Run, Run]:
    """The same run for the plain loop and for the jump engine."""
    what, cost = random_workload(rng), random_cost(rng)
    rules = random_rules(rng, policy, stages)
    longest = int((what.prompt_tokens + what.output_tokens).max())
    block = int(rng.choice([1, 4, 16]))
    tokens = int(rng.integers(9, 60)) if rules.chunked else longest + int(rng.integers(0, 60))
    spare = 2 + int(rng.choice([0, 2, 10, 40, 1000]))
    under = limits(
        seqs=int(rng.integers(1, 9)),
        tokens=tokens,
        blocks=-(-longest // block) + spare,
        block_tokens=block,
        ingress_s=float(rng.choice([0, TICK_S])),
    )
    if stages > 1:
        send_s = np.arange(MAX_TOKENS + 1) * TICK_S / 64
        cost = stages_of([cost], [0] * stages, send_s)
    replicas = int(rng.integers(1, 4))
    one, other = (Run(what, replicas, under, cost, rules, plain=plain) for plain in (True, False))
    return one, other


def same_states(one: Run, other: Run) -> None:
    """Both runs have come to the same state, picosecond by picosecond."""
    for name in ("counters", "time_ps", "request", "replica", "ratio"):
        np.testing.assert_array_equal(
            getattr(one.state, name), getattr(other.state, name), err_msg=name
        )


@each_policy
@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), piece=st.sampled_from([1, 7, 50, 10**8]))
def test_both_engines_end_in_the_same_state(policy: int, seed: int, piece: int) -> None:
    """However the jump engine's run is cut into calls."""
    plain, jump = random_runs(np.random.default_rng(seed), policy, stages=1)
    plain.finish()
    while not jump.advance(piece):
        pass
    event(f"preemptions: {plain.result().preemptions > 0}")
    same_states(plain, jump)


@each_policy
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), stages=st.integers(2, 4))
def test_both_engines_agree_on_pipelines(policy: int, seed: int, stages: int) -> None:
    """Several stages and batches in flight."""
    plain, jump = random_runs(np.random.default_rng(seed), policy, stages)
    plain.finish()
    jump.finish()
    same_states(plain, jump)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), at=st.integers(1, 200))
def test_an_engine_can_take_over_from_the_other(seed: int, at: int) -> None:
    """What the jump engine leaves behind mid-run is a state that the plain loop goes on from."""
    plain, jump = random_runs(np.random.default_rng(seed), VLLM_V1, stages=1)
    done = jump.advance(at)
    jump.record_iterations()  # recording is the plain loop's
    if not done:
        jump.finish()
    plain.finish()
    same_states(plain, jump)
