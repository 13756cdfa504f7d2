"""What a row of a source table means, and how the grids made of it are coded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planner.io.kernel_format import FAMILIES, STEP_TIME_S, STEPS, decode
from profiles.distil import collectives, families, latent, records
from profiles.distil.encode import encode, steps
from profiles.distil.systems import TARGETS

BY_NAME = {(target.folder, target.engine): target for target in TARGETS}
H100 = BY_NAME["h100_sxm", "vllm"]
MAX_RELATIVE_ERROR = 5.1e-4  # half a step of 0.1 %, stated in the metadata beside the arrays


@pytest.mark.parametrize("shape", [(400,), (40, 10), (5, 8, 10), (2, 4, 5, 10)])
def test_coding_keeps_latencies_within_half_a_step(shape: tuple[int, ...]) -> None:
    """Noise of a factor e either way, far jumps and gaps survive to within 0.05 %."""
    random = np.random.default_rng(0)
    grids = [1e-3 * np.exp(random.normal(size=shape)) for _ in range(2)]
    grids[0][random.random(shape) < 0.3] = np.nan
    grids[1].flat[:2] = 1e-6, 5.0
    arrays = encode(grids)
    decoded = decode([shape, shape], arrays["missing"], arrays["low"], arrays["high"])
    for before, after in zip(grids, decoded, strict=True):
        np.testing.assert_array_equal(np.isnan(before), np.isnan(after))
        known = ~np.isnan(before)
        assert np.abs(after[known] / before[known] - 1).max() < MAX_RELATIVE_ERROR


def test_smooth_latencies_take_one_byte_each() -> None:
    """Inside a power law in two variables every high byte is 0, which deflate makes nothing of."""
    m, n = np.meshgrid(2.0 ** np.arange(8), 2.0 ** np.arange(9), indexing="ij")
    high = encode([1e-6 * m**0.7 * n])["high"]
    # The first cell of a row or column has one neighbour only, so the slope itself is stored.
    assert np.count_nonzero(high.reshape(8, 9)[1:, 1:]) == 0


def test_a_latency_out_of_range_is_refused() -> None:
    """Neither a time below the first step nor one beyond the last can be written."""
    for time_s in (0.5e-9, STEP_TIME_S[STEPS - 1] * 1.01):
        with pytest.raises(ValueError, match="must lie between"):
            steps(np.array([time_s]))
    with pytest.raises(ValueError, match="moe: a latency is not above 0"):
        records.grids({"time_s": np.array([1.0, 0.0])}, "moe", [])


def test_dense_keeps_the_fastest_of_several_kernels() -> None:
    """Two kernels timed for one key leave the faster one, and an absent key is NaN."""
    grid = records.dense([np.array([1, 0, 1])], (3,), np.array([5.0, 1.0, 3.0]))
    np.testing.assert_array_equal(grid, [1.0, 3.0, np.nan])


def test_another_version_only_adds_what_the_first_lacks() -> None:
    """Of a series in both versions the first one's rows stay, all of them and no others."""
    own = {"mode": ["graph"] * 2, "devices": [2, 4], "elements": [8, 8], "time_s": [1.0, 2.0]}
    other = {
        "mode": ["graph"] * 3,
        "devices": [4, 4, 8],
        "elements": [8, 9, 8],
        "time_s": [3.0] * 3,
    }
    parts = [{name: np.array(column) for name, column in part.items()} for part in (own, other)]
    merged = records.prefer(parts, FAMILIES["all_reduce"])
    assert merged["devices"].tolist() == [2, 4, 8]
    assert merged["time_s"].tolist() == [1.0, 2.0, 3.0]


def attention_columns(**change: Any) -> dict[str, Any]:
    """Three rows of an attention table."""
    columns = {
        "batch_size": np.array([1, 2, 2]),
        "isl": np.array([1, 1, 1]),
        "step": np.array([0, 0, 4]),
        "head_dim": np.full(3, 128),
        "num_heads": np.array([8, 8, 64]),
        "num_key_value_heads": np.array([1, 1, 1]),
        "attn_dtype": np.array(["bfloat16"] * 3, object),
        "kv_cache_dtype": np.array(["bfloat16", "bfloat16", "fp8"], object),
        "latency": np.array([1.0, 2.0, 3.0]),
    }
    return columns | change


def test_a_series_without_its_smallest_cell_is_left_out() -> None:
    """Only a series timed at one sequence of one token stays; the metadata names the other."""
    columns = attention_columns(
        kv_cache_dtype=np.array(["bfloat16"] * 3, object), step=np.array([0, 0, 0])
    )
    left_out: list[str] = []
    rows = families.attention(columns, H100, left_out)
    (grid,) = records.grids(rows, "generation", left_out)
    assert grid.series.tolist() == [[128, 0, 8, 1]]
    assert grid.time_s.tolist() == [[[1e-3], [2e-3]]]
    assert left_out == [
        "generation series without its smallest cell: bf16 KV, head_dim 128, window_tokens 0, "
        "heads 64, kv_heads 1"
    ]


def test_attention_in_fp8_is_preferred_on_an_fp8_cache() -> None:
    """Of a series in both arithmetics the fp8 rows stay, also where they are slower."""
    columns = attention_columns(
        num_heads=np.array([8, 8, 16]),
        kv_cache_dtype=np.array(["fp8"] * 3, object),
        attn_dtype=np.array(["bfloat16", "fp8", "bfloat16"], object),
    )
    left_out: list[str] = []
    rows = families.attention(columns, H100, left_out)
    assert rows["time_s"].tolist() == [2e-3, 3e-3]
    assert rows["length"].tolist() == [1, 5]
    assert left_out == ["context attention in bf16 on an fp8 cache where fp8 was timed too"]


def moe_columns() -> dict[str, Any]:
    """Two measured rows of routed experts."""
    return {
        "kernel_source": np.array(["triton", "triton"], object),
        "moe_dtype": np.array(["w4a16_mxfp4", "bfloat16"], object),
        "num_tokens": np.array([1, 2]),
        "hidden_size": np.array([2880, 2688]),
        "inter_size": np.array([2880, 1856]),
        "topk": np.array([4, 6]),
        "num_experts": np.array([32, 128]),
        "moe_tp_size": np.array([1, 2]),
        "moe_ep_size": np.array([4, 1]),
        "distribution": np.array(["balanced", "power_law_1.01"], object),
        "latency": np.array([1.0, 2.0]),
    }


def test_expert_rows_state_their_gate_and_skew() -> None:
    """Nemotron's layout has no gate; balanced routing is skew 0 and a power law its exponent."""
    rows = families.moe(moe_columns(), H100, [])
    assert rows["precision"].tolist() == ["mxfp4", "bf16"]
    assert rows["gated"].tolist() == [1, 0]
    assert rows["skew"].tolist() == [0.0, 1.01]


def test_the_untuned_expert_kernel_of_vllm_on_hopper_is_left_out() -> None:
    """Its row goes with a word about it; on Blackwell, and of another engine, it stays."""
    columns = moe_columns()
    columns["kernel_source"] = np.array([families.HOPPER_MODELOPT_MOE, "triton"], object)
    left_out: list[str] = []
    assert families.moe(columns, H100, left_out)["precision"].tolist() == ["bf16"]
    assert len(left_out) == 1
    for other in (BY_NAME["b200_sxm", "vllm"], BY_NAME["h100_sxm", "trtllm"]):
        assert len(families.moe(columns, other, [])["precision"]) == 2


def test_block_quantised_gemm_of_vllm_is_another_engines() -> None:
    """Timed with the host's launches in vLLM, its rows go; of the other engine only they stay."""
    columns = {
        "gemm_dtype": np.array(["bfloat16", "fp8_block", "fp8"], object),
        **{axis: np.array([1, 2, 3]) for axis in ("m", "n", "k")},
        "latency": np.array([1.0, 2.0, 3.0]),
    }
    left_out: list[str] = []
    assert families.gemm(columns, H100, left_out)["precision"].tolist() == ["bf16", "fp8"]
    assert len(left_out) == 1
    assert families.block_gemm(columns, H100, [])["precision"].tolist() == ["fp8_block"]
    sglang = BY_NAME["h100_sxm", "sglang"]
    assert len(families.gemm(columns, sglang, [])["precision"]) == 3
    folder = H100.path("block_gemm", *H100.tables["block_gemm"])
    assert folder == "data/h100_sxm/gemm/sglang/0.5.14/gemm_perf.parquet"
    assert "block_gemm" not in sglang.tables


@pytest.mark.parametrize(("engine", "length"), [("vllm", 64), ("sglang", 65), ("trtllm", 65)])
def test_decode_modules_count_the_tokens_attended_to(engine: str, length: int) -> None:
    """A step of 64 is 64 tokens in all for vLLM, and 64 cached ones for the others."""
    columns = {
        "op_name": np.array(["mla_generation_module"] * 2 + ["mla_generation_module_skip_indexer"]),
        "architecture": np.array(["GlmMoeDsaForCausalLM"] * 3, object),
        "mla_dtype": np.array(["bfloat16", "fp8", "bfloat16"], object),
        "kv_cache_dtype": np.array(["fp8"] * 3, object),
        "gemm_type": np.array(["nvfp4"] * 3, object),
        "num_heads": np.full(3, 16),
        "batch_size": np.full(3, 2),
        "isl": np.ones(3, int),
        "step": np.full(3, 64),
        "latency": np.array([1.0, 2.0, 3.0]),
    }
    left_out: list[str] = []
    rows = latent.latent_module_generation(columns, BY_NAME["b200_sxm", engine], left_out)
    assert rows["length"].tolist() == [length]
    assert rows["hidden_size"].tolist() == [6144]
    assert rows["index_topk"].tolist() == [2048]
    assert rows["time_s"].tolist() == [1e-3]
    assert len(left_out) == 2  # fp8 arithmetic, and layers that reuse another's indexer


def test_deepep_rows_give_both_phases_in_seconds() -> None:
    """Microseconds become seconds, notification counts, and only the default of 20 SMs stays."""
    columns = {
        "node_num": np.array([2, 2]),
        "hidden_size": np.array([7168, 7168]),
        "num_token": np.array([64, 64]),
        "num_topk": np.array([8, 8]),
        "num_experts": np.array([256, 256]),
        "dispatch_sms": np.array([20, 24]),
        "combine_sms": np.array([20, 24]),
        "dispatch_transmit_us": np.array([100.0, 1.0]),
        "dispatch_notify_us": np.array([10.0, 1.0]),
        "combine_transmit_us": np.array([200.0, 1.0]),
        "combine_notify_us": np.array([20.0, 1.0]),
    }
    for folder, ranks in (("h100_sxm", 16), ("gb200", 8)):
        rows = collectives.deepep_high_throughput(columns, BY_NAME[folder, "sglang"], [])
        assert rows["phase"].tolist() == ["dispatch", "combine"]
        assert rows["time_s"] == pytest.approx([110e-6, 220e-6])
        assert rows["ranks"].tolist() == [ranks, ranks]


def test_preparing_is_part_of_the_two_sided_dispatch() -> None:
    """The exchange of counts is added to the dispatch of the same shape and to nothing else."""
    columns = {
        "op_name": np.array(["alltoall_prepare", "alltoall_dispatch", "alltoall_combine"], object),
        "kernel_source": np.array(["NVLinkTwoSided"] * 3, object),
        "moe_dtype": np.array(["nvfp4"] * 3, object),
        "num_tokens": np.full(3, 8),
        "hidden_size": np.full(3, 7168),
        "topk": np.full(3, 8),
        "num_experts": np.full(3, 256),
        "moe_ep_size": np.full(3, 8),
        "latency": np.array([0.5, 1.0, 2.0]),
    }
    rows = collectives.nvlink_all_to_all(columns, BY_NAME["gb200", "trtllm"], [])
    assert rows["phase"].tolist() == ["dispatch", "combine"]
    assert rows["time_s"] == pytest.approx([1.5e-3, 2e-3])
    assert rows["nodes"].tolist() == [2, 2]
