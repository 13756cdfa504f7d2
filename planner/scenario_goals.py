"""Sections of a scenario that say what is wanted: objectives and limits."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from planner.errors import nearest
from planner.scenario_errors import refuse
from planner.scenario_sections import PositiveFloat, Section, without_unset


class Limits(Section):
    """Upper limits on statistics of one latency over the run, milliseconds."""

    mean: PositiveFloat | None = None
    """Limit on the mean, milliseconds."""
    p50: PositiveFloat | None = None
    """Limit on the median, milliseconds."""
    p90: PositiveFloat | None = None
    """Limit on the 90th percentile, milliseconds."""
    p95: PositiveFloat | None = None
    """Limit on the 95th percentile, milliseconds."""
    p99: PositiveFloat | None = None
    """Limit on the 99th percentile, milliseconds."""
    p99_9: PositiveFloat | None = Field(None, alias="p99.9")
    """Limit on the 99.9th percentile, milliseconds."""

    model_config = ConfigDict(populate_by_name=True)

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(dump(self), "p99_9", "p99.9")

    @model_validator(mode="after")
    def _check(self) -> Limits:
        if not self.items():
            refuse("sets no limit: name a statistic, such as {p99: 2000}, or remove it")
        return self

    def items(self) -> tuple[tuple[str, float], ...]:
        """Limits that are set, as (statistic, milliseconds)."""
        return tuple((k.replace("_", "."), v) for k, v in self if v is not None)


class SloSpec(Section):
    """Constraints on statistics over the run."""

    ttft_ms: Limits | None = None
    """Time to first token, queueing included."""
    tpot_ms: Limits | None = None
    """Time per output token after the first."""
    e2e_ms: Limits | None = None
    """Time from arrival to the last token."""
    itl_ms: Limits | None = None
    """Gaps between the tokens of one request, over all requests; makes runs slower."""

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(dump(self), "itl_ms")

    @model_validator(mode="after")
    def _check(self) -> SloSpec:
        if all(limits is None for _, limits in self):
            refuse("sets no limit: name ttft_ms, tpot_ms, e2e_ms or itl_ms, or remove it")
        return self


class GoodputSpec(Section):
    """Limits on each request; goodput counts the requests that meet all of them."""

    ttft_ms: PositiveFloat | None = None
    """Time to first token, milliseconds."""
    tpot_ms: PositiveFloat | None = None
    """Time per output token after the first, milliseconds."""
    e2e_ms: PositiveFloat | None = None
    """Time from arrival to the last token, milliseconds."""

    @model_validator(mode="after")
    def _check(self) -> GoodputSpec:
        if all(limit is None for _, limit in self):
            refuse("sets no limit: name ttft_ms, tpot_ms or e2e_ms, or remove it")
        return self


_LATENCY: Final = r"(mean|p[1-9][0-9]?(\.[0-9]{1,3})?)_(ttft|tpot|itl|e2e)"
_MINIMIZED: Final = ("makespan", "devices", "cost_per_hour", "cost_per_million_tokens")
_MAXIMIZED: Final = ("throughput", "goodput", "slo_attainment")


_LATENCIES: Final = ("ttft", "tpot", "itl", "e2e")


def _check_minimized(value: str) -> str:
    if value not in _MINIMIZED and not re.fullmatch(_LATENCY, value):
        usual = [f"{statistic}_{name}" for name in _LATENCIES for statistic in ("mean", "p99")]
        close = nearest(value, (*usual, *_MINIMIZED))
        hint = f"; did you mean {close!r}?" if close else ""
        if value in _MAXIMIZED:
            hint = f"; write maximize: {value}"
        refuse(
            "must be mean_ or a percentile such as p99_, of ttft, tpot, itl or e2e, or one of "
            f"{', '.join(_MINIMIZED)}{hint}"
        )
    return value


def _check_goals(goals: tuple[GoalSpec, ...]) -> tuple[GoalSpec, ...]:
    names = [goal.name for goal in goals]
    for name in names:
        if names.count(name) > 1:
            refuse(f"names {name} twice")
    return goals


class GoalSpec(Section):
    """One quantity to optimise."""

    minimize: Annotated[str, AfterValidator(_check_minimized)] | None = None
    """Quantity to make as small as possible: a mean or percentile of a latency, ``makespan``,
    ``devices``, ``cost_per_hour`` or ``cost_per_million_tokens``."""
    maximize: Literal["throughput", "goodput", "slo_attainment"] | None = None
    """Quantity to make as large as possible."""

    @model_validator(mode="after")
    def _check(self) -> GoalSpec:
        if (self.minimize is None) == (self.maximize is None):
            both = self.minimize is not None
            refuse(
                "names both minimize and maximize: keep one"
                if both
                else "names no quantity: write minimize: ... or maximize: throughput"
            )
        return self

    @property
    def name(self) -> str:
        """The quantity, for example ``mean_e2e``."""
        return str(self.minimize or self.maximize)


class ObjectiveSpec(Section):
    """What to optimise: one quantity, or a list of them, most important first."""

    minimize: Annotated[str, AfterValidator(_check_minimized)] | None = None
    """Quantity to make as small as possible: a mean or percentile of a latency, ``makespan``,
    ``devices``, ``cost_per_hour`` or ``cost_per_million_tokens``."""
    maximize: Literal["throughput", "goodput", "slo_attainment"] | None = None
    """Quantity to make as large as possible."""
    then: Annotated[tuple[GoalSpec, ...], AfterValidator(_check_goals)] = ()
    """Quantities that decide between plans of equal value; a list in place of the section means
    its first entry, then the others."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, data: Any) -> Any:
        if isinstance(data, (list, tuple)) and data and isinstance(data[0], dict):
            return {**data[0], "then": data[1:]}
        return data

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(dump(self), "then")

    @model_validator(mode="after")
    def _check(self) -> ObjectiveSpec:
        if (self.minimize is None) == (self.maximize is None):
            refuse(
                "names both minimize and maximize: keep one"
                if self.minimize is not None
                else "names no quantity: write minimize: ... or maximize: throughput"
            )
        if self.name in [goal.name for goal in self.then]:
            refuse(f"names {self.name} twice")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Every quantity, most important first."""
        return (str(self.minimize or self.maximize), *(goal.name for goal in self.then))

    @property
    def name(self) -> str:
        """The first quantity, for example ``mean_e2e``."""
        return self.names[0]

    @property
    def is_maximized(self) -> bool:
        """Whether more of the first quantity is better."""
        return self.name in _MAXIMIZED
