"""The bundled scenarios still lead to the choices that are locked beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from planner.check import CheckResult


@pytest.mark.plan_lock("../../scenarios/*.yaml")
def test_bundled_scenario(plan_check: CheckResult) -> None:
    """Plan, metrics and everything that they rest on; `planner lock` accepts a change."""
    assert plan_check.passed, str(plan_check)
