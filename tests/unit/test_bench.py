"""Benchmarks: they read no answer, and count and compare as they say."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from bench.figures import falls, flatten
from bench.points import COLUMNS, predict, score, tp_orders
from bench.runs_csv import UncoveredError, case_of, parse_where, read_rows

if TYPE_CHECKING:
    from pathlib import Path

ROW = {
    "run_id": "made-up",
    "hardware": "H100-SXM-80GB",
    "model": "meta-llama/Llama-3.1-8B",
    "engine": "vllm",
    "engine_version": "0.10.2",
    "tp": "1",
    "pp": "1",
    "dp": "1",
    "ep": "1",
    "isl": "64",
    "osl": "8",
    "load": "2",
    "arrival": "closed_loop_burst",
    "num_prompts": "6",
    "input_len_min": "48",
    "input_len_max": "64",
    "output_len_min": "6",
    "output_len_max": "8",
    "weight_dtype": "bf16",
    "kv_cache_dtype": "bf16",
    "max_num_seqs": "2",
    "max_num_batched_tokens": "256",
    "max_model_len": "128",
    "memory_fraction": "0.9",
    "block_size": "",
    "spec_decode": "none",
    "scorable": "yes",
    "scorable_reason": "",
    "duplicate_of": "",
    **{column: "" for column, _ in COLUMNS.values()},
    "tpot_ms": "10",
    "ttft_ms": "40",
}


def test_a_prediction_does_not_see_the_measurement() -> None:
    """Another value, or none, in every metric column leaves the simulated metrics as they are."""
    blind = {**ROW, **{column: "" for column, _ in COLUMNS.values()}}
    other = {**ROW, "tpot_ms": "99999", "ttft_ms": "0.001"}
    first, _ = predict([ROW], None, None)
    assert predict([blind], None, None)[0] == first
    assert predict([other], None, None)[0] == first


def test_errors_are_relative_to_the_measurement() -> None:
    """Predictions of 12 and 9 ms against 10 ms are +20 % and -10 %: mean 15, bias 5."""
    predicted = [
        {"mean_tpot_ms": 12.0, "mean_ttft_ms": 40.0},
        {"mean_tpot_ms": 9.0, "mean_ttft_ms": 30.0},
    ]
    figures = score([ROW, ROW], predicted)
    assert figures["tpot"]["n"] == 2
    assert figures["tpot"]["mean_abs_pct"] == pytest.approx(15)
    assert figures["tpot"]["bias_pct"] == pytest.approx(5)
    assert figures["ttft"]["bias_pct"] == pytest.approx(-12.5)
    assert figures["slices"]["tp=1"]["tpot"]["n"] == 2


def test_an_uncovered_row_is_counted_with_its_reason() -> None:
    """A row of an engine that is not modelled has no prediction and says why."""
    metrics, reasons = predict([{**ROW, "engine": "sglang"}], None, None)
    assert metrics == [None]
    assert reasons == {"engine sglang": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"arrival": "all_at_once"}, "arrival all_at_once"),
        ({"pp": "2"}, "pipeline, data or expert parallel"),
        ({"spec_decode": "mtp"}, "speculative decoding"),
        ({"weight_dtype": "nvfp4"}, "weight dtype nvfp4"),
        ({"max_num_seqs": ""}, "max_num_seqs unknown"),
        ({"engine_version": "0.3.0"}, "engine.version"),
        ({"model": "no/such-model"}, "model.config"),
    ],
)
def test_what_is_not_modelled_is_uncovered(change: dict[str, str], reason: str) -> None:
    """Settings that the simulator would ignore leave the row out instead."""
    row = {**ROW, **change}
    if "engine" in reason or "model" in reason:
        assert reason in next(iter(predict([row], None, None)[1]))
        return
    with pytest.raises(UncoveredError, match=reason):
        case_of(row)


def test_tp_order_counts_cells_with_several_widths() -> None:
    """Of two cells with two widths each, the one predicted in the measured order is right."""
    cells = [("1", "64", "10"), ("2", "64", "8"), ("1", "65", "10"), ("2", "65", "8")]
    rows = [{**ROW, "tp": tp, "isl": isl, "tpot_ms": tpot} for tp, isl, tpot in cells]
    metrics = [{"mean_tpot_ms": value} for value in (11.0, 9.0, 7.0, 9.0)]
    assert tp_orders(rows, metrics) == (1, 2)


def test_where_selects_rows(tmp_path: Path) -> None:
    """Only rows whose columns equal every given value are read."""
    path = tmp_path / "runs.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROW)
        writer.writeheader()
        writer.writerows([ROW, {**ROW, "tp": "2"}, {**ROW, "engine": "sglang"}])
    assert len(read_rows(path, parse_where("engine=vllm"))) == 2
    assert [r["tp"] for r in read_rows(path, parse_where("engine=vllm,tp=2"))] == ["2"]


def test_points_skips_cleanly_without_data(tmp_path: Path) -> None:
    """An absent runs file ends with one line that names it, not a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.points", str(tmp_path / "none.csv")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "none.csv: no such file" in done.stderr


def test_a_figure_that_falls_beyond_its_tolerance_is_named() -> None:
    """An error that grows by 0.3 points falls, one of 0.1 does not, and times never do."""
    old = flatten({"tpot": {"mean_abs_pct": 3.0}, "ttft": {"mean_abs_pct": 5.0}, "seconds": 1.0})
    new = flatten({"tpot": {"mean_abs_pct": 3.3}, "ttft": {"mean_abs_pct": 5.1}, "seconds": 9.0})
    assert falls(old, new) == ["tpot.mean_abs_pct"]


def test_lists_of_figures_go_by_name() -> None:
    """Rows of a table are told apart by their scenario, so that order does not matter."""
    rows = [{"scenario": "a", "proved": True}, {"scenario": "b", "proved": False}]
    assert flatten(json.loads(json.dumps(rows))) == {"[a].proved": 1.0, "[b].proved": 0.0}
