"""The guide to a new policy: its code runs and its table holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

from simulator.rules import POLICIES, RULES_CLASSES, Rules
from tests import schedules
from tests.builders import limits, workload

GUIDE = Path(__file__).parents[2] / "docs" / "add-a-policy.md"
LONGEST_LINES = 150
_IMPORTS = re.compile(r"^from simulator[^(\n]*(\([^)]*\))?\n|^@inner\n", re.MULTILINE)


def blocks() -> list[str]:
    """Python in the guide."""
    return re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_policy_of_the_guide_gives_its_table() -> None:
    """Run as it stands in the guide, with the number that it gets there."""
    policy, table = blocks()
    solo = len(POLICIES)
    dispatch = schedules._ENGINE.schedule.__globals__
    # The plain engine is a second copy of the simulator, in which nothing is compiled: what the
    # guide imports is taken from there.
    code = dict(vars(dispatch["vllm_v1"]))
    exec(_IMPORTS.sub("", policy), code)
    test: dict[str, Any] = {
        "play": schedules.play,
        "Row": schedules.Row,
        "Rules": Rules,
        "SOLO": solo,
        "limits": limits,
        "workload": workload,
    }
    exec(table, test)
    with mock.patch.dict(dispatch["_SCHEDULES"], {solo: code["schedule"]}):
        test["test_one_after_the_other"]()


def test_the_guide_is_short_and_its_lists_are_the_real_ones() -> None:
    """At most 150 lines; every policy has a class."""
    assert len(GUIDE.read_text(encoding="utf-8").splitlines()) <= LONGEST_LINES
    assert len(POLICIES) == len(RULES_CLASSES)
