"""``planner lock`` and ``planner check``: what changed, why, and the same bytes again."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest

import planner.resolve
import planner.sites
from planner.check import Difference, compare_locks
from planner.lock import Answer, Lock
from tests.command import one_line_error, write
from tests.problems import engine

if TYPE_CHECKING:
    from pathlib import Path

    from tests.command import Cli

TRACE = "arrival_s,prompt_tokens,output_tokens\n0,100,20\n0.1,50,10\n0.3,200,30\n"
SPACE = {
    "space": {"tp": [1], "replicas": [1, 2], "max_num_seqs": [2], "max_num_batched_tokens": [512]}
}


def traced(folder: Path, text: str = TRACE, **sections: Any) -> str:
    """A scenario of two plans over a trace of three requests."""
    (folder / "trace.csv").write_text(text)
    return write(folder, **{"workload": {"trace": "trace.csv"}, "search": SPACE, **sections})


@pytest.fixture
def locked(cli: Cli, tmp_path: Path) -> str:
    """A scenario and its lock."""
    path = traced(tmp_path)
    code, out, err = cli("lock", path)
    assert (code, err) == (0, "")
    assert out == f"{path}: locked 2xtp1:seqs=2,tokens=512\n"
    return path


def causes(cli: Cli, path: str) -> list[str]:
    """What a check that fails gives as its reasons."""
    code, out, err = cli("check", path, "--json", "-")
    assert (code, err) == (5, "")
    (report,) = json.loads(out)["checks"]
    return list(report["causes"])


def test_same_bytes_again(cli: Cli, locked: str, tmp_path: Path) -> None:
    """A lock written twice has the same bytes, four digits a number, and no path or time in it."""
    file = tmp_path / "scenario.lock.json"
    first = file.read_bytes()
    assert cli("lock", locked)[0] == 0
    assert file.read_bytes() == first
    assert str(tmp_path).encode() not in first
    metrics = json.loads(first)["answer"]["metrics"]
    assert metrics["mean_ttft_ms"] == float(f"{metrics['mean_ttft_ms']:.4g}")
    assert {f.name for f in tmp_path.iterdir()} == {"scenario.yaml", "trace.csv", file.name}


def test_nothing_changed(cli: Cli, locked: str, tmp_path: Path) -> None:
    """Code 0, and both formats say so."""
    junit, markdown = tmp_path / "junit.xml", tmp_path / "report.md"
    code, out, err = cli("check", locked, "--junit", str(junit), "--markdown", str(markdown))
    assert (code, err) == (0, "")
    assert out == f"{locked}: as locked (2xtp1:seqs=2,tokens=512)\n"
    root = ElementTree.parse(junit).getroot()
    assert (root.attrib["tests"], root.attrib["failures"]) == ("1", "0")
    assert root.find("testsuite/testcase/failure") is None
    assert markdown.read_text().startswith("## planner check: 1 of 1 as locked\n")


def test_changed_trace(cli: Cli, locked: str, tmp_path: Path) -> None:
    """One more request: metrics move, the trace is why, and both formats carry it."""
    traced(tmp_path, TRACE + "0.3,900,30\n")
    junit, markdown = tmp_path / "junit.xml", tmp_path / "report.md"
    code, out, _ = cli("check", locked, "--junit", str(junit), "--markdown", str(markdown))
    assert code == 5
    assert "\n  completed: 3 -> 4 (+33.3 %)\n" in out
    assert "\n  because requests of the workload changed: trace: " in out
    failure = ElementTree.parse(junit).getroot().find("testsuite/testcase/failure")
    assert failure is not None
    assert "requests of the workload changed" in str(failure.text)
    assert "| completed | `3.0` | `4.0` |" in markdown.read_text()


@pytest.mark.parametrize(
    ("sections", "cause"),
    [
        (
            {"objective": {"minimize": "p99_ttft"}},
            "objective changed: scenario.objective.minimize: mean_e2e -> p99_ttft",
        ),
        (
            {"engine": engine(version="0.10.2")},
            "engine changed: scenario.engine.version: 0.24.0 -> 0.10.2",
        ),
        (
            {"engine": engine(calibration="none")},
            "calibration changed: calibration.host.iteration_s: 0.00053 -> 0 (-100.0 %)",
        ),
        (
            {"slo": {"ttft_ms": {"p99": 1}}},
            "slo changed: scenario.slo: absent -> {'ttft_ms': {'p99': 1.0}}",
        ),
    ],
)
def test_changed_scenario(
    cli: Cli, locked: str, tmp_path: Path, sections: dict[str, Any], cause: str
) -> None:
    """The field that changed is named, also where the plan is the same."""
    traced(tmp_path, **sections)
    assert cause in causes(cli, locked)


def test_changed_table(cli: Cli, locked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of other bytes is a difference although every metric holds."""
    monkeypatch.setattr(planner.sites, "kernel_table_digest", lambda *_: "0" * 64)
    (cause,) = causes(cli, locked)
    assert cause.startswith("kernel table changed: table.sha256: ")
    assert cause.endswith(" -> 000000000000")
    code, out, _ = cli("check", locked)
    assert code == 5
    assert "though plan and metrics hold: accept the new inputs with planner lock" in out
    assert cli("check", locked, "--allow-changed-inputs")[0] == 0


def test_changed_calibration(cli: Cli, locked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants of the engine's profile that a new fit moves."""
    load = planner.sites.load_engine

    def refitted(*args: Any, **named: Any) -> Any:
        profile = load(*args, **named)
        host = dataclasses.replace(profile.host, iteration_s=0.002)
        return dataclasses.replace(profile, host=host)

    monkeypatch.setattr(planner.sites, "load_engine", refitted)
    assert causes(cli, locked) == [
        "calibration changed: calibration.host.iteration_s: 0.00053 -> 0.002 (+277.4 %)"
    ]
    assert "mean_tpot_ms: " in cli("check", locked)[1]


def test_another_planner_version(cli: Cli, locked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noted, and no difference while it leads to the same."""
    monkeypatch.setattr(planner.resolve, "__version__", "9.0")
    code, out, _ = cli("check", locked)
    assert code == 0
    version = planner.__version__
    assert f"note: planner changed: planner.version: {version} -> 9.0" in out


def test_facts_of_the_planner(cli: Cli, locked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose facts move is a note while the answer holds, else the cause."""
    load = planner.sites.load_device

    def change(field: str, factor: float) -> None:
        def changed(name: str) -> Any:
            device = load(name)
            return dataclasses.replace(
                device, **{field: type(getattr(device, field))(factor * getattr(device, field))}
            )

        monkeypatch.setattr(planner.sites, "load_device", changed)

    change("tdp_w", 1.5)
    code, out, _ = cli("check", locked)
    assert code == 0
    assert "note: facts of the device changed: device: " in out
    change("memory_bytes", 0.5)
    code, out, _ = cli("check", locked)
    assert code == 5
    assert "  peak_kv_usage: " in out
    assert "  because facts of the device changed: device: " in out


def test_infeasible_is_an_answer(cli: Cli, tmp_path: Path) -> None:
    """It is locked like a plan."""
    path = traced(tmp_path, slo={"ttft_ms": {"p99": 1}})
    assert cli("lock", path) == (0, f"{path}: locked infeasible\n", "")
    assert cli("check", path) == (0, f"{path}: as locked (infeasible)\n", "")


def test_stopped_search_is_not_locked(cli: Cli, tmp_path: Path) -> None:
    """What a time limit cut short depends on the machine: code 4 and no file."""
    path = traced(tmp_path, search={**SPACE, "time_limit_s": 1e-9})
    code, _, err = cli("lock", path)
    assert code == 4
    one_line_error(err)
    assert not (tmp_path / "scenario.lock.json").exists()


def a_lock(plan: str, **metrics: float) -> Lock:
    """A lock of nothing but an answer."""
    answer = Answer(status="optimal", plan=plan, objective="minimize devices", metrics=metrics)
    return Lock(answer=answer, inputs={})


def test_tolerance() -> None:
    """A metric may move by the tolerance, not more; one that is gone is a difference."""
    was = a_lock("tp8", mean_ttft_ms=100.0, gone=1.0)
    now = a_lock("tp8", mean_ttft_ms=100.9, new=1.0)
    assert compare_locks("s", was, now, tolerance=0.01).results == (Difference("gone", 1.0, None),)
    moved = compare_locks("s", was, a_lock("tp4", mean_ttft_ms=101.1, gone=1.0), tolerance=0.01)
    assert [d.what for d in moved.results] == ["plan", "mean_ttft_ms"]
    assert moved.causes == ("nothing that the lock records changed, so the planner's own code did",)
