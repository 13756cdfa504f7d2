"""Decoders with multi-head latent attention: DeepSeek V2 to V3.2, Kimi K2 and K2.5, GLM-5."""

from __future__ import annotations

from typing import Final

from planner.io.models.checkpoint import Checkpoint, Decoder
from planner.io.models.moe import deepseek_experts
from planner.io.models.vision import moonvit
from simulator.model import LatentAttention, Layer

_COMPRESSED_QUERY: Final = ("q_a_proj", "q_b_proj")
_REST: Final = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


def deepseek(c: Checkpoint) -> Decoder:
    """DeepSeek V2, V3, R1, V3.1; with the indexer also V3.2 and GLM-5."""
    c.fields.refuse("attention_bias", "biases of latent attention are not modelled")
    c.fields.refuse("indexer_types", "indexers shared between layers are not modelled")
    return Decoder(
        tuple(Layer(_attention(c, i), deepseek_experts(c, i)) for i in range(c.num_layers))
    )


def kimi_k25(c: Checkpoint) -> Decoder:
    """Kimi K2.5: DeepSeek V3's decoder behind a vision tower."""
    vision = moonvit(c.whole, c.fields.size("hidden_size"))
    return Decoder(deepseek(c).layers, other_params=vision)


def _attention(c: Checkpoint, i: int) -> LatentAttention:
    f = c.fields
    q_rank = f.size("q_lora_rank") if f.has("q_lora_rank") else 0
    index_heads = f.size("index_n_heads") if f.has("index_n_heads") else 0
    return LatentAttention(
        num_heads=f.size("num_attention_heads"),
        q_lora_rank=q_rank,
        kv_lora_rank=f.size("kv_lora_rank"),
        qk_nope_head_dim=f.size("qk_nope_head_dim"),
        qk_rope_head_dim=f.size("qk_rope_head_dim"),
        v_head_dim=f.size("v_head_dim"),
        index_heads=index_heads,
        index_head_dim=f.size("index_head_dim") if index_heads else 0,
        index_topk=f.size("index_topk") if index_heads else 0,
        dtype=c.dtype(i, "self_attn", (_COMPRESSED_QUERY if q_rank else ("q_proj",)) + _REST),
    )
