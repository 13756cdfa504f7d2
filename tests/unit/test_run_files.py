"""Files of a run: their content worked by hand, and how they come to be."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import planner.io.run_files
from planner.api import simulate, simulate_requests
from planner.errors import InputError
from planner.io.run_files import (
    check_run_files,
    requests_table,
    series_table,
    write_requests,
    write_series,
    write_timeline,
)
from simulator.rules import Rules
from simulator.run import Run
from tests.builders import GATED, limits, linear_cost, workload
from tests.problems import scenario

if TYPE_CHECKING:
    from pathlib import Path

    from simulator.iteration_log import Iterations
    from simulator.run import RunResult
    from simulator.workload import Workload

WHAT = workload([3, 3, 2, 5], [2, 1, 1, 2], [0.0, 0.0005, 0.0005, 0.004])
UNDER = limits(seqs=2, tokens=4, blocks=10)  # of 4 tokens
"""Iterations of 1 ms:

0 to 1 ms  3 tokens of request 0.
1 to 2 ms  Its decode, 3 tokens of request 1; the budget of 4 is spent and request 2 waits.
2 to 3 ms  2 tokens of request 2.
4 to 5 ms  4 of the 5 tokens of request 3, one block.
5 to 6 ms  The fifth, in a second block.
6 to 7 ms  Its decode.
"""

REQUESTS = """\
request,replica,arrival_s,prompt_tokens,output_tokens,ttft_ms,tpot_ms,e2el_ms,preemptions,finish_s
0,0,0.0,3,2,1.0,1.0,2.0,0,0.002
1,0,0.0005,3,1,1.5,,1.5,0,0.002
2,0,0.0005,2,1,2.5,,2.5,0,0.003
3,0,0.004,5,2,2.0,1.0,3.0,0,0.007
"""

HEADER = "start_s,replica,iterations,busy_s,tokens,prompt_tokens,decodes,sampled,running,waiting"
SERIES = f"""\
{HEADER},kv_usage
0.0,0,1,0.001,3,3,0,1,1,0,0.1
0.001,0,1,0.001,4,3,1,2,2,1,0.2
0.002,0,1,0.001,2,2,0,1,1,0,0.1
0.004,0,1,0.001,4,4,0,0,1,0,0.1
0.005,0,1,0.001,1,1,0,1,1,0,0.2
0.006,0,1,0.001,1,0,1,1,1,0,0.2
"""

# Starts lie from 0 to 6 ms, so two steps are 3 ms each, and the last start belongs to the second.
THINNED = f"""\
{HEADER},kv_usage
0.0,0,3,0.003,9,8,1,4,2,1,0.2
0.003,0,3,0.003,6,5,1,2,1,0,0.2
"""


def run_of(what: Workload = WHAT, replicas: int = 1) -> tuple[RunResult, Iterations]:
    """The run of 1 ms iterations, and its log."""
    run = Run(what, replicas, UNDER, linear_cost(0.001), GATED)
    run.record_iterations()
    result = run.finish()
    assert result.log is not None
    return result, result.log


def events(path: Path) -> list[dict[str, Any]]:
    """Events of a timeline."""
    found: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return found


def test_a_row_per_request(tmp_path: Path) -> None:
    """Times as worked by hand; without a second token there is no TPOT."""
    write_requests(str(tmp_path / "r.csv"), WHAT, run_of()[0])
    assert (tmp_path / "r.csv").read_bytes().decode() == REQUESTS


def test_a_row_per_iteration(tmp_path: Path) -> None:
    """The schedule as worked by hand; enough rows leave it as it is."""
    log = run_of()[1]
    for rows in (None, 6, 100):
        write_series(str(tmp_path / "s.csv"), log, rows)
        assert (tmp_path / "s.csv").read_bytes().decode() == SERIES


def test_a_thinned_series(tmp_path: Path) -> None:
    """Equal time steps: sums of counts, the largest of levels."""
    write_series(str(tmp_path / "s.csv"), run_of()[1], 2)
    assert (tmp_path / "s.csv").read_bytes().decode() == THINNED


def test_thinning_loses_no_token_and_no_peak() -> None:
    """On three replicas, whatever the number of rows; replicas stay apart."""
    rng = np.random.default_rng(5)
    prompts, outputs = rng.integers(1, 30, 60), rng.integers(1, 12, 60)
    what = workload(prompts.tolist(), outputs.tolist(), np.sort(rng.random(60) / 8).tolist())
    log = run_of(what, 3)[1]
    full = series_table(log)
    for most in (1, 2, 7, 40):
        table = series_table(log, most)
        assert np.bincount(table["replica"]).max() <= most
        assert table["iterations"].sum() == len(log)
        assert (np.diff(table["start_s"]) >= 0).all()
        for r in range(3):
            mine, all_mine = table["replica"] == r, full["replica"] == r
            for name in ("tokens", "prompt_tokens", "decodes", "sampled", "iterations"):
                assert table[name][mine].sum() == full[name][all_mine].sum()
            for name in ("running", "waiting", "kv_usage"):
                assert table[name][mine].max() == full[name][all_mine].max()
            assert table["busy_s"][mine].sum() == pytest.approx(full["busy_s"][all_mine].sum())


def test_the_timeline(tmp_path: Path) -> None:
    """A slice per iteration, counters where they change, zero while nothing runs."""
    write_timeline(str(tmp_path / "t.json"), run_of()[1])
    found = events(tmp_path / "t.json")
    assert [(e["name"], e["args"]["name"]) for e in found if e["ph"] == "M"] == [
        ("process_name", "replica 0"),
        ("thread_name", "iterations"),
    ]
    slices = [e for e in found if e["ph"] == "X"]
    assert [(e["ts"], e["dur"], e["name"]) for e in slices] == [
        (0, 1000, "prefill"),
        (1000, 1000, "prefill+decode"),
        (2000, 1000, "prefill"),
        (4000, 1000, "prefill"),
        (5000, 1000, "prefill"),
        (6000, 1000, "decode"),
    ]
    assert slices[1]["args"] == {
        "tokens": 4,
        "prompt_tokens": 3,
        "decodes": 1,
        "sampled": 2,
        "running": 2,
        "waiting": 1,
        "free_pages": 8,
    }
    levels = {
        name: [(e["ts"] // 1000, e["args"][unit]) for e in found if e["name"] == name]
        for name, unit in (
            ("running", "requests"),
            ("waiting", "requests"),
            ("KV cache", "percent"),
        )
    }
    assert levels == {
        "running": [(0, 1), (1, 2), (2, 1), (3, 0), (4, 1), (7, 0)],
        "waiting": [(0, 0), (1, 1), (2, 0)],
        "KV cache": [(0, 10), (1, 20), (2, 10), (3, 0), (4, 10), (5, 20), (7, 0)],
    }
    assert {e["ph"] for e in found} == {"M", "X", "C"}
    assert {(e["pid"], e["tid"]) for e in found} == {(1, 1)}


def test_replicas_are_processes(tmp_path: Path) -> None:
    """Each replica has a number of its own, also one that nothing was sent to."""
    write_timeline(str(tmp_path / "t.json"), run_of(workload([2, 2], [1, 1]), 3)[1])
    found = events(tmp_path / "t.json")
    assert {e["pid"] for e in found} == {1, 2, 3}
    assert [e["pid"] for e in found if e["ph"] == "X"] == [1, 2]


def test_batches_in_flight_have_tracks_of_their_own(tmp_path: Path) -> None:
    """Slices of one track never cross, and counters fall to 0 only where nothing is in flight."""
    log = run_of()[1]
    stretched = dataclasses.replace(log, end_s=log.end_s + np.array([0, 0, 0, 0.0015, 0.0015, 0]))
    write_timeline(str(tmp_path / "t.json"), stretched)
    found = events(tmp_path / "t.json")
    slices = [(e["ts"] // 1000, e["tid"]) for e in found if e["ph"] == "X"]
    # 4 to 6.5 ms, 5 to 7.5 ms beside it, and 6 to 7 ms beside both
    assert slices == [(0, 1), (1, 1), (2, 1), (4, 1), (5, 2), (6, 3)]
    names = [e["args"]["name"] for e in found if e["name"] == "thread_name"]
    assert names == ["iterations", "in flight 2", "in flight 3"]
    running = [(e["ts"], e["args"]["requests"]) for e in found if e["name"] == "running"]
    assert running[-2:] == [(4000, 1), (7500, 0)]


def test_sessions_name_the_turn_before() -> None:
    """A column more, only where there are sessions."""
    what = dataclasses.replace(WHAT, after=np.array([-1, -1, 0, 1]), think_s=np.zeros(4))
    result = run_of()[0]
    assert requests_table(what, result)["after"].tolist() == [-1, -1, 0, 1]
    assert "after" not in requests_table(WHAT, result)


def test_preemptions_are_in_the_table() -> None:
    """Two requests on blocks for little more than one: the later one is preempted."""
    what = workload([7, 7], [9, 9])
    run = Run(what, 1, limits(blocks=5), linear_cost(0.001), Rules())
    result = run.finish()
    table = requests_table(what, result)
    assert table["preemptions"][0] == 0
    assert table["preemptions"][1] == result.preemptions > 0


def test_parquet_holds_what_the_csv_holds(tmp_path: Path) -> None:
    """Same columns and values; an undefined TPOT is null."""
    parquet = pytest.importorskip("pyarrow.parquet")
    result, log = run_of()
    write_requests(str(tmp_path / "r.parquet"), WHAT, result)
    write_series(str(tmp_path / "s.PARQUET"), log)
    for name, text in (("r.parquet", REQUESTS), ("s.PARQUET", SERIES)):
        header, *rows = text.splitlines()
        table = parquet.read_table(tmp_path / name)
        assert table.column_names == header.split(",")
        read = zip(*(column.to_pylist() for column in table.columns), strict=True)
        assert [",".join("" if v is None else str(v) for v in row) for row in read] == rows


def test_compressed_files_carry_no_clock(tmp_path: Path) -> None:
    """``.gz`` holds the same text, with neither a time nor a name in its header."""
    result, log = run_of()
    for name in ("a.json.gz", "b.json.gz", "c.json"):
        write_timeline(str(tmp_path / name), log)
    packed = (tmp_path / "a.json.gz").read_bytes()
    assert packed == (tmp_path / "b.json.gz").read_bytes()
    assert packed[3:8] == bytes(5)  # flags (no name) and time
    assert gzip.decompress(packed) == (tmp_path / "c.json").read_bytes()
    write_requests(str(tmp_path / "r.csv.gz"), WHAT, result)
    assert gzip.decompress((tmp_path / "r.csv.gz").read_bytes()).decode() == REQUESTS


@pytest.mark.parametrize(
    ("targets", "rule"),
    [
        ({"--requests": "no/r.csv"}, "--requests no/r.csv: cannot be written (No such directory)"),
        ({"--timeline": "."}, "--timeline .: cannot be written (Is a directory)"),
        ({"--series": "-"}, "--series -: must be a file; only --json can be standard output"),
        ({"--requests": "x", "--series": "./x"}, "--series ./x: is the file of --requests too"),
        ({"--timeline": "report.json"}, "--timeline report.json: is the file of --json too"),
    ],
)
def test_targets_that_are_refused(
    targets: dict[str, str], rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that begins with the option."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refused:
        check_run_files(targets, "report.json")
    assert str(refused.value) == rule
    assert list(tmp_path.iterdir()) == []


def test_targets_that_are_fine(tmp_path: Path) -> None:
    """Files that are there, ones that are not, and one device twice."""
    (tmp_path / "old.csv").touch()
    check_run_files({"--requests": str(tmp_path / "old.csv"), "--series": None}, "-")
    check_run_files({"--requests": os.devnull, "--series": os.devnull}, os.devnull)


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before the run; a timeline and a CSV do not ask for it."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    target = str(tmp_path / "r.parquet")
    with pytest.raises(InputError) as refused:
        check_run_files({"--requests": target})
    rule = "needs pyarrow: pip install 'serveplan[parquet]', or end the name in .csv"
    assert str(refused.value) == f"--requests {target}: {rule}"
    check_run_files({"--requests": str(tmp_path / "r.csv"), "--timeline": target})


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where writing fails half-way the old file stays and nothing lies beside it."""
    target = tmp_path / "t.json"
    target.write_text("old")

    def full(file: Any, log: Iterations) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(planner.io.run_files, "write_events", full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        write_timeline(str(target), run_of()[1])
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_has_the_usual_mode_and_keeps_its_own(tmp_path: Path) -> None:
    """A new file is as readable as any other; one that is replaced keeps its mode."""
    usual, new, closed = tmp_path / "usual", tmp_path / "new.csv", tmp_path / "closed.csv"
    usual.touch()
    closed.touch(mode=0o600)
    for target in (new, closed):
        write_requests(str(target), WHAT, run_of()[0])
    assert new.stat().st_mode == usual.stat().st_mode
    assert closed.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["pipe", "pipe.parquet"])
def test_a_pipe_stays_one(name: str, tmp_path: Path) -> None:
    """What is no regular file is written to, never replaced, in every format."""
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    target = tmp_path / name
    os.mkfifo(target)
    reader = os.open(target, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_requests(str(target), WHAT, run_of()[0])
        read = os.read(reader, 1 << 16)
    finally:
        os.close(reader)
    assert target.is_fifo()
    assert read[:4] == b"PAR1" if name.endswith("parquet") else read.decode() == REQUESTS


def test_the_library_gives_requests_and_iterations() -> None:
    """The report is that of ``simulate``; the log is there where asked for."""
    plan = "2xtp1:seqs=8,tokens=512"
    found = simulate_requests(scenario(), plan, record_iterations=True)
    assert found.report.to_json() == simulate(scenario(), plan).to_json()
    assert simulate_requests(scenario(), plan).result.log is None
    assert found.result.log is not None
    assert len(found.result.log) == found.report.metrics["iterations"]
    ttft_ms = requests_table(found.workload, found.result)["ttft_ms"]
    assert ttft_ms.mean() == pytest.approx(found.report.metrics["mean_ttft_ms"], abs=1e-6)
