"""The shape of a dense transformer, as far as time and memory depend on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a dense decoder-only transformer with a gated MLP.

    Parameters
    ----------
    name
        Display name; nothing is ever keyed by it.
    num_layers, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size
        Counts and widths under their Hugging Face meanings; ``head_dim`` is explicit because
        ``hidden_size / num_heads`` is wrong for some families (Qwen3, Mistral-Nemo).
    tie_word_embeddings
        Whether the head reuses the embedding matrix.
    qkv_bias
        Whether the q, k and v projections carry a bias (Qwen2).
    qk_norm
        Whether q and k are normalised per head (Qwen3).
    max_position_embeddings
        Longest context the checkpoint supports, tokens.
    weight_dtype, kv_dtype
        ``bf16`` or ``fp8``: dtype of the layers' projections and of the KV cache. Embedding,
        head and norms stay bf16 in either case.

    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    max_position_embeddings: int
    weight_dtype: str = "bf16"
    kv_dtype: str = "bf16"

    def heads_per_rank(self, tp: int) -> int:
        """Query heads on one tensor-parallel rank; ``tp`` divides the head count."""
        return self.num_heads // tp

    def kv_heads_per_rank(self, tp: int) -> int:
        """KV heads on one rank: replicated once ``tp`` exceeds their count (vLLM's rule)."""
        return max(1, self.num_kv_heads // tp)
