"""Compiles the iteration cost of a plan from measured kernels and an engine version's constants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import numpy as np

from simulator.collectives import nccl_s, send_s
from simulator.interpolate import Provenance
from simulator.parts import Axis, Part, Sizes
from simulator.plan import BatchingLimits
from simulator.stage_cost import Kernels, StageCost
from simulator.stages import stages_of_replica
from simulator.timing import stages_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from simulator.device import Device
    from simulator.engine_rules import GraphRules, HostConstants, LockstepRules
    from simulator.fabric import Fabric
    from simulator.interpolate import FloatArray
    from simulator.lockstep_cost import Lockstep
    from simulator.model import ModelShape
    from simulator.plan import Shape
    from simulator.stages import SpareLayers
    from simulator.table import KernelTable
    from simulator.timing import IterationCost

_SENT_STREAMS: Final = 2
"""Tensors that one stage sends to the next: hidden states and residual (vLLM, models/llama.py,
``IntermediateTensors``)."""

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
    spare_layers
        Where layers go that do not divide by the pipeline stages.
    lockstep
        How attention groups of one replica run; ``None``: there is always one.
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
        spare_layers: SpareLayers = "before_last",
        lockstep: LockstepRules | None = None,
        max_tokens: int,
        max_seqs: int,
        max_context: int,
    ) -> None:
        self._model = model
        self._sizes = Sizes(
            tokens=np.arange(max_tokens + 1),
            sequences=np.arange(1, max_seqs + 1),
            contexts=_context_knots(max_context),
            lengths=np.arange(max_context + 1),
        )
        self._kernels = Kernels(
            device, table, host, graphs, fabric, nccl_all_reduce_from_bytes, self._sizes, lockstep
        )
        self._spare_layers = spare_layers
        self._costs: dict[tuple[Shape, BatchingLimits], IterationCost] = {}
        self._in_lockstep: dict[tuple[Shape, BatchingLimits], Lockstep] = {}
        self._pipelines: dict[Shape, tuple[tuple[StageCost, ...], tuple[int, ...]]] = {}
        self._sends: dict[Shape, FloatArray] = {}

    @property
    def max_limits(self) -> BatchingLimits:
        """Largest limits that :meth:`compile` takes."""
        return BatchingLimits(len(self._sizes.sequences), len(self._sizes.tokens) - 1)

    @property
    def is_estimated(self) -> bool:
        """Whether the kernel times are scaled from another device's."""
        return bool(self._kernels.table.estimated_from)

    @property
    def widths(self) -> tuple[int, ...]:
        """Tensor-parallel widths whose all-reduce has a time, ascending; 1 needs none.

        Those measured, and where the devices are joined the powers of two beyond them.
        """
        domain = self._kernels.device.scaleup_domain
        measured = {gpus for _, gpus in self._kernels.table.all_reduce if gpus <= domain}
        reach = self._kernels.fabric.devices if self._kernels.fabric else 1
        beyond = {2**i for i in range(reach.bit_length()) if max(measured, default=1) < 2**i}
        return tuple(sorted({1, *measured, *(width for width in beyond if width <= reach)}))

    @property
    def joins_groups(self) -> bool:
        """Whether what attention groups exchange has a time."""
        measured = {operation for operation, _ in self._kernels.table.nccl}
        return measured >= {"all_gather", "reduce_scatter"} and self._kernels.lockstep is not None

    def compile(self, shape: Shape, limits: BatchingLimits) -> IterationCost:
        """Cost of a replica of that shape under ``limits``; its arrays are views of shared ones.

        With several attention groups it is one group's, and of an iteration a lower bound: what
        the groups do together is :meth:`compile_lockstep`'s.

        Raises
        ------
        ValueError
            If the model's layers cannot be dealt out to the shape's stages.

        """
        if (shape, limits) not in self._costs:
            kinds, stages = self._pipeline(shape)
            costs = [kind.cost(self._of_group(shape, limits)) for kind in kinds]
            if shape.pp == 1:
                self._costs[shape, limits] = costs[0]
            else:
                tokens = costs[0].max_tokens
                if shape not in self._sends:
                    self._sends[shape] = self._send_s(shape)
                send_s = self._sends[shape][: tokens + 1]
                self._costs[shape, limits] = stages_of(costs, stages, send_s)
        return self._costs[shape, limits]

    def compile_lockstep(self, shape: Shape, limits: BatchingLimits) -> Lockstep | None:
        """What attention groups of a replica do together; ``None`` where there is one group.

        Raises
        ------
        ValueError
            If the shape has pipeline stages too: groups and stages together are not modelled.

        """
        if shape.dp == 1:
            return None
        if shape.pp > 1:
            raise ValueError(f"{shape.text}: attention groups in pipeline stages are not modelled")
        if (shape, limits) not in self._in_lockstep:
            (stage,), _ = self._pipeline(shape)
            cost = stage.in_lockstep(self._of_group(shape, limits))
            self._in_lockstep[shape, limits] = cost
        return self._in_lockstep[shape, limits]

    def _of_group(self, shape: Shape, limits: BatchingLimits) -> BatchingLimits:
        """Limits of one attention group."""
        rules = self._kernels.lockstep
        return limits if shape.dp == 1 or rules is None else rules.limits_of(limits, shape.dp)

    def _pipeline(self, shape: Shape) -> tuple[tuple[StageCost, ...], tuple[int, ...]]:
        """The distinct stages of a replica, and which of them each of its stages is."""
        if shape not in self._pipelines:
            kinds: dict[object, int] = {}
            costs: list[StageCost] = []
            stages = []
            spread = replace(shape, pp=1, layers=())
            for stage in stages_of_replica(self._model, shape, self._spare_layers):
                alike = frozenset(stage.model.layer_counts.items()), stage.is_last
                if alike not in kinds:
                    kinds[alike] = len(costs)
                    costs.append(StageCost(self._kernels, stage, spread))
                stages.append(kinds[alike])
            self._pipelines[shape] = tuple(costs), tuple(stages)
        return self._pipelines[shape]

    def _send_s(self, shape: Shape) -> FloatArray:
        """From one stage to the next, by tokens, seconds.

        vLLM sends hidden states and residual, each rank its share, and the receivers gather them
        (v1/worker/gpu_worker.py, ``execute_model``; distributed/parallel_state.py,
        ``send_tensor_dict``). Where one boundary crosses machines, all count as if they did.
        """
        kernels = self._kernels
        elements = _SENT_STREAMS * np.maximum(self._sizes.tokens, 1) * self._model.hidden_size
        fabric = kernels.fabric
        network = fabric is not None and shape.devices > fabric.local
        share = -(-elements // shape.tp)
        time_s, _ = send_s(kernels.table, share, fabric, network=network)
        if shape.tp > 1:
            gather = kernels.table, kernels.device, "all_gather", shape.tp, elements, fabric
            time_s = time_s + nccl_s(*gather)[0]
        return time_s

    def _parts_of(self, shape: Shape) -> tuple[Part, ...]:
        """Every operator that a batch meets on its way through the replica."""
        kinds, stages = self._pipeline(shape)
        return tuple(part for stage in stages for part in kinds[stage].parts)

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
        at = self._index(tokens, sequences, context, longest, shape.dp)
        worst: dict[str, Provenance] = {}
        for part in sorted(self._parts_of(shape), key=lambda part: part.name):
            label = Provenance(int(part.label[at[part.axis]]))
            worst[part.name] = max(label, worst.get(part.name, label))
        return worst

    def time_by_label(self, shape: Shape, load: Load) -> dict[Provenance, float]:
        """Seconds of kernel time that each label holds over a run, at its mean iteration.

        Prompts count one by one; everything else is taken at the means of ``load``.
        """
        mean = round(load.tokens), round(load.decodes), round(load.context)
        at = self._index(*mean, longest=0, groups=shape.dp)
        at[Axis.PROMPT_TOKENS] = min(round(load.prompt_tokens), len(self._sizes.tokens) - 1)
        at[Axis.SAMPLED] = min(round(load.sampled), len(self._sizes.sequences))
        prompts = np.minimum(load.prompts, self._sizes.lengths[-1])
        out = dict.fromkeys(Provenance, 0.0)
        for part in self._parts_of(shape):
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
        self, tokens: int, sequences: int, context: int, longest: int, groups: int
    ) -> dict[Axis, int | tuple[int, int]]:
        """Where each axis' arrays are read for one point of operation, clamped to their sizes.

        Every one of the attention ``groups`` is taken to have as many tokens.
        """
        knots = self._sizes.contexts
        row = min(sequences, len(self._sizes.sequences))
        column = min(int(np.searchsorted(knots, context)), len(knots) - 1)
        tokens = min(tokens, len(self._sizes.tokens) - 1)
        return {
            Axis.TOKENS: tokens,
            Axis.GROUPS_TOKENS: groups * tokens,
            Axis.PROMPT_TOKENS: tokens,
            Axis.SAMPLED: row,
            Axis.DECODES: (row, column),
            Axis.PROMPT: min(longest, int(self._sizes.lengths[-1])),
        }


def _context_knots(max_context: int) -> npt.NDArray[np.int64]:
    """Mean contexts at which decode attention is tabulated, from 1 to at least the longest."""
    octaves = int(np.ceil(np.log2(max(2, max_context))))
    knots = np.round(2.0 ** (np.arange(octaves * _KNOTS_PER_OCTAVE + 1) / _KNOTS_PER_OCTAVE))
    return np.unique(knots.astype(np.int64))
