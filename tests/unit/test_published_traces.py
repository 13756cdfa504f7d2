"""The published traces are read, each and every one."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.errors import InputError
from planner.io.trace_rates import read_rates
from planner.io.traces import read_trace

SHARED = Path(__file__).parents[3] / "shared" / "data" / "traces"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published traces are not here")
@pytest.mark.parametrize(
    ("name", "name_of_format", "rows", "prompts", "outputs"),
    [
        ("AzureLLMInferenceTrace_code.csv", "azure", 8819, 18059974, 245896),
        ("AzureLLMInferenceTrace_conv.csv", "azure", 19366, 22361870, 4088665),
        ("apexplus_llama_lmsys_025.jsonl", "apex", 1024, 63148, 165996),
        ("burstgpt_first3rows_quoted.csv", "burstgpt", 3, 1976, 524),
        ("mooncake_conversation_trace.jsonl", "mooncake", 12031, 144793823, 4122048),
        ("mooncake_synthetic_trace.jsonl", "mooncake", 3993, 61194628, 595432),
        (
            "llmservingsim_sharegpt-llama-3.1-8b-300-sps10.jsonl",
            "llmservingsim",
            300,
            257239,
            195753,
        ),
        (
            "sharegpt_block_hashes/sharegpt-llama-3.1-8b-300-sps10.csv",
            "block_hashes",
            300,
            257239,
            195753,
        ),
    ],
)
def test_published_traces(
    name: str, name_of_format: str, rows: int, prompts: int, outputs: int
) -> None:
    """Each published file reads whole, to the last row and token."""
    trace = read_trace(SHARED / name, source=name)
    assert (trace.format, trace.rows_read, trace.rows_skipped) == (name_of_format, rows, {})
    assert (int(trace.prompt_tokens.sum()), int(trace.output_tokens.sum())) == (prompts, outputs)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published traces are not here")
def test_no_published_trace_is_left_unread() -> None:
    """Whatever lies in the folder is a trace, or a file of rates that the message sends there."""
    files = sorted(path for path in SHARED.rglob("*") if path.is_file())
    assert len(files) >= 11
    rates = [path for path in files if path.name.startswith("servegen")]
    for path in files:
        if path in rates:
            with pytest.raises(InputError, match="holds arrival rates and no requests"):
                read_trace(path, source=path.name)
            assert len(read_rates(path, source=path.name)[0].rate) == 2016
        else:
            trace = read_trace(path, source=path.name, content=True)
            assert len(trace) == trace.rows_read > 0
    assert len(rates) == 1
