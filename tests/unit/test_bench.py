"""The record of benchmark figures compares as it says."""

from __future__ import annotations

import json

from bench.figures import falls, flatten


def test_a_figure_that_falls_beyond_its_tolerance_is_named() -> None:
    """An error that grows by 0.3 points falls, one of 0.1 does not, and times never do."""
    old = flatten({"tpot": {"mean_abs_pct": 3.0}, "ttft": {"mean_abs_pct": 5.0}, "seconds": 1.0})
    new = flatten({"tpot": {"mean_abs_pct": 3.3}, "ttft": {"mean_abs_pct": 5.1}, "seconds": 9.0})
    assert falls(old, new) == ["tpot.mean_abs_pct"]


def test_lists_of_figures_go_by_name() -> None:
    """Rows of a table are told apart by their scenario, so that order does not matter."""
    rows = [{"scenario": "a", "proved": True}, {"scenario": "b", "proved": False}]
    assert flatten(json.loads(json.dumps(rows))) == {"[a].proved": 1.0, "[b].proved": 0.0}
