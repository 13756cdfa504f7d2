"""Calling the command line in tests: in this process or in a new one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import planner.cli
from tests.problems import mapping

if TYPE_CHECKING:
    from pathlib import Path


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
