"""Small costs, limits, workloads and random cases that the tests share.

Times are sums of whole multiples of ``TICK_S``, a power of two, wherever a test needs equal times
to be equal bit by bit: such sums carry no rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from simulator.kvcache import blocks_for
from simulator.rules import Rules
from simulator.run import Run
from simulator.state import Limits
from simulator.timing import in_ps, in_s, iteration_ps, one_stage
from simulator.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from simulator.timing import IterationCost

TICK_S = 2.0**-6
"""16 ms; it and its 64th part are whole picoseconds, and exact in binary."""

GATED = Rules(reserve_full_prompt=True)
"""vLLM V1 as its later versions admit: a prompt gets in when all of it fits."""


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
    return one_stage(
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


class Seconds(NamedTuple):
    """The times of one kind of stage of an ``IterationCost``; no first axis."""

    decode_s: npt.NDArray[np.float64]
    mixed_s: npt.NDArray[np.float64]
    sampled_s: npt.NDArray[np.float64]
    attention_s: npt.NDArray[np.float64]
    prefill_s: npt.NDArray[np.float64]
    decode_floor_s: float
    mixed_floor_s: float
    host_s: float


def seconds_of(cost: IterationCost, kind: int = 0) -> Seconds:
    """The times of one kind of stage as seconds."""
    times_s: Any = (in_s(getattr(cost, name[:-1] + "ps")[kind]) for name in Seconds._fields)
    return Seconds(*times_s)


def iteration_s(
    cost: IterationCost,
    tokens: int,
    decodes: int,
    context_tokens: int,
    prefill_attention_s: float,
    sampled: int,
    has_prefill: bool,
) -> float:
    """Time of one iteration on the first kind of stage, seconds."""
    prefill_ps = int(in_ps(prefill_attention_s))
    whole = (cost, 0, tokens, decodes, context_tokens, prefill_ps, sampled, has_prefill)
    return float(in_s(iteration_ps(*whole)))


def limits(
    *,
    seqs: int = 8,
    tokens: int = 64,
    blocks: int = 1000,
    block_tokens: int = 4,
    ingress_s: float = 0.0,
) -> Limits:
    """Limits of one replica, wide unless told otherwise."""
    return Limits(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        num_blocks=blocks,
        block_tokens=block_tokens,
        ingress_ps=int(in_ps(ingress_s)),
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


def bytes_of(state: NamedTuple) -> list[bytes]:
    """Every array of a run's state, also of the tables within it, byte by byte."""
    found = []
    for part in state:
        found += bytes_of(part) if isinstance(part, tuple) else [part.tobytes()]
    return found


@dataclass(frozen=True)
class Case:
    """One random run: the arguments of ``Run``."""

    workload: Workload
    replicas: int
    limits: Limits
    cost: IterationCost = field(repr=False)  # long arrays
    rules: Rules = GATED

    def start(self, *, record_gaps: bool = False, plain: bool = False) -> Run:
        """A fresh run."""
        what = (self.workload, self.replicas, self.limits, self.cost, self.rules)
        return Run(*what, record_gaps=record_gaps, plain=plain)


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
            ingress_s=draw(st.sampled_from([0.0, TICK_S, 5 * TICK_S])),
        ),
        cost=linear_cost(
            TICK_S,
            token_s=draw(st.integers(0, 3)) * TICK_S / 8,
            sequence_s=draw(st.integers(0, 3)) * TICK_S / 16,
            context_s=draw(st.integers(0, 2)) * TICK_S / 32,
            prompt_s=draw(st.integers(0, 2)) * TICK_S / 64,
        ),
        rules=Rules(reserve_full_prompt=draw(st.booleans())),
    )
