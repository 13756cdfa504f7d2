"""The model types that are read, and those that are refused with the rule that is missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from planner.io.models import dense, gemma, hybrid, latent, moe

if TYPE_CHECKING:
    from collections.abc import Callable

    from planner.io.models.checkpoint import Checkpoint, Decoder


@dataclass(frozen=True)
class Family:
    """How configs of one ``model_type`` are read.

    Parameters
    ----------
    read
        The reader.
    is_nested
        Whether the decoder's settings are in ``text_config``.
    is_dense
        Whether fields that count experts must be absent.
    scales_context
        Whether position scaling lengthens ``max_position_embeddings`` (vLLM leaves Gemma 3 out).

    """

    read: Callable[[Checkpoint], Decoder]
    is_nested: bool = False
    is_dense: bool = False
    scales_context: bool = True


FAMILIES: Final[dict[str, Family]] = {
    "llama": Family(dense.llama, is_dense=True),
    "mistral": Family(dense.llama, is_dense=True),
    "qwen2": Family(dense.qwen2, is_dense=True),
    "qwen3": Family(dense.qwen3, is_dense=True),
    "phi3": Family(dense.phi3, is_dense=True),
    "gemma2": Family(gemma.gemma2, is_dense=True),
    "gemma3": Family(gemma.gemma3, is_nested=True, is_dense=True, scales_context=False),
    "gemma3_text": Family(gemma.gemma3, is_dense=True, scales_context=False),
    "gemma4": Family(gemma.gemma4, is_nested=True),
    "gemma4_text": Family(gemma.gemma4),
    "nemotron-nas": Family(dense.nemotron_nas, is_dense=True),
    "mixtral": Family(moe.mixtral),
    "phimoe": Family(moe.phimoe),
    "qwen2_moe": Family(moe.qwen2_moe),
    "qwen3_moe": Family(moe.qwen3_moe),
    "glm4_moe": Family(moe.glm4_moe),
    "minimax_m2": Family(moe.minimax_m2),
    "mimo_v2_flash": Family(moe.mimo_v2_flash),
    "gpt_oss": Family(moe.gpt_oss),
    "llama4": Family(moe.llama4, is_nested=True),
    "llama4_text": Family(moe.llama4),
    "deepseek_v2": Family(latent.deepseek),
    "deepseek_v3": Family(latent.deepseek),
    "deepseek_v32": Family(latent.deepseek),
    "kimi_k2": Family(latent.deepseek),
    "kimi_k25": Family(latent.kimi_k25, is_nested=True),
    "glm_moe_dsa": Family(latent.deepseek),
    "glm4_moe_lite": Family(latent.deepseek),
    "qwen3_next": Family(hybrid.qwen3_next),
    "qwen3_5": Family(hybrid.qwen3_5, is_nested=True, is_dense=True),
    "qwen3_5_text": Family(hybrid.qwen3_5, is_dense=True),
    "qwen3_5_moe": Family(hybrid.qwen3_5_moe, is_nested=True),
    "qwen3_5_moe_text": Family(hybrid.qwen3_5_moe),
    "nemotron_h": Family(hybrid.nemotron_h),
}
"""Readers by ``model_type``."""

_PARALLEL: Final = "attention and feed-forward network in parallel are not modelled"

MISSING_RULES: Final[dict[str, str]] = {
    "falcon": _PARALLEL,
    "phi": _PARALLEL,
    "gpt_neox": _PARALLEL,
    "cohere": _PARALLEL,
    "cohere2": _PARALLEL,
    "dbrx": "its own field names (d_model, attn_config, ffn_config) are not read",
    "gemma3n": "per-layer embeddings and a KV cache shared between layers are not modelled",
    "mamba": "Mamba-1 layers are not modelled",
    "jamba": "Mamba-1 layers are not modelled",
    "minimax": "lightning attention is not modelled",
    "minimax_text_01": "lightning attention is not modelled",
    "kimi_linear": "Kimi delta attention is not modelled",
}
"""What stands between a known ``model_type`` and its support."""
