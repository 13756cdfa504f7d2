"""Static batching: a batch is taken when nothing runs, and kept until all of it has finished.

Source: FasterTransformer, models/multi_gpu_gpt/ParallelGpt.cc (``forward``): the rows of finished
sequences stay in every product, in the head and in the sampler until ``finished_buf_`` holds for
all of them, and only decoder_masked_multihead_attention passes them over (``params.finished``).
Sarathi-Serve's faster_transformer_scheduler.py admits in the same way. Memory for a sequence's
prompt and output is taken beforehand, so nothing is ever preempted; prompts carry no padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.compiled import called, inner
from simulator.kvcache import blocks_for, grow, pages_for
from simulator.policies.batch import (
    Batch,
    add_prefill,
    emit,
    head_of_queue,
    known_tokens,
    note_usage,
    take_head,
)
from simulator.state import (
    BOUND_BLOCKS,
    BOUND_SEATS,
    BOUND_TOKENS,
    COMPUTED,
    FREE_BLOCKS,
    OUTPUT,
    POLICY_A,
    PROMPT,
    RUNNING,
)

if TYPE_CHECKING:
    from simulator.rules import Rules
    from simulator.state import Limits, State
    from simulator.timing import IterationCost

_BATCH_SIZE = POLICY_A  # column of State.replica: sequences of the current batch, finished or not


@called
def schedule(
    state: State, limits: Limits, rules: Rules, cost: IterationCost, r: int, seen: int
) -> Batch:
    """Form replica ``r``'s next batch and advance its requests' computed tokens.

    A batch first computes all its prompts, in one iteration or as the token budget allows, and
    then decodes. With several batches in flight it is cut into as many even micro-batches.

    Parameters
    ----------
    state, limits, rules, cost
        The run.
    r
        The replica.
    seen
        Position in its queue up to which the scheduler sees requests.

    Returns
    -------
    Batch
        Empty (``tokens == 0``) if there is nothing to do.

    """
    if state.replica[r, RUNNING] == 0:
        _take_batch(state, limits, rules, r, seen)
    rows = blocks_for(state.replica[r, _BATCH_SIZE], rules.batches_in_flight)
    if _computes_prompts(state, r):
        batch = _compute_prompts(state, limits, cost, r, rows)
    else:
        batch = _decode(state, r, rows)
    held = limits.num_blocks - state.replica[r, FREE_BLOCKS]
    note_usage(state, limits, r, batch.tokens, held)
    return batch


@inner
def _take_batch(state: State, limits: Limits, rules: Rules, r: int, seen: int) -> None:
    """Take waiting requests, in order, while seats, blocks and (without chunks) budget last."""
    table, replica = state.request, state.replica
    budget = limits.max_num_batched_tokens
    n = 0
    while True:
        request = head_of_queue(state, r, seen)
        if request < 0:
            break
        prompt = table[request, PROMPT]
        if n >= limits.max_num_seqs:
            replica[r, BOUND_SEATS] = 1
            break
        if prompt > budget and not rules.chunked:
            replica[r, BOUND_TOKENS] = 1
            break
        longest = prompt + table[request, OUTPUT]
        if pages_for(limits, longest) > replica[r, FREE_BLOCKS]:
            replica[r, BOUND_BLOCKS] = 1
            break
        take_head(state, r)
        grow(state, limits, r, request, longest)
        state.running[r, n] = request
        n += 1
        budget -= prompt
    replica[r, RUNNING] = n
    replica[r, _BATCH_SIZE] = n


@inner
def _computes_prompts(state: State, r: int) -> bool:
    """Whether any prompt of the batch is not computed yet."""
    for i in range(state.replica[r, RUNNING]):
        request = state.running[r, i]
        if state.request[request, COMPUTED] < state.request[request, PROMPT]:
            return True
    return False


@inner
def _compute_prompts(state: State, limits: Limits, cost: IterationCost, r: int, rows: int) -> Batch:
    """Compute the next prompts, at most ``rows`` of them; each emits when it is complete."""
    table = state.request
    tokens, sampled, taken = 0, 0, 0
    for i in range(state.replica[r, RUNNING]):
        request = state.running[r, i]
        computed = table[request, COMPUTED]
        lacking = table[request, PROMPT] - computed
        state.scheduled[r, i] = 0
        if lacking <= 0 or taken == rows:
            continue
        new = min(lacking, limits.max_num_batched_tokens - tokens)
        if new < lacking:
            state.replica[r, BOUND_TOKENS] = 1
        if new == 0:
            continue
        table[request, COMPUTED] = computed + new
        state.scheduled[r, i] = new
        taken += 1
        tokens += new
        add_prefill(state, cost, computed, computed + new)
        if new == lacking:
            sampled += 1
            emit(state, r, request)
    return Batch(tokens, 0, 0, sampled, tokens > 0)


@inner
def _decode(state: State, r: int, rows: int) -> Batch:
    """Decode up to ``rows`` sequences that are not in flight, with finished ones as padding."""
    table = state.request
    n = state.replica[r, RUNNING]
    taken, context = 0, 0
    for i in range(n):
        request = state.running[r, i]
        computed = table[request, COMPUTED]
        state.scheduled[r, i] = 0
        if taken == rows or known_tokens(state, request) == computed:
            continue
        table[request, COMPUTED] = computed + 1
        state.scheduled[r, i] = 1
        taken += 1
        context += computed + 1
        emit(state, r, request)
    tokens = taken
    if taken > 0:
        tokens += min(rows - taken, state.replica[r, _BATCH_SIZE] - n)
    return Batch(tokens, tokens, context, tokens, tokens < 0)
