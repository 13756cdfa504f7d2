"""How near simulated runs are to measured ones.

``python -m bench.points RUNS.csv [--where model=M,engine=E] [--json PATH]``

Prints four variants, for the KV dtype that a row states and for bf16: kernel tables alone, and
with the engine version's own constants. The JSON's top level is the variant named by ``--kv`` and
``--calibration``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.runs_csv import Row, UncoveredError, case_of, parse_where, read_rows
from planner.api import simulate
from planner.errors import PlannerError

COLUMNS: Final = {
    "tpot": ("tpot_ms", "mean_tpot_ms"),
    "ttft": ("ttft_ms", "mean_ttft_ms"),
    "itl": ("itl_median_ms", "p50_itl_ms"),
    "output_throughput": ("output_tok_per_s", "output_throughput"),
    "total_throughput": ("total_tok_per_s", "total_token_throughput"),
    "e2e": ("e2e_ms", None),
    "power": ("power_w", None),
}
"""Column of the measured metric and name of the simulated one (``None``: not predicted yet)."""

_SLICES: Final = ("hardware", "model", "engine_version", "tp")


@dataclass
class Errors:
    """Relative errors of one metric, (predicted - measured) / measured."""

    values: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Figures of the contract."""
        if not self.values:
            return {"n": 0}
        errors = np.array(self.values)
        size = np.abs(errors)
        return {
            "n": len(errors),
            "mean_abs_pct": 100 * float(size.mean()),
            "median_abs_pct": 100 * float(np.median(size)),
            "p90_abs_pct": 100 * float(np.percentile(size, 90)),
            "bias_pct": 100 * float(errors.mean()),
        }


def predict(
    rows: list[Row], kv: str | None, calibration: str | None
) -> tuple[list[Any], Counter[str]]:
    """Simulated metrics per row (``None`` where uncovered), and the reasons."""
    reasons: Counter[str] = Counter()
    metrics: list[Any] = []
    for row in rows:
        predicted, reason = _predict_one(row, kv, calibration)
        metrics.append(predicted)
        if reason:
            reasons[reason] += 1
    return metrics, reasons


def _predict_one(row: Row, kv: str | None, calibration: str | None) -> tuple[Any, str]:
    try:
        case = case_of(row, kv_cache_dtype=kv, calibration=calibration)
        return simulate(case.scenario, case.plan).metrics, ""
    except (UncoveredError, PlannerError) as error:
        return None, str(error)


def score(rows: list[Row], metrics: list[Any]) -> dict[str, Any]:
    """Error figures by metric, and by slice."""
    total = {name: Errors() for name in COLUMNS}
    slices: dict[str, dict[str, Errors]] = {}
    for row, predicted in zip(rows, metrics, strict=True):
        if predicted is None:
            continue
        for name, (column, key) in COLUMNS.items():
            if key is None or not row[column]:
                continue
            error = predicted[key] / float(row[column]) - 1
            total[name].values.append(error)
            for by in _SLICES:
                label = f"{by}={row[by]}"
                slices.setdefault(label, {}).setdefault(name, Errors()).values.append(error)
    out: dict[str, Any] = {name: errors.figures() for name, errors in total.items()}
    out["slices"] = {
        label: {name: errors.figures() for name, errors in by_name.items()}
        for label, by_name in sorted(slices.items())
    }
    return out


def tp_orders(rows: list[Row], metrics: list[Any]) -> tuple[int, int]:
    """Cells (lengths and load) whose predicted TPOT order over tp is the measured one; cells."""
    cells: dict[tuple[str, ...], list[tuple[str, float, float]]] = {}
    for row, predicted in zip(rows, metrics, strict=True):
        if predicted is not None and row["tpot_ms"]:
            key = tuple(row[c] for c in ("hardware", "model", "engine", "isl", "osl", "load"))
            entry = (row["tp"], float(row["tpot_ms"]), predicted["mean_tpot_ms"])
            cells.setdefault(key, []).append(entry)
    several = [cell for cell in cells.values() if len({tp for tp, _, _ in cell}) > 1]
    right = 0
    for cell in several:
        measured = [tp for tp, _, _ in sorted(cell, key=lambda e: e[1])]
        right += measured == [tp for tp, _, _ in sorted(cell, key=lambda e: e[2])]
    return right, len(several)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="bench.points", description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--where", default="", help="column=value,...")
    parser.add_argument("--kv", choices=["stated", "bf16", "fp8"], default="stated")
    parser.add_argument("--calibration", choices=["engine", "none"], default="engine")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.runs.exists():
        sys.exit(f"{args.runs}: no such file; nothing measured to compare with")
    rows = read_rows(args.runs, parse_where(args.where))
    unscorable = Counter(r["scorable_reason"] or "unstated" for r in rows if r["scorable"] == "no")
    duplicates = sum(bool(r["duplicate_of"]) for r in rows if r["scorable"] != "no")
    rows = [r for r in rows if r["scorable"] != "no" and not r["duplicate_of"]]
    print(f"{len(rows)} rows to score, {duplicates} duplicates and {unscorable.total()} unscorable")

    variants: dict[str, Any] = {}
    header = f"{'KV':>6} {'constants':>9} {'n':>5} {'TPOT mean':>10} {'median':>7} {'bias':>6}"
    print(f"{header} {'TTFT mean':>10} {'median':>7} {'bias':>6}  TPOT order of tp")
    uncovered: Counter[str] = Counter()
    for kv in ("stated", "bf16"):
        for calibration in ("none", "engine"):
            metrics, uncovered = predict(
                rows, None if kv == "stated" else kv, None if calibration == "engine" else "none"
            )
            figures = score(rows, metrics)
            right, cells = tp_orders(rows, metrics)
            figures["tp_order"] = {"right": right, "cells": cells}
            variants[f"kv={kv},constants={calibration}"] = figures
            print(f"{kv:>6} {calibration:>9} {_line(figures)}  {right} of {cells}")
    for reason, count in uncovered.most_common():
        print(f"  uncovered {count}: {reason}")
    if args.json:
        main_variant = dict(variants[f"kv={args.kv},constants={args.calibration}"])
        main_variant["variants"] = variants
        main_variant["unscorable"] = [
            {"reason": reason, "n": n} for reason, n in sorted((unscorable + uncovered).items())
        ]
        text = json.dumps(main_variant, indent=2, sort_keys=True) + "\n"
        args.json.write_text(text, encoding="utf-8")


def _line(figures: dict[str, Any]) -> str:
    cells = [f"{figures['tpot']['n']:>5}"]
    for name in ("tpot", "ttft"):
        one = figures[name]
        if one["n"]:
            mean, median = one["mean_abs_pct"], one["median_abs_pct"]
            cells.append(f"{mean:>10.1f} {median:>7.1f} {one['bias_pct']:>6.1f}")
    return " ".join(cells)


if __name__ == "__main__":
    main()
