"""Model shapes from config.json files and from the catalogue."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest

from planner.errors import InputError
from planner.io.hf_config import catalogue_names, read_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from simulator.model import ModelShape

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


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., ModelShape]:
    """Write a config.json that differs from Qwen3-8B's as told, and read it."""

    def write_and_read(changes: dict[str, Any], **options: Any) -> ModelShape:
        config = {**QWEN3_8B, **changes}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return read_model("config.json", base_dir=tmp_path, **options)

    return write_and_read


def test_shape_of_a_config(read: Callable[..., ModelShape]) -> None:
    """Every field of the shape comes from the field of the config that means it."""
    shape = read({"tie_word_embeddings": True})
    assert dataclasses.asdict(shape) == {
        "name": "config.json",
        "num_layers": 36,
        "hidden_size": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "qkv_bias": False,
        "qk_norm": True,
        "max_position_embeddings": 40960,
        "weight_dtype": "bf16",
        "kv_dtype": "bf16",
    }


def test_catalogue_agrees_with_the_config(read: Callable[..., ModelShape]) -> None:
    """The catalogue's entry and the checkpoint's own file give the same shape."""
    named = read_model("Qwen/Qwen3-8B")
    assert dataclasses.replace(read({}), name=named.name) == named


@pytest.mark.parametrize("name", catalogue_names())
def test_catalogue_entries_are_consistent(name: str) -> None:
    """Each name reads, under that name, as a shape whose heads divide."""
    shape = read_model(name)
    assert shape.name == name
    assert shape.num_heads % shape.num_kv_heads == 0
    assert shape.head_dim in (64, 128, 256)
    assert shape.hidden_size % 128 == 0


@pytest.mark.parametrize(
    ("name", "billions"),
    [  # parameters as their publishers state them, and well known
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03),
        ("meta-llama/Llama-3.1-70B-Instruct", 70.55),
        ("meta-llama/Meta-Llama-3.1-405B", 405.85),
        ("Qwen/Qwen2.5-7B-Instruct", 7.62),
        ("Qwen/Qwen3-32B", 32.76),
        ("mistralai/Mistral-Nemo-Instruct-2407", 12.25),
    ],
)
def test_catalogue_parameter_counts(name: str, billions: float) -> None:
    """The parameters counted from a shape match the published number within 0.2 %."""
    m = read_model(name)
    q_width, kv_width = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
    per_layer = m.hidden_size * (2 * q_width + 2 * kv_width + 3 * m.intermediate_size)
    total = m.num_layers * per_layer + 2 * m.vocab_size * m.hidden_size
    assert total / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize(
    "spelling", ["meta-llama/Llama-3.1-70B-Instruct", "Llama-3.1-70B-Instruct", "llama-3.1-70B"]
)
def test_catalogue_spellings(spelling: str) -> None:
    """The organisation may be left out, and case does not matter."""
    assert read_model(spelling).num_layers == 80


def test_families_differ_in_bias_and_norm(read: Callable[..., ModelShape]) -> None:
    """Qwen2 has q, k, v biases whatever its config says; Qwen3 normalises q and k."""
    flags = {
        family: (shape.qkv_bias, shape.qk_norm)
        for family in ("llama", "mistral", "qwen2", "qwen3")
        for shape in [read({"model_type": family})]
    }
    assert flags == {
        "llama": (False, False),
        "mistral": (False, False),
        "qwen2": (True, False),
        "qwen3": (False, True),
    }
    assert read({"model_type": "llama", "attention_bias": True}).qkv_bias


def test_absent_fields_have_their_meaning(read: Callable[..., ModelShape]) -> None:
    """No KV heads means as many as heads, and no head_dim means hidden over heads."""
    shape = read({"num_key_value_heads": None, "head_dim": None, "hidden_size": 2048})
    assert (shape.num_kv_heads, shape.head_dim) == (32, 64)


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (None, None, "bf16"),
        (None, "fp8", "fp8"),  # the engine quantises while loading
        ("fp8", None, "fp8"),
        ("fp8", "fp8", "fp8"),
    ],
)
def test_weight_dtype(
    read: Callable[..., ModelShape], stored: str | None, asked: str | None, expected: str
) -> None:
    """Weights take the dtype asked for, else the checkpoint's."""
    config = {"quant_method": stored, "modules_to_not_convert": ["lm_head"]} if stored else None
    shape = read({"quantization_config": config}, weight_dtype=asked)
    assert shape.weight_dtype == expected


def test_weight_dtype_cannot_undo_quantisation(read: Callable[..., ModelShape]) -> None:
    """Asking for bf16 weights of an fp8 checkpoint is an error of the scenario."""
    with pytest.raises(InputError) as caught:
        read({"quantization_config": {"quant_method": "fp8"}}, weight_dtype="bf16", source="s.yaml")
    assert str(caught.value) == (
        "s.yaml: model.weight_dtype: 'bf16' contradicts config.json, whose weights are stored in"
        " fp8: leave it out"
    )


@pytest.mark.parametrize(
    ("asked", "expected"), [("auto", "bf16"), ("bf16", "bf16"), ("fp8", "fp8")]
)
def test_kv_cache_dtype(asked: str, expected: str) -> None:
    """``auto`` is bf16 for these models; other values are taken as they are."""
    assert read_model("Qwen/Qwen3-8B", kv_cache_dtype=asked).kv_dtype == expected


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
    """A window no shorter than the longest request changes nothing and is accepted."""
    config = {"model_type": "mistral", "sliding_window": 4096}
    assert read(config, max_model_len=4096).num_layers == 36
    with pytest.raises(InputError, match="sliding window"):
        read(config, max_model_len=4097)


def test_unused_sliding_window_is_ignored(read: Callable[..., ModelShape]) -> None:
    """Qwen states a window that it does not use; a layer that does use one is refused."""
    config = {"use_sliding_window": False, "sliding_window": 4096}
    assert read({**config, "layer_types": ["full_attention"] * 36}).num_layers == 36
    with pytest.raises(InputError, match="layer_types: sliding-window attention"):
        read({**config, "layer_types": ["full_attention", "sliding_attention"]})


def test_folder_of_a_checkpoint(read: Callable[..., ModelShape], tmp_path: Path) -> None:
    """A folder stands for the config.json in it, and gives the model its name."""
    read({})
    folder = tmp_path / "my-model"
    folder.mkdir()
    (tmp_path / "config.json").rename(folder / "config.json")
    for spelling in ("my-model", "./my-model", str(folder)):
        assert read_model(spelling, base_dir=tmp_path).name == "my-model"


def test_quantisation_beside_the_config(read: Callable[..., ModelShape], tmp_path: Path) -> None:
    """A checkpoint quantised by a file beside its config is not mistaken for bf16."""
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"hf_quant_config\.json"):
        read({})
