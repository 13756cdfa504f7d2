"""Precision of each part of a checkpoint, as its quantisation settings state it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from planner.errors import InputError
from planner.io.hf_config import read_model
from simulator.model import Experts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from simulator.model import ModelShape

DENSE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 256,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 8,
    "vocab_size": 1000,
}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., ModelShape]:
    """Write a small dense config with changes, and read it."""

    def write_and_read(changes: dict[str, Any], **options: Any) -> ModelShape:
        (tmp_path / "config.json").write_text(json.dumps({**DENSE, **changes}))
        return read_model("config.json", base_dir=tmp_path, **options)

    return write_and_read


def mixers(shape: ModelShape) -> list[Any]:
    """Mixer of each layer, whatever its kind."""
    return [layer.mixer for layer in shape.layers]


def ffns(shape: ModelShape) -> list[Any]:
    """Feed-forward part of each layer, whatever its kind."""
    return [layer.ffn for layer in shape.layers]


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
    assert {shape.layers[0].mixer.dtype, shape.layers[0].ffn.dtype} == {expected}  # type: ignore[union-attr]


def test_weight_dtype_cannot_undo_quantisation(read: Callable[..., ModelShape]) -> None:
    """Asking for bf16 weights of an fp8 checkpoint is an error of the scenario."""
    with pytest.raises(InputError) as caught:
        read({"quantization_config": {"quant_method": "fp8"}}, weight_dtype="bf16", source="s.yaml")
    assert str(caught.value) == (
        "s.yaml: model.weight_dtype: 'bf16' contradicts config.json, whose weights are stored in"
        " fp8: leave it out"
    )


COMPRESSED = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}


def compressed(weights: dict[str, Any], activations: object = None) -> dict[str, Any]:
    """A compressed-tensors config of one group."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {**COMPRESSED, "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
        ({"quant_method": "fbgemm_fp8"}, "fp8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "int4"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "int4_g32"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, "nvfp4"),
        ({"quant_algo": "FP8", "exclude_modules": ["lm_head"]}, "fp8"),
        (compressed({"num_bits": 8, "type": "float", "strategy": "channel"}, {}), "fp8"),
        (compressed({"num_bits": 8, "type": "int", "strategy": "channel"}, {}), "int8"),
        (
            compressed(
                {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "block",
                    "block_structure": [128, 128],
                },
                {},
            ),
            "fp8_block",
        ),
        (
            compressed({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}),
            "int4",
        ),
        (compressed({"num_bits": 4, "type": "float", "strategy": "tensor_group"}, {}), "nvfp4"),
    ],
)
def test_quantisation_formats(
    read: Callable[..., ModelShape], settings: dict[str, Any], expected: str
) -> None:
    """Each way to state a quantisation gives its precision."""
    shape = read({"quantization_config": settings})
    assert shape.weight_dtype == expected
    assert mixers(shape)[0].dtype == ffns(shape)[0].dtype == expected


def test_mxfp4_is_for_experts_only() -> None:
    """GPT-OSS keeps attention in bf16."""
    shape = read_model("gpt-oss-20b")
    assert (mixers(shape)[0].dtype, ffns(shape)[0].dtype) == ("bf16", "mxfp4")


def test_int4_experts_beside_bf16() -> None:
    """Kimi K2.5 leaves attention, shared experts and the dense layer alone, by pattern."""
    layers = read_model("Kimi-K2.5").layers
    experts = layers[1].ffn
    assert isinstance(experts, Experts)
    assert (experts.dtype, experts.shared_dtype) == ("int4_g32", "bf16")
    assert {layers[0].ffn.dtype, layers[0].mixer.dtype, layers[1].mixer.dtype} == {"bf16"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "ignored",
    [
        ["model.layers.3.self_attn"],
        ["re:.*layers\\.3\\.self_attn.*"],
        ["model.layers.3.self_attn*", "model.layers.*.mlp.gate"],
        [f"language_model.model.layers.3.self_attn.{m}_proj" for m in "qkvo"],
    ],
)
def test_parts_left_unquantised(read: Callable[..., ModelShape], ignored: list[str]) -> None:
    """Names, wildcards and expressions all leave one layer's attention in bf16."""
    shape = read(
        {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ignored}}
    )
    assert [m.dtype for m in mixers(shape)[2:5]] == ["fp8", "bf16", "fp8"]
    assert {ffn.dtype for ffn in ffns(shape)} == {"fp8"}


def test_quantisation_beside_the_config(read: Callable[..., ModelShape], tmp_path: Path) -> None:
    """A checkpoint quantised by a file beside its config is not mistaken for bf16."""
    quantization = {"quant_algo": "NVFP4", "exclude_modules": ["model.layers.*.self_attn*"]}
    sidecar = tmp_path / "hf_quant_config.json"
    sidecar.write_text(json.dumps({"producer": {}, "quantization": quantization}))
    shape = read({})
    assert (shape.weight_dtype, mixers(shape)[0].dtype, ffns(shape)[0].dtype) == (
        "nvfp4",
        "bf16",
        "nvfp4",
    )
    sidecar.write_text("{}")
    with pytest.raises(InputError, match=r"hf_quant_config\.json: quantization\.quant_method"):
        read({})


@pytest.mark.parametrize(
    ("asked", "expected"), [("auto", "bf16"), ("bf16", "bf16"), ("fp8", "fp8")]
)
def test_kv_cache_dtype(asked: str, expected: str) -> None:
    """``auto`` is bf16 where the checkpoint says nothing; other values are taken as they are."""
    assert read_model("Qwen/Qwen3-8B", kv_cache_dtype=asked).kv_dtype == expected


def test_kv_cache_dtype_of_the_checkpoint(read: Callable[..., ModelShape]) -> None:
    """A checkpoint that states a KV dtype wants a decision, since engines differ."""
    settings = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    with pytest.raises(InputError, match=r"model\.kv_cache_dtype: 'auto' is ambiguous"):
        read({"quantization_config": settings})
    assert read({"quantization_config": settings}, kv_cache_dtype="fp8").kv_dtype == "fp8"
