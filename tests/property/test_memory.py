"""Memory of random mixes of layers."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.activations import activation_bytes_per_rank
from simulator.kv_layout import kv_bytes_per_token, kv_layout
from simulator.memory import MemoryRules, memory_budget
from simulator.model import (
    Attention,
    Experts,
    GatedDeltaNet,
    LatentAttention,
    Layer,
    Mamba2,
    Mlp,
    ModelShape,
)
from simulator.plan import BatchingLimits, Shape
from simulator.weights import weight_bytes_per_rank
from tests.shapes import device

WIDTHS = (1, 2, 4, 8)
"""Every head count and width below divides by these."""

EIGHTS = st.integers(1, 8).map(lambda count: 8 * count)
HEAD_DIMS = st.sampled_from([64, 80, 128, 192])
LAYER_DTYPES = st.sampled_from(["bf16", "fp8", "mxfp4"])

ATTENTION = st.builds(
    Attention,
    num_heads=EIGHTS,
    num_kv_heads=st.sampled_from([1, 2, 4, 8]),
    head_dim=HEAD_DIMS,
    v_head_dim=HEAD_DIMS,
    window_tokens=st.sampled_from([0, 0, 100, 128, 4096]),
    gated=st.booleans(),
    dtype=LAYER_DTYPES,
)
LATENT = st.builds(
    LatentAttention,
    num_heads=EIGHTS,
    q_lora_rank=st.sampled_from([0, 256]),
    kv_lora_rank=st.sampled_from([256, 512]),
    qk_nope_head_dim=HEAD_DIMS,
    qk_rope_head_dim=st.just(64),
    v_head_dim=HEAD_DIMS,
    index_heads=st.sampled_from([0, 8]),
    index_head_dim=st.just(128),
    index_topk=st.just(64),
)
DELTA = st.builds(GatedDeltaNet, EIGHTS, EIGHTS, HEAD_DIMS, HEAD_DIMS, st.integers(2, 4))
MAMBA = st.builds(Mamba2, EIGHTS, HEAD_DIMS, HEAD_DIMS, st.just(8), st.integers(2, 4))
FFN = st.none() | st.one_of(
    st.builds(Mlp, intermediate_size=EIGHTS, gated=st.booleans(), dtype=LAYER_DTYPES),
    st.builds(
        Experts,
        num_experts=st.integers(4, 16),
        top_k=st.integers(1, 4),
        intermediate_size=EIGHTS,
        shared_intermediate_size=st.sampled_from([0, 64]),
        latent_size=st.sampled_from([0, 32]),
        dtype=LAYER_DTYPES,
    ),
)
MIXED = st.builds(Layer, st.one_of(ATTENTION, LATENT, DELTA, MAMBA), FFN)
LAYERS = st.lists(
    st.tuples(MIXED | st.builds(Layer, st.none(), FFN), st.integers(1, 20)), min_size=1, max_size=4
)


@st.composite
def models(draw: st.DrawFn) -> ModelShape:
    """Models of one to five kinds of layers, at least one of which mixes tokens."""
    kinds = [(draw(MIXED), draw(st.integers(1, 20))), *draw(LAYERS)]
    layers = tuple(layer for layer, count in kinds for _ in range(count))
    hidden, vocab = draw(EIGHTS), draw(st.integers(100, 2000))
    kv_dtype = draw(st.sampled_from(["bf16", "fp8"]))
    return ModelShape("random", layers, hidden, vocab, draw(st.booleans()), 4096, kv_dtype=kv_dtype)


@settings(max_examples=60, deadline=None)
@given(models(), st.sampled_from(WIDTHS), st.sampled_from(["bf16", "fp32"]))
def test_pages_are_positive_and_grow_with_the_sequence(
    model: ModelShape, tp: int, state_dtype: str
) -> None:
    """More tokens never take fewer pages, and any token takes one."""
    layout = kv_layout(model, tp, 16, state_dtype)
    assert layout.page_bytes > 0
    assert layout.block_tokens >= 16
    pages = [layout.pages(tokens) for tokens in range(1, 6000, 37)]
    assert pages[0] > 0
    assert pages == sorted(pages)
    # The longest sequence of some pages takes no more of them, and its next token does.
    for number in range(layout.pages(1), layout.pages(1) + 2000, 97):
        longest = layout.longest(number)
        if longest is None:
            assert layout.pages(10**9) <= number
        else:
            assert layout.pages(longest) <= number < layout.pages(longest + 1)
    # Pages of a long sequence hold at least what its layers keep.
    tokens = 100_000
    assert layout.pages(tokens) * layout.page_bytes >= tokens * kv_bytes_per_token(model, tp)


@settings(max_examples=60, deadline=None)
@given(models())
def test_wider_tp_never_takes_more(model: ModelShape) -> None:
    """Weights, tokens and activations of one rank shrink or stay as ranks are added."""
    limits = BatchingLimits(16, 512)
    for measure in (
        lambda model, tp: weight_bytes_per_rank(model, Shape(tp)),
        kv_bytes_per_token,
        lambda model, tp: activation_bytes_per_rank(model, Shape(tp), limits, 10),
    ):
        sizes = [measure(model, tp) for tp in WIDTHS]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] >= 0


@settings(max_examples=60, deadline=None)
@given(models(), st.sampled_from(WIDTHS), st.integers(1, 80))
def test_the_budget_adds_up(model: ModelShape, tp: int, memory_gib: int) -> None:
    """Pages, with the null one, fill what is left to within one page."""
    rules = MemoryRules(0.9, 10**8, 0, 16, 10, "fp32")
    budget = memory_budget(model, device(memory_gib), Shape(tp), BatchingLimits(16, 512), rules)
    left = budget.usable_bytes - budget.fixed_bytes
    assert 0 <= left - (budget.num_blocks + 1) * budget.layout.page_bytes < budget.block_bytes
