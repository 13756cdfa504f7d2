"""The record of benchmark figures, and the comparison with it.

``python -m bench.figures record NAME OUT.json`` writes the figures of one benchmark's ``--json``
output into ``bench/figures.json``; ``python -m bench.figures check NAME OUT.json`` prints how they
differ from the record and fails where one has fallen beyond its tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

RECORD: Final = Path(__file__).parent / "figures.json"


class Rule(NamedTuple):
    """Which way a figure is better (+1 larger, -1 smaller) and how far it may fall.

    ``tolerance`` is absolute, in the figure's unit; ``None`` only prints (figures of time depend
    on the machine).
    """

    better: int
    tolerance: float | None


RULES: Final = {
    "mean_abs_pct": Rule(-1, 0.2),
    "median_abs_pct": Rule(-1, 0.2),
    "right": Rule(1, 0.0),
    "simulated_fraction": Rule(-1, 0.005),
    "proved": Rule(1, 0.0),
    "same_as_exhaustive": Rule(1, 0.0),
    "requests_per_s": Rule(1, None),
    "iterations_per_s": Rule(1, None),
    "cold_start_s": Rule(-1, None),
    "warm_start_s": Rule(-1, None),
    "seconds": Rule(-1, None),
    "load_ms": Rule(-1, None),
    "compile_ms": Rule(-1, None),
    "p90_abs_pct": Rule(-1, 1.0),
    "max_abs_pct": Rule(-1, 1.0),
    "covered": Rule(1, 0.0),
    "within_3pct": Rule(1, 0.01),
    "mean_share": Rule(1, 0.005),
    "p5_share": Rule(1, 0.02),
    "plain_requests_per_s": Rule(1, None),
    "jump_over_plain": Rule(1, None),
    "million_s": Rule(-1, None),
    "million_peak_gib": Rule(-1, None),
}
"""By the last part of a figure's path; figures without a rule are not recorded."""

_SKIPPED: Final = ("slices", "unscorable", "choices", "uncovered")


def flatten(data: Any, path: str = "") -> dict[str, float]:
    """Figures that have a rule, by dotted path; list entries go by their ``scenario`` or load."""
    if isinstance(data, dict):
        out: dict[str, float] = {}
        for key, value in data.items():
            if key not in _SKIPPED:
                out.update(flatten(value, f"{path}.{key}" if path else str(key)))
        return out
    if isinstance(data, list):
        out = {}
        for index, value in enumerate(data):
            name = (
                value.get("scenario", value.get("load", index))
                if isinstance(value, dict)
                else index
            )
            out.update(flatten(value, f"{path}[{name}]"))
        return out
    known = path.rsplit(".", 1)[-1] in RULES and isinstance(data, (int, float))
    return {path: float(f"{float(data):.6g}")} if known else {}


def falls(old: dict[str, float], new: dict[str, float]) -> list[str]:
    """Print every difference; return the figures that fell beyond their tolerance."""
    fallen = []
    for path in sorted(old.keys() & new.keys()):
        rule = RULES[path.rsplit(".", 1)[-1]]
        change = new[path] - old[path]
        if change:
            print(f"{path}: {old[path]:g} -> {new[path]:g}")
        if rule.tolerance is not None and -rule.better * change > rule.tolerance:
            fallen.append(path)
    return fallen


def main() -> None:
    """Record or check."""
    parser = argparse.ArgumentParser(prog="bench.figures", description=__doc__)
    parser.add_argument("action", choices=["record", "check"])
    parser.add_argument("name")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    new = flatten(json.loads(args.output.read_text(encoding="utf-8")))
    if args.action == "record":
        record[args.name] = new
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return
    fallen = falls(record.get(args.name, {}), new)
    if fallen:
        sys.exit(f"{args.name}: fell beyond tolerance: {', '.join(fallen)}")
    print(f"{args.name}: {len(new)} figures, none fell")


if __name__ == "__main__":
    main()
