"""Bytes of activations at the peak of one iteration, as the engine's profile run sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from simulator.model import Experts, LatentAttention, Layer
from simulator.ops import layer_gemms
from simulator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from simulator.model import ModelShape
    from simulator.plan import BatchingLimits, Shape

_RESIDUAL_STREAMS: Final = 3
"""Live hidden-width tensors at the MLP peak of vLLM's Llama layer (model_executor/models/llama.py):
the residual, the normalised input and the layer's output."""

_CONTEXT_CHUNK_TOKENS: Final = 64 * 1024
"""Cached tokens that latent attention expands at once in a prefill; the profile run allocates
their keys and values (vLLM 0.24.0, model_executor/layers/attention/mla_attention.py). It is less
for contexts below 8192 tokens, and 0.10.2 leaves it out of the profile."""


def activation_bytes_per_rank(
    model: ModelShape, shape: Shape, limits: BatchingLimits, logit_bytes: int
) -> int:
    """Peak activation bytes of the engine's profile run on one rank.

    A ``logit_bytes`` of 0 leaves the sampler out, as in all pipeline stages but the last.

    The profile run (vLLM v1/worker/gpu_model_runner.py, ``profile_run``) feeds a full token
    budget through the layers and then a full set of sequences through the sampler; the two peaks
    do not coincide, so the larger counts. The layers peak in their widest part. Exact shapes are
    read off the sources for dense networks, fused experts (Triton) and the sampler; mixers count
    their projections and output, without what a kernel allocates inside. Worked against public
    logs in ``tests/unit/test_memory.py`` and ``test_memory_facts.py``.

    Parameters
    ----------
    model, shape
        What is served, and how it is spread.
    limits
        Token budget and sequences of the profile run.
    logit_bytes
        See `MemoryRules`.

    """
    bf16, tokens = DTYPE_BYTES["bf16"], limits.max_num_batched_tokens
    hidden = tokens * bf16 * model.hidden_size
    widest = max(_layer_peak_bytes(model, layer, shape, tokens) for layer in model.layer_counts)
    forward = widest + _RESIDUAL_STREAMS * hidden
    sampler = limits.max_num_seqs * model.vocab_size * logit_bytes + hidden
    return max(forward, sampler)


def _layer_peak_bytes(model: ModelShape, layer: Layer, shape: Shape, tokens: int) -> int:
    """Bytes that the wider half of ``layer`` holds at once, besides the residual streams."""
    mixer = layer.mixer
    mixed = tokens * _projected_elements(model, Layer(mixer, None), shape)
    if isinstance(mixer, LatentAttention):
        expanded = mixer.heads_per_rank(shape.tp) * (mixer.qk_nope_head_dim + mixer.v_head_dim)
        mixed += _CONTEXT_CHUNK_TOKENS * expanded
    if isinstance(layer.ffn, Experts):
        fed = tokens * _expert_elements(model, layer.ffn, shape)
    else:
        fed = tokens * _projected_elements(model, Layer(None, layer.ffn), shape)
    return DTYPE_BYTES["bf16"] * max(mixed, fed)


def _projected_elements(model: ModelShape, half: Layer, shape: Shape) -> int:
    """Per token, what the projections of half a layer give and what the last of them takes."""
    gemms = layer_gemms(model, half, shape)
    return sum(gemm.n for gemm in gemms[:-1]) + gemms[-1].k if gemms else 0


def _expert_elements(model: ModelShape, ffn: Experts, shape: Shape) -> int:
    """Per token, the buffers of the fused experts or of the shared ones, which run before them.

    A rank has room for every copy of the tokens of all attention groups, also of copies that other
    ranks compute (``fused_experts_impl`` sizes by tokens, whatever experts it holds).
    The first product's output and the last one's share a buffer, the activation between them has
    its own (layers/fused_moe/fused_moe.py, ``fused_experts_impl``). Versions up to 0.10.2 cut
    budgets above 32,768 tokens into chunks, 0.24.0 does not; no chunks are counted here.
    """
    inputs = 2 if ffn.gated else 1
    width = ffn.intermediate_size // shape.moe_tp
    shared = ffn.shared_intermediate_size // shape.tp
    copy = max(inputs * width, ffn.latent_size or model.hidden_size) + width
    routed = shape.dp * ffn.top_k * copy
    if not shared:
        return routed + ffn.latent_size
    return max((inputs + 1) * shared, routed + ffn.latent_size + model.hidden_size)
