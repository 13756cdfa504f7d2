"""The command line as a fixture."""

from __future__ import annotations

import pytest

from tests.command import Cli


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Call ``cli("solve", path)``."""
    monkeypatch.delenv("PLANNER_DEBUG", raising=False)
    return Cli(monkeypatch, capsys)
