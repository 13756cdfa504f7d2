"""Device memory as the engine counts it: weights, activations, overhead, KV blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from simulator.device import Device
    from simulator.model import ModelShape
    from simulator.plan import BatchingLimits

NULL_BLOCKS = 1
"""vLLM keeps one block as the null block (v1/core/block_pool.py)."""

_RESIDUAL_STREAMS = 3
"""Live hidden-width tensors at the MLP peak of vLLM's Llama layer (model_executor/models/llama.py):
the residual, the normalised input and the layer's output."""

_SAMPLER_COPIES = 2
"""Float32 copies of the logits that the sampler holds at its peak (v1/sample/sampler.py): the
cast logits and the sorted or soft-maxed copy."""


@dataclass(frozen=True)
class MemoryRules:
    """What an engine version takes besides weights and activations.

    Parameters
    ----------
    memory_fraction
        Share of the device that the engine may use (``gpu_memory_utilization``).
    overhead_bytes
        Bytes per rank outside the framework's allocator: communicators and workspaces.
    graph_bytes
        Bytes per rank that the engine sets aside for CUDA graphs inside its share.
    block_tokens
        Tokens of one KV block.

    """

    memory_fraction: float
    overhead_bytes: int
    graph_bytes: int
    block_tokens: int


@dataclass(frozen=True)
class MemoryBudget:
    """Where one rank's memory goes, all in bytes, and the KV blocks that are left.

    ``num_blocks`` is what the scheduler can hand out: the null block is already taken off. It is
    zero or negative where nothing is left.
    """

    usable_bytes: int
    weight_bytes: int
    activation_bytes: int
    overhead_bytes: int
    graph_bytes: int
    block_bytes: int
    num_blocks: int

    @property
    def fixed_bytes(self) -> int:
        """Bytes that must be there before the first KV block."""
        return self.weight_bytes + self.activation_bytes + self.overhead_bytes + self.graph_bytes


def weight_bytes_per_rank(model: ModelShape, tp: int) -> int:
    """Bytes of the weights that one of ``tp`` ranks holds.

    Projections are split over ranks and stored in ``weight_dtype``; embedding and head are split
    over the vocabulary and norms are replicated, all bf16. KV projections are replicated once
    ``tp`` exceeds the KV heads.
    """
    bf16 = DTYPE_BYTES["bf16"]
    q_width = model.heads_per_rank(tp) * model.head_dim
    kv_width = model.kv_heads_per_rank(tp) * model.head_dim
    ffn_width = model.intermediate_size // tp
    projections = model.hidden_size * (2 * q_width + 2 * kv_width + 3 * ffn_width)
    norms = 2 * model.hidden_size + (2 * model.head_dim if model.qk_norm else 0)
    biases = q_width + 2 * kv_width if model.qkv_bias else 0
    layer = projections * DTYPE_BYTES[model.weight_dtype] + (norms + biases) * bf16
    matrices = 1 if model.tie_word_embeddings else 2
    vocabulary = matrices * -(-model.vocab_size // tp) * model.hidden_size * bf16
    return model.num_layers * layer + vocabulary + model.hidden_size * bf16


def activation_bytes_per_rank(model: ModelShape, tp: int, limits: BatchingLimits) -> int:
    """Peak activation bytes of the engine's profile run on one rank.

    The profile run (vLLM v1/worker/gpu_model_runner.py, ``profile_run``) feeds a full token
    budget through the layers and then a full set of sequences through the sampler; the two peaks
    do not coincide, so the larger counts. Worked against public logs in
    ``tests/unit/test_memory.py``.
    """
    bf16, fp32 = DTYPE_BYTES["bf16"], DTYPE_BYTES["fp32"]
    mlp_width = 3 * (model.intermediate_size // tp)  # gate and up together, and their product
    forward = (
        limits.max_num_batched_tokens * bf16 * (mlp_width + _RESIDUAL_STREAMS * model.hidden_size)
    )
    hidden = limits.max_num_batched_tokens * bf16 * model.hidden_size
    sampler = limits.max_num_seqs * model.vocab_size * (bf16 + _SAMPLER_COPIES * fp32) + hidden
    return max(forward, sampler)


def kv_bytes_per_token(model: ModelShape, tp: int) -> int:
    """KV-cache bytes of one token on one rank: keys and values of every layer."""
    return (
        2
        * model.num_layers
        * model.kv_heads_per_rank(tp)
        * model.head_dim
        * DTYPE_BYTES[model.kv_dtype]
    )


def memory_budget(
    model: ModelShape, device: Device, tp: int, limits: BatchingLimits, rules: MemoryRules
) -> MemoryBudget:
    """Memory of one rank under ``limits``; ranks are alike, so one stands for all.

    The formula is vLLM's ``determine_available_memory`` (v1/worker/gpu_worker.py): the device's
    share less weights, profile-run peak, memory outside the allocator and, from 0.20, the CUDA
    graph estimate; the rest is cut into blocks.
    """
    usable = int(device.memory_bytes * rules.memory_fraction)
    weights = weight_bytes_per_rank(model, tp)
    activations = activation_bytes_per_rank(model, tp, limits)
    block = rules.block_tokens * kv_bytes_per_token(model, tp)
    left = usable - weights - activations - rules.overhead_bytes - rules.graph_bytes
    return MemoryBudget(
        usable_bytes=usable,
        weight_bytes=weights,
        activation_bytes=activations,
        overhead_bytes=rules.overhead_bytes,
        graph_bytes=rules.graph_bytes,
        block_bytes=block,
        num_blocks=left // block - NULL_BLOCKS,
    )
