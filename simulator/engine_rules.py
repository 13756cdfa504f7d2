"""What an engine version adds to kernel times: host time, and batches that replay as graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from simulator.plan import BatchingLimits

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class HostConstants:
    """What no kernel table sees: host time and scheduling effects of one engine version.

    Parameters
    ----------
    iteration_s
        Host time that each iteration adds.
    sequence_s
        Host time that each sampled sequence adds to its iteration.
    ingress_s
        From the client's send to the scheduler's queue: HTTP, tokenising, hand-over.
    eager_layer_s
        Least time of a layer in an iteration that runs outside a full CUDA graph.
    eager_dealt_layer_s
        What a layer whose experts are dealt out over devices adds to that: the kernels which sort
        tokens by expert and put them back.
    prefill_multiplier
        Factor on the device time of an iteration that computes prompt tokens.

    """

    iteration_s: float = 0.0
    sequence_s: float = 0.0
    ingress_s: float = 0.0
    eager_layer_s: float = 0.0
    eager_dealt_layer_s: float = 0.0
    prefill_multiplier: float = 1.0

    def __post_init__(self) -> None:
        """Refuse constants that would make prompt tokens cheaper than decode tokens."""
        if self.prefill_multiplier < 1.0:
            raise ValueError(f"prefill_multiplier is {self.prefill_multiplier}; it must be >= 1")


Padding = Literal["none", "widest", "widest_if_half"]
"""How attention groups' tokens are laid out for one another in an iteration without a graph:

``none``
    Each brings as many as it has.
``widest``
    Every group is padded to the one with most tokens.
``widest_if_half``
    So it is where at least half of the padded tokens are real ones, else as ``none``.
"""


@dataclass(frozen=True)
class LockstepRules:
    """How an engine version runs the attention groups of one replica (``Shape.dp`` above 1).

    Parameters
    ----------
    padding, padding_with_prompts
        Of an iteration that replays no graph: without prompt tokens in any group, and with.
    idle_tokens
        Tokens that a group without work computes while another one works.
    shares_seqs, shares_tokens
        Whether the limits that the engine is started with are the replica's, of which each group
        gets an equal part; otherwise they are each group's own.
    graphs_with_prompts
        Whether iterations with prompt tokens can replay graphs, where the version has such.
    router
        How requests are dealt out to groups, a name of `simulator.rules.ROUTERS`.
    reserve_factor
        Factor on the share of outstanding output that admission reserves (SGLang).
    hold_iterations, gather_iterations
        TensorRT-LLM's ``attention_dp_config``: admission waits until every group has a prompt,
        ``timeout_iters`` iterations at most, and then up to ``batching_wait_iters`` more for
        further ones; 0 each where ``enable_balance`` is off.

    """

    padding: Padding
    padding_with_prompts: Padding
    idle_tokens: int
    shares_seqs: bool
    shares_tokens: bool
    graphs_with_prompts: bool
    router: str
    reserve_factor: float = 1.0
    hold_iterations: int = 0
    gather_iterations: int = 0

    def limits_of(self, limits: BatchingLimits, groups: int) -> BatchingLimits:
        """Limits of one of ``groups`` groups of a replica that is started with ``limits``."""
        seqs, tokens = limits.max_num_seqs, limits.max_num_batched_tokens
        return BatchingLimits(
            max(1, seqs // groups) if self.shares_seqs else seqs,
            max(1, tokens // groups) if self.shares_tokens else tokens,
        )


@dataclass(frozen=True)
class GraphRules:
    """Which batches an engine version replays from a CUDA graph.

    Parameters
    ----------
    sizes
        Capture sizes of batches without prompt tokens, ascending, tokens.
    full_decode
        Whether such a batch replays as one graph; otherwise only the pieces between attention
        calls do.
    captures_budget
        Whether the token budget itself is captured too where it is in the captured range.
    per_sequence
        Graphs reach up to this many times the limit on sequences: 2 in vLLM V1 (config/vllm.py,
        ``_set_cudagraph_sizes``), 1 elsewhere.
    captures_seats
        Whether the limit on sequences itself is captured too where it is below the largest size
        (SGLang model_executor/cuda_graph_runner.py, ``get_batch_sizes_to_capture``).
    within_budget
        Whether sizes above the token budget are left out; SGLang's budget counts no decodes.
    padded
        Whether a batch between two sizes is padded up to the next; if not, it runs without a
        graph (TensorRT-LLM, unless ``enable_padding``).
    prompt_sizes
        Capture sizes of batches with prompt tokens, which replay piece by piece; ``None``: those
        of batches without.
    largest_by_tp
        Largest size from a tensor-parallel width on, as (width, size), widths ascending; empty
        where the width has no say.

    """

    sizes: tuple[int, ...]
    full_decode: bool
    captures_budget: bool = False
    per_sequence: int = 2
    captures_seats: bool = False
    within_budget: bool = True
    padded: bool = True
    prompt_sizes: tuple[int, ...] | None = None
    largest_by_tp: tuple[tuple[int, int], ...] = ()

    def largest(self, tp: int = 1) -> int:
        """Largest size that the engine means to capture at width ``tp``, whatever the limits."""
        at_width = [size for width, size in self.largest_by_tp if width <= tp]
        return at_width[-1] if at_width else self.sizes[-1] if self.sizes else 0

    def captured(self, limits: BatchingLimits, tp: int = 1) -> tuple[int, ...]:
        """Sizes captured for batches without prompt tokens."""
        budget = limits.max_num_batched_tokens
        range_end = min(self.per_sequence * limits.max_num_seqs, self.largest(tp))
        captured = {size for size in self.sizes if size <= range_end}
        if self.captures_seats and limits.max_num_seqs < self.largest(tp):
            captured.add(limits.max_num_seqs)
        if self.captures_budget and budget <= range_end:
            captured.add(budget)
        if self.within_budget:
            captured = {size for size in captured if size <= budget}
        return tuple(sorted(captured))

    def captured_with_prompts(self, limits: BatchingLimits, tp: int = 1) -> tuple[int, ...]:
        """Sizes captured for batches with prompt tokens; empty where those run without graphs."""
        if self.prompt_sizes is None:
            return self.captured(limits, tp)
        budget = limits.max_num_batched_tokens
        return tuple(size for size in self.prompt_sizes if size <= budget)


def graph_sizes(singles: Sequence[int], ranges: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Capture sizes from single sizes and (first, last, step) ranges, ascending, tokens."""
    sizes = set(singles)
    for first, last, step in ranges:
        sizes.update(range(first, last + 1, step))
    return tuple(sorted(sizes))
