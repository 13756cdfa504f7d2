"""Engine versions: their defaults, rules and host constants, from ``profiles/engines``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, TypeVar

from planner.engine_settings import EngineSettings
from planner.errors import InputError, PlannerError, nearest
from planner.io.engine_file import (
    ENGINES,
    DeviceTable,
    Fact,
    Host,
    LargestGraph,
    ReserveRule,
    ReserveTier,
    ShareByTp,
    Transferred,
    read_engine_file,
)
from planner.io.engine_graphs import graph_rules
from planner.io.profiles import available_kernel_tables
from planner.layouts import Layouts
from simulator.engine_rules import GraphRules, HostConstants, LockstepRules
from simulator.memory import MemoryRules, Reserve, ShareByWidth
from simulator.plan import BatchingLimits
from simulator.rules import POLICIES, Rules
from simulator.units import GIB, MIB, S_PER_MS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from planner.io.engine_file import EngineFile, Version
    from simulator.device import Device
    from simulator.stages import SpareLayers

DEFAULTS: Final = EngineSettings()
"""No setting fixed."""

_Row = TypeVar("_Row", LargestGraph, ReserveTier)


@dataclass(frozen=True)
class EngineProfile:
    """What one engine version is and does, resolved.

    Parameters
    ----------
    name, version
        The engine.
    kernel_table_version
        Version whose measured kernels stand for it on the device asked for.
    block_tokens
        Default tokens of a KV block.
    graphs
        CUDA-graph rules, without what depends on the device (`graphs_on`).
    nccl_all_reduce_from_bytes
        By tensor-parallel width, the message size from which NCCL reduces; absent widths always
        use the engine's own kernel.
    host
        Host constants.
    precision_notes
        What a report must say about kernel times of one precision, where the model uses it.
    warnings
        What a report must say about kernel times and constants that are not this version's own.
    host_warnings
        The same about its host constants, where they are used.

    """

    name: str
    version: str
    kernel_table_version: str
    block_tokens: int
    graphs: GraphRules
    nccl_all_reduce_from_bytes: dict[int, int]
    host: HostConstants
    precision_notes: dict[str, str]
    warnings: tuple[str, ...]
    host_warnings: tuple[str, ...]
    _entry: Version = field(repr=False)
    _overhead_bytes: int = field(repr=False)

    def default_limits(
        self, device: Device, max_model_len: int = 0, settings: EngineSettings = DEFAULTS
    ) -> BatchingLimits:
        """The engine's own batching limits on ``device`` when it runs as a server.

        Parameters
        ----------
        device
            What it runs on; its memory and name decide.
        max_model_len
            Longest request, tokens: the budget of an engine that does not cut prompts must hold
            it (vLLM and SGLang; TensorRT-LLM keeps its budget).
        settings
            What the scenario fixes; only whether prompts are cut matters here.

        """
        entry = self._entry
        for tier in entry.limits.tiers:
            named = tier.not_named is not None and tier.not_named in device.name
            if device.memory_bytes >= tier.at_least_gib * GIB and not named:
                break
        else:
            raise PlannerError(f"engine {self.name} {self.version} has no tier for {device.name}")
        chunked = self._chunked(max_model_len, settings)
        tokens = tier.max_num_batched_tokens
        if entry.automatic_chunking is not None:
            automatic = entry.automatic_chunking
            tokens = automatic.chunk_tokens if chunked else automatic.least_tokens
        if not chunked and entry.prefill_tokens is not None:
            tokens = settings.prefill_tokens or entry.prefill_tokens.value
        if not chunked and entry.budget_grows_to_context:
            tokens = max(tokens, max_model_len)
        return BatchingLimits(tier.max_num_seqs, tokens)

    def rules(self, max_model_len: int, settings: EngineSettings = DEFAULTS) -> Rules:
        """How the engine forms batches on replicas without pipeline stages.

        Parameters
        ----------
        max_model_len
            Longest request, tokens: vLLM V0 cuts prompts only for long contexts.
        settings
            What the scenario fixes.

        """
        entry = self._entry
        chunked = self._chunked(max_model_len, settings)
        capacity = settings.capacity_policy or (
            entry.capacity_policy.value if entry.capacity_policy else None
        )
        prefill = entry.prefill_tokens
        binds = prefill is not None and (prefill.with_chunks or not chunked)
        reserve = entry.output_reserve
        # SGLang managers/scheduler.py, init_new_token_ratio: never above one.
        start = min(1.0, reserve.start * (settings.conservativeness or 1.0)) if reserve else 0.0
        least = start * reserve.least_factor if reserve else 0.0
        mixed = entry.mixed.value if entry.mixed else chunked or entry.automatic_chunking is None
        policy = "static" if capacity == "static_batch" else entry.policy.value
        return Rules(
            policy=POLICIES.index(policy),
            chunked=chunked,
            chunk_unit=self._block(settings) if entry.chunks_of_blocks else 1,
            prefill_tokens=(settings.prefill_tokens or prefill.value) if prefill and binds else 0,
            mixed=_given(settings.mixed, mixed),
            reserve_full_prompt=entry.reserve_full_prompt.value,
            watermark=entry.watermark.value if entry.watermark else 0.0,
            evict=capacity in (None, "max_utilization"),
            new_token_ratio=start,
            least_new_token_ratio=least,
            ratio_decay=(start - least) / reserve.decay_steps if reserve else 0.0,
            reserved_output_tokens=reserve.most_tokens if reserve else 0,
            late_results=_given(settings.async_scheduling, entry.late_results.value),
            prefix_caching=_given(settings.prefix_caching, entry.prefix_caching.value),
            own_micro_batches=entry.own_micro_batches,
        )

    def memory_rules(self, device: Device, settings: EngineSettings = DEFAULTS) -> MemoryRules:
        """How the engine counts the memory of ``device``."""
        entry = self._entry
        return MemoryRules(
            memory_fraction=settings.memory_fraction or self._fraction_on(device, settings),
            overhead_bytes=self._overhead_bytes,
            graph_bytes=int(entry.graph_gib.value * GIB),
            block_tokens=self._block(settings),
            logit_bytes=int(entry.logit_bytes.value),
            state_dtype=entry.state_dtype.value,
            accounting=entry.accounting.value,
            null_blocks=entry.accounting.null_blocks,
            spare_layers=self.spare_layers,
        )

    @property
    def spare_layers(self) -> SpareLayers:
        """Where layers go that do not divide by the pipeline stages."""
        return self._entry.spare_layers

    @property
    def layouts(self) -> Layouts:
        """Which shapes of a pipeline stage can be launched."""
        rules = self._entry.layouts
        return Layouts(rules.expert_groups, rules.attention_groups, rules.even_experts)

    def lockstep(
        self, settings: EngineSettings = DEFAULTS, *, chunked: bool = True
    ) -> LockstepRules | None:
        """How attention groups of one replica run, or ``None`` where there is always one.

        SGLang deals out ``chunked_prefill_size``, but not the budget of whole prompts
        (server_args.py, ``max_prefill_tokens``).
        """
        rules = self._entry.lockstep
        if rules is None:
            return None
        shares = rules.limits_of == "replica"
        hold_iterations, gather_iterations = settings.balance or (0, 0)
        return LockstepRules(
            padding=rules.padding,
            padding_with_prompts=rules.padding_with_prompts,
            idle_tokens=rules.idle_tokens,
            shares_seqs=shares,
            shares_tokens=shares and chunked,
            graphs_with_prompts=rules.graphs_with_prompts,
            router=rules.router,
            reserve_factor=rules.reserve_factor,
            hold_iterations=hold_iterations,
            gather_iterations=gather_iterations,
        )

    @property
    def overlaps_with_pipeline(self) -> bool:
        """Whether a batch may be formed while its predecessor runs also with pipeline stages."""
        return self._entry.late_results.with_pipeline

    @property
    def budget_grows_to_context(self) -> bool:
        """Whether the budget must hold the longest request where prompts are not cut."""
        return self._entry.budget_grows_to_context

    @property
    def budget_covers_sequences(self) -> bool:
        """Whether the engine only starts with a budget of a token for each sequence."""
        return self._entry.budget_covers_sequences

    def graphs_on(self, device: Device) -> GraphRules:
        """CUDA-graph rules on ``device``: SGLang's and newer vLLM's sizes follow its memory."""
        rows = self._entry.graphs.largest
        if not rows:
            return self.graphs
        floor = _first_tier(rows, device).at_least_gib
        by_width = sorted((row.from_tp, row.size) for row in rows if row.at_least_gib == floor)
        return replace(self.graphs, largest_by_tp=tuple(by_width))

    def _block(self, settings: EngineSettings) -> int:
        return settings.block_tokens or self.block_tokens

    def _chunked(self, max_model_len: int, settings: EngineSettings) -> bool:
        """Whether prompts are cut: as the scenario says, or the context, or the default."""
        automatic = self._entry.automatic_chunking
        default = self._entry.chunked.value
        if automatic is not None:
            default = max_model_len > automatic.above_context_tokens
        return _given(settings.chunked, default)

    def _fraction_on(
        self, device: Device, settings: EngineSettings
    ) -> float | ShareByWidth | Reserve:
        rule, prefill = self._entry.memory_fraction, self._entry.prefill_tokens
        if isinstance(rule, ShareByTp):
            return ShareByWidth(tuple(sorted(rule.by_tp.items())))
        if isinstance(rule, ReserveRule):
            tier = _first_tier(rule.tiers, device)
            whole = settings.chunked is False
            return Reserve(
                fixed_bytes=int(tier.fixed_mib * MIB),
                rank_bytes=int(tier.rank_mib * MIB),
                graphs=self.graphs_on(device),
                token_bytes=int(rule.token_mib * MIB),
                least_tokens=rule.least_tokens,
                most_tokens=(settings.prefill_tokens or prefill.value) if prefill and whole else 0,
                sequence_bytes=int(rule.sequence_mib * MIB),
                prompt_graph_bytes=int(rule.prompt_graph_mib * MIB),
                latent_bytes=int(rule.latent_mib * MIB),
                group_bytes=int(rule.group_mib * MIB),
                group_sequence_bytes=int(rule.group_sequence_mib * MIB),
                large_group_sequence_bytes=int(rule.large_group_sequence_mib * MIB),
                least_bytes=int(tier.least_mib * MIB),
            )
        return rule.value


def load_engine(
    name: str, version: str, *, device: str | None = None, source: str = "<scenario>"
) -> EngineProfile:
    """Read one engine version's profile.

    Parameters
    ----------
    name, version
        The engine.
    device
        Device whose kernel table is wanted; ``None``: that of most devices.
    source
        File that an error names.

    Raises
    ------
    InputError
        If the engine or the version is unknown; a version never stands in for another.

    """
    if name not in ENGINES:
        raise _unknown(source, "engine.name", name, ENGINES)
    file = read_engine_file(name)
    if version not in file.versions:
        raise _unknown(source, "engine.version", version, tuple(file.versions))
    entry = file.versions[version]
    table, note = _kernel_table(file, version, device)
    warnings, host_warnings = [note] if note else [], []
    overhead, host = entry.overhead_gib, entry.host
    if isinstance(host, Transferred):
        host_warnings.append(
            f"host constants of {name} {version} are transferred from {host.transferred_from}: "
            "no measured run of this version has calibrated them"
        )
        host = _own_host(file, host.transferred_from)
    if isinstance(overhead, Transferred):
        warnings.append(
            f"memory overhead of {name} {version} is transferred from {overhead.transferred_from}"
        )
        overhead = _own_overhead(file, overhead.transferred_from)
    rule = entry.nccl_all_reduce_from_bytes
    return EngineProfile(
        name=name,
        version=version,
        kernel_table_version=table,
        block_tokens=int(entry.block_tokens.value),
        graphs=graph_rules(entry.graphs),
        nccl_all_reduce_from_bytes=dict(rule.values) if rule and device in rule.devices else {},
        host=HostConstants(
            iteration_s=host.iteration_ms.value * S_PER_MS,
            sequence_s=host.sequence_ms.value * S_PER_MS,
            ingress_s=host.ingress_ms.value * S_PER_MS,
            eager_layer_s=host.eager_layer_ms.value * S_PER_MS,
            prefill_multiplier=host.prefill_multiplier.value,
        ),
        precision_notes=file.kernel_tables.precision_notes,
        warnings=tuple(warnings),
        host_warnings=tuple(host_warnings),
        _entry=entry,
        _overhead_bytes=int(overhead.value * GIB),
    )


def engine_versions() -> tuple[tuple[str, str], ...]:
    """Every engine and version that ships."""
    return tuple((name, version) for name in ENGINES for version in read_engine_file(name).versions)


def _given(asked: bool | None, default: bool) -> bool:
    return default if asked is None else asked


def _first_tier(tiers: Sequence[_Row], device: Device) -> _Row:
    """The first tier whose floor ``device`` reaches; the last one's is 0."""
    return next(tier for tier in tiers if device.memory_bytes >= tier.at_least_gib * GIB)


def _kernel_table(file: EngineFile, version: str, device: str | None) -> tuple[str, str]:
    """Version whose kernel table is used on ``device``, and what a report must say about it."""
    tables = file.kernel_tables
    own = (device, file.engine, version) in available_kernel_tables()
    listed = tables.devices.get(device) if device else None
    chosen = listed or DeviceTable(version=tables.version)
    used = version if own else chosen.version
    notes = []
    if used != version:
        which = f" on {device}, {chosen.why}" if chosen.why else ", for which none are published"
        notes.append(f"kernel times of {file.title} {used} stand in for {version}{which}")
    if chosen.caution and used == chosen.version:
        notes.append(chosen.caution)
    return used, "; ".join(notes)


def _origin(file: EngineFile, transferred_from: str) -> Version:
    """The version that ``0.10.2`` or ``vllm 0.10.2`` names."""
    engine, _, version = transferred_from.rpartition(" ")
    return read_engine_file(engine or file.engine).versions[version]


def _own_host(file: EngineFile, transferred_from: str) -> Host:
    host = _origin(file, transferred_from).host
    if isinstance(host, Transferred):
        raise PlannerError(f"{transferred_from}: transferred constants cannot be passed on")
    return host


def _own_overhead(file: EngineFile, transferred_from: str) -> Fact:
    overhead = _origin(file, transferred_from).overhead_gib
    if isinstance(overhead, Transferred):
        raise PlannerError(f"{transferred_from}: transferred constants cannot be passed on")
    return overhead


def _unknown(source: str, field_path: str, value: str, known: tuple[str, ...]) -> InputError:
    near = nearest(value, known)
    hint = f"; did you mean {near!r}?" if near else ""
    rule = f"is not known{hint} (known: {', '.join(known)})"
    return InputError(source=source, field=field_path, value=value, rule=rule)
