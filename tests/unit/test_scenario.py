"""Reading of scenarios that are right; the wrong ones are in tests/golden/test_bad_inputs.py."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from planner.errors import (
    InfeasibleError,
    InputError,
    LimitError,
    PlannerError,
    RefusalError,
    nearest,
    short_repr,
)
from planner.io.yaml_file import read_mapping
from planner.scenario import Scenario

LENGTHS: dict[str, Any] = {
    "input_tokens": 512,
    "output_tokens": {"min": 1, "max": 9},
    "num_requests": 100,
}


@pytest.fixture
def fields() -> dict[str, Any]:
    """The least that a scenario must say."""
    return {
        "schema_version": 1,
        "model": {"config": "Qwen/Qwen3-8B"},
        "cluster": {"pools": [{"device": "L4", "nodes": 2, "devices_per_node": 4}]},
        "engine": {"name": "vllm", "version": "0.24.0"},
        "workload": {"trace": "chat.csv"},
        "objective": {"minimize": "p99_ttft"},
    }


def test_defaults(fields: dict[str, Any]) -> None:
    """What a scenario leaves out takes the documented defaults."""
    scenario = Scenario.model_validate(fields)
    assert scenario.model.weight_dtype is None
    assert scenario.model.kv_cache_dtype == "auto"
    assert scenario.cluster.pools[0].num_devices == 8
    assert (scenario.slo, scenario.goodput) == (None, None)
    assert scenario.search.time_limit_s == 60.0
    assert (scenario.search.work_limit, scenario.search.seed) == (None, 0)
    assert scenario.search.space.tp is None
    assert scenario.search.space.max_num_seqs == (16, 32, 64, 128, 256, 512, 1024)
    assert scenario.search.space.max_num_batched_tokens == (512, 1024, 2048, 4096, 8192, 16384)


@pytest.mark.parametrize(
    ("workload", "mode"),
    [
        ({"trace": "x.csv"}, "trace"),
        ({"trace": "x.csv", "request_rate": 4, "num_requests": 10}, "trace"),
        ({"trace": "x.csv", "arrival": "poisson", "request_rate": 4.0}, "poisson"),
        ({"trace": "x.csv", "arrival": "all_at_once"}, "all_at_once"),
        ({"trace": "x.csv", "concurrency": 16}, "closed_loop"),
        ({**LENGTHS, "arrival": "poisson", "request_rate": 4.0}, "poisson"),
        ({**LENGTHS, "concurrency": 16}, "closed_loop"),
        ({**LENGTHS, "arrival": "all_at_once"}, "all_at_once"),
    ],
)
def test_arrival_modes(fields: dict[str, Any], workload: dict[str, Any], mode: str) -> None:
    """Each combination of workload fields that the contract lists has one meaning."""
    scenario = Scenario.model_validate({**fields, "workload": workload})
    assert scenario.workload.arrival_mode == mode


@pytest.mark.parametrize(
    "workload",
    [
        {**LENGTHS, "request_rate": 4.0},
        {**LENGTHS, "concurrency": 4, "arrival": "poisson"},
        {**LENGTHS, "arrival": "all_at_once", "request_rate": 4.0},
        {"input_tokens": 5, "num_requests": 5, "concurrency": 1},
        {"input_tokens": 5, "output_tokens": 5, "concurrency": 1},
        {"request_rate": 4.0},
        {"trace": "x.csv", "num_requests": 10**9},
        {"trace": "x.csv", "request_rate": 1e-9},
    ],
)
def test_contradictory_workloads(fields: dict[str, Any], workload: dict[str, Any]) -> None:
    """A workload that says too little or too much is refused, and the message names it."""
    with pytest.raises(InputError, match=r"<scenario>: workload") as caught:
        Scenario.model_validate({**fields, "workload": workload})
    assert caught.value.more == 0


def test_a_plain_length_is_a_range_of_one(fields: dict[str, Any]) -> None:
    """``input_tokens: 512`` and ``{min: 512, max: 512}`` are the same scenario."""
    workload = {**LENGTHS, "concurrency": 1}
    plain = Scenario.model_validate({**fields, "workload": workload})
    workload["input_tokens"] = {"min": 512, "max": 512}
    assert Scenario.model_validate({**fields, "workload": workload}) == plain
    assert plain.workload.input_tokens is not None
    assert plain.workload.input_tokens.max == 512


def test_space_is_sorted(fields: dict[str, Any]) -> None:
    """The order in which values are written does not change the scenario."""
    fields["search"] = {"space": {"tp": [8, 1, 4]}}
    assert Scenario.model_validate(fields).search.space.tp == (1, 4, 8)


def test_slo_items(fields: dict[str, Any]) -> None:
    """Limits are listed in the order mean, p50, ..., p99, and only those that are set."""
    fields["slo"] = {"ttft_ms": {"p99": 2000, "mean": 500.5}}
    slo = Scenario.model_validate(fields).slo
    assert slo is not None
    assert slo.ttft_ms is not None
    assert slo.ttft_ms.items() == (("mean", 500.5), ("p99", 2000.0))


@pytest.mark.parametrize(
    ("objective", "name", "is_maximized"),
    [({"minimize": "devices"}, "devices", False), ({"maximize": "throughput"}, "throughput", True)],
)
def test_objective(
    fields: dict[str, Any], objective: dict[str, str], name: str, is_maximized: bool
) -> None:
    """An objective has one name and one direction."""
    parsed = Scenario.model_validate({**fields, "objective": objective}).objective
    assert (parsed.name, parsed.is_maximized) == (name, is_maximized)


def test_pinned_setting_excludes_its_list(fields: dict[str, Any]) -> None:
    """A pin and a list for the same setting contradict each other; a pin alone is fine."""
    fields["engine"]["max_num_seqs"] = 64
    assert Scenario.model_validate(fields).engine.max_num_seqs == 64
    fields["search"] = {"space": {"max_num_seqs": [32, 64]}}
    with pytest.raises(InputError) as caught:
        Scenario.model_validate(fields, source="s.yaml")
    assert str(caught.value) == (
        "s.yaml: search.space.max_num_seqs: is pinned by engine.max_num_seqs (64): "
        "keep one of the two"
    )


@pytest.mark.parametrize("version", [True, 1.0, "1", 0, None])
def test_schema_version_is_the_integer_one(fields: dict[str, Any], version: object) -> None:
    """Only the integer 1 passes, though True and 1.0 compare equal to it."""
    fields["schema_version"] = version
    with pytest.raises(InputError, match="schema_version"):
        Scenario.model_validate(fields)


def test_constructor_raises_input_error(fields: dict[str, Any]) -> None:
    """The constructor, like every other way in, never lets pydantic's own error out."""
    fields["model"] = {}
    with pytest.raises(InputError, match=r"<scenario>: model\.config: required field is missing"):
        Scenario(**fields)


def test_scenario_is_frozen_and_survives_pickling(fields: dict[str, Any]) -> None:
    """A scenario cannot change, and reaches a worker process with its folder."""
    scenario = Scenario.model_validate(fields, base_dir="folder", source="s.yaml")
    with pytest.raises(ValidationError):
        scenario.schema_version = 1  # type: ignore[misc]
    copied = pickle.loads(pickle.dumps(scenario))
    assert copied == scenario
    assert (copied.base_dir, copied.source) == (Path("folder"), "s.yaml")


def test_validating_an_instance_leaves_it_alone(fields: dict[str, Any]) -> None:
    """A scenario given a second folder is a copy: the first one may be shared."""
    first = Scenario.model_validate(fields, base_dir="a")
    second = Scenario.model_validate(first, base_dir="b")
    assert (first.base_dir, second.base_dir) == (Path("a"), Path("b"))
    assert second.model_dump() == first.model_dump()


def test_input_mapping_is_not_changed(fields: dict[str, Any]) -> None:
    """Validation does not write into the caller's mapping."""
    before = copy.deepcopy(fields)
    Scenario.model_validate(fields)
    assert fields == before


def test_paths_resolve_beside_the_scenario_first(fields: dict[str, Any], tmp_path: Path) -> None:
    """A file beside the scenario hides a bundled one of the same name."""
    name = "traces/azure_conv_2023_2000.csv"
    scenario = Scenario.model_validate(fields, base_dir=tmp_path)
    bundled = scenario.find(name)
    assert bundled.is_file()
    assert tmp_path not in bundled.parents
    (tmp_path / "traces").mkdir()
    (tmp_path / name).touch()
    assert scenario.find(name) == tmp_path / name
    assert scenario.find("nope.csv") == tmp_path / "nope.csv"


def test_load_keeps_the_folder(fields: dict[str, Any], tmp_path: Path) -> None:
    """A scenario read from a file resolves paths against the file's folder."""
    path = tmp_path / "s.yaml"
    path.write_text(str(fields))  # a Python dict of these values is YAML's flow style
    scenario = Scenario.load(path)
    assert scenario.base_dir == tmp_path
    assert scenario == Scenario.model_validate(fields, base_dir=tmp_path, source=str(path))


def test_json_schema_allows_a_plain_length() -> None:
    """The published schema agrees with the parser that a length may be one integer."""
    properties = Scenario.model_json_schema()["$defs"]["WorkloadSpec"]["properties"]
    assert {"type": "integer", "minimum": 1} in properties["input_tokens"]["anyOf"]


def test_yaml_scalars(tmp_path: Path) -> None:
    """Scalars follow YAML 1.2: exponents are numbers; clock times, octals and ``on`` are text."""
    path = tmp_path / "s.yaml"
    path.write_text("{a: 1e3, b: 1:30, c: 010, d: on, e: 1_000, f: -0.5, g: ~, h: true, i: .5}")
    assert read_mapping(path, source="s.yaml") == {
        "a": 1000.0,
        "b": "1:30",
        "c": "010",
        "d": "on",
        "e": "1_000",
        "f": -0.5,
        "g": None,
        "h": True,
        "i": 0.5,
    }


def test_byte_order_mark_is_allowed(tmp_path: Path) -> None:
    """A file saved by an editor that writes a byte-order mark reads the same."""
    path = tmp_path / "s.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_mapping(path, source="s.yaml") == {"a": 1}


def test_exit_codes() -> None:
    """Each error ends a command with the code that the contract gives it."""
    codes = [PlannerError, InputError, RefusalError, InfeasibleError, LimitError]
    assert [error.exit_code for error in codes] == [1, 2, 2, 3, 4]


@pytest.mark.parametrize(
    "error",
    [
        InputError(source="s", field="f", value=[1], rule="must not", more=2),
        InfeasibleError("weights need 140 GiB", "add a device"),
        LimitError("time is up"),
    ],
)
def test_errors_survive_pickling(error: PlannerError) -> None:
    """An error raised in a worker process arrives whole."""
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is type(error)
    assert str(copied) == str(error)
    assert vars(copied) == vars(error)


def test_messages_are_one_line() -> None:
    """Line breaks and control characters in any part of a message become spaces."""
    error = InputError(source="a\nb", field="c\r\nd", value="e\nf", rule="g\x1b[31m\nh")
    assert str(error) == "a b: c d: 'e\\nf' g [31m h"
    assert str(RefusalError("a\n\tb")) == "a b"
    assert str(InfeasibleError("no\nroom", "")) == "no room"


def test_long_and_recursive_values_are_shortened() -> None:
    """A message never repeats more than 80 characters of a value, however it is built."""
    loop: list[object] = []
    loop.append(loop)
    for value in ("x" * 10_000, list(range(10_000)), loop, 10**5000, {"k" * 999: "v" * 999}):
        assert len(short_repr(value)) <= 80


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("rate", "request_rate"),  # a part of the name, though "trace" is spelt closer
        ("trcae", "trace"),
        ("TRACE", "trace"),
        ("zzz", None),
        ("a", None),  # too short to say
    ],
)
def test_nearest(word: str, expected: str | None) -> None:
    """A misspelt word is matched by its parts, then by spelling, or not at all."""
    assert nearest(word, ["trace", "request_rate", "num_requests"]) == expected
