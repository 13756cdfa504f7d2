"""The engine's own command line for a plan."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Final

from planner.engine_settings import CHUNKING_OFF
from simulator.rules import POLICIES

if TYPE_CHECKING:
    from planner.problem import Problem
    from simulator.plan import Plan

    Flags = list[tuple[str, ...]]

_FIRST_PORT: Final = {"vllm": 8000, "sglang": 30000, "trtllm": 8000}
"""The engines' own default ports (vLLM entrypoints/openai/cli_args.py, SGLang server_args.py,
TensorRT-LLM commands/serve.py); further replicas count up."""

_TRTLLM_OPTIONS: Final = "trtllm-options.yaml"


def launch_commands(problem: Problem, plan: Plan) -> tuple[str, ...]:
    """Commands that start the plan's replicas, every flag that the plan fixes spelled out.

    A limit is written even where it equals the engine's default, so that the command means the
    same on an engine whose defaults move. There is one command per replica; SGLang takes one per
    node where a replica spans several. TensorRT-LLM before 1.0 has no server of its own, so there
    is none.
    """
    engine, first = problem.engine, ""
    if engine.name == "sglang":
        words, options = ["python", "-m", "sglang.launch_server"], _sglang(problem, plan)
    elif engine.name == "trtllm":
        if engine.version.startswith("0."):
            return ()
        words, options = ["trtllm-serve", problem.model.name], _trtllm(problem, plan)
        unflagged = _trtllm_options(problem)
        if unflagged:  # JSON is YAML
            first = f"echo {shlex.quote(json.dumps(unflagged))} > {_TRTLLM_OPTIONS} && "
            options.append(("--extra_llm_api_options", _TRTLLM_OPTIONS))
    else:
        words, options = ["vllm", "serve", problem.model.name], _vllm(problem, plan)
    words += [word for option in options for word in option]
    nodes = -(-plan.shape.tp // problem.devices_per_node)
    if nodes > 1:  # each replica on nodes of its own
        if engine.name != "sglang":
            return (first + shlex.join(words),) * plan.replicas
        return tuple(
            f'{shlex.join(words)} --nnodes {nodes} --node-rank {rank} --dist-init-addr "$HEAD:5000"'
            for _ in range(plan.replicas)
            for rank in range(nodes)
        )
    if plan.replicas == 1:
        return (first + shlex.join(words),)
    return tuple(
        f"{first}CUDA_VISIBLE_DEVICES={_devices(problem, plan, replica)} "
        + shlex.join([*words, "--port", str(_FIRST_PORT[engine.name] + replica)])
        for replica in range(plan.replicas)
    )


def _vllm(problem: Problem, plan: Plan) -> Flags:
    """Flags of ``vllm serve`` (engine/arg_utils.py)."""
    rules, memory = problem.rules, problem.memory_rules
    default = problem.engine.rules(problem.max_model_len)
    flags: Flags = [
        ("--tensor-parallel-size", str(plan.shape.tp)),
        ("--max-num-seqs", str(plan.limits.max_num_seqs)),
        ("--max-num-batched-tokens", str(plan.limits.max_num_batched_tokens)),
        ("--max-model-len", str(problem.max_model_len)),
        ("--gpu-memory-utilization", _fraction(problem, plan)),
    ]
    if memory.block_tokens != problem.engine.block_tokens:
        flags.append(("--block-size", str(memory.block_tokens)))
    if problem.num_blocks is not None:
        flags.append(("--num-gpu-blocks-override", str(problem.num_blocks)))
    if rules.chunked != default.chunked:
        if POLICIES[rules.policy] == "vllm_v0":  # a flag with a value there
            flags.append(("--enable-chunked-prefill", str(rules.chunked)))
        else:
            flags.append((_switch("enable-chunked-prefill", on=rules.chunked),))
    if problem.uses_prefix_cache != default.prefix_caching:
        flags.append((_switch("enable-prefix-caching", on=problem.uses_prefix_cache),))
    if rules.late_results != default.late_results:
        flags.append((_switch("async-scheduling", on=rules.late_results),))
    if plan.shape.tp > problem.devices_per_node:
        flags.append(("--distributed-executor-backend", "ray"))
    return flags + _dtypes(problem, kv_fp8="fp8")


def _sglang(problem: Problem, plan: Plan) -> Flags:
    """Flags of ``sglang.launch_server`` (server_args.py)."""
    rules, memory = problem.rules, problem.memory_rules
    default = problem.engine.rules(problem.max_model_len)
    chunk = plan.limits.max_num_batched_tokens if rules.chunked else CHUNKING_OFF
    flags: Flags = [
        ("--model-path", problem.model.name),
        ("--tp-size", str(plan.shape.tp)),
        ("--max-running-requests", str(plan.limits.max_num_seqs)),
        ("--chunked-prefill-size", str(chunk)),
        ("--context-length", str(problem.max_model_len)),
        ("--mem-fraction-static", _fraction(problem, plan)),
    ]
    if memory.block_tokens != problem.engine.block_tokens:
        flags.append(("--page-size", str(memory.block_tokens)))
    if problem.num_blocks is not None:
        flags.append(("--max-total-tokens", str(problem.num_blocks * memory.block_tokens)))
    if rules.prefill_tokens != default.prefill_tokens:
        flags.append(("--max-prefill-tokens", str(rules.prefill_tokens)))
    if rules.new_token_ratio != default.new_token_ratio:
        factor = rules.new_token_ratio / default.new_token_ratio
        flags.append(("--schedule-conservativeness", f"{factor:.4g}"))
    if rules.mixed:
        flags.append(("--enable-mixed-chunk",))
    if not problem.uses_prefix_cache:
        flags.append(("--disable-radix-cache",))
    if not rules.late_results:
        flags.append(("--disable-overlap-schedule",))
    return flags + _dtypes(problem, kv_fp8="fp8_e4m3")


def _trtllm(problem: Problem, plan: Plan) -> Flags:
    """Flags of ``trtllm-serve`` (commands/serve.py)."""
    return [
        ("--tp_size", str(plan.shape.tp)),
        ("--max_batch_size", str(plan.limits.max_num_seqs)),
        ("--max_num_tokens", str(plan.limits.max_num_batched_tokens)),
        ("--max_seq_len", str(problem.max_model_len)),
        ("--kv_cache_free_gpu_memory_fraction", _fraction(problem, plan)),
    ]


def _trtllm_options(problem: Problem) -> dict[str, object]:
    """Options of ``trtllm-serve`` that have no flag (llmapi/llm_args.py)."""
    rules, memory = problem.rules, problem.memory_rules
    default = problem.engine.rules(problem.max_model_len)
    cache: dict[str, object] = {}
    if memory.block_tokens != problem.engine.block_tokens:
        cache["tokens_per_block"] = memory.block_tokens
    if problem.num_blocks is not None:
        cache["max_tokens"] = problem.num_blocks * memory.block_tokens
    if problem.uses_prefix_cache != default.prefix_caching:
        cache["enable_block_reuse"] = problem.uses_prefix_cache
    if problem.model.kv_dtype != "bf16":
        cache["dtype"] = problem.model.kv_dtype
    options: dict[str, object] = {"kv_cache_config": cache} if cache else {}
    if rules.chunked != default.chunked:
        options["enable_chunked_prefill"] = rules.chunked
    if rules.late_results != default.late_results:
        options["disable_overlap_scheduler"] = not rules.late_results
    if (rules.policy, rules.evict) != (default.policy, default.evict):
        static = POLICIES[rules.policy] == "static"
        policy = "STATIC_BATCH" if static else "MAX_UTILIZATION"
        options["scheduler_config"] = {"capacity_scheduler_policy": policy}
    return options


def _dtypes(problem: Problem, *, kv_fp8: str) -> Flags:
    """Flags of vLLM and SGLang for weights and KV cache that differ from the checkpoint's."""
    model = problem.model
    flags: Flags = []
    if problem.quantized_at_load:
        flags.append(("--quantization", model.weight_dtype))
    if model.kv_dtype != "bf16":
        flags.append(("--kv-cache-dtype", kv_fp8 if model.kv_dtype == "fp8" else model.kv_dtype))
    return flags


def _switch(name: str, *, on: bool) -> str:
    return f"--{name}" if on else f"--no-{name}"


def _fraction(problem: Problem, plan: Plan) -> str:
    """The memory fraction under the plan's limits, also where the engine would derive it."""
    rules = problem.memory_rules
    return str(rules.fraction(problem.model, problem.device, plan.shape.tp, plan.limits))


def _devices(problem: Problem, plan: Plan, replica: int) -> str:
    """Device indices of a replica on its own node."""
    per_node = problem.devices_per_node // plan.shape.tp
    first = (replica % per_node) * plan.shape.tp
    return ",".join(str(first + i) for i in range(plan.shape.tp))
