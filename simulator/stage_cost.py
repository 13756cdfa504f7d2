"""Iteration cost of one pipeline stage, from measured kernels and an engine version's constants."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from simulator.collectives import nccl_s
from simulator.gemm import gemm_s
from simulator.interpolate import Provenance
from simulator.layer_collectives import all_reduces, collective_parts
from simulator.lockstep_cost import graph_sizes_by_tokens, least_cost, lockstep_of
from simulator.model import Experts, Layer
from simulator.ops import head_gemm, sampler_bytes_per_sequence
from simulator.parts import Axis, Part, Sizes, layer_parts
from simulator.timing import one_stage
from simulator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from simulator.device import Device
    from simulator.engine_rules import GraphRules, HostConstants, LockstepRules
    from simulator.fabric import Fabric
    from simulator.interpolate import FloatArray
    from simulator.lockstep_cost import Lockstep
    from simulator.model import ModelShape
    from simulator.plan import BatchingLimits, Shape
    from simulator.stages import Stage
    from simulator.table import KernelTable
    from simulator.timing import IterationCost


@dataclass(frozen=True, eq=False)
class Kernels:
    """What sets the times of one device under one engine version.

    Parameters
    ----------
    device, table
        On what, and the measured times.
    host, graphs
        Constants and CUDA-graph rules of the engine version.
    fabric
        Links between devices; ``None`` where no replica leaves the measured widths.
    nccl_from_bytes
        By width, the message size from which NCCL reduces instead of the engine's own kernel.
    sizes
        Every size that a plan may meet.
    lockstep
        How attention groups of one replica run; ``None``: there is always one.

    """

    device: Device
    table: KernelTable
    host: HostConstants
    graphs: GraphRules
    fabric: Fabric | None
    nccl_from_bytes: Mapping[int, int]
    sizes: Sizes
    lockstep: LockstepRules | None = None
    _layers: dict[tuple[Layer, Shape], tuple[Part, ...]] = field(default_factory=dict, init=False)

    def layer(self, model: ModelShape, layer: Layer, shape: Shape) -> tuple[Part, ...]:
        """Operators and collectives of one layer of ``model``, which all stages share."""
        key = layer, shape
        if key not in self._layers:
            work = (model, self.device, self.table, layer, shape, self.sizes)
            joined = collective_parts(*work, self.fabric, self.nccl_from_bytes)
            self._layers[key] = (*layer_parts(*work), *joined)
        return self._layers[key]


class StageCost:
    """Times of one stage of a replica, reusing what plans of that shape share.

    Parameters
    ----------
    kernels
        What sets the times.
    stage
        Its layers.
    shape
        How a stage is spread over devices; pipeline stages do not matter here.

    """

    def __init__(self, kernels: Kernels, stage: Stage, shape: Shape) -> None:
        self._kernels = kernels
        self._stage = stage
        self._model = stage.model
        self._shape = shape
        self._linear: dict[
            tuple[tuple[int, ...], tuple[int, ...]], tuple[FloatArray, FloatArray]
        ] = {}
        self._sums: dict[Axis, FloatArray] = {}

    def cost(self, limits: BatchingLimits) -> IterationCost:
        """One-stage cost under ``limits``; its arrays are views of shared ones.

        Of attention groups in lockstep ``limits`` are one group's, and the cost is what an
        iteration takes at least for one of them: with no token in the others, dummies aside.
        """
        kernels, tokens = self._kernels, self._most_tokens(limits)
        graphs, host = kernels.graphs, kernels.host
        decode, mixed = self._linear_s(*self._captured(limits))
        floor = host.eager_layer_s * self._model.num_layers
        if self._shape.ep > 1:
            layers = self._model.layer_counts.items()
            dealt = sum(n for layer, n in layers if isinstance(layer.ffn, Experts))
            floor += host.eager_dealt_layer_s * dealt
        seqs = min(limits.max_num_seqs, len(kernels.sizes.sequences))
        cost = one_stage(
            decode_s=decode[: tokens + 1],
            mixed_s=mixed[: tokens + 1],
            sampled_s=self._sum(Axis.SAMPLED)[: seqs + 1],
            attention_s=self._sum(Axis.DECODES)[: seqs + 1],
            context_knots=kernels.sizes.contexts,
            prefill_s=self._sum(Axis.PROMPT),
            decode_floor_s=0.0 if graphs.full_decode else floor,
            mixed_floor_s=floor,
            iteration_host_s=host.iteration_s,
        )
        return cost if self._shape.dp == 1 else least_cost(cost, self.in_lockstep(limits))

    def in_lockstep(self, limits: BatchingLimits) -> Lockstep:
        """What attention groups in lockstep add to :meth:`cost`, under one group's ``limits``.

        The iteration is taken as a whole: where all layers are alike the group that is slowest in
        one of them is so in all, so that the groups wait for one another only once.
        """
        kernels, tokens = self._kernels, self._most_tokens(limits)
        assert kernels.lockstep is not None
        captured, with_prompts = self._captured(limits)
        decode, mixed = self._linear_s(captured, with_prompts)
        shared = self._sum(Axis.GROUPS_TOKENS)[: self._shape.dp * tokens + 1]
        padded = kernels.graphs.padded
        return lockstep_of(
            own_decode_s=decode[: tokens + 1],
            own_mixed_s=mixed[: tokens + 1],
            shared_decode_s=shared,
            shared_mixed_s=shared * kernels.host.prefill_multiplier,
            decode_sizes=graph_sizes_by_tokens(captured, tokens, padded=padded),
            mixed_sizes=graph_sizes_by_tokens(with_prompts, tokens, padded=padded),
            groups=self._shape.dp,
            rules=kernels.lockstep,
        )

    def _most_tokens(self, limits: BatchingLimits) -> int:
        """Most tokens of an iteration: SGLang's budget counts prompts only, decodes go beyond."""
        return max(limits.max_num_batched_tokens, limits.max_num_seqs)

    def _captured(self, limits: BatchingLimits) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Graph sizes of iterations without prompt tokens, and with."""
        graphs, rules = self._kernels.graphs, self._kernels.lockstep
        # SGLang's sizes follow --tp-size, which is the width of the stage.
        width = self._shape.width
        with_prompts = graphs.captured_with_prompts(limits, width)
        if self._shape.dp > 1 and rules is not None and not rules.graphs_with_prompts:
            with_prompts = ()
        return graphs.captured(limits, width), with_prompts

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Every operator of the stage, layers added up."""
        found: dict[tuple[str, Axis], Part] = {}
        for part in self._all_parts():
            key = (part.name, part.axis)
            found[key] = found[key] + part if key in found else part
        return tuple(self._honest(part) for part in found.values())

    def _honest(self, part: Part) -> Part:
        """The part, with nothing of a scaled table labelled as measured."""
        if not self._kernels.table.estimated_from:
            return part
        label = np.maximum(part.label, np.int8(Provenance.EXTRAPOLATED))
        return Part(part.name, part.axis, part.time_s, label)

    def _all_parts(self) -> list[Part]:
        parts = [
            part.times(count)
            for half, count in self._halves().items()
            for part in self._kernels.layer(self._model, half, self._shape)
        ]
        if self._stage.is_last:
            parts.extend(self._sampled_parts())
        return parts

    def _halves(self) -> Counter[Layer]:
        """Mixers, and feed-forward networks with the layer's norms, each kind counted once."""
        halves: Counter[Layer] = Counter()
        for layer, count in self._model.layer_counts.items():
            halves[Layer(layer.mixer, None, norms=0)] += count
            halves[Layer(None, layer.ffn, layer.norms)] += count
        return halves

    def _sum(self, axis: Axis) -> FloatArray:
        """Time of every part over one axis but `Axis.TOKENS`, made to never fall, seconds."""
        if axis not in self._sums:
            parts = [part.time_s for part in self.parts if part.axis is axis]
            total = np.sum(parts, axis=0) if parts else np.zeros(self._size(axis))
            if axis is Axis.SAMPLED and self._stage.is_last:
                total = total + self._kernels.host.sequence_s * np.arange(len(total))
                total[0] = 0.0
            if axis is Axis.GROUPS_TOKENS:
                total[0] = 0.0
            if axis in (Axis.PROMPT, Axis.PROMPT_TOKENS):
                total = total * self._kernels.host.prefill_multiplier
            for along in range(total.ndim):
                total = np.maximum.accumulate(total, axis=along)
            self._sums[axis] = total
        return self._sums[axis]

    def _size(self, axis: Axis) -> tuple[int, ...]:
        """Shape of a part's arrays."""
        sizes = self._kernels.sizes
        return {
            Axis.TOKENS: (len(sizes.tokens),),
            Axis.GROUPS_TOKENS: (len(sizes.in_groups(self._shape.dp)),),
            Axis.PROMPT_TOKENS: (len(sizes.tokens),),
            Axis.DECODES: (len(sizes.sequences) + 1, len(sizes.contexts)),
            Axis.PROMPT: (len(sizes.lengths),),
            Axis.SAMPLED: (len(sizes.sequences) + 1,),
        }[axis]

    def _linear_s(
        self, captured: tuple[int, ...], with_prompts: tuple[int, ...]
    ) -> tuple[FloatArray, FloatArray]:
        """Device time by tokens of decode and of mixed iterations.

        ``captured`` are the CUDA-graph sizes of the former, ``with_prompts`` of the latter; plans
        that capture the same share the arrays.
        """
        key = (captured, with_prompts)
        if key not in self._linear:
            linear = np.sum(
                [part.time_s for part in self.parts if part.axis is Axis.TOKENS], axis=0
            )
            decode = self._replayed_s(linear, captured)
            # Prompt tokens cost at least what decodes do, also where only decodes are padded.
            prompts = np.maximum(decode, self._replayed_s(linear, with_prompts))
            multiplier = self._kernels.host.prefill_multiplier
            self._linear[key] = decode, prompts * multiplier + self._sum(Axis.PROMPT_TOKENS)
        return self._linear[key]

    def _replayed_s(self, linear: FloatArray, captured: tuple[int, ...]) -> FloatArray:
        """Device time by tokens where batches of ``captured`` sizes replay as graphs."""
        padded = self._kernels.graphs.padded
        out = linear.copy()
        tokens = np.arange(len(linear))
        sizes = np.array(captured, dtype=np.int64)
        inside = tokens <= (captured[-1] if captured else 0)
        replayed = inside if padded else np.isin(tokens, sizes)
        if self._shape.tp > 1:
            out += np.where(replayed, 0.0, self._eager_copy_s())
        if captured and padded:
            # A batch inside the captured range is padded up to the next captured size.
            out[inside] = out[sizes[np.searchsorted(sizes, tokens[inside])]]
        out[0] = 0.0
        # Interpolated parts never fall by themselves; the step from graph to eager might.
        return np.asarray(np.maximum.accumulate(out))

    @property
    def _reduces(self) -> int:
        """All-reduces of one iteration."""
        counts = self._model.layer_counts
        return sum(all_reduces(layer, self._shape) * count for layer, count in counts.items())

    def _eager_copy_s(self) -> FloatArray:
        """What all-reduces cost more outside a CUDA graph, by tokens, seconds.

        There the engine first copies the message into a registered buffer
        (vllm/distributed/device_communicators/custom_all_reduce.py). The measured eager times say
        so where the device sets the pace: graph time plus copy is within 5 % of them from 8
        million elements on (tests/unit/test_timing.py). Below that they show the host's launches,
        which overlap the device's work in a whole iteration and are ``eager_layer_s``'s subject.
        """
        kernels = self._kernels
        message_bytes = kernels.sizes.tokens * self._model.hidden_size * DTYPE_BYTES["bf16"]
        copy_s = 2 * message_bytes / kernels.device.elementwise_bytes_per_s
        own = message_bytes < kernels.nccl_from_bytes.get(self._shape.tp, np.inf)
        return np.where(own, self._reduces * copy_s, 0.0)

    def _sampled_parts(self) -> list[Part]:
        """Head, gathering of logits over ranks and sampler, by sampled sequences."""
        model, shape, kernels = self._model, self._shape, self._kernels
        device, table = kernels.device, kernels.table
        sequences = np.maximum(np.arange(len(kernels.sizes.sequences) + 1), 1)
        op = head_gemm(model, shape)
        head_s, head_label = gemm_s(table, device, op.dtype, sequences, op.n, op.k)
        parts = [Part("gemm head", Axis.SAMPLED, head_s, head_label)]
        if shape.tp > 1:
            elements = sequences * model.vocab_size
            group = ("all_gather", shape.tp, elements, kernels.fabric)
            gather_s, label = nccl_s(table, device, *group)
            parts.append(Part("all-gather logits", Axis.SAMPLED, gather_s, label))
        sampler_s = sampler_bytes_per_sequence(model) * sequences / device.elementwise_bytes_per_s
        label = np.full(len(sequences), Provenance.INTERPOLATED, dtype=np.int8)
        parts.append(Part("sampler", Axis.SAMPLED, sampler_s, label))
        return parts
