"""How fast, how punctual and how right the session of an autoscaling controller is.

``python -m bench.session [SCENARIO] [--calls N] [--threads N] [--samples N] [--short] [--json P]``

First many threads call one session: most calls repeat a rate that was asked before, one in a
hundred names a new rate or a new mix and carries a deadline; a thread that asked something new then
acts on it for a while. Latencies are the callers' own, waits for one another included. Then new
rates and mixes are asked one at a time without a deadline, and each answer is held against a fresh
``solve``. ``--short`` is a run of a minute.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from planner import Scenario, solve
from planner.session import Session

if TYPE_CHECKING:
    from planner.report import PlanReport

_SCENARIO: Final = "llama-3.1-70b_8xh100"
_RATES: Final = (1.0, 10.0)
"""Requests per second; 0.1 to 0.8 of what the bundled scenario's plan reaches."""
_CHANGED_SHARE: Final = 0.01
"""Part of the calls that name something new."""
_PAUSE_S: Final = 8.0
"""Mean pause of a thread after it asked something new: 8 threads then ask about one new question a
second, 3,600 an hour."""
_MIX_SHARE: Final = 0.3
"""Part of those that change the mix, too."""
_HOT: Final = 16
"""Rates that are asked again and again."""
_DEADLINES_S: Final = (0.1, 0.3, 0.6, 0.9)
_WARM_CALLS: Final = 1000
"""Calls after which memory must not grow any more."""
_SAME: Final = ("status", "plan", "objective", "bound", "gap", "metrics", "metrics_interval")
"""What a session's answer shares with a fresh solve's; ``search`` and ``alternatives`` say what
was looked at on the way."""


@dataclass
class Seen:
    """What the callers measured, seconds."""

    cached_s: list[float] = field(default_factory=list)
    changed_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    proved: int = 0
    invalid: int = 0
    first_bytes: int = 0
    last_bytes: int = 0


class Questions:
    """Rates and mixes to ask about, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.hot = [self.rate() for _ in range(_HOT)]

    def rate(self) -> float:
        """A rate that nobody has asked about."""
        low, high = map(math.log, _RATES)
        return float(f"{math.exp(self._rng.uniform(low, high)):.6g}")

    def new(self) -> dict[str, Any]:
        """A new rate, or a new mix at a new rate."""
        asked: dict[str, Any] = {"rate": self.rate()}
        if self._rng.random() < _MIX_SHARE:
            asked["mix"] = {
                "input_tokens": {
                    "mean": int(self._rng.integers(300, 2000)),
                    "cv": 1.0,
                    "max": 8000,
                },
                "output_tokens": {"mean": int(self._rng.integers(50, 400)), "cv": 0.8, "max": 2000},
            }
        return asked

    def call(self) -> dict[str, Any]:
        """Arguments of the next call."""
        if self._rng.random() >= _CHANGED_SHARE:
            return {"rate": self.hot[int(self._rng.integers(_HOT))]}
        return {**self.new(), "deadline_s": float(self._rng.choice(_DEADLINES_S))}


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def load(session: Session, calls: int, threads: int, seed: int) -> Seen:
    """Call from many threads at once, without a pause."""
    questions, seen = Questions(seed), Seen()
    for rate in questions.hot:
        session.plan(rate=rate)
    asked = [questions.call() for _ in range(calls)]
    pauses_s = np.random.default_rng(seed).exponential(_PAUSE_S, calls)
    numbers, lock = itertools.count(), threading.Lock()

    def caller() -> None:
        while True:
            number = next(numbers)
            if number >= calls:
                return
            arguments = asked[number]
            began_s = time.perf_counter()
            report = session.plan(**arguments)
            took_s = time.perf_counter() - began_s
            with lock:
                note(seen, arguments, report, took_s)
                if number == min(_WARM_CALLS, calls // 2):
                    seen.first_bytes = resident_bytes()
            if "deadline_s" in arguments:
                time.sleep(pauses_s[number])

    workers = [threading.Thread(target=caller) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seen.last_bytes = resident_bytes()
    return seen


def note(seen: Seen, arguments: dict[str, Any], report: PlanReport, took_s: float) -> None:
    """Keep one call's latency, and whether its answer can be used."""
    seen.invalid += report.plan is None
    deadline_s = arguments.get("deadline_s")
    if deadline_s is None:
        seen.cached_s.append(took_s)
        return
    seen.changed_s.append(took_s)
    seen.late_s.append(took_s - deadline_s)
    seen.proved += report.status == "optimal"


def compare(session: Session, samples: int, seed: int) -> tuple[int, list[float], list[float]]:
    """Answers that equal a fresh solve, and seconds of both, one at a time."""
    questions = Questions(seed)
    equal, mine_s, fresh_s = 0, [], []
    for _ in range(samples):
        asked = questions.new()
        began_s = time.perf_counter()
        mine = session.plan(**asked).to_dict()
        mine_s.append(time.perf_counter() - began_s)
        began_s = time.perf_counter()
        fresh = solve(session.scenario(**asked)).to_dict()
        fresh_s.append(time.perf_counter() - began_s)
        equal += all(mine[name] == fresh[name] for name in _SAME)
    return equal, mine_s, fresh_s


def figures(seen: Seen, compared: tuple[int, list[float], list[float]]) -> dict[str, Any]:
    """What was measured, as it is recorded."""
    equal, mine_s, fresh_s = compared
    return {
        "calls": len(seen.cached_s) + len(seen.changed_s),
        "cached_p99_ms": 1000 * _percentile(seen.cached_s, 99),
        "changed_calls": len(seen.changed_s),
        "changed_p50_ms": 1000 * _percentile(seen.changed_s, 50),
        "changed_p99_ms": 1000 * _percentile(seen.changed_s, 99),
        "changed_proved_share": seen.proved / max(1, len(seen.changed_s)),
        "deadline_worst_ms": 1000 * max(seen.late_s, default=0.0),
        "memory_growth_pct": 100 * (seen.last_bytes / max(1, seen.first_bytes) - 1),
        "memory_mib": seen.last_bytes / 2**20,
        "without_plan": seen.invalid,
        "alone_p50_ms": 1000 * _percentile(mine_s, 50),
        "alone_p99_ms": 1000 * _percentile(mine_s, 99),
        "fresh_p50_ms": 1000 * _percentile(fresh_s, 50),
        "samples": len(mine_s),
        "equal_to_fresh": equal,
    }


def _percentile(values: list[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else 0.0


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="bench.session", description=__doc__)
    parser.add_argument("scenario", nargs="?", default=_SCENARIO)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="2,000 calls and 5 samples")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    calls, samples = (2000, 5) if args.short else (args.calls, args.samples)
    with Session(Scenario.load(args.scenario)) as session:
        seen = load(session, calls, args.threads, args.seed)
        found = figures(seen, compare(session, samples, args.seed + 1))
    for name, value in found.items():
        print(f"{name:<22} {value:>12,.6g}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
