"""Layer tables as an iteration cost: equal to the tables where they were measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from bench.rtx_tables import LayerTables, MixedLoad, has_tables, layer_cost, read_tables
from bench.uncovered import UncoveredError
from planner.io.hf_config import read_model
from simulator.engine_rules import GraphRules, HostConstants
from simulator.model import Experts
from simulator.plan import BatchingLimits
from simulator.timing import in_s

if TYPE_CHECKING:
    from pathlib import Path

MODEL = read_model("meta-llama/Llama-3.1-8B")
LAYERS = MODEL.num_layers
LIMITS = BatchingLimits(max_num_seqs=8, max_num_batched_tokens=64)
EAGER = GraphRules((), full_decode=False)


def series(first: float, last: float) -> tuple[np.ndarray, np.ndarray]:
    """Two knots: 1 and 64."""
    return np.array([1.0, 64.0]), np.array([first, last])


def attention() -> dict[tuple[int, int, int, int], float]:
    """Chunks of 16 and 32, decodes of 1 and 8; together they take half as long again."""
    alone = {(16, 0): 2.0, (32, 0): 5.0, (32, 32): 8.0, (32, 64): 11.0}
    out = {(c, p, 0, 0): t for (c, p), t in alone.items()}
    for n in (1, 8):
        for kv in (16, 64):
            out[0, 0, n, kv] = 0.1 * n + 0.01 * n * kv
            for c in (16, 32):
                out[c, 0, n, kv] = 1.5 * (alone[c, 0] + out[0, 0, n, kv])
    return out


def tables() -> LayerTables:
    """Tables of two kernels per layer."""
    names = ("qkv_proj", "o_proj", "layernorm", "embedding", "final_layernorm")
    dense = {name: series(1.0, 4.0) for name in names}
    sampled = {"lm_head": series(1.0, 2.0), "sampler": series(0.5, 0.5)}
    return LayerTables(dense, sampled, attention(), {})


def test_linear_time_counts_layers_and_pads_to_graphs() -> None:
    """Captured batches take the time of the next size."""
    host = HostConstants(iteration_s=3.0)
    cost = layer_cost(tables(), MODEL, 1, LIMITS, EAGER, host, max_context=96)
    # Per layer two products and two norms; embedding and last norm once.
    assert in_s(cost.decode_ps)[0, [1, 64]] == pytest.approx([4 * LAYERS + 2, 16 * LAYERS + 8])
    assert in_s(cost.host_ps)[0] == 3.0
    graphs = GraphRules((8, 16), full_decode=True)
    padded = layer_cost(tables(), MODEL, 1, LIMITS, graphs, host, max_context=96)
    eager = in_s(cost.decode_ps)[0]
    # Twice the limit on sequences is captured.
    assert in_s(padded.decode_ps)[0, [1, 8, 9, 16, 17]] == pytest.approx(eager[[8, 8, 16, 16, 17]])


def test_attention_is_the_tables() -> None:
    """Measured points come back; longer prompts add up chunk by chunk."""
    cost = layer_cost(tables(), MODEL, 1, LIMITS, EAGER, HostConstants(), max_context=96)
    knots = cost.context_knots.tolist()
    decode = in_s(cost.attention_ps)[0]
    assert decode[8, knots.index(64)] == pytest.approx(LAYERS * (0.8 + 0.01 * 8 * 64))
    assert decode[1, knots.index(16)] == pytest.approx(LAYERS * (0.1 + 0.16))
    assert decode[0].tolist() == [0.0] * len(knots)
    prompt = in_s(cost.prefill_ps)[0]
    assert prompt[[0, 16, 32, 64, 96]] == pytest.approx(
        [0.0, LAYERS * 2, LAYERS * 5, LAYERS * 13, LAYERS * 24]
    )
    assert np.all(np.diff(prompt) >= 0)


def test_a_chunk_beside_decodes_takes_longer_than_two_calls() -> None:
    """What one call takes beyond two is charged to iterations with prompts only."""
    own = tables()
    decodes_s = 0.8 + 0.01 * 8 * 64
    excess = own.mixing_s(np.array([16.0, 32.0]), MixedLoad(np.array([8.0, 8.0]), 64))
    assert excess == pytest.approx([0.5 * (2 + decodes_s), 0.5 * (5 + decodes_s)])
    # The mean over iterations, not at their mean; below the smallest count measured its time holds.
    half = own.mixing_s(np.array([16.0]), MixedLoad(np.array([8.0, 0.0]), 64))
    single = own.mixing_s(np.array([16.0]), MixedLoad(np.array([1.0]), 64))
    assert half == pytest.approx((excess[:1] + single) / 2)
    plain = layer_cost(own, MODEL, 1, LIMITS, EAGER, HostConstants(), max_context=96)
    load = MixedLoad(np.array([8.0, 8.0]), 64)
    mixed = layer_cost(own, MODEL, 1, LIMITS, EAGER, HostConstants(), max_context=96, load=load)
    added = in_s(mixed.mixed_ps - plain.mixed_ps)[0, [24, 40]]
    assert added == pytest.approx(LAYERS * excess)
    assert np.array_equal(mixed.decode_ps, plain.decode_ps)


def test_sampled_sequences_take_host_time() -> None:
    """Head, sampler and host time add up."""
    host = HostConstants(sequence_s=10.0)
    cost = layer_cost(tables(), MODEL, 1, LIMITS, EAGER, host, max_context=96)
    assert in_s(cost.sampled_ps)[0, [0, 1]] == pytest.approx([0.0, 1.0 + 0.5 + 10.0])


def test_tokens_hit_as_many_experts_as_chance_gives() -> None:
    """Two tokens may hit the same expert."""
    own = LayerTables({}, {}, {}, {(1, 2): 2.0, (1, 8): 8.0, (4, 2): 2.0, (4, 8): 8.0})
    experts = Experts(num_experts=8, top_k=2, intermediate_size=16)
    hit = 8 * (1 - 0.75**4)
    assert own.experts_s(np.array([1.0, 4.0]), experts) == pytest.approx([2.0, hit])


def test_missing_tables_are_named(tmp_path: Path) -> None:
    """The reason names the file."""
    assert not has_tables(tmp_path, "CARD", "org/Model", 1)
    with pytest.raises(UncoveredError, match=r"CARD__Model__tp1__dense\.csv"):
        read_tables(tmp_path, "CARD", "org/Model", 1)


def test_tables_are_read_in_seconds(tmp_path: Path) -> None:
    """Rows may come in any order."""
    files = {
        "dense": "layer,tokens,time_us\ngate_up_proj,2,3.0\ngate_up_proj,1,2.0\n",
        "per_sequence": "layer,sequences,time_us\nlm_head,1,5.0\n",
        "attention": "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n0,0,1,16,9.5\n",
    }
    for kind, text in files.items():
        (tmp_path / f"CARD__Model__tp1__{kind}.csv").write_text(text, encoding="utf-8")
    assert has_tables(tmp_path, "CARD", "org/Model", 1)
    own = read_tables(tmp_path, "CARD", "org/Model", 1)
    assert own.dense["gate_up_proj"][0].tolist() == [1.0, 2.0]
    assert own.dense["gate_up_proj"][1] == pytest.approx([2e-6, 3e-6])
    assert own.attention == {(0, 0, 1, 16): pytest.approx(9.5e-6)}
