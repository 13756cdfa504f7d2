"""Bad input to every command: the line it gets, its exit code, and that nothing is written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from planner.cli import app
from tests.command import Cli, one_line_error, write
from tests.problems import LLAMA_8B

S = "scenario.yaml"
OTHER = "trtllm.yaml"
INIT = ("init", "--model", LLAMA_8B, "--device", "H100-SXM-80GB")

# (arguments, part of the message, exit code); files are those of the fixture `folder`.
CASES: list[tuple[tuple[str, ...], str, int]] = [
    (("solve",), "Missing argument", 2),
    (("solve", "nope.yaml"), "nope.yaml: no such file, and no bundled scenario", 2),
    (("solve", "broken.yaml"), "broken.yaml:1:", 2),
    (("solve", "."), ".: is a directory, not a file", 2),
    (("solve", S, "--json", "no/such/r.json"), "--json no/such/r.json: cannot be written", 2),
    (("solve", S, "--json", "sub"), "--json sub: cannot be written (Is a directory)", 2),
    (("solve", S, "--json"), "Option '--json' requires an argument", 2),
    (("solve", S, "--frob"), "No such option", 2),
    (("simulate", S), "Missing option '--plan'", 2),
    (("simulate", S, "--plan", ""), "--plan: '' is not a plan", 2),
    (("simulate", S, "--plan", "8"), "--plan: '8' is not a plan", 2),
    (("simulate", S, "--plan", "tp0"), "is not of the form", 2),
    (("simulate", S, "--plan", "tp3"), "attention heads do not divide by tp", 2),
    (("simulate", S, "--plan", "tp1", "--requests", "no/r.csv"), "--requests no/r.csv", 2),
    (("simulate", S, "--plan", "tp1", "--series-rows", "3"), "--series, which is not given", 2),
    (("simulate", "large.yaml", "--plan", "tp1:seqs=8"), "GiB are usable", 3),
    (("explain", S), "Missing option '--plan'", 2),
    (("explain", S, "--plan", "best"), "--plan: 'best' is not a plan", 2),
    (("explain", "nope.yaml", "--plan", "tp1"), "nope.yaml: no such file", 2),
    (("compare", "a.json"), "Missing argument", 2),
    (("compare", "a.json", "b.json"), "a.json: no such file", 2),
    (("compare", "broken.yaml", "broken.yaml"), "broken.yaml: is not JSON", 2),
    (("compare", "tp1", "tp", "--scenario", S), "'tp' is not a plan", 2),
    (("compare", "tp1", "tp2", "--scenario", "nope.yaml"), "nope.yaml: no such file", 2),
    (("crossovers", S), "give one of --rate, --input-tokens and --output-tokens", 2),
    (("crossovers", S, "--rate", "5"), "--rate: '5' must be LOW:HIGH", 2),
    (("crossovers", S, "--rate", "9:5"), "the lower one first", 2),
    (("crossovers", "nope.yaml", "--rate", "1:2"), "nope.yaml: no such file", 2),
    (("lock",), "Missing argument", 2),
    (("lock", S, "nope.yaml"), "nope.yaml: no such file", 2),
    (("lock", "limited.yaml"), "stopped by time_limit before any plan was found", 4),
    (("check", S), "scenario.lock.json: no such file: write it with planner lock", 2),
    (("check", "locked.yaml"), "locked.lock.json: is not JSON", 2),
    (("check", "old.yaml"), "old.lock.json: lock_version: 9 is wrong", 2),
    (("check", S, "--junit", "no/j.xml"), "--junit no/j.xml: cannot be written", 2),
    (("check", S, "--markdown", "sub"), "--markdown sub: cannot be written", 2),
    (("check", S, "--tolerance", "-1"), "Invalid value for '--tolerance'", 2),
    (("check", S, "--tolerance", "nan"), "--tolerance", 2),
    (("export", S, "--plan", "tp1"), "Missing option '--format'", 2),
    (("export", S, "--plan", "tp1", "--format", "helm"), "--format: 'helm' must be one of", 2),
    (("export", S, "--plan", "tp1", "--format", "sglang"), "the scenario's engine is vllm", 2),
    (("export", S, "--plan", "tp4", "--format", "lws", "-o", "out"), "tp is wider than a node", 2),
    (("export", S, "--plan", "tp1", "--format", "vllm", "-o", "no/o"), "--output no/o: cannot", 2),
    (("export", S, "--plan", "tp1", "--format", "dynamo", "-o", "out"), "give --image", 2),
    (("export", S, "--plan", "tp1", "--format", "vllm", "--image", "i"), "start no container", 2),
    (("export", OTHER, "--plan", "tp1", "--format", "trtllm"), "has no server of its own", 2),
    (("export", "large.yaml", "--plan", "tp1:seqs=8", "--format", "lws"), "GiB are usable", 3),
    (("list",), "Missing argument", 2),
    (("list", "plans"), "list: plans: must be one of", 2),
    (("list", "devices", "--json", "no/l.json"), "--json no/l.json: cannot be written", 2),
    (("init",), "Missing option '--model'", 2),
    ((*INIT, "--request-rate", "fast"), "Invalid value for '--request-rate'", 2),
    ((*INIT, "--objective", "speed", "-o", "out"), "'speed' must be mean_ or a per", 2),
    ((*INIT, "-o", S), "--output scenario.yaml: exists already", 2),
    (("schema", "-o", "no/s.json"), "--output no/s.json: cannot be written", 2),
    (("calibrate", S, "a.csv", "-o", "out"), "a.csv", 2),
    (("verify", "no.cert"), "no.cert", 2),
    (("verify", "old.lock.json"), "old.lock.json", 2),
    (("verify", "old.lock.json", "--all", "--sample", "3"), "exclude one another", 2),
    (("solve", S, "--certificate", "no/c"), "--certificate no/c: cannot be written", 2),
    (("frobnicate",), "No such command 'frobnicate'", 2),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder with files that the cases name."""
    monkeypatch.chdir(tmp_path)
    sections = {
        "limited.yaml": {"search": {"time_limit_s": 1e-9}},
        "large.yaml": {
            "model": {"config": "meta-llama/Llama-3.1-70B-Instruct", "max_model_len": 1024},
            "cluster": {"pools": [{"device": "H100-SXM-80GB", "nodes": 1, "devices_per_node": 1}]},
        },
        OTHER: {"engine": {"name": "trtllm", "version": "0.14.0"}},
        "locked.yaml": {},
        "old.yaml": {},
        S: {},
    }
    for name, changed in sections.items():
        Path(write(tmp_path, **changed)).rename(tmp_path / name)
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "locked.lock.json").write_text("{")
    answer = {"status": "optimal", "plan": "tp1", "objective": None, "metrics": {}}
    (tmp_path / "old.lock.json").write_text(
        str({"lock_version": 9, "answer": answer, "inputs": {}})
        .replace("'", '"')
        .replace("None", "null")
    )
    (tmp_path / "sub").mkdir()
    return tmp_path


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below ``folder`` with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize(
    ("arguments", "message", "code"), CASES, ids=[" ".join(case[0]) for case in CASES]
)
def test_bad_command(
    cli: Cli, folder: Path, arguments: tuple[str, ...], message: str, code: int
) -> None:
    """One line on stderr, nothing on stdout, the folder as it was."""
    before = contents(folder)
    got, out, err = cli(*arguments)
    assert (got, out) == (code, "")
    assert message in one_line_error(err)
    assert contents(folder) == before


def test_every_command_is_in_the_table() -> None:
    """At least forty cases, and no command without one."""
    assert len(CASES) >= 40
    commands = {command.name for command in app.registered_commands}
    assert commands <= {arguments[0] for arguments, _, _ in CASES}


WRITER = """
import sys, time
from planner.io.output import deliver_file

def write(file):
    file.write(b"new " * 100_000)
    file.flush()
    print("halfway", flush=True)
    time.sleep(60)

deliver_file("report.json", "--json", write)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_stop_in_the_middle_of_a_write(tmp_path: Path, sent: signal.Signals) -> None:
    """The old file is untouched, and Ctrl-C leaves no other."""
    file = tmp_path / "report.json"
    file.write_text("old")
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "halfway\n"
    writer.send_signal(sent)
    writer.wait(timeout=30)
    assert file.read_text() == "old"
    if sent is signal.SIGINT:
        assert [f.name for f in tmp_path.iterdir()] == ["report.json"]


def test_a_kill_at_any_time_leaves_old_or_new(tmp_path: Path) -> None:
    """A command that is killed while it runs leaves the file as it was or whole."""
    file = tmp_path / "schema.json"
    command = [sys.executable, "-m", "planner.cli", "schema", "-o", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    began_s = time.monotonic()
    subprocess.run(command, env=environment, check=True, timeout=60)
    took_s = time.monotonic() - began_s
    whole = file.read_text()
    for share in (0.5, 0.8, 0.95):
        file.write_text("old")
        running = subprocess.Popen(command, env=environment)
        time.sleep(share * took_s)
        running.kill()
        running.wait(timeout=30)
        assert file.read_text() in ("old", whole)
