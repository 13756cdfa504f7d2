"""The time of one iteration; the only latency model in the project.

Simulator and bounds both call :func:`iteration_s` on the same :class:`IterationCost`, which
``simulator/cost.py`` compiles from measured kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from simulator.compiled import compiled

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]


class IterationCost(NamedTuple):
    """Iteration time of one plan's replica in compact form; every array in seconds.

    Attributes
    ----------
    decode_s, mixed_s
        (T + 1,) device time without attention, by tokens, of a pure decode iteration and of one
        that computes prompt tokens. ``mixed_s`` is never below ``decode_s`` and both never fall.
    sampled_s
        (S + 1,) head, sampler and host time by sampled sequences; never falls.
    attention_s
        (S + 1, K) decode attention by sequences and mean context; never falls along either axis.
        Row 0 is the launch alone.
    context_knots
        (K,) float64, mean contexts of the columns, tokens, ascending from 1.
    prefill_s
        (L + 1,) prompt attention of the first ``l`` tokens of a sequence; a chunk of ``c`` after
        ``p`` cached ones takes ``prefill_s[p + c] - prefill_s[p]``.
    decode_floor_s, mixed_floor_s
        Least device time of an iteration of either kind (launch-bound layers).
    iteration_host_s
        Host time of every iteration.

    """

    decode_s: Floats
    mixed_s: Floats
    sampled_s: Floats
    attention_s: Floats
    context_knots: Floats
    prefill_s: Floats
    decode_floor_s: float
    mixed_floor_s: float
    iteration_host_s: float


@compiled
def decode_attention_s(cost: IterationCost, decodes: int, context_tokens: int) -> float:
    """Attention time of ``decodes`` sequences holding ``context_tokens`` in all, seconds."""
    row = cost.attention_s[decodes]
    if decodes == 0:
        return row[0]
    mean = context_tokens / decodes
    knots = cost.context_knots
    last = knots.size - 1
    if mean <= knots[0]:
        return row[0]
    low, high = 0, last
    while high - low > 1:
        middle = (low + high) >> 1
        if knots[middle] <= mean:
            low = middle
        else:
            high = middle
    # Beyond the last knot the last slope holds.
    slope = (row[high] - row[low]) / (knots[high] - knots[low])
    return row[low] + slope * (mean - knots[low])


@compiled
def iteration_s(
    cost: IterationCost,
    tokens: int,
    decodes: int,
    context_tokens: int,
    prefill_attention_s: float,
    sampled: int,
    has_prefill: bool,
) -> float:
    """Time of one iteration, seconds.

    Parameters
    ----------
    cost
        The compiled cost of the replica.
    tokens
        All tokens computed, prompt and decode.
    decodes
        Sequences that compute one token against a cached context.
    context_tokens
        KV tokens that those sequences attend to, in all.
    prefill_attention_s
        Sum of ``prefill_s`` differences over the prompt chunks.
    sampled
        Sequences that emit a token.
    has_prefill
        Whether any prompt token is computed.

    """
    attention = decode_attention_s(cost, decodes, context_tokens)
    if has_prefill:
        device = max(cost.mixed_s[tokens] + attention + prefill_attention_s, cost.mixed_floor_s)
    else:
        device = max(cost.decode_s[tokens] + attention, cost.decode_floor_s)
    return device + cost.iteration_host_s + cost.sampled_s[sampled]
