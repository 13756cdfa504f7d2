"""Pipeline stages: layers dealt out, weights and cache of each, and the time through all."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from planner.io.devices import load_device
from planner.io.engines import load_engine
from planner.io.profiles import load_kernel_table
from simulator.cost import CostCompiler
from simulator.engine_rules import GraphRules, HostConstants
from simulator.memory import MemoryRules, memory_budget, memory_budgets
from simulator.plan import BatchingLimits, Shape
from simulator.stages import SpareLayers, layers_of_stages, stages_of_replica
from simulator.timing import IterationCost, iteration_ps
from simulator.units import GIB
from simulator.weights import stage_weight_bytes_per_rank, weight_bytes_per_rank
from tests.shapes import LLAMA_1B, LLAMA_8B, device

LIMITS = BatchingLimits(64, 2048)
MANY = BatchingLimits(1024, 2048)
RULES = MemoryRules(0.9, 2 * GIB, 0, 16, 10, "fp32")


@pytest.mark.parametrize(
    ("layers", "stages", "spare", "expected"),
    [
        (32, 1, "before_last", (32,)),
        (32, 4, "before_last", (8, 8, 8, 8)),
        # vLLM's own comment: the last stage is spared, and the first where there is room for it.
        (33, 4, "before_last", (8, 8, 9, 8)),
        (34, 4, "before_last", (8, 9, 9, 8)),
        (35, 4, "before_last", (9, 9, 9, 8)),
        (35, 4, "last", (8, 8, 8, 11)),
        (35, 4, "first", (9, 9, 9, 8)),
        (33, 4, "first", (9, 8, 8, 8)),
    ],
)
def test_layers_are_dealt_out_as_the_engine_does(
    layers: int, stages: int, spare: SpareLayers, expected: tuple[int, ...]
) -> None:
    """Where layers do not divide, each engine has its own place for the rest."""
    assert layers_of_stages(layers, Shape(1, pp=stages), spare) == expected


def test_named_layers_win_and_must_be_all() -> None:
    """A shape that names its layers keeps them; a wrong sum or too many stages are refused."""
    assert layers_of_stages(32, Shape(1, pp=2, layers=(20, 12))) == (20, 12)
    with pytest.raises(ValueError, match="layers=20-20 are 40; the model has 32 layers"):
        layers_of_stages(32, Shape(1, pp=2, layers=(20, 20)))
    with pytest.raises(ValueError, match="pp is 33; the model has 32 layers"):
        layers_of_stages(32, Shape(1, pp=33))


def test_each_engine_names_its_rule() -> None:
    """Version 0.6.0 of vLLM left the rest to the last stage, TensorRT-LLM starts at the first."""
    assert load_engine("vllm", "0.6.0").spare_layers == "last"
    assert load_engine("vllm", "0.24.0").spare_layers == "before_last"
    assert load_engine("sglang", "0.5.9").spare_layers == "before_last"
    assert load_engine("trtllm", "1.0.0rc3").spare_layers == "first"


@pytest.mark.parametrize("tp", [1, 4])
def test_stages_hold_the_model_between_them(tp: int) -> None:
    """Untied, the stages' weights are the replica's, but for each stage's rounding."""
    stages = stages_of_replica(LLAMA_8B, Shape(tp, pp=3))
    held = sum(stage_weight_bytes_per_rank(stage, Shape(tp)) for stage in stages)
    assert held == pytest.approx(weight_bytes_per_rank(LLAMA_8B, Shape(tp)), abs=2)


def test_a_tied_embedding_is_held_at_both_ends() -> None:
    """First and last stage each keep the 128,256 x 2,048 matrix of Llama-3.2-1B, in bf16."""
    stages = stages_of_replica(LLAMA_1B, Shape(1, pp=2))
    held = sum(stage_weight_bytes_per_rank(stage, Shape(1)) for stage in stages)
    assert held - weight_bytes_per_rank(LLAMA_1B, Shape(1)) == 128_256 * 2_048 * 2


def test_the_fullest_stage_sets_the_cache() -> None:
    """The last stage has head and sampler, so it has room for fewest pages."""
    budgets = memory_budgets(LLAMA_8B, device(24), Shape(1, pp=2), MANY, RULES)
    first, last = budgets
    assert first.layout.page_bytes == last.layout.page_bytes == 16 * 4096 * 16  # 16 layers
    assert last.num_blocks < first.num_blocks
    assert memory_budget(LLAMA_8B, device(24), Shape(1, pp=2), MANY, RULES) == last


@lru_cache(maxsize=1)
def compiler() -> CostCompiler:
    """Llama-3.1-8B on H100 without host time or graphs."""
    return CostCompiler(
        LLAMA_8B,
        load_device("H100-SXM-80GB"),
        load_kernel_table("H100-SXM-80GB", "vllm", "0.24.0"),
        HostConstants(),
        GraphRules((), full_decode=True),
        max_tokens=2048,
        max_seqs=64,
        max_context=4096,
    )


def through_s(cost: IterationCost, tokens: int, decodes: int, *, prefill: bool) -> float:
    """Seconds that a batch spends on the stages, one after the other, sends aside."""
    sampled = max(decodes, 1)
    return 1e-12 * sum(
        iteration_ps(cost, kind, tokens, decodes, 512 * decodes, 0, sampled, prefill)
        for kind in cost.stages
    )


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("pp", [2, 3, 8])
def test_the_way_through_all_stages_takes_what_one_device_does(tp: int, pp: int) -> None:
    """Layers take the same time wherever they are: only sends come on top."""
    whole = compiler().compile(Shape(tp), LIMITS)
    split = compiler().compile(Shape(tp, pp=pp), LIMITS)
    for tokens, decodes, prefill in ((16, 16, False), (1024, 8, True)):
        one_s = through_s(whole, tokens, decodes, prefill=prefill)
        assert through_s(split, tokens, decodes, prefill=prefill) == pytest.approx(one_s, rel=1e-8)
    assert len(split.stages) == pp
    assert np.all(np.diff(split.send_ps) >= 0)
    assert split.send_ps[1] > 0


def test_stages_alike_share_their_arrays() -> None:
    """Eight even stages are two kinds: the last one has the head."""
    cost = compiler().compile(Shape(1, pp=8), LIMITS)
    assert cost.stages.tolist() == [0] * 7 + [1]
    assert cost.decode_ps.shape[0] == 2
    assert not cost.sampled_ps[0].any()
    assert cost.sampled_ps[1, 1] > 0


def test_provenance_and_labels_count_every_stage() -> None:
    """Time by label is the same for the layers of one device and of a pipeline."""
    whole = compiler().provenance(Shape(1), 16, 16, 512, 512)
    split = compiler().provenance(Shape(1, pp=4), 16, 16, 512, 512)
    assert whole == split
