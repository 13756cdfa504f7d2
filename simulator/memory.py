"""Device memory as the engine counts it: weights, activations, overhead, KV pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from simulator.activations import activation_bytes_per_rank
from simulator.kv_layout import kv_layout
from simulator.model import LatentAttention
from simulator.stages import stages_of_replica
from simulator.weights import stage_weight_bytes_per_rank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulator.device import Device
    from simulator.engine_rules import GraphRules
    from simulator.kv_layout import KvLayout
    from simulator.model import ModelShape
    from simulator.plan import BatchingLimits, Shape
    from simulator.stages import SpareLayers, Stage

NULL_BLOCKS: Final = 1
"""vLLM keeps one block as the null block (v1/core/block_pool.py)."""

LARGE_GRAPH: Final = 300
"""Sequences of a decode graph beyond which SGLang keeps more for attention data parallel
(server_args.py, ``_handle_gpu_memory_settings``)."""

Accounting = Literal["share_of_device", "static_share", "share_of_free"]
"""What an engine's memory fraction is a fraction of:

``share_of_device``
    vLLM (v1/worker/gpu_worker.py, ``determine_available_memory``): weights, the profile run's
    activations, memory outside the allocator and KV pages share that part of the device.
``static_share``
    SGLang (model_executor/model_runner.py, ``profile_max_num_token``): of what is free before
    the weights are loaded, that part holds weights and KV pages; activations and CUDA graphs live
    in the rest.
``share_of_free``
    TensorRT-LLM (_torch/pyexecutor/_util.py, ``KvCacheCreator``; C++ kvCacheManager,
    ``calculateMaxNumBlocks``): of what weights, activations and everything else leave free, that
    part becomes KV pages.
"""


@dataclass(frozen=True)
class ShareByWidth:
    """A memory fraction that follows from the tensor-parallel width (SGLang 0.4).

    Parameters
    ----------
    shares
        (width, fraction): the fraction from that width on; widths ascending from 1.

    """

    shares: tuple[tuple[int, float], ...]

    def of(self, tp: int) -> float:
        """The fraction at width ``tp``."""
        return [share for width, share in self.shares if width <= tp][-1]


@dataclass(frozen=True)
class Reserve:
    """A memory fraction that follows from bytes kept for activations and graphs (SGLang 0.5).

    ``server_args.py``, ``_handle_gpu_memory_settings``: (device - reserve) / device, rounded.
    All in bytes.

    Parameters
    ----------
    fixed_bytes, rank_bytes
        Kept whatever is served, and per rank of the replica.
    token_bytes, least_tokens, most_tokens
        Per token of the budget, which counts as at least ``least_tokens`` and, where prompts are
        not cut, at most ``most_tokens`` (0: no such end).
    sequence_bytes
        Per sequence of the largest decode graph.
    prompt_graph_bytes, latent_bytes
        Per prompt graph; models with latent attention keep ``latent_bytes`` for all instead.
    group_bytes
        Kept where attention is data parallel.
    group_sequence_bytes, large_group_sequence_bytes
        Per attention group and sequence of the largest decode graph, where there are several
        groups; the second only, and on top, where that graph holds more than `LARGE_GRAPH`.
    least_bytes
        Kept at least.
    graphs
        The graphs, for their sizes.

    """

    fixed_bytes: int
    rank_bytes: int
    graphs: GraphRules
    token_bytes: int = 0
    least_tokens: int = 0
    most_tokens: int = 0
    sequence_bytes: int = 0
    prompt_graph_bytes: int = 0
    latent_bytes: int = 0
    group_bytes: int = 0
    group_sequence_bytes: int = 0
    large_group_sequence_bytes: int = 0
    least_bytes: int = 0

    def of(
        self,
        device_bytes: int,
        tp: int,
        limits: BatchingLimits,
        *,
        has_latent: bool,
        groups: int = 1,
    ) -> float:
        """The fraction at width ``tp`` under ``limits``, in thousandths as the engine rounds it.

        ``tp`` counts the ranks of all attention ``groups``.
        """
        tokens = max(limits.max_num_batched_tokens, self.least_tokens)
        if self.most_tokens:
            tokens = min(tokens, self.most_tokens)
        kept = self.fixed_bytes + self.rank_bytes * tp + self.token_bytes * tokens
        kept += self.sequence_bytes * self.graphs.largest(tp)
        if has_latent:
            kept += self.latent_bytes
        else:
            prompt_graphs = self.graphs.captured_with_prompts(limits, tp)
            kept += self.prompt_graph_bytes * len(prompt_graphs)
        if groups > 1:
            largest = self.graphs.largest(tp)
            more = self.large_group_sequence_bytes if largest > LARGE_GRAPH else 0
            kept += self.group_bytes + (self.group_sequence_bytes + more) * groups * largest
        return round((device_bytes - max(kept, self.least_bytes)) / device_bytes, 3)


@dataclass(frozen=True)
class MemoryRules:
    """What an engine version takes besides weights and activations, and how it counts.

    Parameters
    ----------
    memory_fraction
        The engine's memory fraction, or the rule that it follows from.
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
    accounting
        What the fraction is a fraction of.
    null_blocks
        Pages that the engine keeps from its scheduler.
    spare_layers
        Where layers go that do not divide by the pipeline stages.

    """

    memory_fraction: float | ShareByWidth | Reserve
    overhead_bytes: int
    graph_bytes: int
    block_tokens: int
    logit_bytes: int
    state_dtype: str
    accounting: Accounting = "share_of_device"
    null_blocks: int = NULL_BLOCKS
    spare_layers: SpareLayers = "before_last"

    def fraction(
        self,
        model: ModelShape,
        device: Device,
        tp: int,
        limits: BatchingLimits,
        *,
        groups: int = 1,
    ) -> float:
        """The memory fraction of a replica of ``groups`` attention groups, each ``tp`` wide.

        SGLang's rules follow its ``--tp-size``, which is the width of all groups.
        """
        rule, width = self.memory_fraction, groups * tp
        if isinstance(rule, ShareByWidth):
            return rule.of(width)
        if isinstance(rule, Reserve):
            has_latent = any(isinstance(x.mixer, LatentAttention) for x in model.layer_counts)
            size = device.memory_bytes
            return rule.of(size, width, limits, has_latent=has_latent, groups=groups)
        return rule


@dataclass(frozen=True)
class MemoryBudget:
    """Where one rank's memory goes, all in bytes, and the KV pages that are left.

    ``usable_bytes`` less ``fixed_bytes`` is what KV pages get. What does not count against the
    engine's share is 0: activations, overhead and graphs under ``static_share``. ``num_blocks``
    counts the pages that the scheduler can hand out: null blocks are already taken off. It is
    zero or negative where nothing is left.
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


def memory_budget(
    model: ModelShape, device: Device, shape: Shape, limits: BatchingLimits, rules: MemoryRules
) -> MemoryBudget:
    """Memory of one rank of a replica's tightest pipeline stage under ``limits``.

    Parameters
    ----------
    model, device, shape
        What is served, on what, how spread.
    limits
        Token budget and sequences, which size activations, graphs and SGLang's reserve.
    rules
        How the engine version counts, see `Accounting`.

    Returns
    -------
    MemoryBudget
        Under ``share_of_free`` the usable bytes are the fixed ones and the share of the rest.

    """
    return tightest(memory_budgets(model, device, shape, limits, rules))


def memory_budgets(
    model: ModelShape, device: Device, shape: Shape, limits: BatchingLimits, rules: MemoryRules
) -> tuple[MemoryBudget, ...]:
    """Memory of one rank of every pipeline stage; the ranks of a stage are alike.

    Parameters as of :func:`memory_budget`.
    """
    return ReplicaMemory(model, device, shape, rules).budgets(limits)


class ReplicaMemory:
    """Memory of replicas of one shape: what no batching limit changes is worked out once.

    Parameters
    ----------
    model, device, shape, rules
        As of :func:`memory_budget`.

    """

    def __init__(self, model: ModelShape, device: Device, shape: Shape, rules: MemoryRules) -> None:
        self._model, self._device, self._shape, self._rules = model, device, shape, rules
        self._stages = tuple(
            (stage, stage_weight_bytes_per_rank(stage, shape))
            for stage in stages_of_replica(model, shape, rules.spare_layers)
        )

    def budgets(self, limits: BatchingLimits) -> tuple[MemoryBudget, ...]:
        """Memory of one rank of every pipeline stage under ``limits``."""
        rules, shape = self._rules, self._shape
        fraction = rules.fraction(self._model, self._device, shape.tp, limits, groups=shape.dp)
        return tuple(
            _stage_budget(stage, weights, self._device, shape, limits, rules, fraction)
            for stage, weights in self._stages
        )


def tightest(stages: Sequence[MemoryBudget]) -> MemoryBudget:
    """The stage with room for fewest pages; the engine gives all stages as many as it has.

    vLLM v1/core/kv_cache_utils.py, ``get_kv_cache_configs``.
    """
    return min(stages, key=lambda budget: budget.num_blocks)


def _stage_budget(
    stage: Stage,
    weights: int,
    device: Device,
    shape: Shape,
    limits: BatchingLimits,
    rules: MemoryRules,
    fraction: float,
) -> MemoryBudget:
    layout = kv_layout(stage.model, shape.tp, rules.block_tokens, rules.state_dtype)
    if rules.accounting == "static_share":
        usable = int((device.memory_bytes - rules.overhead_bytes) * fraction)
        activations = overhead = graphs = 0
    else:
        logit_bytes = rules.logit_bytes if stage.is_last else 0
        activations = activation_bytes_per_rank(stage.model, shape, limits, logit_bytes)
        overhead, graphs = rules.overhead_bytes, rules.graph_bytes
        usable = int(device.memory_bytes * fraction)
    fixed = weights + activations + overhead + graphs
    if rules.accounting == "share_of_free":
        usable = fixed + int((device.memory_bytes - fixed) * fraction)
    return MemoryBudget(
        usable_bytes=usable,
        weight_bytes=weights,
        activation_bytes=activations,
        overhead_bytes=overhead,
        graph_bytes=graphs,
        layout=layout,
        num_blocks=(usable - fixed) // layout.page_bytes - rules.null_blocks,
    )
