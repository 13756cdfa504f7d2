"""Bad traces and model configs, and the exact line that each of them gets."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from planner.errors import InputError
from planner.io.hf_config import read_model
from planner.io.traces import read_trace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
PLAIN = "arrival_s,prompt_tokens,output_tokens\n"
KNOWN = "TIMESTAMP,ContextTokens,GeneratedTokens or arrival_s,prompt_tokens,output_tokens"

# (text of the file, message after "bad.csv")
TRACE_CASES = [
    ("", f": is empty; a trace starts with the header {KNOWN}"),
    (AZURE, ": holds a header and no rows"),
    ("time,in,out\n1,2,3\n", f": line 1: 'time,in,out' is not a known header; known: {KNOWN}"),
    (f"{PLAIN}0,1\n", ": line 2: has 2 columns in place of 3"),
    (
        f"{PLAIN}0,1,1\n2,1,1\n1.5,1,1\n",
        ": line 4, arrival_s: '1.5' is before the row above: sort the trace",
    ),
    (f"{PLAIN}0,1,1\n\n1,-5,1\n", ": line 4, prompt_tokens: '-5' must not be negative"),
    (f"{PLAIN}0,1,nan\n", ": line 2, output_tokens: 'nan' must be a whole number of tokens"),
    (f"{PLAIN}0,7.5,1\n", ": line 2, prompt_tokens: '7.5' must be a whole number of tokens"),
    (f"{PLAIN}0,1,1\n1,0,1\n", ": line 3, prompt_tokens: '0' must be at least 1"),
    (f"{PLAIN}nan,1,1\n", ": line 2, arrival_s: 'nan' must be a finite number of seconds"),
    (f"{PLAIN}1s,1,1\n", ": line 2, arrival_s: '1s' must be a number of seconds"),
    (
        f"{PLAIN}0,99999999999,1\n",
        ": line 2, prompt_tokens: '99999999999' must be at most 2147483647",
    ),
    (f"{PLAIN}0,5,0\n", ": holds no request with output tokens"),
    (
        f"{AZURE}2023-13-16 18:15:46.6805900,3,4",
        ": line 2, TIMESTAMP: '2023-13-16 18:15:46.6805900' must be a UTC date and time such as"
        " 2023-11-16 18:15:46.6805900",
    ),
    (
        f"{AZURE}2023-11-16 18:15:46,3,4\r\nyesterday,3,4",
        ": line 3, TIMESTAMP: 'yesterday' must be a UTC date and time such as"
        " 2023-11-16 18:15:46.6805900",
    ),
]

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
SUPPORTED = "supported model types: llama, mistral, qwen2, qwen3"

# (fields that change in CONFIG, message after "bad.json")
MODEL_CASES = [
    ({"model_type": "gemma3"}, f": model_type: 'gemma3' is not supported; {SUPPORTED}"),
    (
        {"model_type": "mixtral", "num_local_experts": 8},
        f": num_local_experts: mixtures of experts are not supported yet; {SUPPORTED}",
    ),
    ({"model_type": None}, f": model_type: required field is missing; {SUPPORTED}"),
    (
        {"hidden_size": None, "vocab_size": None},
        ": required fields are missing: hidden_size, vocab_size",
    ),
    (
        {"num_key_value_heads": 7},
        ": num_attention_heads: 32 must be a multiple of num_key_value_heads (7)",
    ),
    (
        {"hidden_size": 4100},
        ": hidden_size: 4100 must be a multiple of num_attention_heads (32) where head_dim is not"
        " given",
    ),
    (
        {"num_hidden_layers": -1},
        ": num_hidden_layers: -1 must be a whole number from 1 to 2147483647",
    ),
    ({"vocab_size": "32k"}, ": vocab_size: '32k' must be a whole number from 1 to 2147483647"),
    ({"tie_word_embeddings": "no"}, ": tie_word_embeddings: 'no' must be true or false"),
    (
        {"quantization_config": {"quant_method": "awq"}},
        ": quantization_config.quant_method: 'awq' quantisation is not supported; supported: fp8",
    ),
    (
        {"quantization_config": {"quant_method": "fp8", "ignored_layers": ["layers.0.mlp"]}},
        ": quantization_config.ignored_layers: 'layers.0.mlp' is left unquantised; only embedding,"
        " head and norms may be",
    ),
    (
        {"model_type": "mistral", "sliding_window": 4096},
        ": sliding_window: 4096 is a sliding window, which is not modelled: set"
        " model.max_model_len to at most 4096",
    ),
    (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4096},
        ": use_sliding_window: sliding-window attention is not modelled",
    ),
]


def assert_one_line(call: Callable[[], object], expected: str) -> None:
    """Check the error that ``call`` raises: its exit code and its one line."""
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert str(caught.value) == expected


@pytest.mark.parametrize(("content", "message"), TRACE_CASES)
def test_bad_trace(tmp_path: Path, content: str, message: str) -> None:
    """A bad trace gets one line with the line number of its first bad row."""
    path = tmp_path / "bad.csv"
    path.write_bytes(content.encode())
    assert_one_line(lambda: read_trace(path, source="bad.csv"), f"bad.csv{message}")


def test_missing_trace(tmp_path: Path) -> None:
    """A trace that does not exist is reported under the name that the scenario uses."""
    path = tmp_path / "no.csv"
    assert_one_line(lambda: read_trace(path, source="no.csv"), "no.csv: no such file")


@pytest.mark.parametrize(("changes", "message"), MODEL_CASES)
def test_bad_model(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    """A model that is not supported or not consistent is refused with the field at fault."""
    config = {k: v for k, v in {**CONFIG, **changes}.items() if v is not None}
    (tmp_path / "bad.json").write_text(json.dumps(config))
    assert_one_line(lambda: read_model("bad.json", base_dir=tmp_path), f"bad.json{message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", ":1:2: JSON: Expecting property name enclosed in double quotes"),
        ("[]", ": [] must be a JSON object"),
    ],
)
def test_file_that_is_no_model(tmp_path: Path, content: str, message: str) -> None:
    """A file that is not a JSON object gets one line."""
    (tmp_path / "bad.json").write_text(content)
    assert_one_line(lambda: read_model("bad.json", base_dir=tmp_path), f"bad.json{message}")


def test_unknown_model_name() -> None:
    """A misspelt model name is answered with the nearest one in the catalogue."""
    expected = (
        "s.yaml: model.config: 'Qwen/Qwen3-9B' is not in the model catalogue; did you mean"
        " 'Qwen/Qwen3-8B'? (a path to a config.json works too)"
    )
    assert_one_line(lambda: read_model("Qwen/Qwen3-9B", source="s.yaml"), expected)
