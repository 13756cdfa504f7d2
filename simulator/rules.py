"""How an engine version forms batches: the policy and its settings, as plain numbers."""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

VLLM_V1, VLLM_V0, SGLANG, TRTLLM, SARATHI, STATIC = range(6)
POLICIES = ("vllm_v1", "vllm_v0", "sglang", "trtllm", "sarathi", "static")
"""Names of the policies, by their number."""

ROUND_ROBIN, LEAST_LOADED, SHORTEST_QUEUE, PREFIX_AWARE = range(4)
ROUTERS = ("round_robin", "least_loaded", "shortest_queue", "prefix_aware")
"""Names of the routers, by their number."""


class Rules(NamedTuple):
    """What one engine version does whatever the plan; a policy reads only what concerns it.

    Attributes
    ----------
    policy
        Number of the policy.
    chunked
        Whether a prompt may be cut into chunks.
    chunk_unit
        A truncated chunk is rounded down to a multiple of so many tokens (TensorRT-LLM: block;
        SGLang: page).
    prefill_tokens
        Most prompt tokens of one prefill batch beside the token budget, 0 for none (SGLang's
        ``max_prefill_tokens``).
    mixed
        Whether prompt chunks and decodes share a batch (SGLang: ``enable_mixed_chunk``).
    reserve_full_prompt
        Whether a request is admitted only if all its known tokens fit, not just its first chunk.
    watermark
        Share of the KV blocks that admission leaves free.
    evict
        Whether running requests can be evicted; if not, admission reserves the whole output.
    new_token_ratio, least_new_token_ratio, ratio_decay
        Share of the outstanding output that admission reserves for running requests: at the
        start, at least, and lost per decode step; a retraction sets its own estimate (SGLang).
    reserved_output_tokens
        Most output tokens that admission reserves for one request (SGLang).
    late_results
        Whether the next batch is formed while its predecessor runs (overlap scheduling): it sees
        no arrival, no seat and no block that appeared after its predecessor was started.
    prompts_per_step
        Most requests admitted to one batch, 0 for any number.
    prefix_caching
        Whether full blocks of freed sequences stay usable until they are allocated again.
    batches_in_flight
        Batches that the scheduler keeps in the pipeline; 1 without pipeline stages.
    own_micro_batches
        Whether each batch in flight has running requests of its own (SGLang) or any batch takes
        any request that is not in flight.
    router
        Number of the router between replicas.

    """

    policy: int = VLLM_V1
    chunked: bool = True
    chunk_unit: int = 1
    prefill_tokens: int = 0
    mixed: bool = True
    reserve_full_prompt: bool = False
    watermark: float = 0.0
    evict: bool = True
    new_token_ratio: float = 0.0
    least_new_token_ratio: float = 0.0
    ratio_decay: float = 0.0
    reserved_output_tokens: int = 0
    late_results: bool = False
    prompts_per_step: int = 0
    prefix_caching: bool = False
    batches_in_flight: int = 1
    own_micro_batches: bool = False
    router: int = ROUND_ROBIN


# A class for each policy, so that the loops are compiled for one policy at a time: compiling takes
# a few seconds for each. The names must stand in the module for the compiled code to be kept.
VllmV1Rules = namedtuple("VllmV1Rules", Rules._fields)  # type: ignore[misc]  # noqa: PYI024
VllmV0Rules = namedtuple("VllmV0Rules", Rules._fields)  # type: ignore[misc]  # noqa: PYI024
SglangRules = namedtuple("SglangRules", Rules._fields)  # type: ignore[misc]  # noqa: PYI024
TrtllmRules = namedtuple("TrtllmRules", Rules._fields)  # type: ignore[misc]  # noqa: PYI024
SarathiRules = namedtuple("SarathiRules", Rules._fields)  # type: ignore[misc]  # noqa: PYI024
StaticRules = namedtuple("StaticRules", Rules._fields)  # type: ignore[misc]  # noqa: PYI024

RULES_CLASSES: tuple[Any, ...] = (
    VllmV1Rules,
    VllmV0Rules,
    SglangRules,
    TrtllmRules,
    SarathiRules,
    StaticRules,
)
"""The class of each policy's rules, by its number."""


def of_policy(rules: Rules) -> Rules:
    """The same rules as their policy's own class, which is what the compiled loops take."""
    typed: Rules = RULES_CLASSES[rules.policy](*rules)
    return typed
