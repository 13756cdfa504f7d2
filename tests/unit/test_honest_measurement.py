"""Honest measurement: choices and kernel tables see no measured serving run."""

from __future__ import annotations

import ast
import csv
import json
import random
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench.choice_predict import Prediction, SimulatedRuns
from bench.plan_choice import choose_all

if TYPE_CHECKING:
    from bench.choice_groups import Row

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data" / "truth"

METRICS = (
    *("ttft_ms", "ttft_p99_ms", "tpot_ms", "itl_median_ms", "itl_p99_ms", "e2e_ms", "power_w"),
    *("output_tok_per_s", "total_tok_per_s", "input_tok_per_s", "queries_per_s", "avg_batch"),
)
"""Columns of a runs file that were measured."""


class ReadsEverything:
    """Predicts from a checksum of all that it is given, so that anything that leaks shows."""

    def predict(self, run_row: Row) -> Prediction:
        """Predict one run."""
        text = json.dumps({k: v for k, v in run_row.items() if k != "run_id"}, sort_keys=True)
        names = ("ttft_ms", "tpot_ms", "itl_median_ms", "e2e_ms")
        names += ("output_tok_per_s", "total_tok_per_s")
        rates = {name: 1.0 + zlib.crc32(f"{name}{text}".encode()) % 997 for name in names}
        rates["tpot_ms"] /= 10.0  # between 0.1 and 100 ms: limits of 8 to 100 ms cut somewhere
        return Prediction(rates)


def made_up() -> tuple[list[Row], list[Row]]:
    """Cases and runs of forty groups with random values."""
    rng = random.Random(5)
    plans = {"tp1": 1, "tp2": 2, "tp4": 4, "tp4ep4": 4}
    cases, runs = [], []
    for i in range(40):
        identity = {
            "model": f"model-{i % 7}",
            "hardware": "H",
            "engine": "e",
            "quantization": "fp8",
            "isl": str(100 + i),
            "osl": "50",
            "source": "lab",
        }
        for plan, n_gpus in plans.items():
            kind = ("tpot_slo_best_throughput", "TPOT<=30ms", "derived output tok/s/GPU")
            if i % 3 == 0:
                kind = ("same_load_per_gpu_throughput", "offline_max=inf", "throughput per GPU")
            cases.append(
                {
                    **identity,
                    "group_id": f"g{i:03}",
                    **dict(zip(("group_type", "load_or_slo", "objective"), kind, strict=True)),
                    "plan": plan,
                    "n_gpus": str(n_gpus),
                    "value": str(rng.uniform(1, 100)),
                    "rank": str(rng.randint(1, 4)),
                }
            )
            for load in ("4", "16", "64"):
                measured = {name: str(rng.uniform(1, 100)) for name in METRICS}
                ep = "4" if "ep" in plan else "1"
                runs.append(
                    {
                        **identity,
                        "run_id": f"{i}-{plan}-{load}",
                        "tp": str(n_gpus),
                        "ep": ep,
                        "load": load,
                        **measured,
                    }
                )
    return cases, runs


def dev_files() -> tuple[list[Row], list[Row]]:
    """The development half of the measured groups and runs."""
    if not SHARED.is_dir():
        pytest.skip(f"measured runs are not beside the project ({SHARED})")
    return rows_of(SHARED / "plan_choice_dev.csv"), rows_of(SHARED / "runs_dev.csv")


def rows_of(path: Path) -> list[Row]:
    """Rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def ranked(folder: Path, cases: list[Row], runs: list[Row], predictor: Any = None) -> list[Any]:
    """Every group's plans in the order of choice, or why it is uncovered."""
    paths = []
    for name, rows in (("cases.csv", cases), ("runs.csv", runs)):
        path = folder / name
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        paths.append(path)
    answers = choose_all(*paths, predictor or ReadsEverything())
    return [
        (c.group.group_id, [s.candidate.plan for s in c.standings], c.why_uncovered)
        for c in (*answers.groups, *answers.same_gpus)
    ]


def shuffled(rows: list[Row], columns: tuple[str, ...], rng: random.Random) -> list[Row]:
    """Rows whose entries of some columns are dealt out anew."""
    out = [dict(row) for row in rows]
    for column in columns:
        dealt = [row[column] for row in rows if column in row]
        rng.shuffle(dealt)
        for row, value in zip(out, dealt, strict=False):
            row[column] = value
    return out


def without(rows: list[Row], columns: tuple[str, ...]) -> list[Row]:
    """Rows that lack some columns."""
    return [{k: v for k, v in row.items() if k not in columns} for row in rows]


@pytest.mark.parametrize("files", [made_up, dev_files], ids=["made up", "development"])
def test_choices_do_not_depend_on_what_was_measured(files: Any, tmp_path: Path) -> None:
    """Permuted rows, shuffled ranks and values, and runs without metrics choose the same plans."""
    cases, runs = files()
    rng = random.Random(7)
    expected = ranked(tmp_path, cases, runs)
    assert len({tuple(plans) for _, plans, _ in expected}) > 5  # the plans do differ in rank
    permuted = rng.sample(cases, len(cases)), rng.sample(runs, len(runs))
    assert ranked(tmp_path, *permuted) == expected
    dealt = shuffled(cases, ("value", "rank"), rng)
    assert dealt != cases
    assert ranked(tmp_path, dealt, runs) == expected
    assert ranked(tmp_path, without(cases, ("value", "rank", "unit")), runs) == expected
    assert ranked(tmp_path, cases, shuffled(runs, METRICS, rng)) == expected
    assert ranked(tmp_path, cases, without(runs, METRICS)) == expected


def test_a_changed_setting_does_change_choices(tmp_path: Path) -> None:
    """The check above can fail: what is read, a checksum notices."""
    cases, runs = made_up()
    other = [{**row, "source": "lab", "arrival": "all_at_once"} for row in runs]
    assert ranked(tmp_path, cases, other) != ranked(tmp_path, cases, runs)


def test_simulated_choices_do_not_depend_on_what_was_measured(tmp_path: Path) -> None:
    """The same with the planner's own predictions, for one model on two plans."""
    identity = {
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "hardware": "H100-SXM-80GB",
        "engine": "vllm",
        "engine_version": "0.10.2",
        "quantization": "bf16",
        "isl": "64",
        "osl": "8",
        "source": "lab",
    }
    group = {
        **identity,
        "group_id": "g1",
        "group_type": "tpot_slo_best_throughput",
        "load_or_slo": "TPOT<=50ms",
        "objective": "derived output tok/s/GPU",
        "mixed_date": "no",
    }
    run = {
        **identity,
        "arrival": "closed_loop_burst",
        "num_prompts": "8",
        "load": "2",
        "kv_cache_dtype": "bf16",
        "weight_dtype": "bf16",
        "max_num_seqs": "4",
        "max_num_batched_tokens": "256",
        "max_model_len": "128",
        "memory_fraction": "0.9",
        **{
            f"{side}_len_{end}": length
            for side, length in (("input", "64"), ("output", "8"))
            for end in ("min", "max")
        },
        **dict.fromkeys(METRICS, "5"),
    }
    cases = [
        {**group, "plan": f"tp{tp}", "n_gpus": str(tp), "value": str(tp), "rank": "1"}
        for tp in (1, 2)
    ]
    runs = [{**run, "run_id": f"r{tp}", "tp": str(tp)} for tp in (1, 2)]
    expected = ranked(tmp_path, cases, runs, SimulatedRuns("none"))
    assert expected == [("g1", ["tp1", "tp2"], "")]
    assert (
        ranked(tmp_path, cases[::-1], without(runs[::-1], METRICS), SimulatedRuns("none"))
        == expected
    )


def test_only_the_opener_of_allowed_tables_reads_files_of_the_package() -> None:
    """``profiles.distil`` reads bytes in one function, ``open_table``, which has the allow-list.

    ``tests/unit/test_distil.py`` shows that it refuses the measured serving samples before
    touching them, and by audit hook that a whole run opens nothing else.
    """
    readers = ("open", "read_bytes", "read_text", "read_table", "read_parquet", "ParquetFile")
    readers += ("read_csv", "load", "genfromtxt", "loadtxt", "fromfile", "memmap", "reader")
    found = set()
    for path in sorted((ROOT / "profiles" / "distil").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.Call):
                        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                        if name in readers:
                            found.add((path.name, function.name, name))
    assert {(file, function) for file, function, _ in found} == {("systems.py", "open_table")}
