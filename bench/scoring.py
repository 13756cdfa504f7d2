"""Errors of predictions against measured runs: in all, by slice, and by cluster."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.predictions import Prediction
    from bench.runs_csv import Case

COLUMNS: Final = {
    "tpot": "tpot_ms",
    "ttft": "ttft_ms",
    "itl": "itl_median_ms",
    "output_throughput": "output_tok_per_s",
    "total_throughput": "total_tok_per_s",
    "e2e": "e2e_ms",
    "power": "power_w",
}
"""Name of each metric in the output, and its column of ``runs_columns.md``."""


@dataclass
class Errors:
    """Relative errors of one metric, (predicted - measured) / measured."""

    values: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Figures of the contract, in percent."""
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


def slices_of(case: Case) -> dict[str, str]:
    """What a row is sliced by, and its value."""
    row, release = case.row, case.names.release
    return {
        "source": row.get("source", ""),
        "engine": release.engine,
        "model": row["model"],
        "hardware": case.names.device,
        "cluster": case.cluster.label,
        "tp": row.get("tp", ""),
        "kind": "moe" if case.names.checkpoint.is_moe else "dense",
        "arrival": case.client.arrival,
        "version": "stand-in" if release.note else "own profile",
        "defaulted": "+".join(case.defaulted) or "none",
    }


def score(cases: Sequence[Case], predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Error figures by metric, by slice, and averaged over clusters.

    Parameters
    ----------
    cases, predictions
        Covered rows and what was predicted; a text instead of metrics is left out.

    Returns
    -------
    dict
        A metric's figures by its name; ``slices``: figures by metric for each ``name=value``;
        ``cluster_weighted``: by metric, the mean over clusters of each cluster's figures.

    """
    total = {name: Errors() for name in COLUMNS}
    slices: dict[str, dict[str, Errors]] = {}
    for case, predicted in zip(cases, predictions, strict=True):
        if isinstance(predicted, str):
            continue
        labels = [f"{by}={value}" for by, value in slices_of(case).items()]
        for name, column in COLUMNS.items():
            measured = case.row.get(column)
            if not measured or column not in predicted:
                continue
            error = predicted[column] / float(measured) - 1
            total[name].values.append(error)
            for label in labels:
                slices.setdefault(label, {}).setdefault(name, Errors()).values.append(error)
    by_label = {
        label: {name: errors.figures() for name, errors in by_name.items()}
        for label, by_name in sorted(slices.items())
    }
    out: dict[str, Any] = {name: errors.figures() for name, errors in total.items()}
    out["slices"] = by_label
    out["cluster_weighted"] = _over_clusters(by_label)
    return out


def _over_clusters(by_label: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = {}
    for name in COLUMNS:
        clusters = [
            figures[name]
            for label, figures in by_label.items()
            if label.startswith("cluster=") and name in figures
        ]
        out[name] = {"clusters": len(clusters)}
        for key in ("mean_abs_pct", "median_abs_pct", "p90_abs_pct", "bias_pct"):
            if clusters:
                out[name][key] = float(np.mean([figures[key] for figures in clusters]))
    return out


def tp_orders(cases: Sequence[Case], predictions: Sequence[Prediction]) -> dict[str, int]:
    """Cells (lengths and load of one cluster) whose predicted order of TPOT over tp is right."""
    cells: dict[tuple[str, ...], list[tuple[str, float, float]]] = {}
    for case, predicted in zip(cases, predictions, strict=True):
        row = case.row
        if not isinstance(predicted, str) and row.get("tpot_ms") and "tpot_ms" in predicted:
            key = (case.cluster.label, row["isl"], row["osl"], row["load"])
            entry = (row["tp"], float(row["tpot_ms"]), predicted["tpot_ms"])
            cells.setdefault(key, []).append(entry)
    several = [cell for cell in cells.values() if len({tp for tp, _, _ in cell}) > 1]
    right = 0
    for cell in several:
        measured = [tp for tp, _, _ in sorted(cell, key=lambda entry: entry[1])]
        right += measured == [tp for tp, _, _ in sorted(cell, key=lambda entry: entry[2])]
    return {"right": right, "cells": len(several)}
