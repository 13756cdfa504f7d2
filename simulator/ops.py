"""The operators of one iteration on one tensor-parallel rank: their shapes and their traffic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from simulator.model import ModelShape

ALL_REDUCES_PER_LAYER = 2
"""After attention's output projection and after the MLP (Megatron-LM, arXiv 1909.08053)."""


@dataclass(frozen=True)
class Gemm:
    """One projection: (tokens x k) by (k x n) in ``dtype``."""

    name: str
    n: int
    k: int
    dtype: str


def layer_gemms(model: ModelShape, tp: int) -> tuple[Gemm, ...]:
    """Projections of one transformer layer on one rank.

    vLLM fuses q, k and v into one product and gate and up into another
    (model_executor/models/llama.py).
    """
    q_width = model.heads_per_rank(tp) * model.head_dim
    kv_width = model.kv_heads_per_rank(tp) * model.head_dim
    ffn_width = model.intermediate_size // tp
    dtype = model.weight_dtype
    return (
        Gemm("qkv", q_width + 2 * kv_width, model.hidden_size, dtype),
        Gemm("attention output", model.hidden_size, q_width, dtype),
        Gemm("gate and up", 2 * ffn_width, model.hidden_size, dtype),
        Gemm("down", model.hidden_size, ffn_width, dtype),
    )


def head_gemm(model: ModelShape, tp: int) -> Gemm:
    """Projection onto the vocabulary, split over ranks, for sampled positions only."""
    return Gemm("head", -(-model.vocab_size // tp), model.hidden_size, "bf16")


def elementwise_kernels_per_layer(model: ModelShape) -> int:
    """Kernels of one layer that are neither projections, attention nor collectives.

    Two fused residual-add-and-norm kernels, rotary embedding, KV-cache write and gated
    activation. With fp8 weights the attention output is quantised by a kernel of its own; the
    other inputs are quantised inside the kernel that writes them (vLLM lets the compiler fuse
    them, config/compilation.py).
    """
    return 6 if model.weight_dtype == "fp8" else 5


def elementwise_bytes_per_token(model: ModelShape, tp: int) -> int:
    """Memory traffic of those kernels for one token of one layer on one rank, bytes.

    Counted in bf16 elements: the norms read input and residual and write both, rotary embedding
    reads and writes q and k, the cache write reads and writes k and v, the activation reads gate
    and up and writes their product, and the quantisation reads the attention output and writes
    half as many bytes.
    """
    q_width = model.heads_per_rank(tp) * model.head_dim
    kv_width = model.kv_heads_per_rank(tp) * model.head_dim
    ffn_width = model.intermediate_size // tp
    norms = 2 * 4 * model.hidden_size
    rotary = 2 * (q_width + kv_width)
    cache_write = 2 * 2 * kv_width
    activation = 3 * ffn_width
    traffic = (norms + rotary + cache_write + activation) * DTYPE_BYTES["bf16"]
    if model.weight_dtype == "fp8":
        traffic += q_width * (DTYPE_BYTES["bf16"] + DTYPE_BYTES["fp8"])
    return traffic


def sampler_bytes_per_sequence(model: ModelShape) -> int:
    """Memory traffic of sampling one token from the full logits, bytes.

    vLLM's sampler (v1/sample/sampler.py) casts the gathered bf16 logits to float32, normalises
    them and draws: one bf16 read, one float32 write and two float32 reads per entry.
    """
    return model.vocab_size * (DTYPE_BYTES["bf16"] + 3 * DTYPE_BYTES["fp32"])
