"""Reports: the contract's keys, nothing of this machine in them, and the public API."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import socket
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import planner
from planner.report import dump_json
from planner.resolve import resolve
from simulator.plan import parse_plan
from tests.problems import engine, goal, pool, scenario, write_trace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOP = {
    "schema_version",
    "status",
    "plan",
    "objective",
    "bound",
    "gap",
    "metrics",
    "metrics_interval",
    "too_close",
    "alternatives",
    "search",
    "provenance",
    "warnings",
}
"""Keys of the contract for every status; ``infeasible`` and ``deterministic`` come on top."""

GOODPUT = {"ttft_ms": 60.0, "tpot_ms": 50.0}


def leaves(data: Any) -> Iterator[Any]:
    """Every value and key of nested plain data."""
    if isinstance(data, dict):
        yield from data
        data = list(data.values())
    if isinstance(data, list):
        for item in data:
            yield from leaves(item)
    else:
        yield data


@pytest.fixture(scope="module")
def report() -> planner.PlanReport:
    """A proved report with goodput limits."""
    return planner.solve(scenario(goodput=GOODPUT))


def test_keys_of_the_contract(report: planner.PlanReport) -> None:
    """All keys that others read are there, and no wall-clock time beside them."""
    data = json.loads(report.to_json())
    assert set(data) == TOP | {"infeasible", "deterministic"}
    assert (data["schema_version"], data["status"]) == (1, "optimal")
    assert {"id", "replicas", "tp", "devices"} <= set(data["plan"])
    assert {"name", "value", "unit"} <= set(data["objective"])
    search = data["search"]
    assert {"space", "excluded_by_rule", "excluded_by_bound", "simulated"} <= set(search)
    assert "seconds" not in search
    metrics = data["metrics"]
    names = {f"{s}_{m}_ms" for s in ("mean", "p50", "p99") for m in ("ttft", "tpot", "itl", "e2el")}
    rates = {"request_throughput", "output_throughput", "request_goodput", "slo_attainment"}
    assert names | rates <= set(metrics)
    assert data["objective"]["value"] == pytest.approx(metrics["mean_e2el_ms"], abs=1e-6)
    assert data["bound"] == data["objective"]["value"]


def test_keys_of_an_infeasible_report() -> None:
    """The same keys, empty where there is no plan."""
    data = planner.solve(scenario(slo={"ttft_ms": {"p99": 1}})).to_dict()
    assert set(data) == TOP | {"infeasible", "deterministic"}
    assert data["status"] == "infeasible"
    assert (data["plan"], data["objective"], data["bound"], data["gap"]) == (None,) * 4
    assert (data["metrics"], data["alternatives"]) == ({}, [])
    assert set(data["infeasible"]) == {"reason", "relaxation", "conflict", "changes"}


def test_nothing_of_this_machine(tmp_path: Path) -> None:
    """Neither folder, user nor host of the run shows up, though the trace has a full path."""
    write_trace(tmp_path / "trace.csv", np.random.default_rng(0), 20)
    absolute = str(tmp_path / "trace.csv")
    text = planner.solve(scenario(workload={"trace": absolute})).to_json()
    for own in (str(tmp_path), os.getcwd(), os.path.expanduser("~"), socket.gethostname()):
        assert own in ("/", "") or own not in text


def test_the_folder_of_the_scenario_does_not_matter(tmp_path: Path) -> None:
    """The same scenario and trace give the same bytes in another folder."""
    texts = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write_trace(tmp_path / name / "trace.csv", np.random.default_rng(0), 20)
        asked = scenario(tmp_path / name, workload={"trace": "trace.csv"})
        texts.append(planner.solve(asked).to_json())
    assert texts[0] == texts[1]


def test_numbers_are_finite_and_rounded(report: planner.PlanReport) -> None:
    """Ten significant digits and no infinity, also where no TPOT is defined."""
    work = {"input_tokens": 20, "output_tokens": 1, "num_requests": 5, "arrival": "all_at_once"}
    one_token = planner.solve(scenario(workload=work, goodput=GOODPUT, objective=goal("p99_tpot")))
    assert one_token.objective is not None
    assert (one_token.objective.value, one_token.metrics["mean_tpot_ms"]) == (0.0, 0.0)
    for each in (report, one_token):
        numbers = [x for x in leaves(json.loads(each.to_json())) if isinstance(x, float)]
        assert len(numbers) > 20
        for number in numbers:
            assert math.isfinite(number)
            assert number == float(f"{number:.10g}")


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_json_refuses_what_is_no_number(number: float) -> None:
    """NaN and infinity are not JSON and never get out."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_json({"x": number})


def test_json_does_not_depend_on_the_order_of_keys() -> None:
    """Keys are sorted, and the text ends with a line end."""
    assert dump_json({"b": 1, "a": [2]}) == dump_json({"a": [2], "b": 1})
    assert dump_json({}) == "{}\n"


def test_reports_are_frozen(report: planner.PlanReport) -> None:
    """A report cannot be changed by mistake."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.status = "feasible"  # type: ignore[misc]


def test_plan_text_parses_back(report: planner.PlanReport) -> None:
    """The id of the plan and of each runner-up names the plan that it stands for."""
    defaults = resolve(scenario()).default_limits
    assert report.plan is not None
    plan = parse_plan(report.plan.id, defaults)
    assert (plan.replicas, plan.shape.tp) == (report.plan.replicas, report.plan.tp)
    assert plan.limits.max_num_seqs == report.plan.max_num_seqs
    assert plan.limits.max_num_batched_tokens == report.plan.max_num_batched_tokens
    ids = [row.id for row in report.alternatives]
    assert report.plan.id not in ids
    assert len(set(ids)) == len(ids)
    for row in report.alternatives:
        other = parse_plan(row.id, defaults)
        assert (other.text(defaults), other.devices) == (row.id, row.devices)


@pytest.mark.parametrize(("tp", "devices", "replicas"), [(1, 1, 1), (1, 3, 3), (2, 4, 2)])
def test_launch_flags_say_the_plan(tp: int, devices: int, replicas: int) -> None:
    """Each command's flags state the plan; replicas share neither devices nor ports."""
    report = planner.solve(
        scenario(
            cluster=pool(devices),
            engine=engine(num_gpu_blocks=100, block_size=32, gpu_memory_utilization=0.85),
            search={
                "space": {
                    "tp": [tp],
                    "replicas": [replicas],
                    "max_num_seqs": [8],
                    "max_num_batched_tokens": [512],
                }
            },
        )
    )
    assert report.plan is not None
    assert len(report.plan.launch) == replicas
    ports, used = set(), []
    for command in report.plan.launch:
        words = shlex.split(command)
        if replicas > 1:
            name, _, indices = words.pop(0).partition("=")
            assert name == "CUDA_VISIBLE_DEVICES"
            used.extend(indices.split(","))
        assert words[:2] == ["vllm", "serve"]
        flags = dict(zip(words[3::2], words[4::2], strict=True))
        ports.add(flags.pop("--port", None))
        assert flags == {
            "--tensor-parallel-size": str(tp),
            "--max-num-seqs": "8",
            "--max-num-batched-tokens": "512",
            "--max-model-len": "1024",
            "--gpu-memory-utilization": "0.85",
            "--block-size": "32",
            "--num-gpu-blocks-override": "100",
        }
    assert len(ports) == replicas
    if replicas > 1:
        assert sorted(used) == [str(i) for i in range(devices)]


def test_cost_and_memory_add_up() -> None:
    """Two devices at 3 USD cost 6 USD per hour; the parts of memory are within what is usable."""
    cluster = pool(2)
    cluster["pools"][0]["price_per_hour"] = 3.0
    space = {"tp": [2], "max_num_seqs": [8], "max_num_batched_tokens": [512]}
    report = planner.solve(scenario(cluster=cluster, search={"space": space}))
    assert report.plan is not None
    assert report.plan.cost_per_hour == 6.0
    tokens_per_hour = report.metrics["output_throughput"] * 3600
    per_million = report.metrics["cost_per_million_output_tokens"]
    assert per_million == pytest.approx(6.0 / tokens_per_hour * 1e6)
    memory = report.plan.memory
    parts = ("weights_gib", "activations_gib", "overhead_gib", "kv_cache_gib")
    left_gib = memory["usable_gib"] - sum(memory[part] for part in parts)
    # Less than two blocks of 16 tokens x 64 KiB (2 x 32 layers x 4 heads x 128 x 2 bytes): 2 MiB.
    assert 0 <= left_gib < 2 / 1024


def test_provenance_changes_with_its_source(tmp_path: Path) -> None:
    """One more token in the trace changes the workload's digest and what the run did with it."""
    digests = []
    for output in (30, 31):
        (tmp_path / "trace.csv").write_text(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n"
            f"2023-11-16 18:00:00.0000000,100,{output}\n2023-11-16 18:00:00.5000000,50,5\n"
        )
        report = planner.solve(scenario(tmp_path, workload={"trace": "trace.csv"}))
        digests.append(dict(report.provenance))
    first, second = digests
    assert first.pop("workload") != second.pop("workload")
    shares = [dict(one.pop("kernel_time_share")) for one in (first, second)]
    assert first == second
    for share in shares:
        assert sum(share.values()) == pytest.approx(1.0)
        assert all(0 <= value <= 1 for value in share.values())
    assert len(str(first["scenario"])) == 64  # sha256
    assert first["semantics"] == 1


def test_provenance_of_drawn_lengths_changes_with_the_seed() -> None:
    """Another seed draws another workload: scenario and workload digests differ."""
    space = {"tp": [1], "max_num_seqs": [8], "max_num_batched_tokens": [512]}
    first, second = (
        planner.solve(scenario(search={"seed": seed, "space": space})).provenance for seed in (0, 1)
    )
    assert first["workload"] != second["workload"]
    assert first["scenario"] != second["scenario"]
    assert first["kernel_table"] == second["kernel_table"]


def test_public_api_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """``from planner import Scenario, solve`` works, is silent, and answers alike each time."""
    from planner import Scenario, solve

    asked = Scenario.model_validate(scenario())
    texts = [solve(asked).to_json() for _ in range(2)]
    assert texts[0] == texts[1]
    assert capfd.readouterr() == ("", "")


def test_simulate_agrees_with_solve(report: planner.PlanReport) -> None:
    """Simulating the chosen plan gives the metrics of the solve."""
    assert report.plan is not None
    simulated = planner.simulate(scenario(goodput=GOODPUT), report.plan.id)
    assert simulated.metrics == report.metrics
    assert simulated.plan == report.plan
