"""Sections of a scenario, each with the rules that concern it alone."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue  # noqa: TC002  (pydantic reads it)
from pydantic_core import CoreSchema  # noqa: TC002  (pydantic reads it)

from planner.engine_settings import (
    CHUNKING_OFF,
    OWN_NAMES,
    EngineSettings,
    counterpart,
    owners,
)
from planner.scenario_errors import refuse

MAX_POOLS: Final = 4
"""Most pools of one cluster."""

MAX_INT = 2**31 - 1
"""Largest count or token number: what the solver's and numpy's 32-bit fields can hold."""

Count = Annotated[int, Field(strict=True, gt=0, le=MAX_INT)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0, le=1e12, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]


def _check_flag(value: object) -> object:
    if not isinstance(value, bool) and value is not None:
        refuse("must be true or false")
    return value


Flag = Annotated[bool, BeforeValidator(_check_flag)]


def _check_chunk(value: int) -> int:
    if value == 0:
        refuse(f"must be greater than 0, or {CHUNKING_OFF} to switch chunking off")
    return value


ChunkSize = Annotated[
    int, Field(strict=True, ge=CHUNKING_OFF, le=MAX_INT), AfterValidator(_check_chunk)
]


def _check_values(values: tuple[int, ...]) -> tuple[int, ...]:
    if not values:
        refuse("must list at least one value")
    for value in values:
        if values.count(value) > 1:
            refuse(f"lists {value} twice")
    # Sorted, so that the order in which a user writes the values cannot change an answer.
    return tuple(sorted(values))


Values = Annotated[tuple[Count, ...], AfterValidator(_check_values)]


def _check_calibration(value: str) -> str:
    if value != "none" and not value.endswith((".json", ".yaml", ".yml")):
        refuse("must be 'none' or the path of a calibration file (.json, .yaml)")
    return value


class Section(BaseModel):
    """A part of the scenario: immutable, and closed to fields that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def without_unset(data: dict[str, Any], *names: str) -> dict[str, Any]:
    """``data`` without those of ``names`` that are not set.

    A field added since the first version is no part of a scenario that does not set it.
    """
    return {k: v for k, v in data.items() if v or k not in names}


class ModelSpec(Section):
    """The checkpoint to serve."""

    config: Annotated[str, Field(min_length=1)]
    """Name in the catalogue, or path to a ``config.json`` relative to the scenario."""
    weight_dtype: Literal["bf16", "fp8"] | None = None
    """Dtype of the projections; ``None``: the checkpoint's own."""
    kv_cache_dtype: Literal["auto", "bf16", "fp8"] = "auto"
    """Dtype of the KV cache; ``auto`` is the engine's choice, bf16 for these models."""
    max_model_len: Count | None = None
    """Longest request served, tokens; ``None``: what the checkpoint supports."""


class PoolSpec(Section):
    """Devices of one type."""

    device: Annotated[str, Field(min_length=1)]
    """Name in the device catalogue."""
    nodes: Count
    """Number of machines."""
    devices_per_node: Count
    """Devices in each machine."""
    interconnect: Annotated[str, Field(min_length=1)] | None = None
    """Network between the machines, by its name in ``profiles/hardware/interconnects.json``."""
    nodes_per_rack: Count | None = None
    """Machines below one leaf switch; ``None``: all of them."""
    oversubscription: Annotated[float, Field(strict=True, ge=1, le=1e3, allow_inf_nan=False)] = 1.0
    """Bandwidth of a leaf switch's machines over that of its links to the spine."""
    price_per_hour: (
        Annotated[float, Field(strict=True, ge=0, le=1e9, allow_inf_nan=False)] | None
    ) = None
    """USD per device and hour; ``None``: the device catalogue's price."""

    @property
    def num_devices(self) -> int:
        """Devices in the whole pool."""
        return self.nodes * self.devices_per_node


def _check_pools(pools: tuple[PoolSpec, ...]) -> tuple[PoolSpec, ...]:
    if not pools:
        refuse("must list one pool of devices, and lists none")
    if len(pools) > MAX_POOLS:
        refuse(f"lists {len(pools)} pools; at most {MAX_POOLS} can be planned over", show=False)
    devices = [pool.device for pool in pools]
    for device in devices:
        if devices.count(device) > 1:  # plans name their pool by its device
            refuse(f"lists two pools of {device}: put all devices of a kind into one", show=False)
    return pools


class ClusterSpec(Section):
    """The hardware that a plan may use."""

    pools: Annotated[tuple[PoolSpec, ...], AfterValidator(_check_pools)]
    """Pools of devices, one to four, each of another device; a plan runs in one of them."""
    router: Literal["round_robin", "least_loaded", "shortest_queue", "prefix_aware"] = "round_robin"
    """How requests are spread over replicas."""

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = dump(self)
        default = type(self).model_fields["router"].default
        return {k: v for k, v in data.items() if k != "router" or v != default}


_FIRST_ENGINE_FIELDS: Final = (
    "gpu_memory_utilization",
    "block_size",
    "num_gpu_blocks",
    "max_num_seqs",
    "max_num_batched_tokens",
    "calibration",
)
"""Fields that are written out even where they are not set."""


class AttentionDpSpec(Section):
    """TensorRT-LLM's ``attention_dp_config``: prompts wait until every attention group has one."""

    enable_balance: Flag = False
    """Whether they do."""
    timeout_iters: Annotated[int, Field(strict=True, ge=1, le=MAX_INT)] = 50
    """Iterations after which they wait no longer."""
    batching_wait_iters: Annotated[int, Field(strict=True, ge=0, le=MAX_INT)] = 10
    """Iterations for which they then wait for more prompts."""


class EngineSpec(Section):
    """The serving engine and the settings that the planner shall not choose itself.

    Settings have the engine's own names; another engine's are refused.
    """

    name: Annotated[str, Field(min_length=1)]
    """Engine: ``vllm``, ``sglang`` or ``trtllm``."""
    version: Annotated[str, Field(min_length=1)]
    """Its version, as text."""
    gpu_memory_utilization: Fraction | None = None
    """vLLM: fraction of device memory that the engine may claim; ``None``: its default."""
    block_size: Count | None = None
    """vLLM: tokens per KV block; ``None``: the engine's default."""
    num_gpu_blocks: Count | None = None
    """Measured number of KV blocks, used instead of the memory model."""
    max_num_seqs: Count | None = None
    """vLLM: pins the largest number of running sequences."""
    max_num_batched_tokens: Count | None = None
    """vLLM: pins the token budget of one iteration."""
    enable_chunked_prefill: Flag | None = None
    """vLLM: whether prompts are cut into chunks; ``None``: its default."""
    enable_prefix_caching: Flag | None = None
    """vLLM: whether finished prefixes are used again; ``None``: its default."""
    max_running_requests: Count | None = None
    """SGLang: pins the largest number of running requests."""
    chunked_prefill_size: ChunkSize | None = None
    """SGLang: pins the prompt tokens of one batch; -1 switches chunking off."""
    max_prefill_tokens: Count | None = None
    """SGLang: most prompt tokens of one batch beside the chunk; ``None``: its default."""
    mem_fraction_static: Fraction | None = None
    """SGLang: fraction of free memory for weights and KV pool; ``None``: its own formula."""
    page_size: Count | None = None
    """SGLang: tokens per KV page; ``None``: its default."""
    enable_mixed_chunk: Flag | None = None
    """SGLang: whether prompt chunks and decodes share a batch; ``None``: its default."""
    schedule_conservativeness: PositiveFloat | None = None
    """SGLang: factor on the output that admission reserves; ``None``: its default, 1."""
    disable_radix_cache: Flag | None = None
    """SGLang: whether finished prefixes are not used again; ``None``: its default."""
    max_batch_size: Count | None = None
    """TensorRT-LLM: pins the largest number of running requests."""
    max_num_tokens: Count | None = None
    """TensorRT-LLM: pins the token budget of one iteration."""
    kv_cache_free_gpu_memory_fraction: Fraction | None = None
    """TensorRT-LLM: fraction of the memory left free that becomes KV cache; ``None``: its
    default."""
    tokens_per_block: Count | None = None
    """TensorRT-LLM: tokens per KV block; ``None``: its default."""
    enable_chunked_context: Flag | None = None
    """TensorRT-LLM: whether prompts are cut into chunks; ``None``: its default."""
    enable_block_reuse: Flag | None = None
    """TensorRT-LLM: whether finished prefixes are used again; ``None``: its default."""
    capacity_scheduler_policy: (
        Literal["guaranteed_no_evict", "max_utilization", "static_batch"] | None
    ) = None
    """TensorRT-LLM: how requests are admitted; ``None``: its default."""
    attention_dp_config: AttentionDpSpec | None = None
    """TensorRT-LLM: how attention groups wait for one another's prompts; ``None``: they do not."""
    async_scheduling: Flag | None = None
    """Whether a batch is formed while its predecessor runs (vLLM: async scheduling; SGLang and
    TensorRT-LLM: overlap scheduler); ``None``: the version's default."""
    calibration: Annotated[str, AfterValidator(_check_calibration)] | None = None
    """Path of a file that ``planner calibrate`` wrote; ``none`` switches the fitted host terms
    off: kernel tables alone."""

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A field added since the first version is no part of a scenario that does not set it.
        data: dict[str, Any] = dump(self)
        return {k: v for k, v in data.items() if v is not None or k in _FIRST_ENGINE_FIELDS}

    @model_validator(mode="after")
    def _check(self) -> EngineSpec:
        for field, value in self:
            engines = owners(field)
            if value is None or not engines or self.name in engines:
                continue
            if self.name not in OWN_NAMES:
                break  # an unknown engine is told where engines are looked up
            own = counterpart(field, self.name)
            hint = f"; {self.name} calls it {own}" if own else ""
            refuse(f"is a setting of {' and '.join(engines)}, not of {self.name}{hint}", at=field)
        tokens, seqs = self.max_num_batched_tokens, self.max_num_seqs
        if tokens is not None and seqs is not None and tokens < seqs:
            refuse(
                f"must be at least max_num_seqs ({seqs}), or the engine does not start",
                at="max_num_batched_tokens",
                value=tokens,
            )
        return self

    @property
    def settings(self) -> EngineSettings:
        """The settings under one set of names."""
        names = OWN_NAMES.get(self.name, {})
        known = {field: getattr(self, own) for field, own in names.items()}
        if self.chunked_prefill_size is not None:
            known["chunked"] = self.chunked_prefill_size != CHUNKING_OFF
            if not known["chunked"]:
                known["max_num_batched_tokens"] = None
        if self.disable_radix_cache is not None:
            known["prefix_caching"] = not self.disable_radix_cache
        waits = self.attention_dp_config
        if waits is not None:
            known["balance"] = (
                (waits.timeout_iters, waits.batching_wait_iters) if waits.enable_balance else None
            )
        return EngineSettings(**known, async_scheduling=self.async_scheduling)


class SpaceSpec(Section):
    """Values that the search may choose from; each list is kept in ascending order.

    ``theoretical`` alone stands for ``{theoretical: true}``.
    """

    tp: Values | None = None
    """Tensor-parallel sizes; ``None``: every size that the engine and the model allow."""
    pp: Values | None = None
    """Pipeline stages; ``None``: powers of two up to the devices."""
    dp: Values | None = None
    """Attention data-parallel groups inside a replica; ``None``: one."""
    ep: Values | None = None
    """Groups that experts are spread over; ``None``: one and, with a mixture of experts, as many
    as a stage has devices where the engine launches that."""
    replicas: Values | None = None
    """Replica counts; ``None``: every count that the devices allow."""
    max_num_seqs: Values = (16, 32, 64, 128, 256, 512, 1024)
    """Limits on running sequences."""
    max_num_batched_tokens: Values = (512, 1024, 2048, 4096, 8192, 16384)
    """Token budgets of one iteration."""
    forbid: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Plans to leave out, by their text or a pattern of it: ``tp8:seqs=256``, ``4x*``."""
    theoretical: Flag = False
    """Whether layouts count that the engine version cannot launch; ``dp`` and ``ep`` are then
    every number that divides, where they are not listed."""

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, data: Any) -> Any:
        if isinstance(data, str):
            if data != "theoretical":
                refuse("must be 'theoretical' or a mapping of what to choose from")
            return {"theoretical": True}
        return data

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The mapping, or the one word."""
        return {"anyOf": [handler(core_schema), {"const": "theoretical"}]}

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(dump(self), "pp", "dp", "ep", "forbid", "theoretical")


class SearchSpec(Section):
    """How long to search, and where."""

    time_limit_s: PositiveFloat = 60.0
    """Wall-clock limit, seconds."""
    work_limit: Annotated[int, Field(strict=True, gt=0, le=2**62)] | None = None
    """Limit on simulated iterations, which unlike a time limit stops at the same place
    everywhere."""
    seed: Annotated[int, Field(strict=True, ge=0, le=MAX_INT)] = 0
    """Seed of drawn arrivals and lengths."""
    space: SpaceSpec = SpaceSpec()
    """Values to choose from."""
