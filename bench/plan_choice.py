"""How often the planner picks the plan that measured best.

``python -m bench.plan_choice CASES.csv --runs RUNS.csv [--json PATH]``

Each group of the cases file holds plans measured on the same model, hardware, engine and load.
From the runs only plans, loads and settings are read (``bench.choice_groups``); every run is
simulated (``bench.choice_predict``), a plan is chosen by the predictions (``bench.choice_rules``),
and only then are measured values read (``bench.choice_score``). Host constants are those of a fit
that has not seen the cluster, unless ``--constants`` says otherwise, as in ``bench.points``.

In the JSON ``within_3pct`` is a fraction of groups, ``share`` the chosen plan's measured value over
the best one's, and ``rules`` hold expected values.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench import choice_score
from bench.choice_groups import SERVER_LIMITS, RunIndex, read_groups, read_runs
from bench.choice_predict import SimulatedRuns, kind_of_model, predict_all
from bench.choice_rules import Choice, choose
from bench.points import CONSTANTS
from bench.predictions import WORKERS
from planner.errors import PlannerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.choice_predict import Predictor

_DIGITS: Final = 6
"""Decimals of figures in the JSON."""


@dataclass(frozen=True)
class Answers:
    """What was chosen, with no measured value read yet.

    Parameters
    ----------
    groups
        One choice per group, by group id.
    same_gpus
        One per set of plans with equal GPU counts inside a group.
    index
        The runs.
    """

    groups: list[Choice]
    same_gpus: list[Choice]
    index: RunIndex


def choose_all(cases: Path, runs: Path, predictor: Predictor, *, workers: int = 1) -> Answers:
    """Choose a plan for every group; no measured value is read.

    Parameters
    ----------
    cases, runs
        The two files.
    predictor
        What predicts a run.
    workers
        Processes to predict in.

    Raises
    ------
    InputError
        If a file is damaged.
    """
    groups = read_groups(cases)
    index = RunIndex(read_runs(runs))
    joined = [run for g in groups for c in g.candidates for run in index.runs_of(g, c)]
    predictions = predict_all(predictor, joined, workers=workers)
    return Answers(
        [choose(group, index, predictions) for group in groups],
        [choose(part, index, predictions) for group in groups for part in group.same_gpus()],
        index,
    )


def labels_of(index: RunIndex) -> dict[str, Callable[[Choice], str]]:
    """What slices are cut by."""

    def has_defaults(choice: Choice) -> str:
        group = choice.group
        runs = (run for c in group.candidates for run in index.runs_of(group, c))
        return "yes" if any(not r.settings[n] for r in runs for n in SERVER_LIMITS) else "no"

    return {
        "group_type": lambda c: c.group.group_type,
        "source": lambda c: c.group.sources,
        "engine": lambda c: c.group.engine,
        "engine_version": lambda c: c.group.engine_version or "not stated",
        "model": lambda c: c.group.model,
        "hardware": lambda c: c.group.hardware,
        "cluster": lambda c: c.group.cluster,
        "kind": lambda c: kind_of_model(c.group.model),
        "mixed_date": lambda c: "yes" if c.group.mixed_date else "no",
        "limits_by_default": has_defaults,
    }


def report(answers: Answers, cases: Path) -> dict[str, Any]:
    """Score choices against the values in the cases file: the figures of the contract."""
    values = choice_score.read_values(cases)
    scored = [choice_score.score_group(choice, values) for choice in answers.groups]
    same = [choice_score.score_same_gpus(choice, values) for choice in answers.same_gpus]
    return {
        **choice_score.figures(scored),
        "uncovered": choice_score.uncovered(scored),
        "slices": choice_score.slices(scored, labels_of(answers.index)),
        "same_gpus": choice_score.same_gpus_figures(same),
        "choices": choice_score.choices(scored),
    }


def table(figures: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [
        f"{'':<62} {'groups':>6} {'cover':>5} {'in 3 %':>6} {'share':>6} {'p5':>6} {'fewest':>6}"
    ]
    rows = {"all groups": figures, **figures["slices"]}
    lines += [_line(name, row) for name, row in rows.items()]
    covered, weighted = figures["covered_only"], figures["cluster_weighted"]
    lines.append(
        f"covered groups alone: {100 * covered['within_3pct']:.0f} % within 3 %, "
        f"share {covered['mean_share']:.3f}"
    )
    lines.append(f"within 3 % if other clusters had been measured: {_interval(figures)} (90 %)")
    lines.append(
        f"mean over {weighted['clusters']} clusters: {100 * weighted['within_3pct']:.0f} % within "
        f"3 %, share {weighted['mean_share']:.3f}"
    )
    for name, rule in figures["rules"].items():
        within, share = 100 * rule["within_3pct"], rule["mean_share"]
        lines.append(f"rule {name}: {within:.0f} % within 3 %, share {share:.3f}")
    same = figures["same_gpus"]
    for name, part in (("same GPUs", same), ("same GPUs, one date", same["one_date"])):
        rules = ", ".join(f"{rule} {100 * w:.0f} %" for rule, w in part["rules"].items())
        lines.append(
            f"{name}: {part['n']} sets, {part['covered']} covered, "
            f"{100 * part['within_3pct']:.0f} % within 3 % "
            f"(over clusters {_interval(part)}; {rules})"
        )
    lines += [f"uncovered {each['n']}: {each['reason']}" for each in figures["uncovered"]]
    return "\n".join(lines)


def rounded(value: Any) -> Any:
    """Numbers of a nested answer at a fixed number of decimals, so that it is the same anywhere."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, _DIGITS) if isinstance(value, float) else value


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="bench.plan_choice", description=__doc__)
    parser.add_argument("cases", type=Path, help="groups of plans with measured values")
    parser.add_argument("--runs", type=Path, required=True, help="runs; metrics are not read")
    parser.add_argument("--constants", choices=CONSTANTS, default=CONSTANTS[0])
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    predictor = SimulatedRuns(args.constants)
    try:
        answers = choose_all(args.cases, args.runs, predictor, workers=args.workers)
        figures = report(answers, args.cases)
    except PlannerError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(table(figures))
    if args.json:
        text = json.dumps(rounded(figures), indent=2, sort_keys=True) + "\n"
        args.json.write_text(text, encoding="utf-8")


def _interval(figures: dict[str, Any]) -> str:
    interval = figures["within_3pct_interval"]
    return f"{100 * interval['low']:.0f} to {100 * interval['high']:.0f} %"


def _line(name: str, row: dict[str, Any]) -> str:
    shown = name if len(name) <= 62 else f"{name[:59]}..."
    fewest = 100 * row["rules"]["fewest_gpus"]["within_3pct"] if row["rules"] else 0.0
    return (
        f"{shown:<62} {row['groups']:>6} {row['covered']:>5} {100 * row['within_3pct']:>5.0f}% "
        f"{row['mean_share']:>6.3f} {row['p5_share']:>6.3f} {fewest:>5.0f}%"
    )


if __name__ == "__main__":
    main()
