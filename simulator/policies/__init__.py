"""The engines' batching rules: one file each, behind one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simulator.compiled import chosen_by_rules
from simulator.policies import sarathi, sglang, static, trtllm, vllm_v0, vllm_v1
from simulator.policies.batch import Batch
from simulator.rules import RULES_CLASSES, SARATHI, SGLANG, STATIC, TRTLLM, VLLM_V0, VLLM_V1

if TYPE_CHECKING:
    from collections.abc import Callable

    from simulator.rules import Rules
    from simulator.state import Limits, State
    from simulator.timing import IterationCost

__all__ = ["Batch", "schedule"]

_SCHEDULES: dict[int, Callable[..., Any]] = {
    VLLM_V1: vllm_v1.schedule,
    VLLM_V0: vllm_v0.schedule,
    SGLANG: sglang.schedule,
    TRTLLM: trtllm.schedule,
    SARATHI: sarathi.schedule,
    STATIC: static.schedule,
}


@chosen_by_rules(lambda rules: _SCHEDULES[RULES_CLASSES.index(rules)])
def schedule(
    state: State, limits: Limits, rules: Rules, cost: IterationCost, r: int, seen: int
) -> Batch:
    """Form replica ``r``'s next batch by its engine's rules; empty if there is nothing to do.

    Parameters
    ----------
    state, limits, rules, cost
        The run; ``state.prefill_ps`` and the number of emitting requests are zero.
    r
        The replica.
    seen
        Position in its queue up to which the scheduler sees requests.

    """
    batch: Batch = _SCHEDULES[rules.policy](state, limits, rules, cost, r, seen)
    return batch
