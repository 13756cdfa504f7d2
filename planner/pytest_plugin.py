"""pytest plugin: tests that fail where a scenario no longer leads to its locked choice.

A test that takes the fixture ``plan_check`` runs once for each scenario that its marker names::

    @pytest.mark.plan_lock("scenarios/*.yaml", tolerance=0.02)
    def test_choices(plan_check):
        assert plan_check.passed, str(plan_check)

Paths start from the folder of the test file. Without the marker the test must give the fixture
scenarios of its own by ``indirect`` parametrisation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from planner.check import CheckResult

MARKER: Final = "plan_lock"
_FIXTURE: Final = "plan_check"


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known, also under ``--strict-markers``."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}(*scenarios, tolerance=0.01, inputs_count=True): scenarios (paths from the test "
        f"file's folder, or patterns) that the fixture {_FIXTURE} compares with their locks",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a scenario that the marker names."""
    marker = metafunc.definition.get_closest_marker(MARKER)
    if _FIXTURE not in metafunc.fixturenames or marker is None:
        return
    files = _files(metafunc.definition.path.parent, marker.args)
    parameters = [{"path": file, **marker.kwargs} for file in files]
    metafunc.parametrize(_FIXTURE, parameters, indirect=True, ids=[file.name for file in files])


@pytest.fixture
def plan_check(request: pytest.FixtureRequest) -> CheckResult:
    """The scenario compared with its lock, see :class:`planner.check.CheckResult`."""
    # Imported here: pytest loads plugins before a test suite can set up the compiled loops' cache.
    from planner.check import check
    from planner.scenario import Scenario

    if not hasattr(request, "param"):
        raise pytest.UsageError(f"{_FIXTURE} needs @pytest.mark.{MARKER}('scenario.yaml')")
    settings: dict[str, Any] = dict(request.param)
    return check(Scenario.load(settings.pop("path")), **settings)


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files that ``patterns`` name from ``folder``, each pattern at least one."""
    files: list[Path] = []
    for pattern in patterns:
        is_pattern = any(c in pattern for c in "*?[")
        found = sorted(folder.glob(pattern)) if is_pattern else [folder / pattern]
        if not found:
            raise pytest.UsageError(f"{MARKER}: no file matches {folder / pattern}")
        files.extend(found)
    if not files:
        raise pytest.UsageError(f"{MARKER} names no scenario")
    return files
