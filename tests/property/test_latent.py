"""Latent attention and recurrent layers over random shapes and random tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.io import profiles as shipped
from planner.io.devices import load_device
from simulator.latent import (
    latent_context_batch_s,
    latent_context_floor_s,
    latent_context_s,
    latent_generation_s,
    latent_underfill_s,
)
from simulator.model import GatedDeltaNet, LatentAttention, Mamba2
from simulator.recurrent import recurrent_context_s, recurrent_generation_s
from simulator.table import KernelTable, LatentGrid, RecurrentSeries

H100 = load_device("H100-SXM-80GB")
TABLES = [
    shipped.load_kernel_table("H100-SXM-80GB", engine, version)
    for engine, version in (("vllm", "0.24.0"), ("sglang", "0.5.14"), ("trtllm", "1.3.0rc20"))
]
BATCHES = np.array([1, 2, 3, 7, 31, 100, 257, 1024, 5000])
CONTEXTS = np.array([1, 2, 5, 100, 2047, 2049, 8191, 131_073, 1_000_000])
LENGTHS = np.array([0, 1, 2, 17, 500, 2048, 2049, 9000, 40_000, 1_000_000])
KV_DTYPES = st.sampled_from(["bf16", "fp8"])
PRECISIONS = st.sampled_from(["bf16", "fp8", "fp8_block", "nvfp4", "int4"])


@st.composite
def attentions(draw: st.DrawFn) -> LatentAttention:
    """Any latent attention, sparse or dense."""
    widths = st.integers(16, 1024)
    sparse = draw(st.booleans())
    return LatentAttention(
        num_heads=128,
        q_lora_rank=draw(st.sampled_from([0, 768, 1536])),
        kv_lora_rank=draw(widths),
        qk_nope_head_dim=draw(widths),
        qk_rope_head_dim=draw(widths),
        v_head_dim=draw(widths),
        index_heads=draw(st.integers(1, 128)) if sparse else 0,
        index_head_dim=draw(st.integers(16, 256)) if sparse else 0,
        index_topk=draw(st.integers(16, 8192)) if sparse else 0,
        dtype=draw(PRECISIONS),
    )


def axis(most: int) -> st.SearchStrategy[np.ndarray[Any, np.dtype[np.int32]]]:
    """Two to six ascending sizes."""
    sizes = st.lists(st.integers(1, most), min_size=2, max_size=6, unique=True)
    return sizes.map(lambda values: np.array(sorted(values), dtype=np.int32))


def times(
    random: np.random.Generator, shape: tuple[int, ...]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Times between 1 us and 1 s without any order, with holes, but not all of them."""
    time_s = 10 ** random.uniform(-6, 0, shape)
    time_s[random.random(shape) < random.uniform(0, 0.95)] = np.nan
    time_s.flat[random.integers(time_s.size)] = 1e-3
    return time_s


def assert_grows(time_s: np.ndarray[Any, np.dtype[np.float64]], *axes: int) -> None:
    """Finite, not negative, and no step down along the axes."""
    assert np.isfinite(time_s).all()
    assert (time_s >= 0).all()
    for along in axes:
        assert (np.diff(time_s, axis=along) >= -1e-9 * time_s.max()).all()


def assert_latent_is_sane(
    table: KernelTable, attention: LatentAttention, heads: int, kv_dtype: str
) -> None:
    """Every function of `simulator/latent.py` gives times that can be believed."""
    kernel = (table, H100, attention, heads, kv_dtype)
    decode_s, _ = latent_generation_s(*kernel, BATCHES, CONTEXTS)
    assert_grows(decode_s, 0, 1)
    assert (decode_s > 0).all()
    prompt_s, launch_s, _ = latent_context_s(*kernel, LENGTHS)
    assert_grows(prompt_s, 0)
    assert prompt_s[0] == 0
    assert_grows(np.array([launch_s, latent_context_floor_s(*kernel)]))
    assert_grows(latent_underfill_s(*kernel, LENGTHS)[0], 0)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TABLES), attentions(), st.integers(1, 256), KV_DTYPES)
def test_any_attention_on_a_measured_table(
    table: KernelTable, attention: LatentAttention, heads: int, kv_dtype: str
) -> None:
    """Any attention on a measured table."""
    assert_latent_is_sane(table, attention, heads, kv_dtype)


@settings(max_examples=60, deadline=None)
@given(
    st.data(),
    attentions(),
    st.integers(1, 256),
    KV_DTYPES,
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_any_table(
    data: st.DataObject,
    attention: LatentAttention,
    heads: int,
    kv_dtype: str,
    seed: int,
    module: bool,
) -> None:
    """Any table."""
    random = np.random.default_rng(seed)
    grids = []
    for phase in ("context", "generation"):
        sizes = [data.draw(axis(most)) for most in (128, 1024, 100_000)]
        grids.append(
            LatentGrid(
                phase=phase,
                module=module,
                hidden_size=7168,
                q_lora_rank=1536,
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
                index_topk=2048 if attention.index_topk else 0,
                weight_dtype="bf16",
                kv_dtype="bf16",
                prefix=np.zeros(1, dtype=np.int32),
                heads=sizes[0],
                batch=sizes[1],
                length=sizes[2],
                time_s=times(random, (1, *(len(size) for size in sizes))),
            )
        )
    table = replace(TABLES[0], latent=tuple(grids), latent_bmm={})
    assert_latent_is_sane(table, attention, heads, kv_dtype)
    batch_s, _ = latent_context_batch_s(table, H100, attention, heads, kv_dtype, BATCHES, CONTEXTS)
    assert_grows(batch_s)


MIXERS = st.one_of(
    st.builds(
        GatedDeltaNet,
        st.integers(1, 64),
        st.integers(1, 128),
        st.integers(8, 256),
        st.integers(8, 256),
        st.integers(1, 8),
    ),
    st.builds(
        Mamba2,
        st.integers(1, 256),
        st.integers(8, 256),
        st.integers(8, 256),
        st.integers(1, 16),
        st.integers(1, 8),
    ),
)


def assert_recurrent_is_sane(table: KernelTable, mixer: GatedDeltaNet | Mamba2, tp: int) -> None:
    """Both functions of `simulator/recurrent.py` give times that can be believed."""
    decode_s, _ = recurrent_generation_s(table, H100, mixer, tp, BATCHES)
    assert_grows(decode_s, 0)
    assert (decode_s > 0).all()
    prompt_s, launch_s, _ = recurrent_context_s(table, H100, mixer, tp, LENGTHS)
    assert_grows(prompt_s, 0)
    assert prompt_s[0] == 0
    assert_grows(np.array([launch_s]))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TABLES), MIXERS, st.sampled_from([1, 2, 4, 8]))
def test_any_recurrent_layer_on_a_measured_table(
    table: KernelTable, mixer: GatedDeltaNet | Mamba2, tp: int
) -> None:
    """Any recurrent layer on a measured table."""
    assert_recurrent_is_sane(table, mixer, tp)


@settings(max_examples=60, deadline=None)
@given(st.data(), MIXERS, st.integers(0, 2**32 - 1))
def test_any_recurrent_table(data: st.DataObject, mixer: GatedDeltaNet | Mamba2, seed: int) -> None:
    """Any recurrent table."""
    random = np.random.default_rng(seed)
    recurrent = []
    for kernel in ("convolution", "scan"):
        for phase in ("context", "generation"):
            for heads in (4, 32):
                batch = data.draw(axis(1024))
                length = data.draw(axis(30_000)) if phase == "context" else np.array([1])
                recurrent.append(
                    RecurrentSeries(
                        "gated_delta_net",
                        kernel,
                        phase,
                        (16, 128, heads, 128, 4),
                        batch,
                        length,
                        times(random, (len(batch), len(length))),
                    )
                )
    assert_recurrent_is_sane(replace(TABLES[0], recurrent=tuple(recurrent)), mixer, 1)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.engine)
def test_times_do_not_depend_on_what_was_asked_before(table: KernelTable) -> None:
    """Times do not depend on what was asked before."""
    attention = LatentAttention(128, 1536, 512, 128, 64, 128)
    kernel = (table, H100, attention, 16, "bf16")
    whole = latent_generation_s(*kernel, BATCHES, CONTEXTS)[0]
    single = [latent_generation_s(*kernel, [b], CONTEXTS)[0][0] for b in BATCHES]
    assert (whole == np.array(single)).all()
