"""Arrivals and lengths of any scenario: sorted, finite, positive, and the same for one seed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import InputError
from planner.io.trace_rates import read_rates
from planner.io.traces import read_trace, rescale
from planner.requests import digest_of, requests_of
from planner.scenario import Scenario

if TYPE_CHECKING:
    from pathlib import Path

MAX_MODEL_LEN = 4096

rates = st.floats(1e-3, 1e3)
processes = st.one_of(
    st.just({"arrival": "poisson"}),
    st.builds(lambda cv: {"arrival": "gamma", "cv": cv}, st.floats(0.01, 20)),
    st.builds(lambda shape: {"arrival": "weibull", "shape": shape}, st.floats(0.1, 100)),
    st.builds(
        lambda amplitude, period_s: {
            "arrival": "diurnal",
            "amplitude": amplitude,
            "period_s": period_s,
        },
        st.floats(0, 1),
        st.floats(1e-2, 1e6),
    ),
)
lengths = st.one_of(
    st.integers(1, 1000),
    st.builds(lambda low, more: {"min": low, "max": low + more}, *[st.integers(1, 900)] * 2),
    st.builds(
        lambda mean, cv: {"mean": mean, "cv": cv, "max": MAX_MODEL_LEN - 1},
        st.floats(0.1, 1e4),
        st.floats(0.01, 20),
    ),
)


def scenario(workload: dict[str, Any], seed: int = 0, base_dir: Path | None = None) -> Scenario:
    """A scenario of which only the requests matter."""
    fields = {
        "schema_version": 1,
        "model": {"config": "Qwen/Qwen3-8B"},
        "cluster": {"pools": [{"device": "H100-SXM-80GB", "nodes": 1, "devices_per_node": 1}]},
        "engine": {"name": "vllm", "version": "0.24.0"},
        "objective": {"minimize": "mean_e2e"},
        "workload": workload,
        "search": {"seed": seed},
    }
    return Scenario.model_validate(fields, base_dir=base_dir)


@given(processes, rates, lengths, lengths, st.integers(1, 300), st.integers(0, 2**31 - 1))
def test_drawn_requests(
    process: dict[str, Any], rate: float, prompt: Any, output: Any, number: int, seed: int
) -> None:
    """Any process and any lengths give a workload that a run takes, twice the same."""
    fields = {
        **process,
        "request_rate": rate,
        "input_tokens": prompt,
        "output_tokens": output,
        "num_requests": number,
    }
    work, digest, _ = requests_of(scenario(fields, seed), MAX_MODEL_LEN)
    # Workload itself refuses arrivals out of order or not finite, and lengths below 1.
    assert work.num_requests == number
    assert work.arrival_s[0] >= 0
    assert int((work.prompt_tokens + work.output_tokens).max()) <= MAX_MODEL_LEN
    again, digest_again, _ = requests_of(scenario(fields, seed), MAX_MODEL_LEN)
    assert digest == digest_again
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        assert np.array_equal(getattr(work, name), getattr(again, name))


@given(processes, rates, st.integers(0, 1000))
def test_a_rate_only_scales_time(process: dict[str, Any], rate: float, seed: int) -> None:
    """Twice the rate (of a day half as long) is the same pattern, twice as fast."""
    fields = {**process, "request_rate": rate, "num_requests": 50}
    fields |= {"input_tokens": 5, "output_tokens": 5}
    faster = {**fields, "request_rate": 2 * rate}
    if "period_s" in fields:
        faster["period_s"] = fields["period_s"] / 2
    slow, fast = (
        requests_of(scenario(f, seed), MAX_MODEL_LEN)[0].arrival_s for f in (fields, faster)
    )
    np.testing.assert_allclose(slow, 2 * fast, rtol=1e-9)


@given(
    st.lists(
        st.tuples(
            st.floats(0, 100),
            st.integers(1, 10**6),
            st.integers(0, 10**6),
        ),
        min_size=1,
        max_size=40,
    ),
    st.floats(1e-3, 1e3),
)
def test_traces_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[float, int, int]], rate: float
) -> None:
    """What was written is read, unanswered rows apart; rescaling keeps the gaps' ratios."""
    gaps = [row[0] for row in rows]
    times = np.cumsum(gaps)
    path = tmp_path_factory.mktemp("trace") / "t.csv"
    lines = [f"{t!r},{p},{o}" for t, (_, p, o) in zip(times.tolist(), rows, strict=True)]
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *lines]))
    answered = [i for i, row in enumerate(rows) if row[2]]
    if not answered:
        with pytest.raises(InputError, match="no request with output tokens"):
            read_trace(path, source="t.csv")
        return
    trace = read_trace(path, source="t.csv")
    assert trace.arrival_s.tolist() == (times[answered] - times[0]).tolist()
    assert trace.output_tokens.tolist() == [rows[i][2] for i in answered]
    assert trace.rows_read - len(trace) == sum(trace.rows_skipped.values())
    span_s = float(trace.arrival_s[-1] - trace.arrival_s[0])
    if span_s > 1e-6:
        scaled = rescale(trace.arrival_s, rate)
        assert (len(trace) - 1) / scaled[-1] == pytest.approx(rate, rel=1e-9)
        np.testing.assert_allclose(
            np.diff(scaled) / scaled[-1], np.diff(trace.arrival_s) / span_s, atol=1e-9
        )


def test_rates_give_arrivals_and_the_scenario_lengths(tmp_path: Path) -> None:
    """A file of rates with drawn lengths is a workload; its content is in the digest."""
    path = tmp_path / "rates.csv"
    path.write_text("0,5,1.2,Gamma,0.7,0.3\n100,1,1,Weibull,1,1\n200,9,1,Gamma,1,1\n")
    fields = {"rates": "rates.csv", "input_tokens": {"mean": 90, "cv": 1}, "output_tokens": 9}
    work, digest, _ = requests_of(scenario(fields, base_dir=tmp_path), MAX_MODEL_LEN)
    windows, _ = read_rates(path, source="rates.csv")
    # 1500 expected; counts of these gaps vary by at most sqrt(1.43 * 1500) = 46
    assert abs(work.num_requests - windows.mean_requests) < 4 * 46
    assert work.arrival_s[-1] < 300
    fields["request_rate"] = 50.0
    fast, *_ = requests_of(scenario(fields, base_dir=tmp_path), MAX_MODEL_LEN)
    assert (fast.num_requests - 1) / fast.arrival_s[-1] == pytest.approx(50)
    del fields["request_rate"]
    path.write_text("0,5,1.2,Gamma,0.7,0.3\n100,1,1,Weibull,1,1\n200,8,1,Gamma,1,1\n")
    assert requests_of(scenario(fields, base_dir=tmp_path), MAX_MODEL_LEN)[1] != digest
    fields["num_requests"] = 5000
    with pytest.raises(InputError, match=r"^rates.csv: 5000 requests were asked for"):
        requests_of(scenario(fields, base_dir=tmp_path), MAX_MODEL_LEN)


def test_lengths_of_conversations_need_an_arrival_process(tmp_path: Path) -> None:
    """A file without times is refused on its own, and served by any process."""
    (tmp_path / "c.json").write_text('[{"prompt_len": 5, "output_len": 6}]')
    fields: dict[str, Any] = {"trace": "c.json"}
    message = r"workload.trace: 'c.json' holds no arrival times: add arrival: poisson"
    with pytest.raises(InputError, match=message):
        requests_of(scenario(fields, base_dir=tmp_path), MAX_MODEL_LEN)
    fields["concurrency"] = 2
    work, *_ = requests_of(scenario(fields, base_dir=tmp_path), MAX_MODEL_LEN)
    assert (work.prompt_tokens.tolist(), work.output_tokens.tolist()) == ([5], [6])


LENGTHS = {"input_tokens": 9, "output_tokens": 9, "num_requests": 9, "request_rate": 1.0}


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        ({**LENGTHS, "arrival": "gamma"}, "workload.cv: is required with arrival: gamma"),
        ({**LENGTHS, "arrival": "weibull"}, "workload.shape: is required with arrival: weibull"),
        (
            {**LENGTHS, "arrival": "diurnal", "amplitude": 0.5},
            "workload.period_s: is required with arrival: diurnal",
        ),
        (
            {**LENGTHS, "arrival": "poisson", "cv": 2.0},
            "workload.cv: 2.0 belongs to arrival: gamma",
        ),
        (
            {**LENGTHS, "arrival": "gamma", "cv": 2.0, "request_rate": None},
            "workload.request_rate: is required with arrival: gamma (requests per second)",
        ),
        (
            {**LENGTHS, "arrival": "diurnal", "amplitude": 1.5, "period_s": 1.0},
            "workload.amplitude: 1.5 must be at most 1",
        ),
        (
            {**LENGTHS, "arrival": "gamma", "cv": 0},
            "workload.cv: 0 must be at least 0.01",
        ),
        (
            {**LENGTHS, "arrival": "gama", "cv": 2.0},
            "workload.arrival: 'gama' must be one of poisson, gamma, weibull, diurnal, "
            "all_at_once; did you mean 'gamma'?",
        ),
        (
            {**LENGTHS, "rates": "r.csv", "arrival": "poisson"},
            "workload.rates: 'r.csv' cannot be combined with arrival: give one",
        ),
        (
            {"trace": "t.csv", "rates": "r.csv"},
            "workload.rates: 'r.csv' cannot be combined with trace: give one",
        ),
        (
            {**LENGTHS, "arrival": "poisson", "input_tokens": {"mean": 5}},
            "workload.input_tokens.cv: required field is missing",
        ),
        (
            {**LENGTHS, "arrival": "poisson", "input_tokens": {"mean": 5, "cv": 1, "mx": 9}},
            "workload.input_tokens.mx: unknown field; did you mean 'max'?",
        ),
        (
            {**LENGTHS, "arrival": "poisson", "input_tokens": {"mean": 5, "cv": "1"}},
            "workload.input_tokens.cv: '1' must be a bare number, not text: no quotes, separators"
            " or leading zeros",
        ),
        (
            {**LENGTHS, "arrival": "poisson", "output_tokens": {"<LengthRange>": 5}},
            "workload.output_tokens: unknown field; known here: min, max (and 2 more)",
        ),
    ],
)
def test_workloads_that_say_too_little_or_too_much(workload: dict[str, Any], message: str) -> None:
    """One line that names the field."""
    with pytest.raises(InputError) as caught:
        scenario(workload)
    assert str(caught.value) == f"<scenario>: {message}"


def test_a_prompt_from_a_long_tail_is_refused_with_a_way_out() -> None:
    """Without a longest length a lognormal prompt may not fit; the message says what to set."""
    fields = {**LENGTHS, "arrival": "poisson", "input_tokens": {"mean": 5000, "cv": 1}}
    with pytest.raises(InputError, match=r"raise model.max_model_len or set input_tokens.max"):
        requests_of(scenario(fields), MAX_MODEL_LEN)


def test_digests_of_older_scenarios_stay() -> None:
    """Fields added since are left out of the digest unless they are set."""
    bundled = Scenario.load("llama-3.1-70b_8xh100")
    assert digest_of(bundled.model_dump(mode="json")) == (
        "564a02a88cde96b231ab9703866efe073b304dc6f9ffe7a1b8a09305fc361b5b"
    )
    fields = {**LENGTHS, "arrival": "poisson"}
    one, other = (scenario({**fields, **more}) for more in ({}, {"rates": None}))
    assert one.model_dump() == other.model_dump()
    assert {"rates", "cv"}.isdisjoint(one.model_dump()["workload"])
    gamma = scenario({**fields, "arrival": "gamma", "cv": 2.0})
    assert gamma.model_dump()["workload"]["cv"] == 2.0
    assert Scenario.model_validate(gamma.model_dump()) == gamma
