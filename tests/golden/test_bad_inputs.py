"""Bad scenarios, and the exact line that each of them gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from planner.errors import InputError
from planner.scenario import Scenario

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GOOD = """\
schema_version: 1
model: {config: meta-llama/Llama-3.1-70B-Instruct}
cluster:
  pools: [{device: H100-SXM-80GB, nodes: 1, devices_per_node: 8, price_per_hour: 3.9}]
engine: {name: vllm, version: "0.24.0"}
workload: {trace: chat.csv, request_rate: 4.0}
slo: {ttft_ms: {p99: 2000}}
goodput: {tpot_ms: 50}
objective: {minimize: mean_e2e}
search: {time_limit_s: 60, seed: 0, space: {tp: [1, 2, 4, 8]}}
"""

LENGTHS = "input_tokens: 512, output_tokens: 128, num_requests: 100"

# (text in GOOD, what replaces it, message after "bad.yaml")
SCENARIO_CASES = [
    (  # misspelt field
        "request_rate",
        "requst_rate",
        ": workload.requst_rate: unknown field; did you mean 'request_rate', in requests per"
        " second?",
    ),
    (  # misspelt section: not reported as missing too
        "engine:",
        "engin:",
        ": engin: unknown field; did you mean 'engine'?",
    ),
    (  # wrong unit in the name
        "ttft_ms: {p99: 2000}",
        "ttft_s: {p99: 2}",
        ": slo.ttft_s: unknown field; did you mean 'ttft_ms', in milliseconds?",
    ),
    (  # no unit in the name
        "tpot_ms: 50",
        "tpot: 50",
        ": goodput.tpot: unknown field; did you mean 'tpot_ms', in milliseconds?",
    ),
    (
        "time_limit_s: 60",
        "time_limit_ms: 60000",
        ": search.time_limit_ms: unknown field; did you mean 'time_limit_s', in seconds?",
    ),
    (  # right field, wrong section
        "space: {tp: [1, 2, 4, 8]}",
        "tp: [8]",
        ": search.tp: unknown field; it belongs at search.space.tp",
    ),
    (  # nothing close
        "nodes: 1,",
        "nodes: 1, zone: b,",
        ": cluster.pools[0].zone: unknown field; known here: device, nodes, devices_per_node,"
        " interconnect, nodes_per_rack, oversubscription, price_per_hour",
    ),
    (
        "request_rate: 4.0",
        'request_rate: "4/s"',
        ": workload.request_rate: '4/s' must be a bare number in requests per second, without a"
        " unit",
    ),
    (
        "p99: 2000",
        "p99: 2s",
        ": slo.ttft_ms.p99: '2s' must be a bare number in milliseconds, without a unit",
    ),
    (
        "price_per_hour: 3.9",
        "price_per_hour: $3.9",
        ": cluster.pools[0].price_per_hour: '$3.9' must be a bare number in USD per device and"
        " hour, without a unit",
    ),
    (  # YAML 1.1 would read 90
        "time_limit_s: 60",
        "time_limit_s: 1:30",
        ": search.time_limit_s: '1:30' must be a bare number in seconds, without a unit",
    ),
    (  # YAML 1.1 would read 8
        "nodes: 1,",
        "nodes: 010,",
        ": cluster.pools[0].nodes: '010' must be a bare number, not text: no quotes, separators"
        " or leading zeros",
    ),
    (
        "request_rate: 4.0",
        "request_rate: -4.0",
        ": workload.request_rate: -4.0 must be greater than 0",
    ),
    ("nodes: 1,", "nodes: 0,", ": cluster.pools[0].nodes: 0 must be greater than 0"),
    ("tpot_ms: 50", "tpot_ms: .nan", ": goodput.tpot_ms: nan must be a finite number"),
    (
        "request_rate: 4.0",
        "request_rate: .inf",
        ": workload.request_rate: inf must be a finite number: use arrival: all_at_once",
    ),
    ("nodes: 1,", "nodes: 1.5,", ": cluster.pools[0].nodes: 1.5 must be a whole number"),
    ("nodes: 1,", "nodes: true,", ": cluster.pools[0].nodes: True must be a whole number"),
    ("seed: 0", "seed: -1", ": search.seed: -1 must be at least 0"),
    (
        'version: "0.24.0"',
        "version: 0.24",
        ": engine.version: 0.24 must be text: put it in quotes",
    ),
    (
        'version: "0.24.0"',
        'version: "0.24.0", gpu_memory_utilization: 92',
        ": engine.gpu_memory_utilization: 92 must be at most 1 (a fraction, not a percentage)",
    ),
    (
        'version: "0.24.0"',
        'version: "0.24.0", max_num_seqs: 512, max_num_batched_tokens: 256',
        ": engine.max_num_batched_tokens: 256 must be at least max_num_seqs (512), or the engine"
        " does not start",
    ),
    (
        'version: "0.24.0"',
        'version: "0.24.0", calibration: off',
        ": engine.calibration: 'off' must be 'none' or the path of a calibration file"
        " (.json, .yaml)",
    ),
    (", devices_per_node: 8", "", ": cluster.pools[0].devices_per_node: required field is missing"),
    (
        "[{device: H100-SXM-80GB, nodes: 1, devices_per_node: 8, price_per_hour: 3.9}]",
        "[]",
        ": cluster.pools: must list one pool of devices, and lists none",
    ),
    (
        "price_per_hour: 3.9}]",
        "price_per_hour: 3.9}" + ", {device: L4, nodes: 1, devices_per_node: 1}" * 4 + "]",
        ": cluster.pools: lists 5 pools; at most 4 can be planned over",
    ),
    (
        "price_per_hour: 3.9}]",
        "price_per_hour: 3.9}, {device: H100-SXM-80GB, nodes: 1, devices_per_node: 1}]",
        ": cluster.pools: lists two pools of H100-SXM-80GB: put all devices of a kind into one",
    ),
    (
        "request_rate: 4.0",
        LENGTHS,
        ": workload.trace: 'chat.csv' cannot be combined with input_tokens: give one",
    ),
    (
        "trace: chat.csv, request_rate: 4.0",
        LENGTHS,
        ": workload: does not say when requests arrive: add arrival: poisson with request_rate,"
        " arrival: all_at_once, or concurrency",
    ),
    (
        "trace: chat.csv, request_rate: 4.0",
        f"{LENGTHS}, arrival: poisson",
        ": workload.request_rate: is required with arrival: poisson (requests per second)",
    ),
    (
        "trace: chat.csv, request_rate: 4.0",
        "input_tokens: {min: 9, max: 3}, output_tokens: 4, num_requests: 5, concurrency: 2",
        ": workload.input_tokens.min: 9 must not be above max (3)",
    ),
    (
        "trace: chat.csv, request_rate: 4.0",
        "input_tokens: -9, output_tokens: 4, num_requests: 5, concurrency: 2",
        ": workload.input_tokens: -9 must be a whole number of tokens greater than 0, or"
        " {min: ..., max: ...}",
    ),
    (
        "request_rate: 4.0",
        "request_rate: 4.0, concurrency: 16",
        ": workload.request_rate: 4.0 cannot be combined with concurrency, which fixes when"
        " requests are sent",
    ),
    (
        "{p99: 2000}",
        "2000",
        ": slo.ttft_ms: 2000 must name a statistic: write {p99: 2000}",
    ),
    (
        "tpot_ms: 50",
        "tpot_ms: {p99: 50}",
        ": goodput.tpot_ms: {'p99': 50} must be a number in milliseconds: goodput limits each"
        " request, not a statistic",
    ),
    (
        "minimize: mean_e2e",
        "minimize: mean_e2e, maximize: throughput",
        ": objective: names both minimize and maximize: keep one",
    ),
    (
        "minimize: mean_e2e",
        "minimize: mean_tft",
        ": objective.minimize: 'mean_tft' must be mean_ or a percentile such as p99_, of ttft,"
        " tpot, itl or e2e, or one of makespan, devices, cost_per_hour, cost_per_million_tokens;"
        " did you mean 'mean_ttft'?",
    ),
    (
        "minimize: mean_e2e",
        "minimize: throughput",
        ": objective.minimize: 'throughput' must be mean_ or a percentile such as p99_, of ttft,"
        " tpot, itl or e2e, or one of makespan, devices, cost_per_hour, cost_per_million_tokens;"
        " write maximize: throughput",
    ),
    ("[1, 2, 4, 8]", "[1, 2, 2]", ": search.space.tp: lists 2 twice"),
    ("[1, 2, 4, 8]", "8", ": search.space.tp: 8 must be a list: write [8]"),
    (
        "schema_version: 1",
        "schema_version: 2",
        ": schema_version: 2 is not a schema version that this planner reads (known: 1)",
    ),
    (
        "schema_version: 1\n",
        "",
        ": schema_version: required field is missing: write schema_version: 1",
    ),
    (  # several errors: the first, and how many more
        "nodes: 1, devices_per_node: 8",
        "nodes: 0, devices_per_node: 0",
        ": cluster.pools[0].nodes: 0 must be greater than 0 (and 1 more)",
    ),
    (
        "minimize: mean_e2e}\nsearch: {",
        "minimize: mean_e2e}\nsearch: # {",
        ": search: is empty: indent its fields under it, or remove it",
    ),
    (
        "minimize: mean_e2e",
        "",
        ": objective: names no quantity: write minimize: ... or maximize: throughput",
    ),
    (  # errors in two sections
        'version: "0.24.0"}\nworkload: {trace: chat.csv, request_rate: 4.0}\n',
        'version: "0.24.0", block_size: 0}\nworkload: {trace: "", request_rate: 4.0}\n',
        ": engine.block_size: 0 must be greater than 0 (and 1 more)",
    ),
    (
        "seed: 0",
        "seed: 0, seed: 1",
        ":10:37: YAML: key 'seed' appears twice (first on line 10)",
    ),
    (
        "tpot_ms: 50}",
        "tpot_ms: 50: 60}",
        ":8:22: YAML: expected ',' or '}', but got ':'",
    ),
    (
        "engine: {",
        "engine:\t{",
        ":5:8: YAML: found character '\\t' that cannot start any token",
    ),
]

# (bytes of the file, message after "bad.yaml")
RAW_CASES = [
    (b"", ": is empty; a scenario is a mapping that starts with schema_version: 1"),
    (b"- 1\n", ": holds a list; a scenario is a mapping that starts with schema_version: 1"),
    (b"model:\n  \xe9: 1\n", ": is not UTF-8 text (byte 9, line 2): save it as UTF-8"),
    (b"[" * 5000, ": YAML: nested too deeply"),
    (
        b"a: 1\n---\nb: 1\n",
        ":2:1: YAML: expected a single document in the stream, but found another document",
    ),
    (b"model: *base\n", ":1:8: YAML: found undefined alias 'base'"),
    (
        b"model: !!python/object/apply:os.getcwd []\n",
        ":1:8: YAML: could not determine a constructor for the tag"
        " 'tag:yaml.org,2002:python/object/apply:os.getcwd'",
    ),
]


def assert_one_line(call: Callable[[], object], expected: str) -> None:
    """Check the error that ``call`` raises: its exit code and its one line."""
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert str(caught.value) == expected


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Files are named relative to it, so that messages hold no path of the machine.
    monkeypatch.chdir(tmp_path)


def test_the_unchanged_scenario_is_good(tmp_path: Path) -> None:
    """The scenario that the cases break loads, so each case fails for its own reason only."""
    (tmp_path / "good.yaml").write_text(GOOD)
    assert Scenario.load("good.yaml").objective.name == "mean_e2e"


@pytest.mark.parametrize(("old", "new", "message"), SCENARIO_CASES)
def test_bad_scenario(tmp_path: Path, old: str, new: str, message: str) -> None:
    """A scenario with one thing wrong gets one line that names it."""
    assert GOOD.count(old) == 1
    (tmp_path / "bad.yaml").write_text(GOOD.replace(old, new))
    assert_one_line(lambda: Scenario.load("bad.yaml"), f"bad.yaml{message}")


@pytest.mark.parametrize(("content", "message"), RAW_CASES)
def test_file_that_is_no_scenario(tmp_path: Path, content: bytes, message: str) -> None:
    """A file that cannot be a scenario gets one line with the place where that shows."""
    (tmp_path / "bad.yaml").write_bytes(content)
    assert_one_line(lambda: Scenario.load("bad.yaml"), f"bad.yaml{message}")


def test_missing_scenario() -> None:
    """A name that is neither a file nor a bundled scenario is said to be both."""
    expected = "nope.yaml: no such file, and no bundled scenario of this name"
    assert_one_line(lambda: Scenario.load("nope.yaml"), expected)
