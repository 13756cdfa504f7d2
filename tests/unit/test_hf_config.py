"""Model shapes from config.json files and from the catalogue."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from planner.io.hf_config import catalogue_names, read_model
from planner.io.models import catalogue
from planner.io.models.families import FAMILIES
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

if TYPE_CHECKING:
    from collections.abc import Callable

QWEN3_8B = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

SHARED_MODELS = Path(__file__).parents[3] / "shared" / "data" / "models"
"""Config files as published, which are not part of the project."""

FULL_CONFIGS = sorted(
    path
    for path in SHARED_MODELS.glob("*.json")
    if not path.name.endswith((".litgpt.json", ".fixture.json"))
    and not path.name.startswith("llm-analysis--")
)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., ModelShape]:
    """Write a config.json that differs from Qwen3-8B's as told, and read it."""

    def write_and_read(changes: dict[str, Any], **options: Any) -> ModelShape:
        config = {**QWEN3_8B, **changes}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return read_model("config.json", base_dir=tmp_path, **options)

    return write_and_read


@pytest.fixture
def read_like(tmp_path: Path) -> Callable[..., ModelShape]:
    """Write a catalogue entry's config with changes, and read it."""

    def write_and_read(name: str, changes: dict[str, Any], **options: Any) -> ModelShape:
        entry = catalogue.find(name)
        assert entry is not None
        (tmp_path / "config.json").write_text(json.dumps({**entry["config"], **changes}))
        return read_model("config.json", base_dir=tmp_path, **options)

    return write_and_read


def mixers(shape: ModelShape) -> list[Any]:
    """Mixer of each layer, whatever its kind."""
    return [layer.mixer for layer in shape.layers]


def ffns(shape: ModelShape) -> list[Any]:
    """Feed-forward part of each layer, whatever its kind."""
    return [layer.ffn for layer in shape.layers]


def test_shape_of_a_config(read: Callable[..., ModelShape]) -> None:
    """Every field of the shape comes from the field of the config that means it."""
    layer = Layer(mixer=Attention(32, 8, 128, 128, vector_params=2 * 128), ffn=Mlp(12288), norms=2)
    assert read({"tie_word_embeddings": True}) == ModelShape(
        name="config.json",
        layers=(layer,) * 36,
        hidden_size=4096,
        vocab_size=151936,
        tie_word_embeddings=True,
        max_position_embeddings=40960,
        weight_dtype="bf16",
        kv_dtype="bf16",
    )


def test_catalogue_agrees_with_the_config(read: Callable[..., ModelShape]) -> None:
    """The catalogue's entry and the checkpoint's own file give the same shape."""
    named = read_model("Qwen/Qwen3-8B")
    assert replace(read({}), name=named.name) == named


@pytest.mark.parametrize("name", catalogue_names())
def test_catalogue_entries_are_consistent(name: str) -> None:
    """Each name reads, under that name, as a shape that eight ranks can share or replicate."""
    shape = read_model(name, kv_cache_dtype="bf16")
    assert shape.name == name
    assert shape.max_position_embeddings >= 2048
    for layer in shape.layer_counts:
        assert layer.mixer is not None or layer.ffn is not None
        if isinstance(layer.mixer, Attention):
            assert layer.mixer.num_heads % layer.mixer.num_kv_heads == 0


def test_catalogue_is_large_and_sourced() -> None:
    """At least 40 models, each with where its facts are from."""
    assert len(catalogue.entries()) >= 40
    assert all(entry["source"] for entry in catalogue.entries())
    names = [name.lower() for name in catalogue_names()]
    assert len(set(names)) == len(names)


@pytest.mark.skipif(not FULL_CONFIGS, reason="../shared/data/models is not there")
def test_published_configs_are_read() -> None:
    """Every config as published gives the shape of its catalogue entry, where there is one."""
    vision = ("Llama-4",)  # the files there lack the vision tower
    for path in FULL_CONFIGS:
        shape = read_model(str(path))
        name = path.stem.replace("--", "/")
        if name.startswith("nvidia/NVIDIA-Nemotron-3-Super"):
            name = name.replace("FP8", "BF16")  # the file states no quantisation
        named = read_model(name)
        if any(part in name for part in vision):
            named = replace(named, other_params=0)
        assert replace(shape, name=named.name) == named, path.name
    assert len(FULL_CONFIGS) == 39


@pytest.mark.parametrize(
    "spelling", ["meta-llama/Llama-3.1-70B-Instruct", "Llama-3.1-70B-Instruct", "llama-3.1-70B"]
)
def test_catalogue_spellings(spelling: str) -> None:
    """The organisation may be left out, and case does not matter."""
    assert read_model(spelling).num_layers == 80


def test_families_differ_in_bias_and_norm(read: Callable[..., ModelShape]) -> None:
    """Qwen2 has q, k, v biases whatever its config says; Qwen3 normalises q and k."""
    flags = {
        family: (mixer.qkv_bias, mixer.output_bias, mixer.vector_params)
        for family in ("llama", "mistral", "qwen2", "qwen3", "phi3")
        for mixer in mixers(read({"model_type": family}))[:1]
    }
    assert flags == {
        "llama": (False, False, 0),
        "mistral": (False, False, 0),
        "qwen2": (True, False, 0),
        "qwen3": (False, False, 256),
        "phi3": (False, False, 0),
    }
    biased = mixers(read({"model_type": "llama", "attention_bias": True}))[0]
    assert (biased.qkv_bias, biased.output_bias) == (True, True)


def test_absent_fields_have_their_meaning(read: Callable[..., ModelShape]) -> None:
    """No KV heads means as many as heads, and no head_dim means hidden over heads."""
    shape = read({"num_key_value_heads": None, "head_dim": None, "hidden_size": 2048})
    assert mixers(shape)[0] == Attention(32, 32, 64, 64, vector_params=128)


def test_experts_beside_dense_layers(read_like: Callable[..., ModelShape]) -> None:
    """DeepSeek's first layers, and those that Qwen names, are dense."""
    kinds = [type(ffn) for ffn in ffns(read_model("DeepSeek-V3"))]
    assert kinds == [Mlp] * 3 + [Experts] * 58
    shape = read_like("Qwen3-30B-A3B", {"mlp_only_layers": [5], "decoder_sparse_step": 2})
    assert [i for i, ffn in enumerate(ffns(shape)) if isinstance(ffn, Experts)] == [
        i for i in range(48) if i % 2 and i != 5
    ]
    assert ffns(read_model("DeepSeek-V3"))[3] == Experts(
        256, 8, 2048, 2048, router_params=256, dtype="fp8_block", shared_dtype="fp8_block"
    )


def test_latent_attention_with_and_without_an_indexer() -> None:
    """V2-Lite projects queries directly; V3.2 and GLM-5 add the indexer."""
    assert mixers(read_model("DeepSeek-V2-Lite"))[0] == LatentAttention(16, 0, 512, 128, 64, 128)
    glm = mixers(read_model("GLM-5"))[0]
    assert glm == LatentAttention(64, 2048, 512, 192, 64, 256, 32, 128, 2048)
    assert mixers(read_model("DeepSeek-V3.2"))[0].index_topk == 2048


def test_windows_by_layer() -> None:
    """Which layers are windowed, and how wide, in each family that has windows."""
    windows = {
        name: [mixer.window_tokens for mixer in mixers(read_model(name))[:8]]
        for name in (
            "gpt-oss-20b",
            "gemma-2-9b",
            "gemma-3-4b-it",
            "MiMo-V2-Flash",
            "gemma-4-26B-A4B",
        )
    }
    assert windows == {
        "gpt-oss-20b": [128, 0] * 4,
        "gemma-2-9b": [4096, 0] * 4,
        "gemma-3-4b-it": [1024] * 5 + [0] + [1024] * 2,
        "MiMo-V2-Flash": [0] + [128] * 4 + [0] + [128] * 2,
        "gemma-4-26B-A4B": [1024] * 5 + [0] + [1024] * 2,
    }
    scout = mixers(read_model("Llama-4-Scout-17B-16E-Instruct", max_model_len=100_000))
    assert [mixer.window_tokens for mixer in scout[:4]] == [8192, 8192, 8192, 0]


def test_layers_of_two_kinds_of_heads() -> None:
    """MiMo's and gemma 4's windowed layers have KV heads and widths of their own."""
    mimo = mixers(read_model("MiMo-V2-Flash"))
    assert mimo[0] == Attention(64, 4, 192, 128, dtype="fp8_block")
    assert mimo[1] == Attention(
        64, 8, 192, 128, window_tokens=128, vector_params=64, dtype="fp8_block"
    )
    gemma = mixers(read_model("gemma-4-26B-A4B"))
    assert (gemma[0].num_kv_heads, gemma[0].head_dim, gemma[0].values_are_keys) == (8, 256, False)
    assert (gemma[5].num_kv_heads, gemma[5].head_dim, gemma[5].values_are_keys) == (2, 512, True)


def test_recurrent_layers() -> None:
    """Qwen3.5 and Nemotron 3 mix recurrent layers with attention in their own patterns."""
    qwen = mixers(read_model("Qwen3.5-35B-A3B"))
    assert [type(m) for m in qwen[:4]] == [GatedDeltaNet] * 3 + [Attention]
    assert qwen[0] == GatedDeltaNet(16, 32, 128, 128, 4)
    assert qwen[3].gated
    nemotron = read_model("NVIDIA-Nemotron-3-Super-120B-A12B-BF16").layers
    assert [type(layer.mixer or layer.ffn) for layer in nemotron[:9]] == [
        *[Mamba2, Experts] * 3,
        Mamba2,
        Attention,
        Experts,
    ]
    assert nemotron[0].mixer == Mamba2(128, 64, 128, 8, 4)
    experts = nemotron[1].ffn
    assert isinstance(experts, Experts)
    assert (experts.latent_size, experts.gated, experts.top_k) == (1024, False, 22)


def test_blocks_of_their_own_width() -> None:
    """Nemotron-NAS drops the attention of some layers and narrows the networks of others."""
    shape = read_model("Llama-3_3-Nemotron-Super-49B-v1")
    assert shape.layers[0] == Layer(Attention(64, 8, 128, 128), Mlp(14336))
    assert shape.layers[6] == Layer(None, Mlp(14336), norms=1)
    assert sum(layer.mixer is None for layer in shape.layers) == 31


@pytest.mark.parametrize(
    ("rope", "expected_tokens"),
    [
        (None, 40960),
        ({"rope_type": "llama3", "factor": 8.0}, 40960),
        ({"type": "linear", "factor": 2.0}, 81920),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
    ],
)
def test_longest_context(
    read: Callable[..., ModelShape], rope: dict[str, Any] | None, expected_tokens: int
) -> None:
    """Position scaling lengthens the context as it does in the engine, llama3's excepted."""
    assert read({"rope_scaling": rope}).max_position_embeddings == expected_tokens
    assert read({"rope_parameters": rope}).max_position_embeddings == expected_tokens


def test_sliding_window_matters_only_beyond_it(read: Callable[..., ModelShape]) -> None:
    """A window no shorter than the longest request is no window."""
    config = {"model_type": "mistral", "sliding_window": 4096}
    assert mixers(read(config, max_model_len=4096))[0].window_tokens == 0
    assert mixers(read(config, max_model_len=4097))[0].window_tokens == 4096
    assert mixers(read(config))[0].window_tokens == 4096


def test_sliding_windows_of_qwen(read: Callable[..., ModelShape]) -> None:
    """Qwen states a window that it rarely uses, and then from one layer on."""
    config = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 30}
    assert {m.window_tokens for m in mixers(read(config))} == {0}
    used = mixers(read({**config, "use_sliding_window": True}))
    assert [m.window_tokens for m in used] == [0] * 30 + [4096] * 6
    types = ["full_attention", "sliding_attention"] * 18
    listed = mixers(read({**config, "layer_types": types}))
    assert [m.window_tokens for m in listed] == [0, 4096] * 18


def test_vision_towers_are_loaded(read_like: Callable[..., ModelShape]) -> None:
    """Their parameters stand beside the decoder's; without vision_config there are none."""
    assert read_model("gemma-3-27b-it").other_params == 423_060_336
    assert read_like("gemma-3-27b-it", {"vision_config": None}).other_params == 0


def test_folder_of_a_checkpoint(read: Callable[..., ModelShape], tmp_path: Path) -> None:
    """A folder stands for the config.json in it, and gives the model its name."""
    read({})
    folder = tmp_path / "my-model"
    folder.mkdir()
    (tmp_path / "config.json").rename(folder / "config.json")
    for spelling in ("my-model", "./my-model", str(folder)):
        assert read_model(spelling, base_dir=tmp_path).name == "my-model"


def test_every_family_has_an_entry() -> None:
    """Each reader is exercised by a catalogued model, or shares one that is."""
    used = {FAMILIES[entry["config"]["model_type"]].read for entry in catalogue.entries()}
    unused = {name for name, family in FAMILIES.items() if family.read not in used}
    assert unused == {"qwen2_moe", "qwen3_5", "qwen3_5_text"}
