"""``planner init`` and ``planner schema``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from planner.resolve import resolve
from planner.scenario import Scenario
from tests.command import one_line_error
from tests.problems import LLAMA_8B, OBJECTIVES

if TYPE_CHECKING:
    from pathlib import Path

    from tests.command import Cli

FACTS = ("--model", LLAMA_8B, "--device", "H100-SXM-80GB")


def test_init_writes_what_can_be_planned(cli: Cli, tmp_path: Path) -> None:
    """Every section is there, commented, and the problem behind it resolves."""
    file = tmp_path / "first.yaml"
    code, out, err = cli("init", *FACTS, "--ttft-ms", "2000", "--tpot-ms", "50", "-o", str(file))
    assert (code, out, err) == (0, "", "")
    text = file.read_text()
    assert sum(line.startswith("#") for line in text.splitlines()) >= 6
    problem = resolve(Scenario.load(file))
    assert [c.name for c in problem.constraints] == ["slo.ttft_ms.p99", "slo.tpot_ms.p99"]
    assert problem.workload.num_requests == 2000
    assert problem.pool.num_devices == 8


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_init_of_every_objective(cli: Cli, objective: str) -> None:
    """The sense follows from the quantity."""
    code, out, _ = cli("init", *FACTS, "--objective", objective)
    assert code == 0
    assert Scenario.model_validate(yaml.safe_load(out)).objective.name == objective


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_init_names_the_newest_version(cli: Cli, engine: str) -> None:
    """Of each engine, the last that is listed."""
    listed = json.loads(cli("list", "engines", "--json", "-")[1])["engines"]
    newest = [row["version"] for row in listed if row["engine"] == engine][-1]
    _, out, _ = cli("init", *FACTS, "--engine", engine)
    assert yaml.safe_load(out)["engine"] == {"name": engine, "version": newest}


def test_init_over_a_trace(cli: Cli, tmp_path: Path) -> None:
    """A trace beside the scenario takes the place of drawn lengths, whatever it is called."""
    name = "it's [a] trace: 1.csv"
    (tmp_path / name).write_text("arrival_s,prompt_tokens,output_tokens\n0,100,20\n1,50,10\n")
    file = tmp_path / "s.yaml"
    code, _, err = cli("init", *FACTS, "--trace", name, "--request-rate", "0.5", "-o", str(file))
    assert (code, err) == (0, "")
    assert Scenario.load(file).workload.trace == name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--model", "x"), "model.config: 'x' is not in the model catalogue"),
        (("--device", "H100"), "cluster.pools.0.device: 'H100' is not known"),
        (("--engine", "tgi"), "--engine: 'tgi' must be one of: sglang, trtllm, vllm"),
        (("--engine-version", "9"), "engine.version: '9'"),
        (("--objective", "speed"), "objective.minimize: 'speed' must be mean_ or a percentile"),
        (("--request-rate", "-1"), "workload.request_rate: -1 must be greater than 0"),
        (("--trace", "no.csv"), "no.csv"),
        (("--nodes", "0"), "Invalid value for '--nodes'"),
    ],
)
def test_init_refuses(cli: Cli, tmp_path: Path, changed: tuple[str, str], message: str) -> None:
    """A bad fact: one line, code 2, and no file."""
    file = tmp_path / "s.yaml"
    code, out, err = cli("init", *FACTS, *changed, "-o", str(file))
    assert (code, out) == (2, "")
    assert message in one_line_error(err)
    assert not file.exists()


def test_init_keeps_a_file_that_is_there(cli: Cli, tmp_path: Path) -> None:
    """A scenario may have been edited."""
    file = tmp_path / "s.yaml"
    file.write_text("mine")
    code, _, err = cli("init", *FACTS, "-o", str(file))
    assert code == 2
    assert "exists already" in one_line_error(err)
    assert file.read_text() == "mine"


def test_schema(cli: Cli) -> None:
    """Closed to unknown fields, every field with its description, the sections all there."""
    code, out, _ = cli("schema")
    schema = json.loads(out)
    assert code == 0
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["properties"]) == set(Scenario.model_fields)
    for part in (schema, *schema["$defs"].values()):
        if part.get("type") == "object" and "properties" in part:
            assert part["additionalProperties"] is False
    fields = schema["$defs"]["EngineSpec"]["properties"]
    assert all("description" in field for field in fields.values())


def test_schema_describes_the_bundled_scenario(cli: Cli) -> None:
    """Each key of the shipped scenario is a property where the schema has it."""
    schema = json.loads(cli("schema")[1])
    scenario = Scenario.load("llama-3.1-70b_8xh100").model_dump(exclude_unset=True)
    for section, content in scenario.items():
        known = schema["properties"][section]
        for option in known.get("anyOf", [known]):
            name = option.get("$ref", "").rpartition("/")[2]
            if name:
                fields: dict[str, Any] = schema["$defs"][name]["properties"]
                assert set(content) <= set(fields)
