"""Compiles the iteration cost of a plan from measured kernels and an engine version's constants."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.attention import context_attention_s, generation_attention_s
from simulator.collectives import all_reduce_s, nccl_s
from simulator.gemm import gemm_s
from simulator.interpolate import Provenance
from simulator.ops import (
    ALL_REDUCES_PER_LAYER,
    elementwise_bytes_per_token,
    elementwise_kernels_per_layer,
    head_gemm,
    layer_gemms,
    sampler_bytes_per_sequence,
)
from simulator.plan import BatchingLimits
from simulator.timing import IterationCost
from simulator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from simulator.device import Device
    from simulator.model import ModelShape
    from simulator.table import KernelTable

    Floats = npt.NDArray[np.float64]

_KNOTS_PER_OCTAVE = 2
"""Knots of mean context per factor of two. The tables have one; the extra knot keeps the
piecewise-linear form within 1 % of the interpolated tables (tests/unit/test_timing.py)."""


@dataclass(frozen=True)
class HostConstants:
    """What no kernel table sees: host time and scheduling effects of one engine version.

    Parameters
    ----------
    iteration_s
        Host time that each iteration adds.
    sequence_s
        Host time that each sampled sequence adds to its iteration.
    ingress_s
        From the client's send to the scheduler's queue: HTTP, tokenising, hand-over.
    eager_layer_s
        Least time of a layer in an iteration that runs outside a full CUDA graph.
    prefill_multiplier
        Factor on the device time of an iteration that computes prompt tokens.

    """

    iteration_s: float = 0.0
    sequence_s: float = 0.0
    ingress_s: float = 0.0
    eager_layer_s: float = 0.0
    prefill_multiplier: float = 1.0

    def __post_init__(self) -> None:
        """Refuse constants that would make prompt tokens cheaper than decode tokens."""
        if self.prefill_multiplier < 1.0:
            raise ValueError(f"prefill_multiplier is {self.prefill_multiplier}; it must be >= 1")


@dataclass(frozen=True)
class GraphRules:
    """Which batches an engine version replays from a CUDA graph.

    Parameters
    ----------
    sizes
        Capture sizes, ascending, tokens.
    full_decode
        Whether a pure decode batch replays as one graph; otherwise only the pieces between
        attention calls do.
    captures_budget
        Whether the token budget itself is captured too where it is in the captured range.

    """

    sizes: tuple[int, ...]
    full_decode: bool
    captures_budget: bool = False

    def captured(self, limits: BatchingLimits) -> tuple[int, ...]:
        """Sizes captured under ``limits``: up to twice the sequences and the token budget.

        vLLM config/vllm.py, ``_set_cudagraph_sizes``.
        """
        budget = limits.max_num_batched_tokens
        range_end = min(2 * limits.max_num_seqs, self.sizes[-1]) if self.sizes else 0
        captured = {size for size in self.sizes if size <= min(range_end, budget)}
        if self.captures_budget and budget <= range_end:
            captured.add(budget)
        return tuple(sorted(captured))


class _Axis(Enum):
    """What an operator's labels are indexed by."""

    TOKENS = "tokens"
    SEQUENCES = "sequences"
    BATCH_AND_CONTEXT = "batch and context"
    CONTEXT = "context"


@dataclass(frozen=True)
class _Layers:
    """Time of all layers on one rank without attention, by tokens, part by part."""

    gemm_s: Floats
    elementwise_s: Floats
    graph_reduce_s: Floats
    eager_reduce_s: Floats


class CostCompiler:
    """Compiles iteration costs of one model on one device, reusing what plans share.

    Parameters
    ----------
    model, device, table
        What runs, on what, and the measured times.
    host, graphs
        Constants and CUDA-graph rules of the engine version.
    nccl_all_reduce_from_bytes
        By ``tp``, the message size from which NCCL reduces instead of the engine's own kernel.
    max_tokens, max_seqs, max_context
        Largest token budget, sequence count and context that any plan will ask for.

    """

    def __init__(
        self,
        model: ModelShape,
        device: Device,
        table: KernelTable,
        host: HostConstants,
        graphs: GraphRules,
        *,
        nccl_all_reduce_from_bytes: Mapping[int, int] = MappingProxyType({}),
        max_tokens: int,
        max_seqs: int,
        max_context: int,
    ) -> None:
        self._model = model
        self._device = device
        self._table = table
        self._host = host
        self._graphs = graphs
        self._nccl_from_bytes = nccl_all_reduce_from_bytes
        self._tokens = np.arange(max_tokens + 1)
        self._max_seqs = max_seqs
        self._max_context = max_context
        self._costs: dict[tuple[int, BatchingLimits], IterationCost] = {}
        self._linear: dict[tuple[int, tuple[int, ...]], tuple[Floats, Floats]] = {}
        self._layers: dict[int, _Layers] = {}
        self._attention: dict[int, tuple[Floats, Floats, Floats]] = {}
        self._sampled: dict[int, Floats] = {}
        self._labels: dict[tuple[int, str], tuple[_Axis, npt.NDArray[np.int8]]] = {}

    @property
    def max_limits(self) -> BatchingLimits:
        """Largest limits that :meth:`compile` takes."""
        return BatchingLimits(self._max_seqs, len(self._tokens) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Tensor-parallel widths whose all-reduce is measured, ascending; 1 needs none."""
        measured = {gpus for _, gpus in self._table.all_reduce}
        return (1, *sorted(g for g in measured if g <= self._device.scaleup_domain))

    def compile(self, tp: int, limits: BatchingLimits) -> IterationCost:
        """Cost of a ``tp``-wide replica under ``limits``; its arrays are views of shared ones."""
        if (tp, limits) not in self._costs:
            self._costs[tp, limits] = self._compile(tp, limits)
        return self._costs[tp, limits]

    def _compile(self, tp: int, limits: BatchingLimits) -> IterationCost:
        tokens = limits.max_num_batched_tokens
        decode, mixed = self._linear_s(tp, self._graphs.captured(limits))
        knots, attention, prefill = self._attention_of(tp)
        floor = self._host.eager_layer_s * self._model.num_layers
        seqs = min(limits.max_num_seqs, self._max_seqs)
        return IterationCost(
            decode_s=decode[: tokens + 1],
            mixed_s=mixed[: tokens + 1],
            sampled_s=self._sampled_of(tp)[: seqs + 1],
            attention_s=attention[: seqs + 1],
            context_knots=knots,
            prefill_s=prefill,
            decode_floor_s=0.0 if self._graphs.full_decode else floor,
            mixed_floor_s=floor,
            iteration_host_s=self._host.iteration_s,
        )

    def provenance(
        self, tp: int, tokens: int, sequences: int, context: int, longest: int
    ) -> dict[str, Provenance]:
        """Label of each operator at width ``tp`` at one point of operation.

        Parameters
        ----------
        tp
            Tensor-parallel width.
        tokens, sequences
            Tokens and sequences of the iteration.
        context
            Mean context of its sequences, tokens.
        longest
            Longest prompt, tokens.
        """
        self._layers_of(tp)
        knots = self._attention_of(tp)[0]
        self._sampled_of(tp)
        row = min(sequences, self._max_seqs) - 1
        column = min(int(np.searchsorted(knots, context)), len(knots) - 1)
        at: dict[_Axis, Any] = {
            _Axis.TOKENS: min(tokens, len(self._tokens) - 1),
            _Axis.SEQUENCES: row,
            _Axis.BATCH_AND_CONTEXT: (row, column),
            _Axis.CONTEXT: min(longest, self._max_context),
        }
        return {
            name: Provenance(int(labels[at[axis]]))
            for (width, name), (axis, labels) in sorted(self._labels.items())
            if width == tp
        }

    def _note(self, tp: int, name: str, axis: _Axis, labels: npt.NDArray[np.int8]) -> None:
        self._labels[tp, name] = (axis, labels)

    def _linear_s(self, tp: int, captured: tuple[int, ...]) -> tuple[Floats, Floats]:
        """Device time without attention of decode and mixed iterations, by tokens.

        ``captured`` are the CUDA-graph sizes; plans that capture the same share the arrays.
        """
        if (tp, captured) in self._linear:
            return self._linear[tp, captured]
        layers = self._layers_of(tp)
        largest = captured[-1] if captured else 0
        in_graph = self._tokens <= largest
        reduce_s = np.where(in_graph, layers.graph_reduce_s, layers.eager_reduce_s)
        linear = layers.gemm_s + layers.elementwise_s + reduce_s
        if captured:
            # A batch inside the captured range is padded up to the next captured size.
            sizes = np.array(captured)
            padded = sizes[np.searchsorted(sizes, np.arange(1, largest + 1))]
            linear[1 : largest + 1] = linear[padded]
        linear[0] = 0.0
        # Interpolated parts never fall by themselves; the step from graph to eager might.
        linear = np.maximum.accumulate(linear)
        self._linear[tp, captured] = linear, linear * self._host.prefill_multiplier
        return self._linear[tp, captured]

    def _layers_of(self, tp: int) -> _Layers:
        if tp not in self._layers:
            self._layers[tp] = self._compile_layers(tp)
        return self._layers[tp]

    def _compile_layers(self, tp: int) -> _Layers:
        model, device, table, tokens = self._model, self._device, self._table, self._tokens
        rows = np.maximum(tokens, 1)
        gemm = np.zeros(len(tokens))
        for op in layer_gemms(model, tp):
            time_s, labels = gemm_s(table, device, op.dtype, rows, op.n, op.k)
            gemm += time_s
            self._note(tp, f"gemm {op.name}", _Axis.TOKENS, labels)
        launches_s = elementwise_kernels_per_layer(model) * device.elementwise_launch_s
        traffic = elementwise_bytes_per_token(model, tp) * tokens
        elementwise = launches_s + traffic / device.elementwise_bytes_per_s
        reduces = ALL_REDUCES_PER_LAYER * model.num_layers
        # Launch and bandwidth are measured, on a kernel of the same kind.
        self._note(tp, "elementwise", _Axis.TOKENS, np.full(len(tokens), Provenance.INTERPOLATED))
        return _Layers(
            gemm_s=model.num_layers * gemm,
            elementwise_s=model.num_layers * elementwise,
            graph_reduce_s=reduces * self._all_reduce_s(tp, in_graph=True),
            eager_reduce_s=reduces * self._all_reduce_s(tp, in_graph=False),
        )

    def _all_reduce_s(self, tp: int, in_graph: bool) -> Floats:
        """Time of one all-reduce of the hidden states, by tokens, (T + 1,).

        Outside a CUDA graph the engine first copies the message into a registered buffer
        (vllm/distributed/device_communicators/custom_all_reduce.py). The measured eager times say
        so where the device sets the pace: graph time plus copy is within 5 % of them from 8
        million elements on (tests/unit/test_timing.py). Below that they show the host's launches,
        which overlap the device's work in a whole iteration and are ``eager_layer_s``'s subject.
        """
        elements = np.maximum(self._tokens, 1) * self._model.hidden_size
        message_bytes = elements * DTYPE_BYTES["bf16"]
        time_s, labels = all_reduce_s(self._table, self._device, "graph", tp, elements)
        if tp == 1:
            return time_s
        if not in_graph:
            time_s = time_s + 2 * message_bytes / self._device.elementwise_bytes_per_s
        if tp in self._nccl_from_bytes:
            by_nccl = message_bytes >= self._nccl_from_bytes[tp]
            nccl, nccl_labels = nccl_s(self._table, self._device, "all_reduce", tp, elements)
            time_s = np.where(by_nccl, nccl, time_s)
            labels = np.where(by_nccl, nccl_labels, labels)
        self._note(tp, "all-reduce", _Axis.TOKENS, labels)
        return time_s

    def _attention_of(self, tp: int) -> tuple[Floats, Floats, Floats]:
        """Knots, decode attention (S + 1, K) and cumulative prompt attention (L + 1,)."""
        if tp not in self._attention:
            self._attention[tp] = self._compile_attention(tp)
        return self._attention[tp]

    def _compile_attention(self, tp: int) -> tuple[Floats, Floats, Floats]:
        model = self._model
        heads, kv_heads = model.heads_per_rank(tp), model.kv_heads_per_rank(tp)
        shape = (self._table, self._device, model.kv_dtype, model.head_dim, heads, kv_heads)
        knots = _context_knots(self._max_context)
        generation, labels = generation_attention_s(*shape, np.arange(1, self._max_seqs + 1), knots)
        self._note(tp, "decode attention", _Axis.BATCH_AND_CONTEXT, labels)
        prompt, launch_s, prompt_labels = context_attention_s(
            *shape, np.arange(self._max_context + 1)
        )
        self._note(tp, "prefill attention", _Axis.CONTEXT, prompt_labels)
        attention = np.vstack([np.full(len(knots), launch_s), generation])
        attention = np.maximum.accumulate(attention, axis=0)
        attention = np.maximum.accumulate(attention, axis=1)
        layers = model.num_layers
        prompt = layers * self._host.prefill_multiplier * np.maximum.accumulate(prompt)
        return knots.astype(np.float64), layers * attention, prompt

    def _sampled_of(self, tp: int) -> Floats:
        """Head, sampler and host time by sampled sequences, (S + 1,) seconds."""
        if tp in self._sampled:
            return self._sampled[tp]
        model, device, table = self._model, self._device, self._table
        sequences = np.arange(1, self._max_seqs + 1)
        op = head_gemm(model, tp)
        head, labels = gemm_s(table, device, op.dtype, sequences, op.n, op.k)
        self._note(tp, "gemm head", _Axis.SEQUENCES, labels)
        if tp > 1:
            gather, labels = nccl_s(table, device, "all_gather", tp, sequences * model.vocab_size)
            self._note(tp, "all-gather logits", _Axis.SEQUENCES, labels)
            head = head + gather
        traffic = sampler_bytes_per_sequence(model) * sequences
        sampled = head + traffic / device.elementwise_bytes_per_s
        sampled += self._host.sequence_s * sequences
        self._sampled[tp] = np.maximum.accumulate(np.concatenate([[0.0], sampled]))
        return self._sampled[tp]


def _context_knots(max_context: int) -> npt.NDArray[np.int64]:
    """Mean contexts at which decode attention is tabulated, from 1 to at least the longest."""
    octaves = int(np.ceil(np.log2(max(2, max_context))))
    knots = np.round(2.0 ** (np.arange(octaves * _KNOTS_PER_OCTAVE + 1) / _KNOTS_PER_OCTAVE))
    return np.unique(knots.astype(np.int64))


def graph_sizes(singles: Sequence[int], ranges: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Capture sizes from single sizes and (first, last, step) ranges, ascending, tokens."""
    sizes = set(singles)
    for first, last, step in ranges:
        sizes.update(range(first, last + 1, step))
    return tuple(sorted(sizes))
