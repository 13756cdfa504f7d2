"""Reading and rescaling of traces; bad ones are in tests/golden/test_bad_inputs.py."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

import scenarios
from planner.errors import InputError
from planner.io.traces import ZERO_OUTPUT, RawTrace, read_trace, rescale

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 23:59:59.9999999,374,44\r\n"
    "2023-11-17 00:00:00.0000000,396,0\r\n"
    "2023-11-17 00:00:01.5000000,879,55"
)


def read(tmp_path: Path, text: str, num_requests: int | None = None) -> RawTrace:
    """Write ``text`` as it is and read it."""
    path = tmp_path / "trace.csv"
    path.write_bytes(text.encode())
    return read_trace(path, source="trace.csv", num_requests=num_requests)


def test_azure_format(tmp_path: Path) -> None:
    """Seven-digit fractions are exact across midnight, and an unanswered row is counted."""
    trace = read(tmp_path, AZURE)
    assert trace.format == "azure"
    # 15,000,001 ticks of 100 ns after the first row
    assert trace.arrival_s.tolist() == [0.0, 1.5000001]
    assert trace.prompt_tokens.tolist() == [374, 879]
    assert trace.output_tokens.tolist() == [44, 55]
    assert (trace.rows_read, trace.rows_skipped) == (3, {ZERO_OUTPUT: 1})
    assert trace.sha256 == hashlib.sha256(AZURE.encode()).hexdigest()
    assert len(trace) == 2


@pytest.mark.parametrize("zone", ["Z", "+00:00"])
def test_azure_with_utc_zone(tmp_path: Path, zone: str) -> None:
    """Timestamps that say UTC read as those that do not."""
    text = AZURE.replace(",374", f"{zone},374").replace(",396", f"{zone},396")
    assert read(tmp_path, text).arrival_s.tolist() == [0.0, 1.5000001]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_plain_format(tmp_path: Path, end: str) -> None:
    """Arrivals count from the first row, equal ones are fine, and line ends do not matter."""
    lines = ["arrival_s,prompt_tokens,output_tokens", "100.5,10,1", "", "100.5,20,2", "102,30,3"]
    trace = read(tmp_path, end.join(lines) + end)
    assert trace.format == "plain"
    assert trace.arrival_s.tolist() == [0.0, 0.0, 1.5]
    assert trace.prompt_tokens.tolist() == [10, 20, 30]
    assert (trace.rows_read, trace.rows_skipped) == (3, {})


def test_num_requests_counts_usable_rows(tmp_path: Path) -> None:
    """The first N requests are the first N that were answered; asking for more is an error."""
    assert read(tmp_path, AZURE, 2).prompt_tokens.tolist() == [374, 879]
    assert read(tmp_path, AZURE, 1).prompt_tokens.tolist() == [374]
    with pytest.raises(InputError) as caught:
        read(tmp_path, AZURE, 3)
    assert str(caught.value) == (
        "trace.csv: 3 requests were asked for (workload.num_requests), but the trace has 2"
    )


def test_arrays_are_read_only(tmp_path: Path) -> None:
    """Nobody can change a trace that several plans are simulated on."""
    trace = read(tmp_path, AZURE)
    assert (trace.arrival_s.dtype, trace.prompt_tokens.dtype) == (np.float64, np.int64)
    arrays = (
        trace.arrival_s,
        trace.prompt_tokens,
        trace.output_tokens,
        rescale(trace.arrival_s, 1),
    )
    for array in arrays:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize("cell", ["1_0", "٣", "", "1e3", "+5"])
def test_tokens_are_plain_digits(tmp_path: Path, cell: str) -> None:
    """Spellings that Python's int or float would accept are refused, with the line."""
    with pytest.raises(InputError, match=r"line 2, prompt_tokens: .* whole number"):
        read(tmp_path, f"arrival_s,prompt_tokens,output_tokens\n0,{cell},1\n")


def test_bundled_trace() -> None:
    """The bundled trace is the first 2,000 rows of Azure's 2023 conversation trace."""
    path = Path(str(scenarios.__path__[0])) / "traces" / "azure_conv_2023_2000.csv"
    trace = read_trace(path, source=path.name)
    assert (len(trace), trace.rows_read, trace.format) == (2000, 2000, "azure")
    assert (trace.prompt_tokens[0], trace.output_tokens[0]) == (374, 44)
    assert trace.arrival_s[1] == 4.314579
    assert trace.sha256 == "315b6fa400c35ebee590c0216fd95f7fcd61ab3719813bbf31c986ea27437156"


def test_rescale_sets_the_mean_rate_and_keeps_bursts() -> None:
    """The mean rate is (n - 1) / span, and gaps keep their ratios."""
    scaled = rescale(np.array([5.0, 5.0, 6.0, 9.0]), 0.5)
    # 3 gaps at 0.5 requests/s take 6 s, in the ratios 0 : 1 : 3
    assert scaled.tolist() == [0.0, 0.0, 1.5, 6.0]


@pytest.mark.parametrize("arrivals", [[], [3.0], [3.0, 3.0]])
def test_rescale_needs_a_span(arrivals: list[float]) -> None:
    """Arrivals at one time have no rate to change."""
    with pytest.raises(InputError, match="all at one time"):
        rescale(np.array(arrivals), 4.0)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_rescale_needs_a_rate(rate: float) -> None:
    """A rate that is no positive finite number is refused."""
    with pytest.raises(InputError, match="finite number above 0"):
        rescale(np.array([0.0, 1.0]), rate)
