"""Sessions: their turns, histories, think times and the content that turns share."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from planner.errors import InputError
from planner.requests import requests_of
from planner.scenario import Scenario
from simulator.ragged import runs, starts_of
from simulator.sessions import (
    build_sessions,
    geometric_turns,
    session_block_ids,
    think_times_s,
    turns_of,
)

TURNS = np.array([2, 1, 3])
NEW = np.array([5, 3, 8, 10, 1, 6])
OUTPUT = np.array([4, 1, 2, 7, 3, 9])
THINK_S = np.array([9.0, 1.0, 9.0, 9.0, 2.0, 3.0])
START_S = np.array([0.0, 0.5, 2.0])
"""Three sessions; the first think time of each (9 s) is not used."""


def test_sessions_by_hand() -> None:
    """First turns by start, then later ones; each prompt is all before it and its new tokens."""
    built = build_sessions(TURNS, START_S, NEW, OUTPUT, THINK_S, 1000)
    assert built.arrival_s.tolist() == [0.0, 0.5, 2.0, 0.0, 0.0, 0.0]
    # 5 + 4 + 3 = 12; 10 + 7 + 1 = 18; 18 + 3 + 6 = 27
    assert built.prompt_tokens.tolist() == [5, 8, 10, 12, 18, 27]
    assert built.output_tokens.tolist() == [4, 2, 7, 1, 3, 9]
    assert built.after.tolist() == [-1, -1, -1, 0, 2, 4]
    assert built.think_s.tolist() == [0, 0, 0, 1, 2, 3]
    assert built.session.tolist() == [0, 1, 2, 0, 2, 2]
    assert built.dropped == 0


def test_a_session_ends_where_its_history_fills_the_context() -> None:
    """A prompt needs room for one token: with 18 the turn of 18 and the one after it go."""
    built = build_sessions(TURNS, START_S, NEW, OUTPUT, THINK_S, 18)
    assert built.prompt_tokens.tolist() == [5, 8, 10, 12]
    assert built.after.tolist() == [-1, -1, -1, 0]
    assert built.dropped == 2
    assert build_sessions(TURNS, START_S, NEW, OUTPUT, THINK_S, 19).dropped == 1
    with pytest.raises(ValueError, match="first prompt of session 3"):
        build_sessions(TURNS, START_S, NEW, OUTPUT, THINK_S, 10)


def test_block_ids_by_hand() -> None:
    """Blocks of 4: a turn has its predecessor's ids, answer included, and then new ones."""
    built = build_sessions(TURNS, START_S, NEW, OUTPUT, THINK_S, 1000)
    ids, starts = session_block_ids(built, 4)
    assert [ids[a:b].tolist() for a, b in itertools.pairwise(starts)] == [
        [0],
        [1, 2],
        [3, 4],
        [0, 5, 6],
        [3, 4, 7, 8],
        [3, 4, 7, 8, 9, 10],
    ]


def test_prompts_shorter_than_a_block_have_no_ids() -> None:
    """Nothing is full, so nothing is shared."""
    built = build_sessions(TURNS, START_S, NEW, OUTPUT, THINK_S, 1000)
    ids, starts = session_block_ids(built, 64)
    assert (len(ids), starts.tolist()) == (0, [0] * 7)


def test_too_many_blocks_are_refused_before_they_are_made() -> None:
    """The limit bounds the memory."""
    with pytest.raises(ValueError, match=r"100,000,000 blocks of prompts are above 50,000,000"):
        runs(np.array([0]), np.array([100_000_000]))


def test_runs() -> None:
    """Consecutive numbers from each start."""
    assert runs(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert starts_of(np.array([2, 0, 3])).tolist() == [0, 2, 2, 5]


def test_turns_are_cut_to_the_number_of_requests() -> None:
    """The last session loses what is too much, and no session is empty."""
    assert turns_of(TURNS, 6).tolist() == [2, 1, 3]
    assert turns_of(TURNS, 5).tolist() == [2, 1, 2]
    assert turns_of(TURNS, 3).tolist() == [2, 1]
    assert turns_of(TURNS, 1).tolist() == [1]


DRAWS = 200_000


def test_geometric_turns() -> None:
    """Mean and the share of single turns, 1 / mean, within four standard errors."""
    turns = geometric_turns(DRAWS, 5.0, np.random.default_rng(1))
    # Variance of a geometric distribution from 1: mean * (mean - 1).
    assert turns.mean() == pytest.approx(5, abs=4 * np.sqrt(20 / DRAWS))
    assert (turns == 1).mean() == pytest.approx(0.2, abs=4 * np.sqrt(0.16 / DRAWS))
    assert turns.min() == 1
    assert geometric_turns(9, 1.0, np.random.default_rng(1)).tolist() == [1] * 9


@pytest.mark.parametrize(
    ("distribution", "variation"), [("fixed", 0.0), ("exponential", 1.0), ("lognormal", 0.6)]
)
def test_think_times(distribution: str, variation: float) -> None:
    """Mean within four standard errors, variation within 2 %."""
    drawn = think_times_s(DRAWS, 8.0, distribution, variation, np.random.default_rng(2))
    assert drawn.mean() == pytest.approx(8, abs=4 * 8 * variation / np.sqrt(DRAWS) + 1e-9)
    assert drawn.std() / drawn.mean() == pytest.approx(variation, rel=0.02, abs=1e-12)
    assert (think_times_s(5, 0.0, distribution, variation, np.random.default_rng(2)) == 0).all()


SESSIONS: dict[str, Any] = {
    "turns": {"min": 2, "max": 6},
    "think_time_s": {"mean": 8.0},
    "new_tokens": {"mean": 120, "cv": 1.0, "max": 2000},
    "output_tokens": {"min": 50, "max": 300},
    "arrivals": {"process": "poisson", "rate": 0.5},
}


def scenario(sessions: Any, num_requests: Any = 3000, seed: int = 0, **others: Any) -> Scenario:
    """A scenario of which only the requests matter."""
    fields = {
        "schema_version": 1,
        "model": {"config": "Qwen/Qwen3-8B"},
        "cluster": {"pools": [{"device": "H100-SXM-80GB", "nodes": 1, "devices_per_node": 1}]},
        "engine": {"name": "vllm", "version": "0.24.0"},
        "objective": {"minimize": "mean_e2e"},
        "workload": {"sessions": sessions, "num_requests": num_requests, **others},
        "search": {"seed": seed},
    }
    return Scenario.model_validate(fields)


def test_sessions_of_a_scenario() -> None:
    """Everything asked for is there, the same twice, and another seed draws others."""
    work, digest, warnings = requests_of(scenario(SESSIONS), 32_768, 16)
    assert warnings == []
    assert work.num_requests == 3000
    followed = np.flatnonzero(work.after >= 0)
    before = work.after[followed]
    new = work.prompt_tokens[followed] - work.prompt_tokens[before] - work.output_tokens[before]
    assert new.min() >= 1
    assert new.max() <= 2000
    assert new.mean() == pytest.approx(120, rel=4 / np.sqrt(len(new)))
    assert work.think_s[followed].mean() == pytest.approx(8, rel=4 / np.sqrt(len(new)))
    starts_s = work.arrival_s[work.known]
    assert len(starts_s) == pytest.approx(3000 / 4, rel=0.1)
    assert (len(starts_s) - 1) / starts_s[-1] == pytest.approx(0.5, rel=4 / np.sqrt(750))
    for i in followed[:200]:
        own = work.block_ids[work.block_starts[i] : work.block_starts[i + 1]]
        p = work.after[i]
        last = work.block_ids[work.block_starts[p] : work.block_starts[p + 1]]
        assert len(own) == work.prompt_tokens[i] // 16
        assert own[: len(last)].tolist() == last.tolist()
        assert not set(own[len(last) :]) & set(last)
    again, digest_again, _ = requests_of(scenario(SESSIONS), 32_768, 16)
    assert digest == digest_again
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "think_s", "block_ids"):
        assert np.array_equal(getattr(work, name), getattr(again, name))
    other, digest_other, _ = requests_of(scenario(SESSIONS, seed=1), 32_768, 16)
    assert digest_other != digest
    assert not np.array_equal(work.prompt_tokens[:100], other.prompt_tokens[:100])


def test_without_a_prefix_cache_no_content_is_kept() -> None:
    """Ids are made for blocks of the size asked for, and for none where nobody asks."""
    work, *_ = requests_of(scenario(SESSIONS), 32_768)
    assert (work.block_tokens, len(work.block_ids)) == (0, 0)


def test_short_contexts_end_sessions_and_cut_answers() -> None:
    """Both are counted in the warnings; every request fits."""
    short = change(new_tokens={"mean": 120, "cv": 1.0, "max": 900})
    work, _, warnings = requests_of(scenario(short), 1024, 16)
    assert work.num_requests < 3000
    assert int((work.prompt_tokens + work.output_tokens).max()) == 1024
    assert warnings[0] == (
        f"sessions: {3000 - work.num_requests} of 3000 turns are left out: the history before "
        "them fills max_model_len (1024)"
    )
    assert "outputs are cut" in warnings[1]


def test_plain_numbers_are_fixed_values() -> None:
    """``turns: 3`` and ``think_time_s: 2.5`` draw nothing."""
    plain = {**SESSIONS, "turns": 3, "think_time_s": 2.5, "new_tokens": 10, "output_tokens": 6}
    plain["arrivals"] = {"process": "all_at_once"}
    work, *_ = requests_of(scenario(plain, 6), 32_768)
    assert work.arrival_s.tolist() == [0.0] * 6
    assert work.prompt_tokens.tolist() == [10, 10, 26, 26, 42, 42]
    assert work.think_s.tolist() == [0, 0, 2.5, 2.5, 2.5, 2.5]
    assert work.after.tolist() == [-1, -1, 0, 1, 2, 3]


def change(**fields: Any) -> dict[str, Any]:
    """The good sessions with other fields; ``...`` leaves one out."""
    changed = {**SESSIONS, **fields}
    return {name: value for name, value in changed.items() if value is not ...}


TURN_RULE = "must be a whole number greater than 0, {min: ..., max: ...} or {mean: ...}"


@pytest.mark.parametrize(
    ("sessions", "message"),
    [
        (change(turns=0), f"turns: 0 {TURN_RULE}"),
        (change(turns=True), f"turns: True {TURN_RULE}"),
        (
            change(turns={"min": 3}),
            "turns: must be a whole number, {min: ..., max: ...} or {mean: ...}",
        ),
        (change(turns={"min": 3, "max": 2}), "turns.min: 3 must not be above max (2)"),
        (change(turns={"mean": 0.5}), "turns.mean: 0.5 must be at least 1"),
        (
            change(turns={"mean": 2.0, "min": 1}),
            "turns.mean: 2.0 cannot be combined with min and max",
        ),
        (change(turns={"men": 3}), "turns.men: unknown field; did you mean 'mean'?"),
        (change(turns=...), "turns: required field is missing"),
        (change(think_time_s=-1), "think_time_s.mean: -1 must be at least 0"),
        (
            change(think_time_s="3s"),
            "think_time_s: '3s' must be a bare number in seconds, without a unit",
        ),
        (
            change(think_time_s=[3]),
            "think_time_s: must be a number of seconds, or {mean: ..., distribution: ...}",
        ),
        (
            change(think_time_s={"mean": 3, "cv": 1}),
            "think_time_s.cv: 1.0 belongs to distribution: lognormal",
        ),
        (
            change(think_time_s={"mean": 3, "distribution": "lognormal"}),
            "think_time_s.cv: is required with distribution: lognormal",
        ),
        (
            change(think_time_s={"mean": 3, "distribution": "expo"}),
            "think_time_s.distribution: 'expo' must be one of exponential, fixed, lognormal; "
            "did you mean 'exponential'?",
        ),
        (change(new_tokens={"mean": 3}), "new_tokens.cv: required field is missing"),
        (
            change(arrivals={"process": "gamma", "rate": 1.0}),
            "arrivals.cv: is required with process: gamma",
        ),
        (
            change(arrivals={"process": "poisson"}),
            "arrivals.rate: is required with process: poisson (sessions per second)",
        ),
        (
            change(arrivals={"process": "poisson", "rate": 1.0, "cv": 2.0}),
            "arrivals.cv: 2.0 belongs to process: gamma",
        ),
        (
            change(arrivals={"process": "all_at_once", "rate": 1.0}),
            "arrivals.rate: 1.0 cannot be combined with process: all_at_once",
        ),
        (change(arrivals=...), "arrivals: required field is missing"),
        (change(arivals=3), "arivals: unknown field; did you mean 'arrivals'?"),
    ],
)
def test_bad_sessions(sessions: Any, message: str) -> None:
    """One line that names the field."""
    with pytest.raises(InputError) as caught:
        scenario(sessions)
    assert str(caught.value) == f"<scenario>: workload.sessions.{message}"


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            {"input_tokens": 5},
            "input_tokens: cannot be combined with sessions: use sessions.new_tokens",
        ),
        (
            {"request_rate": 3.0},
            "request_rate: cannot be combined with sessions: use sessions.arrivals.rate",
        ),
        (
            {"arrival": "poisson"},
            "arrival: cannot be combined with sessions: use sessions.arrivals.process",
        ),
        ({"cv": 2.0}, "cv: cannot be combined with sessions: use sessions.arrivals.cv"),
        ({"concurrency": 3}, "concurrency: cannot be combined with sessions: give one"),
        ({"trace": "x.csv"}, "trace: cannot be combined with sessions: give one"),
        ({"rates": "x.csv"}, "rates: cannot be combined with sessions: give one"),
        (
            {"num_requests": None},
            "num_requests: is required with sessions: the number of turns in all",
        ),
    ],
)
def test_what_sessions_say_themselves(others: dict[str, Any], message: str) -> None:
    """Fields of other workloads are refused, with the one that is meant."""
    with pytest.raises(InputError) as caught:
        scenario(SESSIONS, **others)
    assert str(caught.value) == f"<scenario>: workload.{message}"


def test_sessions_that_do_not_fit() -> None:
    """A first prompt beyond the context, and more blocks than memory should hold."""
    message = r"new_tokens: 9000 prompt tokens of request 1 must be below max_model_len \(8192\): "
    with pytest.raises(InputError, match=message + ".* lower sessions.new_tokens$"):
        requests_of(scenario(change(new_tokens=9000)), 8192)
    long = change(turns=40, new_tokens=400)
    with pytest.raises(InputError) as caught:
        requests_of(scenario(long, 200_000), 32_768, 16)
    assert str(caught.value).startswith("<scenario>: workload.sessions: ")
    assert str(caught.value).endswith("above 50,000,000: set a lower workload.num_requests")


def test_the_digest_of_a_scenario_without_sessions_stays() -> None:
    """The field is left out of a dump when unset."""
    assert "sessions" not in Scenario.load("llama-3.1-70b_8xh100").model_dump()["workload"]
    assert scenario(SESSIONS).workload.arrival_mode == "sessions"
