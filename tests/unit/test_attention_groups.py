"""Attention data parallel in costs, memory, rules and launch commands."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from planner.engine_settings import EngineSettings
from planner.export.flags import launch_commands, server_of
from planner.io.devices import load_device
from planner.io.engines import load_engine
from planner.io.hf_config import read_model
from planner.operators import operator_times_ms
from planner.resolve import resolve
from simulator.lockstep_cost import BATCH_COLUMNS, lockstep_ps
from simulator.memory import memory_budget
from simulator.plan import BatchingLimits, Plan, Shape
from simulator.rules import ROUTERS
from simulator.timing import iteration_ps
from simulator.units import GIB, MIB
from simulator.weights import layer_weights, weight_bytes_per_rank
from tests.problems import pool, scenario

if TYPE_CHECKING:
    from collections.abc import Mapping

    from planner.problem import Problem

MLA = "deepseek-ai/DeepSeek-V3"
GQA = "Qwen/Qwen3-30B-A3B"
LIMITS = BatchingLimits(1024, 2048)
TENSOR, GROUPS = Shape(8), Shape(1, dp=8, ep=8)


def served(
    model: str,
    engine: Mapping[str, object] | None = None,
    devices: int = 8,
    device: str = "H200-SXM-141GB",
) -> Problem:
    """A problem on one node, of H200 by default."""
    space = {"tp": [1], "pp": [1], "max_num_seqs": [1024], "max_num_batched_tokens": [2048]}
    return resolve(
        scenario(
            model={"config": model, "max_model_len": 32768},
            cluster=pool(devices, device=device),
            engine=dict(engine) if engine else {"name": "vllm", "version": "0.24.0"},
            search={"space": space},
        )
    )


@pytest.fixture(scope="module")
def latent() -> Problem:
    """DeepSeek-V3 on 8 H200."""
    return served(MLA)


def test_latent_cache_is_held_once_by_groups_and_by_every_tensor_rank(latent: Problem) -> None:
    """Groups pay for their own attention weights, and hold sequences of their own for it."""
    model = latent.model
    layer = model.layers[-1]
    tensor, groups = (
        {w.name: w.elements for w in layer_weights(model, layer, shape)}
        for shape in (Shape(8, ep=8), GROUPS)
    )
    assert groups["experts"] == tensor["experts"]
    assert groups["output"] == 8 * tensor["output"]
    assert weight_bytes_per_rank(model, GROUPS) > weight_bytes_per_rank(model, TENSOR)
    layouts = [latent.layout(shape) for shape in (TENSOR, GROUPS)]
    assert layouts[0] == layouts[1]  # a latent cache is not cut over tp
    held = [
        shape.dp * latent.tokens_held(shape, latent.blocks(shape, LIMITS))
        for shape in (TENSOR, GROUPS)
    ]
    assert held[1] > 3 * held[0]


@pytest.mark.parametrize(("fraction", "kv_gib"), [(0.9, 48.66), (0.95, 55.65)])
def test_memory_of_eight_groups_in_a_public_log(fraction: float, kv_gib: float) -> None:
    """vllm-project/recipes pull 12: Qwen3-Coder-480B-FP8, data parallel 8 and expert parallel.

    vLLM 0.10.1.dev on H20; the two figures, 5 % of the device apart, say that it has 139.8 GiB.
    """
    engine = load_engine("vllm", "0.10.2")
    device = replace(load_device("H200-SXM-141GB"), memory_bytes=int(139.8 * GIB))
    rules = engine.memory_rules(device, EngineSettings(memory_fraction=fraction))
    model = read_model("Qwen/Qwen3-Coder-480B-A35B-Instruct", weight_dtype="fp8_block")
    budget = memory_budget(model, device, GROUPS, engine.default_limits(device), rules)
    available_gib = (budget.usable_bytes - budget.fixed_bytes) / GIB
    assert available_gib == pytest.approx(kv_gib, rel=0.02)


@pytest.mark.parametrize(("version", "kept_mib"), [("0.5.1.post1", 4096), ("0.5.9", 512 * 8 * 4.5)])
def test_sglang_keeps_more_for_groups(version: str, kept_mib: float) -> None:
    """0.5.1: 4 GiB; from 0.5.5: 4.5 MiB per group and sequence of a decode graph of 512."""
    device = load_device("B200-SXM-180GB")
    rules = load_engine("sglang", version).memory_rules(device)
    limits = BatchingLimits(512, 16384)
    model = read_model(MLA)
    alone = rules.fraction(model, device, 8, limits)
    groups = rules.fraction(model, device, 1, limits, groups=8)
    assert alone - groups == pytest.approx(kept_mib * MIB / device.memory_bytes, abs=0.001)


def test_limits_and_reserve_of_a_group_in_sglang() -> None:
    """Both limits are dealt out; 0.3 of the usual share of outputs is reserved."""
    problem = served(GQA, {"name": "sglang", "version": "0.5.9"})
    plan = Plan(1, GROUPS, BatchingLimits(512, 4096))
    own = problem.replica_limits(plan)
    assert (own.max_num_seqs, own.max_num_batched_tokens) == (64, 512)
    rules, groups = problem.rules_of(Shape(8)), problem.rules_of(GROUPS)
    assert groups.new_token_ratio == pytest.approx(0.3 * rules.new_token_ratio)
    assert groups.ratio_decay == pytest.approx(0.3 * rules.ratio_decay)
    assert problem.compile(GROUPS, plan.limits).max_tokens == 512


@pytest.mark.parametrize(
    ("engine", "version", "router"),
    [
        ("vllm", "0.24.0", "shortest_queue"),
        ("sglang", "0.5.9", "round_robin"),
        ("trtllm", "1.2.0rc6.post2", "least_loaded"),
    ],
)
def test_who_deals_requests_out(engine: str, version: str, router: str) -> None:
    """The engine to the groups of one replica, the cluster's router to those of several."""
    problem = served(GQA, {"name": engine, "version": version})
    routers = [
        ROUTERS[problem.start(Plan(replicas, shape, LIMITS)).rules.router]
        for replicas, shape in ((1, GROUPS), (2, Shape(1, dp=4, ep=4)), (1, Shape(8)))
    ]
    assert routers == [router, "round_robin", "round_robin"]


def test_balance_of_trtllm_is_launched_as_it_is_simulated() -> None:
    """``attention_dp_config`` reaches the loop and the options file; without it neither."""
    config = {"enable_balance": True, "timeout_iters": 60, "batching_wait_iters": 3}
    engine = {"name": "trtllm", "version": "1.2.0rc6.post2"}
    problem = served(GQA, {**engine, "attention_dp_config": config})
    plan = Plan(1, GROUPS, LIMITS)
    joined = problem.pool.compiler.compile_lockstep(GROUPS, LIMITS)
    assert joined is not None
    assert (joined.hold_iterations, joined.gather_iterations) == (60, 3)
    options = server_of(problem, plan).options
    assert (options["enable_attention_dp"], options["attention_dp_config"]) == (True, config)
    assert "attention_dp_config" not in server_of(served(GQA, engine), plan).options
    off = served(GQA, {**engine, "attention_dp_config": {"enable_balance": False}})
    assert off.lockstep == served(GQA, engine).lockstep


def test_flags_of_groups() -> None:
    """Each engine's own flags for eight attention groups with whole experts."""
    plan = Plan(1, GROUPS, LIMITS)
    (vllm,) = launch_commands(served(GQA), plan)
    assert "--tensor-parallel-size 1 --data-parallel-size 8 --enable-expert-parallel" in vllm
    (sglang,) = launch_commands(served(GQA, {"name": "sglang", "version": "0.5.9"}), plan)
    assert "--tp-size 8 --dp-size 8 --enable-dp-attention --ep-size 8" in sglang
    assert "--max-running-requests 1024 --chunked-prefill-size 2048" in sglang


def test_operators_of_groups_are_those_of_their_iterations() -> None:
    """A group's mean iteration has its own work and the experts at the tokens of all groups."""
    problem = served(GQA, devices=4)
    plan = Plan(1, Shape(1, dp=4, ep=4), LIMITS)
    result = problem.start(plan).finish()
    times_ms = operator_times_ms(problem, plan, result)
    assert times_ms.keys() >= {"experts", "all-gather tokens", "gemm qkv", "decode attention"}
    assert "all-reduce" not in times_ms
    mean_ms = 1e3 * result.makespan_s * plan.shape.dp / result.iterations
    assert sum(times_ms.values()) < 1.5 * mean_ms


def test_least_cost_is_below_what_groups_come_to(latent: Problem) -> None:
    """Of random iterations of DeepSeek-V3's groups none is faster than a group's least cost."""
    rng = np.random.default_rng(0)
    cost = latent.compile(GROUPS, LIMITS)
    joined = latent.pool.compiler.compile_lockstep(GROUPS, LIMITS)
    assert joined is not None
    for _ in range(300):
        batches = np.zeros((8, BATCH_COLUMNS), np.int64)
        for row in batches:
            decodes = int(rng.integers(0, rng.choice([2, 40, 600])))
            prompt = int(rng.integers(0, 600)) if rng.random() < 0.2 else 0
            context = int(decodes * rng.integers(1, 9000))
            sampled = decodes + (prompt > 0)
            row[:] = decodes + prompt, decodes, context, sampled, prompt * 10**6, prompt > 0
        whole_ps = lockstep_ps(cost, joined, batches)
        for tokens, decodes, context, sampled, prefill_ps, prompts in batches.tolist():
            own = tokens, decodes, context, prefill_ps, sampled, bool(prompts)
            assert tokens == 0 or iteration_ps(cost, 0, *own) <= whole_ps
