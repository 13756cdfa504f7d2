"""Bad traces and model configs, and the exact line that each of them gets."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from planner.errors import InputError
from planner.io.hf_config import read_model
from planner.io.models.families import FAMILIES
from planner.io.trace_rates import read_rates
from planner.io.traces import read_trace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
PLAIN = "arrival_s,prompt_tokens,output_tokens\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
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
    (f'{PLAIN}0,1,1\n1,"1,1\n2,1,1\n', ": line 3: has a quote that is not closed"),
    (f"{PLAIN}0,1,1\n1,1\n", ": line 3: has 2 columns in place of 3"),
    (
        f"{PLAIN}0,1,{'9' * 20}\n",
        f": line 2, output_tokens: '{'9' * 20}' must be at most 2147483647",
    ),
    (
        f"{BURSTGPT}5,ChatGPT,472,-18,490,Conversation log\n",
        ": line 2, Response tokens: '-18' must not be negative",
    ),
    (
        '{"timestamp": 5, "input_length": 9, "output_length": 3}\n{"timestamp": 4, "input_len',
        ": line 2: JSON: Unterminated string starting at",
    ),
    (
        '{"timestamp": 5, "input_length": 9, "output_length": 3}\n'
        '{"timestamp": 4, "input_length": 9, "output_length": 3}\n',
        ": line 2, timestamp: 4 is before the row above: sort the trace",
    ),
    (
        '{"timestamp": 5, "input_length": 9, "output_length": 3}\n\n{"timestamp": 6}\n',
        ": line 3, input_length: required key is missing",
    ),
    (
        '{"timestamp": 5, "input_length": 9.5, "output_length": 3}',
        ": line 1, input_length: 9.5 must be a whole number of tokens",
    ),
    (
        '{"timestamp": NaN, "input_length": 9, "output_length": 3}',
        ": line 1, timestamp: nan must be a finite number",
    ),
    (
        '{"timestamp": "5", "input_length": 9, "output_length": 3}',
        ": line 1, timestamp: '5' must be a number",
    ),
    (
        '{"timestamp": 5, "input_length": -9, "output_length": 3}',
        ": line 1, input_length: -9 must not be negative",
    ),
    (
        '{"timestamp": 5, "input_length": 9}',
        ": line 1: has no 'output_length', which a mooncake trace needs",
    ),
    (
        '{"prompt": "Hello"}',
        ": line 1: has the keys of no known trace; known: timestamp,input_length,output_length or"
        " StartTimeOffset,ContextTokens,GeneratedTokens or"
        " arrival_time_ns,input_toks,output_toks",
    ),
    ("[]", ": holds no conversation"),
    ("[1]", ": item 1: must be an object with prompt_len and output_len, or with conversations"),
    ('[{"prompt_len": 1,\n', ": line 1: JSON: Expecting property name enclosed in double quotes"),
    (
        '[{"conversations": [{"value": "Hello"}, {"value": "Hi"}]}]',
        ": item 1: has text without token counts: add num_tokens to each turn, or write prompt_len"
        " and output_len (counting needs the model's tokenizer)",
    ),
    (
        "0,0.35,1.2,Gamma,0.7,3.9\n",
        ": holds arrival rates and no requests: name it as workload.rates, with input_tokens and"
        " output_tokens",
    ),
    (
        "PAR1 and no more",
        ": Parquet: Parquet magic bytes not found in footer. Either the file is corrupted or this"
        " is not a parquet file.",
    ),
]

# (text of a ServeGen file, message after "bad.csv")
RATES_CASES = [
    ("", ": is empty; it needs rows of arrival rates"),
    (
        "arrival_s,prompt_tokens,output_tokens\n",
        ": line 1: is no file of arrival rates, whose rows are"
        " start_s,rate,cv,distribution,shape,scale without a header",
    ),
    (
        "0,0.35,1.2,Gamma,0.7,3.9\n",
        ": needs two rows or more: a window ends where the next one starts",
    ),
    (
        "0,0.35,1.2,Gamma,0.7,3.9\n0,0.35,1.2,Gamma,0.7,3.9\n",
        ": line 2, start_s: '0' must be after the row above: sort the file",
    ),
    (
        "0,0.35,1.2,Gamma,0.7,3.9\n600,-1,1.2,Gamma,0.7,3.9\n",
        ": line 2, rate: '-1' must be a number from 0 to 1e+12",
    ),
    (
        "0,0.35,1.2,Gamma,0.7,3.9\n600,1,1.2,Pareto,0.7,3.9\n",
        ": line 2, distribution: 'Pareto' must be Gamma or Weibull",
    ),
    (
        "0,0.35,1.2,Gamma,0.7,3.9\n600,1,1.2,Gamma,0,3.9\n",
        ": line 2, shape: '0' must be a number from 0.01 to 10000",
    ),
    (
        "0,0.35,1.2,Gamma,0.7,3.9\n600,1,1.2\n",
        ": line 2: has 3 columns in place of 6",
    ),
    ("0,0,,,,\n600,0,,,,\n", ": holds no window with a rate above 0"),
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
SUPPORTED = f"supported model types: {', '.join(FAMILIES)}"
SIZE = "must be a whole number from 1 to 2147483647"

# (fields that change in CONFIG, message after "bad.json")
MODEL_CASES = [
    ({"model_type": "t5"}, f": model_type: 't5' is not supported; {SUPPORTED}"),
    (
        {"model_type": "falcon"},
        ": model_type: 'falcon' is not supported: attention and feed-forward network in parallel"
        " are not modelled",
    ),
    (
        {"num_local_experts": 8},
        ": num_local_experts: 8 experts do not belong to this model type, which is dense",
    ),
    ({"model_type": "mixtral"}, ": num_local_experts: required field is missing"),
    (
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5},
        ": num_experts_per_tok: 5 must be at most num_local_experts (4)",
    ),
    ({"model_type": "llama4"}, ": text_config: required field is missing"),
    (
        {"model_type": "gemma3", "text_config": [3]},
        ": text_config: [3] must be an object",
    ),
    (
        {"model_type": "gemma3", "text_config": {**CONFIG, "sliding_window": 9, "head_dim": 0}},
        f": text_config.head_dim: 0 {SIZE}",
    ),
    ({"model_type": None}, f": model_type: required field is missing; {SUPPORTED}"),
    (
        {"hidden_size": None, "vocab_size": None},
        ": required fields are missing: hidden_size, vocab_size",
    ),
    ({"intermediate_size": None}, ": intermediate_size: required field is missing"),
    (
        {"num_key_value_heads": 7},
        ": num_attention_heads: 32 must be a multiple of num_key_value_heads (7)",
    ),
    (
        {"hidden_size": 4100},
        ": hidden_size: 4100 must be a multiple of num_attention_heads (32) where head_dim is not"
        " given",
    ),
    ({"num_hidden_layers": -1}, ": num_hidden_layers: -1 must be a whole number from 1 to 10000"),
    ({"vocab_size": "32k"}, f": vocab_size: '32k' {SIZE}"),
    ({"tie_word_embeddings": "no"}, ": tie_word_embeddings: 'no' must be true or false"),
    (
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        ": quantization_config.quant_method: 'bitsandbytes' quantisation is not supported;"
        " supported: fp8, fbgemm_fp8, compressed-tensors, modelopt, modelopt_fp4, mxfp4, awq, gptq",
    ),
    (
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64}},
        ": quantization_config.group_size: 64 must be 32 or 128",
    ),
    (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
        ": quantization_config.weight_block_size: [64, 64] must be [128, 128] or absent",
    ),
    (
        {"quantization_config": {"quant_method": "fp8", "ignored_layers": ["v_proj"]}},
        ": quantization_config.ignored_layers: stores layers.0.self_attn.q_proj in fp8 and v_proj"
        " in bf16; precisions within one attention or feed-forward part must be equal",
    ),
    (
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}},
        ": quantization_config.quant_algo: 'MIXED_PRECISION' is not supported; supported: FP8,"
        " FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, NVFP4",
    ),
    (
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}},
            }
        },
        ": quantization_config.config_groups.g.weights: float8 per tensor, weights only is not a"
        " supported precision",
    ),
    (
        {"model_type": "qwen2", "layer_types": ["full_attention"] * 3},
        ": layer_types: must have 32 entries, has 3",
    ),
    (
        {"layer_types": ["chunked_attention"] * 32},
        ": layer_types: 'chunked_attention' is not supported; supported: full_attention,"
        " sliding_attention",
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
    if content.startswith("PAR1"):
        pytest.importorskip("pyarrow")
    path = tmp_path / "bad.csv"
    path.write_bytes(content.encode())
    assert_one_line(lambda: read_trace(path, source="bad.csv"), f"bad.csv{message}")


@pytest.mark.parametrize(("content", "message"), RATES_CASES)
def test_bad_rates(tmp_path: Path, content: str, message: str) -> None:
    """A bad file of rates gets one line too."""
    path = tmp_path / "bad.csv"
    path.write_text(content)
    assert_one_line(lambda: read_rates(path, source="bad.csv"), f"bad.csv{message}")


def test_trace_that_is_not_text(tmp_path: Path) -> None:
    """The line of the first byte that is not UTF-8."""
    path = tmp_path / "bad.csv"
    path.write_bytes(PLAIN.encode() + b"0,1,1\n1,\xff,1\n")
    expected = "bad.csv: line 3: is not UTF-8 text"
    assert_one_line(lambda: read_trace(path, source="bad.csv"), expected)


def test_trace_that_no_run_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is refused when the rows outgrow the limit, before the rest of it is read."""
    monkeypatch.setattr("planner.io.traces.MAX_ROWS", 2)
    path = tmp_path / "bad.csv"
    path.write_text(f"{PLAIN}0,1,1\n0,1,1\n0,1,1\n")
    expected = "bad.csv: has more than 2 rows, the most that one run holds: cut it"
    assert_one_line(lambda: read_trace(path, source="bad.csv"), expected)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pyarrow is missing, the message names the extra that brings it."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "bad.parquet"
    path.write_bytes(b"PAR1")
    expected = (
        "bad.parquet: is Parquet, which needs pyarrow: pip install 'serveplan[parquet]', or save"
        " as CSV"
    )
    assert_one_line(lambda: read_trace(path, source="bad.parquet"), expected)


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
