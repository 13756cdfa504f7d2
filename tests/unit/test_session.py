"""The session: answers equal to a fresh solve, kept deadlines, shared work, bounded memory."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from planner import session_solve
from planner.api import solve
from planner.errors import InfeasibleError, InputError, RefusalError
from planner.resolve import resolve
from planner.session import Session
from planner.session_switching import Switching
from planner.session_workload import Workloads
from simulator.plan import BatchingLimits, parse_plan
from tests.problems import pool, scenario, write_trace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from planner.report import PlanReport
    from planner.scenario import Scenario

SAME = ("status", "plan", "objective", "bound", "gap", "metrics", "metrics_interval", "provenance")
MIX = {"input_tokens": {"min": 50, "max": 300}, "output_tokens": {"min": 5, "max": 60}}
WORKLOAD = {
    "input_tokens": {"min": 20, "max": 200},
    "output_tokens": {"min": 1, "max": 30},
    "num_requests": 60,
    "arrival": "poisson",
    "request_rate": 20.0,
}
SEARCH = {
    "space": {"tp": [1, 2], "pp": [1], "max_num_seqs": [4, 8], "max_num_batched_tokens": [64, 512]}
}
SWITCHING = Switching(load_s=60, warm_up_s=30, drain_s=10, horizon_s=3600, hysteresis=0.05)


def asked(**sections: Any) -> Scenario:
    """Sixty requests at a rate, on four devices."""
    return scenario(**{"workload": WORKLOAD, "cluster": pool(4), "search": SEARCH, **sections})


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """A session that several tests ask."""
    with Session(asked()) as opened:
        yield opened


def assert_same(mine: PlanReport, fresh: PlanReport) -> None:
    """Both name the same plan with the same figures."""
    ours, theirs = mine.to_dict(), fresh.to_dict()
    for name in SAME:
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize("objective", ["mean_e2e", "p99_ttft", "throughput", "devices"])
def test_answers_are_those_of_a_fresh_solve(objective: str) -> None:
    """At new rates and mixes, in whatever order they are asked."""
    goal = {"maximize" if objective == "throughput" else "minimize": objective}
    slo = {"ttft_ms": {"p99": 200}} if objective == "devices" else None
    with Session(asked(objective=goal, slo=slo)) as opened:
        for rate, mix in ((200.0, None), (5.0, MIX), (21.0, None)):
            fresh = solve(opened.scenario(rate=rate, mix=mix))
            assert_same(opened.plan(rate=rate, mix=mix), fresh)


def test_an_slo_that_no_plan_meets() -> None:
    """Infeasible as in a fresh solve, and the session goes on."""
    with Session(asked(slo={"ttft_ms": {"p99": 60}})) as opened:
        report = opened.plan(rate=100_000.0)
        assert report.status == solve(opened.scenario(rate=100_000.0)).status == "infeasible"
        assert report.plan is None
        assert opened.plan(rate=10.0).status == "optimal"


@pytest.mark.parametrize("arrival", [None, "gamma"])
def test_a_trace_is_read_once(tmp_path: Path, arrival: str | None) -> None:
    """Later calls need no file, and mean what a fresh solve with the file means."""
    write_trace(tmp_path / "t.csv", np.random.default_rng(0), 40)
    workload: dict[str, Any] = {"trace": "t.csv"}
    if arrival:
        workload |= {"arrival": arrival, "cv": 2.0, "request_rate": 30.0}
    asked_for = scenario(base_dir=tmp_path, workload=workload, cluster=pool(2), search=SEARCH)
    with Session(asked_for) as opened:
        fresh = {rate: solve(opened.scenario(rate=rate)) for rate in (15.0, 90.0)}
        mixed = solve(opened.scenario(rate=30.0, mix=MIX))
        (tmp_path / "t.csv").unlink()
        for rate, expected in fresh.items():
            assert_same(opened.plan(rate=rate), expected)
        assert_same(opened.plan(rate=30.0, mix=MIX), mixed)
        with pytest.raises(InputError, match=r"output_tokens: .* in place of a trace"):
            opened.plan(mix={"input_tokens": 100})


def test_sessions_and_rate_files(tmp_path: Path) -> None:
    """Workloads of several turns, and arrivals by a file of rates, change their rate too."""
    turns = {
        "turns": {"min": 1, "max": 3},
        "think_time_s": 0.1,
        "new_tokens": 20,
        "output_tokens": 5,
        "arrivals": {"process": "poisson", "rate": 5.0},
    }
    (tmp_path / "rates.csv").write_text("0,4,1,Gamma,1,0.25\n5,8,1,Gamma,1,0.125\n")
    by_rates = {"rates": "rates.csv", "input_tokens": 50, "output_tokens": 10}
    for workload in ({"sessions": turns, "num_requests": 20}, by_rates):
        with Session(scenario(base_dir=tmp_path, workload=workload, search=SEARCH)) as opened:
            for rate, mix in ((9.0, None), (12.0, {"output_tokens": 12})):
                fresh = solve(opened.scenario(rate=rate, mix=mix))
                assert_same(opened.plan(rate=rate, mix=mix), fresh)


def test_equal_questions_share_an_answer(session: Session) -> None:
    """By content: the scenario's own rate is the same question as that rate."""
    assert session.plan() is session.plan(rate=20.0)
    assert session.plan(rate=33.0, mix={}) is session.plan(rate=33.0)
    assert session.plan(rate=33.0) is not session.plan(rate=33.5)


def test_threads_share_one_computation(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight callers of one new rate wait for one search and get one report."""
    searches = []
    search = session_solve.search

    def slow(*arguments: Any) -> Any:
        searches.append(arguments)
        time.sleep(0.1)
        return search(*arguments)

    monkeypatch.setattr("planner.session.search", slow)
    found: list[PlanReport] = []
    threads = [
        threading.Thread(target=lambda: found.append(session.plan(rate=47.0))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(searches) == 1
    assert len(found) == 8
    assert all(report is found[0] for report in found)


@pytest.fixture
def slow_search(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Hold every search until the event is set; what is found before it is there at once."""
    go_on = threading.Event()
    search = session_solve.search

    def held(problem: Any, question: Any, facts: Any, first: Any, so_far: Any) -> Any:
        answer = search(problem, question, facts, first, so_far)
        go_on.wait(10)
        return answer

    monkeypatch.setattr("planner.session.search", held)
    return go_on


def test_a_deadline_is_kept(session: Session, slow_search: threading.Event) -> None:
    """Late answers are the first plan simulated, and the search goes on for the next call."""
    try:
        began_s = time.monotonic()
        report = session.plan(rate=55.0, deadline_s=0.5)
        took_s = time.monotonic() - began_s
        assert 0.5 <= took_s < 0.55
        assert (report.status, report.deterministic, report.bound) == ("feasible", False, None)
        assert report.plan is not None
        assert report.metrics["request_throughput"] > 30
        assert "the deadline passed before the search had ended" in report.warnings[-1]
        other = session.plan(rate=56.0, deadline_s=0.0)  # the worker is busy: the nearest answer
        assert "this is the answer at" in other.warnings[-1]
    finally:
        slow_search.set()
    assert session.plan(rate=55.0).status == "optimal"


def test_the_current_plan_stands_in_when_late(
    session: Session, slow_search: threading.Event
) -> None:
    """A late answer does not move the deployment."""
    try:
        report = session.plan(rate=57.0, current="2xtp1:seqs=8,tokens=64", deadline_s=0.3)
        assert report.plan is not None
        assert report.plan.id == "2xtp1:seqs=8,tokens=64"
    finally:
        slow_search.set()


def test_switching_keeps_what_is_nearly_as_good() -> None:
    """The current plan stays until a better one gains more than the switch costs."""
    lazy = replace(SWITCHING, hysteresis=0.5)
    with Session(asked(), switching=lazy) as opened:
        best = opened.plan(rate=20.0)
        assert best.plan is not None
        assert opened.plan(rate=20.0, current=best).status == "optimal"
        close = best.plan.id.replace("tokens=512", "tokens=64")
        assert close != best.plan.id
        kept = opened.plan(rate=20.0, current=close)
        assert kept.plan is not None
        assert kept.objective is not None
        assert best.objective is not None
        assert (kept.plan.id, kept.status) == (close, "feasible")
        assert kept.bound == best.objective.value < kept.objective.value
        assert "a switch to it must gain more than" in kept.warnings[-1]
        worse = opened.plan(rate=400.0, current="tp1:seqs=4,tokens=64")
        assert worse.status == "optimal"


def test_a_current_plan_that_breaks_the_slo_is_left() -> None:
    """Hysteresis never keeps a plan that breaks a constraint."""
    dear = replace(SWITCHING, hysteresis=1e6)
    with Session(asked(slo={"tpot_ms": {"mean": 6.0}}), switching=dear) as opened:
        assert opened.plan(rate=20.0, current="tp1:seqs=8,tokens=64").status == "optimal"


def test_cost_of_a_switch() -> None:
    """Replicas that both plans have stay; another shape starts anew."""
    limits = BatchingLimits(8, 64)
    two, three, wide = (parse_plan(text, limits) for text in ("2xtp1", "3xtp1", "tp4"))
    assert SWITCHING.device_seconds(two, three) == 90.0
    assert SWITCHING.device_seconds(three, two) == 10.0
    assert SWITCHING.device_seconds(two, wide) == 4 * 90.0 + 2 * 10.0
    assert SWITCHING.needed_gain(two, three) == pytest.approx(0.05 + 90.0 / (3600 * 3))
    with pytest.raises(InputError, match=r"horizon_s: .* above 0"):
        replace(SWITCHING, horizon_s=0)


def test_capacity_lies_between_simulated_rates(session: Session) -> None:
    """More replicas carry more, a stricter SLO less; the rate itself holds by simulation."""
    slo = {"ttft_ms": {"p99": 100}}
    one = session.capacity("tp1:seqs=8,tokens=512", slo)
    four = session.capacity("4xtp1:seqs=8,tokens=512", slo)
    assert 2.5 * one < four < 6 * one
    assert session.capacity("tp1:seqs=8,tokens=512", {"ttft_ms": {"p99": 50}}) < one
    assert session.capacity("tp1:seqs=8,tokens=512", {"ttft_ms": {"p99": 0.001}}) == 0.0
    assert session.replicas_for("tp1:seqs=8,tokens=512", 0.9 * one, slo) == 1
    assert session.replicas_for("2xtp1:seqs=8,tokens=512", 2.5 * one, slo) in (3, 4)
    with pytest.raises(InfeasibleError, match=r"4xtp1.* does not hold"):
        session.replicas_for("tp1:seqs=8,tokens=512", 100 * one, slo)


def test_memory_is_bounded() -> None:
    """Answers and floors beyond their limits are forgotten, and asked anew they are the same."""
    with Session(asked(), max_answers=4, max_fact_bytes=100_000) as opened:
        first = opened.plan(rate=10.0)
        for rate in range(11, 31):
            opened.plan(rate=float(rate))
        assert len(opened._answers) <= 4
        assert opened._facts.floors.total <= 100_000
        again = opened.plan(rate=10.0)
        assert again is not first
        assert_same(again, first)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"rate": -1.0}, "request_rate"),
        ({"rate": float("nan")}, "request_rate"),
        ({"mix": {"tokens": 3}}, "is no part of a mix"),
        ({"mix": {"input_tokens": 0}}, "input_tokens"),
        ({"deadline_s": -1.0}, "deadline_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"current": "2xtq4"}, "is not a plan"),
    ],
)
def test_bad_calls(session: Session, call: dict[str, Any], says: str) -> None:
    """One line each, in the caller's thread, and the session goes on."""
    with pytest.raises(InputError, match=says) as caught:
        session.plan(**call)
    assert "\n" not in str(caught.value)
    assert session.plan().status == "optimal"


def test_refusals(session: Session) -> None:
    """Plans outside the space, sessions that were closed, rates that cannot be set."""
    with pytest.raises(RefusalError, match="does not offer it"):
        session.capacity("tp1:seqs=7")
    with pytest.raises(RefusalError, match="devices"):
        session.plan(current="64xtp1:seqs=8,tokens=64")
    with pytest.raises(InputError, match="slo"):
        session.capacity("tp1:seqs=8,tokens=512", {"ttft": 3})
    closed = Session(scenario())
    closed.close()
    with pytest.raises(RefusalError, match="closed"):
        closed.plan(mix={"input_tokens": 10, "output_tokens": 10})
    with Session(scenario()) as at_once, pytest.raises(InputError, match="all_at_once"):
        at_once.plan(rate=3.0)


def test_the_base_workload_is_the_scenarios_own() -> None:
    """Without changes the requests are those that were resolved."""
    base = asked()
    problem = resolve(base)
    workloads = Workloads(base, problem)
    same = workloads.problem(workloads.scenario(None, None))
    assert (same.workload.arrival_s == problem.workload.arrival_s).all()
    assert same.provenance == problem.provenance
    assert same.warnings == problem.warnings
