"""The settings of an engine that a scenario may fix, under each engine's own names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

OWN_NAMES: Final[Mapping[str, Mapping[str, str]]] = {
    "vllm": {
        "max_num_seqs": "max_num_seqs",
        "max_num_batched_tokens": "max_num_batched_tokens",
        "memory_fraction": "gpu_memory_utilization",
        "block_tokens": "block_size",
        "chunked": "enable_chunked_prefill",
        "prefix_caching": "enable_prefix_caching",
    },
    "sglang": {
        "max_num_seqs": "max_running_requests",
        "max_num_batched_tokens": "chunked_prefill_size",
        "memory_fraction": "mem_fraction_static",
        "block_tokens": "page_size",
        "prefix_caching": "disable_radix_cache",
        "prefill_tokens": "max_prefill_tokens",
        "mixed": "enable_mixed_chunk",
        "conservativeness": "schedule_conservativeness",
    },
    "trtllm": {
        "max_num_seqs": "max_batch_size",
        "max_num_batched_tokens": "max_num_tokens",
        "memory_fraction": "kv_cache_free_gpu_memory_fraction",
        "block_tokens": "tokens_per_block",
        "chunked": "enable_chunked_context",
        "prefix_caching": "enable_block_reuse",
        "capacity_policy": "capacity_scheduler_policy",
        "balance": "attention_dp_config",
    },
}
"""By engine, its own name of each field of `EngineSettings`.

vLLM engine/arg_utils.py, SGLang server_args.py, TensorRT-LLM llmapi/llm_args.py. The memory
fractions are different quantities, see `simulator.memory.Accounting`."""

CHUNKING_OFF: Final = -1
"""``chunked_prefill_size`` by which SGLang switches chunking off (server_args.py)."""


@dataclass(frozen=True)
class EngineSettings:
    """Settings that a scenario fixes; ``None`` leaves the engine's default.

    Parameters
    ----------
    max_num_seqs, max_num_batched_tokens
        Batching limits, see `simulator.plan.BatchingLimits`.
    memory_fraction
        The engine's memory fraction.
    block_tokens
        Tokens of a KV block.
    chunked, mixed, prefix_caching
        Whether prompts are cut into chunks, whether chunks and decodes share a batch, whether
        blocks of freed sequences are used again.
    prefill_tokens
        Most prompt tokens of one prefill batch (SGLang).
    conservativeness
        Factor on the output that admission reserves (SGLang).
    capacity_policy
        ``guaranteed_no_evict``, ``max_utilization`` or ``static_batch`` (TensorRT-LLM).
    balance
        For how many iterations attention groups wait for a prompt in each of them, and for more
        (TensorRT-LLM).
    async_scheduling
        Whether a batch is formed while its predecessor runs.

    """

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    memory_fraction: float | None = None
    block_tokens: int | None = None
    chunked: bool | None = None
    mixed: bool | None = None
    prefix_caching: bool | None = None
    prefill_tokens: int | None = None
    conservativeness: float | None = None
    capacity_policy: str | None = None
    balance: tuple[int, int] | None = None
    async_scheduling: bool | None = None


def owners(own_name: str) -> tuple[str, ...]:
    """Engines that have a setting of this name."""
    return tuple(engine for engine, names in OWN_NAMES.items() if own_name in names.values())


def counterpart(own_name: str, engine: str) -> str | None:
    """What ``engine`` calls the setting that another engine calls ``own_name``, if it has it."""
    for names in OWN_NAMES.values():
        for field, name in names.items():
            if name == own_name:
                return OWN_NAMES[engine].get(field)
    return None
