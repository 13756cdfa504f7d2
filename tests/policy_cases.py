"""Random small runs under every batching policy: routers, sessions, pipelines and all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from hypothesis import strategies as st

from simulator.kvcache import blocks_for
from simulator.rules import (
    LEAST_LOADED,
    ROUND_ROBIN,
    SARATHI,
    SGLANG,
    SHORTEST_QUEUE,
    STATIC,
    TRTLLM,
    VLLM_V0,
    VLLM_V1,
    Rules,
)
from simulator.timing import stages_of
from simulator.workload import Workload
from tests.builders import TICK_S, Case, limits, linear_cost

if TYPE_CHECKING:
    from simulator.timing import IterationCost

MAX_TOKENS = 64
"""Of one iteration; longer than any request."""


@st.composite
def policy_rules(draw: st.DrawFn, policy: int, block_tokens: int) -> Rules:
    """Settings that an engine with this policy can have, without its pipeline and router."""
    chunked = policy == SARATHI or draw(st.booleans())
    rules = Rules(policy=policy, chunked=chunked)
    late = policy in (VLLM_V1, SGLANG, TRTLLM) and draw(st.booleans())
    if policy == VLLM_V1:
        return rules._replace(
            reserve_full_prompt=draw(st.booleans()),
            late_results=late,
            prompts_per_step=draw(st.sampled_from([0, 0, 1, 2])),
        )
    if policy in (VLLM_V0, SARATHI):
        return rules._replace(watermark=draw(st.sampled_from([0.0, 0.01, 0.2])))
    if policy == SGLANG:
        return rules._replace(
            chunk_unit=block_tokens,
            prefill_tokens=draw(st.sampled_from([0, 16, MAX_TOKENS])),
            mixed=chunked and draw(st.booleans()),
            reserve_full_prompt=True,
            new_token_ratio=0.7,
            least_new_token_ratio=0.098,
            ratio_decay=draw(st.sampled_from([0.001, 0.1])),
            reserved_output_tokens=draw(st.sampled_from([4, 4096])),
            late_results=late,
            own_micro_batches=True,
        )
    if policy == TRTLLM:
        return rules._replace(
            chunk_unit=draw(st.sampled_from([1, block_tokens])),
            evict=draw(st.booleans()),
            reserve_full_prompt=True,
            late_results=late,
        )
    assert policy == STATIC
    return rules


@st.composite
def workloads(draw: st.DrawFn, *, open_loop: bool = False, most: int = 12) -> Workload:
    """Requests that arrive in bursts, all at once, in a closed loop or in sessions."""
    n = draw(st.integers(1, most))
    lengths = st.lists(st.integers(1, 24), min_size=n, max_size=n)
    prompts, outputs = draw(lengths), draw(lengths)
    mode = draw(st.sampled_from(["open"] if open_loop else ["open", "closed", "sessions"]))
    gaps = draw(st.lists(st.sampled_from([0, 0, 1, 3, 12]), min_size=n, max_size=n))
    arrival_s = np.zeros(n) if mode == "closed" else np.cumsum(gaps) * TICK_S
    after, think_s = np.zeros(0, np.int64), np.zeros(0)
    if mode == "sessions":
        # Each request may follow any earlier one that nobody follows yet.
        after = np.full(n, -1)
        for i in range(1, n):
            free = [-1, *(j for j in range(i) if j not in after[:i])]
            after[i] = draw(st.sampled_from(free))
        thoughts = draw(st.lists(st.sampled_from([0, 1, 5]), min_size=n, max_size=n))
        think_s = np.array(thoughts) * TICK_S
    return Workload(
        arrival_s=arrival_s,
        prompt_tokens=np.array(prompts, np.int64),
        output_tokens=np.array(outputs, np.int64),
        concurrency=draw(st.integers(1, n + 1)) if mode == "closed" else 0,
        after=after,
        think_s=think_s,
    )


@st.composite
def stage_costs(draw: st.DrawFn) -> IterationCost:
    """One kind of stage; its coefficients are parts of a tick, so that ties do occur."""
    return linear_cost(
        draw(st.integers(1, 3)) * TICK_S / 2,
        token_s=draw(st.integers(0, 3)) * TICK_S / 8,
        sequence_s=draw(st.integers(0, 3)) * TICK_S / 16,
        context_s=draw(st.integers(0, 2)) * TICK_S / 32,
        prompt_s=draw(st.integers(0, 2)) * TICK_S / 64,
        max_tokens=MAX_TOKENS,
        max_seqs=16,
        max_context=64,
    )


@st.composite
def pipelines(draw: st.DrawFn) -> IterationCost:
    """Two to four stages of one or two kinds, with time for the way between them."""
    kinds = draw(st.lists(stage_costs(), min_size=1, max_size=2))
    places = st.integers(0, len(kinds) - 1)
    stages = draw(st.lists(places, min_size=2, max_size=4))
    send_s = draw(st.integers(0, 2)) * TICK_S / 16 * np.arange(MAX_TOKENS + 1)
    return stages_of(kinds, stages, send_s)


@st.composite
def policy_cases(
    draw: st.DrawFn,
    policy: int,
    *,
    open_loop: bool = False,
    single: bool = False,
    pipeline: bool = True,
) -> Case:
    """A run that this policy can finish; in half of them KV blocks are tight.

    Parameters
    ----------
    draw
        Given by hypothesis.
    policy
        Number of the policy.
    open_loop
        Whether every arrival is known beforehand.
    single
        Whether there is one replica only.
    pipeline
        Whether stages and several batches in flight may occur.

    """
    what = draw(workloads(open_loop=open_loop))
    block_tokens = draw(st.sampled_from([1, 4, 16]))
    rules = draw(policy_rules(policy, block_tokens))
    cost = draw(stage_costs())
    if pipeline and draw(st.booleans()):
        cost = draw(pipelines())
        rules = rules._replace(batches_in_flight=draw(st.integers(1, 5)))
    replicas = 1 if single else draw(st.integers(1, 3))
    routers = [ROUND_ROBIN, LEAST_LOADED, SHORTEST_QUEUE]
    longest = int((what.prompt_tokens + what.output_tokens).max())
    seqs = draw(st.integers(1, 6))
    # Whole prompts must fit into the budget, also after a preemption; chunks of whole units too.
    least = max(seqs, rules.chunk_unit) if rules.chunked else max(seqs, longest)
    blocks = blocks_for(longest, block_tokens) + draw(st.sampled_from([0, 1, 2, 5, 1000]))
    while blocks - int(rules.watermark * blocks) < blocks_for(longest, block_tokens):
        blocks += 1
    return Case(
        workload=what,
        replicas=replicas,
        limits=limits(
            seqs=seqs,
            tokens=draw(st.integers(least, max(least, 40))),
            blocks=blocks,
            block_tokens=block_tokens,
            ingress_s=draw(st.sampled_from([0.0, TICK_S, 5 * TICK_S])),
        ),
        cost=cost,
        rules=rules._replace(router=draw(st.sampled_from(routers))),
    )
