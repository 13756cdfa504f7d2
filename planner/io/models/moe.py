"""Mixtures of experts over softmax attention, from Mixtral to GPT-OSS and Llama 4."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from planner.io.models.checkpoint import Checkpoint, Decoder
from planner.io.models.dense import (
    GATE_UP_DOWN,
    QKVO,
    attention,
    everywhere,
    head_counts,
    mlp,
    qwen_windows,
    windows,
)
from planner.io.models.vision import llama4_vision
from simulator.model import Attention, Experts, Ffn, Layer, Mlp

if TYPE_CHECKING:
    from planner.io.models.fields import Fields

_W123: Final = ("w1", "w2", "w3")
FUSED: Final = ("gate_up_proj", "down_proj")


def expert_counts(f: Fields, field: str) -> tuple[int, int]:
    """Routed experts, stated in ``field``, and how many a token visits."""
    num_experts, top_k = f.size(field), f.size("num_experts_per_tok")
    if top_k > num_experts:
        raise f.error("num_experts_per_tok", f"must be at most {field} ({num_experts})", top_k)
    return num_experts, top_k


def mixtral(c: Checkpoint) -> Decoder:
    """Mixtral: every layer a mixture, no shared expert."""
    f = c.fields
    num_experts, top_k = expert_counts(f, "num_local_experts")
    width = f.size("intermediate_size")
    return Decoder(
        tuple(
            Layer(
                attention(c, i, window_tokens=w),
                Experts(
                    num_experts,
                    top_k,
                    width,
                    dtype=c.dtype(i, "block_sparse_moe.experts.0", _W123),
                ),
            )
            for i, w in enumerate(everywhere(c))
        )
    )


def phimoe(c: Checkpoint) -> Decoder:
    """PhiMoE: Mixtral with biases in attention, layer norms and the head."""
    f = c.fields
    hidden, bias = f.size("hidden_size"), f.flag("attention_bias")

    def biased(layer: Layer) -> Layer:
        if not isinstance(layer.mixer, Attention):
            raise AssertionError("Mixtral's mixers are attention")
        # Its two layer norms have a bias besides the weight.
        mixer = replace(layer.mixer, qkv_bias=bias, output_bias=bias, vector_params=2 * hidden)
        return replace(layer, mixer=mixer)

    head_bias = f.size("vocab_size") if f.flag("lm_head_bias") else 0
    layers = tuple(biased(layer) for layer in mixtral(c).layers)
    return Decoder(layers, other_params=head_bias + hidden)


def qwen_experts(c: Checkpoint, i: int) -> Ffn:
    """Feed-forward part of one layer of Qwen's mixtures."""
    f = c.fields
    dense_layers = f.sizes("mlp_only_layers", None) if f.has("mlp_only_layers") else []
    if i in dense_layers or (i + 1) % f.size("decoder_sparse_step", 1):
        return mlp(c, i, f.size("intermediate_size"))
    num_experts, top_k = expert_counts(f, "num_experts")
    shared = f.size("shared_expert_intermediate_size", 0, low=0)
    return Experts(
        num_experts,
        top_k,
        f.size("moe_intermediate_size"),
        shared_intermediate_size=shared,
        shared_gate=shared > 0,
        dtype=c.dtype(i, "mlp.experts.0", GATE_UP_DOWN),
        shared_dtype=c.dtype(i, "mlp.shared_expert", GATE_UP_DOWN),
    )


def qwen2_moe(c: Checkpoint) -> Decoder:
    """Qwen 1.5 and 2 mixtures: Qwen 2's attention, a gated shared expert."""
    return Decoder(
        tuple(
            Layer(attention(c, i, window_tokens=w, qkv_bias=True), qwen_experts(c, i))
            for i, w in enumerate(qwen_windows(c))
        )
    )


def qwen3_moe(c: Checkpoint) -> Decoder:
    """Qwen 3 mixtures: Qwen 3's attention, no shared expert."""
    bias = c.fields.flag("attention_bias")
    return Decoder(
        tuple(
            Layer(
                attention(c, i, window_tokens=w, qk_norm=True, qkv_bias=bias, output_bias=bias),
                qwen_experts(c, i),
            )
            for i, w in enumerate(qwen_windows(c))
        )
    )


def deepseek_experts(c: Checkpoint, i: int) -> Ffn:
    """Feed-forward part of one layer as DeepSeek states it (GLM and Kimi likewise)."""
    f = c.fields
    first = f.size("first_k_dense_replace", 0, low=0)
    if i < first or i % f.size("moe_layer_freq", 1):
        return mlp(c, i, f.size("intermediate_size"))
    num_experts, top_k = expert_counts(f, "n_routed_experts")
    width = f.size("moe_intermediate_size")
    # The score corrections of auxiliary-loss-free balancing (arXiv 2412.19437, 2.1.2).
    corrected = f.word("topk_method", "noaux_tc") == "noaux_tc"
    return Experts(
        num_experts,
        top_k,
        width,
        shared_intermediate_size=width * f.size("n_shared_experts", 0, low=0),
        router_params=num_experts if corrected else 0,
        dtype=c.dtype(i, "mlp.experts.0", GATE_UP_DOWN),
        shared_dtype=c.dtype(i, "mlp.shared_experts", GATE_UP_DOWN),
    )


def glm4_moe(c: Checkpoint) -> Decoder:
    """GLM-4.5 and 4.6: grouped attention over DeepSeek's kind of mixture."""
    f = c.fields
    qk_norm, bias = f.flag("use_qk_norm"), f.flag("attention_bias")
    return Decoder(
        tuple(
            Layer(attention(c, i, qk_norm=qk_norm, qkv_bias=bias), deepseek_experts(c, i))
            for i in range(c.num_layers)
        )
    )


def minimax_m2(c: Checkpoint) -> Decoder:
    """MiniMax M2: norms over all queries and over all keys, router corrections."""
    f = c.fields
    f.refuse("shared_intermediate_size", "shared experts are not modelled for this family")
    num_experts, top_k = expert_counts(f, "num_local_experts")
    heads, kv_heads, head_dim = head_counts(f)
    norms = (heads + kv_heads) * head_dim if f.flag("use_qk_norm") else 0
    bias = f.flag("attention_bias")

    def layer(i: int) -> Layer:
        mixer = replace(attention(c, i, qkv_bias=bias), vector_params=norms)
        experts = Experts(
            num_experts,
            top_k,
            f.size("intermediate_size"),
            router_params=num_experts if f.flag("use_routing_bias") else 0,
            dtype=c.dtype(i, "block_sparse_moe.experts.0", _W123),
        )
        return Layer(mixer, experts)

    return Decoder(tuple(layer(i) for i in range(c.num_layers)))


def mimo_v2_flash(c: Checkpoint) -> Decoder:
    """MiMo V2 Flash: windowed layers with sinks and heads of their own between global ones."""
    f, n = c.fields, c.num_layers
    windowed = f.sizes("hybrid_layer_pattern", n, high=1)
    sparse = f.sizes("moe_layer_freq", n, high=1)

    def layer(i: int) -> Layer:
        ffn = deepseek_experts(_every_layer_sparse(c), i) if sparse[i] else None
        return Layer(
            _mimo_attention(c, i, "swa_" if windowed[i] else ""),
            ffn or mlp(c, i, f.size("intermediate_size")),
        )

    return Decoder(tuple(layer(i) for i in range(n)))


def _every_layer_sparse(c: Checkpoint) -> Checkpoint:
    """The checkpoint without its list of sparse layers, which the caller has read."""
    data = {**c.fields.data, "moe_layer_freq": None, "first_k_dense_replace": None}
    return replace(c, fields=type(c.fields)(data, c.fields.source, c.fields.path))


def _mimo_attention(c: Checkpoint, i: int, prefix: str) -> Attention:
    f = c.fields
    heads = f.size(f"{prefix}num_attention_heads")
    kv_heads = f.size(f"{prefix}num_key_value_heads")
    if heads % kv_heads:
        rule = f"must be a multiple of {prefix}num_key_value_heads ({kv_heads})"
        raise f.error(f"{prefix}num_attention_heads", rule, heads)
    head_dim = f.size(f"{prefix}head_dim")
    has_sinks = f.flag(f"add_{'swa' if prefix else 'full'}_attention_sink_bias")
    return Attention(
        heads,
        kv_heads,
        head_dim,
        f.size(f"{prefix}v_head_dim", head_dim),
        window_tokens=c.window(f.size("sliding_window")) if prefix else 0,
        qkv_bias=f.flag("attention_bias"),
        vector_params=heads if has_sinks else 0,
        dtype=c.dtype(i, "self_attn", QKVO),
    )


def gpt_oss(c: Checkpoint) -> Decoder:
    """GPT-OSS: sinks, biases everywhere, every other layer windowed."""
    f, n = c.fields, c.num_layers
    num_experts, top_k = expert_counts(f, "num_local_experts")
    bias = f.flag("attention_bias", default=True)
    heads, width = f.size("num_attention_heads"), f.size("intermediate_size")
    types = ["full_attention" if i % 2 else "sliding_attention" for i in range(n)]

    def layer(i: int, window: int) -> Layer:
        mixer = attention(c, i, window_tokens=window, qkv_bias=bias, output_bias=bias)
        experts = Experts(
            num_experts,
            top_k,
            width,
            bias=True,
            router_params=num_experts,
            dtype=c.dtype(i, "mlp.experts", FUSED),
        )
        return Layer(replace(mixer, vector_params=heads), experts)

    return Decoder(tuple(layer(i, w) for i, w in enumerate(windows(c, types))))


def llama4(c: Checkpoint) -> Decoder:
    """Llama 4: chunked attention but in every fourth layer, mixtures in every nth.

    A chunk is taken for a window of its length: both bound what a query attends to.
    """
    f, n = c.fields, c.num_layers
    # Query and key norms carry no weight in this family.
    chunk = f.size("attention_chunk_size") if f.has("attention_chunk_size") else 0
    return Decoder(
        tuple(
            Layer(attention(c, i, window_tokens=chunk if local else 0), _llama4_ffn(c, i))
            for i, local in enumerate(_llama4_is_local(f, n))
        ),
        other_params=llama4_vision(c.whole, f.size("hidden_size")),
    )


def _llama4_is_local(f: Fields, n: int) -> list[bool]:
    """Whether a layer has rotary positions, and hence chunks (vLLM models/llama4.py)."""
    if f.data.get("no_rope_layers"):
        return [bool(rotary) for rotary in f.sizes("no_rope_layers", n, high=1)]
    interval = f.size("no_rope_layer_interval", 4)
    return [(i + 1) % interval != 0 for i in range(n)]


def _llama4_ffn(c: Checkpoint, i: int) -> Ffn:
    f = c.fields
    if (i + 1) % f.size("interleave_moe_layer_step", 1):
        return Mlp(f.size("intermediate_size_mlp"), dtype=c.dtype(i, "feed_forward", GATE_UP_DOWN))
    num_experts, top_k = expert_counts(f, "num_local_experts")
    width = f.size("intermediate_size")
    return Experts(
        num_experts,
        top_k,
        width,
        shared_intermediate_size=width,
        dtype=c.dtype(i, "feed_forward.experts", FUSED),
        shared_dtype=c.dtype(i, "feed_forward.shared_expert", GATE_UP_DOWN),
    )
