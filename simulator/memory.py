"""Device memory as the engine counts it: weights, activations, overhead, KV pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from simulator.kv_layout import kv_layout
from simulator.model import Experts, LatentAttention, Layer
from simulator.ops import layer_gemms
from simulator.units import DTYPE_BYTES
from simulator.weights import weight_bytes_per_rank

if TYPE_CHECKING:
    from simulator.device import Device
    from simulator.kv_layout import KvLayout
    from simulator.model import ModelShape
    from simulator.plan import BatchingLimits

NULL_BLOCKS: Final = 1
"""vLLM keeps one block as the null block (v1/core/block_pool.py)."""

_RESIDUAL_STREAMS: Final = 3
"""Live hidden-width tensors at the MLP peak of vLLM's Llama layer (model_executor/models/llama.py):
the residual, the normalised input and the layer's output."""

_CONTEXT_CHUNK_TOKENS: Final = 64 * 1024
"""Cached tokens that latent attention expands at once in a prefill; the profile run allocates
their keys and values (vLLM 0.24.0, model_executor/layers/attention/mla_attention.py). It is less
for contexts below 8192 tokens, and 0.10.2 leaves it out of the profile."""


@dataclass(frozen=True)
class MemoryRules:
    """What an engine version takes besides weights and activations, and how it counts.

    Parameters
    ----------
    memory_fraction
        Share of the device that the engine may use (``gpu_memory_utilization``).
    overhead_bytes
        Bytes per rank outside the framework's allocator: communicators and workspaces.
    graph_bytes
        Bytes per rank that the engine sets aside for CUDA graphs inside its share.
    block_tokens
        Tokens of one KV block of plain attention.
    logit_bytes
        Bytes per sequence and vocabulary entry at the sampler's peak. Versions that sort the
        vocabulary (0.8 to 0.14 in public logs) hold 38: logits in bf16 and float32, sorted values
        and indices, and the sort's own buffers (``tests/unit/test_memory_facts.py``).
    state_dtype
        Dtype of recurrent states, see `simulator.kv_layout.kv_layout`.

    """

    memory_fraction: float
    overhead_bytes: int
    graph_bytes: int
    block_tokens: int
    logit_bytes: int
    state_dtype: str


@dataclass(frozen=True)
class MemoryBudget:
    """Where one rank's memory goes, all in bytes, and the KV pages that are left.

    ``num_blocks`` counts the pages that the scheduler can hand out: the null block is already
    taken off. It is zero or negative where nothing is left.
    """

    usable_bytes: int
    weight_bytes: int
    activation_bytes: int
    overhead_bytes: int
    graph_bytes: int
    layout: KvLayout
    num_blocks: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one page, which a dense model's block is."""
        return self.layout.page_bytes

    @property
    def fixed_bytes(self) -> int:
        """Bytes that must be there before the first KV page."""
        return self.weight_bytes + self.activation_bytes + self.overhead_bytes + self.graph_bytes


def activation_bytes_per_rank(
    model: ModelShape, tp: int, limits: BatchingLimits, logit_bytes: int
) -> int:
    """Peak activation bytes of the engine's profile run on one rank.

    The profile run (vLLM v1/worker/gpu_model_runner.py, ``profile_run``) feeds a full token
    budget through the layers and then a full set of sequences through the sampler; the two peaks
    do not coincide, so the larger counts. The layers peak in their widest part. Exact shapes are
    read off the sources for dense networks, fused experts (Triton) and the sampler; mixers count
    their projections and output, without what a kernel allocates inside. Worked against public
    logs in ``tests/unit/test_memory.py`` and ``test_memory_facts.py``.

    Parameters
    ----------
    model, tp
        The model and its tensor-parallel width.
    limits
        Token budget and sequences of the profile run.
    logit_bytes
        See `MemoryRules`.

    """
    bf16, tokens = DTYPE_BYTES["bf16"], limits.max_num_batched_tokens
    hidden = tokens * bf16 * model.hidden_size
    widest = max(_layer_peak_bytes(model, layer, tp, tokens) for layer in model.layer_counts)
    forward = widest + _RESIDUAL_STREAMS * hidden
    sampler = limits.max_num_seqs * model.vocab_size * logit_bytes + hidden
    return max(forward, sampler)


def memory_budget(
    model: ModelShape, device: Device, tp: int, limits: BatchingLimits, rules: MemoryRules
) -> MemoryBudget:
    """Memory of one rank under ``limits``; ranks are alike, so one stands for all.

    The formula is vLLM's ``determine_available_memory`` (v1/worker/gpu_worker.py): the device's
    share less weights, profile-run peak, memory outside the allocator and, from 0.20, the CUDA
    graph estimate; the rest is cut into pages.
    """
    usable = int(device.memory_bytes * rules.memory_fraction)
    weights = weight_bytes_per_rank(model, tp)
    activations = activation_bytes_per_rank(model, tp, limits, rules.logit_bytes)
    layout = kv_layout(model, tp, rules.block_tokens, rules.state_dtype)
    left = usable - weights - activations - rules.overhead_bytes - rules.graph_bytes
    return MemoryBudget(
        usable_bytes=usable,
        weight_bytes=weights,
        activation_bytes=activations,
        overhead_bytes=rules.overhead_bytes,
        graph_bytes=rules.graph_bytes,
        layout=layout,
        num_blocks=left // layout.page_bytes - NULL_BLOCKS,
    )


def _layer_peak_bytes(model: ModelShape, layer: Layer, tp: int, tokens: int) -> int:
    """Bytes that the wider half of ``layer`` holds at once, besides the residual streams."""
    mixer = layer.mixer
    mixed = tokens * _projected_elements(model, Layer(mixer, None), tp)
    if isinstance(mixer, LatentAttention):
        expanded = mixer.heads_per_rank(tp) * (mixer.qk_nope_head_dim + mixer.v_head_dim)
        mixed += _CONTEXT_CHUNK_TOKENS * expanded
    if isinstance(layer.ffn, Experts):
        fed = tokens * _expert_elements(model, layer.ffn, tp)
    else:
        fed = tokens * _projected_elements(model, Layer(None, layer.ffn), tp)
    return DTYPE_BYTES["bf16"] * max(mixed, fed)


def _projected_elements(model: ModelShape, half: Layer, tp: int) -> int:
    """Per token, what the projections of half a layer give and what the last of them takes."""
    gemms = layer_gemms(model, half, tp)
    return sum(gemm.n for gemm in gemms[:-1]) + gemms[-1].k if gemms else 0


def _expert_elements(model: ModelShape, ffn: Experts, tp: int) -> int:
    """Per token, the buffers of the fused experts or of the shared ones, which run before them.

    The first product's output and the last one's share a buffer, the activation between them has
    its own (layers/fused_moe/fused_moe.py, ``fused_experts_impl``). Versions up to 0.10.2 cut
    budgets above 32,768 tokens into chunks, 0.24.0 does not; no chunks are counted here.
    """
    inputs = 2 if ffn.gated else 1
    width, shared = ffn.intermediate_size // tp, ffn.shared_intermediate_size // tp
    routed = ffn.top_k * (max(inputs * width, ffn.latent_size or model.hidden_size) + width)
    if not shared:
        return routed + ffn.latent_size
    return max((inputs + 1) * shared, routed + ffn.latent_size + model.hidden_size)
