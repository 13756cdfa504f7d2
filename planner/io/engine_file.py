"""The files in ``profiles/engines``: what an entry may say, and how it is read."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from planner.errors import PlannerError
from planner.io.yaml_file import read_mapping
from planner.layouts import Groups  # noqa: TC001  (pydantic reads it)
from simulator.engine_rules import Padding  # noqa: TC001  (pydantic reads it)
from simulator.stages import SpareLayers  # noqa: TC001  (pydantic reads it)

ENGINES: Final = ("vllm", "sglang", "trtllm")
"""Engines that ship."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Fact(_Entry):
    """One value and where it comes from: a source, or a fit with its data and residual."""

    value: float
    source: str | None = None
    fit: str | None = None

    @model_validator(mode="after")
    def _has_origin(self) -> Fact:
        if (self.source is None) == (self.fit is None):
            raise ValueError("a value needs either its source or its fit")
        return self


class Transferred(_Entry):
    """A value of another version: ``0.10.2``, or ``vllm 0.10.2`` from another engine."""

    transferred_from: str


class Flag(_Entry):
    """Whether something is so by default."""

    value: bool
    source: str


class LateResults(Flag):
    """Whether the next batch is formed while its predecessor runs, also with pipeline stages."""

    with_pipeline: bool


class Policy(_Entry):
    """The scheduling policy, by its name in `simulator.rules.POLICIES`."""

    value: Literal["vllm_v1", "vllm_v0", "sglang", "trtllm"]
    source: str


class CapacityPolicy(_Entry):
    """TensorRT-LLM's default rule of admission."""

    value: Literal["guaranteed_no_evict", "max_utilization", "static_batch"]
    source: str


class Accounts(_Entry):
    """How device memory is counted, see `simulator.memory.Accounting`."""

    value: Literal["share_of_device", "static_share", "share_of_free"]
    null_blocks: Annotated[int, Field(ge=0)]
    source: str


class DeviceTable(_Entry):
    """A device on which another table stands in (``why``), or whose times need a word."""

    version: str
    why: str | None = None
    caution: str | None = None


class KernelTables(_Entry):
    """Whose kernel times a version runs on where none of its own ship for the device."""

    version: str
    devices: dict[str, DeviceTable] = {}
    precision_notes: dict[str, str] = {}


class Dtype(_Entry):
    """Dtype of recurrent states."""

    value: Literal["bf16", "fp32"]
    source: str


class Tier(_Entry):
    """Default limits on devices of some memory; the name part leaves devices out."""

    at_least_gib: float
    not_named: str | None = None
    max_num_batched_tokens: int
    max_num_seqs: int


class TierList(_Entry):
    """The first tier holds whose floor the device reaches and whose name part it lacks."""

    source: str
    tiers: tuple[Tier, ...]


class AutomaticChunking(_Entry):
    """vLLM V0: chunks and their budget for long contexts, whole prompts for others."""

    above_context_tokens: int
    chunk_tokens: int
    least_tokens: int
    source: str


class PrefillTokens(_Entry):
    """SGLang's ``max_prefill_tokens``, and whether it also binds where prompts are cut."""

    value: int
    with_chunks: bool
    source: str


class OutputReserve(_Entry):
    """Share of outstanding output that SGLang's admission reserves."""

    start: float
    least_factor: float
    decay_steps: int
    most_tokens: int
    source: str


class LargestGraph(_Entry):
    """Largest decode graph on devices of some memory, from a tensor-parallel width on."""

    at_least_gib: float
    from_tp: int = 1
    size: int


class Graphs(_Entry):
    """CUDA graphs, see `simulator.engine_rules.GraphRules`; ranges are (first, last, step)."""

    sizes: tuple[int, ...] = ()
    ranges: tuple[tuple[int, int, int], ...] = ()
    full_decode: bool
    captures_budget: bool = False
    per_sequence: int = 2
    captures_seats: bool = False
    within_budget: bool = True
    padded: bool = True
    with_prompts: Literal["same", "none"] | tuple[tuple[int, int, int], ...] = "same"
    largest: tuple[LargestGraph, ...] = ()
    source: str


class ShareByTp(_Entry):
    """A memory fraction by width: the fraction from that width on."""

    by_tp: dict[int, float]
    source: str


class ReserveTier(_Entry):
    """What is kept on devices of some memory, MiB."""

    at_least_gib: float
    fixed_mib: float
    rank_mib: float
    least_mib: float = 0.0


class ReserveRule(_Entry):
    """A memory fraction by what is kept free, see `simulator.memory.Reserve`."""

    tiers: tuple[ReserveTier, ...]
    token_mib: float = 0.0
    least_tokens: int = 0
    sequence_mib: float = 0.0
    prompt_graph_mib: float = 0.0
    latent_mib: float = 0.0
    group_mib: float = 0.0
    group_sequence_mib: float = 0.0
    large_group_sequence_mib: float = 0.0
    source: str


class AllReduceRule(_Entry):
    """Message sizes from which NCCL reduces, by width, on some devices."""

    devices: tuple[str, ...]
    values: dict[int, int]
    source: str


class LayoutRules(_Entry):
    """How a stage's devices may be grouped, see `planner.layouts.Layouts`."""

    expert_groups: Groups
    attention_groups: Groups
    even_experts: bool
    source: str


class Lockstep(_Entry):
    """How attention groups run together, see `simulator.engine_rules.LockstepRules`."""

    padding: Padding
    padding_with_prompts: Padding
    idle_tokens: Annotated[int, Field(ge=0, le=1)]
    limits_of: Literal["group", "replica"]
    graphs_with_prompts: bool = True
    router: Literal["round_robin", "least_loaded", "shortest_queue"]
    reserve_factor: Annotated[float, Field(gt=0)] = 1.0
    source: str


class Host(_Entry):
    """Host constants, see `simulator.engine_rules.HostConstants`."""

    iteration_ms: Fact
    sequence_ms: Fact
    ingress_ms: Fact
    eager_layer_ms: Fact
    prefill_multiplier: Fact


class Version(_Entry):
    """One version of an engine; what it takes over is already filled in."""

    same_as: str | None = None
    policy: Policy
    block_tokens: Fact
    limits: TierList
    automatic_chunking: AutomaticChunking | None = None
    chunked: Flag
    mixed: Flag | None = None
    budget_grows_to_context: bool = True
    budget_covers_sequences: bool = False
    chunks_of_blocks: bool = False
    prefix_caching: Flag
    late_results: LateResults
    reserve_full_prompt: Flag
    watermark: Fact | None = None
    prefill_tokens: PrefillTokens | None = None
    output_reserve: OutputReserve | None = None
    own_micro_batches: bool = False
    spare_layers: SpareLayers = "before_last"
    layouts: LayoutRules
    lockstep: Lockstep | None = None
    capacity_policy: CapacityPolicy | None = None
    accounting: Accounts
    memory_fraction: Fact | ShareByTp | ReserveRule
    graphs: Graphs
    graph_gib: Fact
    logit_bytes: Fact
    state_dtype: Dtype
    nccl_all_reduce_from_bytes: AllReduceRule | None = None
    overhead_gib: Fact | Transferred
    host: Host | Transferred

    @model_validator(mode="after")
    def _says_how_groups_run(self) -> Version:
        if self.lockstep is None and self.layouts.attention_groups != "one":
            raise ValueError("layouts.attention_groups needs lockstep: how such groups run")
        return self


class EngineFile(_Entry):
    """One engine's file."""

    schema_version: Annotated[int, Field(ge=2, le=2)]
    engine: str
    title: str
    kernel_tables: KernelTables
    versions: dict[str, Version]


def filled_in(document: dict[str, Any]) -> dict[str, Any]:
    """The file with every ``same_as`` replaced by what it stands for.

    A version takes over each field of the version it names that it does not state itself; a field
    stated as ``null`` is absent. A fit is not taken over: the version that inherits it gets a
    transfer instead, about which reports warn.

    Raises
    ------
    ValueError
        If a version is the same as one that does not stand before it.

    """
    done: dict[str, Any] = {}
    for version, entry in document["versions"].items():
        base = entry.get("same_as")
        if base is None:
            done[version] = entry
            continue
        if base not in done:
            raise ValueError(f"{version} is same_as {base}, which no version above it is")
        inherited = {field: _transferred(field, value, base) for field, value in done[base].items()}
        done[version] = {**inherited, **entry}
    return {**document, "versions": done}


def _transferred(field: str, value: Any, version: str) -> Any:
    """What a version that is the same as ``version`` gets of one of its fields."""
    fitted = isinstance(value, dict) and "transferred_from" not in value
    fitted = fitted and (field == "host" or (field == "overhead_gib" and "fit" in value))
    return {"transferred_from": version} if fitted else value


@lru_cache(maxsize=len(ENGINES))
def read_engine_file(name: str) -> EngineFile:
    """Read the file of one of `ENGINES`."""
    shown = f"profiles/engines/{name}.yaml"
    path = Path(str(files("profiles") / "engines" / f"{name}.yaml"))
    try:
        return EngineFile.model_validate(filled_in(read_mapping(path, source=shown)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PlannerError(f"{shown}: {error}") from error
