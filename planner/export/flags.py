"""The engine's own command line for a plan."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.problem import Problem
    from simulator.plan import Plan

_FIRST_PORT = 8000
"""vLLM's own default port (entrypoints/openai/cli_args.py); further replicas count up."""


def launch_commands(problem: Problem, plan: Plan) -> tuple[str, ...]:
    """One ``vllm serve`` command per replica, every flag that the plan fixes spelled out.

    A limit is written even where it equals the engine's default, so that the command means the
    same on an engine whose defaults move.
    """
    model, rules = problem.model, problem.memory_rules
    flags: list[tuple[str, object]] = [
        ("--tensor-parallel-size", plan.tp),
        ("--max-num-seqs", plan.limits.max_num_seqs),
        ("--max-num-batched-tokens", plan.limits.max_num_batched_tokens),
        ("--max-model-len", problem.max_model_len),
        ("--gpu-memory-utilization", rules.memory_fraction),
    ]
    if rules.block_tokens != problem.engine.block_tokens:
        flags.append(("--block-size", rules.block_tokens))
    if problem.num_blocks is not None:
        flags.append(("--num-gpu-blocks-override", problem.num_blocks))
    if plan.tp > problem.devices_per_node:
        flags.append(("--distributed-executor-backend", "ray"))
    if problem.quantized_at_load:
        flags.append(("--quantization", model.weight_dtype))
    if model.kv_dtype != "bf16":
        flags.append(("--kv-cache-dtype", model.kv_dtype))
    words = ["vllm", "serve", model.name, *(str(word) for pair in flags for word in pair)]
    if plan.replicas == 1:
        return (shlex.join(words),)
    if plan.tp > problem.devices_per_node:  # each on a Ray cluster of its own nodes
        return (shlex.join(words),) * plan.replicas
    return tuple(
        f"CUDA_VISIBLE_DEVICES={_devices(problem, plan, replica)} "
        + shlex.join([*words, "--port", str(_FIRST_PORT + replica)])
        for replica in range(plan.replicas)
    )


def _devices(problem: Problem, plan: Plan, replica: int) -> str:
    """Device indices of a replica on its own node."""
    per_node = problem.devices_per_node // plan.tp
    first = (replica % per_node) * plan.tp
    return ",".join(str(first + i) for i in range(plan.tp))
