"""How much of an exhaustive simulation the search needs, and whether both agree.

``python -m bench.search [SCENARIO] [--rates R,R,...] [--objectives O,O,...] [--json PATH]``

For each rate and objective the scenario is solved and then every plan is simulated. Effort counts
simulated iterations; plans with identical trajectories count once on the exhaustive side.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, Final

from planner import Scenario, solve

_SCENARIO: Final = "llama-3.1-70b_8xh100"
_RATES: Final = (4.0, 9.0, 15.0)
"""About 0.3, 0.7 and 1.2 of 12.7 requests per second, what the bundled scenario's chosen plan
reaches when all requests are sent at once."""
_OBJECTIVES: Final = ("mean_e2e", "p99_ttft", "p99_tpot", "throughput", "devices")
_LIMIT_S: Final = 600.0


def variant(base: Scenario, rate: float, objective: str) -> Scenario:
    """The scenario at another rate and for another objective."""
    data = base.model_dump(mode="json", exclude_none=True)
    data["workload"]["request_rate"] = rate
    sense = "maximize" if objective == "throughput" else "minimize"
    data["objective"] = {sense: objective}
    data.setdefault("search", {})["time_limit_s"] = _LIMIT_S
    return Scenario.model_validate(data, base_dir=base.base_dir, source=base.source)


def measure(scenario: Scenario, label: str) -> dict[str, Any]:
    """One row of the table."""
    began = time.perf_counter()
    solve(scenario)
    seconds = time.perf_counter() - began
    report = solve(scenario, exhaustive=True)
    every = report.search.exhaustive or {}
    return {
        "scenario": label,
        "plan": report.plan.id if report.plan else None,
        "space": report.search.feasible,
        "simulated": report.search.simulated + report.search.aborted,
        "simulated_fraction": every["search_share"],
        "seconds": seconds,
        "proved": report.status == "optimal",
        "same_as_exhaustive": bool(every["agrees"]),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="bench.search", description=__doc__)
    parser.add_argument("scenario", nargs="?", default=_SCENARIO)
    parser.add_argument("--rates", default=",".join(map(str, _RATES)))
    parser.add_argument("--objectives", default=",".join(_OBJECTIVES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    base = Scenario.load(args.scenario)
    rows = []
    print(
        f"{'rate':>6} {'objective':>10} {'plan':<28} {'plans':>5} {'run':>4} "
        f"{'iterations':>10} {'seconds':>8} proved agrees"
    )
    for rate in map(float, args.rates.split(",")):
        for objective in args.objectives.split(","):
            row = measure(variant(base, rate, objective), f"{args.scenario}@{rate:g}:{objective}")
            rows.append(row)
            print(
                f"{rate:>6g} {objective:>10} {row['plan']!s:<28} {row['space']:>5} "
                f"{row['simulated']:>4} {100 * row['simulated_fraction']:>8.1f} % "
                f"{row['seconds']:>8.2f} {row['proved']!s:>6} {row['same_as_exhaustive']!s:>6}"
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
