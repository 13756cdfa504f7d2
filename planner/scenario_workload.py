"""The workload section of a scenario: how long requests are, and when they arrive."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from planner.scenario_errors import LOGNORMAL_TAG, RANGE_TAG, refuse
from planner.scenario_sections import MAX_INT, Count, PositiveFloat, Section

MAX_REQUESTS = 10_000_000
"""Largest workload, requests: beyond it a simulation no longer fits in memory."""

Variation = Annotated[float, Field(strict=True, ge=0.01, le=20, allow_inf_nan=False)]
"""Coefficient of variation; beyond 20 the mean of even a million draws strays by percents."""


def _check_rate(rate: float) -> float:
    if rate < 1e-6:
        refuse("must be at least 1e-06 requests per second, one request in 11 days")
    return rate


Rate = Annotated[PositiveFloat, AfterValidator(_check_rate)]


class LengthRange(Section):
    """Uniform distribution of a length, tokens, both ends included."""

    min: Count
    """Shortest, tokens."""
    max: Count
    """Longest, tokens."""

    @model_validator(mode="after")
    def _check(self) -> LengthRange:
        if self.min > self.max:
            refuse(f"must not be above max ({self.max})", at="min", value=self.min)
        return self


class LognormalLength(Section):
    """Lognormal distribution of a length, tokens, rounded and at least 1."""

    mean: PositiveFloat
    """Mean, tokens, before draws are cut at ``max``."""
    cv: Variation
    """Standard deviation over mean."""
    max: Count | None = None
    """Longest, tokens: longer draws become this; ``None``: no limit."""


def _spread(value: Any) -> Any:
    """Read a plain number as the range that holds only it."""
    if isinstance(value, (dict, LengthRange, LognormalLength)):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_INT:
        return {"min": value, "max": value}
    return refuse("must be a whole number of tokens greater than 0, or {min: ..., max: ...}")


def _distribution(value: Any) -> str:
    """Tag of the distribution that a length's fields belong to."""
    if isinstance(value, LognormalLength) or (
        isinstance(value, dict) and not value.keys().isdisjoint(("mean", "cv"))
    ):
        return LOGNORMAL_TAG
    return RANGE_TAG


Length = Annotated[
    Annotated[LengthRange, Tag(RANGE_TAG)] | Annotated[LognormalLength, Tag(LOGNORMAL_TAG)],
    Discriminator(_distribution),
    BeforeValidator(_spread),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {
                    "type": "object",
                    "properties": {k: {"type": "integer", "minimum": 1} for k in ("min", "max")},
                    "required": ["min", "max"],
                    "additionalProperties": False,
                },
                {
                    "type": "object",
                    "properties": {
                        "mean": {"type": "number", "exclusiveMinimum": 0},
                        "cv": {"type": "number", "minimum": 0.01, "maximum": 20},
                        "max": {"type": "integer", "minimum": 1},
                    },
                    "required": ["mean", "cv"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]

Process = Literal["poisson", "gamma", "weibull", "diurnal", "all_at_once"]

ArrivalMode = Process | Literal["trace", "rates", "closed_loop", "sessions"]

_PARAMETERS: Final = {
    "gamma": ("cv",),
    "weibull": ("shape",),
    "diurnal": ("amplitude", "period_s"),
}
"""Fields that an arrival process needs, and that no other one knows."""

_LATER_FIELDS: Final = ("rates", "cv", "shape", "amplitude", "period_s", "sessions")
"""Fields younger than the first reports: left out of a dump when unset, so that the digest of an
older scenario stays what it was."""


class ArrivalShape(Section):
    """What an arrival process needs beside its rate; each has its own fields, and no other's."""

    cv: Variation | None = None
    """Gamma: standard deviation of the gaps over their mean; 1 is Poisson, above it bursts."""
    shape: Annotated[float, Field(strict=True, ge=0.1, le=100, allow_inf_nan=False)] | None = None
    """Weibull: shape of the gaps' distribution; 1 is Poisson, below it bursts."""
    amplitude: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)] | None = None
    """Diurnal: swing of the rate, a fraction of its mean; it starts at its rising mean."""
    period_s: PositiveFloat | None = None
    """Diurnal: time from peak to peak, seconds."""

    def check_shape(self, asked: str | None, named: str) -> None:
        """Refuse ``asked``, the process in field ``named``, without its fields or with others."""
        for process, names in _PARAMETERS.items():
            for name in names:
                value = getattr(self, name)
                if asked == process and value is None:
                    refuse(f"is required with {named}: {process}", at=name)
                if asked != process and value is not None:
                    refuse(f"belongs to {named}: {process}", at=name, value=value)


class SessionArrivals(ArrivalShape):
    """When sessions start."""

    process: Process
    """Arrival process of the starts."""
    rate: Rate | None = None
    """Mean session starts per second."""

    @model_validator(mode="after")
    def _check(self) -> SessionArrivals:
        self.check_shape(self.process, "process")
        if self.process == "all_at_once":
            if self.rate is not None:
                refuse("cannot be combined with process: all_at_once", at="rate", value=self.rate)
        elif self.rate is None:
            refuse(f"is required with process: {self.process} (sessions per second)", at="rate")
        return self


class Turns(Section):
    """Turns of a session: a uniform distribution, or a geometric one by its mean."""

    min: Count | None = None
    """Fewest."""
    max: Count | None = None
    """Most."""
    mean: Annotated[float, Field(strict=True, ge=1, le=1e6, allow_inf_nan=False)] | None = None
    """Mean of a geometric distribution: after every turn a session is as likely to go on."""

    @model_validator(mode="after")
    def _check(self) -> Turns:
        if self.mean is not None:
            if self.min is not None or self.max is not None:
                refuse("cannot be combined with min and max", at="mean", value=self.mean)
        elif self.min is None or self.max is None:
            refuse("must be a whole number, {min: ..., max: ...} or {mean: ...}")
        elif self.min > self.max:
            refuse(f"must not be above max ({self.max})", at="min", value=self.min)
        return self


class ThinkTime(Section):
    """From the last token of an answer to the send of the next prompt, seconds."""

    mean: Annotated[float, Field(strict=True, ge=0, le=1e9, allow_inf_nan=False)]
    """Mean, seconds."""
    distribution: Literal["exponential", "fixed", "lognormal"] = "exponential"
    """How think times vary."""
    cv: Variation | None = None
    """Lognormal: standard deviation over mean."""

    @model_validator(mode="after")
    def _check(self) -> ThinkTime:
        if self.distribution == "lognormal" and self.cv is None:
            refuse("is required with distribution: lognormal", at="cv")
        if self.distribution != "lognormal" and self.cv is not None:
            refuse("belongs to distribution: lognormal", at="cv", value=self.cv)
        return self


def _turns(value: Any) -> Any:
    """Read a plain number of turns as the range that holds only it."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_INT:
        return {"min": value, "max": value}
    if isinstance(value, (dict, Turns)):
        return value
    return refuse("must be a whole number greater than 0, {min: ..., max: ...} or {mean: ...}")


def _think_time(value: Any) -> Any:
    """Read a plain number of seconds as that fixed time."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"mean": value, "distribution": "fixed"}
    if isinstance(value, (dict, ThinkTime)):
        return value
    return refuse("must be a number of seconds, or {mean: ..., distribution: ...}")


class SessionSpec(Section):
    """Sessions of several turns, each prompt of which is the whole history and new tokens."""

    turns: Annotated[Turns, BeforeValidator(_turns)]
    """Turns of a session: a whole number, ``min`` and ``max``, or a geometric ``mean``."""
    think_time_s: Annotated[ThinkTime, BeforeValidator(_think_time)]
    """From an answer's last token to the next prompt: seconds, or their distribution."""
    new_tokens: Length
    """Tokens that a turn's prompt adds to the history."""
    output_tokens: Length
    """Output length of a turn, tokens."""
    arrivals: SessionArrivals
    """When sessions start."""


class WorkloadSpec(ArrivalShape):
    """The requests to serve: their lengths, and when they arrive."""

    trace: Annotated[str, Field(min_length=1)] | None = None
    """Path of a trace; gives lengths, and arrival times unless stated otherwise here."""
    input_tokens: Length | None = None
    """Prompt length, tokens, in place of a trace."""
    output_tokens: Length | None = None
    """Output length, tokens, in place of a trace."""
    num_requests: Annotated[int, Field(strict=True, gt=0, le=MAX_REQUESTS)] | None = None
    """Requests to draw, or to take from the start of the trace or rates (``None``: all)."""
    request_rate: Rate | None = None
    """Mean arrivals per second; with a trace or rates: rescales their arrivals, bursts kept."""
    arrival: Process | None = None
    """Arrival process in place of the trace's own times."""
    rates: Annotated[str, Field(min_length=1)] | None = None
    """Path of a ServeGen file of arrival rates; lengths are ``input_tokens``, ``output_tokens``."""
    concurrency: Count | None = None
    """Closed loop: this many requests in flight, the next sent as one completes."""
    sessions: SessionSpec | None = None
    """Sessions of several turns; ``num_requests`` counts their turns."""

    @property
    def arrival_mode(self) -> ArrivalMode:
        """How requests arrive, one word for each combination of fields."""
        if self.sessions is not None:
            return "sessions"
        if self.concurrency is not None:
            return "closed_loop"
        if self.rates is not None:
            return "rates"
        return self.arrival or "trace"

    @model_validator(mode="after")
    def _check(self) -> WorkloadSpec:
        if self.sessions is not None:
            self._check_sessions()
            return self
        self._check_lengths()
        self.check_shape(self.arrival, "arrival")
        self._check_rates()
        if self.concurrency is not None and self.arrival is not None:
            refuse(
                "cannot be combined with arrival: a closed loop sends on completion",
                at="concurrency",
                value=self.concurrency,
            )
        mode = self.arrival_mode
        if mode in ("closed_loop", "all_at_once") and self.request_rate is not None:
            other = "concurrency" if mode == "closed_loop" else "arrival: all_at_once"
            refuse(
                f"cannot be combined with {other}, which fixes when requests are sent",
                at="request_rate",
                value=self.request_rate,
            )
        if self.request_rate is None and (mode == "poisson" or mode in _PARAMETERS):
            refuse(f"is required with arrival: {mode} (requests per second)", at="request_rate")
        return self

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = dump(self)
        return {k: v for k, v in data.items() if v is not None or k not in _LATER_FIELDS}

    def _check_sessions(self) -> None:
        """Sessions say all but how many turns are wanted."""
        meant = {"input_tokens": "new_tokens", "output_tokens": "output_tokens"}
        meant |= {"arrival": "arrivals.process", "request_rate": "arrivals.rate"}
        meant |= {name: f"arrivals.{name}" for name in ArrivalShape.model_fields}
        for name, value in self:
            if value is not None and name not in ("sessions", "num_requests"):
                other = f"use sessions.{meant[name]}" if name in meant else "give one"
                refuse(f"cannot be combined with sessions: {other}", at=name)
        if self.num_requests is None:
            refuse("is required with sessions: the number of turns in all", at="num_requests")

    def _check_rates(self) -> None:
        if self.rates is not None:
            for name in ("trace", "arrival", "concurrency"):
                if getattr(self, name) is not None:
                    refuse(
                        f"cannot be combined with {name}: give one", at="rates", value=self.rates
                    )

    def _check_lengths(self) -> None:
        drawn = [n for n in ("input_tokens", "output_tokens") if getattr(self, n) is not None]
        if self.trace is not None and drawn:
            refuse(f"cannot be combined with {drawn[0]}: give one", at="trace", value=self.trace)
        if self.trace is None:
            if not drawn:
                refuse("needs lengths: give trace, or input_tokens and output_tokens")
            needed = ("input_tokens", "output_tokens", "num_requests")
            for name in needed[:2] if self.rates is not None else needed:
                if getattr(self, name) is None:
                    refuse("is required where lengths are not from a trace", at=name)
            if (self.arrival, self.concurrency, self.rates) == (None, None, None):
                refuse(
                    "does not say when requests arrive: add arrival: poisson with request_rate, "
                    "arrival: all_at_once, or concurrency"
                )
