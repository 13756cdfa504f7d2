"""Fit an engine version's host constants on measured runs of one tp, and test on the others.

``python -m bench.fit_host RUNS.csv --where model=M,engine=E [--kv bf16] [--all]``

Five constants would be too many for runs of one tp: the eager floor never binds in these runs (it
stays below the device time of every iteration), so it is left at zero and the other four are
fitted. Errors enter as logarithms with a soft loss, so that one mis-measured run does not pull the
fit, and a weak prior keeps constants near zero that the data cannot tell apart.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from bench.runs_csv import case_of, parse_where, read_rows
from planner.resolve import resolve
from simulator.engine_rules import HostConstants
from simulator.metrics import statistic_s
from simulator.plan import parse_plan

if TYPE_CHECKING:
    import numpy.typing as npt

    from bench.runs_csv import Case

    Floats = npt.NDArray[np.float64]

_NAMES: Final = ("iteration_ms", "sequence_ms", "ingress_ms", "prefill_multiplier")
_LOW: Final = (0.0, 0.0, 0.0, 1.0)
_HIGH: Final = (10.0, 1.0, 100.0, 2.0)
_START: Final = (0.3, 0.01, 5.0, 1.05)
_SCALE: Final = (0.5, 0.02, 10.0, 0.1)
"""Typical sizes (the constants that public engines of 2025 and 2026 need differ by about this)."""
_PRIOR: Final = 0.1
"""Weight of the prior: one typical size counts as much as a 10 % error of one run."""
_SOFT: Final = 0.05
"""Errors beyond 5 % count less than squared."""


def host_of(values: Floats) -> HostConstants:
    """Constants from the fit's vector."""
    iteration_ms, sequence_ms, ingress_ms, multiplier = map(float, values)
    return HostConstants(
        iteration_s=iteration_ms / 1e3,
        sequence_s=sequence_ms / 1e3,
        ingress_s=ingress_ms / 1e3,
        prefill_multiplier=multiplier,
    )


def log_ratios(cases: list[Case], host: HostConstants) -> Floats:
    """Logarithm of predicted over measured, (cases, 2): mean TPOT and mean TTFT."""
    out = np.zeros((len(cases), 2))
    for i, case in enumerate(cases):
        problem = resolve(case.scenario, host=host)
        result = problem.start(parse_plan(case.plan, problem.default_limits)).finish()
        for j, metric in enumerate(("tpot", "ttft")):
            predicted_ms = 1e3 * statistic_s(result.values.of(metric), "mean")
            out[i, j] = np.log(predicted_ms / float(case.row[f"{metric}_ms"]))
    return out


def fit(cases: list[Case]) -> Floats:
    """Constants that fit ``cases`` best."""
    from scipy.optimize import least_squares

    low, scale = np.array(_LOW), np.array(_SCALE)

    def residuals(values: Floats) -> Floats:
        prior = _PRIOR * (values - low) / scale
        return np.concatenate([log_ratios(cases, host_of(values)).ravel(), prior])

    found = least_squares(
        residuals,
        _START,
        bounds=(_LOW, _HIGH),
        loss="soft_l1",
        f_scale=_SOFT,
        x_scale=_SCALE,
        diff_step=0.05,
        xtol=1e-3,
        ftol=1e-3,
    )
    values: Floats = found.x
    return values


def _errors(cases: list[Case], values: Floats) -> str:
    size = 100 * np.abs(np.expm1(log_ratios(cases, host_of(values))))
    mean, median = size.mean(axis=0), np.median(size, axis=0)
    return (
        f"n {len(cases)}: TPOT mean {mean[0]:.2f} median {median[0]:.2f}, "
        f"TTFT mean {mean[1]:.2f} median {median[1]:.2f}"
    )


def main() -> None:
    """Run the fits."""
    parser = argparse.ArgumentParser(prog="bench.fit_host", description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--where", default="")
    parser.add_argument("--kv", default=None, help="KV dtype in place of the stated one")
    parser.add_argument("--all", action="store_true", help="only the fit on all runs")
    args = parser.parse_args()
    if not args.runs.exists():
        sys.exit(f"{args.runs}: no such file; nothing measured to fit")
    rows = read_rows(args.runs, parse_where(args.where))
    cases = [
        case_of(row, kv_cache_dtype=args.kv)
        for row in rows
        if row["scorable"] != "no" and not row["duplicate_of"]
    ]
    plans = sorted({case.plan for case in cases})
    for donor in [] if args.all else plans:
        values = fit([case for case in cases if case.plan == donor])
        print(f"fitted on {donor}: {_show(values)}")
        print(f"  tested on the others: {_errors([c for c in cases if c.plan != donor], values)}")
    values = fit(cases)
    print(f"fitted on all: {_show(values)}")
    print(f"  residual: {_errors(cases, values)}")


def _show(values: Floats) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in zip(_NAMES, values, strict=True))


if __name__ == "__main__":
    main()
