"""Model shapes that the memory tests share, by hand from the published configurations."""

from __future__ import annotations

from simulator.device import Device
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
from simulator.units import GIB


def device(memory_gib: float) -> Device:
    """A device of which only the memory matters."""
    return Device("d", int(memory_gib * GIB), 1.0, 1.0, 1.0, 1.0, 8, 0.0, 1.0, None)


def dense(
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate: int,
    vocab: int,
    *,
    tied: bool = False,
    bias: bool = False,
    qk_norm: bool = False,
    dtype: str = "bf16",
) -> ModelShape:
    """A dense model of equal layers."""
    mixer = Attention(
        heads,
        kv_heads,
        head_dim,
        head_dim,
        qkv_bias=bias,
        vector_params=2 * head_dim if qk_norm else 0,
        dtype=dtype,
    )
    layer = Layer(mixer, Mlp(intermediate, dtype=dtype))
    return ModelShape("dense", (layer,) * layers, hidden, vocab, tied, 131072, dtype)


LLAMA_8B = dense(32, 4096, 32, 8, 128, 14336, 128256)
LLAMA_70B = dense(80, 8192, 64, 8, 128, 28672, 128256)
LLAMA_70B_FP8 = dense(80, 8192, 64, 8, 128, 28672, 128256, dtype="fp8")
LLAMA_1B = dense(16, 2048, 32, 8, 64, 8192, 128256, tied=True)
QWEN2_7B = dense(28, 3584, 28, 4, 128, 18944, 152064, bias=True)
QWEN2_32B = dense(64, 5120, 40, 8, 128, 27648, 152064, bias=True)
QWEN3_06B = dense(28, 1024, 16, 8, 128, 3072, 151936, tied=True, qk_norm=True)
QWEN3_17B = dense(28, 2048, 16, 8, 128, 6144, 151936, tied=True, qk_norm=True)
QWEN3_8B = dense(36, 4096, 32, 8, 128, 12288, 151936, qk_norm=True)
QWEN3_32B = dense(64, 5120, 64, 8, 128, 25600, 151936, qk_norm=True)


def _moe(layers: int, hidden: int, mixer: Attention, ffn: Experts, vocab: int) -> ModelShape:
    return ModelShape("moe", (Layer(mixer, ffn),) * layers, hidden, vocab, False, 131072, ffn.dtype)


QWEN3_235B_FP8 = _moe(
    94,
    4096,
    Attention(64, 4, 128, 128, vector_params=256, dtype="fp8_block"),
    Experts(128, 8, 1536, dtype="fp8_block"),
    151936,
)
MINIMAX_M2 = _moe(
    62, 3072, Attention(48, 8, 128, 128), Experts(256, 8, 1536, dtype="fp8_block"), 200064
)


def gpt_oss(layers: int, experts: int) -> ModelShape:
    """gpt-oss: every other layer has a window of 128 tokens, experts are MXFP4."""
    ffn = Experts(experts, 4, 2880, bias=True, router_params=experts, dtype="mxfp4")
    kinds = [
        Layer(
            Attention(64, 8, 64, 64, window, qkv_bias=True, output_bias=True, vector_params=64), ffn
        )
        for window in (128, 0)
    ]
    return ModelShape("gpt-oss", tuple(kinds) * (layers // 2), 2880, 201088, False, 131072, "mxfp4")


def _deepseek(
    mixer: LatentAttention, experts: Experts, dense_layers: int, vocab: int
) -> ModelShape:
    first = Layer(mixer, Mlp(18432, dtype=mixer.dtype))
    rest = Layer(mixer, experts)
    layers = (first,) * dense_layers + (rest,) * (61 - dense_layers)
    return ModelShape("latent", layers, 7168, vocab, False, 131072, experts.dtype)


DEEPSEEK_R1 = _deepseek(
    LatentAttention(128, 1536, 512, 128, 64, 128, dtype="fp8_block"),
    Experts(256, 8, 2048, 2048, router_params=256, dtype="fp8_block", shared_dtype="fp8_block"),
    3,
    129280,
)
DEEPSEEK_V32 = _deepseek(
    LatentAttention(128, 1536, 512, 128, 64, 128, 64, 128, 2048, dtype="fp8_block"),
    Experts(256, 8, 2048, 2048, router_params=256, dtype="fp8_block", shared_dtype="fp8_block"),
    3,
    129280,
)
KIMI_K2_INT4 = _deepseek(
    LatentAttention(64, 1536, 512, 128, 64, 128),
    Experts(384, 8, 2048, 2048, router_params=384, dtype="int4_g32"),
    1,
    163840,
)


def qwen35(full_layers: int, hidden: int, kv_heads: int, value_heads: int, kv: str) -> ModelShape:
    """Qwen3.5: three gated delta nets to each full attention."""
    ffn = Mlp(4096)
    linear = Layer(GatedDeltaNet(16, value_heads, 128, 128, 4), ffn)
    full = Layer(Attention(16, kv_heads, 256, 256, gated=True), ffn)
    layers = (linear, linear, linear, full) * full_layers
    return ModelShape("qwen3.5", layers, hidden, 248320, False, 262144, kv_dtype=kv)


NEMOTRON_NANO_9B = ModelShape(
    "nemotron",
    (Layer(Mamba2(128, 80, 128, 8, 4), None, 1),) * 27
    + (Layer(Attention(40, 8, 128, 128), None, 1),) * 4
    + (Layer(None, Mlp(15680, gated=False), 1),) * 25,
    4480,
    131072,
    False,
    131072,
)
GEMMA4_26B = ModelShape(
    "gemma 4",
    (
        *(Layer(Attention(16, 8, 256, 256, 1024), Mlp(2112)),) * 5,
        Layer(Attention(16, 2, 512, 512, values_are_keys=True), Mlp(2112)),
    )
    * 5,
    2816,
    262144,
    True,
    262144,
)


def mimo_v2_flash(window_tokens: int) -> ModelShape:
    """MiMo-V2-Flash's attention: 39 windowed layers of 8 KV heads, 9 full ones of 4."""
    ffn = Mlp(2048)
    windowed = Layer(Attention(64, 8, 192, 128, window_tokens), ffn)
    full = Layer(Attention(64, 4, 192, 128), ffn)
    return ModelShape("mimo", (windowed,) * 39 + (full,) * 9, 4096, 152576, False, 262144)
