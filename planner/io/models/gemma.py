"""Google's Gemma 2, 3 and 4 (text and image; not the 3n and E variants)."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from planner.io.models.checkpoint import Checkpoint, Decoder
from planner.io.models.dense import GATE_UP_DOWN, QKVO, attention, mlp, windows
from planner.io.models.moe import FUSED
from planner.io.models.vision import gemma4_vision, siglip
from simulator.model import Attention, Experts, Ffn, Layer

_SANDWICH_NORMS: Final = 4
"""Gemma norms before and after both parts of a layer."""


def gemma2(c: Checkpoint) -> Decoder:
    """Gemma 2: every other layer windowed."""
    return _dense(c, pattern=2, qk_norm=False)


def gemma3(c: Checkpoint) -> Decoder:
    """Gemma 3: five windowed layers to a global one, norms of queries and keys."""
    decoder = _dense(c, pattern=c.fields.size("sliding_window_pattern", 6), qk_norm=True)
    return replace(decoder, other_params=siglip(c.whole, c.fields.size("hidden_size")))


def _dense(c: Checkpoint, *, pattern: int, qk_norm: bool) -> Decoder:
    """A decoder whose every ``pattern``-th layer is global."""
    types = [
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(c.num_layers)
    ]
    bias, width = c.fields.flag("attention_bias"), c.fields.size("intermediate_size")
    c.fields.require("head_dim")
    return Decoder(
        tuple(
            Layer(
                attention(c, i, window_tokens=w, qk_norm=qk_norm, qkv_bias=bias, output_bias=bias),
                mlp(c, i, width),
                norms=_SANDWICH_NORMS,
            )
            for i, w in enumerate(windows(c, types))
        ),
        tied_by_default=True,
    )


def gemma4(c: Checkpoint) -> Decoder:
    """Gemma 4: global layers with heads of their own, perhaps experts beside the dense network."""
    f = c.fields
    for field, missing in (
        ("hidden_size_per_layer_input", "per-layer embeddings are not modelled"),
        ("num_kv_shared_layers", "a KV cache shared between layers is not modelled"),
    ):
        f.refuse(field, missing)
    f.require("layer_types")
    layers = tuple(_gemma4_layer(c, i, w) for i, w in enumerate(windows(c, [])))
    return Decoder(layers, tied_by_default=True, other_params=gemma4_vision(c.whole, f))


def _gemma4_layer(c: Checkpoint, i: int, window: int) -> Layer:
    f = c.fields
    is_mixture = f.flag("enable_moe_block")
    mixer = _gemma4_attention(c, i, window)
    # Two norms behind and one before the parallel experts, besides the four.
    norms = _SANDWICH_NORMS + (3 if is_mixture else 0)
    return Layer(mixer, _gemma4_experts(c, i) if is_mixture else _mlp(c, i), norms)


def _mlp(c: Checkpoint, i: int) -> Ffn:
    return mlp(c, i, c.fields.size("intermediate_size"))


def _gemma4_attention(c: Checkpoint, i: int, window: int) -> Attention:
    f = c.fields
    heads = f.size("num_attention_heads")
    is_global = window == 0
    head_dim = f.size("head_dim")
    kv_heads = f.size("num_key_value_heads")
    values_are_keys = is_global and f.flag("attention_k_eq_v")
    if is_global:
        head_dim = f.size("global_head_dim", head_dim)
    if values_are_keys:
        kv_heads = f.size("num_global_key_value_heads", kv_heads)
    if heads % kv_heads:
        rule = f"must be a multiple of the layer's KV heads ({kv_heads})"
        raise f.error("num_attention_heads", rule, heads)
    modules = tuple(m for m in QKVO if m != "v_proj") if values_are_keys else QKVO
    bias = f.flag("attention_bias")
    return Attention(
        heads,
        kv_heads,
        head_dim,
        head_dim,
        window_tokens=c.window(window) if window else 0,
        values_are_keys=values_are_keys,
        qkv_bias=bias,
        output_bias=bias,
        # Norms of queries and of keys, and the layer's output scale.
        vector_params=2 * head_dim + 1,
        dtype=c.dtype(i, "self_attn", modules),
    )


def _gemma4_experts(c: Checkpoint, i: int) -> Experts:
    """Routed experts in parallel with a dense network, which stands as the shared expert."""
    f = c.fields
    num_experts, top_k = f.size("num_experts"), f.size("top_k_experts")
    if top_k > num_experts:
        raise f.error("top_k_experts", f"must be at most num_experts ({num_experts})", top_k)
    return Experts(
        num_experts,
        top_k,
        f.size("moe_intermediate_size"),
        shared_intermediate_size=f.size("intermediate_size"),
        # A scale per input of the router and one per expert.
        router_params=f.size("hidden_size") + num_experts,
        dtype=c.dtype(i, "experts", FUSED),
        shared_dtype=c.dtype(i, "mlp", GATE_UP_DOWN),
    )
