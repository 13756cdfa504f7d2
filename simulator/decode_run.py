"""Runs of decode-only iterations in closed form.

While a batch only decodes, every iteration adds one token to each sequence, so the context grows by
the batch size. Between two columns of the cost's attention table an iteration's time is linear in
the context, so the times of a run are arithmetic series, exact in whole picoseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.compiled import compiled
from simulator.timing import context_column

if TYPE_CHECKING:
    from simulator.timing import IterationCost


@compiled
def run_ps(
    cost: IterationCost,
    tokens: int,
    decodes: int,
    sampled: int,
    context_tokens: int,
    iterations: int,
    until_ps: int,
) -> tuple[int, int]:
    """Time of consecutive decode-only iterations on a single stage, up to an instant.

    Parameters
    ----------
    cost
        A cost of one stage.
    tokens, decodes, sampled
        Tokens that each iteration computes, sequences that decode and sequences that emit a
        token; all equal unless a batch is padded.
    context_tokens
        KV tokens that the first iteration attends to, in all.
    iterations
        How many, at least 1.
    until_ps
        Stop with the first iteration that ends then or later; the largest integer for none.

    Returns
    -------
    count, time_ps
        Iterations counted, from 1 to ``iterations``, and their time.

    """
    knots = cost.context_knots
    outside_ps = cost.host_ps[0] + cost.sampled_ps[0, sampled]
    floor_ps = cost.decode_floor_ps[0]
    context, count, total = context_tokens, 0, 0
    column = context_column(cost, decodes, context)
    while True:
        left = iterations - count
        if column + 1 < knots.size:
            # Iterations that begin before the next column holds.
            ahead = knots[column + 1] * decodes - context
            left = min(left, (ahead + decodes - 1) // decodes)
        slope = cost.attention_slope_ps[0, decodes, column]
        first = cost.attention_ps[0, decodes, column] + cost.decode_ps[0, tokens]
        first += slope * max(0, context - knots[column] * decodes)
        step = slope * decodes
        at_floor = 0
        if first < floor_ps:
            at_floor = left if step == 0 else min(left, (floor_ps - first + step - 1) // step)
        # First the iterations that the floor holds, then the ones that grow.
        for part in range(2):
            n = at_floor if part == 0 else left - at_floor
            if n == 0:
                continue
            base = outside_ps + (floor_ps if part == 0 else first + step * at_floor)
            rise = 0 if part == 0 else step
            part_ps = n * base + rise * (n * (n - 1) // 2)
            if total + part_ps >= until_ps:
                low, high = 1, n
                while low < high:
                    middle = (low + high) >> 1
                    if total + middle * base + rise * (middle * (middle - 1) // 2) >= until_ps:
                        high = middle
                    else:
                        low = middle + 1
                return count + low, total + low * base + rise * (low * (low - 1) // 2)
            total += part_ps
            count += n
        if count == iterations:
            return count, total
        context = context_tokens + count * decodes
        column += 1
