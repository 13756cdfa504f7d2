"""The command line: exit codes, what goes to stdout and stderr, and the same bytes everywhere.

Most calls run in this process; what depends on the process itself (hash seed, threads, no
terminal, traceback at exit) runs in a new one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

import planner.api
import planner.commands.solve
from planner import __version__
from tests.command import one_line_error, process, write
from tests.problems import LLAMA_70B, pool

if TYPE_CHECKING:
    from pathlib import Path

    from planner.search_result import Progress
    from tests.command import Cli

INFEASIBLE = {"slo": {"ttft_ms": {"p99": 1}}}
TOO_LARGE = {"model": {"config": LLAMA_70B, "max_model_len": 1024}, "cluster": pool(1)}


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
        ("tp1:foo=3", "'foo=3' is not one of layers=N-N, seqs=N, tokens=N"),
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

    monkeypatch.setattr(planner.commands.solve.ProgressLine, "__call__", interrupt)
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


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("devices", "H100-SXM-80GB"),
        ("models", "deepseek-ai/DeepSeek-V3"),
        ("engines", "0.24.0"),
        ("kernels", "L40S"),
        ("interconnects", "ib_400g"),
    ],
)
def test_list_names_what_a_scenario_may_say(cli: Cli, kind: str, name: str) -> None:
    """A table for a person, the same entries and more as JSON for a program."""
    code, table, err = cli("list", kind)
    assert (code, err) == (0, "")
    assert name in table
    code, out, _ = cli("list", kind, "--json", "-")
    rows = json.loads(out)[kind]
    assert code == 0
    assert any(name in row.values() for row in rows)
    assert len(table.splitlines()) == 1 + len(rows)


def test_list_of_an_unknown_kind(cli: Cli) -> None:
    """One line with what there is."""
    code, _, err = cli("list", "plans")
    assert code == 2
    assert one_line_error(err) == (
        "planner: error: list: plans: must be one of: devices, models, engines, kernels, "
        "interconnects\n"
    )
