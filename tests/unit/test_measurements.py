"""Output of benchmark clients as measured runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from planner.errors import InputError
from planner.io.measurements import Lengths, read_measurements, spread

if TYPE_CHECKING:
    from pathlib import Path

_VLLM = {
    "backend": "vllm",
    "num_prompts": 3,
    "request_rate": "inf",
    "max_concurrency": 2,
    "burstiness": 1.0,
    "completed": 3,
    "total_input_tokens": 3072,
    "total_output_tokens": 300,
    "output_throughput": 90.0,
    "mean_ttft_ms": 120.5,
    "mean_tpot_ms": 11.25,
}


def _stat(mean: float, low: float, high: float) -> dict[str, Any]:
    return {"successful": {"mean": mean, "min": low, "max": high, "count": 40}}


_GUIDELLM = {
    "benchmarks": [
        {
            "config": {"strategy": {"type_": "concurrent", "streams": 8}},
            "metrics": {
                "request_totals": {"successful": 40, "total": 41},
                "prompt_token_count": _stat(900, 800, 1000),
                "output_token_count": _stat(128, 128, 128),
                "time_to_first_token_ms": _stat(80.0, 1, 2),
                "inter_token_latency_ms": _stat(9.0, 1, 2),
                "time_per_output_token_ms": _stat(9.6, 1, 2),
                "request_latency": _stat(1.2, 1, 2),
            },
        }
    ]
}

_AIPERF = {
    "schema_version": "1.4",
    "input_config": {"loadgen": {"concurrency": 16}},
    "request_count": {"unit": "requests", "avg": 160},
    "input_sequence_length": {"avg": 1024, "min": 1024, "max": 1024},
    "output_sequence_length": {"avg": 100, "min": 20, "max": 500},
    "time_to_first_token": {"unit": "ms", "avg": 99.0},
    "inter_token_latency": {"unit": "ms", "avg": 12.0},
}


def _file(folder: Path, data: object, name: str = "run.json") -> str:
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return str(path)


def test_vllm(tmp_path: Path) -> None:
    """Vllm."""
    (run,) = read_measurements(_file(tmp_path, _VLLM)).runs
    assert (run.concurrency, run.request_rate, run.num_requests) == (2, 0.0, 3)
    assert run.prompt == Lengths(1024, 1024)
    assert run.metrics == {
        "mean_tpot_ms": 11.25,
        "mean_ttft_ms": 120.5,
        "output_throughput": 90.0,
    }
    assert "--save-detailed" in run.notes[0]


def test_vllm_detailed_keeps_every_length(tmp_path: Path) -> None:
    """Vllm detailed keeps every length."""
    detailed = {**_VLLM, "input_lens": [1000, 1024, 1048], "output_lens": [90, 100, 110]}
    (run,) = read_measurements(_file(tmp_path, detailed)).runs
    assert run.prompt == Lengths(1000, 1048, (1000, 1024, 1048))
    assert run.notes == ()


def test_vllm_open_loop(tmp_path: Path) -> None:
    """Vllm open loop."""
    open_loop = {**_VLLM, "request_rate": 2.5, "max_concurrency": None}
    (run,) = read_measurements(_file(tmp_path, open_loop)).runs
    assert (run.concurrency, run.request_rate) == (0, 2.5)


def test_guidellm_counts_tpot_without_the_first_token(tmp_path: Path) -> None:
    """Guidellm counts tpot without the first token."""
    (run,) = read_measurements(_file(tmp_path, _GUIDELLM)).runs
    assert run.metrics["mean_tpot_ms"] == 9.0
    assert run.metrics["mean_e2el_ms"] == pytest.approx(1200.0)
    assert (run.concurrency, run.num_requests) == (8, 40)
    assert run.prompt == Lengths(800, 1000)


def test_aiperf(tmp_path: Path) -> None:
    """Aiperf."""
    (run,) = read_measurements(_file(tmp_path, _AIPERF)).runs
    assert (run.concurrency, run.num_requests) == (16, 160)
    assert run.metrics == {"mean_ttft_ms": 99.0, "mean_tpot_ms": 12.0}
    assert run.output == Lengths(100, 100)  # skewed: no even spread


def test_genai_perf_states_its_load_elsewhere(tmp_path: Path) -> None:
    """Genai perf states its load elsewhere."""
    own = {**_AIPERF, "input_config": {"perf_analyzer": {"stimulus": {"concurrency": 4}}}}
    (run,) = read_measurements(_file(tmp_path, own)).runs
    assert run.concurrency == 4


def test_csv(tmp_path: Path) -> None:
    """Csv."""
    text = (
        "plan,concurrency,num_prompts,input_len_min,input_len_max,output_len,mean_tpot_ms\n"
        "tp2,8,80,800,1000,128,9.5\ntp2,16,160,800,1000,128,11\n"
    )
    runs = read_measurements(_file(tmp_path, text, "runs.csv")).runs
    assert [run.concurrency for run in runs] == [8, 16]
    assert runs[0].plan == "tp2"
    assert runs[1].prompt == Lengths(800, 1000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("concurency,num_prompts\n1,2\n", "did you mean 'concurrency'"),
        ("concurrency,num_prompts,input_len,output_len\n1,2,3,4\n", "none of the metrics"),
        ("concurrency,input_len,output_len,mean_tpot_ms\n1,3,4,5\n", "num_prompts: is missing"),
        (
            "concurrency,num_prompts,input_len,output_len,mean_tpot_ms\n1,2,3,4,fast\n",
            "'fast' must be a number",
        ),
        ("concurrency,num_prompts\n", "holds no measured run"),
        ('{"hello": 1}', "is no benchmark output known here"),
        ('{"mean_ttft_ms": 1', "is not JSON"),
        (json.dumps({**_VLLM, "completed": None, "num_prompts": None}), "completed: is missing"),
        (json.dumps({**_VLLM, "request_rate": 2.0}), "limits an open loop"),
        (json.dumps({**_VLLM, "mean_tpot_ms": "x"}), "'x' must be a number"),
        (json.dumps({**_VLLM, "mean_tpot_ms": -1}), "must be greater than 0"),
    ],
)
def test_bad_files_end_in_one_line(tmp_path: Path, data: str, message: str) -> None:
    """Bad files end in one line."""
    with pytest.raises(InputError) as error:
        read_measurements(_file(tmp_path, data))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_spread_needs_a_centred_range() -> None:
    """Spread needs a centred range."""
    assert spread(900, 800, 1000) == Lengths(800, 1000)
    assert spread(300, 100, 2000) == Lengths(300, 300)
