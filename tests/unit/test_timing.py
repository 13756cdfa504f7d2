"""The iteration cost: closed forms, monotone arrays, graph padding and host terms."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from planner.io.devices import load_device
from planner.io.profiles import load_kernel_table
from simulator.attention import (
    context_attention_s,
    context_underfill_s,
    generation_attention_s,
)
from simulator.collectives import all_reduce_s, nccl_s
from simulator.cost import CostCompiler
from simulator.engine_rules import GraphRules, HostConstants, graph_sizes
from simulator.gemm import gemm_s
from simulator.interpolate import Provenance
from simulator.ops import elementwise, head_gemm, layer_gemms, sampler_bytes_per_sequence
from simulator.plan import BatchingLimits, Shape
from simulator.timing import IterationCost, decode_attention_ps, in_ps, in_s, one_stage, stages_of
from tests.builders import TICK_S, Seconds, iteration_s, linear_cost, seconds_of
from tests.shapes import LLAMA_70B

TABLE = load_kernel_table("H100-SXM-80GB", "vllm", "0.24.0")
DEVICE = load_device("H100-SXM-80GB")
MODEL = LLAMA_70B
LAYER = MODEL.layers[0]
HEADS = {tp: (LAYER.mixer.num_heads // tp, LAYER.mixer.num_kv_heads // tp) for tp in (1, 2, 4, 8)}
GRAPHS = GraphRules(graph_sizes([1, 2, 4], [[8, 248, 8], [256, 512, 16]]), full_decode=True)
PIECES = GraphRules(GRAPHS.sizes, full_decode=False)
LIMITS = BatchingLimits(max_num_seqs=256, max_num_batched_tokens=8192)
WIDTHS = [1, 2, 4, 8]
NO_HOST = HostConstants()
CONTEXT = 16_384
PICOSECOND_S = 1e-12
"""What rounding may move a time by, and no more."""


@lru_cache(maxsize=16)
def compiler(host: HostConstants = NO_HOST, graphs: GraphRules = GRAPHS) -> CostCompiler:
    """A compiler of the model on the shipped table."""
    sizes = {"max_tokens": 8192, "max_seqs": 256, "max_context": CONTEXT}
    return CostCompiler(MODEL, DEVICE, TABLE, host, graphs, **sizes)


def compiled(tp: int, host: HostConstants = NO_HOST) -> IterationCost:
    """The cost of a replica ``tp`` wide under ``LIMITS``."""
    return compiler(host).compile(Shape(tp), LIMITS)


def times_of(tp: int, host: HostConstants = NO_HOST) -> Seconds:
    """Its times in seconds."""
    return seconds_of(compiled(tp, host))


def test_iteration_time_is_the_sum_of_its_parts() -> None:
    """Every argument contributes its product, worked by hand on a linear cost."""
    cost = linear_cost(7.0, token_s=0.5, sequence_s=0.25, context_s=0.125)
    # 7 + 0.5 * 20 tokens + 0.125 * 30 cached tokens + 2 prompt attention + 0.25 * 3 sampled.
    assert iteration_s(cost, 20, 3, 30, 2.0, 3, True) == 7 + 10 + 3.75 + 2 + 0.75
    # Without prompt tokens the prompt attention does not count.
    assert iteration_s(cost, 3, 3, 30, 0.0, 3, False) == 7 + 1.5 + 3.75 + 0.75


def test_floors_hold_the_device_time_up_but_not_the_host_time() -> None:
    """A short iteration takes the floor of its kind, and host terms come on top."""
    cost = linear_cost(7.0, token_s=0.5, sequence_s=0.25)
    cost = cost._replace(decode_floor_ps=in_ps([3.0]), mixed_floor_ps=in_ps([5.0]))
    assert iteration_s(cost, 2, 2, 2, 0.0, 2, False) == 3 + 7 + 0.5  # 1 < 3
    assert iteration_s(cost, 8, 8, 8, 0.0, 8, False) == 4 + 7 + 2  # 4 > 3
    assert iteration_s(cost, 8, 0, 0, 0.5, 1, True) == 5 + 7 + 0.25  # 4.5 < 5
    assert iteration_s(cost, 8, 0, 0, 2.0, 1, True) == 6 + 7 + 0.25  # 6 > 5


def decode_attention_s(cost: IterationCost, decodes: int, context_tokens: int) -> float:
    """Attention of ``decodes`` sequences that hold ``context_tokens`` in all, seconds."""
    return float(in_s(decode_attention_ps(cost, 0, decodes, context_tokens)))


def test_decode_attention_between_below_and_beyond_its_knots() -> None:
    """Straight lines between knots, flat below the first, the last slope beyond the last."""
    nothing_s = np.zeros(3)
    cost = one_stage(
        decode_s=nothing_s,
        mixed_s=nothing_s,
        sampled_s=nothing_s,
        attention_s=np.array([[5.0, 5, 5], [6, 15, 35], [8, 26, 40]]),
        context_knots=[1, 10, 20],
        prefill_s=nothing_s,
    )
    assert decode_attention_s(cost, 0, 0) == 5
    assert decode_attention_s(cost, 1, 1) == 6
    assert decode_attention_s(cost, 1, 4) == 9  # 6 + 3/9 of 9
    assert decode_attention_s(cost, 1, 10) == 15
    assert decode_attention_s(cost, 1, 15) == 25  # halfway to 35
    assert decode_attention_s(cost, 1, 20) == 35
    assert decode_attention_s(cost, 1, 30) == 55  # slope 2 goes on
    assert decode_attention_s(cost, 2, 25) == 29.5  # mean 12.5: 26 + 0.25 * 14
    # Slopes are rounded down, here 2 / 3 of a picosecond per token to none: that loses less than a
    # picosecond per token of context, and the time never falls at a knot.
    thirds = one_stage(
        decode_s=nothing_s,
        mixed_s=nothing_s,
        sampled_s=nothing_s,
        attention_s=np.array([[0.0, 0], [0, 2e-12]]),
        context_knots=[1, 4],
        prefill_s=nothing_s,
    )
    assert [int(decode_attention_ps(thirds, 0, 1, c)) for c in (1, 2, 3, 4)] == [0, 0, 0, 2]


def test_times_are_whole_picoseconds_and_sums_of_them_are_exact() -> None:
    """Rounded to the nearest picosecond; a tick is a whole number of them, and so is its 64th."""
    assert in_ps([1.4e-12, 1.6e-12, 1.0, 0.1 + 0.2]).tolist() == [1, 2, 10**12, 3 * 10**11]
    assert in_ps([TICK_S, TICK_S / 64]).tolist() == [15_625_000_000, 244_140_625]
    assert in_s(in_ps([TICK_S])).tolist() == [TICK_S]


def test_a_cost_of_stages_has_their_times_by_kind() -> None:
    """Each stage is of a kind; times of a stage are those of its kind's own cost."""
    ends, middle = linear_cost(2.0, token_s=1.0), linear_cost(1.0, context_s=0.5)
    cost = stages_of([ends, middle], [0, 1, 1, 0], np.arange(257.0))
    assert cost.stages.tolist() == [0, 1, 1, 0]
    assert cost.send_ps[3] == 3 * 10**12
    assert (cost.max_tokens, cost.max_seqs, cost.max_context) == (256, 64, 512)
    for kind, alone in enumerate((ends, middle)):
        for mine, theirs in zip(seconds_of(cost, kind), seconds_of(alone), strict=True):
            assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("tp", WIDTHS)
def test_no_array_ever_falls(tp: int) -> None:
    """More tokens, sequences or context never cost less, and prompts never cost less than decodes.

    The solver's bounds rest on this.
    """
    for graphs in (GRAPHS, PIECES, GraphRules((), full_decode=False)):
        host = HostConstants(iteration_s=1e-3, sequence_s=1e-5, prefill_multiplier=1.2)
        cost = compiler(host, graphs).compile(Shape(tp), LIMITS)
        for array in (cost.decode_ps, cost.mixed_ps, cost.sampled_ps, cost.prefill_ps):
            assert (np.diff(array) >= 0).all()
        assert (np.diff(cost.attention_ps, axis=1) >= 0).all()
        assert (np.diff(cost.attention_ps, axis=2) >= 0).all()
        assert (cost.attention_slope_ps >= 0).all()
        assert (cost.mixed_ps >= cost.decode_ps).all()
        assert (np.diff(cost.context_knots) > 0).all()
        assert cost.context_knots[0] == 1
        assert cost.context_knots[-1] >= CONTEXT
        assert (cost.decode_ps[:, 1:] > 0).all()


@pytest.mark.parametrize("tp", WIDTHS)
def test_arrays_have_one_entry_per_count(tp: int) -> None:
    """Sizes follow the plan's limits, and a narrower plan sees the same values."""
    cost = compiled(tp)
    assert cost.decode_ps.shape == cost.mixed_ps.shape == (1, 8193)
    assert cost.sampled_ps.shape == (1, 257)
    assert cost.attention_ps.shape == (1, 257, len(cost.context_knots))
    assert cost.attention_slope_ps.shape == cost.attention_ps.shape
    assert cost.prefill_ps.shape == (1, CONTEXT + 1)
    narrow = compiler().compile(Shape(tp), BatchingLimits(64, 2048))
    assert np.array_equal(narrow.sampled_ps, cost.sampled_ps[:, :65])
    assert np.array_equal(narrow.attention_ps, cost.attention_ps[:, :65])
    assert np.array_equal(narrow.prefill_ps, cost.prefill_ps)


@pytest.mark.parametrize("tp", WIDTHS)
def test_decode_attention_is_within_two_percent_of_the_tables(tp: int) -> None:
    """Between knots the straight line differs by less than 2 % from the interpolated kernel."""
    cost = compiled(tp)
    contexts = np.unique(np.geomspace(1, CONTEXT, 150).astype(int))
    batches = np.array([1, 2, 3, 5, 8, 13, 32, 100, 200, 256])
    heads, kv_heads = HEADS[tp]
    kernel_s, _ = generation_attention_s(
        TABLE, DEVICE, "bf16", 128, heads, kv_heads, batches, contexts
    )
    for b, row in zip(batches.tolist(), MODEL.num_layers * kernel_s, strict=True):
        got = np.array([decode_attention_s(cost, b, b * c) for c in contexts.tolist()])
        # The launch of an attention kernel (row 0) is the least that any batch takes.
        expected = np.maximum(row, seconds_of(cost).attention_s[0, 0])
        np.testing.assert_allclose(got, expected, rtol=0.02)


def copy_s(elements: int) -> float:
    """Reading and writing a message of 2-byte elements once, seconds."""
    return 2 * 2 * elements / DEVICE.elementwise_bytes_per_s


def own_linear_s(tp: int, tokens: int, *, in_graph: bool) -> float:
    """Time of all layers without attention, put together operator by operator."""
    layer = sum(
        float(gemm_s(TABLE, DEVICE, op.dtype, [tokens], op.n, op.k)[0][0])
        for op in layer_gemms(MODEL, LAYER, Shape(tp))
    )
    streams = elementwise(MODEL, LAYER, Shape(tp))
    layer += streams.kernels * DEVICE.elementwise_launch_s
    layer += streams.bytes_per_token * tokens / DEVICE.elementwise_bytes_per_s
    reduce_s = float(all_reduce_s(TABLE, DEVICE, "graph", tp, [tokens * MODEL.hidden_size])[0][0])
    if tp > 1 and not in_graph:
        reduce_s += copy_s(tokens * MODEL.hidden_size)
    return MODEL.num_layers * (layer + 2 * reduce_s)


@pytest.mark.parametrize("tp", WIDTHS)
def test_batches_are_padded_to_the_next_captured_size(tp: int) -> None:
    """Up to the largest graph time steps at capture sizes; beyond it every token counts."""
    decode_s = times_of(tp).decode_s
    previous = 0
    for size in GRAPHS.sizes:
        assert np.unique(decode_s[previous + 1 : size + 1]).size == 1
        assert decode_s[size] == pytest.approx(
            own_linear_s(tp, size, in_graph=True), abs=PICOSECOND_S
        )
        previous = size
    assert previous == 512
    assert decode_s[504] > decode_s[496]
    for tokens in (513, 1000, 8192):
        unpadded = own_linear_s(tp, tokens, in_graph=False)
        # A running maximum bridges the step from graph to eager, should there be one down.
        assert decode_s[tokens] == pytest.approx(max(unpadded, decode_s[512]), abs=PICOSECOND_S)
    assert decode_s[8192] > decode_s[8000] > decode_s[513]


def test_captured_sizes_stop_at_twice_the_sequences_and_at_the_budget() -> None:
    """VLLM captures up to min(2 * max_num_seqs, max_num_batched_tokens, 512)."""
    assert GRAPHS.sizes[:6] == (1, 2, 4, 8, 16, 24)
    assert len(GRAPHS.sizes) == 3 + 31 + 17  # 8..248 by 8, 256..512 by 16: 51 in all
    assert GRAPHS.captured(BatchingLimits(10, 8192)) == (1, 2, 4, 8, 16)
    assert GRAPHS.captured(BatchingLimits(1024, 12)) == (1, 2, 4, 8)
    assert GRAPHS.captured(BatchingLimits(1024, 8192)) == GRAPHS.sizes
    assert GraphRules((8, 16), full_decode=True).captured(BatchingLimits(2, 100)) == ()


def test_without_graphs_nothing_is_padded() -> None:
    """A version that captures nothing pays for the tokens it has, with the eager all-reduce."""
    cost = seconds_of(compiler(graphs=GraphRules((), full_decode=False)).compile(Shape(2), LIMITS))
    own = np.array([own_linear_s(2, tokens, in_graph=False) for tokens in (1, 9, 100, 5000)])
    np.testing.assert_allclose(cost.decode_s[[1, 9, 100, 5000]], own, rtol=0, atol=PICOSECOND_S)
    assert cost.decode_s[0] == 0


@pytest.mark.parametrize("tp", WIDTHS)
def test_prompt_attention_telescopes_over_any_chunks(tp: int) -> None:
    """Chunks add up to the whole prompt, which is the kernel's marginal cost of its length."""
    prefill_s = times_of(tp).prefill_s
    heads, kv_heads = HEADS[tp]
    lengths = np.array([0, 1, 100, 4096, 10_000, CONTEXT])
    whole_s, _, _ = context_attention_s(TABLE, DEVICE, "bf16", 128, heads, kv_heads, lengths)
    np.testing.assert_allclose(
        prefill_s[lengths], MODEL.num_layers * whole_s, rtol=0, atol=PICOSECOND_S
    )
    assert prefill_s[0] == 0
    prefill_ps = compiled(tp).prefill_ps[0]
    for chunk in (1, 512, 3000):
        cuts = np.append(np.arange(0, 10_000, chunk), 10_000)
        assert np.diff(prefill_ps[cuts]).sum() == prefill_ps[10_000]
    # Attention to a longer cached context costs more per chunk.
    assert prefill_s[8192] - prefill_s[7680] > 2 * (prefill_s[2560] - prefill_s[2048])


@pytest.mark.parametrize("tp", WIDTHS)
def test_sampled_sequences_cost_head_gather_and_sampler(tp: int) -> None:
    """Head projection, gathering of logits over ranks and sampler traffic, by sequences."""
    sampled_s = times_of(tp).sampled_s
    head = head_gemm(MODEL, Shape(tp))
    assert head.n == 128_256 // tp
    for n in (1, 64, 256):
        expected = float(gemm_s(TABLE, DEVICE, "bf16", [n], head.n, head.k)[0][0])
        expected += n * sampler_bytes_per_sequence(MODEL) / DEVICE.elementwise_bytes_per_s
        if tp > 1:
            expected += float(nccl_s(TABLE, DEVICE, "all_gather", tp, [n * 128_256])[0][0])
        assert sampled_s[n] == pytest.approx(expected, abs=PICOSECOND_S)
    assert sampled_s[0] == 0


def test_host_terms_add_to_every_iteration_and_to_every_sampled_sequence() -> None:
    """Host time per iteration and per sampled sequence adds up; ingress is not in the cost."""
    bare = compiled(2)
    host = compiled(2, HostConstants(iteration_s=2e-3, sequence_s=3e-5, ingress_s=9.0))
    for batch in [(64, 64, 64_000, 0.0, 64, False), (2048, 10, 10_000, 0.0, 11, True)]:
        added = 2e-3 + 3e-5 * batch[4]
        assert iteration_s(host, *batch) - iteration_s(bare, *batch) == pytest.approx(added)
    assert np.array_equal(host.decode_ps, bare.decode_ps)


def test_the_prefill_multiplier_scales_prompt_iterations_only() -> None:
    """Iterations with prompt tokens take the factor on layers and prompt attention."""
    bare, scaled = times_of(2), times_of(2, HostConstants(prefill_multiplier=1.5))
    rounding = {"rtol": 0.0, "atol": 2 * PICOSECOND_S}
    np.testing.assert_allclose(scaled.mixed_s, 1.5 * bare.mixed_s, **rounding)
    np.testing.assert_allclose(scaled.prefill_s, 1.5 * bare.prefill_s, **rounding)
    for same in ("decode_s", "sampled_s", "attention_s"):
        assert np.array_equal(getattr(scaled, same), getattr(bare, same))
    with pytest.raises(ValueError, match=r"prefill_multiplier is 0\.9"):
        HostConstants(prefill_multiplier=0.9)


@pytest.mark.parametrize("tp", WIDTHS)
def test_prompt_iterations_pay_for_what_few_tokens_leave_idle(tp: int) -> None:
    """Mixed iterations take the decode ones' time and the underfill of prefill attention."""
    cost = times_of(tp)
    tokens = np.arange(1, 8193)
    underfill_s, _ = context_underfill_s(TABLE, DEVICE, "bf16", 128, *HEADS[tp], tokens)
    more_s = (cost.mixed_s - cost.decode_s)[1:]
    np.testing.assert_allclose(more_s, MODEL.num_layers * underfill_s, rtol=0, atol=2e-12)
    assert more_s[4095] > 0


def test_eager_layers_have_a_floor_outside_full_graphs() -> None:
    """80 layers of 50 us take 4 ms where the batch does not replay as one graph."""
    host = HostConstants(eager_layer_s=50e-6)
    full = seconds_of(compiler(host).compile(Shape(8), LIMITS))
    pieces = seconds_of(compiler(host, PIECES).compile(Shape(8), LIMITS))
    assert (full.decode_floor_s, pieces.decode_floor_s) == (0.0, pytest.approx(4e-3))
    assert full.mixed_floor_s == pieces.mixed_floor_s == pytest.approx(4e-3)


def test_nccl_reduces_large_messages_where_the_version_says_so() -> None:
    """From 8 MiB on (512 tokens of 16 KiB) NCCL's time replaces the engine's own kernel."""
    plain = times_of(2).decode_s
    sizes = {"max_tokens": 8192, "max_seqs": 256, "max_context": CONTEXT}
    switching = CostCompiler(
        MODEL,
        DEVICE,
        TABLE,
        NO_HOST,
        GRAPHS,
        nccl_all_reduce_from_bytes={2: 8 * 1024**2},
        **sizes,
    )
    switched = seconds_of(switching.compile(Shape(2), LIMITS)).decode_s
    assert np.array_equal(switched[:497], plain[:497])  # up to the size below 512
    elements = [4096 * MODEL.hidden_size]
    own = float(all_reduce_s(TABLE, DEVICE, "graph", 2, elements)[0][0]) + copy_s(elements[0])
    nccl = float(nccl_s(TABLE, DEVICE, "all_reduce", 2, elements)[0][0])
    assert nccl != own
    moved = 2 * MODEL.num_layers * (nccl - own)
    assert switched[4096] - plain[4096] == pytest.approx(moved, rel=1e-7)


def test_widths_are_those_with_a_measured_all_reduce() -> None:
    """One device needs none; the others must be in the table and in the scale-up domain."""
    measured = {gpus for _, gpus in TABLE.all_reduce}
    assert compiler().widths == (1, *sorted(g for g in measured if g <= 8))
    assert {1, 2, 4, 8} <= set(compiler().widths)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_eager_all_reduce_is_the_graphs_and_a_copy(tp: int) -> None:
    """Measured eager times are graph times plus a copy within 5 % (7 % at 4 million elements)."""
    elements = 2 ** np.arange(22, 30)
    graph_s = all_reduce_s(TABLE, DEVICE, "graph", tp, elements)[0]
    eager_s = all_reduce_s(TABLE, DEVICE, "eager", tp, elements)[0]
    copies_s = np.array([copy_s(count) for count in elements.tolist()])
    error = (graph_s + copies_s) / eager_s - 1
    assert np.abs(error[0]) < 0.07
    assert np.abs(error[1:]).max() < 0.05
    # The copy is no detail: without it the large messages would be off by 10 % and more.
    assert (graph_s / eager_s - 1)[1:].max() < -0.1


def provenance(tp: int, tokens: int, sequences: int, context: int) -> dict[str, Provenance]:
    """Labels at one point of operation with prompts as long as the context."""
    return compiler().provenance(Shape(tp), tokens, sequences, context, context)


def test_provenance_names_every_operator_of_a_width() -> None:
    """One device has no collectives; two report them; only known labels occur."""
    alone, pair = provenance(1, 100, 32, 1024), provenance(2, 100, 32, 1024)
    assert set(pair) - set(alone) == {"all-reduce", "all-gather logits"}
    assert {"gemm qkv", "gemm head", "decode attention", "prefill attention"} <= set(alone)
    assert set(pair.values()) <= set(Provenance)


def test_provenance_belongs_to_the_point_of_operation() -> None:
    """32 sequences of 1,024 tokens are a node of the grid; 256 of 16,384 were never measured."""
    assert provenance(2, 100, 32, 1024)["decode attention"] == Provenance.MEASURED
    assert provenance(2, 100, 31, 1024)["decode attention"] == Provenance.INTERPOLATED
    assert provenance(2, 256, 256, 16_384)["decode attention"] == Provenance.EXTRAPOLATED
    assert provenance(2, 100, 32, 1024)["prefill attention"] == Provenance.MEASURED
    assert provenance(2, 100, 32, 1000)["prefill attention"] == Provenance.INTERPOLATED
