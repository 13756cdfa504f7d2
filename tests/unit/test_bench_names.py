"""Resolver of public names: what tables write, and what of the catalogues it stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import names
from bench.model_names import checkpoint_of
from bench.names import UncoveredError, device_of, release_of, resolve_names, version_key


@pytest.mark.parametrize(
    ("written", "entry", "precision"),
    [
        ("meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-70B", ""),
        ("LLaMA v3.1 70B", "meta-llama/Llama-3.1-70B", ""),
        ("LLaMA v3 70B", "meta-llama/Meta-Llama-3-70B", ""),
        ("llama3.1-8b", "meta-llama/Llama-3.1-8B", ""),
        ("LLaMA v2 13B", "meta-llama/Llama-2-13b-hf", ""),
        ("Mixtral 8x7B", "mistralai/Mixtral-8x7B-v0.1", ""),
        ("Mixtral 8x22B", "mistralai/Mixtral-8x22B-v0.1", ""),
        ("Mistral 7B", "mistralai/Mistral-7B-v0.1", ""),
        ("GPT OSS 120B", "openai/gpt-oss-120b", ""),
        ("DeepSeek R1", "deepseek-ai/DeepSeek-R1", ""),
        ("nvidia/DeepSeek-R1-0528-FP4-v2", "deepseek-ai/DeepSeek-R1-0528", "nvfp4"),
        ("Qwen/Qwen3-235B-A22B-FP8", "Qwen/Qwen3-235B-A22B", "fp8_block"),
        ("nvidia/Llama-3.3-70B-Instruct-FP8", "meta-llama/Llama-3.3-70B-Instruct", "fp8"),
        ("Qwen/Qwen3-8B-AWQ", "Qwen/Qwen3-8B", "int4"),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w8a8", "meta-llama/Llama-3.1-8B", "int8"),
    ],
)
def test_models_by_the_names_of_public_tables(written: str, entry: str, precision: str) -> None:
    """Organisation, case, separators, tuning and precision in the name make no difference."""
    found = checkpoint_of(written)
    assert (found.name, found.precision) == (entry, precision)


@pytest.mark.parametrize("written", ["GPT-J 6B", "Llama", "Qwen3", "", "Llama-3.1-Nemotron-70B"])
def test_a_name_that_nobody_knows_is_uncovered_by_name(written: str) -> None:
    """No near miss: another size or family would be another model."""
    with pytest.raises(UncoveredError, match=r"^model .*is not in the catalogue$"):
        checkpoint_of(written)


def test_a_better_known_weight_dtype_counts() -> None:
    """The table's word is read only where the weights' own dtype is not stated."""
    stated = checkpoint_of("Qwen/Qwen3-32B", "fp8", weight_dtype="fp8_block")
    assert stated.precision == "fp8_block"
    assert checkpoint_of("Qwen/Qwen3-32B", "?", weight_dtype="bf16").precision == ""
    assert checkpoint_of("openai/gpt-oss-120b", "fp4").precision == ""
    assert checkpoint_of("LLaMA v3 70B", "FP16").precision == ""
    with pytest.raises(UncoveredError, match="precision int3"):
        checkpoint_of("Qwen/Qwen3-32B", "int3")


def test_kv_dtypes() -> None:
    """Silence is the engine's choice; 16-bit floats are alike."""
    assert checkpoint_of("Qwen/Qwen3-32B").kv_cache_dtype == "auto"
    assert checkpoint_of("Qwen/Qwen3-32B", kv_cache_dtype="fp16").kv_cache_dtype == "bf16"
    assert checkpoint_of("Qwen/Qwen3-32B", kv_cache_dtype="fp8").kv_cache_dtype == "fp8"


def test_a_precision_of_its_own_is_written_as_a_config() -> None:
    """The file holds the catalogue's config with the quantisation and context asked for."""
    section = checkpoint_of("Qwen/Qwen3-32B", weight_dtype="fp8_block").section(2048)
    config = json.loads(Path(section["config"]).read_text(encoding="utf-8"))
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert section["max_model_len"] == 2048
    own = checkpoint_of("LLaMA v3 70B")
    assert own.section()["config"] == "meta-llama/Meta-Llama-3-70B"
    stretched = own.reaching(22_000).section()
    config = json.loads(Path(stretched["config"]).read_text(encoding="utf-8"))
    assert config["max_position_embeddings"] == 22_000


@pytest.mark.parametrize(
    ("written", "device"),
    [
        ("H100-SXM-80GB", "H100-SXM-80GB"),
        ("H100", "H100-SXM-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM-80GB"),
        ("H100 PCIe", "H100-PCIe-80GB"),
        ("A100", "A100-SXM4-80GB"),
        ("A100 40GB", "A100-SXM4-40GB"),
        ("A100-SXM4-40GB(ALCF Polaris; memory not stated in csv)", "A100-SXM4-40GB"),
        ("B200-SXM-192GB", "B200-SXM-180GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("RTX4090 24GB", "RTX-4090"),
        ("L40S 48GB", "L40S"),
        ("GB200", "GB200-NVL72"),
    ],
)
def test_devices_by_the_names_of_public_tables(written: str, device: str) -> None:
    """Brand words and nominal memory make no difference; a short name is the SXM board."""
    assert device_of(written) == device


@pytest.mark.parametrize("written", ["MI300X", "H20", "A10", "H100-SXM-96GB", ""])
def test_a_device_that_nobody_knows_is_uncovered_by_name(written: str) -> None:
    """A device of another memory or family is another device."""
    with pytest.raises(UncoveredError, match="device"):
        device_of(written)


@pytest.fixture
def three_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles of three vLLM versions, whatever ships."""
    known = (("vllm", "0.10.2"), ("vllm", "0.24.0"), ("vllm", "0.12.0"))
    monkeypatch.setattr(names, "engine_versions", lambda: known)
    in_use = (("vllm", "0.10.2", "2025-09-13"), ("vllm", "0.12.0", "2025-12-03"))
    monkeypatch.setattr(names, "_published", lambda: in_use)


@pytest.mark.usefixtures("three_versions")
@pytest.mark.parametrize(
    ("version", "date", "used"),
    [
        ("0.12.0", "", "0.12.0"),
        ("v0.12.0", "", "0.12.0"),
        ("0.11.1", "", "0.10.2"),
        ("0.12.0rc1", "", "0.10.2"),
        ("0.12.0.post1", "", "0.12.0"),
        ("0.9.0", "", "0.10.2"),
        ("0.33.0", "", "0.24.0"),
        ("nightly-dev-20260110-abc", "", "0.12.0"),
        ("nightly-5b8c30d62b754b57", "2025-11-30", "0.10.2"),
        ("", "2025-12-24", "0.12.0"),
        ("", "", "0.24.0"),
    ],
)
def test_the_nearest_known_version_at_or_below_stands_in(
    version: str, date: str, used: str
) -> None:
    """Nightly builds and missing versions go by their date; every stand-in says so."""
    release = release_of("vLLM", version, date=date)
    assert release.version == used
    assert (release.note == "") == (version.removeprefix("v") == used)


def test_engines_by_their_names() -> None:
    """Spelling makes no difference; an engine without a profile is uncovered by name."""
    assert release_of("vLLM", "0.10.2").engine == "vllm"
    assert release_of("TensorRT-LLM", "0.14.0").engine == "trtllm"
    with pytest.raises(UncoveredError, match="engine LMDeploy has no profile"):
        release_of("LMDeploy", "0.5")


def test_versions_are_ordered() -> None:
    """Candidates come before a release, and fixes after it."""
    ordered = ["0.9.0", "0.10.2", "1.0.0rc3", "1.0.0rc10", "1.0.0", "1.0.0.post1", "1.0.1"]
    assert sorted(reversed(ordered), key=version_key) == ordered


def test_a_row_is_resolved_with_the_columns_that_it_has() -> None:
    """Points and plan-choice files have fewer columns than runs."""
    row = {"model": "Qwen/Qwen3-32B", "hardware": "H100-SXM-80GB", "engine": "vllm"}
    found = resolve_names({**row, "engine_version_filled": "0.10.2", "quantization": "?"})
    assert (found.device, found.release.version) == ("H100-SXM-80GB", "0.10.2")
    assert not found.checkpoint.is_moe
