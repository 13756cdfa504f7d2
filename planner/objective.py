"""What is optimised, and what must hold: scores that bounds and finished runs share.

A score is a tuple of whole numbers, smaller is better, compared in order. Times count in
nanoseconds, so that two plans whose values differ by less are a tie and the canonical plan order
decides. A score computed from lower bounds is a lower bound on the score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from simulator.metrics import statistic_s
from simulator.units import MS_PER_S

if TYPE_CHECKING:
    from simulator.metrics import Latencies
    from simulator.run import RunResult

Score = tuple[int, int]
"""Primary value and the secondary one that breaks its ties."""

TICKS_PER_S: Final = 1_000_000_000
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
    exact
        Whether these are a finished run's values.
    """

    values: Latencies
    makespan_s: float
    devices: int
    exact: bool

    @classmethod
    def of(cls, result: RunResult, devices: int) -> Outcome:
        """Outcome of a finished run."""
        return cls(result.values, result.makespan_s, devices, exact=True)

    def ticks(self, value_s: float) -> int:
        """``value_s`` in ticks, rounded so that a bound stays a bound."""
        if self.exact:
            return round(value_s * TICKS_PER_S)
        return max(0, int(value_s * (1.0 - _SLACK) * TICKS_PER_S) - 1)

    def statistic_ticks(self, statistic: str, metric: str) -> int:
        """A statistic of a latency in ticks."""
        return self.ticks(statistic_s(self.values.of(metric), statistic))


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


@dataclass(frozen=True)
class Objective:
    """The quantity to optimise and how its ties are broken.

    Parameters
    ----------
    name
        As in the scenario: ``mean_e2e``, ``p99_ttft``, ``throughput``, ``devices`` ...
    output_tokens
        Output tokens of the workload: throughput is that over the makespan, so the shortest
        makespan is the highest throughput.
    """

    name: str
    output_tokens: int

    @property
    def sense(self) -> str:
        """``minimize`` or ``maximize``."""
        return "maximize" if self.name == "throughput" else "minimize"

    @property
    def unit(self) -> str:
        """Unit of :meth:`value`."""
        return {"throughput": "output tokens/s", "devices": "devices"}.get(self.name, "ms")

    @property
    def tie_break(self) -> str:
        """What decides between plans of equal value, in words."""
        second = "mean_e2e" if self.name == "devices" else "devices"
        return f"{second}, then fewest changed engine defaults, then the plan's own order"

    def score(self, outcome: Outcome) -> Score:
        """Score of a run, or a lower bound on the score of everything ``outcome`` bounds."""
        if self.name == "devices":
            return outcome.devices, outcome.statistic_ticks("mean", "e2e")
        if self.name == "throughput":
            return outcome.ticks(outcome.makespan_s), outcome.devices
        statistic, metric = self.name.split("_")
        return outcome.statistic_ticks(statistic, metric), outcome.devices

    def value(self, primary: int) -> float:
        """The value in :attr:`unit` that a score's primary entry stands for."""
        if self.name == "devices":
            return float(primary)
        if self.name == "throughput":
            return self.output_tokens * TICKS_PER_S / primary if primary else float("inf")
        return primary * MS_PER_S / TICKS_PER_S


@dataclass(frozen=True)
class ExcessObjective:
    """How far the worst-kept constraint is exceeded: what an infeasible scenario minimises.

    The score's primary entry is the largest ratio of statistic to limit, in millionths.
    """

    constraints: tuple[Constraint, ...]

    _SCALE = 1_000_000

    def score(self, outcome: Outcome) -> Score:
        """Score of a run or of a bound."""
        worst = max(
            c.ticks(outcome) * self._SCALE // max(1, c.limit_ticks) for c in self.constraints
        )
        return worst, outcome.devices
