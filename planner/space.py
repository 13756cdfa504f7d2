"""The plan space: what can be written down, and which rule excludes what cannot run."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from planner.layouts import LAYOUT_RULES, broken_layout, layouts_in_space
from simulator.model import Attention, Experts, GatedDeltaNet, LatentAttention, Mamba2
from simulator.plan import BatchingLimits, Plan, Shape
from simulator.precision import FP8_BLOCK
from simulator.units import GIB

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from planner.problem import Problem
    from simulator.model import Layer, ModelShape

FORBIDDEN = "search.space.forbid leaves it out"
STAGES = "more pipeline stages than layers, or layers that are not the model's"
STAGED_GROUPS = "attention groups (dp) in pipeline stages are not simulated"
MIXED_STAGES = "pipeline stages of layers with caches of several kinds are not simulated"
HEADS = "attention heads do not divide by tp"
FFN = "MLP or expert width does not divide by the devices that it is cut over"
KV_HEADS = "KV heads neither divide by tp nor are divided by it"
RECURRENT = "linear-attention or state-space heads do not divide by tp"
QUANT_BLOCKS = "MLP or expert width per rank is no multiple of the weights' quantisation block"
NODE = "tp is wider than a node"
COLLECTIVES = "no times of the all-reduce at this tp, or of what attention groups exchange"
BUDGET = "max_num_batched_tokens is below max_num_seqs"
WHOLE_PROMPTS = "max_num_batched_tokens is below the longest prompt, which is not cut"
DEVICES = "more devices than the pool has"
PACKING = "more replicas than fit into whole nodes"
WEIGHTS = "weights, activations and overhead exceed device memory"
KV_CACHE = "KV cache cannot hold one request of max_model_len"

RULES = (
    FORBIDDEN,
    *LAYOUT_RULES,
    STAGES,
    STAGED_GROUPS,
    MIXED_STAGES,
    HEADS,
    FFN,
    KV_HEADS,
    RECURRENT,
    QUANT_BLOCKS,
    NODE,
    COLLECTIVES,
    BUDGET,
    WHOLE_PROMPTS,
    DEVICES,
    PACKING,
    WEIGHTS,
    KV_CACHE,
)
"""Rules in the order in which they are tried; a plan counts under the first that excludes it.

Sources: vLLM model_executor/models/llama.py (heads, KV heads), model_executor/layers/linear.py
(widths), layers/mamba/mamba_mixer2.py (state-space heads and groups), layers/quantization/fp8.py
(blocks), config/scheduler.py (token budget), v1/core/kv_cache_utils.py (one full request)."""


@dataclass(frozen=True)
class Space:
    """Every plan of the grid: those that can run, and how many each rule excluded.

    Parameters
    ----------
    plans
        Plans that can run, in canonical tie order.
    excluded
        Plans excluded by rule, rules in order, zero counts left out.
    size
        All plans of the grid.
    """

    plans: tuple[Plan, ...]
    excluded: dict[str, int]
    size: int


def _shape_rule(problem: Problem, shape: Shape, *, on_any_node: bool = False) -> str | None:
    """The first rule of the engine that such a replica breaks whatever its limits and memory."""
    layout_rule = broken_layout(layouts_in_space(problem), problem.model, shape)
    if layout_rule is not None:
        return layout_rule
    if not _stages_hold(problem, shape):
        return STAGES
    if shape.pp > 1 and shape.dp > 1:
        return STAGED_GROUPS
    layout = problem.layout(shape)
    if shape.pp > 1 and (layout.windowed or layout.fixed):
        return MIXED_STAGES
    for rule in (HEADS, FFN, KV_HEADS, RECURRENT, QUANT_BLOCKS):
        if _offender(problem.model, shape, rule) is not None:
            return rule
    if not on_any_node and not _nodes_join(problem, shape):
        return NODE
    return None if _collectives_have_times(problem, shape) else COLLECTIVES


def _limits_rule(problem: Problem, limits: BatchingLimits) -> str | None:
    """The first rule of the engine that replicas with such limits break whatever their shape."""
    tokens = limits.max_num_batched_tokens
    if problem.engine.budget_covers_sequences and tokens < limits.max_num_seqs:
        return BUDGET
    whole = not problem.rules.chunked and tokens < problem.longest_prefill
    return WHOLE_PROMPTS if whole else None


def _stages_hold(problem: Problem, shape: Shape) -> bool:
    """Whether every pipeline stage gets a layer, and named layers are all of the model's."""
    layers = problem.model.num_layers
    return shape.pp <= layers and (not shape.layers or sum(shape.layers) == layers)


def _offender(model: ModelShape, shape: Shape, rule: str) -> int | None:
    """The first size in the model that breaks ``rule`` in shape ``shape``, or ``None``."""
    for layer in model.layer_counts:
        sizes = (
            _ffn_sizes(layer, shape, rule)
            if rule in (FFN, QUANT_BLOCKS)
            else _mixer_sizes(layer, shape.tp, rule)
        )
        for size, broken in sizes:
            if broken:
                return size
    return None


def _mixer_sizes(layer: Layer, tp: int, rule: str) -> Iterator[tuple[int, bool]]:
    """Head counts that ``rule`` looks at, and whether each breaks it."""
    mixer = layer.mixer
    if isinstance(mixer, (Attention, LatentAttention)) and rule == HEADS:
        yield mixer.num_heads, mixer.num_heads % tp != 0
    if isinstance(mixer, Attention) and rule == KV_HEADS:
        kv_heads = mixer.num_kv_heads
        yield kv_heads, kv_heads % tp != 0 and tp % kv_heads != 0
    if isinstance(mixer, GatedDeltaNet) and rule == RECURRENT:
        yield mixer.num_key_heads, mixer.num_key_heads % tp != 0
        yield mixer.num_value_heads, mixer.num_value_heads % tp != 0
    if isinstance(mixer, Mamba2) and rule == RECURRENT:
        yield mixer.num_heads, mixer.num_heads % tp != 0
        yield mixer.num_groups, mixer.num_groups % tp != 0 and mixer.num_groups != 1


def _ffn_sizes(layer: Layer, shape: Shape, rule: str) -> Iterator[tuple[int, bool]]:
    """Widths of the layer's dense networks and experts, and whether each breaks ``rule``."""
    ffn = layer.ffn
    if ffn is None:
        return
    cut = shape.moe_tp if isinstance(ffn, Experts) else shape.tp
    widths = [(ffn.intermediate_size, ffn.dtype, cut)]
    if isinstance(ffn, Experts) and ffn.shared_intermediate_size:
        widths.append((ffn.shared_intermediate_size, ffn.shared_dtype, shape.tp))
    for width, dtype, ranks in widths:
        if rule == FFN:
            yield width, width % ranks != 0
        else:
            yield width, dtype == "fp8_block" and width // ranks % FP8_BLOCK != 0


def _collectives_have_times(problem: Problem, shape: Shape) -> bool:
    """Whether tensor-parallel ranks can reduce and attention groups exchange their tokens."""
    compiler = problem.pool_of(shape).compiler
    return shape.tp in compiler.widths and (shape.dp == 1 or compiler.joins_groups)


def _nodes_join(problem: Problem, shape: Shape) -> bool:
    """Whether a replica fits into a node, or fills several that a network or NVLink joins."""
    pool, devices = problem.pool_of(shape), shape.devices
    per_node = pool.devices_per_node
    return devices <= per_node or (devices % per_node == 0 and devices <= pool.fabric.devices)


def can_launch(
    problem: Problem, shape: Shape, limits: BatchingLimits, *, on_any_node: bool = False
) -> bool:
    """Whether the engine starts such a replica, memory and device counts aside.

    With ``on_any_node`` the width of the pool's own nodes does not count either.
    """
    broken = _shape_rule(problem, shape, on_any_node=on_any_node) or _limits_rule(problem, limits)
    return broken is None


def grid_classes(problem: Problem) -> Iterator[tuple[Shape, BatchingLimits, str | None]]:
    """Every replica of the grid, and the first rule of the engine that it breaks."""
    grid = problem.space
    every = [BatchingLimits(q, b) for q in grid.max_num_seqs for b in grid.max_num_batched_tokens]
    of_limits = [_limits_rule(problem, limits) for limits in every]
    for shape in grid.shapes:
        of_shape = _shape_rule(problem, shape)
        for limits, rule in zip(every, of_limits, strict=True):
            yield shape, limits, of_shape or rule


def count_rules(
    problem: Problem,
    shape: Shape,
    limits: BatchingLimits,
    counts: Iterable[int],
    launch: str | None,
) -> Iterator[tuple[int, str | None]]:
    """For each number of replicas the first rule that keeps them from running.

    ``launch`` is the rule of the engine that one of them breaks, if any.
    """
    most_devices, most = problem.pool_of(shape).num_devices, problem.replicas_that_fit(shape)
    memory: str | None = ""  # looked at where a count gets that far
    for replicas in counts:
        if problem.space.forbid and forbidding(problem, Plan(replicas, shape, limits)):
            yield replicas, FORBIDDEN
        elif launch is not None:
            yield replicas, launch
        elif replicas * shape.devices > most_devices:
            yield replicas, DEVICES
        elif replicas > most:
            yield replicas, PACKING
        else:
            if memory == "":
                memory = _memory_rule(problem, shape, limits)
            yield replicas, memory


def _memory_rule(problem: Problem, shape: Shape, limits: BatchingLimits) -> str | None:
    if problem.memory(shape, limits).num_blocks <= 0:
        return WEIGHTS
    return KV_CACHE if problem.blocks(shape, limits) < problem.full_request_blocks(shape) else None


def forbidding(problem: Problem, plan: Plan) -> str | None:
    """The first pattern of ``search.space.forbid`` that ``plan`` matches, or ``None``."""
    if not problem.space.forbid:
        return None
    text = problem.plan_text(plan)
    return next((p for p in problem.space.forbid if fnmatchcase(text, p)), None)


def broken_rule(problem: Problem, plan: Plan) -> str | None:
    """The first rule that keeps ``plan`` from running, or ``None`` if it can."""
    launch = _shape_rule(problem, plan.shape) or _limits_rule(problem, plan.limits)
    ((_, rule),) = count_rules(problem, plan.shape, plan.limits, [plan.replicas], launch)
    return rule


def explain_rule(problem: Problem, plan: Plan, rule: str) -> str:
    """The figures behind a broken rule, for a person."""
    pool = problem.pool_of(plan.shape)
    if rule == FORBIDDEN:
        return f"it matches {forbidding(problem, plan)!r}"
    if rule == WEIGHTS:
        budget = problem.memory(plan.shape, plan.limits)
        return (
            f"needs {budget.fixed_bytes / GIB:.1f} GiB per device before any KV cache "
            f"(weights {budget.weight_bytes / GIB:.1f}, activations "
            f"{budget.activation_bytes / GIB:.1f}, overhead "
            f"{(budget.overhead_bytes + budget.graph_bytes) / GIB:.1f}); "
            f"{budget.usable_bytes / GIB:.1f} GiB are usable"
        )
    if rule == KV_CACHE:
        held = problem.layout(plan.shape).longest(problem.blocks(plan.shape, plan.limits))
        return f"KV cache holds {held} tokens; max_model_len is {problem.max_model_len}"
    if rule == DEVICES:
        return f"needs {plan.devices} devices; the pool has {pool.num_devices}"
    if rule == PACKING:
        per_node = pool.devices_per_node
        room = (
            f"a node of {per_node} devices holds {per_node // plan.shape.devices} of them"
            if plan.shape.devices <= per_node
            else f"each fills {plan.shape.devices // per_node} nodes"
        )
        return f"{room}; the pool holds {problem.replicas_that_fit(plan.shape)}"
    if rule == NODE:
        joined = pool.fabric.devices
        wider = (
            ""
            if joined <= pool.devices_per_node
            else (f", and a wider replica fills whole nodes, up to {joined} devices")
        )
        shape = plan.shape
        width = f"{shape.text} takes {shape.devices}"
        if shape.devices == shape.tp:
            width = f"tp is {shape.tp}"
        return f"{width}; a node has {pool.devices_per_node} devices{wider}"
    if rule == BUDGET:
        limits = plan.limits
        return f"{limits.max_num_batched_tokens} tokens are below {limits.max_num_seqs} sequences"
    if rule == WHOLE_PROMPTS:
        longest = problem.longest_prefill
        tokens = plan.limits.max_num_batched_tokens
        return f"{tokens} tokens are below the longest prompt, {longest}, and prompts are not cut"
    offender = _offender(problem.model, plan.shape, rule)
    shape = plan.shape
    spread = f"tp is {shape.tp}" if shape.width == shape.moe_tp else f"the shape is {shape.text}"
    return spread + (f"; the model has {offender}" if offender else "")


def enumerate_space(problem: Problem) -> Space:
    """List the grid of ``problem.space`` and sort plans from exclusions."""
    counts = problem.space.replicas
    excluded = dict.fromkeys(RULES, 0)
    plans: list[Plan] = []
    size = 0
    for shape, limits, launch in grid_classes(problem):
        size += len(counts)
        for replicas, rule in count_rules(problem, shape, limits, counts, launch):
            if rule is None:
                plans.append(Plan(replicas, shape, limits))
            else:
                excluded[rule] += 1
    defaults = problem.default_limits
    plans.sort(key=lambda plan: plan.tie_key(defaults))
    return Space(tuple(plans), {rule: n for rule, n in excluded.items() if n}, size)
