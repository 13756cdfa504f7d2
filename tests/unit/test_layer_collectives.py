"""Shapes in layers: what experts weigh, what joins attention groups, where layouts cross."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from planner.io.devices import kernel_table_for, load_device
from planner.io.hf_config import read_model
from simulator.cost import CostCompiler
from simulator.engine_rules import GraphRules, HostConstants
from simulator.layer_collectives import all_reduces, collective_parts
from simulator.model import Experts, Layer
from simulator.parts import Axis, Sizes, layer_parts
from simulator.plan import BatchingLimits, Shape
from simulator.weights import layer_weights, weight_bytes_per_rank

MODEL = read_model("Qwen/Qwen3-30B-A3B")
LAYER = MODEL.layers[0]
DEVICE = load_device("H100-SXM-80GB")
TABLE = kernel_table_for("H100-SXM-80GB", "vllm", "0.24.0")
SIZES = Sizes(np.arange(513), np.arange(1, 3), np.array([1, 1024]), np.arange(9))


def collectives_s(shape: Shape) -> dict[str, np.ndarray]:
    """Seconds of each collective of one layer, by tokens."""
    parts = collective_parts(MODEL, DEVICE, TABLE, LAYER, shape, SIZES, None, {})
    return {part.name: part.time_s for part in parts}


def experts_s(shape: Shape, *, tokens: int, layer: Layer = LAYER) -> float:
    """Seconds of the routed experts of one layer at so many tokens of all attention groups."""
    parts = layer_parts(MODEL, DEVICE, TABLE, Layer(None, layer.ffn, 0), shape, SIZES)
    return next(float(part.time_s[tokens]) for part in parts if part.name == "experts")


def test_experts_weigh_the_same_cut_or_spread() -> None:
    """Four ranks hold a quarter of the experts' elements in either layout, and all of a router."""
    weights = [
        {w.name: w.elements for w in layer_weights(MODEL, LAYER, shape)}
        for shape in (Shape(1), Shape(4), Shape(4, ep=4), Shape(4, ep=2), Shape(1, dp=4, ep=4))
    ]
    whole, *others = weights
    for other in others:
        assert other["experts"] == whole["experts"] // 4
        assert other["router"] == whole["router"]
    assert others[0]["qkv"] < whole["qkv"]
    assert others[3]["qkv"] == whole["qkv"]  # every attention group holds its own


def test_uneven_experts_count_for_the_fullest_rank() -> None:
    """Of 128 experts over 12 ranks the fullest one holds 11."""
    sizes = {w.name: w.elements for w in layer_weights(MODEL, LAYER, Shape(12, ep=12))}
    whole = {w.name: w.elements for w in layer_weights(MODEL, LAYER)}
    assert sizes["experts"] == whole["experts"] // 128 * 11
    assert weight_bytes_per_rank(MODEL, Shape(4, ep=4)) == weight_bytes_per_rank(MODEL, Shape(4))


def test_one_attention_group_reduces_alike_cut_or_spread() -> None:
    """Every rank holds every token, so spreading experts changes no collective."""
    cut, spread = collectives_s(Shape(4)), collectives_s(Shape(4, ep=4))
    assert cut.keys() == spread.keys() == {"all-reduce"}
    np.testing.assert_array_equal(cut["all-reduce"], spread["all-reduce"])
    assert all_reduces(LAYER, Shape(4)) == 2
    assert all_reduces(LAYER, Shape(1, dp=4)) == 0
    assert collectives_s(Shape(1)) == {}


def test_attention_groups_gather_and_scatter_around_experts() -> None:
    """Groups of one device need no all-reduce; a dense layer needs no exchange at all."""
    assert collectives_s(Shape(1, dp=4, ep=4)).keys() == {
        "all-gather tokens",
        "reduce-scatter tokens",
    }
    assert "all-reduce" in collectives_s(Shape(2, dp=2, ep=4))
    mixer = Layer(LAYER.mixer, None, 0)
    parts = collective_parts(MODEL, DEVICE, TABLE, mixer, Shape(1, dp=4), SIZES, None, {})
    assert list(parts) == []


def test_experts_meet_the_tokens_of_every_attention_group() -> None:
    """They are counted over the tokens of all groups: 512 cost as in one group with 512."""
    joined = experts_s(Shape(1, dp=4, ep=4), tokens=512)
    assert joined == pytest.approx(experts_s(Shape(4, ep=4), tokens=512))
    ffn = Layer(None, LAYER.ffn, 0)
    parts = list(layer_parts(MODEL, DEVICE, TABLE, ffn, Shape(1, dp=4, ep=4), SIZES))
    over = {part.name: (part.axis, len(part.time_s)) for part in parts}
    assert over["experts"] == (Axis.GROUPS_TOKENS, 4 * 512 + 1)
    assert over["gemm router"] == (Axis.TOKENS, 513)


def test_experts_of_more_choices_take_longer() -> None:
    """More experts per token touch more weights and compute more, in either layout."""
    assert isinstance(LAYER.ffn, Experts)
    wider = replace(LAYER, ffn=replace(LAYER.ffn, top_k=2 * LAYER.ffn.top_k))
    for shape in (Shape(4), Shape(4, ep=4)):
        times = [experts_s(shape, tokens=64, layer=layer) for layer in (LAYER, wider)]
        assert times[1] > times[0]


def test_dealt_out_experts_take_more_launches_outside_graphs() -> None:
    """48 layers of 50 us, and 10 us more for each where experts lie on several devices."""
    host = HostConstants(eager_layer_s=50e-6, eager_dealt_layer_s=10e-6)
    compiler = CostCompiler(
        MODEL, DEVICE, TABLE, host, GraphRules((), False), max_tokens=64, max_seqs=4, max_context=64
    )
    cut, dealt = (
        float(compiler.compile(shape, BatchingLimits(4, 64)).mixed_floor_ps[0])
        for shape in (Shape(4), Shape(4, ep=4))
    )
    assert (cut, dealt) == (48 * 50e6, 48 * 60e6)
