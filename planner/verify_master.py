"""The part of a certificate that rests on the solver's word.

CP-SAT gets every class that the engine can launch and the values of the certificate, and must find
no deployment below the incumbent, and the incumbent itself. It decides anew which classes fit into
memory and how many replicas into the devices.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from planner.cpsat.classes import forbidden_columns, master_classes, pool_sizes
from planner.cpsat.model import MasterStatus, solve_master
from simulator.plan import parse_plan

if TYPE_CHECKING:
    from planner.problem import Problem


def master_disagrees(problem: Problem, text: str) -> str | None:
    """Why the solver does not confirm a certificate, or ``None`` if it does.

    Parameters
    ----------
    problem
        The certificate's scenario, resolved.
    text
        The certificate.
    """
    data = json.loads(text)
    header, entries = data["header"], data["entries"]
    if header["status"] == "feasible":
        return None  # nothing is claimed that the solver would decide
    classes = master_classes(problem)
    index = {(c.shape, c.limits): i for i, c in enumerate(classes)}
    columns, forbidden = {}, forbidden_columns(problem, classes)
    for rank, entry in enumerate(entries):
        plan = parse_plan(entry["plan"], problem.default_limits)
        column = index[plan.shape, plan.limits], plan.replicas
        columns[column] = rank
        if entry.get("breaks"):
            forbidden.append(column)
    worst = max((e["score"] for e in entries if "score" in e), default=[0])
    levels = [
        {c: entries[rank].get("score", worst)[level] for c, rank in columns.items()}
        for level in range(len(worst))
    ]
    best = header["incumbent"]
    if best is not None:
        # Below the incumbent there must be nothing: what reaches its value is forbidden.
        reached = [c for c, value in levels[0].items() if value >= best["score"][0]]
        below = solve_master(classes, pool_sizes(problem), levels[:1], [*forbidden, *reached])
        if below.status is not MasterStatus.INFEASIBLE:
            return f"below the incumbent the master finds {below.status.value}"
    result = solve_master(classes, pool_sizes(problem), [*levels, columns], forbidden)
    chosen = None if result.column is None else entries[columns[result.column]]["plan"]
    if chosen != (best["plan"] if best else None):
        return f"the master chooses {chosen}"
    return None
