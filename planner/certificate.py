"""The certificate: what a search claims of every plan, written so that others can check it.

One JSON document, one entry to a line, equal bytes for equal searches. Its parts, in this order:

- ``header``: the scenario itself, digests of all data, objective, tie order, counts, the incumbent;
- ``excluded``: plans that cannot run, by replica and rule, with the bytes behind a memory rule;
- ``families``: for every shape of a replica that can run, the digest of a cost nowhere above, and
  of limits nowhere below, those of its plans, and the support of the bounds that hold for all of
  them (:class:`~planner.support.Support`);
- ``classes``: the same for single replicas, where a bound rests on their own limits;
- ``entries``: every plan that can run, in tie order, and what settles it (:class:`Kind`);
- ``digest``: of all lines before it, which catches a damaged file before anything is computed.

``planner/verify.py`` judges it. The claims are: no plan is missing; every score is the simulated
value (``exact``, ``identical``) or a lower bound on it (``bounded``, ``aborted``); every plan but
the incumbent breaks a constraint or comes after the incumbent in the order (score, tie order).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from planner.errors import LimitError
from planner.plan_floors import loosest
from planner.space import KV_CACHE, WEIGHTS, count_rules, grid_classes
from simulator.plan import BatchingLimits, Plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from planner.candidates import Candidate
    from planner.plan_floors import Floored
    from planner.problem import Problem
    from planner.scenario import Scenario
    from planner.search_result import SearchResult
    from simulator.state import Limits
    from simulator.timing import IterationCost

VERSION: Final = 2
"""Version of the certificate's format."""

PARTS: Final = ("excluded", "families", "classes", "entries")
"""Lists of the document, in their order."""


class Kind(str, Enum):
    """What settles a plan."""

    BOUNDED = "bounded"
    """A lower bound that holds before anything is simulated: that of its family, whatever the
    batching limits, or its own."""
    ABORTED = "aborted"
    """A lower bound on what is left after so many iterations of a run that begins like its own."""
    EXACT = "exact"
    """Simulated to its end."""
    IDENTICAL = "identical"
    """Runs exactly as another plan, whose different limits never held anything back."""


def certificate(scenario: Scenario, problem: Problem, found: SearchResult) -> dict[str, Any]:
    """The certificate of a search that ended, as plain data.

    Parameters
    ----------
    scenario, problem
        What was asked, and what it was resolved to.
    found
        What the search found.

    Raises
    ------
    LimitError
        When a limit stopped the search before every plan had a bound.
    """
    floors = found.floors
    if floors is None or any(c.is_unknown for c in found.candidates):
        raise LimitError(
            f"stopped by {found.stopped_by} before every plan had a bound: there is nothing to "
            "certify; raise search.time_limit_s"
        )
    text = problem.plan_text
    entries = [entry_of(problem, c) for c in found.candidates]
    kinds = [entry["by"] for entry in entries]
    best = found.best
    incumbent = None
    if best is not None:
        incumbent = {
            "plan": text(best.plan),
            "score": list(best.score),
            "trajectory": _trajectory(found, best),
        }
    header = {
        **facts(scenario, problem),
        "status": status_of(found),
        "counts": {
            "space": found.space.size,
            "excluded": dict(found.space.excluded),
            **{kind.value: kinds.count(kind.value) for kind in Kind},
        },
        "incumbent": incumbent,
        "bound": found.bound,
    }
    families = [
        _supported(shape.text, floors.families[shape], *loosest(problem, shape, members))
        for shape, members in floors.members.items()
        if shape in floors.families
    ]
    classes = [
        _supported(
            text(Plan(1, *key)),
            floored,
            problem.compile(*key),
            floored.limits,
        )
        for key, floored in sorted(
            floors.classes.items(), key=lambda item: Plan(1, *item[0]).tie_key(BatchingLimits(0, 0))
        )
    ]
    return {
        "header": header,
        "excluded": list(excluded_groups(problem)),
        "families": families,
        "classes": classes,
        "entries": entries,
    }


def _supported(name: str, floored: Floored, cost: IterationCost, limits: Limits) -> dict[str, Any]:
    support = dataclasses.asdict(floored.floors.costs.support)
    return {"class": name, "data": data_digest(cost, limits), "support": support}


def status_of(found: SearchResult) -> str:
    """``optimal``, ``feasible`` or ``infeasible``."""
    if not found.proved:
        return "feasible"
    return "infeasible" if found.best is None else "optimal"


def facts(scenario: Scenario, problem: Problem) -> dict[str, Any]:
    """What the claims are about: everything in the header that follows from the scenario alone."""
    return {
        "certificate_version": VERSION,
        "scenario": scenario.model_dump(mode="json"),
        "provenance": dict(problem.provenance),
        "objective": {
            "names": list(problem.objective.names),
            "tie_break": problem.objective.tie_break,
            "constraints": [[c.name, c.limit_ticks] for c in problem.constraints],
        },
    }


def _trajectory(found: SearchResult, candidate: Candidate) -> str:
    """Digest of a finished plan's run, which may be that of its twin."""
    names = (candidate.plan, candidate.twin)
    runs = (c.result for c in found.candidates if c.plan in names and c.result is not None)
    return next(runs).trajectory_hash()


def entry_of(problem: Problem, candidate: Candidate) -> dict[str, Any]:
    """What is claimed of one plan, and by what."""
    entry: dict[str, Any] = {"plan": problem.plan_text(candidate.plan)}
    if candidate.result is not None:
        entry["by"] = Kind.EXACT.value
        entry["trajectory"] = candidate.result.trajectory_hash()
    elif candidate.exact and candidate.twin is not None:
        entry["by"] = Kind.IDENTICAL.value
        entry["twin"] = problem.plan_text(candidate.twin)
    elif candidate.seen is not None:
        entry["by"] = Kind.ABORTED.value
        entry["run"] = problem.plan_text(candidate.seen)
        entry["iterations"] = candidate.seen_at
    else:
        entry["by"] = Kind.BOUNDED.value
        if candidate.own:
            entry["own"] = True
    if candidate.broken:
        entry["breaks"] = list(candidate.broken)
    if candidate.exact or not candidate.broken:
        entry["score"] = list(candidate.score)
    return entry


def data_digest(cost: IterationCost, limits: Limits) -> str:
    """Digest of an iteration cost and scheduler limits."""
    digest = hashlib.blake2b(digest_size=16)
    for array in cost:
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(repr(tuple(limits)).encode())
    return digest.hexdigest()


def excluded_groups(problem: Problem) -> Iterator[dict[str, Any]]:
    """Plans that cannot run: for each replica and rule the numbers of replicas it excludes."""
    for shape, limits, launch in grid_classes(problem):
        groups: dict[str, list[int]] = {}
        counts = problem.space.replicas
        for replicas, rule in count_rules(problem, shape, limits, counts, launch):
            if rule is not None:
                groups.setdefault(rule, []).append(replicas)
        for rule, excluded in groups.items():
            group: dict[str, Any] = {
                "class": problem.plan_text(Plan(1, shape, limits)),
                "replicas": excluded,
                "rule": rule,
            }
            if rule in (WEIGHTS, KV_CACHE):
                group["needed_bytes"] = problem.needed_bytes(shape, limits)
                group["usable_bytes"] = problem.memory(shape, limits).usable_bytes
            yield group


def to_text(data: dict[str, Any]) -> str:
    """The document: one entry to a line, sealed by the digest of what comes before."""
    lines = ["{", f'"header": {_dump(data["header"])},']
    for part in PARTS:
        rows = [_dump(row) for row in data[part]]
        lines += [f'"{part}": [', *(f"{row}," for row in rows[:-1]), *rows[-1:], "],"]
    sealed = "\n".join(lines) + "\n"
    return f'{sealed}"digest": "{seal(sealed)}"\n}}\n'


def seal(lines: str) -> str:
    """Digest of the lines before the last two."""
    return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=True)
