"""KV-cache bytes of every kind of layer, and the pages that vLLM cuts them into."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulator.kv_layout import KvLayout, kv_bytes_per_token, kv_layout, state_bytes, token_bytes
from simulator.model import Attention, GatedDeltaNet, LatentAttention, Layer, Mamba2, ModelShape
from tests.shapes import (
    DEEPSEEK_R1,
    DEEPSEEK_V32,
    GEMMA4_26B,
    LLAMA_8B,
    NEMOTRON_NANO_9B,
    gpt_oss,
    mimo_v2_flash,
    qwen35,
)


@pytest.mark.parametrize(
    ("mixer", "kv_dtype", "tp", "expected"),
    [
        (Attention(32, 8, 128, 128), "bf16", 1, 4096),  # 8 heads * (128 + 128) * 2 bytes
        (Attention(32, 8, 128, 128), "fp8", 1, 2048),
        (Attention(32, 8, 128, 128), "bf16", 16, 512),  # one head, replicated
        (Attention(64, 4, 192, 128), "bf16", 2, 1280),  # 2 * (192 + 128) * 2
        (Attention(16, 2, 512, 512, values_are_keys=True), "bf16", 1, 4096),  # both are cached
        (LatentAttention(128, 1536, 512, 128, 64, 128), "bf16", 1, 1152),  # (512 + 64) * 2
        (LatentAttention(128, 1536, 512, 128, 64, 128), "bf16", 8, 1152),  # whole on every rank
        (LatentAttention(128, 1536, 512, 128, 64, 128), "fp8", 8, 576),
        # Indexer key 128 + one float32 scale = 132; bf16 latent 1152.
        (LatentAttention(128, 1536, 512, 128, 64, 128, 64, 128, 2048), "bf16", 8, 1284),
        # fp8 latent 512, four float32 scales, bf16 rotary key 128: 656.
        (LatentAttention(128, 1536, 512, 128, 64, 128, 64, 128, 2048), "fp8", 8, 788),
    ],
)
def test_bytes_of_a_token(
    mixer: Attention | LatentAttention, kv_dtype: str, tp: int, expected: int
) -> None:
    """Each kind of attention, worked by hand."""
    assert token_bytes(mixer, kv_dtype, tp) == expected


@pytest.mark.parametrize(
    ("mixer", "dtype", "tp", "expected"),
    [
        # Qwen3.5-35B-A3B: convolution (2 * 16 * 128 + 32 * 128) * 3 * 2 = 49,152; 32 heads of
        # 128 x 128 in float32 = 2,097,152.
        (GatedDeltaNet(16, 32, 128, 128, 4), "fp32", 1, 2_146_304),
        (GatedDeltaNet(16, 32, 128, 128, 4), "fp32", 4, 536_576),
        (GatedDeltaNet(16, 32, 128, 128, 4), "bf16", 1, 1_097_728),
        # Nemotron Nano 9B v2: (128 * 80 + 2 * 8 * 128) * 3 * 2 = 73,728; 10,240 * 128 * 2.
        (Mamba2(128, 80, 128, 8, 4), "bf16", 1, 2_695_168),
        # On 16 ranks each keeps a whole group: (640 + 2 * 128) * 3 * 2 = 5376; 640 * 128 * 4.
        (Mamba2(128, 80, 128, 8, 4), "fp32", 16, 333_056),
    ],
)
def test_bytes_of_a_state(
    mixer: GatedDeltaNet | Mamba2, dtype: str, tp: int, expected: int
) -> None:
    """Recurrent states, worked by hand."""
    assert state_bytes(mixer, dtype, tp) == expected


def test_a_dense_model_takes_one_page_per_block() -> None:
    """One group: 16 tokens of all layers."""
    layout = kv_layout(LLAMA_8B, 1, 16, "fp32")
    assert layout == KvLayout(block_tokens=16, page_bytes=16 * 131_072, growing=1)
    assert [layout.pages(tokens) for tokens in (0, 1, 16, 17, 4096)] == [0, 1, 1, 2, 256]


def test_latent_attention_keeps_one_group_with_its_indexer() -> None:
    """All layers keep every token, whatever they keep of it; the kernels take blocks of 64."""
    assert kv_layout(DEEPSEEK_R1, 8, 16, "fp32") == KvLayout(64, 64 * 61 * 1152, 1)
    assert kv_layout(DEEPSEEK_V32, 8, 16, "fp32") == KvLayout(64, 64 * 61 * 1284, 1)


def test_windows_hold_no_more_than_they_see() -> None:
    """gpt-oss: as many windowed layers as full ones, one group each."""
    layout = kv_layout(gpt_oss(36, 128), 1, 16, "fp32")
    # A page: 16 tokens * 18 layers * 8 heads * 128 * 2 bytes. 127 tokens before the next one lie
    # in at most 8 blocks, the next one in a ninth.
    assert layout == KvLayout(16, 589_824, growing=1, windowed=1, window_blocks=9)
    assert [layout.pages(tokens) for tokens in (16, 144, 145, 1600)] == [2, 18, 19, 109]


def test_a_model_of_windows_alone() -> None:
    """One group that stops growing."""
    layer = Layer(Attention(32, 8, 128, 128, window_tokens=4096), None)
    model = ModelShape("windows", (layer,) * 32, 4096, 32000, False, 32768)
    layout = kv_layout(model, 1, 16, "fp32")
    assert layout == KvLayout(16, 16 * 131_072, growing=0, windowed=1, window_blocks=257)
    assert layout.pages(32_768) == layout.pages(4112) == 257
    assert kv_bytes_per_token(model, 1) == 0


def test_a_model_of_states_alone() -> None:
    """One page per sequence, whatever its length."""
    model = replace(NEMOTRON_NANO_9B, layers=NEMOTRON_NANO_9B.layers[:27])
    layout = kv_layout(model, 1, 16, "bf16")
    assert layout == KvLayout(16, 27 * 2_695_168, growing=0, fixed=1)
    assert layout.pages(1) == layout.pages(100_000) == 1


def test_attention_pages_grow_to_a_recurrent_state() -> None:
    """Three linear layers to each full one: four groups that share one page size."""
    layout = kv_layout(qwen35(10, 2048, 2, 32, "bf16"), 1, 16, "fp32")
    # A state of 2,146,304 bytes takes 1048 tokens of 2048 bytes: 1056 in blocks of 16.
    assert layout == KvLayout(1056, 10 * 1056 * 2048, growing=1, fixed=3)
    assert [layout.pages(tokens) for tokens in (1, 1056, 1057)] == [4, 4, 5]


def test_the_last_group_is_padded() -> None:
    """27 state-space layers in groups of 4, the count of attention layers: seven groups."""
    assert kv_layout(NEMOTRON_NANO_9B, 1, 16, "bf16").fixed == 7


@pytest.mark.parametrize(("windowed", "groups", "layers"), [(14, 1, 14), (15, 2, 10)])
def test_nearly_equal_counts_are_padded_to_the_larger(
    windowed: int, groups: int, layers: int
) -> None:
    """Below one and a half times ten full layers the full group is padded."""
    full, window = Attention(8, 8, 64, 64), Attention(8, 8, 64, 64, window_tokens=100)
    kinds = (Layer(full, None),) * 10 + (Layer(window, None),) * windowed
    model = ModelShape("m", kinds, 512, 1000, False, 4096)
    layout = kv_layout(model, 1, 16, "fp32")
    assert layout == KvLayout(16, layers * 16 * 2048, 1, windowed=groups, window_blocks=8)


def test_layers_of_fewer_bytes_take_more_tokens_to_a_page() -> None:
    """Gemma 4: global layers keep half the bytes of windowed ones, so 32 tokens to their 16."""
    # Groups of 5 layers: one global, five windowed, which take two pages per 32 tokens. A window
    # of 1024 lies in 65 blocks of 16, rounded up to 33 of 32.
    layout = kv_layout(GEMMA4_26B, 1, 16, "fp32")
    assert layout == KvLayout(32, 5 * 16 * 8192, growing=1, windowed=10, window_blocks=33)
    assert kv_bytes_per_token(GEMMA4_26B, 1) == 5 * 4096


def test_replication_can_level_kinds_of_attention() -> None:
    """On 8 ranks either kind of MiMo-V2-Flash has one KV head, so blocks are alike."""
    layout = kv_layout(mimo_v2_flash(128), 8, 16, "fp32")
    assert layout == KvLayout(16, 9 * 16 * 640, growing=1, windowed=5, window_blocks=9)


def test_pages_that_do_not_divide_are_padded() -> None:
    """Three KV heads beside two: both take 16 tokens, the smaller page is padded."""
    kinds = (Layer(Attention(6, 3, 64, 64), None), Layer(Attention(6, 2, 64, 64, 64), None))
    model = ModelShape("m", kinds, 384, 1000, False, 4096)
    assert kv_layout(model, 1, 16, "fp32") == KvLayout(16, 16 * 768, 1, 1, 5)
