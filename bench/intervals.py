"""Learn how sure predictions are, from errors on clusters that their constants did not see.

``python -m bench.intervals RUNS.csv [--points POINTS.json] [--store] [--json PATH]``

``POINTS.json`` is what ``python -m bench.points RUNS.csv --json POINTS.json`` wrote; without it the
runs are simulated again. ``--store`` writes ``profiles/uncertainty/errors.json``, from which
`planner.uncertainty` takes its intervals, and ``bench/interval_errors.json``, the errors by
cluster.

Errors are logarithms of predicted over measured. A regime's interval is the 90 % quantile of their
size, where a cluster counts as the root of its runs: one with many runs says more, but not as much
more as if they were independent. Its coverage is tested with each cluster left out.

Regimes were chosen on these runs: of the kind of model, the engine, the label of kernel times, KV
cache full or not, seats and requests per second, the first and the last tell errors apart; the
share of extrapolated kernel times does not (dense models, median TPOT error 4.0 % below 2 %, 3.3 %
from 2 to 10 %). With 10 instead of 15 requests per second as the limit, the TTFT interval is twice
as wide.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench.points import cases_of, figures_of
from bench.runs_csv import is_scored, read_rows
from planner.uncertainty import BUSY, DENSE, ERRORS_FILE, EXPERTS, METRICS, THROUGHPUT

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from bench.runs_csv import Case

    Floats = npt.NDArray[np.float64]

COVERAGE: Final = 0.9
BUSY_REQUESTS_PER_S: Final = 15.0
"""Requests per second of one server from which its front end and the client are not to be seen as
free: measured TTFT of a small model grows tenfold there (36 requests/s and 9,200 tokens/s are never
passed)."""
_LEAST_CLUSTERS: Final = 3
_LEAST_RUNS: Final = 20
"""A regime with fewer of either, one cluster left out, takes the errors of all regimes."""
_COLUMNS: Final = dict(zip(METRICS, ("tpot_ms", "ttft_ms", "output_tok_per_s"), strict=True))
_CLUSTERS_FILE: Final = Path(__file__).with_name("interval_errors.json")


@dataclass(frozen=True)
class Point:
    """One metric of one run.

    Parameters
    ----------
    cluster, regime, cell
        What it belongs to; a cell is one load of a cluster, under which plans compare.
    plan
        Its plan.
    predicted, measured
        Logarithms.

    """

    cluster: str
    regime: str
    cell: tuple[str, ...]
    plan: str
    predicted: float
    measured: float

    @property
    def size(self) -> float:
        """Size of its error."""
        return abs(self.predicted - self.measured)


def points_of(
    cases: Sequence[Case], predictions: dict[str, dict[str, float]]
) -> dict[str, list[Point]]:
    """Points by metric, in the order of the runs."""
    out: dict[str, list[Point]] = {metric: [] for metric in METRICS}
    for case in cases:
        row, found = case.row, predictions.get(case.row["run_id"])
        if found is None:
            continue
        cell = (case.cluster.label, row.get("quantization", ""), row["isl"], row["osl"])
        for metric, column in _COLUMNS.items():
            if row.get(column) and found.get(column):
                # Plans of one cell differ in devices; throughput compares per device.
                devices = float(row["n_gpus"] or 1) if metric == THROUGHPUT else 1.0
                point = Point(
                    cluster=case.cluster.label,
                    regime=_regime(case, found, metric),
                    cell=(*cell, row["load"]),
                    plan=case.plan,
                    predicted=float(np.log(found[column] / devices)),
                    measured=float(np.log(float(row[column]) / devices)),
                )
                out[metric].append(point)
    return out


def _regime(case: Case, found: dict[str, float], metric: str) -> str:
    """The regime as `planner.uncertainty` finds it, from what was predicted alone."""
    kind = EXPERTS if case.names.checkpoint.is_moe else DENSE
    if metric == THROUGHPUT:
        return kind
    outputs = case.client.output_tokens
    mean = outputs.get("mean") or (outputs["min"] + outputs["max"]) / 2
    replicas = max(int(float(case.row.get("dp") or 1)), 1)
    if found["output_tok_per_s"] / mean / replicas >= BUSY_REQUESTS_PER_S:
        return BUSY
    return kind


def quantile(points: Sequence[Point], sizes: Sequence[float]) -> float:
    """The 90 % quantile of ``sizes``, a cluster counting as the root of its points."""
    clusters = [point.cluster for point in points]
    counts = {cluster: clusters.count(cluster) for cluster in set(clusters)}
    weights = np.array([counts[cluster] ** -0.5 for cluster in clusters])
    order = np.argsort(sizes)
    share = np.cumsum(weights[order]) / weights.sum()
    at = min(int(np.searchsorted(share, COVERAGE)), len(order) - 1)
    return float(np.asarray(sizes)[order[at]])


def left_out(points: Sequence[Point]) -> Floats:
    """(N,) half width of each point's interval, learnt from other clusters."""
    found: dict[tuple[str, str], float] = {}
    for point in points:
        key = (point.cluster, point.regime)
        if key not in found:
            others = [p for p in points if p.cluster != point.cluster]
            alike = [p for p in others if p.regime == point.regime]
            enough = (
                len({p.cluster for p in alike}) >= _LEAST_CLUSTERS and len(alike) >= _LEAST_RUNS
            )
            used = alike if enough else others
            found[key] = quantile(used, [p.size for p in used]) if used else np.nan
    return np.array([found[p.cluster, p.regime] for p in points])


def judge(points: Sequence[Point]) -> dict[str, float]:
    """Coverage and width of intervals that did not see the cluster."""
    half = left_out(points)
    sizes = np.array([point.size for point in points])
    inside = sizes <= half
    clusters = sorted({point.cluster for point in points})
    by_cluster = [
        float(np.mean([i for i, p in zip(inside, points, strict=True) if p.cluster == cluster]))
        for cluster in clusters
    ]
    # Of the prediction, as the width is.
    median = float(np.median(np.abs(np.expm1([p.measured - p.predicted for p in points]))))
    width = float(np.median(np.exp(half) - np.exp(-half)))
    return {
        "n": len(points),
        "clusters": len(clusters),
        "covered_pct": round(100 * float(inside.mean()), 1),
        "covered_mean_over_clusters_pct": round(100 * float(np.mean(by_cluster)), 1),
        "median_full_width_pct": round(100 * width, 1),
        "median_abs_pct": round(100 * median, 1),
        "width_over_median_error": round(width / median, 2),
    }


def pairs_of(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Different plans of one cell."""
    cells: dict[tuple[str, ...], list[Point]] = {}
    for point in points:
        cells.setdefault(point.cell, []).append(point)
    return [
        (one, other)
        for cell in cells.values()
        for one, other in itertools.combinations(cell, 2)
        if one.plan != other.plan
    ]


def _gap_error(pair: tuple[Point, Point]) -> float:
    one, other = pair
    return abs((one.predicted - other.predicted) - (one.measured - other.measured))


def judge_pairs(pairs: Sequence[tuple[Point, Point]]) -> dict[str, float]:
    """How often "cannot be told apart" is said of a cluster left out, and is right."""
    said, right = 0, 0
    for cluster in sorted({one.cluster for one, _ in pairs}):
        others = [pair for pair in pairs if pair[0].cluster != cluster]
        if not others:
            continue
        noise = quantile([one for one, _ in others], [_gap_error(pair) for pair in others])
        for one, other in pairs:
            if one.cluster == cluster and abs(one.predicted - other.predicted) < noise:
                said += 1
                right += abs(one.measured - other.measured) < noise
    out: dict[str, float] = {"pairs": len(pairs), "said": said}
    if said:
        out["right_pct"] = round(100 * right / said, 1)
    return out


def learnt(points: dict[str, list[Point]]) -> dict[str, Any]:
    """What ships: half widths by metric and regime, and noise between plans."""
    widths: dict[str, dict[str, Any]] = {}
    between: dict[str, float] = {}
    for metric, every in points.items():
        widths[metric] = {}
        for regime in (DENSE, EXPERTS) if metric == THROUGHPUT else (DENSE, EXPERTS, BUSY):
            alike = [point for point in every if point.regime == regime]
            enough = len(alike) >= _LEAST_RUNS
            used = alike if enough else every
            widths[metric][regime] = {
                "half_width_log": round(quantile(used, [p.size for p in used]), 3),
                "runs": len(alike),
                "clusters": len({point.cluster for point in alike}),
            }
        pairs = pairs_of(every)
        errors = [_gap_error(pair) for pair in pairs]
        between[metric] = round(quantile([one for one, _ in pairs], errors), 3)
    return {
        "schema_version": 1,
        "source": "python -m bench.intervals on public measured runs, clusters left out",
        "coverage": COVERAGE,
        "busy_requests_per_s": BUSY_REQUESTS_PER_S,
        "half_widths": widths,
        "between_plans_log": between,
    }


def by_cluster(points: dict[str, list[Point]]) -> dict[str, Any]:
    """Errors of every cluster, percent: how many, bias, median and 90 % quantile of their size."""
    out: dict[str, Any] = {}
    for metric, every in points.items():
        for point in every:
            label = f"{point.cluster}|{point.regime}"
            out.setdefault(metric, {}).setdefault(label, []).append(
                point.predicted - point.measured
            )
    return {
        metric: {
            label: {
                "n": len(errors),
                "bias_pct": round(100 * float(np.expm1(np.median(errors))), 1),
                "median_pct": round(100 * float(np.median(np.abs(np.expm1(errors)))), 1),
                "p90_pct": round(100 * float(np.percentile(np.abs(np.expm1(errors)), 90)), 1),
            }
            for label, errors in sorted(clusters.items())
        }
        for metric, clusters in out.items()
    }


def main() -> None:
    """Learn, test with clusters left out, print."""
    parser = argparse.ArgumentParser(prog="bench.intervals", description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--points", type=Path, help="what bench.points --json wrote")
    parser.add_argument("--store", action="store_true", help="write the files that ship")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.runs.exists():
        sys.exit(f"{args.runs}: no such file; nothing measured to learn from")
    rows = [row for row in read_rows(args.runs, {}) if is_scored(row)]
    if args.points:
        listed = json.loads(args.points.read_text(encoding="utf-8"))["predictions"]
    else:
        listed = figures_of(rows, "held-out")["predictions"]
    points = points_of(cases_of(rows)[0], {entry["run_id"]: entry for entry in listed})
    found = {metric: judge(every) for metric, every in points.items() if every}
    pairs = {metric: judge_pairs(pairs_of(every)) for metric, every in points.items() if every}
    for metric in found:
        print(f"{metric}: {found[metric]}")
        print(f"  cannot be told apart: {pairs[metric]}")
    ships = learnt(points)
    if args.store:
        for path, data in ((ERRORS_FILE, ships), (_CLUSTERS_FILE, by_cluster(points))):
            path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if args.json:
        out = {"intervals": found, "between_plans": pairs, "learnt": ships}
        args.json.write_text(json.dumps(out, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
