"""The engine's own command line for a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from planner.engine_settings import CHUNKING_OFF
from planner.errors import RefusalError
from planner.export.server import FIRST_PORT, OPTIONS_FILE, RENDEZVOUS_PORT, Server
from planner.layouts import broken_layout
from simulator.rules import POLICIES

if TYPE_CHECKING:
    from planner.export.server import Flags
    from planner.problem import Problem
    from simulator.plan import Plan

_UNEVEN_STAGES: Final = {
    "vllm": "VLLM_PP_LAYER_PARTITION",
    "sglang": "SGLANG_PP_LAYER_PARTITION",
}
"""Variable that names the layers of each stage (vLLM envs.py, SGLang distributed/utils.py)."""


def launch_commands(problem: Problem, plan: Plan) -> tuple[str, ...]:
    """Commands that start the plan's replicas, every flag that the plan fixes spelled out.

    A limit is written even where it equals the engine's default, so that the command means the
    same on an engine whose defaults move. There is one command per replica; SGLang takes one per
    node where a replica spans several. TensorRT-LLM before 1.0 has no server of its own, so there
    is none.

    Raises
    ------
    RefusalError
        When no flags of the engine describe the plan.

    """
    if not has_server(problem):
        return ()
    server = server_of(problem, plan)
    if server.nodes > 1:  # each replica on nodes of its own
        if server.engine != "sglang":
            return (server.shell(),) * plan.replicas
        return tuple(
            f"{server.shell()} --nnodes {server.nodes} --node-rank {rank} "
            f'--dist-init-addr "$HEAD:{RENDEZVOUS_PORT}"'
            for _ in range(plan.replicas)
            for rank in range(server.nodes)
        )
    if plan.replicas == 1:
        return (server.shell(),)
    return tuple(
        server.shell(
            "--port",
            str(FIRST_PORT[server.engine] + replica),
            environment={"CUDA_VISIBLE_DEVICES": ",".join(devices_of(problem, plan, replica))},
        )
        for replica in range(plan.replicas)
    )


def has_server(problem: Problem) -> bool:
    """Whether the engine version comes with a server: TensorRT-LLM does from 1.0."""
    return problem.engine.name != "trtllm" or not problem.engine.version.startswith("0.")


def server_of(problem: Problem, plan: Plan) -> Server:
    """How to start one replica of ``plan``.

    Raises
    ------
    RefusalError
        When no flags of the engine describe the plan.

    """
    rule = broken_layout(problem.engine.layouts, problem.model, plan.shape)
    if rule is not None:  # then no flags describe it either
        mark = " is theoretical" if problem.space.theoretical else ""
        raise RefusalError(f"plan {problem.plan_text(plan)}{mark}: {rule}")
    name, model = problem.engine.name, problem.model.name
    options: dict[str, object] = {}
    program: tuple[str, ...]
    if name == "sglang":
        program, flags = ("python", "-m", "sglang.launch_server"), _sglang(problem, plan)
    elif name == "trtllm":
        program, flags = ("trtllm-serve", model), _trtllm(problem, plan)
        options = _trtllm_options(problem, plan)
        if options:
            flags.append(("--extra_llm_api_options", OPTIONS_FILE))
    else:
        program, flags = ("vllm", "serve", model), _vllm(problem, plan)
    layers, variable = plan.shape.layers, _UNEVEN_STAGES.get(name)
    nodes = -(-plan.shape.devices // problem.pool_of(plan.shape).devices_per_node)
    return Server(
        engine=name,
        version=problem.engine.version,
        model=model,
        program=program,
        flags=tuple(flags),
        environment={variable: ",".join(map(str, layers))} if layers and variable else {},
        options=options,
        nodes=nodes,
        devices_per_node=-(-plan.shape.devices // nodes),
    )


def devices_of(problem: Problem, plan: Plan, replica: int) -> list[str]:
    """Indices of the devices of a replica that shares its node with others."""
    width = plan.shape.devices
    first = (replica % (problem.pool_of(plan.shape).devices_per_node // width)) * width
    return [str(first + i) for i in range(width)]


def _vllm(problem: Problem, plan: Plan) -> Flags:
    """Flags of ``vllm serve`` (engine/arg_utils.py)."""
    rules, memory = problem.rules, problem.pool_of(plan.shape).memory_rules
    default = problem.engine.rules(problem.max_model_len)
    shape = plan.shape
    flags: Flags = [("--tensor-parallel-size", str(shape.tp))]
    if shape.pp > 1:
        flags.append(("--pipeline-parallel-size", str(shape.pp)))
    if shape.dp > 1:
        flags.append(("--data-parallel-size", str(shape.dp)))
    if shape.ep > 1:
        flags.append(("--enable-expert-parallel",))
    flags += [
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
    if shape.devices > problem.pool_of(shape).devices_per_node:  # Ray starts the other nodes
        flags.append(
            ("--data-parallel-backend", "ray")
            if shape.dp > 1
            else ("--distributed-executor-backend", "ray")
        )
    return flags + _dtypes(problem, kv_fp8="fp8")


def _sglang(problem: Problem, plan: Plan) -> Flags:
    """Flags of ``sglang.launch_server`` (server_args.py)."""
    rules, memory = problem.rules, problem.pool_of(plan.shape).memory_rules
    default = problem.engine.rules(problem.max_model_len)
    chunk = plan.limits.max_num_batched_tokens if rules.chunked else CHUNKING_OFF
    shape = plan.shape
    flags: Flags = [
        ("--model-path", problem.model.name),
        ("--tp-size", str(shape.width)),  # attention's tensor times its data parallel
    ]
    if shape.pp > 1:
        flags.append(("--pp-size", str(shape.pp)))
    if shape.dp > 1:
        flags += [("--dp-size", str(shape.dp)), ("--enable-dp-attention",)]
    if shape.ep > 1:  # before 0.5.1 a switch that spreads experts over the whole stage
        part = problem.engine.layouts.expert_groups == "any"
        flags.append(("--ep-size", str(shape.ep)) if part else ("--enable-ep-moe",))
    flags += [
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
    shape = plan.shape
    flags: Flags = [("--tp_size", str(shape.width))]  # attention's tensor times its data parallel
    if shape.pp > 1:
        flags.append(("--pp_size", str(shape.pp)))
    if shape.ep > 1:
        flags.append(("--ep_size", str(shape.ep)))
    flags += [
        ("--max_batch_size", str(plan.limits.max_num_seqs)),
        ("--max_num_tokens", str(plan.limits.max_num_batched_tokens)),
        ("--max_seq_len", str(problem.max_model_len)),
        ("--kv_cache_free_gpu_memory_fraction", _fraction(problem, plan)),
    ]
    return flags


def _trtllm_options(problem: Problem, plan: Plan) -> dict[str, object]:
    """Options of ``trtllm-serve`` that have no flag (llmapi/llm_args.py)."""
    rules, memory = problem.rules, problem.pool_of(plan.shape).memory_rules
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
    if plan.shape.dp > 1:
        options["enable_attention_dp"] = True
        if problem.lockstep is not None and problem.lockstep.hold_iterations:
            options["attention_dp_config"] = {
                "enable_balance": True,
                "timeout_iters": problem.lockstep.hold_iterations,
                "batching_wait_iters": problem.lockstep.gather_iterations,
            }
    if plan.shape.layers:
        options["pp_partition"] = list(plan.shape.layers)
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
    rules, shape = problem.pool_of(plan.shape).memory_rules, plan.shape
    where = problem.model, problem.pool_of(shape).device, shape.tp, plan.limits
    return str(rules.fraction(*where, groups=shape.dp))
