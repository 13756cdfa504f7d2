"""How fast the simulator is: both engines side by side, growth, a million requests, start.

``python -m bench.simulator_speed TRACE [--json PATH]``

Runs a trace, tiled to 20,000 requests, on one core at four shares of the plan's capacity (the
request rate that it reaches with all requests at once), for Llama-3.1-70B on tp8 of H100. A time
is the processor time of a whole run, from the requests' arrays to every latency; both engines take
turns in one process and the best of several turns counts. Cold start compiles the loops into an
empty cache in a new process; warm start loads them from it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from planner.resolve import resolve
from planner.scenario import Scenario
from simulator.plan import parse_plan
from simulator.run import Run
from simulator.workload import Workload

if TYPE_CHECKING:
    import numpy.typing as npt

    from planner.problem import Problem
    from simulator.plan import Plan
    from simulator.run import RunResult

_LOADS: Final = {"light": 0.3, "medium": 0.6, "near the knee": 0.9, "saturated": 1.3}
_REQUESTS: Final = 20_000
_MILLION: Final = 1_000_000
_PLAIN_TURNS, _JUMP_TURNS = 3, 9
_PLAN: Final = "tp8"
_KIB_PER_GIB: Final = 1024**2

_START_PROGRAM: Final = """
import sys, time
began = time.perf_counter()
from bench.simulator_speed import scenario_of
from planner.resolve import resolve
from simulator.plan import parse_plan
problem = resolve(scenario_of(sys.argv[1]))
problem.start(parse_plan("tp8", problem.default_limits)).finish()
print(time.perf_counter() - began)
"""


def scenario_of(trace: str) -> Scenario:
    """The trace on the measured plan's model, device and engine."""
    return Scenario.model_validate(
        {
            "schema_version": 1,
            "model": {"config": "meta-llama/Llama-3.1-70B", "max_model_len": 16384},
            "cluster": {"pools": [{"device": "H100-SXM-80GB", "nodes": 1, "devices_per_node": 8}]},
            "engine": {"name": "vllm", "version": "0.24.0"},
            "workload": {"trace": str(Path(trace).resolve())},
            "objective": {"minimize": "mean_e2e"},
        }
    )


def tiled(workload: Workload, requests: int, request_rate: float) -> Workload:
    """The workload over and over, up to ``requests``, stretched to a mean rate."""
    n = workload.num_requests
    arrival_s = workload.arrival_s
    span_s = float(arrival_s[-1]) * n / (n - 1)  # one mean gap between the copies
    copies = -(-requests // n)
    all_s = np.concatenate([arrival_s + i * span_s for i in range(copies)])[:requests]
    stretch = requests / request_rate / (span_s * requests / n)
    lengths: list[npt.NDArray[np.int64]] = [
        np.tile(tokens, copies)[:requests]
        for tokens in (workload.prompt_tokens, workload.output_tokens)
    ]
    prompts, outputs = lengths
    return Workload(all_s * stretch, prompts, outputs)


def run_once(problem: Problem, plan: Plan, what: Workload, *, plain: bool) -> RunResult:
    """One whole run."""
    limits = problem.replica_limits(plan)
    cost = problem.compile(plan.shape, plan.limits)
    return Run(what, plan.replicas, limits, cost, problem.rules, plain=plain).finish()


def measure(problem: Problem, plan: Plan, what: Workload) -> dict[str, float]:
    """Both engines on one workload, by turns."""
    best_s = {True: float("inf"), False: float("inf")}
    result = run_once(problem, plan, what, plain=False)
    for turn in range(_JUMP_TURNS):
        for plain in (False, True) if turn < _PLAIN_TURNS else (False,):
            began = time.process_time()
            run_once(problem, plan, what, plain=plain)
            best_s[plain] = min(best_s[plain], time.process_time() - began)
    requests = what.num_requests
    return {
        "requests": requests,
        "iterations": result.iterations,
        "mean_batch": float(what.output_tokens.sum() / result.iterations),
        "requests_per_s": requests / best_s[False],
        "plain_requests_per_s": requests / best_s[True],
        "jump_over_plain": best_s[True] / best_s[False],
    }


def growth(problem: Problem, plan: Plan, capacity: float) -> list[dict[str, Any]]:
    """Time per request against requests, batch and context, medium load."""
    base = problem.workload
    rows = []
    for requests in (5_000, 20_000, 80_000):
        what = tiled(base, requests, _LOADS["medium"] * capacity)
        rows.append({"varied": "requests", "value": requests, **measure(problem, plan, what)})
    for name, seats in (("seats", 64), ("seats", 256), ("seats", 1024)):
        limited = parse_plan(f"{_PLAN}:seqs={seats}", problem.default_limits)
        what = tiled(base, _REQUESTS, _LOADS["saturated"] * capacity)
        rows.append({"varied": name, "value": seats, **measure(problem, limited, what)})
    for tokens in (500, 2_000, 8_000):
        n = _REQUESTS // 4
        gaps_s = np.arange(n) * (tokens + 200) / 2e4
        what = Workload(gaps_s, np.full(n, tokens), np.full(n, 200))
        rows.append({"varied": "prompt tokens", "value": tokens, **measure(problem, plan, what)})
    return rows


def start_s(trace: str, cache: str) -> float:
    """Seconds from importing the planner to a first result in a new process."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-c", _START_PROGRAM, trace],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="bench.simulator_speed", description=__doc__)
    parser.add_argument("trace")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not Path(args.trace).exists():
        sys.exit(f"{args.trace}: no such file")
    problem = resolve(scenario_of(args.trace))
    plan = parse_plan(_PLAN, problem.default_limits)
    burst = tiled(problem.workload, _REQUESTS, 1e6)
    capacity = _REQUESTS / run_once(problem, plan, burst, plain=False).makespan_s
    print(f"capacity of {_PLAN}: {capacity:.2f} requests/s")

    print(f"{'load':>22} {'iterations':>10} {'batch':>6} {'jump req/s':>11} {'plain':>9} ratio")
    million = tiled(problem.workload, _MILLION, _LOADS["medium"] * capacity)
    began = time.process_time()
    run_once(problem, plan, million, plain=False)
    million_s = time.process_time() - began
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _KIB_PER_GIB
    loads: list[dict[str, Any]] = []
    for name, share in _LOADS.items():
        what = tiled(problem.workload, _REQUESTS, share * capacity)
        loads.append({"load": name, "share": share, **measure(problem, plan, what)})
        _print_row(name, loads[-1])
    rows = growth(problem, plan, capacity)
    for row in rows:
        _print_row(f"{row['value']} {row['varied']}", row)
    print(f"a million requests: {million_s:.2f} s, peak memory of the process {peak_gib:.2f} GiB")
    with tempfile.TemporaryDirectory() as cache:
        cold_s = start_s(args.trace, cache)
        warm_s = start_s(args.trace, cache)
    print(f"cold start {cold_s:.1f} s, warm start {warm_s:.2f} s")
    if args.json:
        figures = {
            "requests_per_s": min(row["requests_per_s"] for row in loads),
            "plain_requests_per_s": min(row["plain_requests_per_s"] for row in loads),
            "jump_over_plain": statistics.median(row["jump_over_plain"] for row in loads),
            "million_s": million_s,
            "million_peak_gib": peak_gib,
            "cold_start_s": cold_s,
            "warm_start_s": warm_s,
            "loads": loads,
            "growth": rows,
        }
        args.json.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _print_row(name: str, row: dict[str, Any]) -> None:
    print(
        f"{name:>22} {row['iterations']:>10,} {row['mean_batch']:>6.0f} "
        f"{row['requests_per_s']:>11,.0f} {row['plain_requests_per_s']:>9,.0f} "
        f"{row['jump_over_plain']:>5.1f}"
    )


if __name__ == "__main__":
    main()
