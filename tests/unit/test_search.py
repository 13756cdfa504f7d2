"""The search's own promises: limits, interruptions, progress, shared runs and valid bounds."""

from __future__ import annotations

from itertools import count, pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import planner.search
from planner.api import solve
from planner.candidates import Fate
from planner.errors import LimitError
from planner.resolve import resolve
from planner.search import Search
from tests.problems import OBJECTIVES, goal, pool, scenario

if TYPE_CHECKING:
    from planner.scenario import Scenario
    from planner.search_result import Progress

LOOK_EVERY = 50
SPACE = {"tp": [1, 2], "max_num_seqs": [2, 4, 8], "max_num_batched_tokens": [64, 512]}
WORKLOAD = {
    "input_tokens": {"min": 20, "max": 200},
    "output_tokens": {"min": 1, "max": 30},
    "num_requests": 100,
    "arrival": "poisson",
    "request_rate": 40,
}


def busy(objective: str = "mean_e2e", slo: Any = None, **search: Any) -> Scenario:
    """A hundred requests in 2.5 s on four devices: 36 plans, of which some thousand iterations."""
    return scenario(
        workload=WORKLOAD,
        cluster=pool(4),
        objective=goal(objective),
        slo=slo,
        search={"space": {"pp": [1], **SPACE}, **search},
    )


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at bounds and limits every 50 iterations; these runs are shorter than 2048."""
    monkeypatch.setattr(planner.search, "_CHECK_EVERY", LOOK_EVERY)


@pytest.mark.parametrize("limit", [1300, 2000])
def test_work_limit_gives_the_plan_in_hand(limit: int) -> None:
    """The same feasible plan each time, a valid bound and gap, and no work beyond a look."""
    report = solve(busy(work_limit=limit))
    assert report.to_json() == solve(busy(work_limit=limit)).to_json()
    assert (report.status, report.deterministic) == ("feasible", True)
    assert limit <= report.search.iterations < limit + LOOK_EVERY
    best = solve(busy())
    assert report.objective is not None
    assert best.objective is not None
    assert report.bound is not None
    assert report.bound <= best.objective.value <= report.objective.value
    assert report.gap == pytest.approx(1 - report.bound / report.objective.value)


def test_work_limit_counts_runs_shorter_than_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of one iteration stops after the first run even where no run is looked at."""
    monkeypatch.setattr(planner.search, "_CHECK_EVERY", 10**6)
    report = solve(busy(work_limit=1))
    assert (report.status, report.search.simulated) == ("feasible", 1)


def test_work_limit_before_any_plan_is_an_error() -> None:
    """Ten iterations finish no run: exit code 4, and the message names the limit."""
    with pytest.raises(LimitError, match="work_limit before any plan") as caught:
        solve(busy(work_limit=10))
    assert caught.value.exit_code == 4


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    """With more work allowed than needed the report is that of a search without limit."""
    report, free = (solve(busy(work_limit=limit)).to_dict() for limit in (10**9, None))
    for each in (report, free):
        each["provenance"].pop("scenario")  # the digest of the limit itself
    assert report == free
    assert report["status"] == "optimal"


@pytest.mark.parametrize("looks", [40, 60])
def test_time_limit(looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by the clock, the report has a plan, and says that it is not deterministic."""
    ticks = count()
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)))
    monkeypatch.setattr(planner.search, "time", clock)
    report = solve(busy(time_limit_s=float(looks)))
    assert (report.status, report.deterministic) == ("feasible", False)
    assert report.plan is not None


def test_time_limit_before_any_plan_is_an_error() -> None:
    """A nanosecond is too short for the first bound."""
    with pytest.raises(LimitError, match="time_limit before any plan"):
        solve(busy(time_limit_s=1e-9))


@pytest.mark.parametrize("calls", [1, 4])
def test_interrupt_gives_the_plan_in_hand(calls: int) -> None:
    """Ctrl-C during the search reports the incumbent that the last progress call named."""
    seen: list[Progress] = []

    def interrupt(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == calls:
            raise KeyboardInterrupt

    report = solve(busy(), on_progress=interrupt)
    assert (report.status, report.deterministic) == ("feasible", False)
    assert len(seen) == calls
    incumbent, plan = seen[-1].incumbent, report.plan
    assert incumbent is not None
    assert plan is not None
    assert (incumbent.replicas, incumbent.shape.tp) == (plan.replicas, plan.tp)
    assert incumbent.limits.max_num_seqs == plan.max_num_seqs
    assert incumbent.limits.max_num_batched_tokens == plan.max_num_batched_tokens


def test_interrupt_before_any_plan_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the first bounds are computed leaves nothing to report."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(planner.search, "run_bounds", interrupt)
    with pytest.raises(LimitError, match="interrupt before any plan"):
        solve(busy())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_progress_only_gets_better(objective: str) -> None:
    """Incumbents improve, the bound rises towards them, work grows and open plans run out."""
    seen: list[Progress] = []
    solve(busy(objective), on_progress=seen.append)
    assert seen[-1].plans_left == 0
    for before, after in pairwise(seen):
        assert before.score is not None
        assert after.score is not None
        assert before.bound is not None
        assert after.bound is not None
        assert after.score <= before.score
        assert before.bound <= after.bound <= after.score[0]
        assert before.iterations <= after.iterations
        assert before.plans_left >= after.plans_left


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_bound_is_below_the_value(objective: str) -> None:
    """Whatever stopped a plan, what is known of it does not exceed what it comes to."""
    problem = resolve(busy(objective))
    found = Search(problem, problem.objective).run()
    for candidate in found.candidates:
        outcome = problem.outcome(candidate.plan, problem.start(candidate.plan).finish())
        value = problem.objective.score(outcome)
        assert candidate.score == value if candidate.exact else candidate.score <= value
        assert candidate.fate is not Fate.OPEN


def test_early_abort_saves_work() -> None:
    """Losing runs are stopped on the way: fewer iterations than the runs to their ends take."""
    problem = resolve(busy())
    found = Search(problem, problem.objective).run()
    aborted = [c for c in found.candidates if c.fate is Fate.ABORTED]
    assert aborted
    for candidate in aborted:
        # A look comes at the next event after so many iterations, which may be a few later.
        assert candidate.twin or candidate.iterations >= LOOK_EVERY
        assert candidate.iterations < problem.start(candidate.plan).finish().iterations
    every = Search(problem, problem.objective, exhaustive=True).run()
    assert every.count(Fate.SIMULATED) == len(every.candidates)
    assert found.iterations < every.iterations


def test_identical_plans_are_simulated_once() -> None:
    """Three requests never meet limits of 256 sequences or 1024 tokens: one run settles four.

    From 256 sequences on, vLLM captures the same CUDA graphs, so the costs agree too.
    """
    work = {"input_tokens": 20, "output_tokens": 5, "num_requests": 3, "arrival": "all_at_once"}
    space = {"max_num_seqs": [256, 512], "max_num_batched_tokens": [1024, 2048]}
    report = solve(scenario(workload=work, cluster=pool(1), search={"space": {"tp": [1], **space}}))
    assert (report.search.simulated, report.search.identical) == (1, 3)
    assert report.plan is not None
    assert report.plan.id == "tp1:seqs=256,tokens=1024"
    assert report.alternatives == ()  # all others are the same plan in other words


def test_throughput_is_better_when_larger() -> None:
    """The bound is above the value, the gap positive, and runners-up lose by being slower."""
    report = solve(busy("throughput", work_limit=1500))
    assert report.objective is not None
    assert report.bound is not None
    value = report.objective.value
    assert (report.status, report.objective.sense) == ("feasible", "maximize")
    assert report.bound > value
    assert report.gap == pytest.approx(report.bound / value - 1)

    proved = solve(busy("throughput"))
    assert proved.objective is not None
    value = proved.objective.value
    assert (proved.bound, proved.gap) == (value, 0.0)
    assert report.bound >= value
    for row in proved.alternatives:
        assert row.value <= value
        assert row.loss_pct == pytest.approx(100 * (value - row.value) / value)


def test_no_runner_up_is_better_than_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped search never recommends a plan that loses to a runner-up in its own report."""
    monkeypatch.setattr(planner.search, "_CHECK_EVERY", 10**6)
    report = solve(busy(work_limit=1))
    assert all(row.loss_pct >= 0 for row in report.alternatives if not row.breaks)


def test_slos_count_what_they_break() -> None:
    """Plans over a limit are counted as breaking it, and the best plan keeps it."""
    free = solve(busy("devices"))
    limit_ms = free.metrics["p99_ttft_ms"] / 2
    report = solve(busy("devices", slo={"ttft_ms": {"p99": limit_ms}}))
    assert report.status == "optimal"
    assert report.metrics["p99_ttft_ms"] <= limit_ms
    assert report.search.breaks_slo > 0
    broken = [row for row in report.alternatives if row.breaks]
    assert broken
    assert {name for row in broken for name in row.breaks} == {"slo.ttft_ms.p99"}
