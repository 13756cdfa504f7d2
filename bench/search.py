"""How much of an exhaustive simulation the search needs, and whether both agree.

``python -m bench.search [--traces DIR] [--cases N] [--requests N] [--objectives O,O,...]
[--certificates] [--json PATH]``

Fifteen cases of dense models and six of experts (``bench/search_cases.py``), each for eight
objectives. Every plan of a case is
simulated to its end once, which judges all its objectives; then each is solved. Effort counts
simulated iterations over the committed plan list; plans with identical trajectories count once on
the exhaustive side. Cases whose trace is not in DIR are left out and named.

``--certificates`` also verifies the certificate of every solve. ``--seed-tool`` instead solves the
one question whose cost the seed's tool is known for, and ``--scale`` prints how time grows with
devices, plans and requests. ``--capacity`` prints what the loads are shares of;
``--write-plans`` replaces the plan lists by today's spaces. ``--only`` takes workloads by name.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from bench.search_cases import LOADS, OBJECTIVES, SHIPPED, WORKLOADS, Served
from planner import solve
from planner.resolve import resolve
from planner.space import enumerate_space
from planner.verify import SAMPLE, verify
from planner.verify_master import master_disagrees

if TYPE_CHECKING:
    from collections.abc import Iterator

    from planner import Scenario
    from planner.objective import Score

_SEED_TOOL_CPU_S: Final = 93.0
_SEED_TOOL_PLANS: Final = 26
"""APEX+ on Llama-70B, 8 GPUs and the 1,024 requests of its lmsys trace: CPU seconds and plans,
measured on two cores of the same kind of machine."""


class Case(NamedTuple):
    """One workload at one load."""

    served: Served
    load: str

    @property
    def name(self) -> str:
        """Workload and load."""
        return f"{self.served.name}@{self.load}"


class Exhausted(NamedTuple):
    """Every plan of a case simulated to its end.

    ``best`` has the best plan and its score by objective; ``iterations`` counts identical
    trajectories once.
    """

    plans: int
    iterations: int
    cpu_s: float
    best: dict[str, tuple[str, Score]]


def cases(traces: Path, number: int | None, only: str) -> Iterator[Case]:
    """The cases whose trace is there, loads innermost; what is left out is named on stderr."""
    found = []
    for served in (one for one in WORKLOADS if only in one.name):
        if served.find(traces) is None:
            sys.stderr.write(f"left out: {served.name}: no {served.trace} in {traces}\n")
            continue
        found += [Case(served, load) for load in LOADS]
    yield from found[:number]


def exhaust(case: Case, traces: Path, objectives: list[str], requests: int | None) -> Exhausted:
    """Simulate every plan of the case's committed list to its end.

    Raises
    ------
    SystemExit
        When today's space has other plans than the list.
    """
    served = case.served
    rate = served.rate(case.load)
    scorers = {}
    for name in objectives:
        problem = resolve(served.scenario(traces, name, rate=rate, num_requests=requests))
        scorers[name] = problem.objective
    plans = enumerate_space(problem).plans
    names = [problem.plan_text(plan) for plan in plans]
    if names != served.plans():
        sys.exit(f"{served.name}: the space differs from bench/search_plans: see --write-plans")
    began_s = time.process_time()
    distinct: dict[str, int] = {}
    best: dict[str, tuple[Score, int]] = {}
    for rank, plan in enumerate(plans):
        result = problem.start(plan).finish()
        distinct[result.trajectory_hash()] = result.iterations
        outcome = problem.outcome(plan, result)
        for name, scorer in scorers.items():
            key = scorer.score(outcome), rank
            best[name] = min(key, best.get(name, key))
    return Exhausted(
        len(plans),
        sum(distinct.values()),
        time.process_time() - began_s,
        {name: (names[rank], score) for name, (score, rank) in best.items()},
    )


def measure(
    scenario: Scenario,
    label: str,
    every: Exhausted,
    objective: str,
    *,
    experts: bool,
    certified: bool,
) -> dict[str, Any]:
    """One row of the table: a solve, against what simulating everything found."""
    texts: list[str] = []
    began_s, cpu_s = time.perf_counter(), time.process_time()
    report = solve(scenario, on_certificate=texts.append if certified else None)
    seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    plan, score = every.best[objective]
    value = resolve(scenario).objective.value(score[0])
    row = {
        "scenario": label,
        "plan": report.plan.id if report.plan else None,
        "experts": experts,
        "space": report.search.feasible,
        "simulated": report.search.simulated + report.search.aborted,
        "simulated_fraction": report.search.iterations / every.iterations,
        "seconds": seconds,
        "cpu_s": cpu_s,
        "proved": report.status == "optimal",
        "same_as_exhaustive": report.plan is not None
        and report.objective is not None
        and (report.plan.id, report.objective.value) == (plan, value),
    }
    for text in texts:
        began_s = time.process_time()
        _, problem = verify(text, source=label, sample=SAMPLE)
        row["accepted"] = master_disagrees(problem, text) is None
        row["verify_cpu_s"] = time.process_time() - began_s
        row["certificate_bytes"] = len(text)
    return row


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Solve every case for every objective and print how it compares."""
    objectives = args.objectives.split(",")
    rows = []
    print(
        f"{'case':<34} {'objective':<11} {'plan':<28} {'run':>5} {'iterations':>10} {'seconds':>8} "
        "proved agrees" + (" accepted verify" if args.certificates else "")
    )
    for case in cases(args.traces, args.cases, args.only):
        every = exhaust(case, args.traces, objectives, args.requests)
        for objective in objectives:
            rate = case.served.rate(case.load)
            asked = case.served.scenario(
                args.traces, objective, rate=rate, num_requests=args.requests
            )
            label = f"{case.name}:{objective}"
            row = measure(
                asked,
                label,
                every,
                objective,
                experts=case.served.has_experts,
                certified=args.certificates,
            )
            rows.append(row)
            extra = ""
            if "accepted" in row:
                extra = f" {row['accepted']!s:>8} {row['verify_cpu_s']:>5.1f}s"
            print(
                f"{case.name:<34} {objective:<11} {row['plan']!s:<28} {row['simulated']:>5} "
                f"{100 * row['simulated_fraction']:>8.2f} % {row['seconds']:>8.2f} "
                f"{row['proved']!s:>6} {row['same_as_exhaustive']!s:>6}{extra}",
                flush=True,
            )
    figures: dict[str, Any] = {"rows": rows}
    for key, name, experts in (("share", "dense", False), ("share_experts", "experts", True)):
        shares = [row["simulated_fraction"] for row in rows if row["experts"] is experts]
        if not shares:
            continue
        median, worst = statistics.median(shares), max(shares)
        figures[key] = {
            "median": {"simulated_fraction": median},
            "worst": {"simulated_fraction": worst},
        }
        print(
            f"{len(shares)} solves, {name}: median {100 * median:.2f} %, "
            f"worst {100 * worst:.2f} % of the iterations of simulating every plan"
        )
    return figures


def seed_tool(args: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of the question that the seed's tool is known for, warm, all requests at once."""
    served = next(one for one in WORKLOADS if one.name == "llama-70b-lmsys")
    asked = served.scenario(args.traces)
    solve(asked)  # compiles and reads what later solves find ready
    began_s = time.process_time()
    report = solve(asked)
    cpu_s = time.process_time() - began_s
    print(
        f"{served.name}, all at once: {report.search.feasible} plans, {report.status}, "
        f"{cpu_s:.2f} CPU s warm; the seed's tool: {_SEED_TOOL_PLANS} plans, "
        f"{_SEED_TOOL_CPU_S:g} CPU s"
    )
    return {"scenario": served.name, "cpu_s": cpu_s, "plans": report.search.feasible}


def _cluster(nodes: int, types: int) -> dict[str, Any]:
    """Nodes of eight devices, half of them H100, at a load that grows with their number."""
    half = nodes if types == 1 else nodes // 2
    others = [("A100-SXM4-80GB", nodes // 4, 1.8), ("L40S", nodes // 4, 0.9)][: types - 1]
    return {
        "cluster": [
            {"device": device, "nodes": n, "devices_per_node": 8, "price_per_hour": price}
            for device, n, price in (("H100-SXM-80GB", half, 3.9), *others)
        ],
        "replicas": [2**i for i in range((8 * half).bit_length())],
        "rate": WORKLOADS[0].rate("light") * nodes,
    }


def scale(args: argparse.Namespace) -> dict[str, Any]:
    """How time grows with devices, plans, requests and types of device, one at a time."""
    served = WORKLOADS[0]
    rows = []
    rate = served.rate("light")
    few = {"max_num_seqs": (64, 256), "max_num_batched_tokens": (2048, 8192)}
    steps: list[tuple[str, dict[str, Any]]] = [
        *((f"{n} requests", {"num_requests": n}) for n in (250, 500, 1000, 2000)),
        *((f"{n} devices", {"devices": n, "num_requests": 500}) for n in (2, 4, 8)),
        ("8 devices, few limits", {"num_requests": 500, "space": few}),
        *(
            (f"{8 * nodes} devices, {types} types", {**_cluster(nodes, types), "space": few})
            for nodes, types in ((8, 1), (8, 3), (64, 3), (512, 3))
        ),
    ]
    for label, changes in steps:
        space = changes.pop("space", {})
        asked = replace(served, **space).scenario(args.traces, **{"rate": rate, **changes})
        solve(asked)
        began_s, cpu_s = time.perf_counter(), time.process_time()
        report = solve(asked)
        row = {
            "scenario": label,
            "plans": report.search.feasible,
            "simulated": report.search.simulated + report.search.aborted,
            "iterations": report.search.iterations,
            "proved": report.status == "optimal",
            "seconds": time.perf_counter() - began_s,
            "cpu_s": time.process_time() - cpu_s,
        }
        rows.append(row)
        print(
            f"{label:<24} {row['plans']:>5} plans {row['simulated']:>4} simulated "
            f"{row['iterations']:>9} iterations proved {row['proved']!s:<5} "
            f"{row['seconds']:>6.2f} s {row['cpu_s']:>6.2f} CPU s",
            flush=True,
        )
    return {"rows": rows}


def capacity(args: argparse.Namespace) -> dict[str, Any]:
    """Requests per second of the best plan for throughput with all requests sent at once."""
    rates = {}
    for served in (one for one in WORKLOADS if args.only in one.name):
        if served.find(args.traces) is None:
            continue
        report = solve(served.scenario(args.traces, "throughput"))
        rates[served.name] = report.metrics["request_throughput"]
        print(f"{served.name}: {rates[served.name]:.3g} requests/s, committed {served.capacity:g}")
    return {"requests_per_s": rates}


def write_plans(traces: Path, only: str) -> None:
    """Replace the plan lists by the plans of today's spaces."""
    for served in (one for one in WORKLOADS if only in one.name):
        if served.find(traces) is not None:
            problem = resolve(served.scenario(traces))
            plans = enumerate_space(problem).plans
            served.write_plans(problem.plan_text(plan) for plan in plans)
            print(f"{served.name}: {len(plans)} plans")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="bench.search", description=__doc__)
    parser.add_argument("--traces", type=Path, default=SHIPPED)
    parser.add_argument("--cases", type=int, help="only the first so many")
    parser.add_argument("--requests", type=int, help="only so many from the start of each trace")
    parser.add_argument("--objectives", default=",".join(OBJECTIVES))
    parser.add_argument("--certificates", action="store_true")
    parser.add_argument("--seed-tool", action="store_true")
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--capacity", action="store_true")
    parser.add_argument("--write-plans", action="store_true")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.write_plans:
        write_plans(args.traces, args.only)
        return
    run = (
        seed_tool
        if args.seed_tool
        else scale
        if args.scale
        else capacity
        if args.capacity
        else compare
    )
    figures = run(args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
