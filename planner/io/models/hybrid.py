"""Decoders that mix attention with recurrent layers: Qwen3-Next, Qwen3.5 and Nemotron-H."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from planner.io.models.checkpoint import Checkpoint, Decoder
from planner.io.models.dense import QKVO, attention, mlp
from planner.io.models.fields import MAX_LAYERS
from planner.io.models.moe import expert_counts, qwen_experts
from planner.io.models.vision import qwen_vision
from simulator.model import Experts, Ffn, GatedDeltaNet, Layer, Mamba2, Mlp

if TYPE_CHECKING:
    from collections.abc import Callable

_UP_DOWN: Final = ("up_proj", "down_proj")
_LINEAR: Final = "linear_attention"
_FULL: Final = "full_attention"


def qwen3_next(c: Checkpoint) -> Decoder:
    """Qwen3-Next: gated delta net, every fourth layer gated attention, a mixture in each."""
    return _qwen(c, ("in_proj_qkvz", "out_proj"), qwen_experts)


def qwen3_5_moe(c: Checkpoint) -> Decoder:
    """Qwen3.5 mixtures: as Qwen3-Next, behind a vision tower."""
    return _qwen(c, ("in_proj_qkv", "in_proj_z", "out_proj"), qwen_experts)


def qwen3_5(c: Checkpoint) -> Decoder:
    """Dense Qwen3.5."""
    width = c.fields.size("intermediate_size")
    return _qwen(c, ("in_proj_qkv", "in_proj_z", "out_proj"), lambda c, i: mlp(c, i, width))


def _qwen(
    c: Checkpoint, linear_modules: tuple[str, ...], ffn: Callable[[Checkpoint, int], Ffn]
) -> Decoder:
    f, n = c.fields, c.num_layers
    interval = f.size("full_attention_interval", 4)
    types = [_LINEAR if (i + 1) % interval else _FULL for i in range(n)]
    if f.has("layer_types"):
        types = f.words("layer_types", n, (_FULL, _LINEAR))
    gated = f.flag("attn_output_gate", default=True)
    bias = f.flag("attention_bias")

    def layer(i: int) -> Layer:
        if types[i] == _LINEAR:
            return Layer(_gated_delta_net(c, i, linear_modules), ffn(c, i))
        mixer = attention(c, i, qk_norm=True, qkv_bias=bias, output_bias=bias, gated=gated)
        return Layer(mixer, ffn(c, i))

    vision = qwen_vision(c.whole, f.size("hidden_size"))
    return Decoder(tuple(layer(i) for i in range(n)), other_params=vision)


def _gated_delta_net(c: Checkpoint, i: int, modules: tuple[str, ...]) -> GatedDeltaNet:
    f = c.fields
    key_heads, value_heads = f.size("linear_num_key_heads"), f.size("linear_num_value_heads")
    if value_heads % key_heads:
        rule = f"must be a multiple of linear_num_key_heads ({key_heads})"
        raise f.error("linear_num_value_heads", rule, value_heads)
    return GatedDeltaNet(
        key_heads,
        value_heads,
        f.size("linear_key_head_dim"),
        f.size("linear_value_head_dim"),
        f.size("linear_conv_kernel_dim"),
        dtype=c.dtype(i, "linear_attn", modules),
    )


def nemotron_h(c: Checkpoint) -> Decoder:
    """Nemotron-H and Nemotron 3: each layer one part, of the kind that its letter says."""
    f = c.fields
    for field in ("use_bias", "mamba_proj_bias", "mlp_bias", "attention_bias"):
        f.refuse(field, "biases of this family are not modelled")
    pattern = f.word("hybrid_override_pattern")
    if not 0 < len(pattern) <= MAX_LAYERS or set(pattern) - set(_NEMOTRON_LAYERS):
        rule = f"must be a text of the letters {' '.join(_NEMOTRON_LAYERS)}, one per layer"
        raise f.error("hybrid_override_pattern", rule, pattern)
    if len(pattern) != c.num_layers:
        rule = f"must have one letter per layer ({c.num_layers}), has {len(pattern)}"
        raise f.error("hybrid_override_pattern", rule)
    return Decoder(tuple(_NEMOTRON_LAYERS[kind](c, i) for i, kind in enumerate(pattern)))


def _mamba_layer(c: Checkpoint, i: int) -> Layer:
    f = c.fields
    heads, groups = f.size("mamba_num_heads"), f.size("n_groups")
    if heads % groups:
        raise f.error("mamba_num_heads", f"must be a multiple of n_groups ({groups})", heads)
    mixer = Mamba2(
        heads,
        f.size("mamba_head_dim"),
        f.size("ssm_state_size"),
        groups,
        f.size("conv_kernel"),
        dtype=c.dtype(i, "mixer", ("in_proj", "out_proj")),
    )
    return Layer(mixer, None, norms=1)


def _attention_layer(c: Checkpoint, i: int) -> Layer:
    return Layer(attention(c, i, part="mixer", modules=QKVO), None, norms=1)


def _mlp_layer(c: Checkpoint, i: int) -> Layer:
    width = c.fields.size("intermediate_size")
    return Layer(None, Mlp(width, gated=False, dtype=c.dtype(i, "mixer", _UP_DOWN)), norms=1)


def _experts_layer(c: Checkpoint, i: int) -> Layer:
    f = c.fields
    num_experts, top_k = expert_counts(f, "n_routed_experts")
    shared_experts = f.size("n_shared_experts", 0, low=0)
    latent = f.size("moe_latent_size") if f.has("moe_latent_size") else 0
    experts = Experts(
        num_experts,
        top_k,
        f.size("moe_intermediate_size"),
        shared_intermediate_size=(
            f.size("moe_shared_expert_intermediate_size") * shared_experts if shared_experts else 0
        ),
        gated=False,
        latent_size=latent,
        router_params=num_experts,
        dtype=c.dtype(i, "mixer.experts.0", _UP_DOWN),
        shared_dtype=c.dtype(i, "mixer.shared_experts", _UP_DOWN),
        latent_dtype=c.dtype(i, "mixer", ("fc1_latent_proj", "fc2_latent_proj")),
    )
    return Layer(None, experts, norms=1)


_NEMOTRON_LAYERS: Final[dict[str, Callable[[Checkpoint, int], Layer]]] = {
    "M": _mamba_layer,
    "*": _attention_layer,
    "-": _mlp_layer,
    "E": _experts_layer,
}
