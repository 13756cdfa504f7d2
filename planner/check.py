"""Whether a scenario still leads to the choice that its lock expects, and if not, why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from planner.lock import lock, read_lock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from planner.lock import Lock
    from planner.scenario import Scenario

TOLERANCE: Final = 0.01
"""Relative change of a metric that is let pass. Locks hold four digits; a per cent is well below
the model's own error, and well above what another CPU's arithmetic moves."""

_SHIPPED: Final = frozenset({"planner", "rules", "model", "device", "network"})
"""Inputs that come with the planner and are digests of what it makes of them: another version can
hold the same facts in another form, so they count by what they lead to."""

_DIGEST_CHARS: Final = 12
_ABSENT: Final = object()

_WHAT: Final = {
    "trace": "requests of the workload",
    "table": "kernel table",
    "rules": "engine's rules",
    "model": "shape of the model",
    "device": "facts of the device",
    "network": "links of the pool",
}
"""How a person would call inputs of a lock that have another name there."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not as the lock has it.

    Parameters
    ----------
    what
        ``plan``, ``status``, ``objective``, the name of a metric, or, of an input, its name and
        the fields below it, dotted: ``scenario.objective.minimize``.
    was, now
        As locked and as it is; ``None`` where it is absent.
    """

    what: str
    was: Any
    now: Any

    def __str__(self) -> str:
        """``plan: tp8 -> 2xtp4``; a change of a number in per cent."""
        line = f"{self.what}: {_text(self.was)} -> {_text(self.now)}"
        if isinstance(self.was, (int, float)) and isinstance(self.now, (int, float)) and self.was:
            line += f" ({100 * (self.now / self.was - 1):+.1f} %)"
        return line


@dataclass(frozen=True)
class CheckResult:
    """What a check of one scenario found.

    Parameters
    ----------
    scenario
        Its name.
    plan
        The plan now, or ``None`` where none is feasible.
    results
        Differences of the answer: status, plan, objective, metrics outside tolerance.
    inputs
        Differences of what the answer rests on.
    inputs_count
        Whether a changed input alone is a difference.
    """

    scenario: str
    plan: str | None
    results: tuple[Difference, ...]
    inputs: tuple[Difference, ...]
    inputs_count: bool = True

    @property
    def passed(self) -> bool:
        """Whether all is as locked; other facts of the planner that lead to the same are."""
        return not self.results and not (self.inputs_count and self.stale)

    @property
    def stale(self) -> bool:
        """Whether an input changed that is not only a fact of the planner's own."""
        return any(d.what.partition(".")[0] not in _SHIPPED for d in self.inputs)

    @property
    def causes(self) -> tuple[str, ...]:
        """What changed of the inputs, one line each, or that nothing did."""
        if self.inputs:
            return tuple(f"{_called(d.what)} changed: {d}" for d in self.inputs)
        if self.results:
            return ("nothing that the lock records changed, so the planner's own code did",)
        return ()

    def lines(self) -> tuple[str, ...]:
        """The result as a person reads it, the first line alone saying how it ended."""
        if self.passed:
            note = "; ".join(self.causes)
            return (f"{self.scenario}: as locked ({self.plan or 'infeasible'})", *_notes(note))
        head = f"{self.scenario}: DIFFERENT"
        if not self.results:
            head += ", though plan and metrics hold: accept the new inputs with planner lock"
        return (
            head,
            *(f"  {difference}" for difference in self.results),
            *(f"  because {cause}" for cause in self.causes),
        )

    def __str__(self) -> str:
        """All lines, as the message of a failed assertion."""
        return "\n".join(self.lines())

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "scenario": self.scenario,
            "passed": self.passed,
            "plan": self.plan,
            "results": [vars(d) for d in self.results],
            "inputs": [vars(d) for d in self.inputs],
            "causes": list(self.causes),
        }


def check(
    scenario: Scenario, *, tolerance: float = TOLERANCE, inputs_count: bool = True
) -> CheckResult:
    """Solve ``scenario`` again and compare with its lock.

    Parameters
    ----------
    scenario
        What is checked; its lock lies beside it.
    tolerance
        Relative change of a metric that is let pass.
    inputs_count
        Whether a changed input is a difference although plan and metrics hold.

    Raises
    ------
    InputError
        When the scenario or its lock is bad or missing.
    LimitError
        When a time limit stopped the search, so that there is nothing to compare.

    """
    locked = read_lock(scenario)
    return compare_locks(
        scenario.source,
        locked,
        lock(scenario).lock,
        tolerance=tolerance,
        inputs_count=inputs_count,
    )


def compare_locks(
    name: str, was: Lock, now: Lock, *, tolerance: float, inputs_count: bool = True
) -> CheckResult:
    """Compare what was locked with what would be locked now."""
    results = [
        Difference(field, old, new)
        for field in ("status", "plan", "objective")
        if (old := getattr(was.answer, field)) != (new := getattr(now.answer, field))
    ]
    for metric, old in was.answer.metrics.items():
        new = now.answer.metrics.get(metric)
        if new is None or abs(new - old) > tolerance * abs(old):
            results.append(Difference(metric, old, new))
    return CheckResult(
        scenario=name,
        plan=now.answer.plan,
        results=tuple(results),
        inputs=tuple(differences(was.inputs, now.inputs)),
        inputs_count=inputs_count,
    )


def differences(was: Any, now: Any, at: str = "") -> Iterator[Difference]:
    """Leaves of two trees of plain data that differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            where = f"{at}.{key}" if at else key
            yield from differences(was.get(key, _ABSENT), now.get(key, _ABSENT), where)
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for i, (old, new) in enumerate(zip(was, now, strict=True)):
            yield from differences(old, new, f"{at}[{i}]")
    elif was != now:
        yield Difference(at, None if was is _ABSENT else was, None if now is _ABSENT else now)


def _called(what: str) -> str:
    """What a person calls an input; a field of the scenario goes by its section."""
    top, _, rest = what.partition(".")
    return rest.partition(".")[0] if top == "scenario" else _WHAT.get(top, top)


def _notes(text: str) -> tuple[str, ...]:
    return (f"  note: {text}",) if text else ()


def _text(value: Any) -> str:
    """A value in a message: long digests by their first characters."""
    if value is None:
        return "absent"
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    is_digest = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return text[:_DIGEST_CHARS] if is_digest else text
