"""Small costs, limits, workloads and random cases that the tests share.

Times are sums of whole multiples of ``TICK_S``, a power of two, wherever a test needs equal times
to be equal bit by bit: such sums carry no rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import strategies as st

from simulator.kvcache import blocks_for
from simulator.state import Limits
from simulator.timing import IterationCost
from simulator.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

TICK_S = 2.0**-10
"""About a millisecond, and exact in binary."""


def linear_cost(
    base_s: float = TICK_S,
    *,
    token_s: float = 0.0,
    sequence_s: float = 0.0,
    context_s: float = 0.0,
    prompt_s: float = 0.0,
    max_tokens: int = 256,
    max_seqs: int = 64,
    max_context: int = 512,
) -> IterationCost:
    """A cost whose iteration time is a sum of five products.

    ``base_s + token_s * tokens + sequence_s * sampled + context_s * context_tokens + prompt_s *
    (sum over the prompt chunks of (p + c)^2 - p^2)``: the last term is quadratic, as attention is.

    Parameters
    ----------
    base_s
        Time of every iteration.
    token_s, sequence_s, context_s, prompt_s
        Time per token, per sampled sequence, per cached token read and per squared prompt token.
    max_tokens, max_seqs, max_context
        Sizes of the arrays.

    """
    seqs = np.arange(max_seqs + 1, dtype=np.float64)
    knots = np.array([1.0, max_context])
    tokens_s = token_s * np.arange(max_tokens + 1, dtype=np.float64)
    return IterationCost(
        decode_s=tokens_s,
        mixed_s=tokens_s.copy(),
        sampled_s=sequence_s * seqs,
        attention_s=np.ascontiguousarray(context_s * np.outer(seqs, knots)),
        context_knots=knots,
        prefill_s=prompt_s * np.arange(max_context + 1, dtype=np.float64) ** 2,
        decode_floor_s=0.0,
        mixed_floor_s=0.0,
        iteration_host_s=base_s,
    )


def limits(
    *,
    seqs: int = 8,
    tokens: int = 64,
    blocks: int = 1000,
    block_tokens: int = 4,
    reserve: bool = True,
    ingress_s: float = 0.0,
) -> Limits:
    """Limits of one replica, wide unless told otherwise."""
    return Limits(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        num_blocks=blocks,
        block_tokens=block_tokens,
        reserve_full_prompt=reserve,
        ingress_s=ingress_s,
    )


def workload(
    prompts: Sequence[int],
    outputs: Sequence[int],
    arrivals_s: Sequence[float] | None = None,
    concurrency: int = 0,
) -> Workload:
    """Requests of the given lengths, all at time 0 unless ``arrivals_s`` says otherwise."""
    arrival = np.zeros(len(prompts)) if arrivals_s is None else np.array(arrivals_s, np.float64)
    return Workload(
        arrival_s=arrival,
        prompt_tokens=np.array(prompts, np.int64),
        output_tokens=np.array(outputs, np.int64),
        concurrency=concurrency,
    )


@dataclass(frozen=True)
class Case:
    """One random run: the arguments of ``Run``."""

    workload: Workload
    replicas: int
    limits: Limits
    cost: IterationCost = field(repr=False)  # long arrays


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small runs of every kind of arrival; in half of them KV blocks are tight.

    Coefficients of the cost are whole multiples of powers of two, so that times which are equal
    in theory are equal in fact and ties between replicas do occur.
    """
    n = draw(st.integers(1, 12))
    lengths = st.lists(st.integers(1, 24), min_size=n, max_size=n)
    prompts, outputs = draw(lengths), draw(lengths)
    mode = draw(st.sampled_from(["open", "closed", "at once"]))
    arrivals = [0.0] * n
    if mode == "open":
        gaps = draw(st.lists(st.integers(0, 12), min_size=n, max_size=n))
        arrivals = list(np.cumsum(gaps) * TICK_S)
    concurrency = draw(st.integers(1, n + 1)) if mode == "closed" else 0
    block_tokens = draw(st.sampled_from([1, 4, 16]))
    longest = max(p + o for p, o in zip(prompts, outputs, strict=True))
    spare = draw(st.sampled_from([0, 1, 2, 5, 1000]))
    seqs = draw(st.integers(1, 6))
    return Case(
        workload=workload(prompts, outputs, arrivals, concurrency),
        replicas=draw(st.integers(1, 3)),
        limits=limits(
            seqs=seqs,
            tokens=draw(st.integers(seqs, 40)),
            blocks=blocks_for(longest, block_tokens) + spare,
            block_tokens=block_tokens,
            reserve=draw(st.booleans()),
            ingress_s=draw(st.sampled_from([0.0, TICK_S, 5 * TICK_S])),
        ),
        cost=linear_cost(
            TICK_S,
            token_s=draw(st.integers(0, 3)) * TICK_S / 8,
            sequence_s=draw(st.integers(0, 3)) * TICK_S / 16,
            context_s=draw(st.integers(0, 2)) * TICK_S / 32,
            prompt_s=draw(st.integers(0, 2)) * TICK_S / 64,
        ),
    )
