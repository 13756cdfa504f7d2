"""CUDA-graph rules of an engine version, from its entry in ``profiles/engines``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.engine_rules import GraphRules, graph_sizes

if TYPE_CHECKING:
    from planner.io.engine_file import Graphs


def graph_rules(graphs: Graphs) -> GraphRules:
    """Which batches replay a graph, without what depends on the device."""
    prompt_sizes: tuple[int, ...] | None = None
    if graphs.with_prompts == "none":
        prompt_sizes = ()
    elif graphs.with_prompts != "same":
        prompt_sizes = graph_sizes((), graphs.with_prompts)
    return GraphRules(
        sizes=graph_sizes(graphs.sizes, graphs.ranges),
        full_decode=graphs.full_decode,
        captures_budget=graphs.captures_budget,
        per_sequence=graphs.per_sequence,
        captures_seats=graphs.captures_seats,
        within_budget=graphs.within_budget,
        padded=graphs.padded,
        prompt_sizes=prompt_sizes,
    )
