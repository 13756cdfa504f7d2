"""From scenario to problem: look up every fact that the scenario names."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from planner import __version__
from planner.errors import InputError
from planner.io.calibration import read_calibration
from planner.io.hf_config import read_model
from planner.objective import Constraint, objective_of
from planner.problem import Problem, SearchLimits, SearchSpace
from planner.requests import digest_of, requests_of
from planner.sites import sites_of
from simulator.engine_rules import HostConstants
from simulator.kv_layout import kv_layout
from simulator.rules import ROUTERS, VLLM_V1
from simulator.units import MS_PER_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from planner.engine_settings import EngineSettings
    from planner.scenario import Scenario
    from planner.sites import Site
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
    spec, source = scenario.engine, scenario.source
    model = _read_model(scenario, weight_dtype=scenario.model.weight_dtype)
    max_model_len = _max_model_len(scenario, model)
    sites = sites_of(scenario, model, max_model_len)
    engine, memory = sites[0].engine, sites[0].memory_rules
    settings = spec.settings
    rules = engine.rules(max_model_len, settings)
    rules = rules._replace(router=ROUTERS.index(scenario.cluster.router))
    whole_prompts = not rules.chunked and engine.budget_grows_to_context
    budgets = [site.limits.max_num_batched_tokens for site in sites]
    if whole_prompts and min(budgets) < max_model_len:
        raise InputError(
            source=source,
            field="engine.max_num_batched_tokens",
            value=min(budgets),
            rule=f"must be at least max_model_len ({max_model_len}) where prompts are not cut",
        )
    space = _space(scenario, model, sites, max(budgets) if whole_prompts else 1)
    uses_prefix_cache = rules.prefix_caching
    shared = memory.block_tokens if rules.prefix_caching and rules.policy == VLLM_V1 else 0
    workload, digest, warnings = requests_of(scenario, max_model_len, shared)
    layout = kv_layout(model, 1, memory.block_tokens, memory.state_dtype)
    rules = _with_cache(rules, settings, workload, layout, warnings)
    for site in sites:
        warnings.extend(site.warnings(model))
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
        for site in sites:
            warnings.extend(
                loaded.warnings_for(
                    engine=engine.name,
                    version=engine.version,
                    device=site.device.name,
                    model=scenario.model.config,
                )
            )
    else:
        host = engine.host
        warnings.extend(engine.host_warnings)
    lockstep = engine.lockstep(settings, chunked=rules.chunked)
    pools = {site.name: site.pool(model, host, space, lockstep, max_model_len) for site in sites}
    tables = [site.table_facts for site in sites]
    return Problem(
        source=source,
        model=model,
        engine=engine,
        pools=pools,
        quantized_at_load=_is_quantized_at_load(scenario, model),
        num_blocks=spec.num_gpu_blocks,
        max_model_len=max_model_len,
        workload=workload,
        rules=rules,
        uses_prefix_cache=uses_prefix_cache,
        lockstep=lockstep,
        ingress_s=host.ingress_s,
        space=space,
        search_limits=SearchLimits(scenario.search.time_limit_s, scenario.search.work_limit),
        objective=objective_of(
            scenario.objective,
            workload,
            prices_per_hour=[pool.price_per_hour for pool in pools.values()],
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
            "kernel_table": tables[0] if len(tables) == 1 else tables,
            "engine": {
                "name": engine.name,
                "version": engine.version,
                "host": dataclasses.asdict(host),
                **({"calibration": calibration_digest} if calibration_digest else {}),
            },
        },
        warnings=tuple(dict.fromkeys(warnings)),
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
    scenario: Scenario, model: ModelShape, sites: Sequence[Site], least_tokens: int
) -> SearchSpace:
    """Values to choose from; token budgets below ``least_tokens`` would not start.

    Raises
    ------
    InputError
        If no asked-for number of expert groups divides the devices of any stage.

    """
    spec, settings = scenario.search.space, scenario.engine.settings
    shapes = tuple(shape for site in sites for shape in site.shapes(model, spec))
    if spec.ep and not shapes:
        raise InputError(
            source=scenario.source,
            field="search.space.ep",
            value=list(spec.ep),
            rule="must divide tp * dp, the devices of a pipeline stage, for some tp and dp",
        )
    largest = max(site.spec.num_devices for site in sites)
    pinned_seqs, pinned_tokens = settings.max_num_seqs, settings.max_num_batched_tokens
    tokens = tuple(n for n in spec.max_num_batched_tokens if n >= least_tokens) or (least_tokens,)
    return SearchSpace(
        shapes=tuple(s for s in shapes if s.pp == s.dp == 1 or s.devices <= largest),
        replicas=spec.replicas or tuple(range(1, largest + 1)),
        max_num_seqs=(pinned_seqs,) if pinned_seqs else spec.max_num_seqs,
        max_num_batched_tokens=(pinned_tokens,) if pinned_tokens else tokens,
        forbid=spec.forbid,
        theoretical=spec.theoretical,
    )


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
