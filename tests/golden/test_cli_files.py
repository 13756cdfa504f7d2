"""Files that the command line writes: whole, the same everywhere, refused before any work."""

from __future__ import annotations

import gzip
import json
import os
from typing import TYPE_CHECKING

import pytest

import planner.api
from tests.command import one_line_error, process, write

if TYPE_CHECKING:
    from pathlib import Path

    from tests.command import Cli

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
