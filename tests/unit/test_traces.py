"""Reading and rescaling of traces; bad ones are in tests/golden/test_bad_inputs.py."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import scenarios
from planner.errors import InputError
from planner.io.trace_array import JsonArray
from planner.io.trace_file import MAX_ROWS, TraceFile
from planner.io.trace_rates import read_rates
from planner.io.traces import ZERO_OUTPUT, ZERO_PROMPT, RawTrace, read_trace, rescale

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


def test_bom_and_quotes(tmp_path: Path) -> None:
    """What spreadsheets add to a CSV file changes nothing."""
    text = '\ufeff\narrival_s,prompt_tokens,output_tokens\r\n"0",10,1\r\n"1.5",20,"2"\r\n'
    trace = read(tmp_path, text)
    assert trace.arrival_s.tolist() == [0.0, 1.5]
    assert trace.output_tokens.tolist() == [1, 2]


# (format, file, arrivals, prompts, outputs, rows skipped)
SAMPLES: list[tuple[str, str, list[float], list[int], list[int], dict[str, int]]] = [
    (
        "azure",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n"
        "2024-05-10 00:00:00.017335+00:00,0,8\n2024-05-10 00:00:01.009931+00:00,2399,6\n",
        [0.0, 1.000001],
        [2162, 2399],
        [5, 6],
        {ZERO_PROMPT: 1},
    ),
    (
        "burstgpt",
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,Conversation log\n"
        "118.5,GPT-4,417,276,693,API log\n",
        [0.0, 113.5],
        [472, 417],
        [18, 276],
        {ZERO_OUTPUT: 1},
    ),
    (
        "burstgpt",
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,"
        "Log Type\n5,a,1.5,ChatGPT,472,18,490,Conversation log\n7,,2,GPT-4,40,1,41,API log\n",
        [0.0, 2.0],
        [472, 40],
        [18, 1],
        {},
    ),
    (
        "mooncake",
        '{"timestamp": 27, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n\n'
        '{"timestamp": 3027, "input_length": 7322, "output_length": 490, "hash_ids": []}\n',
        [0.0, 3.0],
        [6758, 7322],
        [500, 490],
        {},
    ),
    (
        "apex",
        '{"ContextTokens": 156, "GeneratedTokens": 67, "StartTimeOffset": 244544756}\n'
        '{"ContextTokens": 115, "GeneratedTokens": 390, "StartTimeOffset": 5412530993}',
        [0.0, 5.167986237],
        [156, 115],
        [67, 390],
        {},
    ),
    (
        "llmservingsim",
        # beyond 2**53, where a float64 would lose the last nanosecond
        '{"input_toks": 3, "output_toks": 2, "arrival_time_ns": 9007199254740993, '
        '"input_tok_ids": [5, 2, 9], "output_tok_ids": [1, 1]}\n'
        '{"input_toks": 4, "output_toks": 1, "arrival_time_ns": 9007199254740994}\n',
        [0.0, 1e-9],
        [3, 4],
        [2, 1],
        {},
    ),
    (
        "sharegpt",
        '[{"id": "a", "prompt_len": 12, "output_len": 30},\n'
        ' {"conversations": [{"from": "human", "value": "Hi", "num_tokens": 1},\n'
        '  {"from": "gpt", "value": "Hello", "num_tokens": 2}, {"value": "And?"}]},\n'
        ' {"conversations": [{"from": "human", "value": "Hi", "num_tokens": 1}]}]',
        [0.0, 0.0],
        [12, 1],
        [30, 2],
        {ZERO_OUTPUT: 1},
    ),
]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample[0])
@pytest.mark.parametrize("chunk_bytes", [1, 2**22])
def test_formats(
    tmp_path: Path,
    sample: tuple[str, str, list[float], list[int], list[int], dict[str, int]],
    chunk_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each format is known by its first line, and reads the same line by line and at once."""
    monkeypatch.setattr("planner.io.trace_file.CHUNK_BYTES", chunk_bytes)
    name, text, arrivals, prompts, outputs, skipped = sample
    trace = read(tmp_path, text)
    assert trace.format == name
    assert trace.arrival_s.tolist() == arrivals
    assert trace.prompt_tokens.tolist() == prompts
    assert trace.output_tokens.tolist() == outputs
    assert trace.rows_skipped == skipped
    assert trace.rows_read == len(arrivals) + sum(skipped.values())
    assert trace.has_arrivals == (name != "sharegpt")
    assert trace.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_order_is_checked_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is compared with the one above it also where they were read apart."""
    monkeypatch.setattr("planner.io.trace_file.CHUNK_BYTES", 1)
    with pytest.raises(InputError, match="line 4, arrival_s: '4' is before the row above"):
        read(tmp_path, "arrival_s,prompt_tokens,output_tokens\n3,1,1\n5,1,1\n4,1,1\n")


def test_parquet(tmp_path: Path) -> None:
    """Parquet reads as the same rows in CSV; bad columns and values are one line."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "trace.parquet"

    def write(**columns: Any) -> None:
        pq.write_table(pa.table(columns), path)

    good: dict[str, Any] = {
        "model": ["a", "b", "c"],
        "arrival_s": [3.0, 3.5, 5.0],
        "prompt_tokens": pa.array([7, 8, 9], pa.uint16()),
        "output_tokens": [1, 0, 2],
    }
    write(**good)
    trace = read_trace(path, source="t.parquet")
    assert trace.arrival_s.tolist() == [0.0, 2.0]
    assert trace.prompt_tokens.tolist() == [7, 9]
    assert (trace.rows_read, trace.rows_skipped) == (3, {ZERO_OUTPUT: 1})
    assert trace.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for column, values, message in (
        ("arrival_s", [3.0, None, 5.0], r"row 2, arrival_s: None is empty"),
        ("arrival_s", [3.0, 2.0, 5.0], r"row 2, arrival_s: 2.0 is before the row above"),
        ("arrival_s", ["3", "4", "5"], r"row 1, arrival_s: '3' must be a number of seconds"),
        ("prompt_tokens", [1, -2, 3], r"row 2, prompt_tokens: -2 must not be negative"),
        ("prompt_tokens", [1.0, 2.0, 3.0], r"row 1, prompt_tokens: 1.0 must be a whole number"),
        ("output_tokens", [1, 1, 2**40], r"row 3, output_tokens: .* must be at most 2147483647"),
    ):
        write(**{**good, column: values})
        with pytest.raises(InputError, match=message):
            read_trace(path, source="t.parquet")
    write(arrival_s=[1.0], prompt_tokens=[1])
    with pytest.raises(InputError, match="has no column output_tokens"):
        read_trace(path, source="t.parquet")


def test_a_file_without_line_ends_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that would not fit the memory is an error; one that only just does is read."""
    monkeypatch.setattr("planner.io.trace_file.CHUNK_BYTES", 1024)
    monkeypatch.setattr("planner.io.trace_file.MAX_LINE_BYTES", 2**20)
    row = '{"timestamp": 1, "input_length": 3, "output_length": 4, "x": "%s"}'
    assert len(read(tmp_path, row % ("y" * 2**19) + "\n" + row % "")) == 2
    with pytest.raises(InputError, match=r"^trace.csv: line 2: is longer than 1 MiB: write a row"):
        read(tmp_path, row % "" + "\n" + row % ("y" * 2**21))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1 2]", "line 1: JSON: Expecting ',' or ']'"),
        ("[1,\n 2,\n", "line 2: JSON: Expecting value"),
        ('[{"prompt_len": 1,\n "output_len": 2}\n', "line 2: JSON: Expecting ',' or ']'"),
        ('[{"prompt_len": 1,\n "output_len": }\n, 3]', "line 2: JSON: Expecting value"),
        ("[1]\n\n[2]", "line 3: JSON: Extra data"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 2**22])
def test_arrays_that_are_no_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, text: str, message: str
) -> None:
    """The line is the same whether the array is read by the line or at once."""
    monkeypatch.setattr("planner.io.trace_file.CHUNK_BYTES", chunk_bytes)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError) as caught:
        list(JsonArray(TraceFile(tmp_path / "a.json", "a.json")).elements())
    assert str(caught.value) == f"a.json: {message}"


MEMORY = """
import resource, sys
from pathlib import Path
from planner.io.traces import read_trace
from planner.errors import InputError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    rows = len(read_trace(Path(sys.argv[1]), source="big"))
except InputError as error:
    rows = error
print(rows)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def memory_of(path: Path) -> tuple[str, float]:
    """What reading a file gives, and the memory that it takes in a process of its own, MiB."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True
    )
    found, mebibytes = run.stdout.splitlines()
    return found, float(mebibytes)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_memory_is_bounded(tmp_path: Path, kind: str) -> None:
    """A row takes its 48 bytes and no text: 400,000 rows stay below 200 MiB.

    Found: 158 MiB for CSV, most of it one chunk of text and its cells, and 60 MiB for JSON. The
    whole array as objects would take 250 MiB.
    """
    path, rows = tmp_path / "big", 400_000
    if kind == "csv":
        line = '%d.0,123,"45"\n'
        text = "".join(line % i for i in range(rows))
        path.write_text("arrival_s,prompt_tokens,output_tokens\n" + text)
    else:
        item = '{"id": "%s", "prompt_len": 12, "output_len": 30}' % ("x" * 60)
        path.write_text("[" + ",\n".join([item] * rows) + "]")
    found, mebibytes = memory_of(path)
    assert found == str(rows)
    assert mebibytes < 200


def test_more_rows_than_a_run_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit, ten million rows, is said in one line, and nothing after it is read."""
    monkeypatch.setattr("planner.io.traces.MAX_ROWS", 3)
    text = "arrival_s,prompt_tokens,output_tokens\n" + "0,1,1\n" * 4
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    rule = "has more than 3 rows, the most that one run holds: cut it"
    assert str(caught.value) == f"trace.csv: {rule}"
    assert MAX_ROWS == 10_000_000


def test_rates(tmp_path: Path) -> None:
    """Windows end where the next starts, and the last is as long as the one before."""
    path = tmp_path / "rates.csv"
    path.write_text("0,0.5,1.2,Gamma,0.7,3.9\n600,0,,,,\n1800,2,1.3,Weibull,0.8,0.4")
    windows, sha256 = read_rates(path, source="rates.csv")
    assert windows.start_s == (0.0, 600.0, 1800.0)
    assert windows.end_s == (600.0, 1800.0, 3000.0)
    assert windows.rate == (0.5, 0.0, 2.0)
    assert windows.is_weibull == (False, False, True)
    assert windows.shape == (0.7, 1.0, 0.8)
    assert windows.mean_requests == 0.5 * 600 + 2 * 1200
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


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
