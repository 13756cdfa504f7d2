"""A plan as a user wrote it: parsed, and refused where it cannot run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.errors import InfeasibleError, InputError, RefusalError
from planner.space import KV_CACHE, WEIGHTS, broken_rule, explain_rule
from simulator.plan import parse_plan

if TYPE_CHECKING:
    from planner.problem import Problem
    from simulator.plan import Plan


def read_plan(problem: Problem, text: str) -> Plan:
    """The plan that ``text`` names, whether it can run or not.

    Raises
    ------
    InputError
        When ``text`` is no plan.

    """
    try:
        return parse_plan(text, problem.default_limits)
    except ValueError as error:
        rule = f"is not a plan: {error}"
        raise InputError(source="--plan", field="", value=text, rule=rule) from None


def require_plan(problem: Problem, text: str) -> Plan:
    """The plan that ``text`` names, which the engine can launch on this pool.

    Parameters
    ----------
    problem
        What it is to run on.
    text
        For example ``2xtp4:seqs=256``.

    Raises
    ------
    InputError
        When ``text`` is no plan.
    RefusalError
        When the engine cannot launch the plan.
    InfeasibleError
        When the plan does not fit into memory.

    """
    plan = read_plan(problem, text)
    rule = broken_rule(problem, plan)
    if rule is not None:
        reason = f"plan {text}: {rule}: {explain_rule(problem, plan, rule)}"
        if rule in (WEIGHTS, KV_CACHE):
            raise InfeasibleError(reason, "")
        raise RefusalError(reason)
    return plan
