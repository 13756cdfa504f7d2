"""``docs/search.md`` names code that exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
MODULES = (
    "planner.bounds",
    "planner.candidates",
    "planner.certificate",
    "planner.cpsat.classes",
    "planner.cpsat.constraints",
    "planner.cpsat.model",
    "planner.cpsat.variables",
    "planner.floors",
    "planner.objective",
    "planner.plan_floors",
    "planner.device_pool",
    "planner.infeasible",
    "planner.problem",
    "planner.relaxations",
    "planner.search",
    "planner.support",
    "planner.verify",
    "planner.verify_bounds",
    "planner.verify_master",
    "planner.verify_support",
    "simulator.plan",
    "simulator.timing",
)
NAMES = sorted(set(re.findall(r"`((?:planner\.)?[A-Za-z_]\w*(?:\.\w+)*)`", TEXT)))
PLAIN = {"max_num_seqs", "max_num_batched_tokens"}
"""Fields of a scenario."""


def is_known(dotted: str) -> bool:
    """Whether one of the modules, or the one that is spelt out, has such a name."""
    parts = dotted.split(".")
    places: list[object] = [importlib.import_module(module) for module in MODULES]
    if parts[0] == "planner":
        places, parts = [importlib.import_module(".".join(parts[:3]))], parts[3:]
    for place in places:
        found = place
        for i, part in enumerate(parts):
            fields = getattr(found, "__dataclass_fields__", {})
            if i == len(parts) - 1 and part in fields:
                return True
            found = getattr(found, part, None)
            if found is None:
                break
        else:
            return True
    return False


@pytest.mark.parametrize(
    "name",
    [name for name in NAMES if len(name) > 2 and name.lower() not in PLAIN and "_(" not in name],
)
def test_every_name_exists(name: str) -> None:
    """Each word of code in the text is a name of the code, a symbol of two letters aside."""
    symbols = {
        "alone_i",
        "work_i",
        "order",
        "f_k",
        "a_i",
        "p_i",
        "o_i",
        "S_i",
        "F_j",
        "S_j",
        "A_i",
        "theta",
        "phi",
    }
    assert name in symbols or is_known(name), name


def test_files_exist() -> None:
    """Every file that the text names is there."""
    for path in re.findall(r"`((?:planner|simulator|tests|docs)/[\w/]+\.(?:py|md))`", TEXT):
        assert (ROOT / path).exists(), path
