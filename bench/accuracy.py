"""Writes ``docs/accuracy.md`` from what the other benchmarks wrote.

``python -m bench.accuracy [--points P.json] [--choice C.json] [--intervals I.json]
[--calibrate K.json ...] [--serving S.json] -o docs/accuracy.md``

Each file is the ``--json`` output of the benchmark of that name; a part whose file is not given is
left out, and the page says so. The page names every slice that misses what is asked of it: nothing
is picked by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

TARGETS: Final = {"tpot": (10.0, 6.0), "ttft": (18.0, 12.0), "output_throughput": (10.0, None)}
"""Mean and median error asked for, percent."""
_SLICE: Final = 30
"""Rows that a slice needs to be held to twice the target."""
_NAMES: Final = {"tpot": "TPOT", "ttft": "TTFT", "output_throughput": "output tokens/s"}
_CALIBRATED: Final = {"tpot": 5.0, "ttft": 15.0}
"""Mean error asked for on other tps after calibration on one, percent."""


def points_part(data: dict[str, Any]) -> list[str]:
    """How near single predictions are."""
    rows = data["rows"]
    lines = [
        "## Single predictions",
        "",
        "`python -m bench.points RUNS.csv`: every measured run is simulated as its client loaded "
        "it, with host constants of a fit that has not seen its cluster (model, device, engine, "
        f"version). {rows['covered']} runs are covered, {rows['uncovered']} are not (the reasons "
        "are at the end).",
        "",
        "| metric | n | mean % | median % | p90 % | bias % | asked: mean, median | over clusters, "
        "mean % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (mean, median) in TARGETS.items():
        one = data[name]
        if not one["n"]:
            continue
        asked = f"{mean:g}" + (f", {median:g}" if median else "")
        over = data["cluster_weighted"][name]["mean_abs_pct"]
        cells = " | ".join(
            f"{one[key]:.1f}" for key in ("mean_abs_pct", "median_abs_pct", "p90_abs_pct")
        )
        lines.append(
            f"| {_NAMES[name]} | {one['n']} | {cells} | {one['bias_pct']:+.1f} | {asked} | "
            f"{over:.1f} |"
        )
    lines += ["", "By cluster, mean error in percent (number of runs):", ""]
    lines += ["| cluster | " + " | ".join(_NAMES.values()) + " |", "|---|---|---|---|"]
    for label, one in data["slices"].items():
        if label.startswith("cluster="):
            cells = " | ".join(
                f"{one[n]['mean_abs_pct']:.1f} ({one[n]['n']})" if n in one else "" for n in _NAMES
            )
            lines.append(f"| {label.partition('=')[2].replace('|', ', ')} | {cells} |")
    worst = [
        (label, _NAMES[name], one[name]["mean_abs_pct"], one[name]["n"])
        for label, one in data["slices"].items()
        for name, (mean, _) in TARGETS.items()
        if name in one and one[name]["n"] >= _SLICE and one[name]["mean_abs_pct"] > 2 * mean
    ]
    lines += ["", f"Slices of {_SLICE} runs or more beyond twice what is asked:", ""]
    lines += [
        f"- {label.replace('|', ', ')}: {name} {error:.0f} % ({n} runs)"
        for label, name, error, n in sorted(worst, key=lambda entry: -entry[2])
    ] or ["- none"]
    return [*lines, ""]


def choice_part(data: dict[str, Any]) -> list[str]:
    """How good choices are, against naive rules."""
    rules = {"planner": data, **data["rules"]}
    lines = [
        "## Choices of a plan",
        "",
        "`python -m bench.plan_choice CASES.csv --runs RUNS.csv`: groups of plans that were "
        f"measured under one load; {data['covered']} of {data['groups']} groups are covered, the "
        "others count as wrong. The share is the chosen plan's measured value over the best one's.",
        "",
        "| rule | within 3 % of the best | mean share | 5th percentile |",
        "|---|---|---|---|",
    ]
    for name, one in rules.items():
        lines.append(
            f"| {name.replace('_', ' ')} | {100 * one['within_3pct']:.0f} % | "
            f"{one['mean_share']:.3f} | {one['p5_share']:.3f} |"
        )
    covered = data.get("covered_only")
    if covered:
        lines.append(
            f"| planner, covered groups only | {100 * covered['within_3pct']:.0f} % | "
            f"{covered['mean_share']:.3f} | {covered['p5_share']:.3f} |"
        )
    return [*lines, ""]


def intervals_part(data: dict[str, Any]) -> list[str]:
    """Whether stated uncertainty is true."""
    lines = [
        "## Stated uncertainty",
        "",
        "`python -m bench.intervals RUNS.csv`: 90 % intervals learnt with each cluster left out.",
        "",
        "| metric | n | inside % (asked: 86 to 94) | mean over clusters | median full width % | "
        "width over median error (asked: at most 6) |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in data["intervals"].items():
        lines.append(
            f"| {_NAMES[name]} | {one['n']} | {one['covered_pct']:.1f} | "
            f"{one['covered_mean_over_clusters_pct']:.1f} | {one['median_full_width_pct']:.0f} | "
            f"{one['width_over_median_error']:.1f} |"
        )
    lines += [
        "",
        "Small clusters are covered less often than large ones: where a model, device and engine "
        "version are unlike any that were measured, expect more than one prediction in ten outside "
        "its interval.",
        "",
        '"Cannot be told apart" (asked: right in 80 %):',
        "",
        "| metric | pairs of plans | said | right % |",
        "|---|---|---|---|",
    ]
    for name, one in data["between_plans"].items():
        right = f"{one['right_pct']:.0f}" if "right_pct" in one else ""
        lines.append(f"| {_NAMES[name]} | {one['pairs']} | {one['said']} | {right} |")
    return [*lines, ""]


def calibrate_part(files: list[dict[str, Any]]) -> list[str]:
    """What calibrating on one plan buys for the others."""
    lines = [
        "## Calibrated on one plan",
        "",
        "`python -m bench.calibrate RUNS.csv`: at most 15 runs of one tp calibrate, the other tps "
        f"are predicted (asked: mean TPOT error under {_CALIBRATED['tpot']:g} %, TTFT under "
        f"{_CALIBRATED['ttft']:g} %). In bold what misses it.",
        "",
        "| cluster | calibrated on | TPOT before | after | TTFT before | after "
        "| shuffled refused |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in (line for data in files for line in data["clusters"]):
        cells = []
        for name, most in _CALIBRATED.items():
            before, after = (line[f"others_{when}"].get(name) for when in ("before", "after"))
            if not before or not after:
                cells += ["", ""]
                continue
            text = f"{after['mean_abs_pct']:.1f}"
            cells += [
                f"{before['mean_abs_pct']:.1f}",
                text if after["mean_abs_pct"] < most else f"**{text}**",
            ]
        refused = " (refused: stays as it was)" if line["refused"] else ""
        lines.append(
            f"| {line['cluster'].replace('|', ', ')} | tp{line['tp']}{refused} | "
            f"{' | '.join(cells)} | {line['shuffled_refused']} |"
        )
    served = [line for data in files for line in data["served"]]
    if served:
        lines += [
            "",
            "Served runs, tested on what the calibration did not see; mean error in percent:",
            "",
            "| cluster | tested on | TPOT before | after | TTFT before | after |",
            "|---|---|---|---|---|---|",
        ]
    for line in served:
        cells = [
            f"{line[f'others_{when}'][name]['mean_abs_pct']:.1f}"
            for name in _CALIBRATED
            for when in ("before", "after")
        ]
        said = f" ({line['refused']}: stays as it was)" if line["refused"] else ""
        lines.append(f"| {line['cluster']} | {line['tested_on']}{said} | {' | '.join(cells)} |")
    return [*lines, ""]


def serving_part(data: dict[str, Any]) -> list[str]:
    """Open-loop servers with their real requests."""
    lines = [
        "## Served traffic",
        "",
        "`python -m bench.serving_runs DIR`: servers under open-loop traffic, requests as served, "
        "constants fitted on the other rates of the same cluster (or all its runs where it has one "
        "rate).",
        "",
        "| metric | runs | mean % | worst % |",
        "|---|---|---|---|",
    ]
    for name in ("ttft", "tpot", "e2e", "makespan"):
        if name in data:
            one = data[name]
            lines.append(
                f"| {name.upper() if name != 'makespan' else name} | {one['n']} | "
                f"{one['mean_abs_pct']:.1f} | {one['max_abs_pct']:.1f} |"
            )
    skipped = [entry for entry in data["runs"] if "skipped" in entry]
    if skipped:
        lines += ["", f"{len(skipped)} runs are not simulated:", ""]
        lines += sorted({f"- {entry['skipped']}" for entry in skipped})
    return [*lines, ""]


def uncovered_part(data: dict[str, Any]) -> list[str]:
    """What is not predicted at all."""
    reasons: dict[str, int] = {}
    for entry in data["uncovered"]:
        reasons[entry["reason"]] = reasons.get(entry["reason"], 0) + 1
    lines = ["## Not covered", "", "| runs | reason |", "|---|---|"]
    lines += [f"| {n} | {reason} |" for reason, n in sorted(reasons.items(), key=lambda e: -e[1])]
    return [*lines, ""]


_INTRODUCTION: Final = """\
# Accuracy

Written by `python -m bench.accuracy` from the figures of the benchmarks; do not edit. The measured
runs are public ones of the development half: the structure of the simulator was chosen while
looking at them, only constants were held out, so expect somewhat worse elsewhere. For scale: the
best public tool covers 55 % of such runs, with a mean TPOT error of 28 % (median 17 %) and TTFT of
54 % (48 %), and is within 3 % of the measured best plan in 71 % of groups like these.
"""


def _load(path: Path | None) -> dict[str, Any]:
    """Figures of a file; empty where none is given."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path else {}
    return data


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="bench.accuracy", description=__doc__)
    for name in ("points", "choice", "intervals", "serving"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--calibrate", type=Path, nargs="*", default=[])
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    points, choice = _load(args.points), _load(args.choice)
    calibrated = [_load(path) for path in args.calibrate]
    intervals, serving = _load(args.intervals), _load(args.serving)
    parts = {
        "bench.plan_choice": choice and choice_part(choice),
        "bench.points": points and points_part(points),
        "bench.calibrate": calibrated and calibrate_part(calibrated),
        "bench.serving_runs": serving and serving_part(serving),
        "bench.intervals": intervals and intervals_part(intervals),
    }
    lines = [_INTRODUCTION]
    for part in parts.values():
        lines += part or []
    if points:
        lines += uncovered_part(points)
    missing = sorted(name for name, part in parts.items() if not part)
    if missing:
        lines.append(f"Left out here, for want of its figures: {', '.join(missing)}.\n")
    args.output.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
