"""Two plans side by side: of one scenario, or from two reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from planner.check import Difference, differences
from planner.errors import NO_VALUE, InputError
from planner.io.json_file import read_checked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from planner.report import SimulationReport
    from planner.scenario import Scenario


class _Plan(BaseModel):
    """What a comparison needs of a report's plan; the rest is let pass."""

    model_config = ConfigDict(extra="ignore")

    id: str
    devices: int
    cost_per_hour: float | None = None


class _Report(BaseModel):
    """What a comparison needs of a report."""

    model_config = ConfigDict(extra="ignore")

    plan: _Plan | None
    status: str
    metrics: dict[str, float | bool]
    provenance: dict[str, Any]
    breaks: list[str] = []


@dataclass(frozen=True)
class Side:
    """One of the two.

    Parameters
    ----------
    name
        The plan's text as asked for, or the report's file.
    plan, devices, cost_per_hour
        The plan, and what it takes; USD.
    metrics
        How it behaves.
    breaks
        Constraints that it breaks.
    """

    name: str
    plan: str
    devices: int
    cost_per_hour: float | None
    metrics: Mapping[str, float]
    breaks: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One quantity of both; ``change_pct`` is ``None`` where the first is zero."""

    name: str
    first: float
    second: float
    change_pct: float | None


@dataclass(frozen=True)
class Comparison:
    """Two plans, quantity by quantity.

    Parameters
    ----------
    first, second
        The plans.
    rows
        Devices, price and every metric that both have.
    inputs
        What the two reports rest on and do not share; empty for two plans of one scenario.
    """

    first: Side
    second: Side
    rows: tuple[Row, ...]
    inputs: tuple[Difference, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def compare_plans(scenario: Scenario, first: str, second: str) -> Comparison:
    """Simulate two plans of ``scenario`` and compare them.

    Raises
    ------
    InputError, RefusalError, InfeasibleError
        As :func:`planner.api.simulate`.

    """
    from planner.api import simulate

    one, other = (side_of(text, simulate(scenario, text)) for text in (first, second))
    return compare_sides(one, other)


def compare_reports(first: str, second: str) -> Comparison:
    """Compare two reports of solve or simulate, JSON files.

    Raises
    ------
    InputError
        When a file cannot be read, is no report, or its report names no plan.

    """
    (one, one_inputs), (other, other_inputs) = (_read(path) for path in (first, second))
    return compare_sides(one, other, tuple(differences(one_inputs, other_inputs)))


def side_of(name: str, report: SimulationReport) -> Side:
    """One side from a simulation."""
    plan = report.plan
    return Side(name, plan.id, plan.devices, plan.cost_per_hour, report.metrics, report.breaks)


def compare_sides(first: Side, second: Side, inputs: tuple[Difference, ...] = ()) -> Comparison:
    """Both, quantity by quantity."""
    quantities = [("devices", float(first.devices), float(second.devices))]
    if first.cost_per_hour is not None and second.cost_per_hour is not None:
        quantities.append(("cost_per_hour", first.cost_per_hour, second.cost_per_hour))
    quantities += [
        (name, float(value), float(second.metrics[name]))
        for name, value in first.metrics.items()
        if name in second.metrics
    ]
    rows = tuple(Row(name, a, b, 100.0 * (b / a - 1.0) if a else None) for name, a, b in quantities)
    return Comparison(first, second, rows, inputs)


def _read(path: str) -> tuple[Side, dict[str, Any]]:
    """A report's plan, and what its figures rest on."""
    report = read_checked(Path(path), _Report, source=path)
    if report.plan is None:
        rule = f"names no plan (status {report.status})"
        raise InputError(source=path, field="plan", value=NO_VALUE, rule=rule)
    side = Side(
        name=path,
        plan=report.plan.id,
        devices=report.plan.devices,
        cost_per_hour=report.plan.cost_per_hour,
        metrics=report.metrics,
        breaks=tuple(report.breaks),
    )
    follows = ("operators", "kernel_time_share")  # from the plan, not the other way round
    return side, {k: v for k, v in report.provenance.items() if k not in follows}
