"""Fit host constants on measured runs, cluster by cluster.

``python -m bench.fit_host RUNS.csv [--where model=M,engine=E] [--store]`` prints the constants that
fit each cluster best and what error is left; ``--store`` writes them to
``bench/host_fits.json``, from which `bench.held_out` takes constants for clusters that they have
not seen. ``--by-tp`` fits on the runs of one tp and tests on the others.

All constants are fitted to dense models only: on mixtures of experts they would take up what the
kernel times of the experts get wrong. There the prefill multiplier alone is fitted, under the
other constants that `bench.held_out` gives the cluster. The eager floor never binds in these runs
(it stays below the device time of every iteration), so it is left at zero and four constants are
fitted. Errors enter as logarithms with a soft loss, so that one mis-measured run does not pull the
fit, and a weak prior keeps constants near zero that the data cannot tell apart.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from bench.held_out import FITS, Constants, HostFit, constants_for, stored_fits
from bench.predictions import predict_all
from bench.runs_csv import UncoveredError, case_of, is_scored, parse_where, read_rows

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from bench.runs_csv import Case, Cluster, Row

    Floats = npt.NDArray[np.float64]

_NAMES: Final = ("iteration_ms", "sequence_ms", "ingress_ms", "prefill_multiplier")
_LOW: Final = (0.0, 0.0, 0.0, 1.0)
_HIGH: Final = (10.0, 1.0, 20.0, 2.0)
"""Ingress is at most twice its typical size: beyond that it takes up queueing, not the server."""
_START: Final = (0.3, 0.01, 5.0, 1.05)
_SCALE: Final = (0.5, 0.02, 10.0, 0.1)
"""Typical sizes (the constants that public engines of 2025 and 2026 need differ by about this)."""
_PRIOR: Final = 0.1
"""Weight of the prior: one typical size counts as much as a 10 % error of one run."""
_MOST_STEPS: Final = 8
"""Steps of a fit; the residual no longer moves after five or so."""
_SOFT: Final = 0.05
"""Errors beyond 5 % count less than squared."""

_FITTED: Final = ("tpot_ms", "ttft_ms", "itl_median_ms")
"""Metrics that a fit looks at, where a run states them; a throughput alone does not tell host time
from other errors."""

_LEAST_RUNS: Final = 9
"""Runs that a cluster needs: three loads of three plans or lengths tell four constants apart."""

_MOST_RUNS: Final = 45
"""Runs that a fit looks at, spread evenly over the cluster's: more cost time and change little."""
_MOST_EXPERT_RUNS: Final = 20
"""The same for the one constant that is fitted to a mixture of experts."""
_MOST_PREFILL: Final = 3.0
"""Largest prefill multiplier of those: prompts that run 1.7 to 2.2 times the kernel table's time
are known (gpt-oss, MiniMax and Qwen3-235B servers). A fit that ends here has taken up something
else."""
_AT_BOUND: Final = 0.1
"""How near to the bound a fit counts as ending there."""


def log_ratios(cases: list[Case], constants: Constants) -> Floats:
    """Logarithm of predicted over measured, (cases that run, metrics); NaN: not measured."""
    host = constants.host()
    predictions = predict_all([(case, host) for case in cases])
    ratios = [
        [_log_ratio(case.row, predicted, metric) for metric in _FITTED]
        for case, predicted in zip(cases, predictions, strict=True)
        if not isinstance(predicted, str)
    ]
    return np.array(ratios).reshape(-1, len(_FITTED))


def _log_ratio(row: Row, predicted: dict[str, float], metric: str) -> float:
    measured = row.get(metric)
    return float(np.log(predicted[metric] / float(measured))) if measured else np.nan


def fit(cases: list[Case]) -> Constants:
    """Constants that fit ``cases`` best."""
    from scipy.optimize import least_squares

    low, scale = np.array(_LOW), np.array(_SCALE)
    cases = _spread(cases, _MOST_RUNS)

    def residuals(values: Floats) -> Floats:
        ratios = log_ratios(cases, Constants(*map(float, values)))
        prior = _PRIOR * (values - low) / scale
        return np.concatenate([ratios[~np.isnan(ratios)], prior])

    found = least_squares(
        residuals,
        _START,
        bounds=(_LOW, _HIGH),
        loss="soft_l1",
        f_scale=_SOFT,
        x_scale=_SCALE,
        diff_step=0.05,
        xtol=1e-2,
        ftol=1e-2,
        max_nfev=_MOST_STEPS,
    )
    # Digits beyond these depend on the machine and on where the fit stopped.
    constants = Constants(*(float(f"{value:.3f}") for value in found.x))
    if any(case.row.get("ttft_ms") for case in cases):
        return constants
    # Without a time to the first token these two stay where the prior has them.
    return constants._replace(ingress_ms=None, prefill_multiplier=None)


def fit_prefill(cases: list[Case], constants: Constants) -> Constants:
    """The same constants with the prefill multiplier that fits ``cases`` best."""
    from scipy.optimize import minimize_scalar

    cases = _spread(cases, _MOST_EXPERT_RUNS)

    def loss(multiplier: float) -> float:
        ratios = log_ratios(cases, constants._replace(prefill_multiplier=float(multiplier)))
        return float(np.nanmean(np.abs(ratios)))

    bounds = (_LOW[-1], _MOST_PREFILL)
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 0.02})
    return constants._replace(prefill_multiplier=round(float(found.x), 2))


def _spread(cases: list[Case], most: int) -> list[Case]:
    """At most so many cases, evenly from first to last."""
    chosen = np.linspace(0, len(cases) - 1, min(len(cases), most)).round().astype(int)
    return [cases[i] for i in chosen]


def clusters_of(rows: Iterable[Row]) -> dict[Cluster, list[Case]]:
    """Cases by cluster: dense models before others, then in order."""
    clusters: dict[Cluster, list[Case]] = {}
    for row in rows:
        if not is_scored(row) or not any(row.get(metric) for metric in _FITTED):
            continue
        try:
            case = case_of(row)
        except UncoveredError:
            continue
        clusters.setdefault(case.cluster, []).append(case)
    order = sorted(clusters, key=lambda c: (clusters[c][0].names.checkpoint.is_moe, c))
    return {cluster: clusters[cluster] for cluster in order}


def mean_errors(cases: list[Case], constants: Constants) -> dict[str, float]:
    """Mean absolute error by metric, percent."""
    size = 100 * np.abs(np.expm1(log_ratios(cases, constants)))
    return {
        metric: round(float(np.nanmean(column)), 2)
        for metric, column in zip(_FITTED, size.T, strict=True)
        if not np.isnan(column).all()
    }


def main() -> None:
    """Run the fits."""
    parser = argparse.ArgumentParser(prog="bench.fit_host", description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--where", default="", help="column=value,...")
    parser.add_argument("--store", action="store_true", help=f"write {FITS.name}")
    parser.add_argument("--by-tp", action="store_true", help="fit on one tp, test on the others")
    args = parser.parse_args()
    if not args.runs.exists():
        sys.exit(f"{args.runs}: no such file; nothing measured to fit")
    if args.store and args.where:
        sys.exit("--store: fits of a part of the file would replace those of all of it")
    fits: list[HostFit] = []
    for cluster, cases in clusters_of(read_rows(args.runs, parse_where(args.where))).items():
        names = cases[0].names
        is_moe = names.checkpoint.is_moe
        cases = _that_run(cases)
        if is_moe:
            cases = [case for case in cases if case.row.get("ttft_ms")]
        if len(cases) < _LEAST_RUNS:
            print(f"{cluster.label}: {len(cases)} runs to fit, too few")
            continue
        if args.by_tp:
            _test_by_tp(cases)
            continue
        if is_moe:
            known = fits or stored_fits()
            constants = fit_prefill(
                cases, constants_for(cluster, names.release, known, is_moe=False)
            )
        else:
            constants = fit(cases)
        errors = mean_errors(cases, constants)
        if is_moe and (constants.prefill_multiplier or 0.0) > _MOST_PREFILL - _AT_BOUND:
            print(f"{cluster.label}: {constants} is at the bound: left out, {errors}", flush=True)
            continue
        fits.append(HostFit(cluster, names.release, len(cases), constants, errors, is_moe))
        print(f"{cluster.label}: {len(cases)} runs, {constants}\n  left: {errors}", flush=True)
    if args.store:
        text = json.dumps([asdict(entry) for entry in fits], indent=1, sort_keys=True)
        FITS.write_text(text + "\n", encoding="utf-8")


def _that_run(cases: list[Case]) -> list[Case]:
    """Cases whose plan the planner can run."""
    host = Constants(*_START).host()
    predictions = predict_all([(case, host) for case in cases])
    kept = zip(cases, predictions, strict=True)
    return [case for case, predicted in kept if not isinstance(predicted, str)]


def _test_by_tp(cases: list[Case]) -> None:
    for tp in sorted({case.row["tp"] for case in cases}):
        constants = fit([case for case in cases if case.row["tp"] == tp])
        others = [case for case in cases if case.row["tp"] != tp]
        print(f"{cases[0].cluster.label}: fitted on tp {tp}: {constants}")
        print(f"  error on the others: {mean_errors(others, constants)}", flush=True)


if __name__ == "__main__":
    main()
