"""Metrics against values worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.metrics import (
    good,
    latencies,
    makespan_s,
    statistic_s,
    summary,
    weighted_statistic_s,
)
from simulator.timing import in_ps
from tests.builders import workload

STATISTICS = ["mean", "p50", "p90", "p95", "p99"]
seconds = st.floats(0, 1e4, allow_nan=False)

# Three requests: sent at 0, 1, 2; first tokens at 1, 3, 6; last ones at 5, 3, 10; 5, 1, 3 tokens.
SENT, FIRST, LAST = np.array([0.0, 1, 2]), np.array([1.0, 3, 6]), np.array([5.0, 3, 10])
OUTPUTS = np.array([5, 1, 3])
VALUES = latencies(in_ps(SENT), in_ps(FIRST), in_ps(LAST), OUTPUTS)


def test_latencies_are_differences_of_times() -> None:
    """TTFT and E2E count from the send; TPOT spreads the rest over the later tokens."""
    assert VALUES.ttft_s.tolist() == [1, 2, 4]
    assert VALUES.e2e_s.tolist() == [5, 2, 8]
    # (5 - 1) / 4 gaps and (10 - 6) / 2 gaps; the one-token request has none.
    assert VALUES.tpot_s[[0, 2]].tolist() == [1, 2]


def test_tpot_of_a_single_token_is_undefined_and_left_out() -> None:
    """One output token has no gap: NaN per request, absent from statistics."""
    assert np.isnan(VALUES.tpot_s[1])
    assert VALUES.of("tpot").tolist() == [1, 2]
    assert statistic_s(VALUES.of("tpot"), "mean") == 1.5
    alone = latencies(in_ps(SENT[:1]), in_ps(FIRST[:1]), in_ps(FIRST[:1]), np.array([1]))
    assert statistic_s(alone.of("tpot"), "p99") == 0.0


def test_of_names_each_metric() -> None:
    """The three metric names give the three arrays."""
    assert VALUES.of("ttft") is VALUES.ttft_s
    assert VALUES.of("e2e") is VALUES.e2e_s


@pytest.mark.parametrize(
    ("statistic", "expected"),
    [
        ("mean", 26.0),  # 130 / 5
        ("p50", 30.0),  # position 4 * 0.5 = 2
        ("p90", 46.0),  # position 3.6: 40 + 0.6 * 10
        ("p95", 48.0),  # position 3.8
        ("p99", 49.6),  # position 3.96
    ],
)
def test_percentiles_interpolate_between_order_statistics(statistic: str, expected: float) -> None:
    """Percentile q of n values lies at position (n - 1) q / 100 of the sorted values."""
    values = np.array([50.0, 0.0, 30.0, 10.0, 40.0])
    assert statistic_s(values, statistic) == pytest.approx(expected, rel=1e-12)


def test_weighted_percentiles_count_every_occurrence() -> None:
    """1 three times and 9 once: the median is 1 and p90 lies at 2.7 of 1, 1, 1, 9."""
    values, weights = np.array([9.0, 1.0]), np.array([1, 3])
    assert weighted_statistic_s(values, weights, "mean") == 3.0  # 12 / 4
    assert weighted_statistic_s(values, weights, "p50") == 1.0
    assert weighted_statistic_s(values, weights, "p90") == pytest.approx(1 + 0.7 * 8, rel=1e-12)
    assert weighted_statistic_s(np.zeros(0), np.zeros(0, np.int64), "p50") == 0.0


@given(
    entries=st.lists(st.tuples(seconds, st.integers(0, 20)), min_size=1, max_size=30),
    statistic=st.sampled_from(STATISTICS),
)
def test_weighted_statistic_is_that_of_the_expanded_data(
    entries: list[tuple[float, int]], statistic: str
) -> None:
    """Weights stand for repetition: numpy on the repeated values agrees."""
    values = np.array([value for value, _ in entries])
    weights = np.array([weight for _, weight in entries])
    expanded = np.repeat(values, weights)
    expected = statistic_s(expanded, statistic)
    got = weighted_statistic_s(values, weights, statistic)
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(
    values=st.lists(seconds, min_size=1, max_size=30),
    entry=st.integers(0, 29),
    rise=seconds,
    statistic=st.sampled_from(STATISTICS),
)
def test_statistics_never_fall_when_an_entry_rises(
    values: list[float], entry: int, rise: float, statistic: str
) -> None:
    """Raising one value lowers no statistic: a bound on every request bounds the statistic."""
    raised = np.array(values)
    raised[entry % len(values)] += rise
    before, after = statistic_s(np.array(values), statistic), statistic_s(raised, statistic)
    assert after >= before - 1e-9 * before


def test_good_requests_meet_every_limit_and_no_tpot_breaks_none() -> None:
    """A limit that is just met counts as met; an undefined TPOT is no breach."""
    assert good(VALUES, {"ttft": 2.0}).tolist() == [True, True, False]
    assert good(VALUES, {"tpot": 1.0}).tolist() == [True, True, False]
    assert good(VALUES, {"ttft": 2.0, "e2e": 4.0}).tolist() == [False, True, False]
    assert good(VALUES, {}).tolist() == [True, True, True]


def test_makespan_runs_to_the_last_token_of_all() -> None:
    """The request that finishes last need not be the last one sent."""
    assert makespan_s(in_ps([1.0, 2.0, 3.0]), in_ps([5.0, 12.0, 7.0])) == 11.0


def test_summary_uses_the_names_and_units_of_vllm() -> None:
    """Throughputs are per second of makespan and latencies are in milliseconds."""
    what = workload([10, 20, 30], OUTPUTS.tolist(), SENT.tolist())
    # Gaps: request 0 four of 1 s, request 2 two of 2 s.
    gaps = (np.array([1.0, 2.0]), np.array([4, 2]))
    out = summary(VALUES, what, 10.0, gaps, {"ttft": 2.0})
    assert (out["completed"], out["duration"]) == (3, 10.0)
    assert (out["total_input_tokens"], out["total_output_tokens"]) == (60, 9)
    assert out["request_throughput"] == pytest.approx(0.3)
    assert out["output_throughput"] == pytest.approx(0.9)
    assert out["total_token_throughput"] == pytest.approx(6.9)
    assert out["request_goodput"] == pytest.approx(0.2)  # two of three
    assert out["slo_attainment"] == pytest.approx(2 / 3)
    assert out["mean_ttft_ms"] == pytest.approx(7000 / 3)
    assert out["p50_e2el_ms"] == pytest.approx(5000)
    assert out["mean_tpot_ms"] == pytest.approx(1500)
    assert out["mean_itl_ms"] == pytest.approx(8000 / 6)
    assert out["p50_itl_ms"] == pytest.approx(1000)  # 1, 1, 1, 1, 2, 2
    assert out["p95_itl_ms"] == pytest.approx(2000)


def test_summary_leaves_out_what_was_not_asked_or_recorded() -> None:
    """Without limits there is no goodput, without gaps no ITL."""
    out = summary(VALUES, workload([1, 1, 1], [1, 1, 1]), 10.0, None, {})
    assert not {"request_goodput", "slo_attainment", "mean_itl_ms"} & set(out)
    assert "p99_tpot_ms" in out
