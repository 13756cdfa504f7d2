"""From scenario to problem: look up every fact that the scenario names."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from planner import __version__
from planner.errors import InputError
from planner.io.calibration import read_calibration
from planner.io.devices import (
    DEVICES_FILE,
    device_warnings,
    kernel_table_for,
    load_device,
    measured_device,
)
from planner.io.engines import load_engine
from planner.io.hf_config import read_model
from planner.io.profiles import kernel_table_digest
from planner.layouts import every_attention_groups, every_expert_groups, expert_groups_offered
from planner.objective import Constraint, objective_of
from planner.problem import Problem, SearchLimits, SearchSpace
from planner.requests import digest_of, requests_of
from planner.topology import pool_fabric
from simulator.cost import CostCompiler
from simulator.engine_rules import HostConstants
from simulator.kv_layout import kv_layout
from simulator.plan import BatchingLimits, Shape
from simulator.precision import PRECISIONS
from simulator.rules import ROUTERS, VLLM_V1
from simulator.units import MS_PER_S
from simulator.weights import layer_weights

if TYPE_CHECKING:
    from planner.engine_settings import EngineSettings
    from planner.layouts import Layouts
    from planner.scenario import Scenario
    from planner.scenario_sections import PoolSpec
    from simulator.device import Device
    from simulator.kv_layout import KvLayout
    from simulator.model import ModelShape
    from simulator.rules import Rules
    from simulator.workload import Workload

SEMANTICS_VERSION = 1
"""Version of what a simulated run means; figures of different versions do not compare."""


def resolve(scenario: Scenario, *, host: HostConstants | None = None) -> Problem:
    """Look up model, device, engine, kernel times and trace, and check that they fit together.

    Parameters
    ----------
    scenario
        What a user asks.
    host
        Host constants in place of the engine version's own, for a calibration.

    Raises
    ------
    InputError
        When a name is unknown, a file is bad, or two parts contradict each other.
    """
    spec, pool, source = scenario.engine, scenario.cluster.pools[0], scenario.source
    model = _read_model(scenario, weight_dtype=scenario.model.weight_dtype)
    max_model_len = _max_model_len(scenario, model)
    device = _device(scenario)
    _check_weight_dtypes(scenario, model, device)
    measured = measured_device(device.name)
    engine = load_engine(spec.name, spec.version, device=measured, source=source)
    table = kernel_table_for(device.name, engine.name, engine.kernel_table_version)
    fabric = pool_fabric(
        device,
        pool.nodes,
        pool.devices_per_node,
        pool.interconnect,
        nodes_per_rack=pool.nodes_per_rack,
        oversubscription=pool.oversubscription,
        source=source,
        field="cluster.pools.0",
    )
    settings = spec.settings
    rules = engine.rules(max_model_len, settings)
    rules = rules._replace(router=ROUTERS.index(scenario.cluster.router))
    defaults = engine.default_limits(device, max_model_len, settings)
    limits = BatchingLimits(
        settings.max_num_seqs or defaults.max_num_seqs,
        settings.max_num_batched_tokens or defaults.max_num_batched_tokens,
    )
    whole_prompts = not rules.chunked and engine.budget_grows_to_context
    if whole_prompts and limits.max_num_batched_tokens < max_model_len:
        raise InputError(
            source=source,
            field="engine.max_num_batched_tokens",
            value=limits.max_num_batched_tokens,
            rule=f"must be at least max_model_len ({max_model_len}) where prompts are not cut",
        )
    least_tokens = limits.max_num_batched_tokens if whole_prompts else 1
    space = _space(scenario, model, engine.layouts, least_tokens)
    memory = engine.memory_rules(device, settings)
    uses_prefix_cache = rules.prefix_caching
    shared = memory.block_tokens if rules.prefix_caching and rules.policy == VLLM_V1 else 0
    workload, digest, warnings = requests_of(scenario, max_model_len, shared)
    layout = kv_layout(model, 1, memory.block_tokens, memory.state_dtype)
    rules = _with_cache(rules, settings, workload, layout, warnings)
    warnings.extend(device_warnings(device.name))
    warnings.extend(engine.warnings)
    notes = engine.precision_notes
    warnings.extend(notes[dtype] for dtype in sorted(_precisions(model) & notes.keys()))
    price = device.price_per_hour if pool.price_per_hour is None else pool.price_per_hour
    calibration_digest = None
    if host is not None:
        warnings.append("host constants are the caller's, not the engine version's")
    elif spec.calibration == "none":
        host = HostConstants()
        warnings.append("engine.calibration is none: kernel tables alone, without host time")
    elif spec.calibration is not None:
        loaded = read_calibration(
            scenario.find(spec.calibration), source=spec.calibration, engine=engine.name
        )
        host, calibration_digest = loaded.calibration.host, loaded.sha256
        warnings.extend(
            loaded.warnings_for(
                engine=engine.name,
                version=engine.version,
                device=device.name,
                model=scenario.model.config,
            )
        )
    else:
        host = engine.host
        warnings.extend(engine.host_warnings)
    lockstep = engine.lockstep(settings, chunked=rules.chunked)
    max_seqs = max(*space.max_num_seqs, defaults.max_num_seqs)
    compiler = CostCompiler(
        model,
        device,
        table,
        host,
        engine.graphs_on(device),
        fabric=fabric,
        spare_layers=engine.spare_layers,
        lockstep=lockstep,
        nccl_all_reduce_from_bytes=engine.nccl_all_reduce_from_bytes,
        # SGLang's budget counts prompts only, so its decode batches may be larger.
        max_tokens=max(*space.max_num_batched_tokens, defaults.max_num_batched_tokens, max_seqs),
        max_seqs=max_seqs,
        max_context=max_model_len,
    )
    return Problem(
        source=source,
        model=model,
        device=device,
        engine=engine,
        num_devices=pool.num_devices,
        devices_per_node=pool.devices_per_node,
        fabric=fabric,
        quantized_at_load=_is_quantized_at_load(scenario, model),
        price_per_hour=price,
        memory_rules=memory,
        num_blocks=spec.num_gpu_blocks,
        max_model_len=max_model_len,
        workload=workload,
        default_limits=limits,
        compiler=compiler,
        rules=rules,
        uses_prefix_cache=uses_prefix_cache,
        lockstep=lockstep,
        ingress_s=host.ingress_s,
        space=space,
        search_limits=SearchLimits(scenario.search.time_limit_s, scenario.search.work_limit),
        objective=objective_of(
            scenario.objective,
            workload,
            price_per_hour=price,
            goodput_limits_s=_goodput_limits_s(scenario),
            source=source,
        ),
        constraints=_constraints(scenario),
        goodput_limits_s=_goodput_limits_s(scenario),
        provenance={
            "planner": __version__,
            "semantics": SEMANTICS_VERSION,
            "scenario": digest_of(scenario.model_dump(mode="json")),
            "workload": digest,
            "kernel_table": {
                "device": measured,
                "scaled_to": device.name if table.estimated_from else None,
                "engine": table.engine,
                "version": table.engine_version,
                "sha256": kernel_table_digest(measured, table.engine, table.engine_version),
            },
            "engine": {
                "name": engine.name,
                "version": engine.version,
                "host": dataclasses.asdict(host),
                **({"calibration": calibration_digest} if calibration_digest else {}),
            },
        },
        warnings=tuple(warnings),
    )


def _with_cache(
    rules: Rules,
    settings: EngineSettings,
    workload: Workload,
    layout: KvLayout,
    warnings: list[str],
) -> Rules:
    """The rules with the prefix cache only where it is modelled and can matter.

    Without known content it would only let preempted requests find some of their own blocks; it
    is then left out unless the scenario asks for it, since the jump engine is faster without.
    """
    if not rules.prefix_caching:
        return rules
    asked = bool(settings.prefix_caching)
    plain = layout.growing == 1 and layout.windowed == layout.fixed == 0
    modelled = rules.policy == VLLM_V1 and plain
    if (asked or workload.block_tokens) and not modelled:
        warnings.append(
            "the prefix cache is left out: it is modelled for vLLM's V1 scheduler and models whose "
            "layers all keep every token"
        )
    wanted = modelled and (asked or workload.block_tokens > 0)
    return rules._replace(prefix_caching=wanted)


def _device(scenario: Scenario) -> Device:
    """The pool's device; an unknown name is the scenario's error, not the catalogue's."""
    name = scenario.cluster.pools[0].device
    try:
        return load_device(name)
    except InputError as error:
        if (error.source, error.field) != (DEVICES_FILE, "device"):
            raise  # the catalogue itself is broken
        raise InputError(
            source=scenario.source, field="cluster.pools.0.device", value=name, rule=error.rule
        ) from None


def _precisions(model: ModelShape) -> set[str]:
    """Precisions that some product of the model runs in."""
    used = {w.dtype for layer in model.layer_counts for w in layer_weights(model, layer)}
    return used & PRECISIONS.keys()


def _check_weight_dtypes(scenario: Scenario, model: ModelShape, device: Device) -> None:
    """Refuse weights that no tensor core of the device multiplies: nothing there was measured."""
    for dtype in sorted(_precisions(model)):
        if device.flops(dtype) == 0:
            arithmetic = PRECISIONS[dtype].arithmetic
            raise InputError(
                source=scenario.source,
                field="model.weight_dtype",
                value=dtype,
                rule=(
                    f"needs {arithmetic} tensor cores, which {device.name} lacks; the engine would "
                    "unpack the weights to bf16, which is not measured: use bf16 or another device"
                ),
            )


def _max_model_len(scenario: Scenario, model: ModelShape) -> int:
    asked = scenario.model.max_model_len
    if asked is not None and asked > model.max_position_embeddings:
        raise InputError(
            source=scenario.source,
            field="model.max_model_len",
            value=asked,
            rule=f"must be at most {model.max_position_embeddings}, what the checkpoint supports",
        )
    return asked or model.max_position_embeddings


def _space(
    scenario: Scenario, model: ModelShape, layouts: Layouts, least_tokens: int
) -> SearchSpace:
    """Values to choose from; token budgets below ``least_tokens`` would not start."""
    pool, spec = scenario.cluster.pools[0], scenario.search.space
    settings = scenario.engine.settings
    pinned_seqs, pinned_tokens = settings.max_num_seqs, settings.max_num_batched_tokens
    tokens = tuple(n for n in spec.max_num_batched_tokens if n >= least_tokens) or (least_tokens,)
    return SearchSpace(
        shapes=_shapes(scenario, model, layouts),
        replicas=spec.replicas or tuple(range(1, pool.num_devices + 1)),
        max_num_seqs=(pinned_seqs,) if pinned_seqs else spec.max_num_seqs,
        max_num_batched_tokens=(pinned_tokens,) if pinned_tokens else tokens,
        forbid=spec.forbid,
        theoretical=spec.theoretical,
    )


def _shapes(scenario: Scenario, model: ModelShape, layouts: Layouts) -> tuple[Shape, ...]:
    """Every shape of the grid that the pool has devices for, whatever else forbids it.

    Raises
    ------
    InputError
        If no asked-for number of expert groups divides the devices of any stage.

    """
    pool, spec = scenario.cluster.pools[0], scenario.search.space
    stages = spec.pp or tuple(2**i for i in range(pool.num_devices.bit_length()))
    shapes = []
    for pp in stages:
        for tp in spec.tp or _widths(pool):
            attention_groups: tuple[int, ...] = (1,)
            if spec.theoretical and pp == 1:  # groups inside stages are not simulated
                most = max(1, pool.num_devices // tp)
                attention_groups = every_attention_groups(layouts, model, most)
            for dp in spec.dp or attention_groups:
                groups = spec.ep or (
                    every_expert_groups(model, tp * dp)
                    if spec.theoretical
                    else expert_groups_offered(layouts, model, tp * dp)
                )
                shapes += [Shape(tp, pp, dp, ep) for ep in groups if tp * dp % ep == 0]
    if spec.ep and not shapes:
        raise InputError(
            source=scenario.source,
            field="search.space.ep",
            value=list(spec.ep),
            rule="must divide tp * dp, the devices of a pipeline stage, for some tp and dp",
        )
    return tuple(s for s in shapes if s.pp == s.dp == 1 or s.devices <= pool.num_devices)


def _widths(pool: PoolSpec) -> tuple[int, ...]:
    """Every part of a node, and every number of whole nodes."""
    whole = (nodes * pool.devices_per_node for nodes in range(2, pool.nodes + 1))
    return (*range(1, pool.devices_per_node + 1), *whole)


def _is_quantized_at_load(scenario: Scenario, model: ModelShape) -> bool:
    """Whether the engine is to quantise weights that the checkpoint stores otherwise."""
    if scenario.model.weight_dtype in (None, "bf16"):
        return False
    stored = _read_model(scenario, weight_dtype=None)
    return stored.weight_dtype != model.weight_dtype


def _read_model(scenario: Scenario, *, weight_dtype: str | None) -> ModelShape:
    spec = scenario.model
    return read_model(
        spec.config,
        base_dir=scenario.base_dir,
        weight_dtype=weight_dtype,
        kv_cache_dtype=spec.kv_cache_dtype,
        max_model_len=spec.max_model_len,
        source=scenario.source,
    )


def _constraints(scenario: Scenario) -> tuple[Constraint, ...]:
    if scenario.slo is None:
        return ()
    return tuple(
        Constraint(name.removesuffix("_ms"), statistic, limit_ms)
        for name, limits in scenario.slo
        if limits is not None
        for statistic, limit_ms in limits.items()
    )


def _goodput_limits_s(scenario: Scenario) -> dict[str, float]:
    if scenario.goodput is None:
        return {}
    return {
        name.removesuffix("_ms"): limit_ms / MS_PER_S
        for name, limit_ms in scenario.goodput
        if limit_ms is not None
    }
