"""What a source table means: its rows in our names, units and conventions, by kernel family.

Every reader below turns the columns of one kind of source table into `Records`: the labels,
series and axes of a family of `planner.io.kernel_format.FAMILIES`, and ``time_s``. What it does
not take it says in ``left_out``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from profiles.distil.collectives import (
    all_reduce,
    deepep_high_throughput,
    deepep_low_latency,
    expert_all_to_all,
    nccl,
    nvlink_all_to_all,
)
from profiles.distil.latent import (
    latent_bmm,
    latent_kernel_context,
    latent_kernel_generation,
    latent_module_context,
    latent_module_generation,
)
from profiles.distil.records import PRECISION_NAMES, names, seconds, select
from profiles.distil.systems import BLOCK_GEMM

if TYPE_CHECKING:
    from collections.abc import Callable

    from profiles.distil.records import Records
    from profiles.distil.systems import Columns, Target

ONLY_FULL_ATTENTION: Final = 0
"""Window of every row of a table without that column: such a table has full attention only."""
BALANCED: Final = "balanced"
POWER_LAW: Final = "power_law_"
FP8_BLOCK: Final = "fp8_block"
HOPPER: Final = ("h100_sxm", "h200_sxm")
HOPPER_MODELOPT_MOE: Final = "vllm_modeloptfp8moe_flashinfer_cutlass_flashinferexperts"
GATED_DELTA_NET: Final = "gated_delta_net"
MAMBA2: Final = "mamba2"
CONVOLUTION: Final = "causal_conv1d"

NOT_GATED: Final = frozenset(
    {
        (1024, 2688, 22, 512),
        (2048, 5120, 22, 512),
        (2688, 1856, 6, 128),
        (4096, 2688, 22, 512),
        (8192, 5120, 22, 512),
    }
)
"""Measured layouts (hidden size, expert width, experts per token, experts) of experts without a
gate: those whose TensorRT-LLM rows, all of them, name a ``nongated`` kernel. They are of the
Nemotron 3 models, whose published configs say ``mlp_hidden_act: relu2``."""


def gemm(columns: Columns, target: Target, left_out: list[str]) -> Records:
    """GEMM of ``(m, k) @ (k, n)``; milliseconds in the source."""
    records = _gemm(columns)
    launches = (target.engine == "vllm") & (records["precision"] == FP8_BLOCK)
    if launches.any():
        left_out.append("fp8_block GEMM of vLLM: timed outside a CUDA graph, host launches")
    return select(records, ~launches)


def block_gemm(columns: Columns, target: Target, left_out: list[str]) -> Records:
    """The fp8_block part of another engine's GEMM."""
    del target, left_out
    records = _gemm(columns)
    return select(records, records["precision"] == FP8_BLOCK)


def _gemm(columns: Columns) -> Records:
    return {
        "precision": names(columns["gemm_dtype"], PRECISION_NAMES),
        **{axis: columns[axis] for axis in ("m", "n", "k")},
        "time_s": seconds(columns["latency"]),
    }


def attention(columns: Columns, target: Target, left_out: list[str]) -> Records:
    """Attention of either phase.

    The length counts the tokens attended to: the new ones (``isl``) plus those cached (``step``).
    Some prefill kernels were timed with bf16 and with fp8 arithmetic on an fp8 cache; the fp8
    times are kept, as TensorRT-LLM with paged context attention (its default) and SGLang's
    TensorRT-LLM and FlashAttention 3 backends compute in the cache's type.
    """
    del target
    records = {
        "kv_dtype": names(columns["kv_cache_dtype"], PRECISION_NAMES),
        "head_dim": columns["head_dim"],
        "window_tokens": columns.get(
            "window_size", np.full(len(columns["isl"]), ONLY_FULL_ATTENTION)
        ),
        "heads": columns["num_heads"],
        "kv_heads": columns["num_key_value_heads"],
        "batch": columns["batch_size"],
        "length": columns["isl"] + columns["step"],
        "time_s": seconds(columns["latency"]),
    }
    in_fp8 = columns["attn_dtype"] == "fp8"
    key = [records[c] for c in ("kv_dtype", "head_dim", "window_tokens", "heads", "kv_heads")]
    both = set(zip(*(column[in_fp8].tolist() for column in key), strict=True))
    doubled = np.array([k in both for k in zip(*(c.tolist() for c in key), strict=True)], bool)
    slower = doubled & ~in_fp8
    if slower.any():
        left_out.append("context attention in bf16 on an fp8 cache where fp8 was timed too")
    return select(records, ~slower)


def moe(columns: Columns, target: Target, left_out: list[str]) -> Records:
    """Routed experts of one rank; ``num_tokens`` counts the tokens of all ranks, before routing.

    Of vLLM on Hopper the per-tensor fp8 kernel is left out: it takes 2 to 5 times what fp8_block
    takes, and 4 times what version 0.19.0 took. It is the one for ModelOpt checkpoints; weights
    quantised while loading, or with dynamic scales, run in the same Triton kernel as fp8_block.
    """
    if target.engine == "vllm" and target.folder in HOPPER:
        untuned = columns["kernel_source"] == HOPPER_MODELOPT_MOE
        left_out.append(f"MoE of {HOPPER_MODELOPT_MOE}: other precisions stand in for fp8")
        columns = select(columns, ~untuned)
    layout = [columns[c] for c in ("hidden_size", "inter_size", "topk", "num_experts")]
    gated = [tuple(row) not in NOT_GATED for row in np.stack(layout, axis=1).tolist()]
    skew = {
        name: 0.0 if name == BALANCED else float(name.removeprefix(POWER_LAW))
        for name in set(columns["distribution"])
    }
    return {
        "precision": names(columns["moe_dtype"], PRECISION_NAMES),
        "hidden_size": layout[0],
        "expert_width": layout[1],
        "experts_per_token": layout[2],
        "experts": layout[3],
        "tensor_shards": columns["moe_tp_size"],
        "expert_shards": columns["moe_ep_size"],
        "gated": np.array(gated, np.int64),
        "skew": np.array([skew[name] for name in columns["distribution"]]),
        "tokens": columns["num_tokens"],
        "time_s": seconds(columns["latency"]),
    }


def _recurrent(columns: Columns, kind: str, widths: tuple[str, ...]) -> Records:
    is_convolution = np.array([k.startswith(CONVOLUTION) for k in columns["kernel_source"]])
    return {
        "kind": np.full(len(is_convolution), kind, object),
        "kernel": np.where(is_convolution, "convolution", "scan").astype(object),
        "phase": columns["phase"],
        **{f"width_{i}": columns[c] for i, c in enumerate(widths)},
        "batch": columns["batch_size"],
        "length": columns["seq_len"],
        "time_s": seconds(columns["latency"]),
    }


def gated_delta_net(columns: Columns, target: Target, left_out: list[str]) -> Records:
    """Convolution and scan of gated delta net; heads are those of the rank."""
    del target, left_out
    widths = ("num_k_heads", "head_k_dim", "num_v_heads", "head_v_dim", "d_conv")
    return _recurrent(columns, GATED_DELTA_NET, widths)


def mamba2(columns: Columns, target: Target, left_out: list[str]) -> Records:
    """Convolution of Mamba-2; its scan was not measured."""
    del target, left_out
    return _recurrent(columns, MAMBA2, ("nheads", "head_dim", "d_state", "n_groups", "d_conv"))


class Reader(NamedTuple):
    """How one kind of source table is read, and the family it belongs to."""

    family: str
    read: Callable[[Columns, Target, list[str]], Records]


READERS: Final[dict[str, Reader]] = {
    "gemm": Reader("gemm", gemm),
    BLOCK_GEMM: Reader("gemm", block_gemm),
    "context_attention": Reader("context", attention),
    "generation_attention": Reader("generation", attention),
    "moe": Reader("moe", moe),
    "mla_context_module": Reader("latent", latent_module_context),
    "mla_generation_module": Reader("latent", latent_module_generation),
    "dsa_context_module": Reader("latent", latent_module_context),
    "dsa_generation_module": Reader("latent", latent_module_generation),
    "context_mla": Reader("latent", latent_kernel_context),
    "generation_mla": Reader("latent", latent_kernel_generation),
    "mla_bmm": Reader("latent_bmm", latent_bmm),
    "gdn": Reader("recurrent", gated_delta_net),
    "mamba2": Reader("recurrent", mamba2),
    "custom_allreduce": Reader("all_reduce", all_reduce),
    "nccl": Reader("nccl", nccl),
    "moe_a2a": Reader("all_to_all", expert_all_to_all),
    "wideep_deepep_ll": Reader("all_to_all", deepep_low_latency),
    "wideep_deepep_normal": Reader("all_to_all", deepep_high_throughput),
    "trtllm_alltoall": Reader("all_to_all", nvlink_all_to_all),
}
"""By kind of table, its family and its reader."""
