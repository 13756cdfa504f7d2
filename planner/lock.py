"""The choice that a scenario is expected to lead to, kept in a file beside it.

A lock holds the answer (status, plan, metrics) and what it rests on (the scenario's fields and
digests of everything that they name), so that :mod:`planner.check` can say what changed and why.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from planner.api import solve
from planner.errors import InputError, LimitError
from planner.io.json_file import read_checked
from planner.io.output import deliver_file
from planner.report import dump_json
from planner.requests import digest_of
from planner.resolve import resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from planner.problem import Problem
    from planner.report import PlanReport
    from planner.scenario import Scenario

SUFFIX: Final = ".lock.json"
_DIGITS: Final = 4
"""Significant digits of a number in a lock. Another CPU's arithmetic moves the picoseconds of an
iteration by one at most, about 1e-10 of it; at four digits that changes one rounded number in a
million, and a plan is known to no better than a per cent."""


class Answer(BaseModel):
    """What the planner chose.

    ``plan`` and ``objective`` are ``None`` where no plan is feasible; ``objective`` reads
    ``minimize mean_e2e``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: Literal["optimal", "infeasible", "feasible"]
    plan: str | None
    objective: str | None
    metrics: dict[str, float | bool]


class Lock(BaseModel):
    """A lock file.

    ``inputs`` is what the answer rests on: ``scenario`` (its fields), ``planner`` (version and
    semantics) and for everything else a digest or the values themselves.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lock_version: Literal[1] = 1
    answer: Answer
    inputs: dict[str, Any]

    def to_json(self) -> str:
        """Canonical text: the same answer from the same inputs gives the same bytes."""
        return dump_json(self.model_dump(mode="json"))


@dataclass(frozen=True)
class Locked:
    """A scenario as it is now: the lock that it would get, and its report."""

    lock: Lock
    report: PlanReport


def lock_path(scenario: Scenario) -> Path:
    """Where the lock of ``scenario`` lies: beside its file, whose suffix it replaces."""
    name = Path(scenario.source).name
    for suffix in (".yaml", ".yml"):
        name = name.removesuffix(suffix)
    return scenario.base_dir / f"{name}{SUFFIX}"


def lock(scenario: Scenario) -> Locked:
    """Solve ``scenario`` and lock the answer.

    Raises
    ------
    InputError
        When the scenario is bad.
    LimitError
        When a limit stopped the search: another machine would get further, or not as far.

    """
    report = solve(scenario)
    if not report.deterministic:
        raise LimitError(
            f"{scenario.source}: the time limit stopped the search, so that the answer depends on "
            "the machine; raise search.time_limit_s or set search.work_limit"
        )
    objective = report.objective
    answer = Answer(
        status=report.status,  # type: ignore[arg-type]  # checked by pydantic
        plan=None if report.plan is None else report.plan.id,
        objective=None if objective is None else f"{objective.sense} {objective.name}",
        metrics={name: _rounded(value) for name, value in report.metrics.items()},
    )
    return Locked(Lock(answer=answer, inputs=inputs_of(scenario, resolve(scenario))), report)


def write_lock(scenario: Scenario, locked: Lock) -> Path:
    """Write the lock of ``scenario`` beside it.

    Raises
    ------
    InputError
        When the file cannot be written; an older lock is then untouched.

    """
    path = lock_path(scenario)
    text = locked.to_json()
    deliver_file(str(path), "lock", lambda file: file.write(text.encode()))
    return path


def read_lock(scenario: Scenario) -> Lock:
    """The lock of ``scenario``.

    Raises
    ------
    InputError
        When it is missing or broken.

    """
    path = lock_path(scenario)
    # Named beside the scenario as the user wrote it, so that no message holds another path.
    source = str(Path(scenario.source).with_name(path.name))
    try:
        return read_checked(path, Lock, source=source)
    except InputError as error:
        if error.rule != "no such file":
            raise
        rule = f"no such file: write it with planner lock {scenario.source}"
        raise InputError(source=source, field="", value=error.value, rule=rule) from None


def inputs_of(scenario: Scenario, problem: Problem) -> dict[str, Any]:
    """What the answer rests on, by what a person would call it.

    The time limit is left out: an answer that it cut short is never locked.
    """
    known = problem.provenance
    fields = scenario.model_dump(mode="json", exclude_unset=True)
    search = {k: v for k, v in fields.pop("search", {}).items() if k != "time_limit_s"}
    engine: dict[str, Any] = dict(known["engine"])  # type: ignore[call-overload]
    pools = list(problem.pools.values())
    profiles = [
        (
            problem.rules,
            pool.memory_rules,
            pool.default_limits,
            problem.engine.graphs_on(pool.device),
            problem.engine.nccl_all_reduce_from_bytes,
        )
        for pool in pools
    ]
    return {
        "scenario": {**fields, **({"search": search} if search else {})},
        "planner": {"version": known["planner"], "semantics": known["semantics"]},
        "trace": known["workload"],
        "table": known["kernel_table"],
        "engine": {"name": engine.pop("name"), "version": engine.pop("version")},
        "rules": _digest(profiles),
        "calibration": _plain(engine),
        "model": digest_of(_plain(problem.model)),
        "device": _digest([(pool.device, pool.price_per_hour) for pool in pools]),
        "network": _digest([pool.fabric for pool in pools]),
    }


def _digest(by_pool: Sequence[object]) -> str:
    """Digest of what each pool has; of the thing itself where there is one pool."""
    return digest_of(_plain(by_pool[0] if len(by_pool) == 1 else by_pool))


def _rounded(value: float | bool) -> float | bool:
    return value if isinstance(value, (bool, int)) else float(f"{value:.{_DIGITS}g}")


def _plain(value: Any) -> Any:
    """``value`` as plain data, field by field; ten digits of a number, as in reports."""
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name)) for name in names}
    if hasattr(value, "_asdict"):  # a named tuple
        return _plain(value._asdict())
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {str(_plain(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return float(f"{value:.10g}") if isinstance(value, float) else value
