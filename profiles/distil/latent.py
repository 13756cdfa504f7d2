"""Latent-attention tables: whole modules (projections, indexer and kernel) and single kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from profiles.distil.records import PRECISION_NAMES, names, seconds, select

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from profiles.distil.records import Records
    from profiles.distil.systems import Columns, Target

_DEEPSEEK_V3: Final = (7168, 1536, 512, 128, 64, 128, 0)
WIDTHS: Final = {
    "DeepseekV3ForCausalLM": _DEEPSEEK_V3,
    "DeepseekV32ForCausalLM": (*_DEEPSEEK_V3[:-1], 2048),
    "GlmMoeDsaForCausalLM": (6144, 2048, 512, 192, 64, 256, 2048),
}
"""By architecture, the measured model's hidden size, q_lora_rank, kv_lora_rank, qk_nope_head_dim,
qk_rope_head_dim, v_head_dim and index_topk: the published configs of DeepSeek-V3, DeepSeek-V3.2
and GLM-5. The tables change the number of heads and nothing else."""
WIDTH_NAMES: Final = (
    "hidden_size",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "index_topk",
)

SKIPS_INDEXER: Final = "_skip_indexer"
"""Ending of the op name of GLM-5.2 layers that reuse another layer's selection."""
NEWEST_TOKEN: Final = 1

LONGEST_PREFIX: Final = 2**17
"""Cached tokens of the context phase up to which every prefix is kept; above it only powers of two
are. SGLang's other long prefixes fill a model's context to the last token, each for few lengths."""


def _module(columns: Columns, left_out: list[str], phase: str) -> Records:
    """Rows of a module table in our names, without prefix and length."""
    count = len(columns["latency"])
    widths = np.array([WIDTHS[name] for name in columns["architecture"]])
    records: Records = {
        "phase": np.full(count, phase, object),
        "module": np.full(count, True, object),
        **dict(zip(WIDTH_NAMES, widths.T, strict=True)),
        "weight_dtype": names(columns["gemm_type"], PRECISION_NAMES),
        "kv_dtype": names(columns["kv_cache_dtype"], PRECISION_NAMES),
        "heads": columns["num_heads"],
        "batch": columns["batch_size"],
        "time_s": seconds(columns["latency"]),
    }
    skips = np.array([name.endswith(SKIPS_INDEXER) for name in columns["op_name"]])
    if skips.any():
        left_out.append(f"{phase} modules of sparse attention that reuse another layer's indexer")
    # An fp8 query needs `use_prefill_query_quantization`, which vLLM leaves off.
    in_fp8 = columns["mla_dtype"] == "fp8"
    if in_fp8.any():
        left_out.append(f"{phase} modules of latent attention with fp8 arithmetic")
    return records | {"_kept": ~skips & ~in_fp8}


def _finish(records: Records, prefix: NDArray[Any], length: NDArray[Any]) -> Records:
    kept = records.pop("_kept")
    return select(records | {"prefix": prefix, "length": length}, kept)


def latent_module_context(columns: Columns, target: Target, left_out: list[str]) -> Records:
    """Prefill modules: ``isl`` new tokens after ``step`` cached ones."""
    del target
    records = _module(columns, left_out, "context")
    prefix = columns["step"]
    kept_prefix = (prefix <= LONGEST_PREFIX) | ((prefix & (prefix - 1)) == 0)
    if not kept_prefix.all():
        left_out.append(
            f"context modules of sparse attention at prefixes above {LONGEST_PREFIX} that are no "
            "power of two"
        )
    records["_kept"] &= kept_prefix
    return _finish(records, prefix, columns["isl"])


def latent_module_generation(columns: Columns, target: Target, left_out: list[str]) -> Records:
    """Decode modules.

    What ``step`` counts depends on the engine's collector (aiconfigurator repository,
    ``collector/<engine>/collect_mla_module.py``): vLLM's attends to ``step`` tokens in all, those
    of TensorRT-LLM and SGLang cache ``step`` tokens and add the newest. The times agree: with
    64-token pages TensorRT-LLM's first rises at 64, its kernel table's (``step`` 63) does not.
    """
    records = _module(columns, left_out, "generation")
    newest = 0 if target.engine == "vllm" else NEWEST_TOKEN
    return _finish(records, np.zeros_like(columns["step"]), columns["step"] + newest)


def _kernel(columns: Columns, phase: str) -> Records:
    count = len(columns["latency"])
    widths = WIDTHS["DeepseekV3ForCausalLM"]
    return {
        "phase": np.full(count, phase, object),
        "module": np.full(count, False, object),
        **{name: np.full(count, width) for name, width in zip(WIDTH_NAMES, widths, strict=True)},
        "weight_dtype": np.full(count, "bf16", object),
        "kv_dtype": names(columns["kv_cache_dtype"], PRECISION_NAMES),
        "heads": columns["num_heads"],
        "batch": columns["batch_size"],
        "time_s": seconds(columns["latency"]),
    }


def latent_kernel_context(columns: Columns, target: Target, left_out: list[str]) -> Records:
    """Prefill kernel alone."""
    del target, left_out
    return _kernel(columns, "context") | {"prefix": columns["step"], "length": columns["isl"]}


def latent_kernel_generation(columns: Columns, target: Target, left_out: list[str]) -> Records:
    """Decode kernel alone: ``step`` cached tokens and the newest."""
    del target, left_out
    return _kernel(columns, "generation") | {
        "prefix": np.zeros_like(columns["step"]),
        "length": columns["isl"] + columns["step"],
    }


def latent_bmm(columns: Columns, target: Target, left_out: list[str]) -> Records:
    """Per-head products before and after the decode kernel."""
    del target, left_out
    return {
        "side": names(columns["op_name"], {"mla_gen_pre": "pre", "mla_gen_post": "post"}),
        "precision": names(columns["bmm_dtype"], PRECISION_NAMES),
        "heads": columns["num_heads"],
        "tokens": columns["num_tokens"],
        "time_s": seconds(columns["latency"]),
    }
