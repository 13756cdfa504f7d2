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

ArrivalMode = Literal[
    "trace", "poisson", "gamma", "weibull", "diurnal", "rates", "closed_loop", "all_at_once"
]

_PARAMETERS: Final = {
    "gamma": ("cv",),
    "weibull": ("shape",),
    "diurnal": ("amplitude", "period_s"),
}
"""Fields that an arrival process needs, and that no other one knows."""

_LATER_FIELDS: Final = ("rates", "cv", "shape", "amplitude", "period_s")
"""Fields younger than the first reports: left out of a dump when unset, so that the digest of an
older scenario stays what it was."""


class WorkloadSpec(Section):
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
    arrival: Literal["poisson", "gamma", "weibull", "diurnal", "all_at_once"] | None = None
    """Arrival process in place of the trace's own times."""
    cv: Variation | None = None
    """Gamma: standard deviation of the gaps over their mean; 1 is Poisson, above it bursts."""
    shape: Annotated[float, Field(strict=True, ge=0.1, le=100, allow_inf_nan=False)] | None = None
    """Weibull: shape of the gaps' distribution; 1 is Poisson, below it bursts."""
    amplitude: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)] | None = None
    """Diurnal: swing of the rate, a fraction of ``request_rate``; it starts at its rising mean."""
    period_s: PositiveFloat | None = None
    """Diurnal: time from peak to peak, seconds."""
    rates: Annotated[str, Field(min_length=1)] | None = None
    """Path of a ServeGen file of arrival rates; lengths are ``input_tokens``, ``output_tokens``."""
    concurrency: Count | None = None
    """Closed loop: this many requests in flight, the next sent as one completes."""

    @property
    def arrival_mode(self) -> ArrivalMode:
        """How requests arrive, one word for each combination of fields."""
        if self.concurrency is not None:
            return "closed_loop"
        if self.rates is not None:
            return "rates"
        return self.arrival or "trace"

    @model_validator(mode="after")
    def _check(self) -> WorkloadSpec:
        self._check_lengths()
        self._check_parameters()
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

    def _check_parameters(self) -> None:
        """Each arrival process has its own fields, and no other's."""
        for process, names in _PARAMETERS.items():
            for name in names:
                value = getattr(self, name)
                if self.arrival == process and value is None:
                    refuse(f"is required with arrival: {process}", at=name)
                if self.arrival != process and value is not None:
                    refuse(f"belongs to arrival: {process}", at=name, value=value)
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
