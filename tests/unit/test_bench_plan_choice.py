"""The plan-choice benchmark: how a plan is chosen from predictions."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

import pytest

from bench.choice_groups import RunIndex, parse_shape, read_groups, read_runs
from bench.choice_predict import Prediction, predict_all
from bench.choice_rules import choose
from bench.plan_choice import choose_all

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bench.choice_groups import Row

GROUP = {
    "group_id": "g1",
    "group_type": "tpot_slo_best_throughput",
    "source": "lab A",
    "model": "m",
    "quantization": "fp8",
    "hardware": "H",
    "engine": "e",
    "engine_version": "1.0",
    "date": "2026-01-01",
    "isl": "100",
    "osl": "11",
    "load_or_slo": "TPOT<=20ms",
    "objective": "derived output tok/s/GPU at best measured concurrency",
    "plan": "tp1",
    "n_gpus": "1",
    "value": "1",
    "unit": "tok/s/GPU",
    "rank": "1",
    "mixed_date": "no",
    "checkpoint": "repo/m",
}
RUN = {
    "run_id": "r1",
    "source": "lab A",
    "model": "m",
    "quantization": "fp8",
    "hardware": "H",
    "engine": "e",
    "engine_version": "1.0",
    "isl": "100",
    "osl": "11",
    "tp": "1",
    "pp": "1",
    "dp": "1",
    "ep": "1",
    "load": "4",
    "checkpoint": "repo/m",
    "scorable": "yes",
    "duplicate_of": "",
}


def write(path: Path, rows: list[Row]) -> Path:
    """Write rows with the columns of the first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


class FakePredictor:
    """Predicts by a function of (tp, load), and counts its calls."""

    def __init__(self, predict: Callable[[int, int], Prediction]) -> None:
        self._predict = predict
        self.rows: list[Row] = []

    def predict(self, run_row: Row) -> Prediction:
        """Predict one run."""
        self.rows.append(run_row)
        return self._predict(int(run_row["tp"]), int(run_row["load"]))


def chosen(
    tmp_path: Path, plans: list[str], runs: list[Row], predictor: FakePredictor, **group: str
) -> tuple[list[str], str]:
    """Plans of one group in the order of their ranks, and why it is uncovered."""
    rows = []
    for plan in plans:
        shape = parse_shape(plan)
        n_gpus = shape.tp * shape.pp if shape else 1
        rows.append({**GROUP, **group, "plan": plan, "n_gpus": str(n_gpus)})
    cases = write(tmp_path / "cases.csv", rows)
    (choice,) = choose_all(cases, write(tmp_path / "runs.csv", runs), predictor).groups
    return [s.candidate.plan for s in choice.standings], choice.why_uncovered


def test_no_metric_reaches_the_predictor(tmp_path: Path) -> None:
    """A column that is no setting, known or not, is dropped on reading."""
    predictor = FakePredictor(lambda tp, load: Prediction({"ttft_ms": 1.0, "tpot_ms": 1.0}))
    run = {**RUN, "tpot_ms": "3", "output_tok_per_s": "9", "avg_batch": "4", "a_new_metric": "7"}
    chosen(tmp_path, ["tp1"], [run], predictor)
    (row,) = predictor.rows
    assert not {"tpot_ms", "output_tok_per_s", "avg_batch", "a_new_metric"} & set(row)
    assert row["load"] == "4"


def test_the_best_load_within_the_limit_decides(tmp_path: Path) -> None:
    """tp2 at load 16 breaks the limit; its load 8 gives more per GPU than all of tp1's.

    Per GPU, with 11 tokens out: tp1 at load 4: 4 x 11 / (0 + 10 x 20 ms) = 220/s; tp2 at load 8:
    8 x 11 / (10 x 15 ms) / 2 = 293/s, and at 16, where TPOT is 21 ms, 419/s.
    """
    tpot_ms = {(1, 4): 20.0, (1, 8): 30.0, (2, 8): 15.0, (2, 16): 21.0}

    def predict(tp: int, load: int) -> Prediction:
        return Prediction({"ttft_ms": 0.0, "tpot_ms": tpot_ms[tp, load]})

    runs = [{**RUN, "tp": str(tp), "load": str(load)} for tp, load in tpot_ms]
    assert chosen(tmp_path, ["tp1", "tp2"], runs, FakePredictor(predict)) == (["tp2", "tp1"], "")
    tpot_ms[2, 8] = 20.1
    assert chosen(tmp_path, ["tp1", "tp2"], runs, FakePredictor(predict)) == (["tp1", "tp2"], "")


def test_a_plan_that_meets_the_limit_nowhere_ranks_last(tmp_path: Path) -> None:
    """Before plans that do not fit, the one nearest to the limit first."""

    def predict(tp: int, load: int) -> Prediction:
        if tp == 1:
            return Prediction(reason="weights do not fit", fits=False)
        return Prediction({"ttft_ms": 0.0, "tpot_ms": {2: 40.0, 4: 30.0, 8: 19.0}[tp]})

    runs = [{**RUN, "tp": str(tp)} for tp in (1, 2, 4, 8)]
    plans, why = chosen(tmp_path, ["tp1", "tp2", "tp4", "tp8"], runs, FakePredictor(predict))
    assert (plans, why) == (["tp8", "tp4", "tp2", "tp1"], "")


def test_ties_go_to_fewer_gpus_and_then_to_pure_tensor_parallelism(tmp_path: Path) -> None:
    """Plans of equal prediction rank by GPUs, then pp, dp and ep."""
    predictor = FakePredictor(lambda tp, load: Prediction({"total_tok_per_s": 0.0}))
    plans = ["tp4ep4", "tp4", "tp2pp2", "tp2"]
    runs = [
        {**RUN, "tp": tp, "pp": pp, "ep": ep}
        for tp, pp, ep in (("4", "1", "4"), ("4", "1", "1"), ("2", "2", "1"), ("2", "1", "1"))
    ]
    ranked, _ = chosen(
        tmp_path,
        plans,
        runs,
        predictor,
        group_type="same_load_per_gpu_throughput",
        load_or_slo="offline_max=inf",
        objective="total_throughput per GPU",
    )
    assert ranked == ["tp2", "tp4", "tp4ep4", "tp2pp2"]


@pytest.mark.parametrize(
    ("group", "metrics", "expected"),
    [
        (
            {"objective": "throughput per GPU (replicas)", "load_or_slo": "offline_max=inf"},
            {1: {"output_tok_per_s": 90.0}, 2: {"output_tok_per_s": 190.0}},
            ["tp2", "tp1"],
        ),
        (
            {"objective": "total_throughput per GPU", "load_or_slo": "static_batch=4"},
            {
                1: {"output_tok_per_s": 90.0, "total_tok_per_s": 990.0},
                2: {"output_tok_per_s": 190.0, "total_tok_per_s": 1900.0},
            },
            ["tp1", "tp2"],
        ),
        (
            {
                "group_type": "itl_slo_best_throughput",
                "objective": "measured output tok/s/GPU",
                "load_or_slo": "median ITL<=20ms",
            },
            {
                1: {"output_tok_per_s": 90.0, "itl_median_ms": 20.5},
                2: {"output_tok_per_s": 19.0, "itl_median_ms": 19.5},
            },
            ["tp2", "tp1"],
        ),
        (
            {
                "group_type": "same_gpus_same_concurrency_latency",
                "objective": "derived e2e latency = ttft+tpot*(osl-1)",
                "load_or_slo": "concurrency=4 on 2 GPUs",
            },
            {1: {"ttft_ms": 100.0, "tpot_ms": 5.0}, 2: {"ttft_ms": 20.0, "tpot_ms": 12.0}},
            ["tp2", "tp1"],
        ),
        (
            {
                "group_type": "same_load_latency",
                "objective": "e2e latency",
                "load_or_slo": "static_batch=4",
            },
            {1: {"e2e_ms": 10.0}, 2: {"e2e_ms": 12.0}},
            ["tp1", "tp2"],
        ),
    ],
)
def test_each_type_of_group_ranks_by_what_it_measures(
    group: Row, metrics: dict[int, dict[str, float]], expected: list[str], tmp_path: Path
) -> None:
    """Throughput per GPU counts output or all tokens; of latencies the lower one wins."""
    kind = {"group_type": "same_load_per_gpu_throughput", **group}
    predictor = FakePredictor(lambda tp, load: Prediction(metrics[tp]))
    runs = [{**RUN, "tp": "1"}, {**RUN, "tp": "2"}]
    assert chosen(tmp_path, ["tp1", "tp2"], runs, predictor, **kind) == (expected, "")


def test_a_group_is_uncovered_where_one_plan_is(tmp_path: Path) -> None:
    """The reason names what is missing; a load without a prediction alone takes no part."""

    def predict(tp: int, load: int) -> Prediction:
        if load == 8:
            return Prediction(reason="no such kernel")
        return Prediction({"ttft_ms": 0.0, "tpot_ms": 1.0})

    runs = [{**RUN, "tp": tp, "load": load} for tp, load in (("1", "4"), ("1", "8"), ("2", "8"))]
    predictor = FakePredictor(predict)
    assert chosen(tmp_path, ["tp1", "tp2"], runs, predictor) == ([], "no such kernel")
    assert chosen(tmp_path, ["tp1"], runs, predictor) == (["tp1"], "")
    assert chosen(tmp_path, ["tp1", "tp8"], runs, predictor) == ([], "no run joins")
    assert "not of the form" in chosen(tmp_path, ["tp1", "8TP"], runs, predictor)[1]
    assert "not understood" in chosen(tmp_path, ["tp1"], runs, predictor, load_or_slo="E2E<=1s")[1]


def test_plans_of_equal_gpus_are_chosen_among_themselves(tmp_path: Path) -> None:
    """A set of equal GPUs is covered although another plan of its group is not."""
    runs = [{**RUN, "tp": "4", "ep": ep} for ep in ("1", "2")]
    plans = {"tp1": "1", "tp4": "4", "tp4ep2": "4"}
    rows = [{**GROUP, "plan": plan, "n_gpus": n} for plan, n in plans.items()]
    cases = write(tmp_path / "cases.csv", rows)
    answers = choose_all(cases, write(tmp_path / "runs.csv", runs), ByExperts())
    assert [choice.why_uncovered for choice in answers.groups] == ["no run joins"]
    assert [[s.candidate.plan for s in c.standings] for c in answers.same_gpus] == [
        ["tp4ep2", "tp4"]
    ]


def test_a_metric_that_is_not_predicted_leaves_the_group_uncovered(tmp_path: Path) -> None:
    """So does a load that is no number where the value is computed from it."""
    predictor = FakePredictor(lambda tp, load: Prediction({"tpot_ms": 1.0}))
    assert chosen(tmp_path, ["tp1"], [RUN], predictor) == ([], "not known: 'ttft_ms'")
    runs = write(tmp_path / "odd.csv", [{**RUN, "load": ""}])
    (choice,) = choose_all(write(tmp_path / "cases.csv", [GROUP]), runs, Constant()).groups
    assert choice.why_uncovered == "not known: could not convert string to float: ''"


def test_a_run_shared_by_groups_is_predicted_once(tmp_path: Path) -> None:
    """Repeated rows too: two runs of equal settings are one experiment."""
    predictor = FakePredictor(lambda tp, load: Prediction({"ttft_ms": 0.0, "tpot_ms": 1.0}))
    runs = write(tmp_path / "runs.csv", [RUN, {**RUN, "run_id": "r2"}, {**RUN, "load": "8"}])
    groups = [{**GROUP, "group_id": f"g{i}"} for i in range(5)]
    choose_all(write(tmp_path / "cases.csv", groups), runs, predictor)
    assert sorted(row["load"] for row in predictor.rows) == ["4", "8"]


class Constant:
    """Predicts the same of every run."""

    def predict(self, run_row: Row) -> Prediction:
        """Predict one run."""
        return Prediction({"ttft_ms": 0.0, "tpot_ms": 1.0})


class ByExperts:
    """Predicts less time with more expert parallelism."""

    def predict(self, run_row: Row) -> Prediction:
        """Predict one run."""
        return Prediction({"ttft_ms": 0.0, "tpot_ms": 10.0 / float(run_row["ep"])})


class ByLoad:
    """Predicts TPOT as the load, in any process."""

    def predict(self, run_row: Row) -> Prediction:
        """Predict one run."""
        return Prediction({"ttft_ms": 0.0, "tpot_ms": float(run_row["load"])})


def test_two_processes_give_the_same_predictions(tmp_path: Path) -> None:
    """The answer does not depend on the number of workers."""
    rows = [{**RUN, "run_id": f"r{i}", "load": str(i)} for i in range(1, 40)]
    runs = read_runs(write(tmp_path / "runs.csv", rows))
    assert predict_all(ByLoad(), runs, workers=2) == predict_all(ByLoad(), runs)


def test_choosing_needs_no_value_column(tmp_path: Path) -> None:
    """Groups are read without value, rank or unit, and a run file without any metric."""
    bare = {k: v for k, v in GROUP.items() if k not in ("value", "rank", "unit")}
    index = RunIndex(read_runs(write(tmp_path / "runs.csv", [RUN])))
    (group,) = read_groups(write(tmp_path / "cases.csv", [bare]))
    predictions = predict_all(ByLoad(), index.runs_of(group, group.candidates[0]))
    assert choose(group, index, predictions).chosen == group.candidates[0]
