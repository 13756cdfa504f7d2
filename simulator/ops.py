"""The operators of one iteration on one rank: their shapes and their traffic.

Kernels of attention, recurrent mixers and routed experts have modules of their own
(`simulator/attention.py`, `latent.py`, `recurrent.py`, `moe.py`); here is what surrounds them.
Layers are split as vLLM splits them (model_executor/models, model_executor/layers/linear.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulator.model import Attention, Experts, GatedDeltaNet, LatentAttention, Mamba2
from simulator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from simulator.model import Ffn, Layer, Mixer, Mlp, ModelShape
    from simulator.plan import Shape

BF16 = "bf16"


@dataclass(frozen=True)
class Gemm:
    """One projection: (tokens x k) by (k x n) in ``dtype``."""

    name: str
    n: int
    k: int
    dtype: str


@dataclass(frozen=True)
class Elementwise:
    """Kernels that stream activations once: how many, and their traffic for one token, bytes."""

    kernels: int
    bytes_per_token: float

    def __add__(self, other: Elementwise) -> Elementwise:
        """Both."""
        return Elementwise(
            self.kernels + other.kernels, self.bytes_per_token + other.bytes_per_token
        )


def layer_gemms(model: ModelShape, layer: Layer, shape: Shape) -> tuple[Gemm, ...]:
    """Projections of one layer on one rank that run over all tokens of its iteration.

    vLLM fuses projections of one input into one product (q, k and v; gate and up; the two latent
    projections of MLA). Latent projections, routers and indexers are replicated over ranks. Dense
    networks and shared experts are cut over attention's ``tp`` ranks (vLLM's tensor-parallel group,
    also under attention data parallel); routed experts are `simulator/moe.py`'s.
    """
    return _mixer_gemms(layer.mixer, model.hidden_size, shape.tp) + _ffn_gemms(
        layer.ffn, model.hidden_size, shape.tp
    )


def _mixer_gemms(mixer: Mixer | None, hidden: int, tp: int) -> tuple[Gemm, ...]:
    if isinstance(mixer, Attention):
        return _attention_gemms(mixer, hidden, tp)
    if isinstance(mixer, LatentAttention):
        return latent_gemms(mixer, hidden, mixer.heads_per_rank(tp))
    if isinstance(mixer, GatedDeltaNet):
        keys = 2 * mixer.num_key_heads * mixer.key_head_dim // tp
        values = mixer.num_value_heads * mixer.value_head_dim // tp
        return (
            Gemm("qkvz", keys + 2 * values, hidden, mixer.dtype),
            Gemm("beta and decay", 2 * mixer.num_value_heads // tp, hidden, BF16),
            Gemm("mixer output", hidden, values, mixer.dtype),
        )
    if isinstance(mixer, Mamba2):
        inner = mixer.num_heads * mixer.head_dim // tp
        states = 2 * max(1, mixer.num_groups // tp) * mixer.state_size
        return (
            Gemm("mixer input", 2 * inner + states + mixer.num_heads // tp, hidden, mixer.dtype),
            Gemm("mixer output", hidden, inner, mixer.dtype),
        )
    return ()


def _attention_gemms(mixer: Attention, hidden: int, tp: int) -> tuple[Gemm, ...]:
    heads, kv_heads = mixer.heads_per_rank(tp), mixer.kv_heads_per_rank(tp)
    queries = heads * mixer.head_dim * (2 if mixer.gated else 1)
    values = 0 if mixer.values_are_keys else kv_heads * mixer.v_head_dim
    return (
        Gemm("qkv", queries + kv_heads * mixer.head_dim + values, hidden, mixer.dtype),
        Gemm("attention output", hidden, heads * mixer.v_head_dim, mixer.dtype),
    )


def latent_gemms(mixer: LatentAttention, hidden: int, heads: int) -> tuple[Gemm, ...]:
    """Projections of latent attention for ``heads`` heads on the rank (vLLM deepseek_v2.py)."""
    latent = mixer.kv_lora_rank + mixer.qk_rope_head_dim
    query = heads * (mixer.qk_nope_head_dim + mixer.qk_rope_head_dim)
    if mixer.q_lora_rank:
        inputs = (
            Gemm("latent down", mixer.q_lora_rank + latent, hidden, mixer.dtype),
            Gemm("query up", query, mixer.q_lora_rank, mixer.dtype),
        )
    else:
        inputs = (
            Gemm("latent down", latent, hidden, mixer.dtype),
            Gemm("query", query, hidden, mixer.dtype),
        )
    output = Gemm("attention output", hidden, heads * mixer.v_head_dim, mixer.dtype)
    if not mixer.index_heads:
        return (*inputs, output)
    index_query = mixer.index_heads * mixer.index_head_dim
    return (
        *inputs,
        Gemm("indexer query", index_query, mixer.q_lora_rank or hidden, mixer.dtype),
        Gemm("indexer key", mixer.index_head_dim + mixer.index_heads, hidden, BF16),
        output,
    )


def _ffn_gemms(ffn: Ffn | None, hidden: int, tp: int) -> tuple[Gemm, ...]:
    if ffn is None:
        return ()
    if not isinstance(ffn, Experts):
        return _mlp_gemms("", ffn.intermediate_size // tp, hidden, ffn, ffn.dtype)
    gemms = [Gemm("router", ffn.num_experts, hidden, BF16)]
    if ffn.shared_intermediate_size:
        width = ffn.shared_intermediate_size // tp
        gemms += _mlp_gemms("shared ", width, hidden, ffn, ffn.shared_dtype)
    if ffn.latent_size:
        gemms.append(Gemm("expert latent down", ffn.latent_size, hidden, ffn.latent_dtype))
        gemms.append(Gemm("expert latent up", hidden, ffn.latent_size, ffn.latent_dtype))
    return tuple(gemms)


def _mlp_gemms(
    prefix: str, width: int, hidden: int, ffn: Mlp | Experts, dtype: str
) -> tuple[Gemm, ...]:
    inputs = ("gate and up", 2 * width) if ffn.gated else ("up", width)
    return (
        Gemm(prefix + inputs[0], inputs[1], hidden, dtype),
        Gemm(prefix + "down", hidden, width, dtype),
    )


def head_gemm(model: ModelShape, shape: Shape) -> Gemm:
    """Projection onto the vocabulary, split over ``tp`` ranks, for sampled positions only."""
    return Gemm("head", -(-model.vocab_size // shape.tp), model.hidden_size, BF16)


def elementwise(model: ModelShape, layer: Layer, shape: Shape) -> Elementwise:
    """Kernels of one layer that are neither projections, mixers' kernels nor collectives.

    Counted in bf16 elements. A norm, fused with the residual addition, reads input and residual
    and writes both. Quantising a product's input is part of the measured product.
    """
    hidden = model.hidden_size
    out = Elementwise(layer.norms, layer.norms * 4 * hidden * DTYPE_BYTES[BF16])
    mixer, ffn, tp = layer.mixer, layer.ffn, shape.tp
    if isinstance(mixer, Attention):
        out += _attention_elementwise(mixer, tp)
    elif isinstance(mixer, (GatedDeltaNet, Mamba2)):
        # The gated norm after the scan reads the scan's output and the gate and writes one.
        width = (
            mixer.num_value_heads * mixer.value_head_dim
            if isinstance(mixer, GatedDeltaNet)
            else mixer.num_heads * mixer.head_dim
        )
        out += Elementwise(1, 3 * width // tp * DTYPE_BYTES[BF16])
    if isinstance(ffn, Experts):
        # Scores are read and the chosen experts' weights and numbers written, in float32.
        out += Elementwise(1, (ffn.num_experts + 2 * ffn.top_k) * DTYPE_BYTES["fp32"])
        if ffn.shared_intermediate_size:
            # The activation, and the sum of shared and routed output.
            out += _activation(ffn.shared_intermediate_size // tp, gated=ffn.gated)
            out += Elementwise(1, 3 * hidden * DTYPE_BYTES[BF16])
    elif ffn is not None:
        out += _activation(ffn.intermediate_size // tp, gated=ffn.gated)
    return out


def _attention_elementwise(mixer: Attention, tp: int) -> Elementwise:
    """Rotary embedding and KV-cache write."""
    bf16 = DTYPE_BYTES[BF16]
    queries = mixer.heads_per_rank(tp) * mixer.head_dim
    keys = mixer.kv_heads_per_rank(tp) * mixer.head_dim
    values = mixer.kv_heads_per_rank(tp) * mixer.v_head_dim
    rotary, cache_write = 2 * (queries + keys), 2 * (keys + values)
    out = Elementwise(2, (rotary + cache_write) * bf16)
    if mixer.gated:  # reads output and gate, writes their product
        out += Elementwise(1, 3 * mixer.heads_per_rank(tp) * mixer.v_head_dim * bf16)
    return out


def _activation(width: int, *, gated: bool) -> Elementwise:
    """Reads the input product (gate and up where gated) and writes the output product's input."""
    return Elementwise(1, (3 if gated else 2) * width * DTYPE_BYTES[BF16])


def sampler_bytes_per_sequence(model: ModelShape) -> int:
    """Memory traffic of sampling one token from the full logits, bytes.

    vLLM's sampler (v1/sample/sampler.py) casts the gathered bf16 logits to float32, normalises
    them and draws: one bf16 read, one float32 write and two float32 reads per entry.
    """
    return model.vocab_size * (DTYPE_BYTES[BF16] + 3 * DTYPE_BYTES["fp32"])
