"""Weights of a model: published parameter counts, the split over ranks, and their bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.io.hf_config import read_model
from planner.io.models import catalogue
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
from simulator.plan import Shape
from simulator.units import GIB
from simulator.weights import (
    active_parameter_count,
    layer_weights,
    outer_weights,
    parameter_count,
    weight_bytes_per_rank,
)

BF16 = 2

PUBLISHED = {
    entry["name"]: entry["published_params"]["billions"]
    for entry in catalogue.entries()
    if "published_params" in entry
}


def model(layer: Layer, **changes: object) -> ModelShape:
    """One layer between an embedding and a head of 1,000 rows, hidden width 64."""
    shape = ModelShape(
        "m", (layer,), 64, 1000, tie_word_embeddings=False, max_position_embeddings=8
    )
    return replace(shape, **changes)  # type: ignore[arg-type]


def bytes_by_name(shape: ModelShape, tp: int = 1) -> dict[str, float]:
    """Bytes of each weight of the first layer on one rank."""
    return {w.name: w.num_bytes for w in layer_weights(shape, shape.layers[0], Shape(tp))}


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_parameters_are_those_published(name: str, billions: float) -> None:
    """Within 1 % of the figure and its source in the catalogue."""
    parameters = parameter_count(read_model(name, kv_cache_dtype="bf16"))
    assert parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_most_of_the_catalogue_is_checked() -> None:
    """A new entry comes with a published figure, unless none is known."""
    assert len(PUBLISHED) >= len(catalogue.entries()) - 2


@pytest.mark.parametrize(
    ("name", "billions", "counts_embedding"),
    [
        ("Mixtral-8x7B-v0.1", 12.9, True),  # Mistral's announcement
        ("Mixtral-8x22B-v0.1", 39.0, True),  # Mistral's announcement
        ("Qwen3-30B-A3B", 3.3, True),  # model card
        ("Qwen3-235B-A22B", 22.0, True),  # model card
        ("Qwen3-Coder-480B-A35B-Instruct", 35.0, True),  # model card
        ("DeepSeek-V3", 36.7, False),  # README_WEIGHTS.md of the checkpoint; 37B rounded up
        ("DeepSeek-V2", 21.0, False),  # arXiv 2405.04434
        ("DeepSeek-V2-Lite", 2.4, False),  # arXiv 2405.04434, appendix B
        ("Kimi-K2-Instruct", 32.0, False),  # model card
        ("gpt-oss-120b", 5.13, False),  # arXiv 2508.10925, table 1, which says so
        ("gpt-oss-20b", 3.61, False),  # arXiv 2508.10925, table 1
        ("Llama-4-Scout-17B-16E-Instruct", 17.0, True),  # model card
        ("Llama-4-Maverick-17B-128E-Instruct", 17.0, True),  # model card
        ("gemma-4-26B-A4B", 3.8, False),  # model card
        ("GLM-5", 40.0, False),  # model card
        ("MiMo-V2-Flash", 15.0, False),  # model card
        ("NVIDIA-Nemotron-3-Super-120B-A12B-BF16", 12.1, False),  # technical report, says so
        ("NVIDIA-Nemotron-3-Super-120B-A12B-BF16", 12.7, True),  # technical report, says so
        ("Qwen3.5-397B-A17B", 17.0, True),  # model card
    ],
)
def test_active_parameters(name: str, billions: float, counts_embedding: bool) -> None:
    """Within 5 % of the publisher's figure, the input embedding counted as the publisher does."""
    shape = read_model(name)
    embedding = shape.vocab_size * shape.hidden_size
    if shape.tie_word_embeddings or not counts_embedding:
        embedding = 0
    assert (active_parameter_count(shape) + embedding) / 1e9 == pytest.approx(billions, rel=0.05)


@pytest.mark.parametrize(("name", "gib"), [("gpt-oss-120b", 60.8), ("gpt-oss-20b", 12.8)])
def test_bytes_of_a_quantised_checkpoint(name: str, gib: float) -> None:
    """Experts at 4.25 bits and the rest in bf16 give the sizes of arXiv 2508.10925, table 1."""
    shape = read_model(name)
    weights = [w for layer in shape.layers for w in layer_weights(shape, layer)]
    stored = sum(w.num_bytes for w in [*weights, *outer_weights(shape)] if not w.is_copy)
    assert stored / GIB == pytest.approx(gib, rel=0.005)


def test_padded_experts_take_what_the_engine_prints() -> None:
    """Issue 23278 of vLLM: the weights of gpt-oss-120b on one device take 65.97 GiB."""
    taken = weight_bytes_per_rank(read_model("gpt-oss-120b"), Shape(1)) / GIB
    assert taken == pytest.approx(65.97, rel=0.005)


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen2.5-7B-Instruct", "Qwen3-8B"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_dense_formula(name: str, dtype: str, tp: int) -> None:
    """A dense decoder agrees with one closed formula: projections cut, norms whole."""
    shape = read_model(name, weight_dtype=dtype)
    mixer, ffn = shape.layers[0].mixer, shape.layers[0].ffn
    assert isinstance(mixer, Attention)
    assert isinstance(ffn, Mlp)
    q_width = mixer.num_heads // tp * mixer.head_dim
    kv_width = max(1, mixer.num_kv_heads // tp) * mixer.head_dim
    rows = 2 * q_width + 2 * kv_width + 3 * (ffn.intermediate_size // tp)
    vectors = 2 * shape.hidden_size + mixer.vector_params
    vectors += q_width + 2 * kv_width if mixer.qkv_bias else 0
    layer = rows * shape.hidden_size * (1 if dtype == "fp8" else BF16) + vectors * BF16
    outer = 2 * -(-shape.vocab_size // tp) * shape.hidden_size + shape.hidden_size
    assert weight_bytes_per_rank(shape, Shape(tp)) == shape.num_layers * layer + outer * BF16


def test_latent_attention_of_one_layer() -> None:
    """DeepSeek-V3's attention, by hand, on one rank of 8."""
    layer = Layer(LatentAttention(128, 1536, 512, 128, 64, 128, dtype="fp8"), None, norms=1)
    found = bytes_by_name(model(layer, hidden_size=7168), 8)
    assert found == {
        "down": 7168 * (1536 + 512 + 64),  # whole on every rank
        "query up": 1536 * 16 * (128 + 64),
        "key and value up": 512 * 16 * (128 + 128),
        "absorbed key and value up": 512 * 16 * (128 + 128) * BF16,
        "output": 16 * 128 * 7168,
        "latent norms": (1536 + 512) * BF16,
        "norms": 7168 * BF16,
    }


def test_copies_take_memory_and_are_no_parameters() -> None:
    """The absorbed projection of latent attention is counted in bytes only."""
    mixer = LatentAttention(4, 0, 32, 16, 8, 16)
    shape = model(Layer(mixer, None, norms=0))
    parameters = 64 * (32 + 8) + 64 * 4 * 24 + 32 * 4 * 32 + 4 * 16 * 64 + 32 + 2 * 64_000 + 64
    assert parameter_count(shape) == parameters
    assert weight_bytes_per_rank(shape, Shape(1)) == BF16 * (parameters + 32 * 4 * 32)


def test_values_that_are_keys() -> None:
    """Without a value projection the parameters shrink and the engine's memory does not."""
    plain = model(Layer(Attention(4, 2, 16, 16), None))
    shared = model(Layer(Attention(4, 2, 16, 16, values_are_keys=True), None))
    assert parameter_count(plain) - parameter_count(shared) == 64 * 2 * 16
    assert weight_bytes_per_rank(plain, Shape(2)) == weight_bytes_per_rank(shared, Shape(2))


def test_attention_with_its_options() -> None:
    """Gate, narrower values, biases and sinks of one layer, by hand."""
    mixer = Attention(
        4, 2, 16, 8, gated=True, qkv_bias=True, output_bias=True, vector_params=4, dtype="bf16"
    )
    found = bytes_by_name(model(Layer(mixer, None, norms=2)))
    q, k, v = 2 * 4 * 16, 2 * 16, 2 * 8
    assert found == {
        "qkv": 64 * (q + k + v) * BF16,
        "output": 4 * 8 * 64 * BF16,
        "qkv bias": (q + k + v) * BF16,
        "output bias": 64 * BF16,
        "vectors": 4 * BF16,
        "norms": 2 * 64 * BF16,
    }


def test_experts_of_one_layer() -> None:
    """Every routed expert is cut over the ranks; router, gate and latent projections are not."""
    ffn = Experts(
        8, 2, 32, 48, shared_gate=True, gated=False, bias=True, latent_size=16, router_params=8,
        dtype="int4_g32", shared_dtype="fp8",
    )  # fmt: skip
    found = bytes_by_name(model(Layer(None, ffn, norms=0)), 2)
    assert found == {
        "router": (64 * 8 + 8) * BF16,
        "experts": 8 * 2 * 16 * 16 * (0.5 + 2 / 32),
        "experts bias": 8 * (16 + 16) * BF16,
        "shared experts": 2 * 64 * 24,
        "shared experts bias": (24 + 64) * BF16,
        "shared gate": 64 * BF16,
        "latent": 2 * 64 * 16 * BF16,
    }


def test_recurrent_layers() -> None:
    """Gated delta net and Mamba-2 on one of two ranks; decays are float32."""
    delta = bytes_by_name(model(Layer(GatedDeltaNet(2, 4, 8, 16, 4), None, norms=0)), 2)
    keys, values = 8, 2 * 16
    assert delta == {
        "qkvz": 64 * 2 * (keys + values) * BF16,
        "ba": 64 * 2 * 2 * BF16,
        "convolution": (2 * keys + values) * 4 * BF16,
        "decay": 2 * 4,
        "step bias": 2 * BF16,
        "gated norm": 16 * BF16,
        "output": values * 64 * BF16,
    }
    mamba = bytes_by_name(model(Layer(Mamba2(4, 16, 8, 2, 4), None, norms=0)), 2)
    width, state = 2 * 16, 2 * 8
    assert mamba == {
        "input": 64 * (2 * width + state + 2) * BF16,
        "convolution": (width + state) * (4 + 1) * BF16,
        "decay": 2 * 4,
        "skip and step bias": 2 * 2 * BF16,
        "gated norm": width * BF16,
        "output": width * 64 * BF16,
    }


def test_outside_the_layers() -> None:
    """The vocabulary is padded to whole rows per rank, and a tied head is stored once."""
    shape = model(Layer(None, None, norms=0), vocab_size=1001, other_params=7)
    found = {w.name: w.elements for w in outer_weights(shape, Shape(2))}
    assert found == {"embedding": 501 * 64, "head": 501 * 64, "last norm": 64, "other": 4}
    assert parameter_count(shape) - parameter_count(replace(shape, tie_word_embeddings=True)) == (
        1001 * 64
    )
