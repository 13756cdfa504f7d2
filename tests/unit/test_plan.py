"""Plans: text form, canonical defaults, refusals and tie order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.plan import BatchingLimits, Plan, Shape, parse_plan

DEFAULTS = BatchingLimits(max_num_seqs=1024, max_num_batched_tokens=8192)

counts = st.integers(1, 10**6)
some_limits = st.builds(
    BatchingLimits,
    max_num_seqs=st.sampled_from([1024]) | counts,
    max_num_batched_tokens=st.sampled_from([8192]) | counts,
)
sizes = st.integers(1, 64)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Any shape: experts over a divisor of the stage's width, layers dealt out or named."""
    tp, pp, dp = draw(sizes), draw(st.integers(1, 4)), draw(sizes)
    ep = draw(st.sampled_from([n for n in range(1, tp * dp + 1) if tp * dp % n == 0]))
    layers = draw(st.just(()) | st.tuples(*[sizes] * pp))
    return Shape(tp, pp, dp, ep, layers, draw(st.sampled_from(["", "L40S", "H100-SXM-80GB"])))


plans = st.builds(Plan, replicas=counts, shape=shapes(), limits=some_limits)


@given(plan=plans, defaults=some_limits)
def test_a_plan_survives_its_text(plan: Plan, defaults: BatchingLimits) -> None:
    """Parsing the canonical text gives the plan back, and the text is unchanged by it."""
    text = plan.text(defaults)
    again = parse_plan(text, defaults)
    assert again == plan
    assert again.text(defaults) == text


@given(one=plans, other=plans)
def test_different_plans_have_different_texts_and_tie_keys(one: Plan, other: Plan) -> None:
    """Text and tie key are injective, so that neither confuses two plans."""
    same = one == other
    assert (one.text(DEFAULTS) == other.text(DEFAULTS)) == same
    assert (one.tie_key(DEFAULTS) == other.tie_key(DEFAULTS)) == same


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (Plan(1, Shape(8), DEFAULTS), "tp8"),
        (Plan(2, Shape(4), DEFAULTS), "2xtp4"),
        (Plan(1, Shape(1), BatchingLimits(128, 8192)), "tp1:seqs=128"),
        (Plan(1, Shape(1), BatchingLimits(1024, 2048)), "tp1:tokens=2048"),
        (Plan(8, Shape(1), BatchingLimits(64, 512)), "8xtp1:seqs=64,tokens=512"),
        (Plan(2, Shape(4, pp=2), DEFAULTS), "2xtp4pp2"),
        (Plan(3, Shape(2, device="L40S"), BatchingLimits(8, 8192)), "3xtp2@L40S:seqs=8"),
        (Plan(1, Shape(1, dp=8, ep=8), DEFAULTS), "tp1dp8ep8"),
        (Plan(1, Shape(8, ep=8), DEFAULTS), "tp8ep8"),
        (
            Plan(1, Shape(4, pp=2, layers=(41, 39)), BatchingLimits(64, 8192)),
            "tp4pp2:layers=41-39,seqs=64",
        ),
    ],
)
def test_canonical_text_leaves_defaults_out(plan: Plan, text: str) -> None:
    """Only what differs from the engine's defaults is written, in a fixed order."""
    assert plan.text(DEFAULTS) == text
    assert parse_plan(text, DEFAULTS) == plan


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("1xtp8", "tp8"),
        ("  tp8\n", "tp8"),
        ("tp8:seqs=1024,tokens=8192", "tp8"),
        ("tp8:tokens=512,seqs=64", "tp8:seqs=64,tokens=512"),
    ],
)
def test_other_spellings_become_the_canonical_one(text: str, canonical: str) -> None:
    """A single replica, a default and another key order are read but not written."""
    assert parse_plan(text, DEFAULTS).text(DEFAULTS) == canonical


@pytest.mark.parametrize("text", ["", "tp", "tp0", "0xtp2", "tp-1", "8", "x2tp4", "2tp4", "TP8"])
def test_a_bad_shape_is_refused(text: str) -> None:
    """The message shows the shape and the form expected."""
    with pytest.raises(ValueError, match=r"is not of the form \[Rx\]tpA"):
        parse_plan(text, DEFAULTS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp8:pp=2", "'pp=2' is not one of layers=N-N, seqs=N, tokens=N"),
        ("tp8:seqs", "'seqs' is not one of"),
        ("tp8:seqs=", "seqs is ''; it must be a whole number of at least 1"),
        ("tp8:seqs=0", "seqs is '0'; it must be"),
        ("tp8:tokens=-4", "tokens is '-4'; it must be"),
        ("tp8:tokens=1.5", "tokens is '1.5'; it must be"),
        ("tp8:seqs=4,seqs=8", "seqs is given twice"),
        ("tp2:layers=4-4", "layers names 2 stages; pp is 1"),
        ("tp2pp2:layers=4-x", "layers is '4-x'; it must be"),
        ("tp4ep3", "ep is 3; it must divide the 4 devices of a pipeline stage"),
        ("tp2dp2ep8", "ep is 8; it must divide the 4 devices"),
    ],
)
def test_a_bad_limit_is_refused(text: str, message: str) -> None:
    """The message names the key and its value."""
    with pytest.raises(ValueError, match=message):
        parse_plan(text, DEFAULTS)


@pytest.mark.parametrize("field", ["replicas", "tp", "max_num_seqs", "max_num_batched_tokens"])
def test_counts_below_one_are_refused(field: str) -> None:
    """A plan cannot be built with nothing of something."""
    counts = {"replicas": 1, "tp": 1, "max_num_seqs": 1, "max_num_batched_tokens": 1, field: 0}
    replicas, tp = counts.pop("replicas"), counts.pop("tp")
    with pytest.raises(ValueError, match=f"{field} is 0; it must be at least 1"):
        Plan(replicas, Shape(tp), BatchingLimits(**counts))


def test_a_shape_counts_its_devices() -> None:
    """A stage is tp x dp wide; experts of ep groups are cut over what is left of it."""
    shape = Shape(2, pp=3, dp=4, ep=4)
    assert (shape.width, shape.moe_tp, shape.devices) == (8, 2, 24)
    assert Plan(2, shape, DEFAULTS).devices == 48


def test_ties_go_to_fewer_devices_then_to_fewer_changed_limits() -> None:
    """Devices come first, then limits that differ from the defaults, then fewer replicas."""
    # devices 4; 8 with 0 changes: 1 then 2 replicas; 8 with 1 change; 8 with 2 changes.
    texts = ["tp4:seqs=64,tokens=512", "tp8", "2xtp4", "tp8:seqs=64", "tp8:seqs=64,tokens=512"]
    plans = [parse_plan(text, DEFAULTS) for text in texts]
    assert [plan.devices for plan in plans] == [4, 8, 8, 8, 8]
    shuffled = [plans[i] for i in (3, 0, 4, 2, 1)]
    assert sorted(shuffled, key=lambda plan: plan.tie_key(DEFAULTS)) == plans


@pytest.mark.parametrize("text", ["tp8:", "tp8:,", "tp8:seqs=4,", "tp8\n:seqs=4", "tp1\u0663"])
def test_text_that_is_nearly_a_plan_is_refused(text: str) -> None:
    """One text names one plan: no empty items, line breaks or digits of another script."""
    with pytest.raises(ValueError, match="is not"):
        parse_plan(text, DEFAULTS)
