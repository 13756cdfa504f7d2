"""Crossovers: both sides are what a fresh solve names, and none is missed between two points."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from planner.api import solve
from planner.crossovers import crossovers
from planner.errors import InputError
from planner.session import Session
from tests.problems import pool, scenario

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKLOAD = {
    "input_tokens": {"min": 20, "max": 200},
    "output_tokens": {"mean": 15, "cv": 0.5, "max": 60},
    "num_requests": 60,
    "arrival": "poisson",
    "request_rate": 20.0,
}
SEARCH = {"space": {"tp": [1, 2], "pp": [1], "max_num_seqs": [4], "max_num_batched_tokens": [64]}}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """The fewest of four devices whose p99 TTFT is within 100 ms."""
    asked = scenario(
        workload=WORKLOAD,
        cluster=pool(4),
        search=SEARCH,
        objective={"minimize": "devices"},
        slo={"ttft_ms": {"p99": 100}},
    )
    with Session(asked) as opened:
        yield opened


def test_rates(session: Session) -> None:
    """More devices as the rate grows, each change within the resolution and proved."""
    found = crossovers(session, 5.0, 2000.0, points=3)
    assert found.proved
    assert found.low.plan == "tp1:seqs=4,tokens=64"
    assert found.high.plan is None
    assert len(found.found) >= 2
    for one in found.found:
        assert one.below.plan != one.above.plan
        assert one.below.at < one.above.at <= 1.01 * one.below.at
        for side in (one.below, one.above):
            fresh = solve(session.scenario(rate=side.at))
            assert side.plan == (fresh.plan.id if fresh.plan else None)
    plans = [found.low.plan, *(one.above.plan for one in found.found)]
    assert [line.rpartition(": ")[2] for line in found.lines()] == [
        plan or "no plan is feasible" for plan in plans
    ]
    assert found.to_dict()["proved"]


def test_shapes_only(session: Session) -> None:
    """Shapes are a coarser view of the same plans."""
    fine = crossovers(session, 5.0, 2000.0, points=3)
    coarse = crossovers(session, 5.0, 2000.0, points=3, shapes=True)
    assert len(coarse.found) <= len(fine.found)


@pytest.mark.parametrize(("axis", "low", "high"), [("output_tokens", 10, 50)])
def test_lengths(session: Session, axis: str, low: float, high: float) -> None:
    """Along a length the other parameters of its distribution stay."""
    found = crossovers(session, low, high, axis=axis, points=3)
    assert (found.low.at, found.high.at) == (low, high)
    assert found.proved


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"low": 5.0, "high": 5.0}, "the lower one first"),
        ({"low": 0.0, "high": 5.0}, "above 0"),
        ({"low": 1.0, "high": 5.0, "axis": "tokens"}, "must be one of"),
        ({"low": 1.0, "high": 5.0, "points": 1}, "points"),
        ({"low": 1.0, "high": 5.0, "resolution": 0.0}, "resolution"),
    ],
)
def test_bad_arguments(session: Session, arguments: dict[str, object], says: str) -> None:
    """Each is named in one line."""
    with pytest.raises(InputError, match=says):
        crossovers(session, **arguments)  # type: ignore[arg-type]
