"""Compiles the iteration cost of a plan from measured kernels and an engine version's constants."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from simulator.collectives import all_reduce_s, nccl_s
from simulator.gemm import gemm_s
from simulator.interpolate import Provenance
from simulator.model import Layer
from simulator.ops import all_reduces, head_gemm, sampler_bytes_per_sequence
from simulator.parts import Axis, Part, Sizes, layer_parts
from simulator.plan import BatchingLimits, Shape
from simulator.timing import one_stage
from simulator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from simulator.device import Device
    from simulator.engine_rules import GraphRules, HostConstants
    from simulator.fabric import Fabric
    from simulator.interpolate import FloatArray
    from simulator.model import ModelShape
    from simulator.table import KernelTable
    from simulator.timing import IterationCost

_KNOTS_PER_OCTAVE = 2
"""Knots of mean context per factor of two. The tables have one; the extra knot keeps the
piecewise-linear form within 2 % of the interpolated tables (tests/unit/test_timing.py)."""


@dataclass(frozen=True, eq=False)
class Load:
    """What a run asked of the kernels, in means; for saying where its time comes from.

    Parameters
    ----------
    iterations
        Iterations of all replicas.
    tokens, prompt_tokens
        Mean tokens of an iteration, and prompt tokens among them.
    decodes, context
        Mean decoding sequences of an iteration, and their mean context, tokens.
    sampled
        Mean sequences that emit a token in an iteration.
    prompts
        Prompt length of every request, shape (N,), tokens.

    """

    iterations: int
    tokens: float
    prompt_tokens: float
    decodes: float
    context: float
    sampled: float
    prompts: npt.NDArray[np.int64]


class CostCompiler:
    """Compiles iteration costs of one model on one device, reusing what plans share.

    Parameters
    ----------
    model, device, table
        What runs, on what, and the measured times.
    host, graphs
        Constants and CUDA-graph rules of the engine version.
    fabric
        Links between devices; ``None`` where no replica leaves the measured widths.
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
        fabric: Fabric | None = None,
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
        self._fabric = fabric
        self._nccl_from_bytes = nccl_all_reduce_from_bytes
        self._sizes = Sizes(
            tokens=np.arange(max_tokens + 1),
            sequences=np.arange(1, max_seqs + 1),
            contexts=_context_knots(max_context),
            lengths=np.arange(max_context + 1),
        )
        self._costs: dict[tuple[Shape, BatchingLimits], IterationCost] = {}
        self._linear: dict[
            tuple[int, tuple[int, ...], tuple[int, ...]], tuple[FloatArray, FloatArray]
        ] = {}
        self._parts: dict[int, tuple[Part, ...]] = {}
        self._sums: dict[tuple[int, Axis], FloatArray] = {}

    @property
    def max_limits(self) -> BatchingLimits:
        """Largest limits that :meth:`compile` takes."""
        return BatchingLimits(len(self._sizes.sequences), len(self._sizes.tokens) - 1)

    @property
    def is_estimated(self) -> bool:
        """Whether the kernel times are scaled from another device's."""
        return bool(self._table.estimated_from)

    @property
    def widths(self) -> tuple[int, ...]:
        """Tensor-parallel widths whose all-reduce has a time, ascending; 1 needs none.

        Those measured, and where the devices are joined the powers of two beyond them.
        """
        domain = self._device.scaleup_domain
        measured = {gpus for _, gpus in self._table.all_reduce if gpus <= domain}
        reach = self._fabric.devices if self._fabric else 1
        beyond = {2**i for i in range(reach.bit_length()) if max(measured, default=1) < 2**i}
        return tuple(sorted({1, *measured, *(width for width in beyond if width <= reach)}))

    def compile(self, shape: Shape, limits: BatchingLimits) -> IterationCost:
        """Cost of a replica of that shape under ``limits``; its arrays are views of shared ones."""
        if (shape, limits) not in self._costs:
            self._costs[shape, limits] = self._compile(shape.tp, limits)
        return self._costs[shape, limits]

    def _compile(self, tp: int, limits: BatchingLimits) -> IterationCost:
        # SGLang's budget counts prompts only: a decode batch may be larger.
        tokens = max(limits.max_num_batched_tokens, limits.max_num_seqs)
        graphs = self._graphs
        decode, mixed = self._linear_s(
            tp, graphs.captured(limits, tp), graphs.captured_with_prompts(limits, tp)
        )
        floor = self._host.eager_layer_s * self._model.num_layers
        seqs = min(limits.max_num_seqs, len(self._sizes.sequences))
        return one_stage(
            decode_s=decode[: tokens + 1],
            mixed_s=mixed[: tokens + 1],
            sampled_s=self._sum(tp, Axis.SAMPLED)[: seqs + 1],
            attention_s=self._sum(tp, Axis.DECODES)[: seqs + 1],
            context_knots=self._sizes.contexts,
            prefill_s=self._sum(tp, Axis.PROMPT),
            decode_floor_s=0.0 if graphs.full_decode else floor,
            mixed_floor_s=floor,
            iteration_host_s=self._host.iteration_s,
        )

    def provenance(
        self, shape: Shape, tokens: int, sequences: int, context: int, longest: int
    ) -> dict[str, Provenance]:
        """Label of each operator of a replica at one point of operation.

        Parameters
        ----------
        shape
            The replica's.
        tokens, sequences
            Tokens and sequences of the iteration.
        context
            Mean context of its sequences, tokens.
        longest
            Longest prompt, tokens.
        """
        at = self._index(tokens, sequences, context, longest)
        parts = sorted(self._parts_of(shape.tp), key=lambda part: part.name)
        return {part.name: Provenance(int(part.label[at[part.axis]])) for part in parts}

    def time_by_label(self, shape: Shape, load: Load) -> dict[Provenance, float]:
        """Seconds of kernel time that each label holds over a run, at its mean iteration.

        Prompts count one by one; everything else is taken at the means of ``load``.
        """
        at = self._index(round(load.tokens), round(load.decodes), round(load.context), longest=0)
        at[Axis.PROMPT_TOKENS] = min(round(load.prompt_tokens), len(self._sizes.tokens) - 1)
        at[Axis.SAMPLED] = min(round(load.sampled), len(self._sizes.sequences))
        prompts = np.minimum(load.prompts, self._sizes.lengths[-1])
        out = dict.fromkeys(Provenance, 0.0)
        for part in self._parts_of(shape.tp):
            if part.axis is Axis.PROMPT:
                for label in Provenance:
                    own = prompts[part.label[prompts] == label]
                    out[label] += float(part.time_s[own].sum())
            else:
                where = at[part.axis]
                out[Provenance(int(part.label[where]))] += load.iterations * float(
                    part.time_s[where]
                )
        return out

    def _index(
        self, tokens: int, sequences: int, context: int, longest: int
    ) -> dict[Axis, int | tuple[int, int]]:
        """Where each axis' arrays are read for one point of operation, clamped to their sizes."""
        knots = self._sizes.contexts
        row = min(sequences, len(self._sizes.sequences))
        column = min(int(np.searchsorted(knots, context)), len(knots) - 1)
        tokens = min(tokens, len(self._sizes.tokens) - 1)
        return {
            Axis.TOKENS: tokens,
            Axis.PROMPT_TOKENS: tokens,
            Axis.SAMPLED: row,
            Axis.DECODES: (row, column),
            Axis.PROMPT: min(longest, int(self._sizes.lengths[-1])),
        }

    def _sum(self, tp: int, axis: Axis) -> FloatArray:
        """Time of every part over one axis but `Axis.TOKENS`, made to never fall, seconds."""
        if (tp, axis) not in self._sums:
            parts = [part.time_s for part in self._parts_of(tp) if part.axis is axis]
            total = np.sum(parts, axis=0) if parts else np.zeros(self._shape(axis))
            if axis is Axis.SAMPLED:
                total = total + self._host.sequence_s * np.arange(len(total))
                total[0] = 0.0
            if axis in (Axis.PROMPT, Axis.PROMPT_TOKENS):
                total = total * self._host.prefill_multiplier
            for along in range(total.ndim):
                total = np.maximum.accumulate(total, axis=along)
            self._sums[tp, axis] = total
        return self._sums[tp, axis]

    def _shape(self, axis: Axis) -> tuple[int, ...]:
        """Shape of a part's arrays."""
        sizes = self._sizes
        return {
            Axis.TOKENS: (len(sizes.tokens),),
            Axis.PROMPT_TOKENS: (len(sizes.tokens),),
            Axis.DECODES: (len(sizes.sequences) + 1, len(sizes.contexts)),
            Axis.PROMPT: (len(sizes.lengths),),
            Axis.SAMPLED: (len(sizes.sequences) + 1,),
        }[axis]

    def _linear_s(
        self, tp: int, captured: tuple[int, ...], with_prompts: tuple[int, ...]
    ) -> tuple[FloatArray, FloatArray]:
        """Device time by tokens of decode and of mixed iterations.

        ``captured`` are the CUDA-graph sizes of the former, ``with_prompts`` of the latter; plans
        that capture the same share the arrays.
        """
        key = (tp, captured, with_prompts)
        if key not in self._linear:
            linear = np.sum(
                [part.time_s for part in self._parts_of(tp) if part.axis is Axis.TOKENS], axis=0
            )
            decode = self._replayed_s(tp, linear, captured)
            # Prompt tokens cost at least what decodes do, also where only decodes are padded.
            prompts = np.maximum(decode, self._replayed_s(tp, linear, with_prompts))
            mixed = prompts * self._host.prefill_multiplier + self._sum(tp, Axis.PROMPT_TOKENS)
            self._linear[key] = decode, mixed
        return self._linear[key]

    def _replayed_s(self, tp: int, linear: FloatArray, captured: tuple[int, ...]) -> FloatArray:
        """Device time by tokens where batches of ``captured`` sizes replay as graphs."""
        out = linear.copy()
        tokens = np.arange(len(linear))
        sizes = np.array(captured, dtype=np.int64)
        inside = tokens <= (captured[-1] if captured else 0)
        replayed = inside if self._graphs.padded else np.isin(tokens, sizes)
        if tp > 1:
            out += np.where(replayed, 0.0, self._eager_copy_s(tp))
        if captured and self._graphs.padded:
            # A batch inside the captured range is padded up to the next captured size.
            out[inside] = out[sizes[np.searchsorted(sizes, tokens[inside])]]
        out[0] = 0.0
        # Interpolated parts never fall by themselves; the step from graph to eager might.
        return np.asarray(np.maximum.accumulate(out))

    def _parts_of(self, tp: int) -> tuple[Part, ...]:
        """Every operator of the model at width ``tp``, layers added up."""
        if tp not in self._parts:
            found: dict[tuple[str, Axis], Part] = {}
            for part in self._all_parts(tp):
                key = (part.name, part.axis)
                found[key] = found[key] + part if key in found else part
            self._parts[tp] = tuple(self._honest(part) for part in found.values())
        return self._parts[tp]

    def _honest(self, part: Part) -> Part:
        """The part, with nothing of a scaled table labelled as measured."""
        if not self._table.estimated_from:
            return part
        label = np.maximum(part.label, np.int8(Provenance.EXTRAPOLATED))
        return Part(part.name, part.axis, part.time_s, label)

    def _all_parts(self, tp: int) -> list[Part]:
        model = self._model
        parts = [
            part.times(count)
            for half, count in self._halves().items()
            for part in layer_parts(model, self._device, self._table, half, tp, self._sizes)
        ]
        parts.extend(self._sampled_parts(tp))
        if tp > 1:
            parts.append(self._all_reduce(tp).times(self._reduces))
        return parts

    def _halves(self) -> Counter[Layer]:
        """Mixers, and feed-forward networks with the layer's norms, each kind counted once."""
        halves: Counter[Layer] = Counter()
        for layer, count in self._model.layer_counts.items():
            halves[Layer(layer.mixer, None, norms=0)] += count
            halves[Layer(None, layer.ffn, layer.norms)] += count
        return halves

    @property
    def _reduces(self) -> int:
        """All-reduces of one iteration."""
        counts = self._model.layer_counts
        return sum(all_reduces(layer) * count for layer, count in counts.items())

    def _all_reduce(self, tp: int) -> Part:
        """One all-reduce of the hidden states inside a CUDA graph, by tokens."""
        elements = np.maximum(self._sizes.tokens, 1) * self._model.hidden_size
        time_s, label = all_reduce_s(self._table, self._device, "graph", tp, elements, self._fabric)
        if tp in self._nccl_from_bytes:
            by_nccl = elements * DTYPE_BYTES["bf16"] >= self._nccl_from_bytes[tp]
            nccl, nccl_label = nccl_s(
                self._table, self._device, "all_reduce", tp, elements, self._fabric
            )
            time_s = np.where(by_nccl, nccl, time_s)
            label = np.where(by_nccl, nccl_label, label)
        return Part("all-reduce", Axis.TOKENS, time_s, label)

    def _eager_copy_s(self, tp: int) -> FloatArray:
        """What all-reduces cost more outside a CUDA graph, by tokens, seconds.

        There the engine first copies the message into a registered buffer
        (vllm/distributed/device_communicators/custom_all_reduce.py). The measured eager times say
        so where the device sets the pace: graph time plus copy is within 5 % of them from 8
        million elements on (tests/unit/test_timing.py). Below that they show the host's launches,
        which overlap the device's work in a whole iteration and are ``eager_layer_s``'s subject.
        """
        message_bytes = self._sizes.tokens * self._model.hidden_size * DTYPE_BYTES["bf16"]
        copy_s = 2 * message_bytes / self._device.elementwise_bytes_per_s
        own = message_bytes < self._nccl_from_bytes.get(tp, np.inf)
        return np.where(own, self._reduces * copy_s, 0.0)

    def _sampled_parts(self, tp: int) -> list[Part]:
        """Head, gathering of logits over ranks and sampler, by sampled sequences."""
        model, device, table = self._model, self._device, self._table
        sequences = np.maximum(np.arange(len(self._sizes.sequences) + 1), 1)
        op = head_gemm(model, tp)
        head_s, head_label = gemm_s(table, device, op.dtype, sequences, op.n, op.k)
        parts = [Part("gemm head", Axis.SAMPLED, head_s, head_label)]
        if tp > 1:
            elements = sequences * model.vocab_size
            gather_s, label = nccl_s(table, device, "all_gather", tp, elements, self._fabric)
            parts.append(Part("all-gather logits", Axis.SAMPLED, gather_s, label))
        sampler_s = sampler_bytes_per_sequence(model) * sequences / device.elementwise_bytes_per_s
        label = np.full(len(sequences), Provenance.INTERPOLATED, dtype=np.int8)
        parts.append(Part("sampler", Axis.SAMPLED, sampler_s, label))
        return parts


def _context_knots(max_context: int) -> npt.NDArray[np.int64]:
    """Mean contexts at which decode attention is tabulated, from 1 to at least the longest."""
    octaves = int(np.ceil(np.log2(max(2, max_context))))
    knots = np.round(2.0 ** (np.arange(octaves * _KNOTS_PER_OCTAVE + 1) / _KNOTS_PER_OCTAVE))
    return np.unique(knots.astype(np.int64))
