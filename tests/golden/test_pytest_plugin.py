"""The pytest plugin, in a pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from tests.command import write
from tests.problems import SMALL

if TYPE_CHECKING:
    from pathlib import Path

    from tests.command import Cli

SPACE = {**SMALL["search"], "space": {"tp": [1], "max_num_seqs": [2, 8]}}
TEST = """
import pytest

@pytest.mark.plan_lock("scen*.yaml", tolerance=0.5)
def test_choice(plan_check):
    assert plan_check.passed, str(plan_check)
"""


def run_pytest(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run pytest in ``folder`` with the plugin that the package registers."""
    arguments = ["-p", "no:cacheprovider", "--strict-markers", "-q", str(folder)]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=folder,
    )


def test_plugin(cli: Cli, tmp_path: Path) -> None:
    """A test per scenario: passes as locked, fails with the reason, refuses a bad pattern."""
    path = write(tmp_path, search=SPACE)
    assert cli("lock", path)[0] == 0
    (tmp_path / "test_plans.py").write_text(TEST)
    run = run_pytest(tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 passed" in run.stdout
    write(tmp_path, search=SPACE, objective={"minimize": "mean_ttft"})
    run = run_pytest(tmp_path)
    assert run.returncode == 1
    assert "test_choice[scenario.yaml]" in run.stdout
    assert "because objective changed: scenario.objective.minimize: mean_e2e" in run.stdout
    (tmp_path / "test_plans.py").write_text(TEST.replace("scen*", "nothing*"))
    assert "no file matches" in run_pytest(tmp_path).stdout
