"""Which shapes of a pipeline stage an engine version can launch, whatever the device.

Attention runs as ``dp`` groups of ``tp`` devices, experts as ``ep`` groups of ``moe_tp``; what an
engine offers of that is data (``profiles/engines``, ``layouts``). A theoretical space
(``search.space.theoretical``) also has what the engine does not offer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from simulator.model import Experts

if TYPE_CHECKING:
    from planner.problem import Problem
    from simulator.model import ModelShape
    from simulator.plan import Shape

Groups = Literal["one", "one_or_all", "any"]
"""Into how many groups the devices of a stage may be put: one alone; one, or as many as there are
devices; any number that divides them."""

EXPERTS = "the model has no experts to spread (ep)"
DENSE = "attention data parallel needs a mixture of experts: elsewhere it is replicas"
EXPERT_GROUPS = "this engine version cannot spread experts over part of a stage's devices (ep)"
ATTENTION_GROUPS = "this engine version cannot run so many attention groups in a stage (dp)"
EVEN_EXPERTS = "experts do not divide by ep"

LAYOUT_RULES = (EXPERTS, DENSE, EXPERT_GROUPS, ATTENTION_GROUPS, EVEN_EXPERTS)
"""In the order in which they are tried."""


@dataclass(frozen=True)
class Layouts:
    """What an engine version offers.

    Parameters
    ----------
    expert_groups
        Into how many groups a stage's devices may be put for the experts.
    attention_groups
        The same for attention; more than one only with a mixture of experts.
    even_experts
        Whether every group must hold as many experts.

    """

    expert_groups: Groups
    attention_groups: Groups
    even_experts: bool


def broken_layout(layouts: Layouts, model: ModelShape, shape: Shape) -> str | None:
    """The first of `LAYOUT_RULES` that ``shape`` breaks, or ``None``."""
    experts = [layer.ffn for layer in model.layer_counts if isinstance(layer.ffn, Experts)]
    uneven = any(ffn.num_experts % shape.ep for ffn in experts)
    fewer = any(ffn.num_experts < shape.ep for ffn in experts)
    for rule, broken in (
        (EXPERTS, shape.ep > 1 and not experts),
        (DENSE, shape.dp > 1 and not experts),
        (EXPERT_GROUPS, not _offered(layouts.expert_groups, shape.ep, shape.width)),
        (ATTENTION_GROUPS, not _offered(layouts.attention_groups, shape.dp, shape.width)),
        (EVEN_EXPERTS, fewer or (layouts.even_experts and uneven)),
    ):
        if broken:
            return rule
    return None


def every_layout(layouts: Layouts) -> Layouts:
    """What a theoretical space has: attention and experts grouped in any way that divides.

    Engine versions that know one attention group only say nothing of how several would run
    together (``lockstep`` in ``profiles/engines``), so there one it stays.
    """
    attention: Groups = "one" if layouts.attention_groups == "one" else "any"
    return Layouts(expert_groups="any", attention_groups=attention, even_experts=False)


def layouts_in_space(problem: Problem) -> Layouts:
    """What the problem's space may have: what its engine launches, or every layout."""
    own = problem.engine.layouts
    return every_layout(own) if problem.space.theoretical else own


def is_theoretical(problem: Problem, shape: Shape) -> bool:
    """Whether the engine version cannot launch ``shape``, so that only a theoretical space has it.

    Rules that hold in any space (heads, widths, memory) are not asked.
    """
    return broken_layout(problem.engine.layouts, problem.model, shape) is not None


def expert_groups_offered(layouts: Layouts, model: ModelShape, width: int) -> tuple[int, ...]:
    """Numbers of expert groups worth trying by default on ``width`` devices: one, or as many."""
    offered = _has_experts(model) and width > 1 and layouts.expert_groups != "one"
    return (1, width) if offered else (1,)


def every_expert_groups(model: ModelShape, width: int) -> tuple[int, ...]:
    """Numbers of expert groups that divide ``width`` devices, one without experts."""
    most = width if _has_experts(model) else 1
    return tuple(n for n in range(1, most + 1) if width % n == 0)


def every_attention_groups(layouts: Layouts, model: ModelShape, most: int) -> tuple[int, ...]:
    """Numbers of attention groups to ``most``, one where the engine or the model knows one."""
    several = _has_experts(model) and layouts.attention_groups != "one"
    return tuple(range(1, most + 1)) if several else (1,)


def _has_experts(model: ModelShape) -> bool:
    return any(isinstance(layer.ffn, Experts) for layer in model.layer_counts)


def _offered(groups: Groups, number: int, devices: int) -> bool:
    """Whether ``number`` groups of ``devices`` may be made; sizes divide by construction."""
    return number == 1 or (groups != "one" and (groups == "any" or number == devices))
