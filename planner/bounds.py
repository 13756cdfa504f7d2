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
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.compiled import compiled
from simulator.metrics import Latencies, latencies
from simulator.state import (
    ARRIVAL,
    COMPUTED,
    FINISH,
    FIRST_TOKEN,
    GENERATED,
    IN_FLIGHT,
    NEVER_PS,
    NEXT_SLOT,
    OUTPUT,
    PROMPT,
    REPLICA,
    STARTED,
)
from simulator.timing import decode_attention_ps, in_s, iteration_ps

if TYPE_CHECKING:
    import numpy.typing as npt

    from simulator.run import Run
    from simulator.timing import IterationCost

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]

_CONTEXTS_PER_OCTAVE = 4
"""Contexts per factor of two at which the decode floor is evaluated; in between, the value at the
next smaller one is held, which fact 1 makes a bound."""


_ROUNDING = 1.0 - 1e-12
"""Sums of a few floating-point numbers are off by parts in 1e15; bounds stay below the truth."""


@compiled
def _decode_floors(
    cost: IterationCost, contexts: Ints, recompute_ps: Ints, seqs: int, floors_ps: Ints
) -> None:
    """Fill ``floors_ps`` with the least time of an iteration that emits a token at each context.

    Either the request decodes, among any number of others with at least one token each, or it
    recomputes its whole context after a preemption, which takes ``recompute_ps``, (K, L + 1), of
    attention. Either way the iteration passes through every pipeline stage.
    """
    stages = cost.stages
    for i in range(contexts.size):
        context = contexts[i]
        least = 0
        for stage in range(stages.size):
            send_ps = cost.send_ps[1] if stage > 0 else 0
            kind = stages[stage]
            again_ps = recompute_ps[kind, context]
            least += iteration_ps(cost, kind, 1, 0, 0, again_ps, 1, True) + send_ps
        for batch in range(1, seqs + 1):
            time_ps = 0
            for stage in range(stages.size):
                held = context + batch - 1
                if stage > 0:
                    time_ps += cost.send_ps[batch]
                time_ps += iteration_ps(cost, stages[stage], batch, batch, held, 0, 1, False)
            least = min(least, time_ps)
        floors_ps[i] = least


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


@dataclass(frozen=True)
class CostFloors:
    """Least times that follow from one iteration cost under one token budget; picoseconds.

    Parameters
    ----------
    budget_tokens
        Token budget of one iteration.
    prompt_ps
        (L + 1,) least time from admission to first token of a prompt of ``l`` tokens.
    prompt_work_ps
        (L + 1,) least share of the replica's time that such a prompt takes, however batched.
    decode_ps
        (L + 2,) running sum of the least time per emitted token: tokens emitted at contexts
        ``a .. b - 1`` take at least ``decode_ps[b] - decode_ps[a]``.
    """

    budget_tokens: int
    prompt_ps: Ints
    prompt_work_ps: Ints
    decode_ps: Ints

    @classmethod
    def of(cls, cost: IterationCost, budget_tokens: int, seqs: int) -> CostFloors:
        """Derive the floors of ``cost`` for a budget and a number of seats.

        Every chunk of a prompt passes through each pipeline stage in turn. At one of them the
        chunks follow one another; before it the first chunk and after it the last one has passed
        all others.
        """
        budget = min(budget_tokens, cost.max_tokens)
        passes_ps = [_least_pass_ps(cost, int(kind)) for kind in cost.stages]
        prompt_ps, work_ps = np.zeros((2, cost.max_context + 1), np.int64)
        for stage, kind in enumerate(cost.stages):
            own_ps, share_ps = _prompt_floors(cost, int(kind), budget)
            others_ps = sum(passes_ps) - passes_ps[stage]
            if len(cost.stages) > 1:
                others_ps += (len(cost.stages) - 1) * int(cost.send_ps[1])
            prompt_ps = np.maximum(prompt_ps, own_ps + others_ps)
            work_ps = np.maximum(work_ps, share_ps)
        sums_ps = _decode_sums_ps(cost, seqs, cost.max_context)
        return cls(budget, prompt_ps, work_ps, sums_ps)

    @classmethod
    def none(cls, cost: IterationCost) -> CostFloors:
        """Floors that say nothing: for what the facts above do not cover."""
        zeros = np.zeros(cost.max_context + 2, np.int64)
        return cls(cost.max_tokens, zeros[:-1], zeros[:-1], zeros)


def _least_pass_ps(cost: IterationCost, kind: int) -> int:
    """Least time that an iteration with a prompt token takes on one stage."""
    return int(iteration_ps(cost, kind, 1, 0, 0, 0, 0, True))


def _prompt_floors(cost: IterationCost, kind: int, budget: int) -> tuple[Ints, Ints]:
    """``prompt_ps`` and ``prompt_work_ps`` of one pipeline stage; see :class:`CostFloors`."""
    longest = cost.max_context
    mixed_ps, prefill_ps = cost.mixed_ps[kind, : budget + 1], cost.prefill_ps[kind]
    tokens = np.arange(1, budget + 1)
    per_token_ps = mixed_ps[1:] / tokens
    cheapest = int(np.argmin(per_token_ps)) + 1
    least_per_token_ps = float(per_token_ps[cheapest - 1])
    each_ps = int(decode_attention_ps(cost, kind, 0, 0) + cost.host_ps[kind])
    lengths = np.arange(longest + 1)

    # One chunk costs its own time. k chunks of together l tokens cost at least k times the
    # hull at l / k, and beyond its cheapest point at least its cheapest rate.
    corners = np.zeros(budget, np.int64)
    used = _lower_hull(mixed_ps, corners)
    corners = corners[:used]
    chunks = np.maximum(2, -(-lengths // budget))
    share = lengths / chunks
    hull_ps = np.interp(share, corners, mixed_ps[corners])
    hull_ps = np.where(share > cheapest, least_per_token_ps * share, hull_ps)
    split_ps = chunks * (hull_ps + each_ps)
    whole_ps = np.full(longest + 1, np.inf)
    fits = min(budget, longest)
    whole_ps[: fits + 1] = mixed_ps[: fits + 1] + each_ps
    prompt_ps = _down(np.minimum(whole_ps, split_ps)) + prefill_ps + cost.sampled_ps[kind, 1]

    work_ps = _down((least_per_token_ps + each_ps / budget) * lengths) + prefill_ps
    return prompt_ps, work_ps


def _down(bound_ps: npt.NDArray[np.floating[Any]]) -> Ints:
    """Whole picoseconds below a bound computed in floating point."""
    return np.maximum(0, np.floor(bound_ps * _ROUNDING)).astype(np.int64)


def _decode_sums_ps(cost: IterationCost, seqs: int, longest: int) -> Ints:
    octaves = int(np.ceil(np.log2(max(2, longest))))
    steps = np.arange(octaves * _CONTEXTS_PER_OCTAVE + 1) / _CONTEXTS_PER_OCTAVE
    contexts = np.unique(np.round(2.0**steps).astype(np.int64))
    contexts = contexts[contexts <= longest]
    floors_ps = np.zeros(len(contexts), np.int64)
    rows = min(seqs, cost.max_seqs, cost.max_tokens)
    # A recomputed chunk of one token counts as decode and leaves its share of prompt attention
    # unpaid, but takes an iteration of its own. Only where that iteration is not the dearer of the
    # two is the recomputation's attention left out of the bound.
    # In a pipeline the chunks of a recomputed context overlap: only one pass counts.
    own_iteration_ps = cost.decode_ps[0, 1] + cost.attention_ps[0, 0, 0]
    prefill_ps = cost.prefill_ps
    dearer = len(cost.stages) == 1 and bool(np.diff(prefill_ps[0]).max() <= own_iteration_ps)
    recompute_ps = prefill_ps if dearer else np.zeros_like(prefill_ps)
    _decode_floors(cost, contexts, recompute_ps, rows, floors_ps)
    held = floors_ps[np.searchsorted(contexts, np.arange(1, longest + 1), side="right") - 1]
    return np.concatenate([np.zeros(2, np.int64), np.cumsum(held)])


@dataclass(frozen=True)
class Bounds:
    """Lower bounds on a run's latencies and makespan."""

    values: Latencies
    makespan_s: float


@compiled
def _from_state(
    request: Ints,
    time_ps: Ints,
    event_ps: Ints,
    idle_ps: Ints,
    ingress_ps: int,
    prompt_ps: Ints,
    work_ps: Ints,
    decode_ps: Ints,
    done_ps: Ints,
    first_ps: Ints,
    last_ps: Ints,
) -> None:
    """Fill ``first_ps`` and ``last_ps`` with bounds from arrival to first and last token.

    Whatever has happened counts exactly. No batch ends before the replica's next event and none
    starts before ``idle_ps``; prompts not yet computed follow one another in order of arrival
    (fact 2). ``done_ps``, (R,), is scratch: when each replica can have computed the prompts seen
    so far.
    """
    for r in range(done_ps.size):
        done_ps[r] = 0 if idle_ps[r] == NEVER_PS else idle_ps[r]
    for i in range(request.shape[0]):
        r = request[i, REPLICA]
        prompt, output = request[i, PROMPT], request[i, OUTPUT]
        generated = request[i, GENERATED]
        arrival = time_ps[i, ARRIVAL]
        if time_ps[i, FINISH] != NEVER_PS:
            first_ps[i] = time_ps[i, FIRST_TOKEN] - arrival
            last_ps[i] = time_ps[i, FINISH] - arrival
            continue
        if r < 0:  # not sent, or not routed yet
            first_ps[i] = ingress_ps + prompt_ps[prompt]
            last_ps[i] = first_ps[i] + decode_ps[prompt + output] - decode_ps[prompt + 1]
            continue
        if generated > 0:
            first_ps[i] = time_ps[i, FIRST_TOKEN] - arrival
            rest_ps = decode_ps[prompt + output] - decode_ps[prompt + generated + 1]
            last_ps[i] = event_ps[r] + rest_ps - arrival
            continue
        visible = arrival + ingress_ps
        computed = min(request[i, COMPUTED], prompt)
        done_ps[r] = max(done_ps[r], visible) + work_ps[prompt] - work_ps[computed]
        first_ps[i] = done_ps[r] - arrival
        if computed == 0:
            start = max(idle_ps[r], visible) if idle_ps[r] != NEVER_PS else visible
            first_ps[i] = max(first_ps[i], start + prompt_ps[prompt] - arrival)
        last_ps[i] = first_ps[i] + decode_ps[prompt + output] - decode_ps[prompt + 1]


def _idle_ps(run: Run) -> Ints:
    """Before when each replica starts no further batch; shape (R,).

    That is its next event, unless its pipeline has room: then a request that arrives may start
    one at any time after the last start.
    """
    state = run.state
    in_flight = state.replica[:, IN_FLIGHT]
    has_room = (in_flight > 0) & (in_flight < run.rules.batches_in_flight)
    newest = (state.replica[:, NEXT_SLOT] - 1) % run.rules.batches_in_flight
    started = state.slot[np.arange(len(newest)), newest, STARTED]
    return np.where(has_room, np.minimum(started, state.event_ps), state.event_ps)


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
    first_ps, last_ps = (np.zeros(workload.num_requests, np.int64) for _ in range(2))
    _from_state(
        state.request,
        state.time_ps,
        state.event_ps,
        _idle_ps(run),
        run.limits.ingress_ps,
        floors.prompt_ps,
        floors.prompt_work_ps,
        floors.decode_ps,
        np.zeros(len(state.event_ps), np.int64),
        first_ps,
        last_ps,
    )
    values = latencies(np.zeros_like(first_ps), first_ps, last_ps, workload.output_tokens)
    arrival_ps = state.time_ps[:, ARRIVAL]
    known = arrival_ps != NEVER_PS
    ends_ps = arrival_ps[known] + last_ps[known]
    return Bounds(values, float(in_s(ends_ps.max() - arrival_ps[known].min())))
