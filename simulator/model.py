"""The shape of a decoder-only transformer, as far as time and memory depend on it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# Widths have their Hugging Face meanings. `dtype` is a name of `simulator/precision.py`: how a
# component's projections are stored and multiplied. Norms and biases are bf16 everywhere.


@dataclass(frozen=True)
class Attention:
    """Softmax attention with one key and one value per KV head and token (MHA, GQA, MQA).

    Parameters
    ----------
    num_heads, num_kv_heads
        Query and KV heads of the whole model.
    head_dim, v_head_dim
        Width of a query or key, and of a value.
    window_tokens
        Most recent tokens that a query attends to, or 0 for all of them.
    gated
        Whether the query projection also gives an output gate of the same width (Qwen3.5).
    values_are_keys
        Whether values are the keys before their norm, so that there is no value projection
        (gemma 4's global layers); both are still cached.
    qkv_bias, output_bias
        Whether those projections carry a bias.
    vector_params
        Further parameters outside any matrix: query and key norms, sinks.
    dtype
        Precision of the projections.

    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    window_tokens: int = 0
    gated: bool = False
    values_are_keys: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    vector_params: int = 0
    dtype: str = "bf16"

    def heads_per_rank(self, tp: int) -> int:
        """Query heads on one tensor-parallel rank; ``tp`` divides the head count."""
        return self.num_heads // tp

    def kv_heads_per_rank(self, tp: int) -> int:
        """KV heads on one rank: replicated once ``tp`` exceeds their count (vLLM's rule)."""
        return max(1, self.num_kv_heads // tp)


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434), sparse or not.

    Parameters
    ----------
    num_heads
        Heads of the whole model; they share one latent KV vector per token.
    q_lora_rank
        Width of the compressed query, or 0 where queries are projected directly.
    kv_lora_rank, qk_rope_head_dim
        Widths of the cached latent and of the cached rotary key.
    qk_nope_head_dim, v_head_dim
        Widths per head after expansion.
    index_heads, index_head_dim, index_topk
        The sparse-attention indexer (DeepSeek-V3.2) and how many tokens it keeps; 0 without one.
    dtype
        Precision of the projections.

    """

    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_heads: int = 0
    index_head_dim: int = 0
    index_topk: int = 0
    dtype: str = "bf16"

    def heads_per_rank(self, tp: int) -> int:
        """Heads on one tensor-parallel rank; ``tp`` divides the head count."""
        return self.num_heads // tp


@dataclass(frozen=True)
class GatedDeltaNet:
    """Linear attention by the gated delta rule (arXiv 2412.06464), as in Qwen3-Next and Qwen3.5.

    Parameters
    ----------
    num_key_heads, num_value_heads
        Heads of the whole model.
    key_head_dim, value_head_dim
        Their widths; the state of a value head is one matrix of these two.
    conv_width
        Tokens of the causal convolution.
    dtype
        Precision of the projections.

    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_width: int
    dtype: str = "bf16"


@dataclass(frozen=True)
class Mamba2:
    """State-space layer (Mamba-2, arXiv 2405.21060).

    Parameters
    ----------
    num_heads, head_dim
        Heads of the whole model and their width.
    state_size, num_groups
        Width of the state, and groups that share its input and output projections.
    conv_width
        Tokens of the causal convolution.
    dtype
        Precision of the projections.

    """

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    conv_width: int
    dtype: str = "bf16"


@dataclass(frozen=True)
class Mlp:
    """Dense feed-forward network: two input matrices where ``gated``, else one; one output."""

    intermediate_size: int
    gated: bool = True
    bias: bool = False
    dtype: str = "bf16"


@dataclass(frozen=True)
class Experts:
    """Mixture of experts: a router, ``num_experts`` small networks, of which ``top_k`` are used.

    Parameters
    ----------
    num_experts, top_k
        Routed experts of the layer, and how many one token visits.
    intermediate_size
        Width of one routed expert.
    shared_intermediate_size
        Total width of the experts (or dense network) that every token visits, or 0.
    shared_gate
        Whether a one-column gate scales the shared experts' output (Qwen).
    gated, bias
        As in `Mlp`, for routed and shared experts alike.
    latent_size
        Width that tokens are projected to before the routed experts, or 0 (Nemotron 3 Super).
    router_params
        Router parameters beside its matrix: biases and score corrections.
    dtype, shared_dtype, latent_dtype
        Precision of the routed experts, of the shared ones and of the projections into and out
        of the latent width; the router is bf16.

    """

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    gated: bool = True
    bias: bool = False
    latent_size: int = 0
    router_params: int = 0
    dtype: str = "bf16"
    shared_dtype: str = "bf16"
    latent_dtype: str = "bf16"


Mixer = Attention | LatentAttention | GatedDeltaNet | Mamba2
Ffn = Mlp | Experts


@dataclass(frozen=True)
class Layer:
    """One layer: what mixes tokens, what works on each token, and its norms.

    ``mixer`` or ``ffn`` is ``None`` where the layer has no such part; ``norms`` counts weight
    vectors of hidden width.
    """

    mixer: Mixer | None
    ffn: Ffn | None
    norms: int = 2


@dataclass(frozen=True)
class ModelShape:
    """A whole model.

    Parameters
    ----------
    name
        Display name; nothing is ever keyed by it.
    layers
        Every layer in order; equal layers compare equal.
    hidden_size, vocab_size
        Width of the residual stream, and rows of the embedding.
    tie_word_embeddings
        Whether the head reuses the embedding matrix.
    max_position_embeddings
        Longest context the checkpoint supports, tokens.
    weight_dtype
        The checkpoint's quantisation, or the one asked for; ``bf16`` where none. Each component
        says for itself what it is stored in.
    kv_dtype
        Dtype of the KV cache, ``bf16`` or ``fp8``.
    other_params
        Parameters outside the decoder that the engine loads too (vision tower), bf16.

    """

    name: str
    layers: tuple[Layer, ...]
    hidden_size: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    weight_dtype: str = "bf16"
    kv_dtype: str = "bf16"
    other_params: int = 0

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @cached_property
    def layer_counts(self) -> Mapping[Layer, int]:
        """How often each distinct layer occurs, in order of first appearance."""
        return Counter(self.layers)
