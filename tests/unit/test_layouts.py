"""Layouts that an engine version cannot launch: which rule refuses each."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from planner.errors import InputError
from planner.io.engines import load_engine
from planner.io.hf_config import read_model
from planner.layouts import (
    ATTENTION_GROUPS,
    DENSE,
    EVEN_EXPERTS,
    EXPERT_GROUPS,
    EXPERTS,
    broken_layout,
    expert_groups_offered,
)
from planner.resolve import resolve
from planner.space import (
    COLLECTIVES,
    QUANT_BLOCKS,
    RULES,
    STAGED_GROUPS,
    broken_rule,
    enumerate_space,
)
from simulator.cost import CostCompiler
from simulator.model import Experts
from simulator.plan import BatchingLimits, Plan, Shape, parse_plan
from tests.problems import pool, scenario

if TYPE_CHECKING:
    from planner.problem import Problem
    from simulator.model import Layer, ModelShape

MODELS = {
    "dense": "Llama-3.1-8B",
    "8": "Mixtral-8x22B-v0.1",
    "60": "Qwen3-30B-A3B",  # 128 experts, cut to 60 below
    "128": "Qwen3-30B-A3B",
    "256": "DeepSeek-V3",
}

OLD_VLLM = {  # 0.6.0: every expert is cut over the replica, attention is never data parallel
    None: "dense:tp1 dense:tp8 8:tp1 8:tp2 8:tp8 60:tp4 128:tp8 256:tp8 256:tp8pp2",
    EXPERTS: "dense:tp8ep8 dense:tp8ep2",
    DENSE: "dense:tp1dp2 dense:tp2dp4",
    EXPERT_GROUPS: "8:tp8ep8 8:tp8ep2 128:tp4ep4 128:tp4ep2 256:tp1dp8ep8 256:tp8ep4",
    ATTENTION_GROUPS: "8:tp1dp2 8:tp2dp2 128:tp1dp4 256:tp1dp8 256:tp4dp2 60:tp1dp2",
}
NEW_VLLM = {  # 0.24.0: all cut or all whole; experts need not divide
    None: (
        "dense:tp4 8:tp8 8:tp8ep8 8:tp2ep2 8:tp1dp2 8:tp1dp2ep2 8:tp4dp2ep8 8:tp4dp2 60:tp8ep8 "
        "60:tp4ep4 128:tp4ep4 128:tp2dp4ep8 256:tp1dp8ep8 256:tp8ep8 256:tp8pp2ep8 256:tp8dp2ep16"
    ),
    EXPERTS: "dense:tp8ep8 dense:tp8ep2 dense:tp1dp2ep2",
    DENSE: "dense:tp1dp2 dense:tp4dp2 dense:tp2dp4",
    EXPERT_GROUPS: (
        "8:tp8ep2 8:tp8ep4 8:tp4ep2 8:tp4dp2ep2 8:tp4dp2ep4 60:tp8ep4 60:tp8ep2 128:tp8ep2 "
        "128:tp8ep4 128:tp2dp4ep4 128:tp2dp4ep2 256:tp8ep4 256:tp8ep2 256:tp1dp8ep4 256:tp1dp8ep2 "
        "256:tp8pp2ep4 256:tp16ep8"
    ),
    EVEN_EXPERTS: "8:tp16ep16 8:tp8dp2ep16",
}
OLD_SGLANG = {  # 0.4.5: --enable-ep-moe sets ep_size to tp_size
    None: "dense:tp8 8:tp8ep8 8:tp4ep4 8:tp2 128:tp8ep8 60:tp4ep4 256:tp1dp8ep8 8:tp1dp2",
    EXPERTS: "dense:tp4ep4 dense:tp4ep2",
    DENSE: "dense:tp1dp2 dense:tp2dp2",
    EXPERT_GROUPS: "8:tp8ep2 8:tp8ep4 128:tp8ep4 256:tp1dp8ep4 256:tp4ep2 60:tp8ep4",
    EVEN_EXPERTS: "60:tp8ep8 60:tp1dp8ep8 8:tp16ep16",
}
NEW_SGLANG = {  # 0.5.10: any divisor
    None: (
        "dense:tp2 8:tp8ep8 8:tp8ep2 8:tp8ep4 8:tp4ep2 8:tp2dp4ep4 60:tp8ep4 60:tp8ep2 60:tp4ep4 "
        "128:tp8ep8 128:tp8ep2 128:tp1dp8ep8 128:tp2dp4ep2 256:tp8ep4 256:tp16ep16 256:tp16ep8 "
        "256:tp1dp16ep16 256:tp8pp2ep8"
    ),
    EXPERTS: "dense:tp8ep8 dense:tp8ep2",
    DENSE: "dense:tp1dp8 dense:tp4dp2",
    EVEN_EXPERTS: "60:tp8ep8 60:tp16ep8 60:tp16ep16 8:tp16ep16 60:tp2dp4ep8 8:tp2dp8ep16",
}
OLD_TRTLLM = {  # 0.14.0: moe_tp * moe_ep = tp
    None: "dense:tp8 8:tp8 8:tp8ep8 8:tp8ep2 8:tp8ep4 8:tp4ep2 60:tp8ep4 128:tp8ep2 8:tp4pp2ep2",
    EXPERTS: "dense:tp8ep8 dense:tp4ep2",
    DENSE: "dense:tp1dp4 dense:tp2dp2",
    ATTENTION_GROUPS: "8:tp1dp8 8:tp1dp8ep8 8:tp2dp2 128:tp1dp4 128:tp4dp2ep8 256:tp1dp8ep8",
    EVEN_EXPERTS: "60:tp8ep8 8:tp16ep16 60:tp16ep8",
}
NEW_TRTLLM = {  # 1.2.0rc6.post2: attention data parallel over the whole stage or not at all
    None: (
        "dense:tp4 8:tp8ep8 8:tp8ep2 8:tp1dp8 8:tp1dp8ep4 128:tp8ep4 128:tp1dp8ep8 128:tp1dp4ep2 "
        "256:tp8 256:tp8ep8 256:tp1dp8ep8 256:tp1dp4ep4 60:tp1dp4ep4 60:tp8ep4"
    ),
    EXPERTS: "dense:tp8ep8 dense:tp8ep2 dense:tp1dp8ep8",
    DENSE: "dense:tp1dp8 dense:tp2dp4",
    ATTENTION_GROUPS: (
        "8:tp4dp2 8:tp2dp4ep8 128:tp2dp4 128:tp4dp2ep8 256:tp2dp4ep8 256:tp4dp2 256:tp2dp2ep4 "
        "60:tp2dp2"
    ),
    EVEN_EXPERTS: "60:tp8ep8 60:tp1dp8ep8 8:tp16ep16 8:tp1dp16ep16 60:tp16ep16",
}
TABLE = [
    (engine, version, rule, *case.split(":"))
    for engine, version, rules in (
        ("vllm", "0.6.0", OLD_VLLM),
        ("vllm", "0.24.0", NEW_VLLM),
        ("sglang", "0.4.5", OLD_SGLANG),
        ("sglang", "0.5.10", NEW_SGLANG),
        ("trtllm", "0.14.0", OLD_TRTLLM),
        ("trtllm", "1.2.0rc6.post2", NEW_TRTLLM),
    )
    for rule, cases in rules.items()
    for case in cases.split()
]


def model_of(experts: str) -> ModelShape:
    """A model with so many experts in each of its mixtures, or dense."""
    model = read_model(MODELS[experts])
    if experts == "dense":
        return model

    def cut(layer: Layer) -> Layer:
        ffn = layer.ffn
        if not isinstance(ffn, Experts):
            return layer
        return replace(layer, ffn=replace(ffn, num_experts=int(experts)))

    return replace(model, layers=tuple(map(cut, model.layers)))


def shape_of(text: str) -> Shape:
    """Shape from its text."""
    return parse_plan(text, BatchingLimits(8, 64)).shape


def test_enough_combinations() -> None:
    """At least forty of each engine, and each rule refuses some."""
    for engine in ("vllm", "sglang", "trtllm"):
        assert sum(row[0] == engine for row in TABLE) >= 40
    assert {row[2] for row in TABLE} > {EXPERTS, DENSE, EXPERT_GROUPS, ATTENTION_GROUPS}


@pytest.mark.parametrize(("engine", "version", "rule", "experts", "text"), TABLE)
def test_rule_of_each_layout(
    engine: str, version: str, rule: str | None, experts: str, text: str
) -> None:
    """The first rule that refuses a layout, or none."""
    layouts = load_engine(engine, version).layouts
    assert broken_layout(layouts, model_of(experts), shape_of(text)) == rule


@pytest.mark.parametrize(
    ("engine", "version", "experts", "groups"),
    [
        ("vllm", "0.24.0", "8", (1, 8)),
        ("vllm", "0.6.0", "8", (1,)),
        ("sglang", "0.5.10", "128", (1, 8)),
        ("trtllm", "0.14.0", "8", (1, 8)),
        ("vllm", "0.24.0", "dense", (1,)),
    ],
)
def test_expert_groups_tried_by_default(
    engine: str, version: str, experts: str, groups: tuple[int, ...]
) -> None:
    """All devices as one group, and each as its own where the engine does that."""
    layouts = load_engine(engine, version).layouts
    assert expert_groups_offered(layouts, model_of(experts), 8) == groups
    assert expert_groups_offered(layouts, model_of(experts), 1) == (1,)


def mixture(**space: object) -> Problem:
    """A problem with a mixture of experts on four devices."""
    return resolve(
        scenario(
            model={"config": "Qwen/Qwen3-30B-A3B", "max_model_len": 1024},
            cluster=pool(4),
            search={"space": {"max_num_seqs": [8], "max_num_batched_tokens": [64], **space}},
        )
    )


def test_search_tries_experts_cut_and_spread() -> None:
    """By default each width comes with its experts cut, and spread where there are devices."""
    problem = mixture(tp=[1, 2, 4], pp=[1])
    assert [s.text for s in problem.space.shapes] == ["tp1", "tp2", "tp2ep2", "tp4", "tp4ep4"]
    texts = {plan.shape.text for plan in enumerate_space(problem).plans}
    assert texts == {"tp1", "tp2", "tp2ep2", "tp4", "tp4ep4"}


def test_search_counts_what_it_cannot_launch_or_simulate() -> None:
    """Partial expert groups break a rule of vLLM; attention groups run, but not in stages."""
    space = enumerate_space(mixture(tp=[4], pp=[1], ep=[2, 4], replicas=[1]))
    assert space.excluded == {EXPERT_GROUPS: 1}
    space = enumerate_space(mixture(tp=[1, 2], dp=[2], pp=[1, 2], ep=[1, 2], replicas=[1]))
    assert {plan.shape.text for plan in space.plans} == {"tp1dp2", "tp1dp2ep2", "tp2dp2"}
    assert space.excluded == {EXPERT_GROUPS: 1, STAGED_GROUPS: 2}
    assert {EXPERT_GROUPS, STAGED_GROUPS} < set(RULES)


def test_attention_groups_need_times_of_what_they_exchange() -> None:
    """A table without gathers and scatters runs one group only."""
    problem = mixture(tp=[1], dp=[1, 2], pp=[1], ep=[1], replicas=[1])
    kernels = problem.pool.compiler._kernels
    table = replace(kernels.table, nccl={k: v for k, v in kernels.table.nccl.items() if k[1] > 8})
    compiler = CostCompiler(
        problem.model,
        problem.pool.device,
        table,
        kernels.host,
        kernels.graphs,
        lockstep=problem.lockstep,
        max_tokens=64,
        max_seqs=8,
        max_context=64,
    )
    pools = {"": replace(problem.pool, compiler=compiler)}
    space = enumerate_space(replace(problem, pools=pools))
    assert [plan.shape.text for plan in space.plans] == ["tp1"]
    assert space.excluded == {COLLECTIVES: 1}


def test_ep_that_divides_nothing_is_an_input_error() -> None:
    """The scenario asked for groups that no stage can be put into."""
    with pytest.raises(InputError, match=r"search\.space\.ep"):
        mixture(tp=[2, 4], pp=[1], ep=[3])


def test_whole_experts_need_no_width_that_divides() -> None:
    """Blocks of 128 forbid cutting experts of width 768 four ways; whole ones may be spread."""
    problem = mixture(tp=[4], pp=[1])

    def in_blocks(layer: Layer) -> Layer:
        assert isinstance(layer.ffn, Experts)
        return replace(layer, ffn=replace(layer.ffn, dtype="fp8_block"))

    layers = tuple(map(in_blocks, problem.model.layers))
    problem = replace(problem, model=replace(problem.model, layers=layers))
    plans = [Plan(1, shape, BatchingLimits(8, 64)) for shape in (Shape(4), Shape(4, ep=4))]
    assert [broken_rule(problem, plan) for plan in plans] == [QUANT_BLOCKS, None]


def test_limits_of_one_attention_group() -> None:
    """SGLang deals its limits out to the groups, vLLM and TensorRT-LLM start each with them."""
    whole = BatchingLimits(100, 4096)
    for engine, version, chunked, own in (
        ("sglang", "0.5.9", True, BatchingLimits(25, 1024)),
        ("sglang", "0.5.9", False, BatchingLimits(25, 4096)),
        ("vllm", "0.24.0", True, whole),
        ("trtllm", "1.0.0rc3", True, whole),
    ):
        rules = load_engine(engine, version).lockstep(chunked=chunked)
        assert rules is not None
        assert rules.limits_of(whole, 4) == own
    assert load_engine("vllm", "0.6.0").lockstep() is None
