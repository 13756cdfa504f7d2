"""The limits that ``trtllm-bench`` derives, on its documented example and by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.io.trtllm_bench import bench_limits
from simulator.plan import BatchingLimits
from simulator.units import GIB
from tests.shapes import LLAMA_8B, LLAMA_70B_FP8, dense

LLAMA_8B_FP8 = replace(dense(32, 4096, 32, 8, 128, 14336, 128256, dtype="fp8"), kv_dtype="fp8")
WEIGHTS = 8_030_261_248  # parameters, one byte each
FREE = int(132.37 * GIB)


def test_documented_example() -> None:
    """Llama-3.1-8B FP8, 128/128 and 132.37 GB free: 8048 requests, batch 4096, 8192 tokens."""
    # 132.37 GiB * 0.95 / (2 * 32 layers * 8 heads * 128 * 256 tokens = 16,777,216) = 8048.1.
    got = bench_limits(LLAMA_8B_FP8, FREE + WEIGHTS, tp=1, input_tokens=128, output_tokens=128)
    assert got == BatchingLimits(4096, 8192)


@pytest.mark.parametrize(
    ("requests", "lengths", "limits"),
    [
        (10, (128, 128), (64, 2048)),  # 10 -> 32, at least 64; 20 tokens, at least 2048
        (100, (128, 128), (128, 2048)),
        (255, (1000, 50), (256, 5632)),  # 255 * 21 = 5355 -> 11 * 512
        (300, (128, 128), (384, 2048)),
        (1025, (128, 384), (1280, 2048)),  # 1025 * 4 / 3 = 1367
        (3000, (512, 256), (3072, 9216)),  # 3000 * 3 = 9000 -> 9 * 1024
        (9999, (2048, 128), (4096, 32_768)),  # 4096 * 17 = 69,632, at most 32,768
    ],
)
def test_rounding(requests: int, lengths: tuple[int, int], limits: tuple[int, int]) -> None:
    """Steps of 32, 128 and 256 sequences; of 256, 512 and 1024 tokens."""
    per_request = 65_536 * sum(lengths)
    memory = WEIGHTS + int((requests + 0.5) * per_request / 0.95)
    got = bench_limits(
        LLAMA_8B_FP8, memory, tp=1, input_tokens=lengths[0], output_tokens=lengths[1]
    )
    assert got == BatchingLimits(*limits)


def test_heads_are_replicated_and_stages_share_requests() -> None:
    """16 ranks keep 16 copies of 8 heads; two stages halve the batch."""
    wide = bench_limits(LLAMA_8B, 20 * GIB, tp=16, input_tokens=4096, output_tokens=4096)
    # (320 GiB - 2 * 8.03e9) * 0.95 / (2 * 32 * 16 * 128 * 2 bytes * 8192 tokens) = 144.8 -> 160.
    assert wide == BatchingLimits(160, 2048)
    staged = bench_limits(LLAMA_8B, 40 * GIB, tp=8, pp=2, input_tokens=4096, output_tokens=4096)
    # (640 GiB - 16.06e9) * 0.95 / (2 * 32 * 8 * 128 * 2 * 8192) = 554 requests; / 2 = 277 -> 384.
    assert staged == BatchingLimits(384, 2048)


def test_whole_prompts_widen_the_budget() -> None:
    """The PyTorch backend without chunked context holds the longest prompt beside a full batch."""
    got = bench_limits(
        LLAMA_8B_FP8,
        FREE + WEIGHTS,
        tp=1,
        input_tokens=128,
        output_tokens=128,
        longest_prompt_tokens=5000,
    )
    assert got == BatchingLimits(4096, 9096)


def test_other_weights_and_too_little_memory() -> None:
    """Other dtypes get the engine's defaults; weights that do not fit are refused."""
    int4 = replace(LLAMA_8B, weight_dtype="int4")
    assert bench_limits(int4, FREE, tp=1, input_tokens=128, output_tokens=128) == BatchingLimits(
        2048, 8192
    )
    with pytest.raises(ValueError, match="weights do not fit on 2 devices"):
        bench_limits(LLAMA_70B_FP8, 30 * GIB, tp=2, input_tokens=128, output_tokens=128)


def test_the_size_of_the_checkpoint_replaces_the_parameters() -> None:
    """Releases of 2026: the same as if the weights had that size."""
    given = bench_limits(
        LLAMA_8B, 16 * GIB, tp=1, input_tokens=900, output_tokens=100, checkpoint_bytes=WEIGHTS
    )
    # 16 * 1024^3 - 8.03e9 = 9,149,607,936; * 0.95 / (131,072 * 1000) = 66.3 -> 96.
    assert given == BatchingLimits(96, 2048)
