"""The plan-choice benchmark: how groups and runs are read, and which runs stand behind a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench.choice_groups import RunIndex, Shape, parse_shape, read_groups, read_runs
from planner.errors import InputError
from tests.unit.test_bench_plan_choice import GROUP, RUN, write

if TYPE_CHECKING:
    from pathlib import Path

    from bench.choice_groups import Row


def joined(tmp_path: Path, group: Row, runs: list[Row]) -> list[str]:
    """Ids of the runs that join the one plan of a group."""
    index = RunIndex(read_runs(write(tmp_path / "runs.csv", runs)))
    one = read_groups(write(tmp_path / "cases.csv", [group]))[0]
    return [run.settings["run_id"] for run in index.runs_of(one, one.candidates[0])]


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("tp4", Shape(pp=1, dp=1, ep=1, tp=4)),
        ("tp1pp4", Shape(pp=4, dp=1, ep=1, tp=1)),
        ("tp1dp4ep4", Shape(pp=1, dp=4, ep=4, tp=1)),
        ("tp4ep2", Shape(pp=1, dp=1, ep=2, tp=4)),
        ("2xtp4", None),
        ("4TP", None),
    ],
)
def test_plans_are_read_as_the_files_spell_them(text: str, shape: Shape | None) -> None:
    """Widths that a plan leaves out are 1; another form has no shape."""
    assert parse_shape(text) == shape


@pytest.mark.parametrize(
    "column", ["model", "hardware", "engine", "quantization", "isl", "osl", "tp", "ep"]
)
def test_runs_join_on_identity_and_plan(column: str, tmp_path: Path) -> None:
    """A run that differs in any one of these columns does not join."""
    other = {**RUN, "run_id": "r2", column: "7"}
    assert joined(tmp_path, GROUP, [other, RUN]) == ["r1"]


def test_itl_groups_join_whatever_the_output_length(tmp_path: Path) -> None:
    """Each run of an ITL group has its own mean output length."""
    runs = [RUN, {**RUN, "run_id": "r2", "osl": "918(avg)"}]
    itl = {**GROUP, "group_type": "itl_slo_best_throughput", "load_or_slo": "median ITL<=20ms"}
    assert joined(tmp_path, GROUP, runs) == ["r1"]
    assert joined(tmp_path, itl, runs) == ["r1", "r2"]


def test_engine_version_joins_only_where_the_group_states_one(tmp_path: Path) -> None:
    """A group without a version takes runs of all of them."""
    runs = [RUN, {**RUN, "run_id": "r2", "engine_version": "2.0"}]
    assert joined(tmp_path, GROUP, runs) == ["r1"]
    assert joined(tmp_path, {**GROUP, "engine_version": ""}, runs) == ["r1", "r2"]


def test_the_own_source_comes_first_and_any_other_stands_in(tmp_path: Path) -> None:
    """Runs of other sources count only where the plan's own source has none."""
    own, other = RUN, {**RUN, "run_id": "r2", "source": "lab B"}
    assert joined(tmp_path, GROUP, [own, other]) == ["r1"]
    assert joined(tmp_path, GROUP, [other]) == ["r2"]


@pytest.mark.parametrize(
    ("group_type", "load_or_slo", "expected"),
    [
        ("same_load_per_gpu_throughput", "static_batch=4", ["r1"]),
        ("same_gpus_same_concurrency_latency", "concurrency=16 on 4 GPUs", ["r2"]),
        ("same_load_per_gpu_throughput", "offline_max=inf", ["r1", "r2"]),
        ("tpot_slo_best_throughput", "TPOT<=20ms", ["r1", "r2"]),
    ],
)
def test_static_and_fixed_concurrency_groups_join_on_load(
    group_type: str, load_or_slo: str, expected: list[str], tmp_path: Path
) -> None:
    """Other groups take every load."""
    group = {**GROUP, "group_type": group_type, "load_or_slo": load_or_slo}
    runs = [RUN, {**RUN, "run_id": "r2", "load": "16.0"}]
    assert sorted(joined(tmp_path, group, runs)) == expected


def test_a_load_that_the_own_source_lacks_comes_from_another(tmp_path: Path) -> None:
    """The source is asked after the load: another's batch of 4 joins, not the own batch of 1."""
    runs = [{**RUN, "load": "1"}, {**RUN, "run_id": "r2", "source": "lab B"}]
    group = {
        **GROUP,
        "group_type": "same_load_per_gpu_throughput",
        "load_or_slo": "static_batch=4",
    }
    assert joined(tmp_path, group, runs) == ["r2"]


def test_the_checkpoint_never_joins(tmp_path: Path) -> None:
    """Files of different days spell one checkpoint differently."""
    assert joined(tmp_path, GROUP, [{**RUN, "checkpoint": "elsewhere/m-fp8"}]) == ["r1"]


def test_unscorable_and_duplicate_runs_are_left_out(tmp_path: Path) -> None:
    """By those two columns alone."""
    runs = [
        RUN,
        {**RUN, "run_id": "r2", "scorable": "no"},
        {**RUN, "run_id": "r3", "duplicate_of": "r1"},
    ]
    assert joined(tmp_path, GROUP, runs) == ["r1"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{k: v for k, v in GROUP.items() if k != "plan"}], "needs the column plan"),
        ([{**GROUP, "n_gpus": "two"}], "group g1, n_gpus: 'two' must be a whole number"),
        ([GROUP, GROUP], "group g1: 'tp1, tp1' must list each plan once"),
    ],
)
def test_damaged_cases_are_named_in_one_line(
    groups: list[Row], message: str, tmp_path: Path
) -> None:
    """File, place and what is wrong."""
    with pytest.raises(InputError, match=message) as caught:
        read_groups(write(tmp_path / "cases.csv", groups))
    assert "cases.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_runs_are_named_in_one_line(tmp_path: Path) -> None:
    """An absent file, and a width that is no number."""
    with pytest.raises(InputError, match="no such file"):
        read_runs(tmp_path / "none.csv")
    with pytest.raises(InputError, match="line 3, tp/pp/dp/ep: 'four/1/1/1' must be whole"):
        read_runs(write(tmp_path / "runs.csv", [RUN, {**RUN, "tp": "four"}]))
