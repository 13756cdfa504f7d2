"""Runs of decode-only iterations that the jump engine plans ahead.

A run is one batch in flight whose end is that of its last iteration. A request that arrives can cut
it short at the next end of an iteration; until then nothing about it is written to the state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from simulator.compiled import inner
from simulator.decode_run import run_ps
from simulator.decode_set import (
    ACTIVE,
    CONTEXT,
    DECODES,
    STEPS,
    DecodeSets,
    blocks_needed,
    empty_sets,
    iterations_that_fit,
    next_due,
)
from simulator.kvcache import grow, has_pool, pages_for
from simulator.policies.batch import note_usage
from simulator.policies.vllm_v0 import wanted_free
from simulator.rules import SARATHI, SGLANG, VLLM_V0
from simulator.sends import next_send_ps
from simulator.state import (
    COMPUTED,
    ENDS,
    FREE_BLOCKS,
    GENERATED,
    HEAD,
    HELD_BLOCKS,
    HELD_TOKENS,
    ITERATIONS,
    LAST_TOKEN,
    NEVER_PS,
    OLDEST,
    OUTPUT,
    RUNNING,
    STACKED,
    STARTED,
    TAIL,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from simulator.policies import Batch
    from simulator.rules import Rules
    from simulator.state import Limits, State
    from simulator.timing import IterationCost

    Ints = npt.NDArray[np.int64]

# Columns of Ahead.run, (R, 8) int64: iterations of the run in flight; when it began; tokens,
# decodes, sampled sequences and context of its first iteration; whether a request that arrives
# can join it; the replica's queue position when it was planned.
_COUNT, _BEGAN, _TOKENS, _DECODES, _SAMPLED, _CONTEXT, _OPEN, _TAIL = range(8)
_RUN_COLUMNS = 8


class Ahead(NamedTuple):
    """What the jump engine knows beside the state.

    Attributes
    ----------
    run
        Table whose columns are named above.
    sets
        Decoding requests as sums.

    """

    run: Ints
    sets: DecodeSets


def nothing_ahead(state: State, limits: Limits) -> Ahead:
    """No run planned."""
    replicas, seats = state.running.shape
    run = np.zeros((replicas, _RUN_COLUMNS), np.int64)
    run[:, _COUNT] = 1
    return Ahead(run, empty_sets(replicas, seats, limits.block_tokens))


@inner
def plan_run(
    state: State,
    ahead: Ahead,
    limits: Limits,
    rules: Rules,
    cost: IterationCost,
    batch: Batch,
    r: int,
    seen: int,
    unsettled: bool,
) -> None:
    """Make the batch just started the first of as many equal ones as will surely follow it.

    They follow until a request finishes or blocks run out. A waiting request that was refused stays
    so meanwhile, since seats and blocks only get scarcer, unless it was refused only because the
    scheduler did not see it or, ``unsettled``, because this batch preempted a request or did not
    see what finished ones have left. A cached block of its prompt that is lost meanwhile is the
    last one found, so that it asks for one block less at most, of one free block less.
    """
    replica, sums = state.replica, ahead.sets.sums
    ahead.run[r, _COUNT] = 1
    running = replica[r, RUNNING]
    if batch.has_prefill or batch.decodes != running or batch.sampled != running:
        return
    empty = replica[r, HEAD] == replica[r, TAIL] and replica[r, STACKED] == 0
    if not empty and (unsettled or seen < replica[r, TAIL] or rules.policy == SGLANG):
        return
    if not empty and has_pool(state) and (rules.prompts_per_step > 0 or not rules.chunked):
        # The batch may have admitted all it may, and nothing but decodes; a whole prompt may come
        # to exceed the budget when less of it is cached.
        return
    if sums[r, ACTIVE]:
        if sums[r, DECODES] != running:
            return
        count = next_due(ahead.sets, r) - sums[r, STEPS]
        # The first iteration has its blocks already.
        free = replica[r, FREE_BLOCKS] + blocks_needed(ahead.sets, limits, r, 0, 1)
        count = iterations_that_fit(ahead.sets, limits, r, count, free)
    else:
        count = _plain_iterations(state, limits, rules, r)
    if count <= 1:
        return
    run = ahead.run
    run[r, _COUNT] = count
    run[r, _BEGAN] = state.slot[r, replica[r, OLDEST], STARTED]
    run[r, _TOKENS] = batch.tokens
    run[r, _DECODES] = batch.decodes
    run[r, _SAMPLED] = batch.sampled
    run[r, _CONTEXT] = batch.context_tokens
    run[r, _OPEN] = empty
    run[r, _TAIL] = replica[r, TAIL]
    # The next send that is known to come here ends the run, which saves cutting it then.
    until = next_send_ps(state, limits) if empty and state.replica.shape[0] == 1 else NEVER_PS
    end_run(state, ahead, cost, r, until)


@inner
def _plain_iterations(state: State, limits: Limits, rules: Rules, r: int) -> int:
    """Iterations until the first running request finishes or blocks run out."""
    table, running, n = state.request, state.running, state.replica[r, RUNNING]
    count = NEVER_PS
    for i in range(n):
        request = running[r, i]
        count = min(count, table[request, OUTPUT] - table[request, GENERATED])
    free, low, high = state.replica[r, FREE_BLOCKS], 1, count
    free -= _wanted_free(limits, rules)
    while low < high:  # the largest count whose blocks are free
        middle = (low + high + 1) >> 1
        need = 0
        for i in range(n):
            request = running[r, i]
            tokens = table[request, COMPUTED] + middle - 1
            if tokens > table[request, HELD_TOKENS]:
                need += pages_for(limits, tokens) - table[request, HELD_BLOCKS]
        if need <= free:
            low = middle
        else:
            high = middle - 1
    return low


@inner
def _wanted_free(limits: Limits, rules: Rules) -> int:
    """Pages that a policy wants to see free for every token, whether it takes them or not."""
    if rules.policy == VLLM_V0 or rules.policy == SARATHI:
        return wanted_free(limits)
    return 0


@inner
def end_run(state: State, ahead: Ahead, cost: IterationCost, r: int, until_ps: int) -> None:
    """Let the run in flight end with its first iteration that ends at ``until_ps`` or later."""
    run = ahead.run
    most = run[r, _COUNT]
    until = NEVER_PS if until_ps == NEVER_PS else until_ps - run[r, _BEGAN]
    count, time_ps = run_ps(
        cost, run[r, _TOKENS], run[r, _DECODES], run[r, _SAMPLED], run[r, _CONTEXT], most, until
    )
    run[r, _COUNT] = count
    ends = run[r, _BEGAN] + time_ps
    state.slot[r, state.replica[r, OLDEST], ENDS] = ends
    state.stage_ps[r, 0] = ends
    state.event_ps[r] = ends


@inner
def cut_runs(state: State, ahead: Ahead, cost: IterationCost, now_ps: int, acted: int) -> None:
    """End every run that a request just queued can join with its iteration in flight.

    Of events at one instant the lower replica's come first: below replica ``acted`` an iteration
    that ends now has ended already.
    """
    run = ahead.run
    for r in range(run.shape[0]):
        if run[r, _COUNT] > 1 and run[r, _OPEN] and run[r, _TAIL] != state.replica[r, TAIL]:
            run[r, _OPEN] = 0
            end_run(state, ahead, cost, r, now_ps + (r < acted))


@inner
def skip_to_last(state: State, ahead: Ahead, limits: Limits, rules: Rules, r: int) -> None:
    """Do all of a run but its last iteration, which stays in flight; that it has begun is left."""
    run, sets, table = ahead.run, ahead.sets, state.request
    count = run[r, _COUNT] - 1
    if count == 0:
        return
    state.counters[ITERATIONS] += count
    if sets.sums[r, ACTIVE]:
        state.replica[r, FREE_BLOCKS] -= blocks_needed(sets, limits, r, 1, count)
        sets.sums[r, STEPS] += count
        sets.sums[r, CONTEXT] += count * sets.sums[r, DECODES]
    else:
        # Which block a request takes from the pool depends on who took one before.
        tokens = 1 if has_pool(state) else count
        for _ in range(count // tokens):
            for i in range(state.replica[r, RUNNING]):
                request = state.running[r, i]
                table[request, COMPUTED] += tokens
                table[request, GENERATED] += tokens
                grow(state, limits, r, request, table[request, COMPUTED])
        if rules.policy == SGLANG:
            _decay(state, rules, r, count)
    run[r, _COUNT] = 1
    held = limits.num_blocks - state.replica[r, FREE_BLOCKS]
    note_usage(state, limits, r, run[r, _TOKENS], held + _wanted_free(limits, rules))


@inner
def _decay(state: State, rules: Rules, r: int, count: int) -> None:
    """SGLang's share of reserved output after more decode iterations."""
    for _ in range(count):
        if state.ratio[r] <= rules.least_new_token_ratio:
            break
        state.ratio[r] = max(rules.least_new_token_ratio, state.ratio[r] - rules.ratio_decay)


@inner
def is_run(ahead: Ahead, r: int) -> bool:
    """Whether the batch in flight of replica ``r`` is more than one iteration."""
    return ahead.run[r, _COUNT] > 1


@inner
def begin_last(state: State, ahead: Ahead, cost: IterationCost, r: int) -> None:
    """Note when a run's last iteration began, and that its requests emitted a token then."""
    run, count = ahead.run, ahead.run[r, _COUNT] - 1
    if count == 0:
        return
    _, time_ps = run_ps(
        cost,
        run[r, _TOKENS],
        run[r, _DECODES],
        run[r, _SAMPLED],
        run[r, _CONTEXT],
        count,
        NEVER_PS,
    )
    began = run[r, _BEGAN] + time_ps
    state.slot[r, state.replica[r, OLDEST], STARTED] = began
    if not ahead.sets.sums[r, ACTIVE]:
        for i in range(state.replica[r, RUNNING]):
            state.time_ps[state.running[r, i], LAST_TOKEN] = began
