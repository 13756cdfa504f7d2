"""Engine versions: their defaults, rules and host constants, from ``profiles/engines``."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from planner.errors import InputError, PlannerError, nearest
from planner.io.yaml_file import read_mapping
from simulator.engine_rules import GraphRules, HostConstants, graph_sizes
from simulator.plan import BatchingLimits
from simulator.units import GIB, S_PER_MS

if TYPE_CHECKING:
    from simulator.device import Device

ENGINES: Final = ("vllm",)
"""Engines that ship."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Fact(_Entry):
    """One value and where it comes from: a source, or a fit with its data and residual."""

    value: float
    source: str | None = None
    fit: str | None = None

    @model_validator(mode="after")
    def _has_origin(self) -> _Fact:
        if (self.source is None) == (self.fit is None):
            raise ValueError("a value needs either its source or its fit")
        return self


class _Transferred(_Entry):
    transferred_from: str


class _Flag(_Entry):
    value: bool
    source: str


class _DeviceTable(_Entry):
    """A device whose kernel times are not what the engine version's own entry says."""

    version: str
    note: str


class _KernelTable(_Entry):
    version: str
    note: str | None = None
    devices: dict[str, _DeviceTable] = {}
    precision_notes: dict[str, str] = {}

    def on(self, device: str | None) -> _KernelTable | _DeviceTable:
        """What applies to one device: its own entry, or else the general one."""
        return self.devices.get(device, self) if device else self


class _Dtype(_Entry):
    value: Literal["bf16", "fp32"]
    source: str


class _Tier(_Entry):
    at_least_gib: float
    not_named: str | None = None
    max_num_batched_tokens: int
    max_num_seqs: int


class _TierList(_Entry):
    source: str
    tiers: tuple[_Tier, ...]


class _Graphs(_Entry):
    sizes: tuple[int, ...]
    ranges: tuple[tuple[int, int, int], ...]
    full_decode: bool
    captures_budget: bool = False
    source: str


class _AllReduceRule(_Entry):
    devices: tuple[str, ...]
    values: dict[int, int]
    source: str


class _Host(_Entry):
    iteration_ms: _Fact
    sequence_ms: _Fact
    ingress_ms: _Fact
    eager_layer_ms: _Fact
    prefill_multiplier: _Fact


class _Version(_Entry):
    kernel_table: _KernelTable
    memory_fraction: _Fact
    limits: _TierList
    reserve_full_prompt: _Flag
    graphs: _Graphs
    graph_gib: _Fact
    logit_bytes: _Fact
    state_dtype: _Dtype
    nccl_all_reduce_from_bytes: _AllReduceRule | None = None
    overhead_gib: _Fact | _Transferred
    host: _Host | _Transferred


class _EngineFile(_Entry):
    schema_version: Annotated[int, Field(ge=1, le=1)]
    engine: str
    block_tokens: _Fact
    versions: dict[str, _Version]


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
    memory_fraction
        Default share of device memory.
    overhead_bytes, graph_bytes
        Bytes per rank outside the allocator, and set aside for CUDA graphs.
    logit_bytes
        Bytes per sequence and vocabulary entry that the sampler holds at its peak.
    state_dtype
        Dtype of recurrent states.
    reserve_full_prompt
        Whether admission asks room for the whole prompt.
    graphs
        CUDA-graph rules.
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
    memory_fraction: float
    overhead_bytes: int
    graph_bytes: int
    logit_bytes: int
    state_dtype: str
    reserve_full_prompt: bool
    graphs: GraphRules
    nccl_all_reduce_from_bytes: dict[int, int]
    host: HostConstants
    precision_notes: dict[str, str]
    warnings: tuple[str, ...]
    host_warnings: tuple[str, ...]
    _tiers: tuple[_Tier, ...] = field(repr=False)

    def default_limits(self, device: Device) -> BatchingLimits:
        """The engine's own batching limits on ``device`` when it runs as a server."""
        for tier in self._tiers:
            named = tier.not_named is not None and tier.not_named in device.name
            if device.memory_bytes >= tier.at_least_gib * GIB and not named:
                return BatchingLimits(tier.max_num_seqs, tier.max_num_batched_tokens)
        raise PlannerError(f"engine {self.name} {self.version} has no tier for {device.name}")


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
    file = _read(name)
    if version not in file.versions:
        raise _unknown(source, "engine.version", version, tuple(file.versions))
    entry = file.versions[version]
    table = entry.kernel_table.on(device)
    warnings, host_warnings = [table.note] if table.note else [], []
    overhead, host = entry.overhead_gib, entry.host
    if isinstance(host, _Transferred):
        host_warnings.append(
            f"host constants of {name} {version} are transferred from {host.transferred_from}: "
            "no measured run of this version has calibrated them"
        )
        host = _own_host(file, host.transferred_from)
    if isinstance(overhead, _Transferred):
        warnings.append(
            f"memory overhead of {name} {version} is transferred from {overhead.transferred_from}"
        )
        overhead = _own_overhead(file, overhead.transferred_from)
    rule = entry.nccl_all_reduce_from_bytes
    return EngineProfile(
        name=name,
        version=version,
        kernel_table_version=table.version,
        block_tokens=int(file.block_tokens.value),
        memory_fraction=entry.memory_fraction.value,
        overhead_bytes=int(overhead.value * GIB),
        graph_bytes=int(entry.graph_gib.value * GIB),
        logit_bytes=int(entry.logit_bytes.value),
        state_dtype=entry.state_dtype.value,
        reserve_full_prompt=entry.reserve_full_prompt.value,
        graphs=GraphRules(
            graph_sizes(entry.graphs.sizes, entry.graphs.ranges),
            entry.graphs.full_decode,
            entry.graphs.captures_budget,
        ),
        nccl_all_reduce_from_bytes=dict(rule.values) if rule and device in rule.devices else {},
        host=HostConstants(
            iteration_s=host.iteration_ms.value * S_PER_MS,
            sequence_s=host.sequence_ms.value * S_PER_MS,
            ingress_s=host.ingress_ms.value * S_PER_MS,
            eager_layer_s=host.eager_layer_ms.value * S_PER_MS,
            prefill_multiplier=host.prefill_multiplier.value,
        ),
        precision_notes=entry.kernel_table.precision_notes,
        warnings=tuple(warnings),
        host_warnings=tuple(host_warnings),
        _tiers=entry.limits.tiers,
    )


def engine_versions() -> tuple[tuple[str, str], ...]:
    """Every engine and version that ships."""
    return tuple((name, version) for name in ENGINES for version in _read(name).versions)


def _own_host(file: _EngineFile, version: str) -> _Host:
    host = file.versions[version].host
    if isinstance(host, _Transferred):
        raise PlannerError(f"{file.engine} {version}: transferred constants cannot be passed on")
    return host


def _own_overhead(file: _EngineFile, version: str) -> _Fact:
    overhead = file.versions[version].overhead_gib
    if isinstance(overhead, _Transferred):
        raise PlannerError(f"{file.engine} {version}: transferred constants cannot be passed on")
    return overhead


@lru_cache(maxsize=len(ENGINES))
def _read(name: str) -> _EngineFile:
    shown = f"profiles/engines/{name}.yaml"
    path = Path(str(files("profiles") / "engines" / f"{name}.yaml"))
    try:
        return _EngineFile.model_validate(read_mapping(path, source=shown))
    except ValidationError as error:
        raise PlannerError(f"{shown}: {error}") from error


def _unknown(source: str, field_path: str, value: str, known: tuple[str, ...]) -> InputError:
    near = nearest(value, known)
    hint = f"; did you mean {near!r}?" if near else ""
    rule = f"is not known{hint} (known: {', '.join(known)})"
    return InputError(source=source, field=field_path, value=value, rule=rule)
