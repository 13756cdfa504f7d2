"""At which rate, or which length of requests, another plan becomes the best one.

Both sides of every crossover are solved to the proof, so that each names the best plan there.
Between two points that name the same plan another may win unseen: more ``points`` look closer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from planner.errors import InputError
from planner.scenario_workload import LognormalLength

if TYPE_CHECKING:
    from collections.abc import Iterator

    from planner.session import Session

AXES: Final = ("rate", "input_tokens", "output_tokens")
UNITS: Final = {"rate": "requests/s", "input_tokens": "tokens", "output_tokens": "tokens"}
POINTS: Final = 9
RESOLUTION: Final = 0.01


@dataclass(frozen=True)
class Point:
    """The best plan at one place.

    Parameters
    ----------
    at
        Requests per second, or mean tokens.
    plan
        The plan, or ``None`` where none is feasible.
    value, unit
        Its objective value.
    proved
        Whether the search proved it; not where a limit of the scenario stopped it.

    """

    at: float
    plan: str | None
    value: float | None
    unit: str
    proved: bool


@dataclass(frozen=True)
class Crossover:
    """Two neighbouring places with different best plans."""

    below: Point
    above: Point


@dataclass(frozen=True)
class Crossovers:
    """What was found along one axis, from its low end to its high one.

    Parameters
    ----------
    axis
        One of :data:`AXES`.
    low, high
        The ends.
    found
        Crossovers, ascending.

    """

    axis: str
    low: Point
    high: Point
    found: tuple[Crossover, ...]

    @property
    def proved(self) -> bool:
        """Whether every point that is named was proved."""
        sides = [side for one in self.found for side in (one.below, one.above)]
        return all(side.proved for side in (self.low, self.high, *sides))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "found": [asdict(one) for one in self.found], "proved": self.proved}

    def lines(self) -> Iterator[str]:
        """What a person reads: which plan is best from where to where."""
        edges = [*((one.below, one.above) for one in self.found)]
        starts = [self.low, *(above for _, above in edges)]
        ends = [*(below for below, _ in edges), self.high]
        for start, end in zip(starts, ends, strict=True):
            plan = start.plan or "no plan is feasible"
            yield f"{start.at:.4g} to {end.at:.4g} {UNITS[self.axis]}: {plan}"
        if not self.proved:
            yield "not proved: a limit of the scenario stopped some searches"


def crossovers(
    session: Session,
    low: float,
    high: float,
    *,
    axis: str = "rate",
    points: int = POINTS,
    resolution: float = RESOLUTION,
    shapes: bool = False,
) -> Crossovers:
    """Find where the best plan changes between two ends.

    Parameters
    ----------
    session
        Who answers.
    low, high
        Ends of the axis: requests per second, or mean tokens.
    axis
        What changes; lengths keep their distribution's other parameters.
    points
        Places to ask first, evenly spaced on a logarithmic scale; between two that differ the
        crossover is found by bisection.
    resolution
        Relative distance of a crossover's two sides, or a token.
    shapes
        Whether plans that differ in their batching limits only count as the same.

    Raises
    ------
    InputError
        When an argument is out of range, or the workload has no such axis.

    """
    _check(low, high, axis, points, resolution)

    def ask(at: float) -> Point:
        if axis == "rate":
            report = session.plan(rate=at)
        else:
            report = session.plan(mix={axis: _length(session, axis, at)})
        goal = report.objective
        return Point(
            at=at,
            plan=None if report.plan is None else report.plan.id,
            value=None if goal is None else goal.value,
            unit="" if goal is None else goal.unit,
            proved=report.status in ("optimal", "infeasible"),
        )

    def name(point: Point) -> str | None:
        return point.plan.partition(":")[0] if shapes and point.plan else point.plan

    def place(share: float) -> float:
        at = low * (high / low) ** share
        return float(f"{at:.6g}") if axis == "rate" else float(round(at))

    def between(below: Point, above: Point) -> Iterator[Crossover]:
        if name(below) == name(above):
            return
        middle = (below.at * above.at) ** 0.5
        middle = float(f"{middle:.6g}") if axis == "rate" else float(round(middle))
        near = above.at <= below.at * (1 + resolution)
        if near or middle in (below.at, above.at):
            yield Crossover(below, above)
            return
        half = ask(middle)
        yield from between(below, half)
        yield from between(half, above)

    places = sorted({place(i / (points - 1)) for i in range(points)})
    asked = [ask(at) for at in places]
    found = [one for pair in pairwise(asked) for one in between(*pair)]
    return Crossovers(axis, asked[0], asked[-1], tuple(found))


def _check(low: float, high: float, axis: str, points: int, resolution: float) -> None:
    """Refuse what cannot be bisected."""
    if axis not in AXES:
        rule = f"must be one of {', '.join(AXES)}"
        raise InputError(source="crossovers", field="axis", value=axis, rule=rule)
    if not 0 < low < high < float("inf"):
        rule = "must be two numbers above 0, the lower one first"
        raise InputError(source="crossovers", field=axis, value=f"{low:g}:{high:g}", rule=rule)
    if points < 2:
        rule = "must be at least 2"
        raise InputError(source="crossovers", field="points", value=points, rule=rule)
    if not 1e-4 <= resolution < 1:
        rule = "must be a share of at least 0.0001 and below 1"
        raise InputError(source="crossovers", field="resolution", value=resolution, rule=rule)


def _length(session: Session, axis: str, mean: float) -> dict[str, Any] | int:
    """The scenario's own length along ``axis`` with another mean."""
    spec = session.scenario().workload
    own = getattr(spec, axis)
    if spec.sessions is not None:
        names = {"input_tokens": "new_tokens", "output_tokens": "output_tokens"}
        own = getattr(spec.sessions, names[axis])
    if isinstance(own, LognormalLength):
        return {**own.model_dump(mode="json", exclude_none=True), "mean": mean}
    if own is None or own.min == own.max:
        return int(mean)
    stretch = mean / ((own.min + own.max) / 2)
    return {"min": max(1, round(own.min * stretch)), "max": max(1, round(own.max * stretch))}
