"""The command line: exit codes, what goes to stdout and stderr, and the same bytes everywhere.

Most calls run in this process; what depends on the process itself (hash seed, threads, no
terminal, traceback at exit) runs in a new one.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import planner.api
import planner.cli
from planner import __version__
from tests.problems import LLAMA_70B, mapping, pool

if TYPE_CHECKING:
    from pathlib import Path

    from planner.search import Progress

INFEASIBLE = {"slo": {"ttft_ms": {"p99": 1}}}
TOO_LARGE = {"model": {"config": LLAMA_70B, "max_model_len": 1024}, "cluster": pool(1)}


def write(folder: Path, **sections: Any) -> str:
    """Write a small scenario; JSON is YAML too."""
    path = folder / "scenario.yaml"
    path.write_text(json.dumps(mapping(**sections)))
    return str(path)


class Cli:
    """Calls the command line in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *args: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of ``planner`` with ``args``."""
        self._monkeypatch.setattr(sys, "argv", ["planner", *args])
        with pytest.raises(SystemExit) as ended:
            planner.cli.main()
        out, err = self._capsys.readouterr()
        code = ended.value.code
        return (0 if code is None else int(code)), out, err


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Call ``cli("solve", path)``."""
    monkeypatch.delenv("PLANNER_DEBUG", raising=False)
    return Cli(monkeypatch, capsys)


def process(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``planner`` in a process of its own."""
    inherited = {k: v for k, v in os.environ.items() if k != "PLANNER_DEBUG"}
    return subprocess.run(
        [sys.executable, "-m", "planner.cli", *args],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def one_line_error(err: str) -> str:
    """The only line of stderr, which is no traceback."""
    assert err.startswith("planner: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_same_bytes_in_every_process(tmp_path: Path) -> None:
    """Neither hash seed nor thread count nor ``python -m`` shows in the JSON, and it is alone."""
    path = write(tmp_path)
    runs = [
        process("solve", path, "--json", "-", PYTHONHASHSEED=seed, NUMBA_NUM_THREADS=threads)
        for seed, threads in (("0", "1"), ("1", "2"), ("2", "1"))
    ]
    assert [(r.returncode, r.stderr) for r in runs] == [(0, "")] * 3
    assert len({r.stdout for r in runs}) == 1
    report = json.loads(runs[0].stdout)
    assert report["status"] == "optimal"
    library = planner.api.solve(planner.Scenario.load(path))
    assert runs[0].stdout == library.to_json()


def test_infeasible_ends_with_3_and_a_reason(tmp_path: Path) -> None:
    """A proof that nothing fits: code 3, the table in a pipe without colour, the reason apart."""
    run = process(
        "solve", write(tmp_path, **INFEASIBLE), TERM="xterm-256color", COLORTERM="truecolor"
    )
    assert run.returncode == 3
    assert one_line_error(run.stderr).startswith("planner: infeasible: no plan meets the SLOs; ")
    assert "smallest change that fits: slo.ttft_ms.p99: " in run.stdout
    assert "\x1b" not in run.stdout + run.stderr
    assert max(map(len, run.stdout.splitlines())) <= 100


def test_infeasible_as_json(cli: Cli, tmp_path: Path) -> None:
    """The report of a proof that nothing fits is JSON like any other."""
    code, out, _ = cli("solve", write(tmp_path, **INFEASIBLE), "--json", "-")
    assert (code, json.loads(out)["status"]) == (3, "infeasible")


@pytest.mark.parametrize("variable", ["NO_COLOR", "FORCE_COLOR"])
def test_no_colour_without_a_terminal(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """What is no terminal gets no escape sequence, whatever a CI system sets for others."""
    monkeypatch.setenv(variable, "1")
    code, out, _ = cli("solve", write(tmp_path))
    assert code == 0
    assert "optimal  deploy 2xtp1" in out
    assert "\x1b" not in out


def test_version(cli: Cli) -> None:
    """``--version`` prints one line."""
    assert cli("--version") == (0, f"planner {__version__}\n", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'."),
        (["solve", "x.yaml", "--frob"], "No such option: --frob"),
        (["solve"], "Missing argument"),
        (["simulate", "x.yaml"], "Missing option"),
        (["solve", "no_such.yaml"], "no_such.yaml: no such file"),
    ],
)
def test_bad_commands(cli: Cli, args: list[str], message: str) -> None:
    """Bad usage: code 2 and one line that says what is wrong."""
    code, out, err = cli(*args)
    assert (code, out) == (2, "")
    assert message in one_line_error(err)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("", "is not of the form [Rx]tpA"),
        ("8", "'8' is not of the form [Rx]tpA"),
        ("0xtp1", "is not of the form"),
        ("tp1:seqs=", "seqs is ''"),
        ("tp1:seqs=0", "seqs is '0'"),
        ("tp1:foo=3", "'foo=3' is not one of seqs=N, tokens=N"),
        ("tp1:seqs=8,seqs=8", "seqs is given twice"),
        ("tp1\ntp2", "is not of the form"),
    ],
)
def test_bad_plan_texts(cli: Cli, tmp_path: Path, plan: str, message: str) -> None:
    """A text that is no plan: code 2, the text and what a plan looks like."""
    code, out, err = cli("simulate", write(tmp_path), "--plan", plan)
    assert (code, out) == (2, "")
    assert message in one_line_error(err)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("tp3", "attention heads do not divide by tp: tp is 3; the model has 32"),
        ("tp4", "tp is wider than a node: tp is 4; a node has 2 devices"),
        ("3xtp1", "more devices than the pool has: needs 3 devices; the pool has 2"),
        ("tp1:seqs=512,tokens=64", "64 tokens are below 512 sequences"),
        ("tp1:tokens=99999", "max_num_batched_tokens is 99999"),
    ],
)
def test_plans_that_the_engine_cannot_launch(
    cli: Cli, tmp_path: Path, plan: str, message: str
) -> None:
    """A refusal: code 2, the rule and the figures."""
    code, out, err = cli("simulate", write(tmp_path), "--plan", plan)
    assert (code, out) == (2, "")
    assert message in one_line_error(err)


def test_plan_that_does_not_fit(cli: Cli, tmp_path: Path) -> None:
    """A plan that exceeds memory is infeasible: code 3, GiB needed against GiB there."""
    code, out, err = cli("simulate", write(tmp_path, **TOO_LARGE), "--plan", "tp1:seqs=8")
    assert (code, out) == (3, "")
    assert "GiB per device" in one_line_error(err)
    assert "GiB are usable" in err


def test_limit_before_any_plan(cli: Cli, tmp_path: Path) -> None:
    """A limit that leaves no plan: code 4."""
    path = write(tmp_path, search={"time_limit_s": 1e-9})
    code, out, err = cli("solve", path)
    assert (code, out) == (4, "")
    assert "stopped by time_limit before any plan was found" in one_line_error(err)


def test_interrupt_with_a_plan_in_hand(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C once a plan is known: code 0 and a feasible report."""

    def interrupt(self: object, progress: Progress) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(planner.cli._ProgressLine, "__call__", interrupt)
    code, out, err = cli("solve", write(tmp_path), "--json", "-")
    report = json.loads(out)
    assert (code, err, report["status"], report["deterministic"]) == (0, "", "feasible", False)


def test_interrupt_while_loading(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C before the search has begun: code 4 and no traceback."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(planner.api, "resolve", interrupt)
    code, out, err = cli("solve", write(tmp_path))
    assert (code, out) == (4, "")
    one_line_error(err.removeprefix("\n"))  # click first ends the line in which ^C stands


def test_our_bugs_show_no_traceback(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other exception: code 1 and one line; PLANNER_DEBUG adds the traceback."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError("of\nours")

    monkeypatch.setattr(planner.api, "resolve", fail)
    path = write(tmp_path)
    code, out, err = cli("solve", path)
    assert (code, out) == (1, "")
    assert one_line_error(err).startswith("planner: bug: ZeroDivisionError: of ours")
    monkeypatch.setenv("PLANNER_DEBUG", "1")
    code, _, err = cli("solve", path)
    assert code == 1
    assert "Traceback (most recent call last)" in err


def test_simulate(cli: Cli, tmp_path: Path) -> None:
    """One plan: the figures of the library as JSON, and a table without ``--json``."""
    path = write(tmp_path, **INFEASIBLE)
    code, out, err = cli("simulate", path, "--plan", "2xtp1:seqs=8,tokens=512", "--json", "-")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (report["status"], report["plan"]["devices"]) == ("simulated", 2)
    assert report["breaks"] == ["slo.ttft_ms.p99"]
    code, out, _ = cli("simulate", path, "--plan", "2xtp1:seqs=8,tokens=512")
    assert code == 0
    assert out.startswith("simulated 2xtp1:seqs=8,tokens=512")
    assert "breaks slo.ttft_ms.p99" in out


RUN_FILES = ("--requests", "r.csv", "--series", "s.csv", "--timeline", "t.json.gz")


def test_simulate_writes_its_files_the_same_in_every_process(tmp_path: Path) -> None:
    """A row per request and per iteration, a timeline; neither hash seed nor folder shows."""
    path = write(tmp_path)
    found = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        files = [str(folder / f) if "." in f else f for f in RUN_FILES]
        plan = ("--plan", "2xtp1:seqs=4,tokens=64")
        run = process("simulate", path, *plan, "--json", "-", *files, PYTHONHASHSEED=seed)
        assert (run.returncode, run.stderr) == (0, "")
        found.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert found[0] == found[1]
    assert sorted(found[0]) == ["r.csv", "s.csv", "t.json.gz"]
    metrics = json.loads(run.stdout)["metrics"]
    requests, series = (found[0][f].decode().splitlines() for f in ("r.csv", "s.csv"))
    assert len(requests) == 1 + metrics["completed"]
    assert len(series) == 1 + metrics["iterations"]
    assert gzip.decompress(found[0]["t.json.gz"]).count(b'"ph":"X"') == metrics["iterations"]


def test_a_series_of_so_many_rows(cli: Cli, tmp_path: Path) -> None:
    """``--series-rows`` thins the file; alone, or below 1, it is refused."""
    args = ("simulate", write(tmp_path), "--plan", "tp1:seqs=4,tokens=64", "--series-rows")
    target = tmp_path / "s.csv"
    assert cli(*args, "7", "--series", str(target))[0] == 0
    assert len(target.read_text().splitlines()) == 1 + 7
    for more in (("0", "--series", str(target)), ("7",)):
        code, out, err = cli(*args, *more)
        assert (code, out) == (2, "")
        assert "--series-rows" in one_line_error(err)


@pytest.mark.parametrize("option", ["--requests", "--series", "--timeline"])
def test_bad_targets_are_refused_before_the_simulation(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """A file that cannot be written: code 2, the option and why, and nothing was simulated."""
    monkeypatch.setattr(planner.api, "resolve", None)  # a call would be a bug of ours, code 1
    monkeypatch.chdir(tmp_path)
    args = ("simulate", write(tmp_path), "--plan", "tp1", option)
    for target, message in (
        ("missing/file", "cannot be written (No such directory)"),
        (".", "cannot be written (Is a directory)"),
        ("-", "must be a file; only --json can be standard output"),
    ):
        code, out, err = cli(*args, target)
        assert (code, out) == (2, "")
        assert one_line_error(err) == f"planner: error: {option} {target}: {message}\n"
    code, _, err = cli(*args, "out", "--json", "out")
    assert code == 2
    assert one_line_error(err) == f"planner: error: {option} out: is the file of --json too\n"
    assert [file.name for file in tmp_path.iterdir()] == ["scenario.yaml"]


def test_a_refused_plan_leaves_no_files(cli: Cli, tmp_path: Path) -> None:
    """Files are written only once the run is over."""
    target = tmp_path / "r.csv"
    code, _, _ = cli("simulate", write(tmp_path), "--plan", "tp3", "--requests", str(target))
    assert code == 2
    assert not target.exists()


def test_json_goes_to_a_file_whole(cli: Cli, tmp_path: Path) -> None:
    """``--json PATH`` replaces the file by exactly the report, and leaves nothing beside it."""
    target = tmp_path / "out" / "report.json"
    target.parent.mkdir()
    target.write_text("old and much longer than nothing")
    path = write(tmp_path)
    code, out, err = cli("solve", path, "--json", str(target))
    assert (code, err) == (0, "")
    assert "deploy" in out
    assert target.read_text() == cli("solve", path, "--json", "-")[1]
    assert list(target.parent.iterdir()) == [target]


def test_json_into_a_folder_that_is_not_there(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report that cannot be written is an error of the caller: code 2, the path, no file."""
    path = write(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("solve", path, "--json", "missing/report.json")
    assert (code, out) == (2, "")
    cause = "--json missing/report.json: cannot be written (No such directory)"
    assert one_line_error(err) == f"planner: error: {cause}\n"
    assert not (tmp_path / "missing").exists()


def test_a_failed_write_leaves_the_old_file(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the last step fails the old report stays and the new one is not left half-way."""
    target = tmp_path / "out" / "report.json"
    target.parent.mkdir()
    target.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(planner.cli.os, "replace", full)
    code, _, err = cli("solve", write(tmp_path), "--json", str(target))
    assert code == 2
    assert "cannot be written (No space left on device)" in one_line_error(err)
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_json_file_has_the_usual_mode(cli: Cli, tmp_path: Path) -> None:
    """A report is as readable as any other file that the user writes."""
    target, usual = tmp_path / "report.json", tmp_path / "usual"
    usual.touch()
    cli("solve", write(tmp_path), "--json", str(target))
    assert target.stat().st_mode == usual.stat().st_mode


def test_json_into_a_pipe_keeps_the_pipe(cli: Cli, tmp_path: Path) -> None:
    """What is no regular file is written to, never replaced."""
    target = tmp_path / "pipe"
    os.mkfifo(target)
    reader = os.open(target, os.O_RDONLY | os.O_NONBLOCK)
    try:
        code, _, _ = cli("solve", write(tmp_path), "--json", str(target))
        assert code == 0
        assert target.is_fifo()
        assert json.loads(os.read(reader, 1 << 16))["status"] == "optimal"
    finally:
        os.close(reader)


def test_timings_are_only_there_when_asked_for(cli: Cli, tmp_path: Path) -> None:
    """``--timings`` adds search.seconds and nothing else; without it no clock is in the JSON."""
    path = write(tmp_path)
    _, plain, _ = cli("solve", path, "--json", "-")
    _, timed, _ = cli("solve", path, "--timings", "--json", "-")
    report = json.loads(timed)
    assert report["search"].pop("seconds") > 0
    assert report == json.loads(plain)


def test_the_table_says_what_a_person_asks(cli: Cli, tmp_path: Path) -> None:
    """Plan, behaviour, runners-up, exclusions with reasons and the launch command are all there."""
    code, out, _ = cli("solve", write(tmp_path), "--exhaustive")
    assert code == 0
    for heading in ("optimal", "memory", "TTFT", "runners-up", "loses by", "excluded: ", "launch"):
        assert heading in out
    assert "exhaustive simulation names the same plan and value" in out
    assert "vllm serve" in out
