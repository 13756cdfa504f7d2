"""Engine profiles: every value has an origin, and no version takes over another's silently."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import yaml
from pydantic import ValidationError

from planner.errors import InputError
from planner.io import engines

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def data(request: pytest.FixtureRequest) -> dict:
    """The shipped vLLM file as plain data."""
    path: Path = request.config.rootpath / "profiles" / "engines" / "vllm.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_shipped_file_is_read(data: dict) -> None:
    """What ships passes its own rules."""
    assert engines._EngineFile.model_validate(data).engine == "vllm"


@pytest.mark.parametrize("origin", [{}, {"source": "a file", "fit": "some runs"}])
def test_a_value_needs_one_origin(data: dict, origin: dict[str, str]) -> None:
    """A constant without source or fit, or with both, is refused."""
    changed = copy.deepcopy(data)
    changed["versions"]["0.10.2"]["host"]["iteration_ms"] = {"value": 0.3, **origin}
    with pytest.raises(ValidationError, match="either its source or its fit"):
        engines._EngineFile.model_validate(changed)


def test_a_transfer_is_said_aloud() -> None:
    """0.24.0 runs on 0.10.2's host constants, and its profile carries the sentence that says so."""
    old, new = engines.load_engine("vllm", "0.10.2"), engines.load_engine("vllm", "0.24.0")
    assert new.host == old.host
    assert not old.host_warnings
    assert any("transferred from 0.10.2" in warning for warning in new.host_warnings)
    assert any("transferred from 0.10.2" in warning for warning in new.warnings)


def test_a_version_never_stands_in_for_another() -> None:
    """A version that does not ship is refused even if its neighbour does."""
    with pytest.raises(InputError, match=r"known: 0\.10\.2, 0\.24\.0"):
        engines.load_engine("vllm", "0.23.0")
