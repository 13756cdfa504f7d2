"""What is optimised, and what must hold: scores that bounds and finished runs share.

A score is a tuple of whole numbers, smaller is better, compared in order. Times count in
nanoseconds, so that two plans whose values differ by less are a tie and the canonical plan order
decides. A score computed from lower bounds is a lower bound on the score.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from planner.errors import InputError
from simulator.metrics import good, statistic_s, weighted_statistic_s
from simulator.units import MS_PER_S

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np
    import numpy.typing as npt

    from planner.scenario_goals import ObjectiveSpec
    from simulator.metrics import Latencies
    from simulator.run import RunResult
    from simulator.workload import Workload

Score = tuple[int, ...]
"""Values in order of importance, and last the one that breaks their ties."""

TICKS_PER_S: Final = 1_000_000_000
ITL: Final = "itl"
"""The one latency that needs every token's time."""

_SLACK: Final = 1e-9
"""Relative slack that keeps a bound below the value it bounds when both are rounded: sums of up to
10 million doubles differ by less than this whatever their order (10^7 x 2^-53 is 1.1e-9)."""


@dataclass(frozen=True)
class Outcome:
    """What a plan does, or the least it can do: the arguments of every score.

    Parameters
    ----------
    values
        Latencies per request, or lower bounds on them.
    makespan_s
        Makespan, or a lower bound on it.
    devices
        Devices of the plan.
    micros_per_hour
        Their price, millionths of a USD per hour.
    exact
        Whether these are a finished run's values.
    gaps
        Gaps between tokens and how many of each, or lower bounds on them, where ITL is asked for.
    """

    values: Latencies
    makespan_s: float
    devices: int
    micros_per_hour: int
    exact: bool
    gaps: tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]] | None = None

    @classmethod
    def of(cls, result: RunResult, devices: int, micros_per_hour: int = 0) -> Outcome:
        """Outcome of a finished run on so many devices, at their price."""
        return cls(
            result.values,
            result.makespan_s,
            devices,
            micros_per_hour,
            exact=True,
            gaps=result.gaps,
        )

    def ticks(self, value_s: float) -> int:
        """``value_s`` in ticks, rounded so that a bound stays a bound."""
        if self.exact:
            return round(value_s * TICKS_PER_S)
        return max(0, int(value_s * (1.0 - _SLACK) * TICKS_PER_S) - 1)

    def statistic_ticks(self, statistic: str, metric: str) -> int:
        """A statistic of a latency in ticks.

        Raises
        ------
        ValueError
            When it is ITL and no gaps were recorded.
        """
        if metric == ITL:
            if self.gaps is None:
                raise ValueError("the gaps between tokens were not recorded")
            return self.ticks(weighted_statistic_s(*self.gaps, statistic))
        return self.ticks(statistic_s(self.values.of(metric), statistic))

    def good_requests(self, limits_s: Mapping[str, float]) -> int:
        """Requests that meet every limit, or at most as many.

        Lower bounds on latencies meet at least the limits that the latencies meet.
        """
        return int(good(self.values, limits_s).sum())


@dataclass(frozen=True)
class Constraint:
    """One SLO: a statistic of a latency over the run must not exceed a limit.

    Parameters
    ----------
    metric, statistic
        For example ``ttft`` and ``p99``.
    limit_ms
        The limit, milliseconds.
    """

    metric: str
    statistic: str
    limit_ms: float

    @property
    def name(self) -> str:
        """Field of the scenario that states it."""
        return f"slo.{self.metric}_ms.{self.statistic}"

    @property
    def limit_ticks(self) -> int:
        """The limit in ticks."""
        return round(self.limit_ms / MS_PER_S * TICKS_PER_S)

    def ticks(self, outcome: Outcome) -> int:
        """The constrained statistic in ticks."""
        return outcome.statistic_ticks(self.statistic, self.metric)

    def is_broken(self, outcome: Outcome) -> bool:
        """Whether the outcome, or anything it bounds from below, breaks the limit."""
        return self.ticks(outcome) > self.limit_ticks


UNITS: Final[Mapping[str, str]] = {
    "throughput": "output tokens/s",
    "goodput": "requests/s",
    "slo_attainment": "of all requests",
    "devices": "devices",
    "cost_per_hour": "USD/h",
    "cost_per_million_tokens": "USD per million output tokens",
}
"""Units of the quantities that are no time; times are in milliseconds."""

MAXIMIZED: Final = ("throughput", "goodput", "slo_attainment")
"""Quantities of which more is better; scores count them the other way round."""

MICROS: Final = 1_000_000
"""Parts of a USD in which prices count."""

_SECONDS_PER_HOUR: Final = 3600
_NO_GOOD_TICKS: Final = 1 << 48
"""Makespan per good request where there is none, 3.3 days: no run's own value is larger."""


@dataclass(frozen=True)
class Objective:
    """The quantities to optimise, most important first, and how their ties are broken.

    Parameters
    ----------
    name
        As in the scenario: ``mean_e2e``, ``p99_ttft``, ``throughput``, ``devices`` ...
    output_tokens
        Output tokens of the workload: throughput is that over the makespan, so the shortest
        makespan is the highest throughput.
    then
        Quantities that decide between plans of equal value, in order.
    goodput_limits_s
        Limits on each request, where goodput or attainment is asked for.
    num_requests
        Requests of the workload, of which attainment is a share.
    """

    name: str
    output_tokens: int
    then: tuple[str, ...] = ()
    goodput_limits_s: Mapping[str, float] = field(default_factory=dict)
    num_requests: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """Every quantity, most important first."""
        return (self.name, *self.then)

    @property
    def sense(self) -> str:
        """``minimize`` or ``maximize``, of the first quantity."""
        return "maximize" if self.name in MAXIMIZED else "minimize"

    @property
    def unit(self) -> str:
        """Unit of :meth:`value`."""
        return UNITS.get(self.name, "ms")

    @property
    def tie_break(self) -> str:
        """What decides between plans of equal value, in words."""
        last = (*self.then, self._last)
        order = ", then ".join(last)
        return f"{order}, then fewest changed engine defaults, then the plan's own order"

    @property
    def needs_gaps(self) -> bool:
        """Whether the gaps between tokens must be recorded."""
        return any(name.endswith(f"_{ITL}") for name in self.names)

    @property
    def _last(self) -> str:
        """What breaks the ties of all quantities."""
        return "mean_e2e" if "devices" in self.names else "devices"

    def score(self, outcome: Outcome) -> Score:
        """Score of a run, or a lower bound on the score of everything ``outcome`` bounds."""
        return tuple(self.ticks(name, outcome) for name in (*self.names, self._last))

    def ticks(self, name: str, outcome: Outcome) -> int:
        """One quantity as a whole number of which less is better.

        Each formula falls or rises with every latency alike, so it turns bounds into a bound.
        """
        makespan_ticks = outcome.ticks(outcome.makespan_s)
        if name in ("throughput", "makespan"):
            return makespan_ticks
        if name == "devices":
            return outcome.devices
        if name == "goodput":  # time per good request
            good_requests = outcome.good_requests(self.goodput_limits_s)
            least = _NO_GOOD_TICKS if good_requests == 0 else makespan_ticks // good_requests
            return min(least, _NO_GOOD_TICKS)
        if name == "slo_attainment":  # requests that break a limit
            return len(outcome.values.e2e_s) - outcome.good_requests(self.goodput_limits_s)
        if name in ("cost_per_hour", "cost_per_million_tokens"):
            if name == "cost_per_hour":
                return outcome.micros_per_hour
            # 1e-6 USD/h x 1e-9 s / (3600 s/h x tokens) x 1e6 tokens = 1e-9 USD
            micro_ticks = outcome.micros_per_hour * makespan_ticks
            return micro_ticks // (_SECONDS_PER_HOUR * self.output_tokens)
        statistic, metric = name.split("_")
        return outcome.statistic_ticks(statistic, metric)

    def value(self, primary: int) -> float:
        """The value in :attr:`unit` that a score's first entry stands for."""
        return self.value_of(self.name, primary)

    def value_of(self, name: str, ticks: int) -> float:
        """The value in its unit that ``ticks`` of one quantity stand for."""
        if name == "devices":
            return float(ticks)
        if name == "throughput":
            return self.output_tokens * TICKS_PER_S / ticks if ticks else float("inf")
        if name == "goodput":
            return 0.0 if ticks >= _NO_GOOD_TICKS else TICKS_PER_S / max(1, ticks)
        if name == "slo_attainment":
            return 1.0 - ticks / self.num_requests
        if name == "cost_per_hour":
            return ticks / MICROS
        if name == "cost_per_million_tokens":
            return ticks / TICKS_PER_S
        return ticks * MS_PER_S / TICKS_PER_S


class Scorer(Protocol):
    """What orders plans: an :class:`~planner.objective.Objective` or a stand-in."""

    @property
    def needs_gaps(self) -> bool:
        """Whether outcomes must have the gaps between tokens."""
        ...

    def score(self, outcome: Outcome) -> Score:
        """Score of a run, or a lower bound on the score of everything ``outcome`` bounds."""
        ...


@dataclass(frozen=True)
class ExcessObjective:
    """How far the worst-kept constraint is exceeded: what an infeasible scenario minimises.

    The score's primary entry is the largest ratio of statistic to limit, in millionths.
    """

    constraints: tuple[Constraint, ...]

    _SCALE = 1_000_000

    @property
    def needs_gaps(self) -> bool:
        """Whether the gaps between tokens must be recorded."""
        return any(c.metric == ITL for c in self.constraints)

    def score(self, outcome: Outcome) -> Score:
        """Score of a run or of a bound."""
        worst = max(
            c.ticks(outcome) * self._SCALE // max(1, c.limit_ticks) for c in self.constraints
        )
        return worst, outcome.devices


def needs_gaps(objective: Objective, constraints: tuple[Constraint, ...]) -> bool:
    """Whether anything asks for the gaps between tokens, which makes runs slower."""
    return objective.needs_gaps or any(c.metric == ITL for c in constraints)


def objective_of(
    spec: ObjectiveSpec,
    workload: Workload,
    *,
    prices_per_hour: Iterable[float | None],
    goodput_limits_s: Mapping[str, float],
    source: str,
) -> Objective:
    """The objective of a scenario.

    Raises
    ------
    InputError
        When it needs a price or limits on each request, and the scenario has none.
    """
    prices = tuple(prices_per_hour)
    for name in spec.names:
        if name in ("goodput", "slo_attainment") and not goodput_limits_s:
            rule = "needs limits on each request: add a section such as goodput: {ttft_ms: 2000}"
            raise InputError(source=source, field="objective", value=name, rule=rule)
        if name.startswith("cost_") and None in prices:
            rule = "needs a price: add price_per_hour to the pool"
            raise InputError(source=source, field="objective", value=name, rule=rule)
    return Objective(
        spec.names[0],
        int(workload.output_tokens.sum()),
        spec.names[1:],
        goodput_limits_s,
        workload.num_requests,
    )
