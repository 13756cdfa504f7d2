"""How fast the simulator is: requests and iterations per second, cold and warm start.

``python -m bench.simulator_speed TRACE.csv [--json PATH]``

Runs the plain loop over a whole trace at three loads (0.3, 0.7 and 1.2 of the plan's capacity, the
output rate it reaches with all requests at once) for Llama-3.1-70B on tp8. Times are the best of
several runs on one core, the state's set-up included. Cold start compiles the loops into an empty
cache in a new process; warm start loads them from it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from planner.resolve import resolve
from planner.scenario import Scenario
from simulator.plan import parse_plan

_LOADS: Final = (0.3, 0.7, 1.2)
_REPEATS: Final = 5
_PLAN: Final = "tp8"

_START_PROGRAM: Final = """
import sys, time
began = time.perf_counter()
from bench.simulator_speed import scenario_of
from planner.resolve import resolve
from simulator.plan import parse_plan
problem = resolve(scenario_of(sys.argv[1], None, 100))
problem.start(parse_plan("tp8", problem.default_limits)).finish()
print(time.perf_counter() - began)
"""


def scenario_of(trace: str, request_rate: float | None, num_requests: int | None) -> Scenario:
    """The measured workload; without a rate all requests are sent at once."""
    workload: dict[str, Any] = {"trace": str(Path(trace).resolve())}
    if num_requests is not None:
        workload["num_requests"] = num_requests
    if request_rate is None:
        workload["arrival"] = "all_at_once"
    else:
        workload["request_rate"] = request_rate
    return Scenario.model_validate(
        {
            "schema_version": 1,
            "model": {"config": "meta-llama/Llama-3.1-70B", "max_model_len": 16384},
            "cluster": {"pools": [{"device": "H100-SXM-80GB", "nodes": 1, "devices_per_node": 8}]},
            "engine": {"name": "vllm", "version": "0.24.0"},
            "workload": workload,
            "objective": {"minimize": "mean_e2e"},
        }
    )


def measure(trace: str, request_rate: float | None) -> dict[str, float]:
    """Best of several runs at one rate."""
    problem = resolve(scenario_of(trace, request_rate, None))
    plan = parse_plan(_PLAN, problem.default_limits)
    problem.start(plan).advance(1)  # compiled before the clock starts
    best_s, result = float("inf"), None
    for _ in range(_REPEATS):
        began = time.perf_counter()
        result = problem.start(plan).finish()
        best_s = min(best_s, time.perf_counter() - began)
    if result is None:
        raise AssertionError("no run was made")
    requests = problem.workload.num_requests
    return {
        "request_rate": request_rate or 0.0,
        "requests": requests,
        "iterations": result.iterations,
        "seconds": best_s,
        "requests_per_s": requests / best_s,
        "iterations_per_s": result.iterations / best_s,
        "throughput_of_plan": requests / result.makespan_s,
    }


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
    capacity = measure(args.trace, None)["throughput_of_plan"]
    print(f"capacity of {_PLAN}: {capacity:.2f} requests/s")
    loads = []
    print(f"{'load':>5} {'req/s sent':>10} {'requests/s':>12} {'iterations/s':>13} {'seconds':>8}")
    for load in _LOADS:
        row = {"load": load, **measure(args.trace, load * capacity)}
        loads.append(row)
        print(
            f"{load:>5} {row['request_rate']:>10.2f} {row['requests_per_s']:>12,.0f} "
            f"{row['iterations_per_s']:>13,.0f} {row['seconds']:>8.3f}"
        )
    with tempfile.TemporaryDirectory() as cache:
        cold_s = start_s(args.trace, cache)
        warm_s = start_s(args.trace, cache)
    print(f"cold start {cold_s:.1f} s, warm start {warm_s:.2f} s")
    if args.json:
        figures = {
            "requests_per_s": min(row["requests_per_s"] for row in loads),
            "cold_start_s": cold_s,
            "warm_start_s": warm_s,
            "loads": loads,
        }
        args.json.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
