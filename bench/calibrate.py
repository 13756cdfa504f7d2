"""Whether calibrating on the runs of one plan predicts the others.

``python -m bench.calibrate RUNS.csv [--where model=M,engine=E] [--serving DIR] [--json PATH]``

Each dense cluster with several tps is calibrated on the runs of one tp (`planner.calibrate`, as
``planner calibrate`` does) and tested on its other tps. The constants before are those of a fit
that has not seen the cluster (`bench.held_out`). The same runs with their measured values shuffled
must be refused.

``--serving`` does the same on served runs: calibrated on all runs but those of one rate (or card),
tested on these; before are the constants of the engine version nearest in the profiles that was
fitted elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench.fit_host import clusters_of
from bench.held_out import constants_for, stored_fits
from bench.predictions import predict_all
from bench.runs_csv import parse_where, read_rows
from bench.serving_files import read_folder
from bench.serving_predict import Folders, prepare
from bench.uncovered import UncoveredError
from planner.calibrate import LEAST_RUNS, NOISE, TERMS, Runs
from planner.errors import RefusalError
from planner.io.engines import load_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from bench.predictions import Prediction
    from bench.runs_csv import Case
    from bench.serving_predict import Prepared
    from simulator.engine_rules import HostConstants

    Floats = npt.NDArray[np.float64]
    Predict = Callable[[HostConstants], Floats]

_COLUMNS: Final = {"tpot": "tpot_ms", "ttft": "ttft_ms"}
_NOISE: Final = np.array([NOISE["mean_tpot_ms"], NOISE["mean_ttft_ms"]])
_LEAST: Final = 9
"""Runs of one tp that a calibration is tried on."""
_MOST: Final = 15
"""Runs of it used, spread evenly from first to last: what a patient user measures of one plan."""
_SHUFFLES: Final = 2
_FITTED_ELSEWHERE: Final = "0.10.2"
"""vLLM version whose constants come from no served run."""


def log_table(cases: Sequence[Case], workers: int) -> Predict:
    """(N, 2) logarithms of predicted TPOT and TTFT under given constants, remembered."""

    def value(one: Prediction, column: str) -> float:
        return np.nan if isinstance(one, str) else float(np.log(one.get(column, np.nan)))

    known: dict[HostConstants, Floats] = {}

    def predict(host: HostConstants) -> Floats:
        if host not in known:
            found = predict_all([(case, host) for case in cases], workers=workers)
            known[host] = np.array(
                [
                    [
                        np.log(one[column])
                        if not isinstance(one, str) and column in one
                        else np.nan
                        for column in _COLUMNS.values()
                    ]
                    for one in found
                ]
            )
        return known[host]

    return predict


def measured_logs(cases: Sequence[Case]) -> Floats:
    """(N, 2) logarithms of what was measured; NaN: it was not."""
    return np.array(
        [
            [np.log(float(case.row[c])) if case.row.get(c) else np.nan for c in _COLUMNS.values()]
            for case in cases
        ]
    )


def mean_errors(errors: Floats) -> dict[str, dict[str, float]]:
    """Mean and median absolute error by metric, percent, of (N, 2) logarithms."""
    out = {}
    for name, column in zip(_COLUMNS, errors.T, strict=True):
        size = 100 * np.abs(np.expm1(column[~np.isnan(column)]))
        if len(size):
            out[name] = {
                "n": len(size),
                "mean_abs_pct": round(float(size.mean()), 2),
                "median_abs_pct": round(float(np.median(size)), 2),
            }
    return out


def judge_cluster(cases: list[Case], workers: int) -> list[dict[str, Any]]:
    """One entry for each tp that a cluster is calibrated on."""
    names = cases[0].names
    before = constants_for(
        cases[0].cluster, names.release, stored_fits(), is_moe=names.checkpoint.is_moe
    ).host()
    lines = []
    for tp in sorted({case.row["tp"] for case in cases}, key=int):
        mine = [case for case in cases if case.row["tp"] == tp]
        others = [case for case in cases if case.row["tp"] != tp]
        if len(mine) < _LEAST or not others:
            continue
        chosen = np.linspace(0, len(mine) - 1, min(len(mine), _MOST)).round().astype(int)
        mine = [mine[i] for i in chosen]
        predict, measured = log_table(mine, workers), measured_logs(mine)
        runs = Runs(predict, measured, _NOISE, before)
        fitted = runs.fit()
        judged = runs.judge(fitted)
        refused = ""
        try:
            runs.check(fitted, judged)
        except RefusalError as error:
            refused = str(error)
        used = before if refused else fitted.host
        test, expected = log_table(others, workers), measured_logs(others)
        lines.append(
            {
                "cluster": cases[0].cluster.label,
                "tp": tp,
                "runs": len(mine),
                "refused": refused,
                "constants": {
                    term.name: float(f"{value:.4g}")
                    for term, value in zip(TERMS, fitted.values, strict=True)
                },
                "spread_left": [round(float(left), 3) for left in fitted.spread],
                "own_after": mean_errors(predict(used) - measured),
                "others_before": mean_errors(test(before) - expected),
                "others_after": mean_errors(test(used) - expected),
                "shuffled_refused": _shuffled(predict, measured, before),
            }
        )
        _print_line(lines[-1])
    return lines


def _shuffled(predict: Predict, measured: Floats, before: HostConstants) -> str:
    """How many of a few shufflings of the measured values are refused."""
    refused = 0
    for seed in range(_SHUFFLES):
        crossed = measured[np.random.default_rng(seed).permutation(len(measured))]
        runs = Runs(predict, crossed, _NOISE, before)
        fitted = runs.fit()
        try:
            runs.check(fitted, runs.judge(fitted))
        except RefusalError:
            refused += 1
    return f"{refused}/{_SHUFFLES}"


def judge_serving(folder: Path, folders: Folders) -> list[dict[str, Any]]:
    """Served runs: calibrated on all but one rate or card of a cluster, tested on that one."""
    clusters: dict[str, list[Prepared]] = {}
    for run in read_folder(folder).runs:
        try:
            prepared = prepare(run, folders)
        except UncoveredError:
            continue
        if "tpot" in run.measured_s:
            clusters.setdefault(prepared.cluster, []).append(prepared)
    lines = []
    for label, runs in clusters.items():
        by = "rate" if len({run.run.rate for run in runs}) > 1 else "name"
        for value in sorted({getattr(run.run, by) for run in runs}):
            seen = [run for run in runs if getattr(run.run, by) != value]
            unseen = [run for run in runs if getattr(run.run, by) == value]
            if not seen:
                continue
            before = load_engine("vllm", _FITTED_ELSEWHERE).host
            runs_seen = Runs(_served(seen), _served_logs(seen), _NOISE, before)
            fitted = runs_seen.fit()
            refused = f"{len(seen)} runs are too few" if len(seen) < LEAST_RUNS else ""
            try:
                if not refused:
                    runs_seen.check(fitted, runs_seen.judge(fitted))
            except RefusalError as error:
                refused = str(error)
            used = before if refused else fitted.host
            test, measured = _served(unseen), _served_logs(unseen)
            lines.append(
                {
                    "cluster": label,
                    "tested_on": value,
                    "runs": len(seen),
                    "refused": refused,
                    "if_not_refused": mean_errors(test(fitted.host) - measured),
                    "others_before": mean_errors(test(before) - measured),
                    "others_after": mean_errors(test(used) - measured),
                }
            )
            errors = [_text(lines[-1][f"others_{when}"]) for when in ("before", "after")]
            said = f"; refused: {refused}" if refused else ""
            print(
                f"{label}: tested on {value} ({len(unseen)} runs): "
                f"{errors[0]} before, {errors[1]} after{said}",
                flush=True,
            )
    return lines


def _served(runs: Sequence[Prepared]) -> Predict:
    def predict(host: HostConstants) -> Floats:
        return np.log([[run.predict_s(host).get(n, np.nan) for n in _COLUMNS] for run in runs])

    return predict


def _served_logs(runs: Sequence[Prepared]) -> Floats:
    return np.log([[run.run.measured_s.get(name, np.nan) for name in _COLUMNS] for run in runs])


def _print_line(line: dict[str, Any]) -> None:
    print(
        f"{line['cluster']} calibrated on tp{line['tp']} ({line['runs']} runs): "
        f"others {_text(line['others_before'])} before, {_text(line['others_after'])} after; "
        f"shuffled refused {line['shuffled_refused']}"
        + (f"; refused: {line['refused']}" if line["refused"] else f"; {line['constants']}"),
        flush=True,
    )


def _text(by_metric: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{name} {one['mean_abs_pct']:.1f} %" for name, one in by_metric.items())


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="bench.calibrate", description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--where", default="", help="column=value,...")
    parser.add_argument("--serving", type=Path, help="folder of served runs")
    parser.add_argument("--profiles", type=Path, help="layer tables of cards, for --serving")
    parser.add_argument("--traces", type=Path, help="block hashes, for --serving")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes; new ones load compiled code anew"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.runs.exists():
        sys.exit(f"{args.runs}: no such file; nothing measured to calibrate on")
    lines = []
    for cases in clusters_of(read_rows(args.runs, parse_where(args.where))).values():
        both = [case for case in cases if case.row.get("tpot_ms") and case.row.get("ttft_ms")]
        several = len({case.row["tp"] for case in both}) > 1
        if several and not both[0].names.checkpoint.is_moe:
            lines += judge_cluster(both, args.workers)
    served = (
        judge_serving(args.serving, Folders(args.profiles, args.traces)) if args.serving else []
    )
    if args.json:
        out = {"clusters": lines, "served": served}
        args.json.write_text(json.dumps(out, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
