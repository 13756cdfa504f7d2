"""Each pool of a scenario with what is looked up for it: device, engine profile, kernel times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.device_pool import DevicePool
from planner.errors import InputError
from planner.io.devices import (
    DEVICES_FILE,
    device_warnings,
    kernel_table_for,
    load_device,
    measured_device,
)
from planner.io.engines import load_engine
from planner.io.profiles import kernel_table_digest
from planner.layouts import every_attention_groups, every_expert_groups, expert_groups_offered
from planner.topology import pool_fabric
from simulator.cost import CostCompiler
from simulator.plan import BatchingLimits, Shape
from simulator.precision import PRECISIONS
from simulator.weights import layer_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from planner.io.engines import EngineProfile
    from planner.problem import SearchSpace
    from planner.scenario import Scenario
    from planner.scenario_sections import PoolSpec, SpaceSpec
    from simulator.device import Device
    from simulator.engine_rules import HostConstants, LockstepRules
    from simulator.fabric import Fabric
    from simulator.memory import MemoryRules
    from simulator.model import ModelShape
    from simulator.table import KernelTable


@dataclass(frozen=True)
class Site:
    """One pool of a scenario.

    Parameters
    ----------
    name
        What plans call it (`Shape.device`): nothing where it is the only one.
    spec, device, engine, table, fabric
        The pool as the scenario has it, and what was looked up for it.
    defaults, limits
        The engine's own batching limits there, and with what the scenario fixes.
    memory_rules
        What the engine takes of a device's memory.
    """

    name: str
    spec: PoolSpec
    device: Device
    engine: EngineProfile
    table: KernelTable
    fabric: Fabric
    defaults: BatchingLimits
    limits: BatchingLimits
    memory_rules: MemoryRules

    def pool(
        self,
        model: ModelShape,
        host: HostConstants,
        space: SearchSpace,
        lockstep: LockstepRules | None,
        max_model_len: int,
    ) -> DevicePool:
        """The pool, ready to cost every plan of ``space``."""
        max_seqs = max(*space.max_num_seqs, self.defaults.max_num_seqs)
        own = self.defaults.max_num_batched_tokens
        price = self.spec.price_per_hour
        return DevicePool(
            device=self.device,
            num_devices=self.spec.num_devices,
            devices_per_node=self.spec.devices_per_node,
            fabric=self.fabric,
            price_per_hour=self.device.price_per_hour if price is None else price,
            memory_rules=self.memory_rules,
            default_limits=self.limits,
            compiler=CostCompiler(
                model,
                self.device,
                self.table,
                host,
                self.engine.graphs_on(self.device),
                fabric=self.fabric,
                spare_layers=self.engine.spare_layers,
                lockstep=lockstep,
                nccl_all_reduce_from_bytes=self.engine.nccl_all_reduce_from_bytes,
                # SGLang's budget counts prompts only, so its decode batches may be larger.
                max_tokens=max(*space.max_num_batched_tokens, own, max_seqs),
                max_seqs=max_seqs,
                max_context=max_model_len,
            ),
        )

    def shapes(self, model: ModelShape, space: SpaceSpec) -> Iterator[Shape]:
        """Every shape of the grid, whatever forbids it."""
        layouts = self.engine.layouts
        stages = space.pp or tuple(2**i for i in range(self.spec.num_devices.bit_length()))
        for pp in stages:
            for tp in space.tp or _widths(self.spec):
                attention_groups: tuple[int, ...] = (1,)
                if space.theoretical and pp == 1:  # groups inside stages are not simulated
                    most = max(1, self.spec.num_devices // tp)
                    attention_groups = every_attention_groups(layouts, model, most)
                for dp in space.dp or attention_groups:
                    groups = space.ep or (
                        every_expert_groups(model, tp * dp)
                        if space.theoretical
                        else expert_groups_offered(layouts, model, tp * dp)
                    )
                    for ep in groups:
                        if tp * dp % ep == 0:
                            yield Shape(tp, pp, dp, ep, device=self.name)

    @property
    def table_facts(self) -> dict[str, object]:
        """Which kernel table the times come from."""
        measured = measured_device(self.device.name)
        table = self.table
        return {
            "device": measured,
            "scaled_to": self.device.name if table.estimated_from else None,
            "engine": table.engine,
            "version": table.engine_version,
            "sha256": kernel_table_digest(measured, table.engine, table.engine_version),
        }

    def warnings(self, model: ModelShape) -> Iterator[str]:
        """What a report must say of the data behind it."""
        yield from device_warnings(self.device.name)
        yield from self.engine.warnings
        notes = self.engine.precision_notes
        yield from (notes[dtype] for dtype in sorted(_precisions(model) & notes.keys()))


def sites_of(scenario: Scenario, model: ModelShape, max_model_len: int) -> list[Site]:
    """Look up what belongs to each pool of the scenario, in its order.

    Raises
    ------
    InputError
        When a pool names what is not known, or cannot run the model.

    """
    pools = scenario.cluster.pools
    return [
        _site(scenario, i, model, max_model_len, name=pool.device if len(pools) > 1 else "")
        for i, pool in enumerate(pools)
    ]


def _site(
    scenario: Scenario, index: int, model: ModelShape, max_model_len: int, *, name: str
) -> Site:
    spec, pool, source = scenario.engine, scenario.cluster.pools[index], scenario.source
    settings, field = spec.settings, f"cluster.pools.{index}"
    device = _device(pool, source, field)
    _check_weight_dtypes(scenario, model, device)
    engine = load_engine(
        spec.name, spec.version, device=measured_device(device.name), source=source
    )
    defaults = engine.default_limits(device, max_model_len, settings)
    return Site(
        name=name,
        spec=pool,
        device=device,
        engine=engine,
        table=kernel_table_for(device.name, engine.name, engine.kernel_table_version),
        fabric=pool_fabric(
            device,
            pool.nodes,
            pool.devices_per_node,
            pool.interconnect,
            nodes_per_rack=pool.nodes_per_rack,
            oversubscription=pool.oversubscription,
            source=source,
            field=field,
        ),
        defaults=defaults,
        limits=BatchingLimits(
            settings.max_num_seqs or defaults.max_num_seqs,
            settings.max_num_batched_tokens or defaults.max_num_batched_tokens,
        ),
        memory_rules=engine.memory_rules(device, settings),
    )


def _device(pool: PoolSpec, source: str, field: str) -> Device:
    """The pool's device; an unknown name is the scenario's error, not the catalogue's."""
    try:
        return load_device(pool.device)
    except InputError as error:
        if (error.source, error.field) != (DEVICES_FILE, "device"):
            raise  # the catalogue itself is broken
        raise InputError(
            source=source, field=f"{field}.device", value=pool.device, rule=error.rule
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


def _widths(pool: PoolSpec) -> tuple[int, ...]:
    """Every part of a node, and every number of whole nodes."""
    whole = (nodes * pool.devices_per_node for nodes in range(2, pool.nodes + 1))
    return (*range(1, pool.devices_per_node + 1), *whole)
