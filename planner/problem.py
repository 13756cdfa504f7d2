"""The problem: everything a plan's value depends on, resolved and frozen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from planner.objective import MICROS, Outcome
from simulator.kv_layout import KvLayout, kv_layout
from simulator.memory import MemoryBudget, ReplicaMemory, tightest
from simulator.rules import ROUTERS
from simulator.run import Run
from simulator.state import Limits
from simulator.timing import in_ps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from planner.device_pool import DevicePool
    from planner.io.engines import EngineProfile
    from planner.objective import Constraint, Objective
    from simulator.engine_rules import LockstepRules
    from simulator.model import ModelShape
    from simulator.plan import BatchingLimits, Plan, Shape
    from simulator.rules import Rules
    from simulator.run import RunResult
    from simulator.timing import IterationCost
    from simulator.workload import Workload


@dataclass(frozen=True)
class SearchSpace:
    """Values that plans are built from, each ascending, and patterns of plans to leave out.

    Where ``theoretical``, plans may have layouts that the engine version cannot launch.
    """

    shapes: tuple[Shape, ...]
    replicas: tuple[int, ...]
    max_num_seqs: tuple[int, ...]
    max_num_batched_tokens: tuple[int, ...]
    forbid: tuple[str, ...] = ()
    theoretical: bool = False


@dataclass(frozen=True)
class SearchLimits:
    """When the search stops short of a proof.

    Parameters
    ----------
    time_limit_s
        Wall-clock seconds.
    work_limit
        Simulated iterations, or ``None``.
    """

    time_limit_s: float
    work_limit: int | None


@dataclass
class _Known:
    """What a problem has worked out of its replicas, none of which depends on the workload."""

    memory: dict[Shape, ReplicaMemory] = field(default_factory=dict)
    budgets: dict[tuple[Shape, BatchingLimits], tuple[MemoryBudget, ...]] = field(
        default_factory=dict
    )
    layouts: dict[Shape, KvLayout] = field(default_factory=dict)
    limits: dict[tuple[Shape, BatchingLimits], Limits] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A resolved scenario.

    Parameters
    ----------
    source
        Name of the scenario in messages.
    model, engine
        What is served, and by what.
    pools
        On what: the pools of devices by `Shape.device`, in the scenario's order. A plan runs in
        one of them.
    quantized_at_load
        Whether the engine quantises the checkpoint's weights while it loads them.
    num_blocks
        Measured KV blocks that replace the memory model's figure, or ``None``.
    max_model_len
        Longest request that each replica must be able to hold, tokens.
    workload
        The requests.
    rules
        The engine's batching rules without pipeline stages, as they are simulated.
    uses_prefix_cache
        Whether the server is started with its prefix cache, also where it is not simulated.
    lockstep
        How attention groups of one replica run; ``None``: the engine version knows one only.
    ingress_s
        From a client's send to the scheduler's queue.
    space, search_limits, objective, constraints, goodput_limits_s
        What is searched, how long, for what, under what.
    provenance
        Digests and versions of all data, for the report.
    warnings
        What a reader of the report must know about the data.
    """

    source: str
    model: ModelShape
    engine: EngineProfile
    pools: Mapping[str, DevicePool]
    quantized_at_load: bool
    num_blocks: int | None
    max_model_len: int
    workload: Workload
    rules: Rules
    uses_prefix_cache: bool
    lockstep: LockstepRules | None
    ingress_s: float
    space: SearchSpace
    search_limits: SearchLimits
    objective: Objective
    constraints: tuple[Constraint, ...]
    goodput_limits_s: Mapping[str, float]
    provenance: Mapping[str, object]
    warnings: tuple[str, ...]
    _known: _Known = field(default_factory=_Known, init=False, repr=False, compare=False)

    @property
    def pool(self) -> DevicePool:
        """The pool of a problem that has but one.

        Raises
        ------
        ValueError
            When it has several.
        """
        (only,) = self.pools.values()
        return only

    def pool_of(self, shape: Shape) -> DevicePool:
        """The pool that a replica of ``shape`` runs in."""
        return self.pools[shape.device]

    @property
    def default_limits(self) -> Mapping[str, BatchingLimits]:
        """The engine's own batching limits by `Shape.device`."""
        return {name: pool.default_limits for name, pool in self.pools.items()}

    @property
    def longest_prefill(self) -> int:
        """Most tokens that one request can have to compute at once, where prompts are not cut.

        A request that was preempted computes its output so far again.
        """
        longest = self.workload.prompt_tokens
        if self.rules.evict:
            longest = longest + self.workload.output_tokens - 1
        return int(longest.max())

    def replicas_that_fit(self, shape: Shape) -> int:
        """Replicas that the pool holds: several to a node, or each on nodes of its own."""
        return self.pool_of(shape).replicas_that_fit(shape.devices)

    def micros_per_hour(self, plan: Plan) -> int:
        """Price of the plan's devices, millionths of a USD per hour; 0 without a price."""
        price = self.pool_of(plan.shape).price_per_hour or 0.0
        return round(price * MICROS) * plan.devices

    def outcome(self, plan: Plan, result: RunResult) -> Outcome:
        """What the finished run of ``plan`` comes to."""
        return Outcome.of(result, plan.devices, self.micros_per_hour(plan))

    def compile(self, shape: Shape, limits: BatchingLimits) -> IterationCost:
        """Cost of the iterations of a replica of ``shape``."""
        return self.pool_of(shape).compiler.compile(shape, limits)

    def stages_memory(self, shape: Shape, limits: BatchingLimits) -> tuple[MemoryBudget, ...]:
        """Memory of one rank of each pipeline stage."""
        known, key = self._known, (shape, limits)
        if key not in known.budgets:
            if shape not in known.memory:
                pool = self.pool_of(shape)
                known.memory[shape] = ReplicaMemory(
                    self.model, pool.device, shape, pool.memory_rules
                )
            known.budgets[key] = known.memory[shape].budgets(limits)
        return known.budgets[key]

    def memory(self, shape: Shape, limits: BatchingLimits) -> MemoryBudget:
        """Memory of one rank of a replica's tightest pipeline stage."""
        return tightest(self.stages_memory(shape, limits))

    def blocks(self, shape: Shape, limits: BatchingLimits) -> int:
        """KV blocks that a replica's scheduler can hand out."""
        return self.memory(shape, limits).num_blocks if self.num_blocks is None else self.num_blocks

    def full_request_blocks(self, shape: Shape) -> int:
        """KV pages that one request of ``max_model_len`` takes."""
        return self.layout(shape).pages(self.max_model_len)

    def layout(self, shape: Shape) -> KvLayout:
        """How a replica's KV cache is cut into pages."""
        layouts = self._known.layouts
        if shape not in layouts:
            rules = self.pool_of(shape).memory_rules
            layouts[shape] = kv_layout(self.model, shape.tp, rules.block_tokens, rules.state_dtype)
        return layouts[shape]

    def tokens_held(self, shape: Shape, pages: int) -> int:
        """Tokens that ``pages`` hold: full blocks, or full requests where layers differ in kind.

        vLLM counts the same way (v1/core/kv_cache_utils.py, from 0.21: concurrency at
        ``max_model_len`` times that length).
        """
        layout = self.layout(shape)
        if layout.windowed == layout.fixed == 0:
            return pages // layout.growing * layout.block_tokens
        return pages * self.max_model_len // layout.pages(self.max_model_len)

    def needed_bytes(self, shape: Shape, limits: BatchingLimits) -> int:
        """Bytes of weights, activations, overhead and the KV of one full request on one rank.

        Of the pipeline stage that needs most.
        """
        pages = self.full_request_blocks(shape) + self.pool_of(shape).memory_rules.null_blocks
        stages = self.stages_memory(shape, limits)
        return max(stage.fixed_bytes + pages * stage.block_bytes for stage in stages)

    def replica_limits(self, plan: Plan) -> Limits:
        """Limits of one replica of ``plan``, or of one of its attention groups, as simulated."""
        key = plan.shape, plan.limits
        if key not in self._known.limits:
            self._known.limits[key] = self._replica_limits(plan)
        return self._known.limits[key]

    def _replica_limits(self, plan: Plan) -> Limits:
        layout, limits = self.layout(plan.shape), plan.limits
        if plan.shape.dp > 1 and self.lockstep is not None:
            limits = self.lockstep.limits_of(limits, plan.shape.dp)
        return Limits(
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            num_blocks=self.blocks(plan.shape, plan.limits),
            block_tokens=layout.block_tokens,
            ingress_ps=int(in_ps(self.ingress_s)),
            growing=layout.growing,
            windowed=layout.windowed,
            window_blocks=layout.window_blocks,
            fixed=layout.fixed,
        )

    def start(self, plan: Plan, *, record_gaps: bool = False, plain: bool = False) -> Run:
        """A fresh run of ``plan`` over the workload; ``plain`` as of `simulator.run.Run`."""
        compiler = self.pool_of(plan.shape).compiler
        return Run(
            self.workload,
            plan.replicas,
            self.replica_limits(plan),
            compiler.compile(plan.shape, plan.limits),
            self._rules_behind_router(plan),
            together=compiler.compile_lockstep(plan.shape, plan.limits),
            record_gaps=record_gaps,
            plain=plain,
        )

    def compile_loops(self, plans: Sequence[Plan]) -> None:
        """Begin a run of each kind among ``plans``: with one attention group, and with several.

        Each has a loop of its own, which is compiled once on a machine.
        """
        for plan in {plan.shape.dp > 1: plan for plan in reversed(plans)}.values():
            self.start(plan).advance(1)

    def _rules_behind_router(self, plan: Plan) -> Rules:
        """The rules with what deals requests out to schedulers.

        The groups of one replica get theirs from the engine. Of several replicas the cluster's
        router chooses among the groups of all.
        """
        rules = self.rules_of(plan.shape)
        if plan.shape.dp == 1 or plan.replicas > 1 or self.lockstep is None:
            return rules
        return rules._replace(router=ROUTERS.index(self.lockstep.router))

    def rules_of(self, shape: Shape) -> Rules:
        """The engine's batching rules on a replica of ``shape``."""
        if shape.dp > 1 and self.lockstep is not None:
            share = self.lockstep.reserve_factor
            return self.rules._replace(
                new_token_ratio=share * self.rules.new_token_ratio,
                least_new_token_ratio=share * self.rules.least_new_token_ratio,
                ratio_decay=share * self.rules.ratio_decay,
            )
        if shape.pp == 1:
            return self.rules
        late = self.rules.late_results and self.engine.overlaps_with_pipeline
        return self.rules._replace(batches_in_flight=shape.pp, late_results=late)

    def plan_text(self, plan: Plan) -> str:
        """Canonical text of ``plan`` under this engine's defaults."""
        return plan.text(self.default_limits)
