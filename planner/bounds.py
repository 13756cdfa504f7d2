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
from typing import TYPE_CHECKING, Final

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
    from simulator.workload import Workload

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]

_CONTEXTS_PER_OCTAVE = 4
"""Contexts per factor of two at which the decode floor is evaluated; in between, the value at the
next smaller one is held, which fact 1 makes a bound."""


SLOPE_UNIT: Final = 1024
"""Slopes count in this part of a picosecond per token: a prompt of 100,000 tokens loses 0.1 ns to
their rounding, and products with its tokens stay far below 2^63."""

_LINES: Final = 8
"""Shares of the budget at which a support line is drawn; more change no bound by 0.1 %."""


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
        an iteration costs at least ``b + each_ps >= 0``, whatever its tokens.
    work_ps
        Per token: ``work_ps t <= mixed_ps[t] + each_ps`` for every t in 1 .. B.
    """

    each_ps: int
    first_token_ps: int
    pass_ps: int
    lines: tuple[tuple[int, int], ...]
    work_ps: int

    @classmethod
    def of(cls, cost: IterationCost, kind: int, budget: int) -> StageSupport:
        """Read the support of one kind of stage."""
        mixed_ps = cost.mixed_ps[kind, : budget + 1]
        tokens = np.arange(1, budget + 1)
        each_ps = int(decode_attention_ps(cost, kind, 0, 0) + cost.host_ps[kind])
        return cls(
            each_ps=each_ps,
            first_token_ps=int(cost.sampled_ps[kind, 1]),
            pass_ps=int(iteration_ps(cost, kind, 1, 0, 0, 0, 0, True)),
            lines=tuple(line for line in _lines_below(mixed_ps) if line[1] + each_ps >= 0),
            work_ps=int(np.min((mixed_ps[1:] + each_ps) // tokens)),
        )

    def prompt_ps(self, cost: IterationCost, kind: int, budget: int) -> Ints:
        """(L + 1,) least time that the chunks of a prompt take, one after the other.

        One chunk costs its own time; k >= 2 of them, k >= l / B, cost ``a l + k (b + each)`` or
        more along a line ``(a, b)``, which grows with k.
        """
        lengths = np.arange(cost.max_context + 1)
        chunks = np.maximum(2, -(-lengths // budget))
        prompt_ps = np.zeros(len(lengths), np.int64)
        for slope, start_ps in self.lines:
            split_ps = slope * lengths // SLOPE_UNIT + chunks * (start_ps + self.each_ps)
            prompt_ps = np.maximum(prompt_ps, split_ps)
        fits = min(budget, cost.max_context)
        whole_ps = cost.mixed_ps[kind, : fits + 1] + self.each_ps
        prompt_ps[: fits + 1] = np.minimum(prompt_ps[: fits + 1], whole_ps)
        return prompt_ps + cost.prefill_ps[kind] + self.first_token_ps


@dataclass(frozen=True)
class Support:
    """What was read off one cost: all that the bounds of one budget and number of seats rest on.

    Every entry is checked by looking at each batch size once (``planner/verify_bounds.py`` does),
    so that a certificate which carries them can be judged without knowing how they were found.

    Parameters
    ----------
    budget_tokens
        Token budget of one iteration.
    kinds
        Support of each kind of pipeline stage.
    contexts, decode_ps
        Least time of an iteration that emits a token at each of these contexts, ascending from 1;
        held until the next.
    """

    budget_tokens: int
    kinds: tuple[StageSupport, ...]
    contexts: tuple[int, ...]
    decode_ps: tuple[int, ...]

    @classmethod
    def of(cls, cost: IterationCost, budget_tokens: int, seqs: int) -> Support:
        """Read the support of ``cost`` for a budget and a number of seats."""
        budget = min(budget_tokens, cost.max_tokens)
        contexts, decode_ps = _decode_floors_at(cost, seqs)
        return cls(
            budget_tokens=budget,
            kinds=tuple(StageSupport.of(cost, k, budget) for k in range(len(cost.host_ps))),
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
    for share in np.linspace(budget / 4, budget, _LINES):
        right = min(max(1, int(np.searchsorted(corners, share))), len(corners) - 1)
        a, b = corners[max(0, right - 1)], corners[right]
        if a < b:
            slope = int((mixed_ps[b] - mixed_ps[a]) * SLOPE_UNIT // (b - a))
            least = (mixed_ps[1:] * SLOPE_UNIT - slope * tokens).min()
            lines.add((slope, int(least // SLOPE_UNIT)))
    return sorted(lines)


@dataclass(frozen=True)
class CostFloors:
    """Least times that follow from one iteration cost under one token budget; picoseconds.

    Parameters
    ----------
    prompt_ps
        (L + 1,) least time from admission to first token of a prompt of ``l`` tokens.
    prompt_work_ps
        (L + 1,) least share of the replica's time that such a prompt takes, however batched.
    decode_ps
        (L + 2,) running sum of the least time per emitted token: tokens emitted at contexts
        ``a .. b - 1`` take at least ``decode_ps[b] - decode_ps[a]``.
    support
        What they were derived from, or ``None`` for floors that say nothing.
    """

    prompt_ps: Ints
    prompt_work_ps: Ints
    decode_ps: Ints
    support: Support | None

    @classmethod
    def of(cls, cost: IterationCost, budget_tokens: int, seqs: int) -> CostFloors:
        """Derive the floors of ``cost`` for a budget and a number of seats.

        Every chunk of a prompt passes through each pipeline stage in turn. At one of them the
        chunks follow one another; before it the first chunk and after it the last one has passed
        all others. Work queues at one stage: sums of each prompt's own worst stage would not bound
        anything, so the stage at which the longest prompt takes longest stands for all.
        """
        support = Support.of(cost, budget_tokens, seqs)
        longest, budget = cost.max_context, support.budget_tokens
        kinds = [int(kind) for kind in cost.stages]
        sends_ps = (len(kinds) - 1) * int(cost.send_ps[1]) if len(kinds) > 1 else 0
        all_ps = sum(support.kinds[kind].pass_ps for kind in kinds) + sends_ps
        prompt_ps = np.zeros(longest + 1, np.int64)
        for kind in sorted(set(kinds)):
            stage = support.kinds[kind]
            others_ps = all_ps - stage.pass_ps
            prompt_ps = np.maximum(prompt_ps, stage.prompt_ps(cost, kind, budget) + others_ps)
        works_ps = [
            support.kinds[kind].work_ps * np.arange(longest + 1) + cost.prefill_ps[kind]
            for kind in sorted(set(kinds))
        ]
        held = np.searchsorted(support.contexts, np.arange(1, longest + 1), side="right") - 1
        decode_ps = np.cumsum(np.array(support.decode_ps)[held])
        return cls(
            prompt_ps,
            max(works_ps, key=lambda work_ps: int(work_ps[-1])),
            np.concatenate([np.zeros(2, np.int64), decode_ps]),
            support,
        )

    @classmethod
    def none(cls, cost: IterationCost) -> CostFloors:
        """Floors that say nothing: for what the facts above do not cover."""
        zeros = np.zeros(cost.max_context + 2, np.int64)
        return cls(zeros[:-1], zeros[:-1], zeros, None)


def _decode_floors_at(cost: IterationCost, seqs: int) -> tuple[Ints, Ints]:
    """Contexts, four to each factor of two, and the least time of emitting a token at each."""
    longest = cost.max_context
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
    return contexts, floors_ps


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


def gap_bounds(workload: Workload, floors: CostFloors) -> tuple[Floats, Ints]:
    """Lower bounds on the gaps between tokens, seconds, and how many gaps have each.

    A gap ends with an iteration that emits a token at the request's context (fact 3), so sorted
    floors are below sorted gaps, entry by entry.
    """
    starts = np.bincount(workload.prompt_tokens + 1, minlength=len(floors.decode_ps))
    ends = np.bincount(
        workload.prompt_tokens + workload.output_tokens, minlength=len(floors.decode_ps)
    )
    tokens = np.cumsum(starts - ends)[: len(floors.decode_ps) - 1]
    return in_s(np.diff(floors.decode_ps)), tokens
