"""The requests of a scenario at another rate or with other lengths, without reading a file again.

What a call changes is written as a changed scenario, so that an answer can be held against a fresh
solve of it. Recorded arrivals are stretched to the rate; what is drawn has a random stream for
lengths and one for arrivals, so each can be drawn alone.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from planner.errors import NO_VALUE, InputError
from planner.io.trace_rates import read_rates
from planner.io.traces import rescale
from planner.objective import objective_of
from planner.problem import Problem
from planner.requests import digest_of, requests_of
from planner.scenario import Scenario
from simulator.rules import VLLM_V1

if TYPE_CHECKING:
    from collections.abc import Mapping

    from simulator.plan import BatchingLimits, Plan, Shape
    from simulator.state import Limits
    from simulator.workload import Workload

_LENGTHS: Final = ("input_tokens", "output_tokens")
_RECORDED: Final = ("trace", "rates")
"""Ways to arrive that a file records."""


@dataclass(frozen=True)
class SessionProblem(Problem):
    """A problem that shares with others over the same plans what no workload changes.

    Parameters
    ----------
    kept
        Limits of each replica; worked out anew for each problem they took a third of a search.

    """

    kept: dict[tuple[Shape, BatchingLimits], Limits] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def of(cls, problem: Problem) -> SessionProblem:
        """The same problem, ready to share."""
        fields = [f.name for f in dataclasses.fields(problem) if f.init]
        return cls(**{name: getattr(problem, name) for name in fields})

    def replica_limits(self, plan: Plan) -> Limits:
        """Limits of one replica of ``plan`` as the simulator takes them."""
        key = plan.shape, plan.limits
        if key not in self.kept:
            self.kept[key] = super().replica_limits(plan)
        return self.kept[key]


class Workloads:
    """Every workload that a session is asked about; immutable once made.

    Parameters
    ----------
    scenario, problem
        What the session plans for, and that resolved.

    Raises
    ------
    InputError
        When a file of the scenario cannot be read.

    """

    def __init__(self, scenario: Scenario, problem: Problem) -> None:
        self._scenario, self._problem = scenario, SessionProblem.of(problem)
        spec = scenario.workload
        self._base = self._requests(scenario)
        self._own_s, self._sha256 = self._base[0].arrival_s, ""
        if spec.arrival_mode in _RECORDED:
            self._own_s = self._requests(self._with(request_rate=None))[0].arrival_s
        if spec.rates is not None:
            self._sha256 = read_rates(scenario.find(spec.rates), source=spec.rates)[1]

    def key(self, rate: float | None, mix: Mapping[str, Any] | None) -> str:
        """Text of the content asked for: calls with equal keys have equal answers."""
        asked = self._stated if rate is None else rate
        return json.dumps([asked, dict(mix or {})], sort_keys=True, default=repr)

    @property
    def _stated(self) -> float | None:
        spec = self._scenario.workload
        return spec.request_rate if spec.sessions is None else spec.sessions.arrivals.rate

    @property
    def rate(self) -> float:
        """Requests per second of the scenario: as stated, else the mean of what arrives."""
        if self._stated is not None:
            return self._stated
        arrival_s = self._base[0].arrival_s[self._base[0].known]
        span_s = float(arrival_s[-1] - arrival_s[0])
        return (len(arrival_s) - 1) / span_s if span_s else 1.0

    def scenario(self, rate: float | None, mix: Mapping[str, Any] | None) -> Scenario:
        """The scenario whose fresh solve is the answer at this rate and mix.

        Parameters
        ----------
        rate
            Requests (for sessions: starts of sessions) per second; ``None``: the scenario's own.
        mix
            ``input_tokens`` and ``output_tokens`` as a scenario writes them; left out, the
            scenario's own. In place of a trace's lengths both must be given; the requests are then
            drawn, and arrive by a Poisson process of the same rate where the trace timed them.

        Raises
        ------
        InputError
            When one of them is no valid value, or the workload has none to change.

        """
        lengths = dict(mix or {})
        for name in sorted(lengths.keys() - set(_LENGTHS)):
            raise self._error(
                name, lengths[name], "is no part of a mix: input_tokens, output_tokens"
            )
        spec = self._scenario.workload
        if spec.sessions is not None:
            return self._with(sessions=self._sessions(rate, lengths))
        changes: dict[str, Any] = dict(lengths)
        if rate is not None:
            changes["request_rate"] = rate
        if lengths and spec.trace is not None:
            changes |= self._in_place_of_trace(lengths, rate)
        return self._with(**changes) if changes else self._scenario

    def problem(self, scenario: Scenario) -> Problem:
        """The problem of a scenario that :meth:`scenario` gave, sharing what does not change."""
        base = self._problem
        workload, digest, warnings = self._requests_at(scenario)
        return dataclasses.replace(
            base,
            workload=workload,
            objective=objective_of(
                scenario.objective,
                workload,
                prices_per_hour=[pool.price_per_hour for pool in base.pools.values()],
                goodput_limits_s=dict(base.goodput_limits_s),
                source=scenario.source,
            ),
            provenance={
                **base.provenance,
                "scenario": digest_of(scenario.model_dump(mode="json")),
                "workload": digest,
            },
            warnings=(*warnings, *base.warnings[len(self._base[2]) :]),
        )

    def _requests_at(self, scenario: Scenario) -> tuple[Workload, str, list[str]]:
        """What ``requests_of`` gives for ``scenario``, without its files."""
        spec = scenario.workload
        if scenario is self._scenario:
            return self._base
        if spec.trace is None and spec.rates is None:
            return self._requests(scenario)
        lengths, digest, warnings = self._base
        if spec.rates is not None:
            number, arrival = len(self._own_s), "all_at_once"
            changes = {"rates": None, "request_rate": None, "num_requests": number}
            drawn = self._with(scenario, arrival=arrival, **changes)
            lengths, _, warnings = self._requests(drawn)
            asked = {**spec.model_dump(mode="json"), "rates": self._sha256}
            digest = digest_of([asked, scenario.search.seed])
        if spec.arrival_mode in _RECORDED:
            arrival_s, source = self._own_s, spec.trace or spec.rates or ""
            if spec.request_rate is not None:
                arrival_s = rescale(arrival_s, spec.request_rate, source=source)
        else:
            one = dict.fromkeys(_LENGTHS, 1)
            drawn = self._with(scenario, trace=None, num_requests=lengths.num_requests, **one)
            arrival_s = self._requests(drawn)[0].arrival_s
        return dataclasses.replace(lengths, arrival_s=arrival_s), digest, warnings

    def _in_place_of_trace(self, lengths: Mapping[str, Any], rate: float | None) -> dict[str, Any]:
        """What must be said where a trace says nothing of lengths any more."""
        base, spec = self._base[0], self._scenario.workload
        if base.block_tokens:
            rule = "cannot change what the trace's prompts share: use a trace without content"
            raise self._error("mix", dict(lengths), rule)
        for name in _LENGTHS:
            if name not in lengths:
                raise self._error(name, NO_VALUE, "is required in place of a trace's lengths")
        changes: dict[str, Any] = {"trace": None, "num_requests": base.num_requests}
        if spec.arrival_mode in _RECORDED:
            changes |= {"arrival": "poisson", "request_rate": self.rate if rate is None else rate}
        return changes

    def _sessions(self, rate: float | None, lengths: Mapping[str, Any]) -> dict[str, Any]:
        """The section of sessions with other starts or lengths."""
        section = self._scenario.workload.model_dump(mode="json", exclude_none=True)["sessions"]
        names = {"input_tokens": "new_tokens", "output_tokens": "output_tokens"}
        section |= {names[name]: length for name, length in lengths.items()}
        if rate is not None:
            section["arrivals"]["rate"] = rate
        return dict(section)

    def _with(self, scenario: Scenario | None = None, **changes: Any) -> Scenario:
        """A scenario with fields of its workload changed, ``None`` removing one, and checked."""
        scenario = self._scenario if scenario is None else scenario
        data = scenario.model_dump(mode="json", exclude_unset=True, by_alias=True)
        fields = {**data["workload"], **changes}
        data["workload"] = {name: value for name, value in fields.items() if value is not None}
        return Scenario.model_validate(data, base_dir=scenario.base_dir, source=scenario.source)

    def _requests(self, scenario: Scenario) -> tuple[Workload, str, list[str]]:
        problem = self._problem
        shares = problem.uses_prefix_cache and problem.rules.policy == VLLM_V1
        first = next(iter(problem.pools.values()))  # the engine's blocks are the same everywhere
        block_tokens = first.memory_rules.block_tokens if shares else 0
        return requests_of(scenario, problem.max_model_len, block_tokens)

    def _error(self, name: str, value: object, rule: str) -> InputError:
        source = self._scenario.source
        return InputError(source=source, field=f"workload.{name}", value=value, rule=rule)
