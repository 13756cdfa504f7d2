"""Launch commands: every engine's own flags for what the plan fixes."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from planner.export.flags import launch_commands
from planner.resolve import resolve
from planner.scenario import Scenario
from simulator.plan import BatchingLimits, Plan, Shape
from tests.problems import LLAMA_8B, LLAMA_70B, mapping, pool

LIMITS = BatchingLimits(8, 512)


def commands(plan: Plan, engine: dict[str, Any], **sections: Any) -> list[list[str]]:
    """The words of each command."""
    problem = resolve(Scenario.model_validate(mapping(engine=engine, **sections)))
    return [shlex.split(command) for command in launch_commands(problem, plan)]


def flags(words: list[str]) -> dict[str, str]:
    """Flags with their values; a flag without one has an empty value."""
    found: dict[str, str] = {}
    for i, word in enumerate(words):
        if word.startswith("--"):
            follows = words[i + 1] if i + 1 < len(words) else "--"
            found[word] = "" if follows.startswith("--") else follows
    return found


def test_vllm() -> None:
    """Limits and fraction always, switches where the scenario sets them."""
    plan = Plan(1, Shape(2), LIMITS)
    (words,) = commands(plan, {"name": "vllm", "version": "0.24.0"})
    assert words[:3] == ["vllm", "serve", LLAMA_8B]
    usual = {
        "--tensor-parallel-size": "2",
        "--max-num-seqs": "8",
        "--max-num-batched-tokens": "512",
        "--max-model-len": "1024",
        "--gpu-memory-utilization": "0.92",
    }
    assert flags(words) == usual
    engine = {
        "name": "vllm",
        "version": "0.24.0",
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        "async_scheduling": False,
    }
    (words,) = commands(plan, engine)
    switches = (
        "--no-enable-prefix-caching",
        "--no-enable-chunked-prefill",
        "--no-async-scheduling",
    )
    assert flags(words) == {**usual, **dict.fromkeys(switches, "")}


def test_v0_takes_a_value_for_chunked_prefill() -> None:
    """0.6.0 knows no ``--no-`` form."""
    engine = {"name": "vllm", "version": "0.6.0", "enable_chunked_prefill": True}
    (words,) = commands(Plan(1, Shape(1), LIMITS), engine)
    assert flags(words)["--enable-chunked-prefill"] == "True"


def test_sglang() -> None:
    """The fraction that its formula gives is spelled out."""
    (words,) = commands(Plan(1, Shape(2), LIMITS), {"name": "sglang", "version": "0.5.9"})
    assert words[:3] == ["python", "-m", "sglang.launch_server"]
    usual = {
        "--model-path": LLAMA_8B,
        "--tp-size": "2",
        "--max-running-requests": "8",
        "--chunked-prefill-size": "512",
        "--context-length": "1024",
        # The reserve is 512 + 1.5 * 2048 + 2 * 256 + 128 * 2 MiB, less than 10 GiB: 1 - 10 / 79.22.
        "--mem-fraction-static": "0.874",
    }
    assert flags(words) == usual


def test_sglang_settings() -> None:
    """Everything that a scenario can fix comes back as SGLang's flag."""
    engine = {
        "name": "sglang",
        "version": "0.5.9",
        "chunked_prefill_size": -1,
        "max_prefill_tokens": 9000,
        "mem_fraction_static": 0.7,
        "page_size": 16,
        "num_gpu_blocks": 100,
        "enable_mixed_chunk": True,
        "schedule_conservativeness": 0.3,
        "disable_radix_cache": True,
        "async_scheduling": False,
    }
    model = {"config": LLAMA_8B, "max_model_len": 1024, "kv_cache_dtype": "fp8"}
    (words,) = commands(Plan(1, Shape(1), BatchingLimits(8, 16_384)), engine, model=model)
    assert flags(words) == {
        "--model-path": LLAMA_8B,
        "--tp-size": "1",
        "--max-running-requests": "8",
        "--chunked-prefill-size": "-1",
        "--context-length": "1024",
        "--mem-fraction-static": "0.7",
        "--page-size": "16",
        "--max-total-tokens": "1600",
        "--max-prefill-tokens": "9000",
        "--schedule-conservativeness": "0.3",
        "--enable-mixed-chunk": "",
        "--disable-radix-cache": "",
        "--disable-overlap-schedule": "",
        "--kv-cache-dtype": "fp8_e4m3",
    }


def test_trtllm() -> None:
    """No file of options where all of them are the engine's defaults."""
    (words,) = commands(Plan(1, Shape(2), LIMITS), {"name": "trtllm", "version": "1.0.0rc3"})
    assert words[:2] == ["trtllm-serve", LLAMA_8B]
    assert flags(words) == {
        "--tp_size": "2",
        "--max_batch_size": "8",
        "--max_num_tokens": "512",
        "--max_seq_len": "1024",
        "--kv_cache_free_gpu_memory_fraction": "0.9",
    }
    assert commands(Plan(1, Shape(2), LIMITS), {"name": "trtllm", "version": "0.14.0"}) == []


def test_trtllm_options_without_a_flag() -> None:
    """They go into a file first; each replica gets its own devices and port."""
    engine = {
        "name": "trtllm",
        "version": "1.0.0rc3",
        "tokens_per_block": 64,
        "num_gpu_blocks": 100,
        "enable_block_reuse": False,
        "enable_chunked_context": True,
        "capacity_scheduler_policy": "max_utilization",
        "async_scheduling": False,
    }
    both = commands(Plan(2, Shape(1), LIMITS), engine)
    for replica, words in enumerate(both):
        assert words[0] == "echo"
        assert words[2:7] == [
            ">",
            "trtllm-options.yaml",
            "&&",
            f"CUDA_VISIBLE_DEVICES={replica}",
            "trtllm-serve",
        ]
        assert json.loads(words[1]) == {
            "kv_cache_config": {
                "tokens_per_block": 64,
                "max_tokens": 6400,
                "enable_block_reuse": False,
            },
            "enable_chunked_prefill": True,
            "disable_overlap_scheduler": True,
            "scheduler_config": {"capacity_scheduler_policy": "MAX_UTILIZATION"},
        }
        assert flags(words)["--extra_llm_api_options"] == "trtllm-options.yaml"
        assert flags(words)["--port"] == str(8000 + replica)


@pytest.mark.parametrize(("engine", "first_port"), [("vllm", 8000), ("sglang", 30_000)])
def test_replicas_of_a_node(engine: str, first_port: int) -> None:
    """Each engine counts up from its own default port."""
    version = {"vllm": "0.24.0", "sglang": "0.5.14"}[engine]
    both = commands(Plan(2, Shape(1), LIMITS), {"name": engine, "version": version})
    assert [words[0] for words in both] == ["CUDA_VISIBLE_DEVICES=0", "CUDA_VISIBLE_DEVICES=1"]
    ports = [flags(words)["--port"] for words in both]
    assert ports == [str(first_port), str(first_port + 1)]


def test_sglang_over_nodes() -> None:
    """One command per node, which differ in their rank alone."""
    cluster = pool(8, nodes=2)
    cluster["pools"][0]["interconnect"] = "ib_400g"
    both = commands(
        Plan(1, Shape(16), LIMITS),
        {"name": "sglang", "version": "0.5.14"},
        cluster=cluster,
        model={"config": LLAMA_70B, "max_model_len": 1024},
        search=None,
    )
    for rank, words in enumerate(both):
        got = flags(words)
        assert (got["--nnodes"], got["--node-rank"]) == ("2", str(rank))
        assert got["--dist-init-addr"] == "$HEAD:5000"
    assert len(both) == 2
