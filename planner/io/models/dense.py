"""Dense decoders with softmax attention: Llama, Mistral, Qwen 2 and 3, Phi 3, Nemotron-NAS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from planner.io.models.checkpoint import Checkpoint, Decoder
from simulator.model import Attention, Layer, Mlp

if TYPE_CHECKING:
    from planner.io.models.fields import Fields

QKVO: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
GATE_UP_DOWN: Final = ("gate_proj", "up_proj", "down_proj")
LAYER_TYPES: Final = ("full_attention", "sliding_attention")


def head_counts(f: Fields) -> tuple[int, int, int]:
    """Query heads, KV heads and head width, from the fields most families share."""
    hidden, heads = f.size("hidden_size"), f.size("num_attention_heads")
    kv_heads = f.size("num_key_value_heads", heads)
    if heads % kv_heads:
        rule = f"must be a multiple of num_key_value_heads ({kv_heads})"
        raise f.error("num_attention_heads", rule, heads)
    if not f.has("head_dim") and hidden % heads:
        rule = f"must be a multiple of num_attention_heads ({heads}) where head_dim is not given"
        raise f.error("hidden_size", rule, hidden)
    return heads, kv_heads, f.size("head_dim", hidden // heads)


def attention(
    c: Checkpoint,
    layer: int,
    *,
    window_tokens: int = 0,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    output_bias: bool = False,
    gated: bool = False,
    modules: tuple[str, ...] = QKVO,
    part: str = "self_attn",
) -> Attention:
    """Attention of one layer from the shared fields; ``qk_norm`` is one vector for each head."""
    heads, kv_heads, head_dim = head_counts(c.fields)
    return Attention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        window_tokens=c.window(window_tokens) if window_tokens else 0,
        gated=gated,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        vector_params=2 * head_dim if qk_norm else 0,
        dtype=c.dtype(layer, part, modules),
    )


def mlp(c: Checkpoint, layer: int, width: int, *, modules: tuple[str, ...] = GATE_UP_DOWN) -> Mlp:
    """Gated dense feed-forward network of one layer."""
    return Mlp(width, bias=c.fields.flag("mlp_bias"), dtype=c.dtype(layer, "mlp", modules))


def windows(c: Checkpoint, default_types: list[str]) -> list[int]:
    """Window of each layer, tokens, 0 for none: ``layer_types``, else ``default_types``."""
    f = c.fields
    types = (
        f.words("layer_types", c.num_layers, LAYER_TYPES) if f.has("layer_types") else default_types
    )
    if "sliding_attention" not in types:
        return [0] * len(types)
    window = f.size("sliding_window")
    return [window if kind == "sliding_attention" else 0 for kind in types]


def everywhere(c: Checkpoint) -> list[int]:
    """Window of each layer where a stated ``sliding_window`` holds for all of them.

    vLLM takes it so for every family that does not say more (``ModelConfig.get_sliding_window``).
    """
    stated = c.fields.has("sliding_window")
    return windows(c, ["sliding_attention" if stated else "full_attention"] * c.num_layers)


def llama(c: Checkpoint) -> Decoder:
    """Llama 2 and 3, Yi, CodeLlama and what else shares the class; also Mistral."""
    bias = c.fields.flag("attention_bias")
    width = c.fields.size("intermediate_size")
    return Decoder(
        tuple(
            Layer(
                attention(c, i, window_tokens=w, qkv_bias=bias, output_bias=bias), mlp(c, i, width)
            )
            for i, w in enumerate(everywhere(c))
        )
    )


def qwen_windows(c: Checkpoint) -> list[int]:
    """Windows of Qwen 2 and 3: from layer ``max_window_layers`` on, if used at all."""
    n = c.num_layers
    first = c.fields.size("max_window_layers", n, low=0)
    if not c.fields.flag("use_sliding_window"):
        first = n
    types = ["full_attention"] * min(first, n) + ["sliding_attention"] * max(0, n - first)
    return windows(c, types)


def qwen2(c: Checkpoint) -> Decoder:
    """Qwen 2 and 2.5, whose query, key and value biases are in the code, not in the config."""
    width = c.fields.size("intermediate_size")
    return Decoder(
        tuple(
            Layer(attention(c, i, window_tokens=w, qkv_bias=True), mlp(c, i, width))
            for i, w in enumerate(qwen_windows(c))
        )
    )


def qwen3(c: Checkpoint) -> Decoder:
    """Qwen 3, with a norm of each query and key."""
    bias, width = c.fields.flag("attention_bias"), c.fields.size("intermediate_size")
    return Decoder(
        tuple(
            Layer(
                attention(c, i, window_tokens=w, qk_norm=True, qkv_bias=bias, output_bias=bias),
                mlp(c, i, width),
            )
            for i, w in enumerate(qwen_windows(c))
        )
    )


def phi3(c: Checkpoint) -> Decoder:
    """Phi 3 and Phi 4: Llama's shapes with fused projections in the checkpoint."""
    width = c.fields.size("intermediate_size")
    return Decoder(
        tuple(
            Layer(
                attention(c, i, window_tokens=w, modules=("qkv_proj", "o_proj")),
                mlp(c, i, width, modules=("gate_up_proj", "down_proj")),
            )
            for i, w in enumerate(everywhere(c))
        )
    )


_NAS_MULTIPLE: Final = 256
"""Widths are rounded up to a multiple of this (vLLM models/nemotron_nas.py, _find_multiple)."""


def nemotron_nas(c: Checkpoint) -> Decoder:
    """Nemotron found by architecture search: each block states its attention and its width."""
    blocks = c.fields.sections("block_configs", c.num_layers)
    return Decoder(tuple(_nas_layer(c, i, block) for i, block in enumerate(blocks)))


def _nas_layer(c: Checkpoint, i: int, block: Fields) -> Layer:
    hidden, heads = c.fields.size("hidden_size"), c.fields.size("num_attention_heads")
    own, ffn = block.section("attention"), block.section("ffn")
    for section in (own, ffn):
        section.refuse("replace_with_linear", "linear layers in place of a part are not modelled")
    own.refuse("num_sink_tokens", "sink attention of single layers is not modelled")
    own.refuse("window_length", "windows of single layers are not modelled")
    mixer = None
    if not own.flag("no_op"):
        group = own.size("n_heads_in_group")
        if heads % group or hidden % heads:
            rule = f"must divide num_attention_heads ({heads}), and that hidden_size ({hidden})"
            raise own.error("n_heads_in_group", rule, group)
        head_dim = c.fields.size("head_dim", hidden // heads)
        bias = c.fields.flag("attention_bias")
        mixer = Attention(
            heads,
            heads // group,
            head_dim,
            head_dim,
            qkv_bias=bias,
            output_bias=bias,
            dtype=c.dtype(i, "self_attn", QKVO),
        )
    if ffn.flag("no_op"):
        return Layer(mixer, None, norms=int(mixer is not None))
    width = int(2 * ffn.number("ffn_mult") * hidden / 3)
    padded = -(-width // _NAS_MULTIPLE) * _NAS_MULTIPLE
    return Layer(mixer, mlp(c, i, padded), norms=1 + (mixer is not None))
