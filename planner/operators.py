"""Time of each operator in a run's mean iteration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from planner.provenance import load_of
from simulator.parts import Axis
from simulator.units import MS_PER_S

if TYPE_CHECKING:
    from planner.problem import Problem
    from simulator.plan import Plan
    from simulator.run import RunResult


def operator_times_ms(problem: Problem, plan: Plan, result: RunResult) -> dict[str, float]:
    """Milliseconds of every operator in a mean iteration of ``result``, largest first.

    The same parts and the same mean iteration as
    :meth:`simulator.cost.CostCompiler.time_by_label`: prompts count one by one, everything else
    at the run's means. What host time and launch overlap hide is not taken off.
    """
    load, compiler = load_of(problem, result), problem.pool_of(plan.shape).compiler
    at = compiler._index(  # noqa: SLF001  # the compiler has no public view by operator
        round(load.tokens),
        round(load.decodes),
        round(load.context),
        longest=0,
        groups=plan.shape.dp,
    )
    seconds: dict[str, float] = {}
    for part in compiler._parts_of(plan.shape):  # noqa: SLF001
        if part.axis is Axis.PROMPT:
            prompts = np.minimum(load.prompts, len(part.time_s) - 1)
            own = float(part.time_s[prompts].sum()) / load.iterations
        else:
            where = at[part.axis]
            if part.axis is Axis.PROMPT_TOKENS:
                where = min(round(load.prompt_tokens), len(part.time_s) - 1)
            elif part.axis is Axis.SAMPLED:
                where = min(round(load.sampled), len(part.time_s) - 1)
            own = float(part.time_s[where])
        seconds[part.name] = seconds.get(part.name, 0.0) + own
    largest = sorted(seconds, key=lambda name: -seconds[name])
    return {name: seconds[name] * MS_PER_S for name in largest}
