"""``planner explain`` and ``planner compare``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from planner.api import simulate_requests
from planner.operators import operator_times_ms
from planner.provenance import load_of
from planner.resolve import resolve
from simulator.plan import parse_plan
from tests.command import one_line_error, write
from tests.problems import scenario

if TYPE_CHECKING:
    from pathlib import Path

    from tests.command import Cli


def explained(cli: Cli, path: str, plan: str) -> dict[str, Any]:
    """The explanation as data."""
    code, out, err = cli("explain", path, "--plan", plan, "--json", "-")
    assert (code, err) == (0, "")
    data: dict[str, Any] = json.loads(out)
    return data


def test_the_best_plan(cli: Cli, tmp_path: Path) -> None:
    """It is called so."""
    data = explained(cli, write(tmp_path), "2xtp1:seqs=8,tokens=512")
    assert data["verdict"].startswith("2xtp1:seqs=8,tokens=512 is the best plan: mean_e2e 115")
    assert data["best"] == data["plan"]


def test_a_worse_plan(cli: Cli, tmp_path: Path) -> None:
    """By how much, what the search did with it, which limit binds, where the time goes."""
    path = write(tmp_path)
    data = explained(cli, path, "tp1:seqs=2,tokens=64")
    assert "% worse than 2xtp1:seqs=8,tokens=512: mean_e2e " in data["verdict"]
    assert data["settled"] is not None
    rows = {row["name"]: row for row in data["comparison"]["rows"]}
    # What the search knew of it is its value or a bound below it.
    assert 0 < data["bound"] <= rows["mean_e2el_ms"]["second"] + 1e-6
    assert rows["devices"]["change_pct"] == pytest.approx(-50.0)
    limits = {use["name"]: use for use in data["limits"]}
    assert limits["max_num_seqs"] == {
        "name": "max_num_seqs",
        "limit": 2,
        "peak": 2,
        "binds": True,
    }
    assert limits["kv_cache_blocks"]["binds"] is False
    code, out, _ = cli("explain", path, "--plan", "tp1:seqs=2,tokens=64")
    assert code == 0
    assert "max_num_seqs: peak 2 of 2, held requests back" in out
    assert "gemm gate and up" in out


def test_a_plan_outside_the_space(cli: Cli, tmp_path: Path) -> None:
    """The engine's defaults beat the small grid, and the verdict says what to do."""
    data = explained(cli, write(tmp_path), "tp2")
    assert data["settled"] is None
    assert "% better than 2xtp1:seqs=8,tokens=512" in data["verdict"]
    assert data["verdict"].endswith("it is outside search.space: widen that")


def test_a_plan_that_cannot_run(cli: Cli, tmp_path: Path) -> None:
    """The rule and its figures are the answer."""
    code, out, err = cli("explain", write(tmp_path), "--plan", "tp3")
    assert (code, err) == (0, "")
    assert out == (
        "tp3 cannot run: attention heads do not divide by tp: tp is 3; the model has 32\n"
    )


def test_a_plan_that_breaks_an_slo(cli: Cli, tmp_path: Path) -> None:
    """Named, also where no plan keeps it."""
    path = write(tmp_path, slo={"ttft_ms": {"p99": 1}})
    data = explained(cli, path, "tp1:seqs=8,tokens=512")
    assert data["verdict"] == "tp1:seqs=8,tokens=512 breaks slo.ttft_ms.p99"
    assert data["best"] is None


def test_operators_add_up_to_the_kernel_time() -> None:
    """Both views of the same parts: by operator and by label."""
    problem = resolve(scenario())
    plan = parse_plan("tp2:seqs=8,tokens=512", problem.default_limits)
    result = simulate_requests(scenario(), "tp2:seqs=8,tokens=512").result
    labelled = problem.pool.compiler.time_by_label(plan.shape, load_of(problem, result))
    total_ms = sum(operator_times_ms(problem, plan, result).values()) * result.iterations
    assert total_ms == pytest.approx(1000 * sum(labelled.values()))


def test_compare_plans(cli: Cli, tmp_path: Path) -> None:
    """Two plans of a scenario."""
    path = write(tmp_path)
    code, out, err = cli("compare", "tp1", "2xtp1", "--scenario", path, "--json", "-")
    assert (code, err) == (0, "")
    data = json.loads(out)
    rows = {row["name"]: row for row in data["rows"]}
    assert (rows["devices"]["first"], rows["devices"]["second"]) == (1, 2)
    assert data["inputs"] == []
    assert "devices" in cli("compare", "tp1", "2xtp1", "--scenario", path)[1]


def test_compare_reports(cli: Cli, tmp_path: Path) -> None:
    """Two report files of other engine versions: the figures, and what else differs."""
    reports = []
    for version in ("0.24.0", "0.10.2"):
        path = write(tmp_path, engine={"name": "vllm", "version": version})
        report = str(tmp_path / f"{version}.json")
        assert cli("simulate", path, "--plan", "tp1", "--json", report)[0] == 0
        reports.append(report)
    code, out, _ = cli("compare", *reports)
    assert code == 0
    assert "note: the reports differ in engine.version: 0.24.0 -> 0.10.2" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON ("),
        ("[]", "holds a list where a JSON object belongs"),
        ("{}", "plan: is missing"),
        (
            '{"plan": null, "status": "infeasible", "metrics": {}, "provenance": {}}',
            "plan: names no plan (status infeasible)",
        ),
    ],
)
def test_compare_what_is_no_report(cli: Cli, tmp_path: Path, content: str, message: str) -> None:
    """One line with the file and what is wrong."""
    file = tmp_path / "a.json"
    file.write_text(content)
    code, out, err = cli("compare", str(file), str(file))
    assert (code, out) == (2, "")
    assert message in one_line_error(err)
