"""Serving runs as files state them: whatever the suffix, every run or the reason against it."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

import numpy as np
import pytest

from bench.serving_files import read_contents, read_folder
from planner.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

RUN = {
    "engine": "vLLM",
    "hf": "org/Model-70B (base)",
    "workload": "chat",
    "rate": "05",
    "plan": "2DP4TP",
    "status": "ok",
}
SERVER = {
    "kind": "server",
    "engine": "vLLM",
    "engine_version": ">=0.6.0 (dockerfile)",
    "model_hf": "org/Model-70B (base)",
    "weights": "bf16 (default)",
    "kv_cache": "bf16 (auto)",
    "gpu": "H100-SXM-80GB",
    "plan": "2DP4TP",
    "tp": "4",
    "ep": "1",
    "workload": "chat",
    "rate_tag": "05",
    "max_model_len": "model default (131072)",
    "gpu_mem_util": "0.97",
    "custom_all_reduce": "enabled",
    "other_flags": "",
    "per_request_file": "requests_h100/a.csv",
    "n_requests": "2",
    "served_output_tokens": "12",
    "mean_ttft_s": "0.1",
    "mean_tpot_s": "0.02",
    "mean_e2e_s": "0.2",
    "status": "ok",
}
CARD = {
    "run": "CARD__Model",
    "hardware": "CARD",
    "model": "org/Model",
    "engine": "vLLM 0.19.0",
    "tp": "1",
    "max_num_seqs": "256",
    "max_num_batched_tokens": "2048",
    "max_model_len": "",
    "gpu_memory_utilization": "not recorded",
    "num_gpu_blocks": "2588",
    "block_size": "default",
    "prefix_caching": "True",
}


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Rows of equal keys as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def shared_folder(
    folder: Path, servers: Sequence[Mapping[str, str]], run: Mapping[str, str] = RUN
) -> None:
    """A folder with one run of several servers."""
    write(folder / "serving_runs_h100_exam.csv", [run])
    write(folder / "serving_runs_h100_exam_detail.csv", servers)
    served = [
        {"arrival_ns": 2_000_000_000, "input_tokens": 5, "output_tokens": 0},
        {"arrival_ns": 1_000_000_000, "input_tokens": 7, "output_tokens": 12},
    ]
    write(folder / "requests_h100/a.csv", served)


def test_servers_of_a_run_are_pooled(tmp_path: Path) -> None:
    """TTFT and E2E count by requests, TPOT by tokens after the first."""
    other = {**SERVER, "n_requests": "6", "served_output_tokens": "36"}
    other.update(mean_ttft_s="0.5", mean_tpot_s="0.03", mean_e2e_s="1.0")
    shared_folder(tmp_path, [SERVER, other, {**SERVER, "kind": "dp_combined"}])
    (run,) = read_folder(tmp_path).runs
    assert len(run.servers) == 2
    assert run.measured_s["ttft"] == pytest.approx((2 * 0.1 + 6 * 0.5) / 8)
    assert run.measured_s["e2e"] == pytest.approx((2 * 0.2 + 6 * 1.0) / 8)
    # 10 and 30 tokens follow a first one.
    assert run.measured_s["tpot"] == pytest.approx((10 * 0.02 + 30 * 0.03) / 40)
    assert (run.engine_version, run.model, run.weights) == ("0.6.0", "org/Model-70B", "bf16")


def test_requests_are_sorted_and_a_silent_one_took_a_token(tmp_path: Path) -> None:
    """Rows may come in any order; a request without output still ended with a token."""
    shared_folder(tmp_path, [{**SERVER, "other_flags": "--disable-cuda-graph --x"}])
    (run,) = read_folder(tmp_path).runs
    (server,) = run.servers
    assert server.requests.arrival_s.tolist() == [1.0, 2.0]
    assert server.requests.input_tokens.tolist() == [7, 5]
    assert server.requests.output_tokens.tolist() == [12, 1]
    assert server.max_model_len is None
    assert server.memory_fraction == 0.97
    assert not server.cuda_graphs


def test_a_metric_that_a_server_lacks_is_not_a_metric_of_the_run(tmp_path: Path) -> None:
    """SGLang rows state E2E only."""
    shared_folder(tmp_path, [{**SERVER, "mean_ttft_s": "", "mean_tpot_s": ""}])
    (run,) = read_folder(tmp_path).runs
    assert set(run.measured_s) == {"e2e"}


@pytest.mark.parametrize(
    ("run", "server", "reason"),
    [
        ({**RUN, "status": "crashed"}, SERVER, "status crashed"),
        (RUN, {**SERVER, "status": "empty"}, "status empty"),
        (RUN, {**SERVER, "plan": "8TP"}, "no row of the detail file"),
    ],
)
def test_runs_that_cannot_be_judged_are_named(
    tmp_path: Path, run: dict[str, str], server: dict[str, str], reason: str
) -> None:
    """A bad status or missing servers leave a run out by name."""
    shared_folder(tmp_path, [server], run)
    found = read_folder(tmp_path)
    assert found.runs == []
    ((name, why),) = found.skipped
    assert "Model-70B" in name
    assert reason in why


def test_a_card_is_timed_by_the_engine(tmp_path: Path) -> None:
    """The engine's clock starts when a request is queued; one token has no TPOT."""
    write(tmp_path / "serving_runs_rtx_exam.csv", [CARD])
    times = {"input_tokens": 5, "queued_s": 0.5, "ttft_ms": 100}
    rows = [
        {**times, "output_tokens": 1, "tpot_ms": 0, "e2e_ms": 100, "finish_s": 0.6},
        {**times, "output_tokens": 3, "tpot_ms": 50, "e2e_ms": 200, "finish_s": 0.7},
    ]
    write(tmp_path / "requests_rtx/CARD__Model.csv", rows)
    (run,) = read_folder(tmp_path).runs
    expected = {"ttft": 0.1, "tpot": 0.05, "e2e": 0.15, "makespan": 0.2}
    assert run.measured_s == pytest.approx(expected)
    (server,) = run.servers
    assert (server.num_blocks, server.block_tokens, server.prefix_caching) == (2588, None, True)
    assert not run.pooled_tpot


def test_attention_data_parallel_cards_are_named(tmp_path: Path) -> None:
    """Cards in attention data parallel are left out by name."""
    write(tmp_path / "serving_runs_rtx_exam.csv", [{**CARD, "dp": "2"}])
    assert read_folder(tmp_path).skipped == [("CARD__Model", "attention data parallel 2")]


def test_bad_folders_end_in_one_line(tmp_path: Path) -> None:
    """An empty folder, a missing column or file and a word for a number are input errors."""
    with pytest.raises(InputError, match="at least one"):
        read_folder(tmp_path)
    shared_folder(tmp_path, [{k: v for k, v in SERVER.items() if k != "gpu"}])
    with pytest.raises(InputError, match="gpu"):
        read_folder(tmp_path)
    shared_folder(tmp_path, [SERVER])
    write(
        tmp_path / "requests_h100/a.csv",
        [{"arrival_ns": "soon", "input_tokens": 5, "output_tokens": 1}],
    )
    with pytest.raises(InputError, match="arrival_ns"):
        read_folder(tmp_path)
    (tmp_path / "requests_h100/a.csv").unlink()
    with pytest.raises(InputError, match="must exist"):
        read_folder(tmp_path)


def test_contents_are_full_prompt_blocks(tmp_path: Path) -> None:
    """Ids after the prompt's full blocks belong to the output."""
    row = {"input_tokens": 40, "output_tokens": 9, "input_full_blocks": 2}
    row["block16_hash_ids_input_then_output"] = "7 8 9"  # type: ignore[assignment]
    write(tmp_path / "sharegpt_block_hashes/any.csv", [row])
    ((prompts, outputs, (blocks,)),) = read_contents(tmp_path)
    assert (prompts.tolist(), outputs.tolist(), blocks.tolist()) == ([40], [9], [7, 8])
    assert read_contents(None) == []
    assert np.issubdtype(blocks.dtype, np.int64)
