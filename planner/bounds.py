"""Lower bounds on what a plan can do, from the iteration cost that the simulator uses.

Every bound here is admissible: never above the simulated value. The arguments use only the
scheduler's rules and *values* of the compiled cost, evaluated over every batch size, never its
formula, so a new calibration or table cannot break them. They rest on these facts, which
``tests/property/test_bounds.py`` checks on random costs and plans:

1. The cost never falls when tokens, sequences or context grow (``IterationCost`` says so).
2. Admission and prompt computation are first come first served within a replica, and every
   prompt token is computed at least once, in an iteration that counts as prefill.
3. A request's tokens after the first each need an iteration of their own, and that iteration
   attends to the request's whole context, or recomputes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from simulator.compiled import compiled
from simulator.metrics import Latencies
from simulator.state import (
    ARRIVAL,
    COMPUTED,
    EVENT,
    FINISH,
    FIRST_TOKEN,
    GENERATED,
    NEVER_S,
    OUTPUT,
    PROMPT,
    REPLICA,
)
from simulator.timing import decode_attention_s, iteration_s

if TYPE_CHECKING:
    import numpy.typing as npt

    from simulator.run import Run
    from simulator.timing import IterationCost
    from simulator.workload import Workload

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]

_CONTEXTS_PER_OCTAVE = 4
"""Contexts per factor of two at which the decode floor is evaluated; in between, the value at the
next smaller one is held, which fact 1 makes a bound."""


@compiled
def _decode_floors(
    cost: IterationCost, contexts: Ints, recompute_s: Floats, seqs: int, floors_s: Floats
) -> None:
    """Fill ``floors_s`` with the least time of an iteration that emits a token at each context.

    Either the request decodes, among any number of others with at least one token each, or it
    recomputes its whole context after a preemption, which takes ``recompute_s`` of attention.
    """
    for i in range(contexts.size):
        context = contexts[i]
        least = iteration_s(cost, 1, 0, 0, recompute_s[context], 1, True)
        for batch in range(1, seqs + 1):
            time_s = iteration_s(cost, batch, batch, context + batch - 1, 0.0, 1, False)
            least = min(least, time_s)
        floors_s[i] = least


@compiled
def _lower_hull(values: Floats, corners: Ints) -> int:
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


@dataclass(frozen=True)
class CostFloors:
    """Least times that follow from one iteration cost under one token budget.

    Parameters
    ----------
    budget_tokens
        Token budget of one iteration.
    prompt_s
        (L + 1,) least time from admission to first token of a prompt of ``l`` tokens.
    prompt_work_s
        (L + 1,) least share of the replica's time that such a prompt takes, however batched.
    decode_s
        (L + 2,) running sum of the least time per emitted token: tokens emitted at contexts
        ``a .. b - 1`` take at least ``decode_s[b] - decode_s[a]``.
    """

    budget_tokens: int
    prompt_s: Floats
    prompt_work_s: Floats
    decode_s: Floats

    @classmethod
    def of(cls, cost: IterationCost, budget_tokens: int, seqs: int) -> CostFloors:
        """Derive the floors of ``cost`` for a budget and a number of seats."""
        longest = len(cost.prefill_s) - 1
        budget = min(budget_tokens, len(cost.mixed_s) - 1)
        mixed_s = cost.mixed_s[: budget + 1]
        tokens = np.arange(1, budget + 1)
        per_token_s = mixed_s[1:] / tokens
        cheapest = int(np.argmin(per_token_s)) + 1
        least_per_token_s = float(per_token_s[cheapest - 1])
        each_s = float(decode_attention_s(cost, 0, 0)) + cost.iteration_host_s
        lengths = np.arange(longest + 1)

        # One chunk costs its own time. k chunks of together l tokens cost at least k times the
        # hull at l / k, and beyond its cheapest point at least its cheapest rate.
        corners = np.zeros(budget, np.int64)
        used = _lower_hull(mixed_s, corners)
        corners = corners[:used]
        chunks = np.maximum(2, -(-lengths // budget))
        share = lengths / chunks
        hull_s = np.interp(share, corners, mixed_s[corners])
        hull_s = np.where(share > cheapest, least_per_token_s * share, hull_s)
        split_s = chunks * (hull_s + each_s)
        whole_s = np.full(longest + 1, np.inf)
        fits = min(budget, longest)
        whole_s[: fits + 1] = mixed_s[: fits + 1] + each_s
        prompt_s = np.minimum(whole_s, split_s) + cost.prefill_s + cost.sampled_s[1]

        work_s = (least_per_token_s + each_s / budget) * lengths + cost.prefill_s
        return cls(budget, prompt_s, work_s, _decode_sums_s(cost, seqs, longest))


def _decode_sums_s(cost: IterationCost, seqs: int, longest: int) -> Floats:
    octaves = int(np.ceil(np.log2(max(2, longest))))
    steps = np.arange(octaves * _CONTEXTS_PER_OCTAVE + 1) / _CONTEXTS_PER_OCTAVE
    contexts = np.unique(np.round(2.0**steps).astype(np.int64))
    contexts = contexts[contexts <= longest]
    floors_s = np.zeros(len(contexts))
    rows = min(seqs, len(cost.attention_s) - 1, len(cost.decode_s) - 1)
    # A recomputed chunk of one token counts as decode and leaves its share of prompt attention
    # unpaid, but takes an iteration of its own. Only where that iteration is not the dearer of the
    # two is the recomputation's attention left out of the bound.
    own_iteration_s = float(cost.decode_s[1] + cost.attention_s[0, 0])
    dearer = bool(np.diff(cost.prefill_s).max() <= own_iteration_s)
    recompute_s = cost.prefill_s if dearer else np.zeros_like(cost.prefill_s)
    _decode_floors(cost, contexts, recompute_s, rows, floors_s)
    held = floors_s[np.searchsorted(contexts, np.arange(1, longest + 1), side="right") - 1]
    return np.concatenate([[0.0, 0.0], np.cumsum(held)])


@dataclass(frozen=True)
class Bounds:
    """Lower bounds on a run's latencies and makespan."""

    values: Latencies
    makespan_s: float


@compiled
def _from_state(
    request: Ints,
    time_s: Floats,
    clock_s: Floats,
    ingress_s: float,
    prompt_s: Floats,
    work_s: Floats,
    decode_s: Floats,
    done_s: Floats,
    first_s: Floats,
    last_s: Floats,
) -> None:
    """Fill ``first_s`` and ``last_s`` with bounds on latencies from arrival to first, last token.

    Whatever has happened counts exactly. Nothing else happens before the replica's next event;
    prompts not yet computed follow one another in order of arrival (fact 2). ``done_s``, (R,), is
    scratch: when each replica can have computed the prompts seen so far.
    """
    for r in range(done_s.size):
        idle = clock_s[r, EVENT] == NEVER_S
        done_s[r] = 0.0 if idle else clock_s[r, EVENT]
    for i in range(request.shape[0]):
        r = request[i, REPLICA]
        prompt, output = request[i, PROMPT], request[i, OUTPUT]
        generated = request[i, GENERATED]
        arrival = time_s[i, ARRIVAL]
        if time_s[i, FINISH] != NEVER_S:
            first_s[i] = time_s[i, FIRST_TOKEN] - arrival
            last_s[i] = time_s[i, FINISH] - arrival
            continue
        if arrival == NEVER_S:  # a closed-loop request not sent yet
            first_s[i] = ingress_s + prompt_s[prompt]
            last_s[i] = first_s[i] + decode_s[prompt + output] - decode_s[prompt + 1]
            continue
        if generated > 0:
            first_s[i] = time_s[i, FIRST_TOKEN] - arrival
            rest_s = decode_s[prompt + output] - decode_s[prompt + generated + 1]
            last_s[i] = clock_s[r, EVENT] + rest_s - arrival
            continue
        visible = arrival + ingress_s
        computed = min(request[i, COMPUTED], prompt)
        done_s[r] = max(done_s[r], visible) + work_s[prompt] - work_s[computed]
        first_s[i] = done_s[r] - arrival
        if computed == 0:
            start = max(clock_s[r, EVENT], visible) if clock_s[r, EVENT] != NEVER_S else visible
            first_s[i] = max(first_s[i], start + prompt_s[prompt] - arrival)
        last_s[i] = first_s[i] + decode_s[prompt + output] - decode_s[prompt + 1]


def run_bounds(run: Run, floors: CostFloors) -> Bounds:
    """Bounds on the finished run, given how far it has come; also of a run not begun.

    Parameters
    ----------
    run
        The run, advanced any number of iterations.
    floors
        Floors of its cost, or of a cost that is nowhere above it.
    """
    state, workload = run.state, run.workload
    first_s, last_s = np.zeros(workload.num_requests), np.zeros(workload.num_requests)
    _from_state(
        state.request,
        state.time_s,
        state.clock_s,
        run.limits.ingress_s,
        floors.prompt_s,
        floors.prompt_work_s,
        floors.decode_s,
        np.zeros(len(state.clock_s)),
        first_s,
        last_s,
    )
    return Bounds(_latencies(first_s, last_s, workload), _makespan_s(run, first_s, last_s))


def _latencies(first_s: Floats, last_s: Floats, workload: Workload) -> Latencies:
    gaps = workload.output_tokens - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        tpot_s = np.where(gaps > 0, (last_s - first_s) / gaps, np.nan)
    return Latencies(first_s, tpot_s, last_s)


def _makespan_s(run: Run, first_s: Floats, last_s: Floats) -> float:
    """The last finish of any request whose arrival is known, from the first arrival."""
    arrival_s = run.state.time_s[:, ARRIVAL]
    known = arrival_s != NEVER_S
    ends_s = arrival_s[known] + last_s[known]
    return float(ends_s.max() - arrival_s[known].min())
