"""The time of one iteration; the only latency model in the project.

Simulator and bounds both call :func:`iteration_ps` on the same :class:`IterationCost`, which
``simulator/cost.py`` compiles from measured kernels. Times are whole picoseconds: sums of them are
exact in any order, so a run that adds up a thousand iterations one by one and one that adds them in
closed form end at the same instant, on every machine. 63 bits hold 106 days.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from simulator.compiled import compiled
from simulator.units import PS_PER_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]


class IterationCost(NamedTuple):
    """Iteration time of one plan's replica in compact form; every time in picoseconds.

    The leading axis of each array, K, is the kind of pipeline stage; without stages K is 1.

    Attributes
    ----------
    decode_ps, mixed_ps
        (K, T + 1) device time without attention, by tokens, of a pure decode iteration and of one
        that computes prompt tokens. ``mixed_ps`` is never below ``decode_ps``, both never fall.
    sampled_ps
        (K, S + 1) head, sampler and host time by sampled sequences; never falls.
    attention_ps
        (K, S + 1, C) decode attention by sequences and mean context; never falls along either of
        these. Row 0 is the launch alone.
    attention_slope_ps
        (K, S + 1, C) what each token of context adds from that column on, rounded down.
    context_knots
        (C,) mean contexts of the columns, tokens, ascending from 1.
    prefill_ps
        (K, L + 1) prompt attention of the first ``l`` tokens of a sequence; a chunk of ``c`` after
        ``p`` cached ones takes ``prefill_ps[p + c] - prefill_ps[p]``.
    decode_floor_ps, mixed_floor_ps
        (K,) least device time of an iteration of either kind (launch-bound layers).
    host_ps
        (K,) host time of every iteration.
    stages
        (P,) kind of each pipeline stage.
    send_ps
        (T + 1,) from one stage to the next, by tokens.

    """

    decode_ps: Ints
    mixed_ps: Ints
    sampled_ps: Ints
    attention_ps: Ints
    attention_slope_ps: Ints
    context_knots: Ints
    prefill_ps: Ints
    decode_floor_ps: Ints
    mixed_floor_ps: Ints
    host_ps: Ints
    stages: Ints
    send_ps: Ints

    @property
    def max_tokens(self) -> int:
        """Most tokens of one iteration."""
        return min(self.decode_ps.shape[1], self.mixed_ps.shape[1]) - 1

    @property
    def max_seqs(self) -> int:
        """Most sequences of one iteration."""
        return min(self.sampled_ps.shape[1], self.attention_ps.shape[1]) - 1

    @property
    def max_context(self) -> int:
        """Longest sequence, tokens."""
        return self.prefill_ps.shape[1] - 1


def in_ps(time_s: npt.ArrayLike) -> Ints:
    """Seconds as the nearest whole picoseconds."""
    return np.rint(np.asarray(time_s, np.float64) * PS_PER_S).astype(np.int64)


def in_s(time_ps: Ints) -> Floats:
    """Picoseconds as seconds."""
    return time_ps / PS_PER_S


def one_stage(
    *,
    decode_s: Floats,
    mixed_s: Floats,
    sampled_s: Floats,
    attention_s: Floats,
    context_knots: npt.ArrayLike,
    prefill_s: Floats,
    decode_floor_s: float = 0.0,
    mixed_floor_s: float = 0.0,
    iteration_host_s: float = 0.0,
) -> IterationCost:
    """A cost of one stage from times in seconds: (T + 1,), (S + 1,), (S + 1, C), (L + 1,)."""
    knots = np.asarray(context_knots).astype(np.int64)
    attention = in_ps(attention_s)
    return IterationCost(
        decode_ps=in_ps(decode_s)[None],
        mixed_ps=in_ps(mixed_s)[None],
        sampled_ps=in_ps(sampled_s)[None],
        attention_ps=attention[None],
        attention_slope_ps=context_slopes_ps(attention, knots)[None],
        context_knots=knots,
        prefill_ps=in_ps(prefill_s)[None],
        decode_floor_ps=in_ps([decode_floor_s]),
        mixed_floor_ps=in_ps([mixed_floor_s]),
        host_ps=in_ps([iteration_host_s]),
        stages=np.zeros(1, np.int64),
        send_ps=np.zeros(1, np.int64),
    )


def stages_of(
    kinds: Sequence[IterationCost], stages: Sequence[int], send_s: Floats
) -> IterationCost:
    """A cost of several stages.

    Parameters
    ----------
    kinds
        One-stage costs of equal sizes.
    stages
        (P,) which of them each stage is.
    send_s
        (T + 1,) from one stage to the next, by tokens, seconds.

    """

    def joined(field: str) -> Ints:
        return np.concatenate([getattr(kind, field) for kind in kinds])

    fields = {name: joined(name) for name in IterationCost._fields if name.endswith("_ps")}
    fields["send_ps"] = in_ps(send_s)
    return IterationCost(
        **fields,
        context_knots=kinds[0].context_knots,
        stages=np.array(stages, np.int64),
    )


def context_slopes_ps(attention_ps: Ints, knots: Ints) -> Ints:
    """Picoseconds per token of context between the columns of (S + 1, C) times, rounded down.

    Beyond the last column the last slope holds. Rounding down keeps the times from falling at the
    next column; it costs at most a picosecond per token of context.
    """
    slopes = np.zeros_like(attention_ps)
    rows = np.arange(1, len(attention_ps))[:, None]
    if len(knots) > 1:
        slopes[1:, :-1] = np.diff(attention_ps[1:], axis=1) // (rows * np.diff(knots))
        slopes[1:, -1] = slopes[1:, -2]
    return slopes


@compiled
def context_column(cost: IterationCost, decodes: int, context_tokens: int) -> int:
    """Column of ``attention_ps`` that holds from ``context_tokens`` on, for ``decodes`` > 0."""
    knots = cost.context_knots
    low, high = 0, knots.size
    while high - low > 1:
        middle = (low + high) >> 1
        if knots[middle] * decodes <= context_tokens:
            low = middle
        else:
            high = middle
    return low


@compiled
def decode_attention_ps(cost: IterationCost, kind: int, decodes: int, context_tokens: int) -> int:
    """Attention time of ``decodes`` sequences holding ``context_tokens`` in all, picoseconds."""
    if decodes == 0:
        return cost.attention_ps[kind, 0, 0]
    column = context_column(cost, decodes, context_tokens)
    beyond = max(0, context_tokens - cost.context_knots[column] * decodes)
    slope = cost.attention_slope_ps[kind, decodes, column]
    return cost.attention_ps[kind, decodes, column] + slope * beyond


@compiled
def iteration_ps(
    cost: IterationCost,
    kind: int,
    tokens: int,
    decodes: int,
    context_tokens: int,
    prefill_attention_ps: int,
    sampled: int,
    has_prefill: bool,
) -> int:
    """Time that one iteration takes on one stage, picoseconds.

    Parameters
    ----------
    cost
        The compiled cost of the replica.
    kind
        Kind of the stage.
    tokens
        All tokens computed, prompt and decode.
    decodes
        Sequences that compute one token against a cached context.
    context_tokens
        KV tokens that those sequences attend to, in all.
    prefill_attention_ps
        Sum of ``prefill_ps`` differences over the prompt chunks.
    sampled
        Sequences that emit a token.
    has_prefill
        Whether any prompt token is computed.

    """
    attention = decode_attention_ps(cost, kind, decodes, context_tokens)
    if has_prefill:
        device = cost.mixed_ps[kind, tokens] + attention + prefill_attention_ps
        device = max(device, cost.mixed_floor_ps[kind])
    else:
        device = max(cost.decode_ps[kind, tokens] + attention, cost.decode_floor_ps[kind])
    return device + cost.host_ps[kind] + cost.sampled_ps[kind, sampled]
