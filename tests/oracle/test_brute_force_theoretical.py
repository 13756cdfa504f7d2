"""Theoretical spaces: which layouts they hold, search against brute force, certificates."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

import planner.search
from planner.api import solve
from planner.layouts import is_theoretical
from planner.plan_floors import PlanFloors
from planner.resolve import resolve
from planner.space import enumerate_space
from planner.verify import verify
from planner.verify_document import RejectedError
from planner.verify_master import master_disagrees
from simulator.model import Attention, Experts, LatentAttention
from simulator.plan import BatchingLimits, Plan, Shape
from tests.oracle.test_brute_force_groups import grouped, rank
from tests.property.test_bounds import check_run
from tests.unit.test_certificate import resealed

if TYPE_CHECKING:
    from planner.problem import Problem
    from planner.scenario import Scenario

DEVICES = 4
SEATS = (2, 8)
TOKENS = 64


def asked_for(objective: str, seed: int) -> Scenario:
    """A few dozen requests on four devices, in every layout that divides them."""
    space = {"pp": [1], "max_num_seqs": list(SEATS), "max_num_batched_tokens": [TOKENS]}
    search = {"seed": seed, "space": {"theoretical": True, **space}}
    return grouped(objective, seed, search=search)


def plans_by_hand(problem: Problem) -> set[Plan]:
    """Every product of sizes that fits and divides: attention tp x dp, experts cut x spread."""
    layer = problem.model.layers[-1]
    assert isinstance(layer.mixer, (Attention, LatentAttention))
    assert isinstance(layer.ffn, Experts)
    sizes = range(1, DEVICES + 1)
    return {
        Plan(replicas, Shape(tp, dp=dp, ep=ep), BatchingLimits(seats, TOKENS))
        for tp in sizes
        for dp in sizes
        for ep in sizes
        for replicas in sizes
        for seats in SEATS
        if replicas * tp * dp <= DEVICES
        and tp * dp % ep == 0
        and layer.mixer.num_heads % tp == 0
        and layer.ffn.intermediate_size % (tp * dp // ep) == 0
    }


@pytest.mark.parametrize(
    ("objective", "seed", "theoretical"),
    [
        ("p99_ttft", 0, True),
        ("p99_ttft", 1, True),
        ("mean_e2e", 0, False),
        ("throughput", 3, False),
    ],
)
def test_search_equals_brute_force(
    objective: str, seed: int, theoretical: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all products the search names the one that simulating each finds, and marks it."""
    monkeypatch.setattr(planner.search, "_CHECK_EVERY", 13)
    asked = asked_for(objective, seed)
    problem = resolve(asked)
    plans = plans_by_hand(problem)
    assert set(enumerate_space(problem).plans) == plans
    shapes = {plan.shape.text for plan in plans if is_theoretical(problem, plan.shape)}
    assert shapes == {"tp4ep2", "tp2dp2ep2", "tp1dp4ep2"}
    best = min(plans, key=lambda plan: rank(problem, plan, objective))
    report = solve(asked)
    assert report.status == "optimal"
    assert report.plan is not None
    assert report.plan.id == problem.plan_text(best)
    assert report.plan.theoretical is is_theoretical(problem, best.shape) is theoretical
    data = report.to_dict()
    marked = [row for row in (data["plan"], *data["alternatives"]) if "theoretical" in row]
    assert marked
    assert all("ep2" in row["id"] and row["theoretical"] is True for row in marked)
    assert bool(report.plan.launch) is not theoretical


def test_bounds_and_both_loops_hold_for_theoretical_plans() -> None:
    """Floors are below every run, wherever it is cut; jump engine and plain loop end alike."""
    problem = resolve(asked_for("mean_e2e", 1))
    plans = [p for p in enumerate_space(problem).plans if is_theoretical(problem, p.shape)]
    assert len(plans) == len(SEATS) * 3
    known = PlanFloors.of(problem, plans)
    for plan in plans:
        floors = known.of_class(plan.shape, plan.limits).floors
        result = problem.start(plan).finish()
        check_run(problem.start(plan), floors, result, stride=40)
        plain = problem.start(plan, plain=True).finish()
        assert plain.trajectory_hash() == result.trajectory_hash()


def test_verify_recounts_the_larger_space() -> None:
    """A certificate with theoretical plans is accepted; with some left out, or the switch, not."""
    texts: list[str] = []
    solve(asked_for("p99_ttft", 0), on_certificate=texts.append)
    verified, problem = verify(texts[0], source="c.json", sample=None)
    assert (verified.status, verified.plan) == ("optimal", "tp1dp4ep2:seqs=8,tokens=64")
    assert master_disagrees(problem, texts[0]) is None
    data = json.loads(texts[0])
    del data["header"]["scenario"]["search"]["space"]["theoretical"]
    with pytest.raises(RejectedError):
        verify(resealed(data), source="c.json", sample=None)
    data = json.loads(texts[0])
    data["entries"] = [row for row in data["entries"] if not row["plan"].startswith("tp2dp2ep2")]
    with pytest.raises(RejectedError, match="plan"):
        verify(resealed(data), source="c.json", sample=None)
