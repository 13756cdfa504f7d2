"""Calibration files: what they hold, who may use them, and how bad ones end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from planner.errors import InputError
from planner.io.calibration import read_calibration
from planner.resolve import resolve
from tests.problems import LLAMA_8B, scenario

if TYPE_CHECKING:
    from pathlib import Path


def _constant(value: float) -> dict[str, Any]:
    return {"value": value, "before": 1.0, "spread": 0.1, "identified": True}


def _data() -> dict[str, Any]:
    return {
        "schema_version": 1,
        "planner": "0",
        "calibrated": {
            "engine": "vllm",
            "version": "0.24.0",
            "device": "H100-SXM-80GB",
            "model": LLAMA_8B,
            "plans": ["tp1"],
        },
        "constants": {
            "iteration_ms": _constant(1.5),
            "sequence_ms": _constant(0.02),
            "ingress_ms": _constant(4.0),
            "prefill_multiplier": _constant(1.2),
            "eager_layer_ms": 0.0,
        },
        "held_out": {
            "runs": 8,
            "folds": 5,
            "before_pct": {"mean_tpot_ms": 9.0},
            "after_pct": {"mean_tpot_ms": 2.0},
        },
        "measurements": [{"file": "a.json", "sha256": "0" * 64, "runs": 8}],
        "next_run": None,
        "warnings": [],
    }


def _write(folder: Path, data: dict[str, Any]) -> Path:
    path = folder / "calibration.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def _read(path: Path, engine: str = "vllm") -> Any:
    return read_calibration(path, source="calibration.json", engine=engine)


def test_round_trip(tmp_path: Path) -> None:
    """A written calibration reads back equal, its constants in seconds."""
    loaded = _read(_write(tmp_path, _data()))
    assert loaded.calibration.host.iteration_s == pytest.approx(1.5e-3)
    assert loaded.calibration.host.prefill_multiplier == 1.2
    assert json.loads(loaded.calibration.to_json()) == _data()


def test_a_scenario_uses_it_and_says_so(tmp_path: Path) -> None:
    """Host constants are the file's, its digest is in the provenance, transfers warn no more."""
    loaded = _read(_write(tmp_path, _data()))
    engine = {"name": "vllm", "version": "0.24.0", "calibration": "calibration.json"}
    problem = resolve(scenario(tmp_path, engine=engine))
    provenance: Any = problem.provenance["engine"]
    assert provenance["calibration"] == loaded.sha256
    assert provenance["host"]["iteration_s"] == pytest.approx(1.5e-3)
    assert problem.ingress_s == pytest.approx(4e-3)
    assert not any("host constants" in text for text in problem.warnings)


def test_another_model_device_or_version_is_warned_about(tmp_path: Path) -> None:
    """Each difference is named."""
    loaded = _read(_write(tmp_path, _data()))
    assert (
        loaded.warnings_for(engine="vllm", version="0.24.0", device="H100-SXM-80GB", model=LLAMA_8B)
        == []
    )
    (text,) = loaded.warnings_for(engine="vllm", version="0.22.0", device="L40S", model="x")
    assert "0.24.0, not 0.22.0" in text
    assert "not L40S" in text
    assert "not x" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version: 2 is no calibration"),
        ({"extra": 1}, "extra: 1 is wrong"),
        ({"held_out": {}}, "held_out.runs: is wrong"),
    ],
)
def test_bad_files_end_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """The first mistake is named, exit code 2."""
    with pytest.raises(InputError) as error:
        _read(_write(tmp_path, {**_data(), **change}))
    assert message in str(error.value)
    assert error.value.exit_code == 2


def test_prompts_cheaper_than_decodes_are_refused(tmp_path: Path) -> None:
    """The simulator's bounds rest on a multiplier of at least 1."""
    data = _data()
    data["constants"]["prefill_multiplier"]["value"] = 0.9
    with pytest.raises(InputError, match="prefill_multiplier"):
        _read(_write(tmp_path, data))


def test_another_engine_is_refused(tmp_path: Path) -> None:
    """Host time of one engine says nothing of another's."""
    with pytest.raises(InputError, match="the scenario's engine is sglang"):
        _read(_write(tmp_path, _data()), engine="sglang")
