"""Floors: least times per request that follow from the support of one iteration cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np

from planner.support import SLOPE_UNIT, Support
from simulator.rules import VLLM_V1

if TYPE_CHECKING:
    import numpy.typing as npt

    from simulator.rules import Rules
    from simulator.state import Limits
    from simulator.timing import IterationCost
    from simulator.workload import Workload

    Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PromptFloors:
    """Least times from admission to first token, by tokens to compute; picoseconds.

    Attention over the prompt comes on top: of all stages where it is computed in one piece, else of
    the stage at which its chunks are counted.

    Parameters
    ----------
    whole_ps, whole_attention_ps
        (L + 1,) in one piece, through all stages.
    cut_ps, attention_ps
        (K, L + 1) in several chunks that follow one another at a stage of each kind.
    """

    whole_ps: Ints
    whole_attention_ps: Ints
    cut_ps: Ints
    attention_ps: Ints

    @classmethod
    def of(cls, cost: IterationCost, support: Support) -> PromptFloors:
        """Derive them.

        Every chunk passes through each stage in turn. At one of them the chunks follow one another;
        before it the first chunk and after it the last one has passed all others.
        """
        stages = [int(kind) for kind in cost.stages]
        kinds = sorted(set(stages))
        tokens = np.arange(cost.max_context + 1)
        fits = np.minimum(tokens, support.budget_tokens)
        # Times of sending are not promised to rise: what holds for more tokens holds for fewer.
        sends_ps = np.zeros_like(cost.mixed_ps[0])
        if len(stages) > 1:
            rising_ps = np.minimum.accumulate(cost.send_ps[::-1])[::-1]
            sends_ps = (len(stages) - 1) * rising_ps
        whole_ps = sends_ps[fits].copy()
        for kind in stages:
            whole_ps += cost.mixed_ps[kind][fits] + support.kinds[kind].each_ps
        samples_ps = support.kinds[stages[-1]].first_token_ps
        whole_ps[support.budget_tokens + 1 :] = _FAR_PS
        cuts_ps = []
        for kind in kinds:
            if support.full_tokens:
                cut_ps = np.min(
                    [_full_chunks_ps(cost, support, kind, b, tokens) for b in support.full_tokens],
                    axis=0,
                )
            else:
                cut_ps = _chunks_ps(support, kind, stages, tokens) + sends_ps[1]
            cuts_ps.append(cut_ps + samples_ps)
        attention_ps = cost.prefill_ps[kinds]
        counts = np.array([stages.count(kind) for kind in kinds])
        return cls(
            _from_more(whole_ps + samples_ps),
            counts @ attention_ps,
            _from_more(np.array(cuts_ps)),
            attention_ps,
        )

    def alone_ps(self, prompt: Ints, cached: Ints) -> Ints:
        """Least time from admission to first token of prompts of which some tokens are cached."""
        tokens = prompt - cached
        whole_ps = self.whole_ps[tokens] + self.whole_attention_ps[prompt]
        whole_ps = whole_ps - self.whole_attention_ps[cached]
        cut_ps = self.cut_ps[:, tokens] + self.attention_ps[:, prompt]
        cut_ps = cut_ps - self.attention_ps[:, cached]
        least: Ints = np.minimum(whole_ps, cut_ps).max(axis=0)
        return least


_FAR_PS: Final = np.iinfo(np.int64).max >> 2


def _from_more(floors_ps: Ints) -> Ints:
    """Floors by tokens that never fall: more tokens never take less time."""
    least: Ints = np.minimum.accumulate(floors_ps[..., ::-1], axis=-1)[..., ::-1]
    return least


def _full_chunks_ps(
    cost: IterationCost, support: Support, kind: int, budget: int, tokens: Ints
) -> Ints:
    """(L + 1,) least time of a prompt that is cut, where every chunk but the last fills ``budget``.

    k chunks, k >= 2 and k >= l / B, count at the last stage of this ``kind``: the first passes the
    stages before it and the last, of at least ``l - (k - 1) B`` tokens, those behind it. More
    chunks than needed take longer at the stage, but leave the last one a single token.
    """
    stages = [int(stage) for stage in cost.stages]
    at = len(stages) - 1 - stages[::-1].index(kind)

    def passes_ps(some: list[int], size: Ints) -> Ints:
        total: Ints = np.zeros(size.shape, np.int64)
        for stage in some:
            total = total + cost.mixed_ps[stage][size] + support.kinds[stage].each_ps
        return total

    full_ps = int(passes_ps([kind], np.array([budget]))[0])
    before_ps = int(passes_ps(stages[:at], np.array([budget]))[0])
    if len(stages) > 1:
        before_ps += at * int(cost.send_ps[budget:].min())
        before_ps += (len(stages) - 1 - at) * int(cost.send_ps[1:].min())
    needed = np.maximum(2, -(-tokens // budget))
    last = np.maximum(1, tokens - (needed - 1) * budget)
    fewest_ps = (needed - 1) * full_ps + passes_ps(stages[at:], last)
    more_ps = needed * full_ps + int(passes_ps(stages[at:], np.array([1]))[0])
    least: Ints = before_ps + np.minimum(fewest_ps, more_ps)
    return least


def _chunks_ps(support: Support, kind: int, stages: list[int], tokens: Ints) -> Ints:
    """(L + 1,) least time of a prompt in several chunks of whatever batches.

    k >= 2 chunks, k >= l / B, cost ``a l + k (b + each)`` or more along a line ``(a, b)``, which
    grows with k; at other stages at least the first or the last one passes.
    """
    own = support.kinds[kind]
    chunks = np.maximum(2, -(-tokens // support.budget_tokens))
    cut_ps = np.zeros(len(tokens), np.int64)
    for slope, start_ps in own.lines:
        split_ps = slope * tokens // SLOPE_UNIT + chunks * (start_ps + own.each_ps)
        cut_ps = np.maximum(cut_ps, split_ps)
    others_ps: Ints = cut_ps + sum(support.kinds[k].pass_ps for k in stages) - own.pass_ps
    return others_ps


@dataclass(frozen=True)
class CostFloors:
    """Least times that follow from one iteration cost under one token budget; picoseconds.

    Parameters
    ----------
    prompts
        Those from admission to first token.
    prompt_work_ps
        (L + 1,) least share of the replica's time that computing the first ``l`` tokens of a prompt
        takes, however batched.
    share_ps
        Pairs ``(theta, phi)``: a token emitted at context ``c`` takes at least ``theta c + phi`` of
        the same time.
    decode_ps
        (L + 2,) running sum of the least time per emitted token: tokens emitted at contexts
        ``a .. b - 1`` take at least ``decode_ps[b] - decode_ps[a]``.
    support
        What they were derived from.
    keeps_blocks
        Whether a preempted request may find its blocks again.
    """

    prompts: PromptFloors
    prompt_work_ps: Ints
    share_ps: tuple[tuple[int, int], ...]
    decode_ps: Ints
    support: Support
    keeps_blocks: bool

    @cached_property
    def prompt_ps(self) -> Ints:
        """(L + 1,) least time from admission to first token, whatever a prefix cache may hold."""
        lengths = np.arange(len(self.prompt_work_ps))
        held = np.maximum(0, lengths - 1) if self.keeps_blocks else np.zeros_like(lengths)
        return self.prompts.alone_ps(lengths, held)

    @classmethod
    def of(cls, cost: IterationCost, support: Support, *, keeps_blocks: bool = False) -> CostFloors:
        """Derive the floors of ``cost``, or of any cost that is nowhere below it.

        Work queues at one stage: sums of each prompt's own worst stage would not bound anything, so
        the stage at which the longest prompt takes longest stands for all.
        """
        longest = cost.max_context
        kinds = sorted({int(kind) for kind in cost.stages})
        works_ps = {
            k: support.kinds[k].work_ps * np.arange(longest + 1) + cost.prefill_ps[k] for k in kinds
        }
        slowest = max(kinds, key=lambda k: int(works_ps[k][-1]))
        held = np.searchsorted(support.contexts, np.arange(1, longest + 1), side="right") - 1
        decode_ps = np.cumsum(np.array(support.decode_ps)[held])
        return cls(
            PromptFloors.of(cost, support),
            works_ps[slowest],
            support.kinds[slowest].shares,
            np.concatenate([np.zeros(2, np.int64), decode_ps]),
            support,
            keeps_blocks,
        )


@dataclass(frozen=True)
class RequestFloors:
    """Least times of each request of a workload, (N,) each, and the tables behind them.

    Parameters
    ----------
    alone_ps
        From admission to first token.
    decode_ps
        From first to last token.
    cached
        Prompt tokens that may be found in the prefix cache at the first admission.
    share_ps
        The pair ``(theta, phi)`` that charges most for all tokens.
    costs
        The tables.
    """

    alone_ps: Ints
    decode_ps: Ints
    cached: Ints
    share_ps: tuple[int, int]
    costs: CostFloors

    @classmethod
    def of(cls, costs: CostFloors, workload: Workload, cached: Ints) -> RequestFloors:
        """Look the workload's requests up in ``costs``."""
        prompt, output = workload.prompt_tokens, workload.output_tokens
        more = output - 1
        contexts = int((more * (2 * prompt + output) // 2).sum())  # sum of p + 1 .. p + o - 1

        def charged(pair: tuple[int, int]) -> int:
            return pair[0] * contexts + pair[1] * int(more.sum())

        return cls(
            costs.prompts.alone_ps(prompt, cached),
            costs.decode_ps[prompt + output] - costs.decode_ps[prompt + 1],
            cached,
            max(costs.share_ps, key=charged, default=(0, 0)),
            costs,
        )


def cacheable_tokens(workload: Workload, rules: Rules) -> Ints:
    """(N,) most prompt tokens that each request can find in a prefix cache when first admitted.

    A block is found only if a request that was scheduled before has one of the same content, and
    the last token of a prompt is always computed. In an open loop that is an earlier request.
    """
    cached = np.zeros(workload.num_requests, np.int64)
    if not rules.prefix_caching or workload.block_tokens == 0:
        return cached
    ids, starts = workload.block_ids, workload.block_starts
    owner = np.repeat(np.arange(workload.num_requests), np.diff(starts))
    if all_known(workload):
        first = np.full(int(ids.max(initial=-1)) + 1, workload.num_requests)
        np.minimum.at(first, ids, owner)
        shared = first[ids] < owner
    else:
        shared = np.bincount(ids)[ids] > 1
    # Leading blocks that are shared: up to the first that is not.
    alone = np.append(np.flatnonzero(~shared), len(ids))
    end = np.minimum(alone[np.searchsorted(alone, starts[:-1])], starts[1:])
    cached = (end - starts[:-1]) * workload.block_tokens
    least: Ints = np.minimum(cached, workload.prompt_tokens - 1)
    return least


def all_known(workload: Workload) -> bool:
    """Whether every arrival is known beforehand, so that requests are sent in their own order."""
    return workload.concurrency == 0 and not len(workload.after)


def keeps_order(rules: Rules) -> bool:
    """Whether a request is admitted only once all before it hold their whole prompts."""
    return rules.policy == VLLM_V1


def cache_tokens(limits: Limits, rules: Rules) -> int:
    """Most tokens of context in one batch: what the KV blocks hold, or no limit worth naming."""
    plain = limits.windowed == limits.fixed == 0 and limits.growing > 0
    if rules.prefix_caching or not plain:
        return int(np.iinfo(np.int64).max >> 8)
    return limits.num_blocks // limits.growing * limits.block_tokens
