"""Which shapes of a pipeline stage an engine version can launch, whatever the device.

Attention runs as ``dp`` groups of ``tp`` devices, experts as ``ep`` groups of ``moe_tp``; what an
engine offers of that is data (``profiles/engines``, ``layouts``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from simulator.model import Experts

if TYPE_CHECKING:
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


def expert_groups_offered(layouts: Layouts, model: ModelShape, width: int) -> tuple[int, ...]:
    """Numbers of expert groups worth trying by default on ``width`` devices: one, or as many."""
    has_experts = any(isinstance(layer.ffn, Experts) for layer in model.layer_counts)
    return (1, width) if has_experts and width > 1 and layouts.expert_groups != "one" else (1,)


def _offered(groups: Groups, number: int, devices: int) -> bool:
    """Whether ``number`` groups of ``devices`` may be made; sizes divide by construction."""
    return number == 1 or (groups != "one" and (groups == "any" or number == devices))
