"""Honest measurement: small changes of a model's shape make small changes of predictions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import pytest

from planner.api import simulate
from planner.io.models import catalogue
from planner.scenario import Scenario

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MOST: Final = 3.0
"""A prediction may move by at most so many times the relative change of one width: 3 % for 1 %."""

LARGEST_STEP: Final = 0.032
"""Widths whose next value that the plan can split is farther away than this are left out:
heads, few experts. One layer of 32 is the largest step taken."""

SERVED = [
    ("Qwen/Qwen3-32B", "H100-SXM-80GB", 4),
    ("meta-llama/Llama-3.1-8B", "A100-SXM4-80GB", 1),
    ("Qwen/Qwen3-30B-A3B", "H200-SXM-141GB", 2),
    ("openai/gpt-oss-120b", "H100-SXM-80GB", 4),
    ("deepseek-ai/DeepSeek-V3", "B200-SXM-180GB", 8),
    ("Qwen/Qwen3-Next-80B-A3B-Instruct", "H200-SXM-141GB", 4),
]
"""Dense, mixture, latent and recurrent models with the plan they are moved on."""

SPLIT_WIDTHS = ("intermediate_size", "moe_intermediate_size", "hidden_size")
"""Widths that ranks share out, in whole 32-byte rows of 16-bit numbers."""

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
OTHER_WIDTHS = ("num_hidden_layers", "vocab_size", "kv_lora_rank", "q_lora_rank")
HEAD_WIDTHS = ("head_dim", "v_head_dim", "qk_nope_head_dim", "linear_value_head_dim")


def latencies(folder: Path, config: dict[str, Any], device: str, tp: int) -> tuple[float, float]:
    """Mean TTFT and TPOT, ms, of 24 requests, eight at a time."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    data = {
        "schema_version": 1,
        "model": {"config": str(folder / "config.json"), "max_model_len": 1024},
        "cluster": {"pools": [{"device": device, "nodes": 1, "devices_per_node": 8}]},
        "engine": {
            "name": "vllm",
            "version": "0.24.0",
            "max_num_seqs": 64,
            "max_num_batched_tokens": 1024,
        },
        "workload": {
            "input_tokens": {"min": 256, "max": 512},
            "output_tokens": {"min": 32, "max": 64},
            "num_requests": 24,
            "concurrency": 8,
        },
        "objective": {"minimize": "mean_e2e"},
        "search": {"space": {"tp": [tp], "replicas": [1]}},
    }
    metrics = simulate(Scenario.model_validate(data), f"tp{tp}").metrics
    return metrics["mean_ttft_ms"], metrics["mean_tpot_ms"]


def moved(config: dict[str, Any], tp: int) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Configs with one width moved up or down by about 1 %, and by how much exactly."""
    for name in (*SPLIT_WIDTHS, *EXPERT_COUNTS, *OTHER_WIDTHS, *HEAD_WIDTHS):
        is_fp8_split = name in SPLIT_WIDTHS and "quantization_config" in config
        if name not in config or (is_fp8_split and "weight_block_size" in str(config)):
            continue  # blocks of 128 per rank leave no step near 1 %
        unit = 16 * tp if name in SPLIT_WIDTHS else tp if name in EXPERT_COUNTS else 1
        if name == "hidden_size" and "head_dim" not in config:
            unit = config["num_attention_heads"] * 2  # heads share it, in even widths
        size = max(unit, round(0.01 * config[name] / unit) * unit)
        for step in (size, -size):
            if abs(step) > LARGEST_STEP * config[name]:
                continue
            other = {**config, name: config[name] + step}
            if name == "num_hidden_layers" and "layer_types" in config:
                other["layer_types"] = (config["layer_types"] * 2)[: other[name]]
            yield name, step / config[name], other


@pytest.mark.parametrize(("model", "device", "tp"), SERVED)
def test_a_width_moved_by_one_percent_moves_no_prediction_by_three(
    model: str, device: str, tp: int, tmp_path: Path
) -> None:
    """Mean TTFT and TPOT move by at most three times the relative change of any one width.

    Each width goes up and down by the step nearest to 1 % that keeps whole shards (one layer, one
    expert per rank, 16 elements per rank). Measured tables are interpolated, so there are no
    kernel tiles to make an exception for: the largest ratio seen was 1.05.
    """
    entry = catalogue.find(model)
    assert entry is not None
    before = latencies(tmp_path, entry["config"], device, tp)
    names = set()
    for name, step, config in moved(entry["config"], tp):
        names.add(name)
        after = latencies(tmp_path, config, device, tp)
        for metric, old, new in zip(("TTFT", "TPOT"), before, after, strict=True):
            assert abs(new / old - 1) <= MOST * abs(step), (metric, name, step)
    assert len(names) >= 4
