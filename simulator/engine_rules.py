"""What an engine version adds to kernel times: host time, and batches that replay as graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulator.plan import BatchingLimits


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
    prefill_multiplier
        Factor on the device time of an iteration that computes prompt tokens.

    """

    iteration_s: float = 0.0
    sequence_s: float = 0.0
    ingress_s: float = 0.0
    eager_layer_s: float = 0.0
    prefill_multiplier: float = 1.0

    def __post_init__(self) -> None:
        """Refuse constants that would make prompt tokens cheaper than decode tokens."""
        if self.prefill_multiplier < 1.0:
            raise ValueError(f"prefill_multiplier is {self.prefill_multiplier}; it must be >= 1")


@dataclass(frozen=True)
class GraphRules:
    """Which batches an engine version replays from a CUDA graph.

    Parameters
    ----------
    sizes
        Capture sizes, ascending, tokens.
    full_decode
        Whether a pure decode batch replays as one graph; otherwise only the pieces between
        attention calls do.
    captures_budget
        Whether the token budget itself is captured too where it is in the captured range.

    """

    sizes: tuple[int, ...]
    full_decode: bool
    captures_budget: bool = False

    def captured(self, limits: BatchingLimits) -> tuple[int, ...]:
        """Sizes captured under ``limits``: up to twice the sequences and the token budget.

        vLLM config/vllm.py, ``_set_cudagraph_sizes``.
        """
        budget = limits.max_num_batched_tokens
        range_end = min(2 * limits.max_num_seqs, self.sizes[-1]) if self.sizes else 0
        captured = {size for size in self.sizes if size <= min(range_end, budget)}
        if self.captures_budget and budget <= range_end:
            captured.add(budget)
        return tuple(sorted(captured))


def graph_sizes(singles: Sequence[int], ranges: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Capture sizes from single sizes and (first, last, step) ranges, ascending, tokens."""
    sizes = set(singles)
    for first, last, step in ranges:
        sizes.update(range(first, last + 1, step))
    return tuple(sorted(sizes))
