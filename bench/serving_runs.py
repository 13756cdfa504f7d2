"""How near simulated servers are to measured ones, with constants that did not see them.

``python -m bench.serving_runs DIR [--profiles DIR] [--traces DIR] [--json PATH]``

Runs of one engine version and model form a cluster with one set of host constants. Each cluster is
split by rate and by trace: the constants are fitted on one side (`bench.serving_fit`) and tested on
the other, and both sides are printed. A run's own line uses the constants that did not see its rate
(or, where a cluster has one rate, its trace; or else those of all its runs, which the line says).
Runs on cards with layer tables of their own (``--profiles``) share one set of constants, whatever
the card and model; each is also predicted by the constants of the others.

Mean errors of the development runs, each side tested by constants of the other: Llama-70B on H100
(vLLM 0.6.0, 16 runs) by rate TTFT 1.9 and 2.4 %, TPOT 2.3 and 1.7 %, E2E 2.2 and 1.6 %; by trace
TTFT 3.1 and 7.3 %, TPOT and E2E 1.9 %. Two cards by one set (vLLM 0.19.0): TPOT, E2E and makespan
within 2.0 %, TTFT 2.1 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench.serving_files import read_folder
from bench.serving_fit import fit, in_units
from bench.serving_predict import METRICS, Folders, Prepared, prepare
from bench.serving_priors import prior_for
from bench.uncovered import UncoveredError
from planner.errors import NO_VALUE, InputError, PlannerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from simulator.engine_rules import HostConstants

    Errors = Mapping[str, float]

_HEADLINE: Final = ("ttft", "tpot", "e2e")


def errors_pct(run: Prepared, host: HostConstants) -> dict[str, float]:
    """Predicted over measured less one, per cent, of every metric that was measured."""
    predicted, measured = run.predict_s(host), run.run.measured_s
    return {m: 100 * (predicted[m] / measured[m] - 1) for m in METRICS if m in measured}


def figures(errors: Iterable[Errors]) -> dict[str, dict[str, float]]:
    """Mean and largest size of the errors by metric."""
    listed = list(errors)
    out: dict[str, dict[str, float]] = {}
    for metric in METRICS:
        sizes = np.abs([own[metric] for own in listed if metric in own])
        if len(sizes):
            out[metric] = {
                "n": len(sizes),
                "mean_abs_pct": float(sizes.mean()),
                "max_abs_pct": float(sizes.max()),
            }
    return out


def fitted(runs: list[Prepared]) -> HostConstants:
    """Constants of the runs' cluster, fitted on these runs."""
    return fit(
        [run.predict_s for run in runs],
        [run.run.measured_s for run in runs],
        prior_for(runs[0]),
        [run.kind for run in runs],
    )


def split(runs: list[Prepared], by: str) -> dict[str, tuple[HostConstants, dict[str, Any]]]:
    """For each value of ``by``: constants fitted on the runs of every other value, and figures.

    Parameters
    ----------
    runs
        A cluster.
    by
        ``rate``, ``trace`` or ``name`` of a run.

    """
    values = sorted({getattr(r.run, by) for r in runs})
    out: dict[str, tuple[HostConstants, dict[str, Any]]] = {}
    for value in values if len(values) > 1 else []:
        others = [r for r in runs if getattr(r.run, by) != value]
        host = fitted(others)
        report = {
            "by": by,
            "fitted_on": [v for v in values if v != value],
            "tested_on": value,
            "constants": in_units(host),
            "fit": figures(errors_pct(r, host) for r in others),
            "test": figures(errors_pct(r, host) for r in runs if getattr(r.run, by) == value),
        }
        out[value] = (host, report)
    return out


def judge(runs: list[Prepared]) -> dict[str, Any]:
    """Splits of one cluster, and its runs by the constants that did not see them."""
    everything = fitted(runs)
    has_tables = runs[0].has_tables
    kinds = ("name",) if has_tables else ("rate", "trace")
    splits = {by: split(runs, by) for by in kinds}
    # One set of constants for all cards is what their runs are to show: they are judged by it.
    held_out = next((by for by in kinds if splits[by] and not has_tables), "")
    lines = []
    for run in runs:
        host = splits[held_out][getattr(run.run, held_out)][0] if held_out else everything
        predicted = run.predict_s(host)
        lines.append(
            {
                "name": run.run.name,
                "cluster": run.cluster,
                "constants": f"not this {held_out}" if held_out else "all runs of the cluster",
                "predicted_s": {m: float(f"{v:.6g}") for m, v in predicted.items()},
                "measured_s": {m: float(f"{v:.6g}") for m, v in run.run.measured_s.items()},
                "error_pct": {m: round(e, 3) for m, e in errors_pct(run, host).items()},
                "notes": list(run.notes),
            }
        )
    reports = [report for by in kinds for _, report in splits[by].values()]
    return {
        "cluster": runs[0].cluster,
        "prior": prior_for(runs[0]).source,
        "constants": in_units(everything),
        "fit": figures(errors_pct(r, everything) for r in runs),
        "splits": reports,
        "runs": lines,
    }


def evaluate(folder: Path, folders: Folders) -> dict[str, Any]:
    """Everything that the benchmark reports, for every run below ``folder``."""
    found = read_folder(folder)
    skipped = [{"name": name, "skipped": reason} for name, reason in found.skipped]
    clusters: dict[str, list[Prepared]] = {}
    for run in found.runs:
        try:
            prepared = prepare(run, folders)
            prepared.predict_s(prior_for(prepared).host())
        except (UncoveredError, ValueError) as error:
            skipped.append({"name": run.name, "skipped": str(error)})
            continue
        clusters.setdefault(prepared.cluster, []).append(prepared)
    judged = [judge(runs) for runs in clusters.values()]
    lines = [line for one in judged for line in one.pop("runs")]
    out: dict[str, Any] = dict(figures(line["error_pct"] for line in lines))
    out.update(runs=lines + skipped, clusters=judged)
    return out


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="bench.serving_runs", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--profiles", type=Path)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        for folder in (args.folder, args.profiles, args.traces):
            if folder is not None and not folder.is_dir():
                raise InputError(
                    source=str(folder), field="folder", value=NO_VALUE, rule="must be a folder"
                )
        out = evaluate(args.folder, Folders(args.profiles, args.traces))
    except PlannerError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    show(out)
    if args.json:
        text = json.dumps(out, indent=2, sort_keys=True) + "\n"
        args.json.write_text(text, encoding="utf-8")


def show(out: Mapping[str, Any]) -> None:
    """Print runs, splits and totals."""
    print(f"{'run':<62}" + "".join(f"{metric:>10}" for metric in METRICS) + "  constants")
    for line in out["runs"]:
        if "skipped" in line:
            print(f"{line['name']:<62}  skipped: {line['skipped']}")
            continue
        cells = (
            f"{line['error_pct'][m]:>+9.2f}%" if m in line["error_pct"] else f"{'-':>10}"
            for m in METRICS
        )
        print(f"{line['name']:<62}{''.join(cells)}  {line['constants']}")
    for one in out["clusters"]:
        print(f"\n{one['cluster']}: prior {one['prior']}")
        print(f"  all runs: {_constants(one['constants'])}\n    {_text(one['fit'])}")
        for report in one["splits"]:
            print(f"  fitted on {report['by']} {', '.join(report['fitted_on'])}:", end=" ")
            print(f"{_constants(report['constants'])}\n    {_text(report['fit'])}")
            print(f"    tested on {report['tested_on']}: {_text(report['test'])}")
    print("\nall runs above: " + _text({m: out[m] for m in METRICS if m in out}))


def _constants(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def _text(by_metric: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(
        f"{metric} {one['mean_abs_pct']:.2f} (max {one['max_abs_pct']:.1f}) %"
        for metric, one in by_metric.items()
    )


if __name__ == "__main__":
    main()
