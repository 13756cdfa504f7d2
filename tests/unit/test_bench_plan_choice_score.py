"""The plan-choice benchmark: how choices, and simple rules beside them, are scored."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.choice_groups import Group, RunIndex, read_groups, read_runs
from bench.choice_predict import Prediction
from bench.choice_rules import Choice, Standing
from bench.choice_score import bootstrap, read_values
from bench.plan_choice import Answers, choose_all, report, rounded, table
from planner.errors import InputError
from tests.unit.test_bench_plan_choice import GROUP, RUN, write

SHARED = Path(__file__).parents[3] / "shared" / "data" / "truth"

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"measured runs are not beside the project ({SHARED})"
)

# Plans of one group with made-up values: tp1 of three GPU counts is best, tp2 2 % behind.
PLANS = {"tp1": ("1", "100"), "tp2": ("2", "98"), "tp4": ("4", "50"), "tp4ep4": ("4", "40")}


def group(
    group_id: str, values: dict[str, tuple[str, str]], **columns: str
) -> list[dict[str, str]]:
    """Rows of one group; ``values`` maps a plan to its GPUs and its value."""
    return [
        {**GROUP, **columns, "group_id": group_id, "plan": plan, "n_gpus": n, "value": value}
        for plan, (n, value) in values.items()
    ]


def scored(cases: Path, chosen: dict[str, str]) -> dict[str, Any]:
    """Figures where each group's choice is given, and groups without one are uncovered."""

    def choice(one: Group) -> Choice:
        if one.group_id not in chosen:
            return Choice(one, (), "no reason")
        order = sorted(one.candidates, key=lambda c: (c.plan != chosen[one.group_id], c.tie_key))
        return Choice(one, tuple(Standing(c, 1.0) for c in order))

    groups = read_groups(cases)
    same_gpus = [choice(part) for one in groups for part in one.same_gpus()]
    return report(Answers([choice(one) for one in groups], same_gpus, RunIndex([])), cases)


def test_share_is_the_chosen_value_over_the_best(tmp_path: Path) -> None:
    """98 of 100 is within 3 %, 50 of 100 is not, and an uncovered group scores 0."""
    rows = [*group("g1", PLANS), *group("g2", PLANS), *group("g3", PLANS)]
    figures = scored(write(tmp_path / "c.csv", rows), {"g1": "tp2", "g2": "tp4"})
    assert [c["share"] for c in figures["choices"]] == [0.98, 0.5, 0.0]
    assert figures["choices"][0]["chosen"] == "tp2"
    assert figures["choices"][0]["best"] == "tp1"
    assert figures["choices"][0]["why_uncovered"] is None
    assert figures["choices"][2] == {
        "group_id": "g3",
        "chosen": None,
        "best": "tp1",
        "share": 0.0,
        "why_uncovered": "no reason",
    }
    assert (figures["groups"], figures["covered"]) == (3, 2)
    assert figures["within_3pct"] == pytest.approx(1 / 3)
    assert figures["mean_share"] == pytest.approx(1.48 / 3)
    assert figures["covered_only"]["mean_share"] == pytest.approx(0.74)
    # Shares 0, 0.5, 0.98: the 5th percentile lies 0.1 steps above the lowest.
    assert figures["p5_share"] == pytest.approx(0.05)
    assert figures["uncovered"] == [{"reason": "no reason", "n": 1}]


def test_the_share_of_a_latency_is_the_best_over_the_chosen(tmp_path: Path) -> None:
    """12 ms against 9 ms scores 0.75, and the lowest is best."""
    values = {"tp2": ("2", "9"), "tp2ep2": ("2", "12")}
    latency = {"group_type": "same_gpus_same_concurrency_latency"}
    cases = write(tmp_path / "c.csv", group("g1", values, **latency))
    figures = scored(cases, {"g1": "tp2ep2"})
    assert figures["choices"][0]["best"] == "tp2"
    assert figures["choices"][0]["share"] == 0.75


def test_rules_score_their_expected_value(tmp_path: Path) -> None:
    """Fewest GPUs: tp1. Most: tp4 or tp4ep4. Random: any of the four, two within 3 %."""
    rules = scored(write(tmp_path / "c.csv", group("g1", PLANS)), {})["rules"]
    assert rules["fewest_gpus"] == {"within_3pct": 1.0, "mean_share": 1.0, "p5_share": 1.0}
    assert rules["most_gpus"]["mean_share"] == pytest.approx(0.45)
    assert rules["most_gpus"]["within_3pct"] == 0.0
    assert rules["random"]["mean_share"] == pytest.approx(0.72)
    assert rules["random"]["within_3pct"] == 0.5


def test_clusters_weigh_alike(tmp_path: Path) -> None:
    """Three right groups of one model and a wrong one of another make 75 and 50 %."""
    rows = [row for i in range(3) for row in group(f"g{i}", PLANS)]
    rows += group("g9", PLANS, model="other")
    chosen = {"g0": "tp1", "g1": "tp1", "g2": "tp1", "g9": "tp4"}
    figures = scored(write(tmp_path / "c.csv", rows), chosen)
    assert figures["within_3pct"] == 0.75
    weighted = {"clusters": 2, "within_3pct": 0.5, "mean_share": 0.75}
    assert figures["cluster_weighted"] == weighted
    assert figures["slices"]["model=other"]["within_3pct"] == 0.0
    assert figures["slices"]["mixed_date=no"]["groups"] == 4


def test_plans_of_equal_gpus_are_scored_among_themselves(tmp_path: Path) -> None:
    """tp4 against tp4ep4: the first of the ranking that is one of them counts, 1 of 1."""
    figures = scored(write(tmp_path / "c.csv", group("g1", PLANS)), {"g1": "tp1"})
    same = figures["same_gpus"]
    assert (same["n"], same["within_3pct"], same["one_date"]["n"]) == (1, 1.0, 1)
    assert same["rules"] == {"pure_tp": 1.0, "random": 0.5}
    assert same["choices"][0]["chosen"] == same["choices"][0]["best"] == "tp4"


def test_sets_of_mixed_dates_are_kept_apart(tmp_path: Path) -> None:
    """Plans measured weeks apart count among all sets, not among those of one date."""
    rows = group("g1", PLANS, mixed_date="yes") + group("g2", PLANS)
    same = scored(write(tmp_path / "c.csv", rows), {"g2": "tp4"})["same_gpus"]
    assert (same["n"], same["within_3pct"]) == (2, 0.5)
    assert (same["one_date"]["n"], same["one_date"]["within_3pct"]) == (1, 1.0)


def test_without_a_pure_plan_the_pure_rule_draws(tmp_path: Path) -> None:
    """Of two plans that both split experts, one is best: one in two."""
    values = {"tp4ep2": ("4", "100"), "tp4ep4": ("4", "40")}
    same = scored(write(tmp_path / "c.csv", group("g1", values)), {})["same_gpus"]
    assert same["rules"]["pure_tp"] == 0.5


@pytest.mark.parametrize("value", ["", "fast", "0", "-1", "nan"])
def test_a_value_that_is_no_positive_number_is_named(value: str, tmp_path: Path) -> None:
    """One line with group and plan."""
    cases = write(tmp_path / "c.csv", group("g1", {"tp1": ("1", value)}))
    with pytest.raises(InputError, match="group g1, value of tp1"):
        read_values(cases)


def test_the_command_writes_table_and_json(tmp_path: Path) -> None:
    """A row of an unknown engine is uncovered by name, and a second run gives the same bytes."""
    cases = write(tmp_path / "cases.csv", group("g1", PLANS))
    runs = write(tmp_path / "runs.csv", [{**RUN, "tp": "1", "arrival": ""}])
    texts = []
    for name in ("a.json", "b.json"):
        command = [sys.executable, "-m", "bench.plan_choice", str(cases), "--runs", str(runs)]
        command += ["--workers", "1", "--json", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        texts.append((tmp_path / name).read_text(encoding="utf-8"))
        assert "all groups" in done.stdout
        assert "rule random: 50 % within 3 %, share 0.720" in done.stdout
    assert texts[0] == texts[1]
    figures = json.loads(texts[0])
    assert figures["covered"] == 0
    reason = figures["choices"][0]["why_uncovered"]
    assert "no run joins" in reason  # tp2 and above were never run
    assert reason.count(";") == 1  # and tp1's engine is unknown


def test_the_command_ends_with_one_line_on_bad_input(tmp_path: Path) -> None:
    """Exit code 2 and no traceback where a file is absent."""
    command = [sys.executable, "-m", "bench.plan_choice", "none.csv", "--runs", "none.csv"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=None)
    assert done.returncode == 2
    assert done.stderr == "none.csv: no such file\n"


@needs_shared
def test_simple_rules_score_what_the_data_set_states() -> None:
    """Figures that its authors state: the reading of groups, plans and values is theirs."""
    cases = SHARED / "plan_choice_dev.csv"
    figures = scored(cases, {})
    assert figures["groups"] == 536
    stated = {"fewest_gpus": (49, 0.851), "most_gpus": (23, 0.680), "random": (39, 0.798)}
    for name, (within, share) in stated.items():
        rule = figures["rules"][name]
        assert round(100 * rule["within_3pct"]) == within
        assert rule["mean_share"] == pytest.approx(share, abs=5e-4)
    same = figures["same_gpus"]
    assert (same["n"], same["one_date"]["n"]) == (61, 12)
    assert {k: round(100 * v) for k, v in same["rules"].items()} == {"pure_tp": 47, "random": 52}
    one_date = {k: round(100 * v) for k, v in same["one_date"]["rules"].items()}
    assert one_date == {"pure_tp": 79, "random": 40}


@needs_shared
def test_every_plan_of_the_data_set_joins_its_runs() -> None:
    """All 536 groups; each TPOT-limited plan has one run per load."""
    index = RunIndex(read_runs(SHARED / "runs_dev.csv"))
    for one in read_groups(SHARED / "plan_choice_dev.csv"):
        assert one.limit is None or one.limit[1] > 0
        for candidate in one.candidates:
            loads = [run.settings["load"] for run in index.runs_of(one, candidate)]
            assert loads, (one.group_id, candidate.plan)
            if one.group_type == "tpot_slo_best_throughput":
                assert len(set(loads)) == len(loads)


@needs_shared
def test_measured_metrics_in_place_of_predicted_ones_choose_the_best() -> None:
    """A predictor that knew every measurement would choose the best plan of every group.

    So the values of the cases file follow from the runs that join, by the objective as it is read.
    Here only the test reads metrics: it looks them up by run.
    """
    cases = SHARED / "plan_choice_dev.csv"
    figures = report(choose_all(cases, SHARED / "runs_dev.csv", Oracle()), cases)
    assert (figures["covered"], figures["within_3pct"], figures["mean_share"]) == (536, 1.0, 1.0)
    assert figures["same_gpus"]["within_3pct"] == 1.0
    assert "all groups" in table(rounded(figures))


class Oracle:
    """Predicts what was measured, by run."""

    def __init__(self) -> None:
        with (SHARED / "runs_dev.csv").open(newline="", encoding="utf-8") as file:
            self._rows = {row["run_id"]: row for row in csv.DictReader(file)}

    def predict(self, run_row: dict[str, str]) -> Prediction:
        """Predict one run."""
        row = self._rows[run_row["run_id"]]
        names = ("ttft_ms", "tpot_ms", "itl_median_ms", "e2e_ms")
        rates = ("output_tok_per_s", "total_tok_per_s")
        return Prediction({n: float(row[n]) for n in (*names, *rates) if row[n]})


def test_bootstrap_draws_whole_clusters() -> None:
    """One cluster tells nothing of others; many small ones tell more than two large ones."""
    one = bootstrap([("a", 1.0), ("a", 0.5)])
    assert one == {"low": 0.5, "high": 0.5}
    two = bootstrap([("a", 1.0)] * 20 + [("b", 0.5)] * 20)
    assert two == {"low": 0.0, "high": 1.0}
    many = bootstrap([(str(i), 1.0 if i % 2 else 0.5) for i in range(40)])
    # Of 40 fair coins 90 % lie within 20 +- 5.2 heads (binomial).
    assert many["low"] == pytest.approx(0.375, abs=0.03)
    assert many["high"] == pytest.approx(0.625, abs=0.03)
    assert bootstrap([]) == {"low": 0.0, "high": 0.0}
