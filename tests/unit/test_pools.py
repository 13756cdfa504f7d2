"""Several pools of devices: each plan runs in one, and counts as it would with that pool alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from planner import Session, solve
from planner.api import simulate
from planner.errors import InputError
from planner.resolve import resolve
from planner.scenario import Scenario
from planner.space import NODE, enumerate_space
from planner.verify import verify
from simulator.plan import parse_plan
from tests.problems import mapping

if TYPE_CHECKING:
    from collections.abc import Mapping

H100 = {"device": "H100-SXM-80GB", "nodes": 1, "devices_per_node": 2, "price_per_hour": 3.9}
L40S = {"device": "L40S", "nodes": 2, "devices_per_node": 1, "price_per_hour": 0.9}
A100 = {"device": "A100-SXM4-80GB", "nodes": 1, "devices_per_node": 2, "price_per_hour": 1.8}


def on(*pools: Mapping[str, Any], **sections: Any) -> Scenario:
    """The small scenario on these pools."""
    return Scenario.model_validate(mapping(cluster={"pools": list(pools)}, **sections))


def test_each_pool_has_its_own_rules() -> None:
    """Two L40S in machines of their own take no tp2; two H100 in one machine do."""
    limits = {"max_num_seqs": [2, 4, 8], "max_num_batched_tokens": [64, 512]}
    search = {"space": {"tp": [1, 2], "pp": [1], **limits}}
    space = enumerate_space(resolve(on(H100, L40S, search=search)))
    texts = {plan.shape.text for plan in space.plans}
    assert texts == {"tp1@H100-SXM-80GB", "tp2@H100-SXM-80GB", "tp1@L40S"}
    assert space.excluded[NODE] == 2 * 6  # tp2@L40S: one and two replicas of six limits
    assert {plan.replicas for plan in space.plans if plan.shape.device == "L40S"} == {1, 2}


def test_a_plan_behaves_as_with_its_pool_alone() -> None:
    """Its metrics do not hang on what else the cluster has, and its text says where it runs."""
    several = on(H100, L40S, A100)
    for pool in (H100, L40S, A100):
        alone = simulate(on(pool), "2xtp1:seqs=4")
        among = simulate(several, f"2xtp1@{pool['device']}:seqs=4")
        assert among.metrics == alone.metrics
        assert among.to_dict()["plan"]["device"] == pool["device"]
        assert "device" not in alone.to_dict()["plan"]


@pytest.mark.parametrize(
    "objective",
    [
        {"minimize": "mean_e2e"},
        {"minimize": "cost_per_million_tokens"},
        [{"minimize": "devices"}, {"minimize": "cost_per_hour"}],
        {"maximize": "throughput"},
    ],
)
def test_the_best_is_the_best_of_each_pools_best(objective: Any) -> None:
    """Value and plan are those of one of the pools alone, in whatever order they are listed."""
    alone = {pool["device"]: solve(on(pool, objective=objective)) for pool in (H100, L40S, A100)}
    found = solve(on(H100, L40S, A100, objective=objective))
    values = {name: one.objective.value for name, one in alone.items() if one.objective}
    best = (max if "maximize" in objective else min)(values.values())
    assert found.status == "optimal"
    assert found.objective is not None
    assert found.plan is not None
    assert found.objective.value == best
    name = found.plan.device
    assert found.metrics == alone[name].metrics
    assert found.plan.id.replace(f"@{name}", "") == alone[name].plan.id  # type: ignore[union-attr]
    turned = solve(on(A100, L40S, H100, objective=objective))
    assert turned.plan == found.plan


def test_prices_are_the_pools_own() -> None:
    """The cheapest device per hour wins where only the price counts."""
    found = solve(on(H100, L40S, A100, objective={"minimize": "cost_per_hour"}))
    assert found.plan is not None
    assert (found.plan.device, found.plan.devices) == ("L40S", 1)
    assert found.plan.cost_per_hour == 0.9
    unpriced = {**H100, "device": "B300-SXM"}
    del unpriced["price_per_hour"]
    with pytest.raises(InputError, match=r"cluster.pools.1.device: 'L41' is not known"):
        resolve(on(L40S, {**H100, "device": "L41"}))
    with pytest.raises(InputError, match="needs a price"):
        resolve(on(L40S, unpriced, objective={"minimize": "cost_per_hour"}))


def test_a_pattern_leaves_a_pool_out() -> None:
    """``search.space.forbid`` sees the pool in a plan's text."""
    space = {"tp": [1], "max_num_seqs": [4], "forbid": ["*@L40S*"]}
    plans = enumerate_space(resolve(on(H100, L40S, search={"space": space}))).plans
    assert {plan.shape.device for plan in plans} == {"H100-SXM-80GB"}


def test_the_certificate_is_verified() -> None:
    """What a search over several pools claims is checked as with one; a moved plan is noticed."""
    texts: list[str] = []
    report = solve(on(H100, L40S), on_certificate=texts.append)
    (text,) = texts
    verified, _ = verify(text, source="certificate", sample=None)
    assert report.plan is not None
    assert (verified.status, verified.plan) == ("optimal", report.plan.id)
    assert "@H100-SXM-80GB" in text
    assert json.loads(text)["header"]["counts"]["space"] == report.search.space


def test_a_session_answers_as_solve_does() -> None:
    """Sessions plan over several pools, too."""
    scenario = on(H100, L40S)
    report = Session(scenario).plan()
    fresh = solve(scenario)
    assert report.plan is not None
    assert fresh.plan is not None
    assert report.plan.id == fresh.plan.id


@pytest.mark.parametrize(
    ("text", "pools", "wrong"),
    [
        ("tp1", (H100, L40S), "must end in the pool .* one of @H100-SXM-80GB, @L40S"),
        ("tp1@A100", (H100, L40S), "@A100 is no pool of the scenario: one of @H100-SXM"),
        ("tp1@L40S", (L40S,), "has one pool of devices: leave '@L40S' out"),
        ("tp1@", (H100, L40S), "is not of the form"),
    ],
)
def test_a_plan_names_its_pool(text: str, pools: Any, wrong: str) -> None:
    """Where there are several pools a plan says which, and where there is one it does not."""
    with pytest.raises(ValueError, match=wrong):
        parse_plan(text, resolve(on(*pools)).default_limits)


def test_measured_blocks_are_of_one_device() -> None:
    """``num_gpu_blocks`` was measured on one kind of device."""
    with pytest.raises(InputError, match=r"engine\.num_gpu_blocks: was measured on one kind"):
        on(H100, L40S, engine={"name": "vllm", "version": "0.24.0", "num_gpu_blocks": 9})
