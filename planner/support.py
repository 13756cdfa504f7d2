"""What bounds rest on: values read off a compiled cost, each true of every batch size.

Nothing here knows the cost's formula. A support is a list of claims about its values, rounded
outward over every integer batch, so that whoever doubts a claim can look at each batch size
(``planner/verify_bounds.py`` does). ``docs/search.md`` has the proofs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from simulator.compiled import compiled
from simulator.timing import decode_attention_ps, iteration_ps

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from simulator.timing import IterationCost

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]

_CONTEXTS_PER_OCTAVE: Final = 4
"""Contexts per factor of two at which the decode floor is evaluated; in between, the value at the
next smaller one is held, which is a bound since the cost never falls with context."""

SLOPE_UNIT: Final = 1024
"""Slopes count in this part of a picosecond per token: a prompt of 100,000 tokens loses 0.1 ns to
their rounding, and products with its tokens stay far below 2^63."""

_LINES: Final = 8
"""Shares of the budget at which a support line is drawn; more change no bound by 0.1 %."""

_SHARES: Final = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Parts of the attention's slope per token of context, at its flattest, that a share of the
replica's time may charge to context; the rest is charged per token."""


@compiled
def _lower_hull(values: Ints, corners: Ints) -> int:
    """Corners of the lower convex hull of ``(t, values[t])`` for t >= 1; their number."""
    used = 0
    for t in range(1, values.size):
        while used >= 2:
            a, b = corners[used - 2], corners[used - 1]
            if (values[b] - values[a]) * (t - a) < (values[t] - values[a]) * (b - a):
                break
            used -= 1
        corners[used] = t
        used += 1
    return used


@compiled
def _most_beside(least_ps: Ints, contexts: Ints, theta: int) -> int:
    """The largest phi with ``theta H + phi b <= least`` for every batch b, row by row of H."""
    most = np.iinfo(np.int64).max
    for row in range(least_ps.shape[0]):
        for column in range(least_ps.shape[1]):
            rest_ps = least_ps[row, column] - theta * contexts[row, column]
            most = min(most, rest_ps // (row + 1))
    return most


@compiled
def _fill_attention(
    attention_ps: Ints, slope_ps: Ints, knots: Ints, contexts: Ints, out_ps: Ints
) -> None:
    """Attention of batches of 1, 2, ... sequences, one of each context and the others of a token.

    ``attention_ps`` and ``slope_ps`` are by batch from 0 and column of context, ``out_ps`` by
    context and batch from 1.
    """
    for i in range(contexts.size):
        for batch in range(1, out_ps.shape[1] + 1):
            held = contexts[i] + batch - 1
            column = np.searchsorted(knots, held // batch, side="right") - 1
            beyond = max(0, held - knots[column] * batch)
            slope = slope_ps[batch, column]
            out_ps[i, batch - 1] = attention_ps[batch, column] + slope * beyond


@dataclass(frozen=True)
class StageSupport:
    """What was read off the cost of one kind of pipeline stage; B is the token budget.

    Parameters
    ----------
    each_ps
        What every iteration with prompt tokens adds to ``mixed_ps``: attention's launch and host.
    first_token_ps
        Sampling of one sequence.
    pass_ps
        Least time of an iteration with a prompt token.
    lines
        Pairs ``(a, b)``: ``a t / SLOPE_UNIT + b <= mixed_ps[t]`` for every t in 1 .. B. Along each
        an iteration costs at least ``b + each_ps >= 0``, whatever its tokens. None where it is
        known how prompts are cut.
    work_ps
        Per token: ``work_ps t <= mixed_ps[t] + each_ps`` for every t in 1 .. B.
    shares
        Pairs ``(theta, phi)``: an iteration that decodes b sequences with H tokens of context in
        all, and computes n prompt tokens, takes at least ``work_ps n + theta H + phi b``.
    """

    each_ps: int
    first_token_ps: int
    pass_ps: int
    lines: tuple[tuple[int, int], ...]
    work_ps: int
    shares: tuple[tuple[int, int], ...]

    @classmethod
    def of(
        cls,
        cost: IterationCost,
        kind: int,
        budget: int,
        seqs: int,
        kv_tokens: int,
        *,
        cuts_known: bool,
        keeps_blocks: bool,
    ) -> StageSupport:
        """Read the support of one kind of stage; the rest as in :meth:`Support.of`."""
        mixed_ps = cost.mixed_ps[kind, : budget + 1]
        tokens = np.arange(1, budget + 1)
        each_ps = int(decode_attention_ps(cost, kind, 0, 0) + cost.host_ps[kind])
        work_ps = int(np.min((mixed_ps[1:] + each_ps) // tokens))
        lines = [] if cuts_known else _lines_below(mixed_ps)
        return cls(
            each_ps=each_ps,
            first_token_ps=int(cost.sampled_ps[kind, 1]),
            pass_ps=int(iteration_ps(cost, kind, 1, 0, 0, 0, 0, True)),
            lines=tuple(line for line in lines if line[1] + each_ps >= 0),
            work_ps=work_ps,
            shares=_shares(cost, kind, work_ps, seqs, kv_tokens, keeps_blocks=keeps_blocks),
        )


@dataclass(frozen=True)
class Support:
    """What was read off one cost: all that the bounds of one budget and number of seats rest on.

    Parameters
    ----------
    budget_tokens
        Most tokens of one iteration.
    full_tokens
        Tokens of an iteration that cuts a prompt, one entry for each budget that plans may have:
        vLLM's V1 scheduler cuts a prompt only where the budget ends. Empty where that is not known.
    kinds
        Support of each kind of pipeline stage.
    contexts, decode_ps
        Least time of an iteration that emits a token at each of these contexts, ascending from 1;
        held until the next.
    """

    budget_tokens: int
    full_tokens: tuple[int, ...]
    kinds: tuple[StageSupport, ...]
    contexts: tuple[int, ...]
    decode_ps: tuple[int, ...]

    @classmethod
    def of(
        cls,
        cost: IterationCost,
        budget_tokens: int,
        seqs: int,
        kv_tokens: int,
        *,
        full_tokens: tuple[int, ...] = (),
        keeps_blocks: bool = False,
    ) -> Support:
        """Read the support of ``cost`` for a budget, a number of seats and of tokens in the cache.

        ``keeps_blocks`` says that a preempted request may find its blocks again.
        """
        budget = min(budget_tokens, cost.max_tokens)
        rows = min(seqs, cost.max_seqs, cost.max_tokens)
        contexts, decode_ps = _decode_floors_at(cost, rows, pays_again=not keeps_blocks)
        return cls(
            budget_tokens=budget,
            full_tokens=full_tokens,
            kinds=tuple(
                StageSupport.of(
                    cost,
                    kind,
                    budget,
                    rows,
                    kv_tokens,
                    cuts_known=bool(full_tokens),
                    keeps_blocks=keeps_blocks,
                )
                for kind in range(len(cost.host_ps))
            ),
            contexts=tuple(map(int, contexts)),
            decode_ps=tuple(map(int, decode_ps)),
        )


def _lines_below(mixed_ps: Ints) -> list[tuple[int, int]]:
    """Lines below ``mixed_ps`` at every token count, along its lower hull."""
    budget = len(mixed_ps) - 1
    corners = np.zeros(budget, np.int64)
    corners = corners[: _lower_hull(mixed_ps, corners)]
    tokens = np.arange(1, budget + 1)
    # A prompt beyond the budget is cut into chunks of more than half a budget on average.
    lines = {(0, int(mixed_ps[1:].min()))}
    drawn = set()
    for share in np.linspace(budget / 4, budget, _LINES):
        right = min(max(1, int(np.searchsorted(corners, share))), len(corners) - 1)
        a, b = corners[max(0, right - 1)], corners[right]
        if a < b and (a, b) not in drawn:
            drawn.add((a, b))
            slope = int((mixed_ps[b] - mixed_ps[a]) * SLOPE_UNIT // (b - a))
            least = (mixed_ps[1:] * SLOPE_UNIT - slope * tokens).min()
            lines.add((slope, int(least // SLOPE_UNIT)))
    return sorted(lines)


def attention_corners(
    cost: IterationCost, kind: int, seqs: int, kv_tokens: int
) -> tuple[Ints, Ints, Ints]:
    """Where the decode attention of any batch can be least beside a line in its context.

    Between two columns it is a line in the context, so a sum with another line is least at an end:
    where the column begins, or at the last token before the next. Beyond ``kv_tokens`` of context
    no batch goes, nor beyond the longest context of each of its sequences.

    Returns
    -------
    batches, contexts, times_ps
        Decoding sequences, (b, 1); tokens of context in all, and attention, both (b, 2 C).
    """
    batches = np.arange(1, seqs + 1)[:, None]
    most = np.maximum(np.minimum(kv_tokens, batches * cost.max_context), batches)
    starts = np.minimum(cost.context_knots * batches, most)
    lasts = np.append(cost.context_knots[1:], cost.max_context + 1) * batches - 1
    lasts = np.maximum(starts, np.minimum(lasts, most))
    slopes_ps = cost.attention_slope_ps[kind, 1 : seqs + 1]
    first_ps = cost.attention_ps[kind, 1 : seqs + 1]
    # A column that no batch reaches repeats what is reached: its beginning lies beyond ``most``.
    reached = cost.context_knots * batches <= most
    last_ps = first_ps + slopes_ps * (lasts - starts)
    far = np.iinfo(np.int64).max >> 2
    times_ps = np.concatenate([np.where(reached, t, far) for t in (first_ps, last_ps)], axis=1)
    return batches, np.concatenate([starts, lasts], axis=1), times_ps


def _shares(
    cost: IterationCost, kind: int, work_ps: int, seqs: int, kv_tokens: int, *, keeps_blocks: bool
) -> tuple[tuple[int, int], ...]:
    """Pairs ``(theta, phi)`` of :class:`StageSupport`, phi as large as every batch allows."""
    batches, contexts, attention_ps = attention_corners(cost, kind, seqs, kv_tokens)
    host_ps = cost.host_ps[kind]
    linear_ps = cost.decode_ps[kind, 1 : seqs + 1, None]
    alone_ps = np.maximum(linear_ps + attention_ps, cost.decode_floor_ps[kind]) + host_ps
    joined_ps = work_ps * batches + attention_ps - cost.attention_ps[kind, 0, 0]
    least_ps = np.minimum(alone_ps, joined_ps)
    slope_ps = int(cost.attention_slope_ps[kind, seqs].min())
    shares = {}
    for part in _SHARES:
        theta = int(part * slope_ps)
        phi = int(_most_beside(least_ps, contexts, theta))
        # A token may be emitted by computing its context again instead: docs/search.md, "Shares".
        phi = min(phi, work_ps - theta * cost.max_context if keeps_blocks else work_ps)
        if phi >= 0 and (keeps_blocks or (theta <= phi and 2 * theta <= work_ps)):
            shares[theta] = phi
    return tuple(sorted(shares.items()))


def _decode_floors_at(cost: IterationCost, rows: int, *, pays_again: bool) -> tuple[Ints, Ints]:
    """Contexts, four to each factor of two, and the least time of emitting a token at each.

    Either the request decodes, among any number of others with at least one token each, or it
    recomputes its context after a preemption. Either way the iteration passes through every
    pipeline stage.
    """
    longest = cost.max_context
    octaves = int(np.ceil(np.log2(max(2, longest))))
    steps = np.arange(octaves * _CONTEXTS_PER_OCTAVE + 1) / _CONTEXTS_PER_OCTAVE
    contexts = np.unique(np.round(2.0**steps).astype(np.int64))
    contexts = contexts[contexts <= longest]
    batches = np.arange(1, rows + 1)
    hops = len(cost.stages) - 1
    decode_ps = hops * cost.send_ps[batches] if hops else np.zeros(rows, np.int64)
    decode_ps = np.broadcast_to(decode_ps, (len(contexts), rows)).copy()
    again_ps = np.full(len(contexts), hops * int(cost.send_ps[1]) if hops else 0)
    # A recomputed chunk of one token counts as decode and leaves its share of prompt attention
    # unpaid, but takes an iteration of its own. Only where that iteration is not the dearer of the
    # two is the recomputation's attention left out of the bound.
    # In a pipeline the chunks of a recomputed context overlap: only one pass counts.
    own_iteration_ps = cost.decode_ps[0, 1] + cost.attention_ps[0, 0, 0]
    dearer = hops == 0 and bool(np.diff(cost.prefill_ps[0]).max() <= own_iteration_ps)
    pays = pays_again and dearer
    for kind in sorted(set(map(int, cost.stages))):
        times = int(np.count_nonzero(cost.stages == kind))
        sampled_ps = cost.host_ps[kind] + cost.sampled_ps[kind, 1]
        device_ps = np.empty((len(contexts), rows), np.int64)
        by_batch = cost.attention_ps[kind], cost.attention_slope_ps[kind]
        _fill_attention(*by_batch, cost.context_knots, contexts, device_ps)
        device_ps += cost.decode_ps[kind, batches]
        decode_ps += times * (np.maximum(device_ps, cost.decode_floor_ps[kind]) + sampled_ps)
        alone_ps = cost.mixed_ps[kind, 1] + cost.attention_ps[kind, 0, 0]
        alone_ps = alone_ps + (cost.prefill_ps[kind, contexts] if pays else 0)
        again_ps += times * (np.maximum(alone_ps, cost.mixed_floor_ps[kind]) + sampled_ps)
    return contexts, np.minimum(decode_ps.min(axis=1), again_ps)


def least_cost(costs: Sequence[IterationCost]) -> IterationCost:
    """A cost that is nowhere above any of ``costs`` of one shape, whose batches may differ in size.

    Each of its values is the least of those that the costs have at that batch; where only some have
    one, of theirs, which are not below the others' at smaller batches.
    """
    fields = {}
    for name, first in costs[0]._asdict().items():
        arrays = [getattr(cost, name) for cost in costs]
        axis = 0 if first.ndim == 1 else 1
        least = max(arrays, key=lambda array: int(array.shape[axis]))
        for array in arrays:
            size = array.shape[axis]
            mine = least[:size] if axis == 0 else least[:, :size]
            if mine is not array and np.any(array < mine):
                least = least.copy()
                mine = least[:size] if axis == 0 else least[:, :size]
                np.minimum(mine, array, out=mine)
        fields[name] = least
    return costs[0]._replace(**fields)
