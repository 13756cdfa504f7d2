"""Measured points: rows become cases without their metrics, and errors are counted as they say."""

from __future__ import annotations

import csv
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from bench.names import UncoveredError
from bench.points import cases_of, figures_of
from bench.predictions import predict_all
from bench.runs_csv import case_of, is_scored, parse_where, read_rows
from bench.scoring import COLUMNS, score, tp_orders
from planner.layouts import EXPERT_GROUPS

if TYPE_CHECKING:
    from pathlib import Path

    from bench.runs_csv import Case

ROW = {
    "run_id": "made-up",
    "source": "nobody",
    "hardware": "H100-SXM-80GB",
    "model": "meta-llama/Llama-3.1-8B",
    "quantization": "?",
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
    "spec_decode": "none",
    "scorable": "yes",
    "scorable_reason": "",
    "duplicate_of": "",
    **dict.fromkeys(COLUMNS.values(), ""),
    "tpot_ms": "10",
    "ttft_ms": "40",
}
BLIND = {**ROW, **dict.fromkeys(COLUMNS.values(), "")}


def test_a_prediction_does_not_see_the_measurement() -> None:
    """Another value, or none, in every metric column leaves the simulated metrics as they are."""
    other = {**ROW, "tpot_ms": "99999", "ttft_ms": "0.001"}
    cases = [case_of(row) for row in (ROW, BLIND, other)]
    first, blind, changed = predict_all([(case, None) for case in cases], workers=1)
    assert not isinstance(first, str), first
    assert first == blind == changed


def test_workers_do_not_change_the_answer() -> None:
    """Runs are independent and come back in the order of the rows."""
    rows = [{**ROW, "load": str(load), "num_prompts": "12"} for load in range(1, 11)]
    jobs = [(case_of(row), None) for row in rows]
    assert predict_all(jobs, workers=2) == predict_all(jobs, workers=1)


def test_a_case_keeps_the_settings_of_its_row() -> None:
    """Stated settings go to the engine under its own names; empty ones are flagged."""
    case = case_of({**ROW, "memory_fraction": "", "chunked_prefill": "on"})
    engine = case.scenario.engine
    assert (engine.max_num_seqs, engine.max_num_batched_tokens) == (2, 256)
    assert engine.gpu_memory_utilization is None
    assert engine.enable_chunked_prefill is True
    assert case.defaulted == ("memory_fraction",)
    assert case.plan == "tp1"
    assert case_of(ROW).defaulted == ()


def test_the_engines_own_names() -> None:
    """The same columns mean other settings in other engines."""
    row = {**ROW, "engine": "TensorRT-LLM", "engine_version": "1.0.0rc3", "memory_fraction": "0.8"}
    row |= {"chunked_prefill": "off", "scheduler_policy": "guaranteed_no_evict"}
    engine = case_of(row).scenario.engine
    assert (engine.max_batch_size, engine.max_num_tokens) == (2, 256)
    assert engine.kv_cache_free_gpu_memory_fraction == 0.8
    assert engine.enable_chunked_context is False
    assert engine.capacity_scheduler_policy == "guaranteed_no_evict"
    static = case_of({**row, "arrival": "static_batch", "max_num_batched_tokens": ""})
    assert static.scenario.engine.capacity_scheduler_policy == "static_batch"
    assert static.scenario.engine.max_num_tokens == 2 * (64 + 8)
    sglang = {**ROW, "engine": "SGLang", "engine_version": "0.5.9", "chunked_prefill_size": "64"}
    found = case_of(sglang).scenario.engine
    assert (found.max_running_requests, found.chunked_prefill_size) == (2, 64)
    assert found.max_prefill_tokens == 256


def test_what_is_assumed_depends_on_client_and_engine_alone() -> None:
    """Fixed lengths in a closed loop start prompts one by one in vLLM; other lengths do not."""
    fixed = {**ROW, "input_len_min": "64", "output_len_min": "8"}
    assert case_of(fixed).rules == {"prompts_per_step": 1, "late_results": True}
    assert case_of(ROW).rules == {}
    trtllm = {**fixed, "engine": "trtllm", "engine_version": "1.0.0rc3"}
    assert case_of(trtllm).rules == {}
    assert case_of(trtllm).client.concurrency == 3  # as many seats as requests: one more waits
    assert case_of({**trtllm, "max_num_seqs": "64"}).client.concurrency == 2
    unstated = case_of({**trtllm, "max_num_batched_tokens": ""})
    assert unstated.scenario.engine.max_num_tokens == 2 * 64  # two whole prompts
    assert unstated.defaulted == ("max_num_batched_tokens",)


MIXTURE = {**ROW, "model": "Qwen/Qwen3-30B-A3B", "tp": "4", "engine_version": "0.11.1"}


@pytest.mark.parametrize(
    ("change", "plan", "devices"),
    [
        ({}, "tp4", 4),
        ({"ep": "4"}, "tp4ep4", 4),
        ({"expert_parallel": "on"}, "tp4ep4", 4),
        ({"dp": "2"}, "2xtp4", 8),
        ({"ep": "4", "dp": "2"}, "2xtp4ep4", 8),
        ({"tp": "1", "dp": "4", "ep": "4"}, "tp1dp4ep4", 4),
        ({"tp": "1", "dp": "4", "attention_dp": "on"}, "tp1dp4", 4),
        ({"ep": "2", "pp": "2"}, "tp4pp2ep2", 8),
    ],
)
def test_plans_of_mixtures(change: dict[str, str], plan: str, devices: int) -> None:
    """Columns of one row name one plan; ``dp`` is of attention where experts span its groups."""
    case = case_of({**MIXTURE, **change})
    assert case.plan == plan
    assert case.scenario.cluster.pools[0].devices_per_node == devices


def test_spread_experts_are_simulated_and_what_cannot_be_says_why() -> None:
    """Expert parallelism has a time of its own; a layout of another engine is refused by rule."""
    rows = [MIXTURE, {**MIXTURE, "ep": "4"}, {**MIXTURE, "ep": "2"}]
    cut, whole, partly = predict_all([(case_of(row), None) for row in rows], workers=1)
    assert not isinstance(cut, str), cut
    assert not isinstance(whole, str), whole
    assert cut["tpot_ms"] != whole["tpot_ms"]
    assert partly == EXPERT_GROUPS


def test_requests_seen_at_intervals_wait() -> None:
    """SGLang that looks for requests every 30 steps sees them half of these late on average."""
    row = {**ROW, "engine": "SGLang", "engine_version": "0.5.9", "num_prompts": "40"}
    rows = [row, {**row, "scheduler_recv_interval": "30"}]
    at_once, late = predict_all([(case_of(each), None) for each in rows], workers=1)
    assert not isinstance(at_once, str), at_once
    assert not isinstance(late, str), late
    wait_ms = 15 * at_once["tpot_ms"]
    assert late["ttft_ms"] - at_once["ttft_ms"] == pytest.approx(wait_ms, rel=0.2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"arrival": "session_rate"}, "arrival session_rate"),
        ({"spec_decode": "mtp"}, "speculative decoding"),
        ({"weight_dtype": "int3"}, "precision int3"),
        ({"engine": "LMDeploy"}, "engine LMDeploy has no profile"),
        ({"model": "no/such-model"}, "model no/such-model is not in the catalogue"),
        ({"hardware": "MI300X"}, "device MI300X is not in the catalogue"),
        ({"tp": "many"}, "tp is many"),
        ({"input_len_min": "", "input_len_max": "", "isl": ""}, "input_len unknown"),
    ],
)
def test_what_is_not_modelled_is_uncovered_by_name(change: dict[str, str], reason: str) -> None:
    """A row that cannot be simulated says why, and so does the bench."""
    with pytest.raises(UncoveredError, match=reason):
        case_of({**ROW, **change})
    cases, uncovered = cases_of([ROW, {**ROW, **change}])
    assert len(cases) == 1
    assert [why for _, why in uncovered] == [reason]


def test_a_plan_that_does_not_fit_is_uncovered() -> None:
    """Memory is the planner's own rule, found when the case is run."""
    row = {**ROW, "model": "meta-llama/Llama-3.1-405B"}
    (reason,) = predict_all([(case_of(row), None)], workers=1)
    assert isinstance(reason, str)
    assert "exceed device memory" in reason


def _cases(rows: list[dict[str, str]]) -> list[Case]:
    return [case_of(row) for row in rows]


def test_errors_are_relative_to_the_measurement() -> None:
    """Predictions of 12 and 9 ms against 10 ms are +20 % and -10 %: mean 15, bias 5."""
    predicted: list[Any] = [
        {"tpot_ms": 12.0, "ttft_ms": 40.0},
        {"tpot_ms": 9.0, "ttft_ms": 30.0},
        "does not fit",
    ]
    figures = score(_cases([ROW, ROW, ROW]), predicted)
    assert figures["tpot"]["n"] == 2
    assert figures["tpot"]["mean_abs_pct"] == pytest.approx(15)
    assert figures["tpot"]["bias_pct"] == pytest.approx(5)
    assert figures["ttft"]["bias_pct"] == pytest.approx(-12.5)
    assert figures["power"] == {"n": 0}
    assert figures["slices"]["tp=1"]["tpot"]["n"] == 2
    assert figures["slices"]["kind=dense"]["tpot"]["n"] == 2


def test_clusters_weigh_the_same_however_many_runs_they_have() -> None:
    """Three runs of one cluster with no error and one of another with 40 % are 20 % on average."""
    rows = [ROW, ROW, ROW, {**ROW, "model": "Qwen/Qwen3-8B"}]
    predicted: list[Any] = [{"tpot_ms": 10.0}, {"tpot_ms": 10.0}, {"tpot_ms": 10.0}]
    figures = score(_cases(rows), [*predicted, {"tpot_ms": 14.0}])
    assert figures["tpot"]["mean_abs_pct"] == pytest.approx(10)
    assert figures["cluster_weighted"]["tpot"]["clusters"] == 2
    assert figures["cluster_weighted"]["tpot"]["mean_abs_pct"] == pytest.approx(20)


def test_tp_order_counts_cells_with_several_widths() -> None:
    """Of two cells with two widths each, the one predicted in the measured order is right."""
    cells = [("1", "64", "10"), ("2", "64", "8"), ("1", "65", "10"), ("2", "65", "8")]
    rows = [{**ROW, "tp": tp, "isl": isl, "tpot_ms": tpot} for tp, isl, tpot in cells]
    predicted: list[Any] = [{"tpot_ms": value} for value in (11.0, 9.0, 7.0, 9.0)]
    assert tp_orders(_cases(rows), predicted) == {"right": 1, "cells": 2}


def test_rows_are_left_out_by_their_own_columns_alone() -> None:
    """Not by what they hold: a row that cannot be simulated still counts as uncovered."""
    assert is_scored(ROW)
    assert not is_scored({**ROW, "scorable": "no"})
    assert not is_scored({**ROW, "duplicate_of": "another"})
    figures = figures_of([ROW, {**ROW, "hardware": "MI300X"}], "none", workers=1)
    assert figures["rows"] == {"covered": 1, "uncovered": 1}
    assert figures["uncovered"][0]["reason"] == "device MI300X is not in the catalogue"


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
