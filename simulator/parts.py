"""Times of one layer's operators on one rank, over every size that a plan may meet."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

import numpy as np

from simulator.attention import (
    context_attention_s,
    context_underfill_s,
    generation_attention_s,
)
from simulator.gemm import gemm_s
from simulator.interpolate import Provenance
from simulator.latent import latent_context_s, latent_generation_s, latent_underfill_s
from simulator.model import Attention, Experts, LatentAttention
from simulator.moe import moe_s
from simulator.ops import elementwise, layer_gemms
from simulator.recurrent import recurrent_context_s, recurrent_generation_s

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from simulator.device import Device
    from simulator.interpolate import FloatArray, LabelArray
    from simulator.model import GatedDeltaNet, Layer, Mamba2, ModelShape
    from simulator.plan import Shape
    from simulator.table import KernelTable

EXPERT_SKEW: Final = 1.2
"""Exponent of the power law by which tokens choose experts. Of the measured distributions
(balanced, 1.01, 1.2) this one suits public decode times of MiniMax-M2 and gpt-oss in vLLM on H100;
balanced routing reads 20 to 45 % too slow at 32 sequences: it touches more distinct experts."""


class Axis(Enum):
    """What a part's time is counted over."""

    TOKENS = "all tokens of an iteration"
    GROUPS_TOKENS = "all tokens of an iteration in all attention groups"
    PROMPT_TOKENS = "prompt tokens of an iteration"
    DECODES = "decoding sequences and their mean context"
    PROMPT = "tokens of one prompt so far"
    SAMPLED = "sequences that emit a token"


@dataclass(frozen=True, eq=False)
class Part:
    """One operator's time in one iteration.

    Parameters
    ----------
    name
        What a person calls it.
    axis
        What the arrays are indexed by.
    time_s, label
        Seconds and their provenance, alike in shape: (T + 1,) from 0 tokens for `Axis.TOKENS` and
        `Axis.PROMPT_TOKENS`, (D * T + 1,) for `Axis.GROUPS_TOKENS` of D groups, (S + 1, K) from 0
        sequences for `Axis.DECODES`, (L + 1,) from 0 tokens for `Axis.PROMPT`, (S + 1,) from 0
        sequences for `Axis.SAMPLED`. A time of nothing is the launch for `Axis.DECODES` and
        meaningless elsewhere.

    """

    name: str
    axis: Axis
    time_s: FloatArray
    label: LabelArray

    def times(self, count: int) -> Part:
        """The part of ``count`` layers alike."""
        return Part(self.name, self.axis, count * self.time_s, self.label)

    def __add__(self, other: Part) -> Part:
        """Both, under the worse label of each size."""
        label = np.maximum(self.label, other.label)
        return Part(self.name, self.axis, self.time_s + other.time_s, label)


@dataclass(frozen=True, eq=False)
class Sizes:
    """Every size that a plan may meet.

    Tokens from 0, (T + 1,); sequences from 1, (S,); mean contexts, (K,); prompt lengths from 0,
    (L + 1,).
    """

    tokens: npt.NDArray[np.int64]
    sequences: npt.NDArray[np.int64]
    contexts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    def in_groups(self, groups: int) -> npt.NDArray[np.int64]:
        """Tokens from 0 that ``groups`` attention groups can have together, (D * T + 1,)."""
        return np.arange(groups * (len(self.tokens) - 1) + 1)


def layer_parts(
    model: ModelShape, device: Device, table: KernelTable, layer: Layer, shape: Shape, sizes: Sizes
) -> Iterator[Part]:
    """Every operator of one layer on one rank but its collectives; names may repeat.

    Sizes count what the rank's own attention group holds. Under attention data parallel routed
    experts meet the tokens of all groups and are counted over those (`Axis.GROUPS_TOKENS`).
    """
    rows = np.maximum(sizes.tokens, 1)
    for op in layer_gemms(model, layer, shape):
        time_s, label = gemm_s(table, device, op.dtype, rows, op.n, op.k)
        yield Part(f"gemm {op.name}", Axis.TOKENS, time_s, label)
    if isinstance(layer.ffn, Experts):
        yield _experts(model, device, table, layer.ffn, shape, sizes)
    streams = elementwise(model, layer, shape)
    traffic_bytes = streams.bytes_per_token * sizes.tokens.astype(np.float64)
    traffic_s = traffic_bytes / device.elementwise_bytes_per_s
    launches_s = streams.kernels * device.elementwise_launch_s
    # Launch and bandwidth are measured, on a kernel of the same kind.
    label = np.full(len(rows), Provenance.INTERPOLATED, dtype=np.int8)
    yield Part("elementwise", Axis.TOKENS, launches_s + traffic_s, label)
    mixer = layer.mixer
    if isinstance(mixer, Attention):
        yield from _attention(model, device, table, mixer, shape.tp, sizes)
    elif isinstance(mixer, LatentAttention):
        yield from _latent(model, device, table, mixer, shape.tp, sizes)
    elif mixer is not None:
        yield from _recurrent(device, table, mixer, shape.tp, sizes)


def _experts(
    model: ModelShape,
    device: Device,
    table: KernelTable,
    ffn: Experts,
    shape: Shape,
    sizes: Sizes,
) -> Part:
    """Routed experts of the most loaded rank."""
    time_s, label = moe_s(
        table,
        device,
        ffn.dtype,
        hidden_size=ffn.latent_size or model.hidden_size,
        intermediate_size=ffn.intermediate_size,
        top_k=ffn.top_k,
        num_experts=ffn.num_experts,
        moe_tp=shape.moe_tp,
        moe_ep=shape.ep,
        gated=ffn.gated,
        skew=EXPERT_SKEW,
        tokens=np.maximum(sizes.in_groups(shape.dp), 1),
    )
    axis = Axis.TOKENS if shape.dp == 1 else Axis.GROUPS_TOKENS
    return Part("experts", axis, time_s, label)


def _attention(
    model: ModelShape,
    device: Device,
    table: KernelTable,
    mixer: Attention,
    tp: int,
    sizes: Sizes,
) -> Iterator[Part]:
    # Where keys and values differ in width (MiMo) the wider one stands for both.
    width = max(mixer.head_dim, mixer.v_head_dim)
    heads, kv_heads = mixer.heads_per_rank(tp), mixer.kv_heads_per_rank(tp)
    kernel = (table, device, model.kv_dtype, width, heads, kv_heads)
    windowed = "windowed " if mixer.window_tokens else ""
    time_s, label = generation_attention_s(
        *kernel, sizes.sequences, sizes.contexts, window_tokens=mixer.window_tokens
    )
    prompt_s, launch_s, label_of_length = context_attention_s(
        *kernel, sizes.lengths, window_tokens=mixer.window_tokens
    )
    underfill_s, label_of_tokens = context_underfill_s(
        *kernel, sizes.tokens, window_tokens=mixer.window_tokens
    )
    yield _decodes(f"{windowed}decode attention", time_s, label, launch_s)
    yield Part(f"{windowed}prefill attention", Axis.PROMPT, prompt_s, label_of_length)
    name = f"{windowed}prefill underfill"
    yield Part(name, Axis.PROMPT_TOKENS, underfill_s, label_of_tokens)


def _latent(
    model: ModelShape,
    device: Device,
    table: KernelTable,
    mixer: LatentAttention,
    tp: int,
    sizes: Sizes,
) -> Iterator[Part]:
    kernel = (table, device, mixer, mixer.heads_per_rank(tp), model.kv_dtype)
    time_s, label = latent_generation_s(*kernel, sizes.sequences, sizes.contexts)
    prompt_s, launch_s, label_of_length = latent_context_s(*kernel, sizes.lengths)
    underfill_s, label_of_tokens = latent_underfill_s(*kernel, sizes.tokens)
    yield _decodes("decode attention", time_s, label, launch_s)
    yield Part("prefill attention", Axis.PROMPT, prompt_s, label_of_length)
    yield Part("prefill underfill", Axis.PROMPT_TOKENS, underfill_s, label_of_tokens)


def _recurrent(
    device: Device,
    table: KernelTable,
    mixer: GatedDeltaNet | Mamba2,
    tp: int,
    sizes: Sizes,
) -> Iterator[Part]:
    time_s, label = recurrent_generation_s(table, device, mixer, tp, sizes.sequences)
    prompt_s, launch_s, label_of_length = recurrent_context_s(
        table, device, mixer, tp, sizes.lengths
    )
    shape = (len(sizes.sequences), len(sizes.contexts))
    yield _decodes(
        "decode recurrence",
        np.broadcast_to(time_s[:, None], shape),
        np.broadcast_to(label[:, None], shape),
        launch_s,
    )
    yield Part("prefill recurrence", Axis.PROMPT, prompt_s, label_of_length)


def _decodes(name: str, time_s: FloatArray, label: LabelArray, launch_s: float) -> Part:
    """A part over decoding sequences; with none of them a launch remains for the prompts."""
    none = np.full((1, time_s.shape[1]), launch_s)
    return Part(name, Axis.DECODES, np.vstack([none, time_s]), np.vstack([label[:1], label]))
