"""A day of traffic served four ways: one plan all day, two threshold rules, the planner.

``python -m bench.autoscaling [--hours N] [--json PATH]``

Two clients share one service. Their arrivals are recorded (the first and the eighth day of
ServeGen's client 48 of m-large, windows of ten minutes), sped up to a service that needs a dozen
devices and more; as their shares change, so does the mix of lengths. Every minute a controller sees
the minutes before and orders replicas, which serve a minute later and are paid from the order on.

* static: the cheapest plan with which enough requests of the day meet their limits, found in
  hindsight
* threshold: replicas of one kind for the rate, each for 70 % of what it carries at the day's mean
  mix
* planner: :meth:`planner.Session.replicas_for` the rate and the mix of the minutes before
* tuned threshold: the threshold with the largest target that reaches the goal, found in hindsight;
  no controller has that knowledge, so it is a mark to measure against and no competitor

Both controllers scale the kind that the planner names for the day's mean rate and mix. Requests are
simulated stretch by stretch, a stretch being the time between two changes, with the minute before
it so that it does not start empty; a queue older than that is not carried over.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from planner.errors import InfeasibleError
from planner.io.trace_rates import read_rates
from planner.resolve import resolve
from planner.scenario import Scenario
from planner.session import Session
from planner.session_switching import Switching
from simulator.arrivals import windowed_arrivals_s
from simulator.metrics import good
from simulator.plan import Plan, parse_plan
from simulator.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from planner.problem import Problem

FOLDER: Final = Path(__file__).parent
CLIENTS: Final = {
    "chat": ("servegen_day1.csv", {"input_tokens": (600, 1.0), "output_tokens": (250, 0.8)}),
    "documents": ("servegen_day8.csv", {"input_tokens": (5000, 0.6), "output_tokens": (120, 0.6)}),
}
"""Recorded arrivals, and the mean and coefficient of variation of lengths, which were not recorded:
a chat, and questions about documents."""
LONGEST: Final = {"input_tokens": 14000, "output_tokens": 2000}
PEAK_REQUESTS_PER_S: Final = 8.0
"""Rate of each client's busiest window; the recorded ones are 3.75 and 3.1."""
TICK_S: Final = 60.0
STABLE_TICKS: Final = 5
"""The highest rate of so many minutes counts; Kubernetes waits as long before it scales down."""
GOAL: Final = 0.99
"""Share of requests that must meet both limits; the recorded rate jumps tenfold within a window,
which no controller foresees."""
LIMITS_MS: Final = {"ttft_ms": 2000.0, "tpot_ms": 60.0}
SWITCHING: Final = Switching(
    load_s=45.0, warm_up_s=15.0, drain_s=30.0, horizon_s=600.0, hysteresis=0.05
)
_STEP: Final = 1.05
"""Rates are asked for in steps of so much, rounded up, so that the session's answers are reused."""
_SHARE_STEPS: Final = 10
"""Steps in which the share of documents is told to the planner."""
UTILISATION: Final = 0.7
"""Part of what a replica carries that the untuned rule gives it: Knative's default
(``container-concurrency-target-percentage``)."""
_TUNED: Final = (1.6, 1.5, 1.4, 1.3, 1.2, 1.1, 1.0, 0.9, 0.8, 0.7)
_STATIC_RATES: Final = (4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0)
"""Rates whose best plans are tried all day."""


@dataclass(frozen=True)
class Outcome:
    """What one policy did.

    Parameters
    ----------
    policy, setting
        The policy and its knobs.
    device_hours
        Devices paid, starts and drains included.
    attainment
        Share of requests that met both limits.
    changes
        Changes of plan.

    """

    policy: str
    setting: str
    device_hours: float
    attainment: float
    changes: int


def scenario(**workload: Any) -> Scenario:
    """Llama-3.1-70B on up to 32 H100: the fewest devices that keep the limits."""
    data = {
        "schema_version": 1,
        "model": {"config": "meta-llama/Llama-3.1-70B-Instruct", "max_model_len": 16384},
        "cluster": {
            "pools": [{"device": "H100-SXM-80GB", "nodes": 4, "devices_per_node": 8}],
        },
        "engine": {"name": "vllm", "version": "0.24.0"},
        "workload": workload,
        "slo": {name: {"p99": limit} for name, limit in LIMITS_MS.items()},
        "objective": {"minimize": "devices"},
        "search": {
            "space": {
                "tp": [2, 4, 8],
                "pp": [1],
                "max_num_seqs": [256],
                "max_num_batched_tokens": [2048],
            }
        },
    }
    return Scenario.model_validate(data, source="autoscaling")


def mix_of(share: float) -> dict[str, Any]:
    """Lengths of a mix with this share of documents, by its mean and variation."""
    lengths = {}
    chat, documents = (own for _, own in CLIENTS.values())
    for name, longest in LONGEST.items():
        (a, cv_a), (b, cv_b) = chat[name], documents[name]
        mean = (1 - share) * a + share * b
        square = (1 - share) * a**2 * (1 + cv_a**2) + share * b**2 * (1 + cv_b**2)
        cv = math.sqrt(square / mean**2 - 1)
        lengths[name] = {"mean": round(mean), "cv": round(cv, 3), "max": longest}
    return lengths


class Day:
    """The requests of the day, minute by minute.

    Parameters
    ----------
    hours
        Hours from the start of the recorded day.

    """

    def __init__(self, hours: float) -> None:
        parts = []
        for number, (name, (file, _)) in enumerate(CLIENTS.items()):
            windows, _ = read_rates(FOLDER / file, source=file)
            scale = PEAK_REQUESTS_PER_S / max(windows.rate)
            faster = dataclasses.replace(windows, rate=tuple(r * scale for r in windows.rate))
            arrival_s = windowed_arrivals_s(faster, None, seed=number)
            arrival_s = arrival_s[arrival_s < hours * 3600.0]
            share = float(name == "documents")
            drawn = {"arrival": "all_at_once", "num_requests": len(arrival_s)}
            self.problem = resolve(scenario(**drawn, **mix_of(share)))
            work = self.problem.workload
            parts.append((arrival_s, work.prompt_tokens, work.output_tokens))
        arrival_s, prompts, outputs = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        is_document = np.arange(len(arrival_s)) >= len(parts[0][0])
        order = np.argsort(arrival_s, kind="stable")
        work = Workload(arrival_s[order], prompts[order], outputs[order])
        self.problem = dataclasses.replace(self.problem, workload=work)
        self.share_of_day = float(is_document.mean())
        self._documents = np.concatenate([[0], np.cumsum(is_document[order])])
        self.ticks = math.ceil(hours * 3600.0 / TICK_S)
        edges = np.arange(self.ticks + 1) * TICK_S
        self.starts = np.searchsorted(self.problem.workload.arrival_s, edges)
        self.rates = np.diff(self.starts) / TICK_S

    def seen(self, tick: int) -> float:
        """The rate that a controller goes by at the start of a minute."""
        first = max(0, tick - STABLE_TICKS)
        return float(self.rates[first:tick].max(initial=self.rates[0]))

    def share(self, tick: int) -> float:
        """The share of documents that a controller goes by at the start of a minute."""
        first, last = self.starts[max(0, tick - STABLE_TICKS)], self.starts[max(1, tick)]
        seen = int(last - first)
        return float(self._documents[last] - self._documents[first]) / max(1, seen)

    def attained(self, plans: Sequence[Plan]) -> float:
        """Share of requests that meet the limits under one plan per minute."""
        limits_s = {name.removesuffix("_ms"): ms / 1000.0 for name, ms in LIMITS_MS.items()}
        met = 0
        tick = 0
        for plan, stretch in groupby(plans):
            length = len(list(stretch))
            begin, end = int(self.starts[tick]), int(self.starts[tick + length])
            before = int(self.starts[max(0, tick - 1)])
            tick += length
            if begin < end:
                work = _part(self.problem.workload, before, end)
                run = dataclasses.replace(self.problem, workload=work).start(plan).finish()
                met += int(good(run.values, limits_s)[begin - before :].sum())
        return met / len(self.problem.workload.arrival_s)


def _part(work: Workload, first: int, end: int) -> Workload:
    arrival_s = work.arrival_s[first:end]
    return Workload(
        arrival_s - arrival_s[0], work.prompt_tokens[first:end], work.output_tokens[first:end]
    )


def serve(day: Day, policy: str, setting: str, order: Callable[[int], Plan]) -> Outcome:
    """Run a policy over the day.

    Parameters
    ----------
    day, policy, setting
        What is served, and how the policy and its knobs are called.
    order
        From the minute to the plan wanted.

    """
    serving = order(0)
    plans, paid_s, changes = [], 0.0, 0
    for tick in range(day.ticks):
        wanted = order(tick)
        plans.append(serving)
        paid_s += serving.devices * TICK_S
        if wanted != serving:
            paid_s += SWITCHING.device_seconds(serving, wanted)
            changes += 1
        serving = wanted  # ordered now, serves from the next minute on
    return Outcome(policy, setting, paid_s / 3600.0, day.attained(plans), changes)


def policies(day: Day, session: Session) -> Iterator[Outcome]:
    """What each policy does, the reference last.

    Raises
    ------
    ValueError
        When no plan tried, or no target, reaches the goal all day.

    """
    problem = day.problem
    limits = _limits(problem)
    mean_mix = mix_of(day.share_of_day)

    def best(rate: float) -> Plan:
        report = session.plan(rate=rate, mix=mean_mix)
        if report.plan is None:
            raise ValueError(f"no plan of the pool carries {rate:g} requests/s")
        return parse_plan(report.plan.id, limits)

    def static(plan: Plan) -> Outcome:
        return serve(day, "static", plan_name(plan), lambda tick: plan)

    kind = dataclasses.replace(best(float(f"{day.rates.mean():.3g}")), replicas=1)
    name, text = plan_name(kind), problem.plan_text(kind)
    most = problem.replicas_that_fit(kind.shape)
    carries = session.capacity(text, mix=mean_mix)

    def threshold(policy: str, utilisation: float) -> Outcome:
        def order(tick: int) -> Plan:
            wanted = math.ceil(day.seen(tick) / (utilisation * carries))
            return dataclasses.replace(kind, replicas=min(most, max(1, wanted)))

        return serve(day, policy, f"{name}, {100 * utilisation:.0f} %", order)

    def planned(tick: int) -> Plan:
        rate = _STEP ** math.ceil(math.log(max(day.seen(tick), 0.1), _STEP))
        mix = mix_of(math.ceil(day.share(tick) * _SHARE_STEPS) / _SHARE_STEPS)
        try:
            replicas = session.replicas_for(text, float(f"{rate:.3g}"), mix=mix)
        except InfeasibleError:  # beyond what the pool carries: all of it
            replicas = most
        return dataclasses.replace(kind, replicas=replicas)

    plans = sorted({best(rate) for rate in _STATIC_RATES}, key=lambda plan: plan.devices)
    yield _first_that_holds(map(static, plans))
    yield threshold("threshold", UTILISATION)
    yield serve(day, "planner", name, planned)
    yield _first_that_holds(threshold("tuned threshold", part) for part in _TUNED)


def _first_that_holds(outcomes: Iterable[Outcome]) -> Outcome:
    """The first outcome that reaches the goal; they come cheapest first."""
    for outcome in outcomes:
        if outcome.attainment >= GOAL:
            return outcome
    raise ValueError(f"nothing tried serves {100 * GOAL:g} % of the requests within the limits")


def plan_name(plan: Plan) -> str:
    """A plan's replicas and shape, without the limits that all plans here share."""
    return plan.shape.text if plan.replicas == 1 else f"{plan.replicas}x{plan.shape.text}"


def _limits(problem: Problem) -> Any:
    space = problem.space
    return dataclasses.replace(
        problem.pool.default_limits,
        max_num_seqs=space.max_num_seqs[0],
        max_num_batched_tokens=space.max_num_batched_tokens[0],
    )


def compare(hours: float) -> list[Outcome]:
    """All policies over the first hours of the day; raises as :func:`policies` does."""
    day = Day(hours)
    workload = {"arrival": "poisson", "request_rate": 4.0, "num_requests": 1500}
    with Session(scenario(**workload, **mix_of(day.share_of_day))) as session:
        return list(policies(day, session))


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(prog="bench.autoscaling", description=__doc__)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    outcomes = compare(args.hours)
    print(f"{'policy':<15} {'setting':<11} {'device hours':>12} {'within limits':>13} changes")
    for one in outcomes:
        print(
            f"{one.policy:<15} {one.setting:<11} {one.device_hours:>12.1f} "
            f"{100 * one.attainment:>11.2f} % {one.changes:>7}"
        )
    if args.json:
        rows = [dataclasses.asdict(one) for one in outcomes]
        args.json.write_text(json.dumps(rows, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
