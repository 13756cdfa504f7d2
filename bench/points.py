"""How near simulated runs are to measured ones.

``python -m bench.points RUNS.csv [--where model=M,engine=E] [--json PATH]``

Every row is simulated as its client loaded it and under the settings that it states; what it
leaves open takes the engine version's default. Host constants are those that `bench.held_out` gives
a cluster that it has not seen; ``--constants engine`` takes the engine version's own and
``--constants none`` kernel tables alone. The JSON's top level is what is printed, with every row
that is not covered and why.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.held_out import constants_for, stored_fits
from bench.predictions import WORKERS, predict_all
from bench.runs_csv import Case, Row, UncoveredError, case_of, is_scored, parse_where, read_rows
from bench.scoring import COLUMNS, score, tp_orders

if TYPE_CHECKING:
    from simulator.engine_rules import HostConstants

CONSTANTS: Final = ("held-out", "engine", "none")
"""Where host constants come from."""


def cases_of(
    rows: list[Row], *, kv_cache_dtype: str | None = None, calibration: str | None = None
) -> tuple[list[Case], list[tuple[Row, str]]]:
    """Rows that a scenario reproduces, in order, and the others with the reason."""
    made = [(row, _case_or_reason(row, kv_cache_dtype, calibration)) for row in rows]
    cases = [case for _, case in made if isinstance(case, Case)]
    return cases, [(row, reason) for row, reason in made if isinstance(reason, str)]


def _case_or_reason(row: Row, kv_cache_dtype: str | None, calibration: str | None) -> Case | str:
    try:
        return case_of(row, kv_cache_dtype=kv_cache_dtype, calibration=calibration)
    except UncoveredError as error:
        return str(error)


def host_of(case: Case, constants: str) -> HostConstants | None:
    """Host constants of a case; ``None``: those of its scenario."""
    if constants != "held-out":
        return None
    names = case.names
    is_moe = names.checkpoint.is_moe
    return constants_for(case.cluster, names.release, stored_fits(), is_moe=is_moe).host()


def figures_of(
    rows: list[Row], constants: str, *, kv_cache_dtype: str | None = None, workers: int = WORKERS
) -> dict[str, Any]:
    """Everything that the JSON holds, from rows that are to be scored."""
    calibration = "none" if constants == "none" else None
    cases, uncovered = cases_of(rows, kv_cache_dtype=kv_cache_dtype, calibration=calibration)
    jobs = [(case, host_of(case, constants)) for case in cases]
    predictions = predict_all(jobs, workers=workers)
    figures = score(cases, predictions)
    uncovered += [
        (case.row, predicted)
        for case, predicted in zip(cases, predictions, strict=True)
        if isinstance(predicted, str)
    ]
    figures["tp_order"] = tp_orders(cases, predictions)
    figures["constants"] = constants
    figures["rows"] = {"covered": len(rows) - len(uncovered), "uncovered": len(uncovered)}
    figures["uncovered"] = [
        {
            "run_id": row["run_id"],
            "cluster": "|".join(row[c] for c in ("model", "hardware", "engine", "engine_version")),
            "reason": reason,
        }
        for row, reason in uncovered
    ]
    figures["stand_ins"] = sorted(
        {case.names.release.note for case in cases if case.names.release.note}
    )
    figures["predictions"] = [
        {"run_id": case.row["run_id"], **_rounded(predicted)}
        for case, predicted in zip(cases, predictions, strict=True)
        if not isinstance(predicted, str)
    ]
    return figures


def _rounded(predicted: dict[str, float]) -> dict[str, float]:
    return {column: float(f"{value:.6g}") for column, value in predicted.items()}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="bench.points", description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--where", default="", help="column=value,...")
    parser.add_argument("--constants", choices=CONSTANTS, default=CONSTANTS[0])
    parser.add_argument(
        "--held-out",
        dest="constants",
        action="store_const",
        const="held-out",
        help="constants that did not see the cluster (the default)",
    )
    parser.add_argument("--kv", choices=["bf16", "fp8"], help="KV dtype in place of every row's")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.runs.exists():
        sys.exit(f"{args.runs}: no such file; nothing measured to compare with")
    every = read_rows(args.runs, parse_where(args.where))
    rows = [row for row in every if is_scored(row)]
    unscorable = Counter(
        "duplicate of another run"
        if row.get("scorable") != "no"
        else row.get("scorable_reason") or "unstated"
        for row in every
        if not is_scored(row)
    )
    print(f"{len(rows)} rows to score; left out by their own columns: {unscorable.total()}")
    figures = figures_of(rows, args.constants, kv_cache_dtype=args.kv, workers=args.workers)
    figures["rows"] |= {"read": len(every), "left_out": unscorable.total()}
    figures["unscorable"] = [
        {"reason": reason, "n": n}
        for reason, n in sorted(
            (unscorable + Counter(entry["reason"] for entry in figures["uncovered"])).items()
        )
    ]
    _print(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _print(figures: dict[str, Any]) -> None:
    print(f"host constants: {figures['constants']}; {figures['rows']}")
    print(f"{'':<18} {'n':>5} {'mean':>7} {'median':>7} {'p90':>7} {'bias':>7}  by cluster: mean")
    for name in COLUMNS:
        if figures[name]["n"]:
            mean = figures["cluster_weighted"][name]["mean_abs_pct"]
            print(f"{name:<18} {_cells(figures[name])}  {mean:.1f}")
        else:
            print(f"{name:<18} {0:>5}  not predicted")
    for by in ("kind", "cluster"):
        print(f"by {by}: TPOT n, mean, median, p90, bias; TTFT; output throughput; e2e")
        for label, one in figures["slices"].items():
            if label.startswith(f"{by}="):
                parts = (one[n] for n in ("tpot", "ttft", "output_throughput", "e2e") if n in one)
                print(f"  {label.partition('=')[2]:<62} {' |'.join(map(_cells, parts))}")
    print(f"order of TPOT over tp: {figures['tp_order']}")
    for note in figures["stand_ins"]:
        print(f"  stand-in: {note}")
    for reason, n in Counter(entry["reason"] for entry in figures["uncovered"]).most_common():
        print(f"  uncovered {n}: {reason}")


def _cells(one: dict[str, float]) -> str:
    keys = ("mean_abs_pct", "median_abs_pct", "p90_abs_pct", "bias_pct")
    return f"{one['n']:>5} " + " ".join(f"{one[key]:>7.1f}" for key in keys)


if __name__ == "__main__":
    main()
