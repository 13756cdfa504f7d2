"""The accuracy page: made from figures alone, with its misses in it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from bench import accuracy

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def _errors(mean: float, n: int = 40) -> dict[str, float]:
    keys = ("mean_abs_pct", "median_abs_pct", "p90_abs_pct", "bias_pct")
    return {"n": n, **dict.fromkeys(keys, mean)}


def _points() -> dict[str, Any]:
    metrics = ("tpot", "ttft", "output_throughput")
    return {
        "rows": {"covered": 40, "uncovered": 2},
        **{name: _errors(5.0) for name in metrics},
        "cluster_weighted": {name: {"mean_abs_pct": 7.0} for name in metrics},
        "slices": {
            "cluster=good": {"tpot": _errors(4.0)},
            "cluster=bad": {"tpot": _errors(33.0)},
            "cluster=small": {"tpot": _errors(99.0, n=3)},
        },
        "uncovered": [{"reason": "unknown model"}] * 2,
    }


def _calibrate() -> dict[str, Any]:
    def both(tpot: float, ttft: float) -> dict[str, Any]:
        return {"tpot": {"mean_abs_pct": tpot}, "ttft": {"mean_abs_pct": ttft}}

    line = {
        "cluster": "a|b|c",
        "tp": 2,
        "refused": "",
        "others_before": both(9.0, 12.0),
        "others_after": both(6.5, 11.0),
        "shuffled_refused": "2/2",
    }
    return {"clusters": [line], "served": []}


def test_misses_are_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large slices that miss are listed, small ones are not; missed targets are bold."""
    for name, data in (("p", _points()), ("k", _calibrate())):
        (tmp_path / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    page = tmp_path / "accuracy.md"
    files = ["--points", str(tmp_path / "p.json"), "--calibrate", str(tmp_path / "k.json")]
    monkeypatch.setattr(sys, "argv", ["accuracy", *files, "-o", str(page)])
    accuracy.main()
    text = page.read_text(encoding="utf-8")
    assert "- cluster=bad: TPOT 33 % (40 runs)" in text
    assert "cluster=small: TPOT" not in text
    assert "**6.5**" in text
    assert "**11.0**" not in text
    assert "| 2 | unknown model |" in text
    assert "bench.intervals, bench.plan_choice, bench.serving_runs" in text
