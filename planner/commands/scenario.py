"""``planner init`` and ``planner schema``: writing a scenario."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from planner.errors import NO_VALUE, InputError
from planner.io.output import STDOUT, check_target, deliver

_OUTPUT = "--output"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"

OutputOption = Annotated[
    str, typer.Option(_OUTPUT, "-o", metavar="PATH|-", help="Where to write it.")
]


def schema(output: OutputOption = STDOUT) -> None:
    """Write the JSON Schema of scenarios, by which editors complete and check them."""
    from planner.report import dump_json
    from planner.scenario import Scenario

    check_target(output, _OUTPUT)
    document = {"$schema": _DIALECT, **Scenario.model_json_schema()}
    deliver(dump_json(document), output, _OUTPUT)


def init(
    model: Annotated[str, typer.Option(help="Name of the catalogue, or a config.json.")],
    device: Annotated[str, typer.Option(help="Name of the catalogue.")],
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    devices_per_node: Annotated[int, typer.Option(min=1, help="Devices of each.")] = 8,
    engine: Annotated[str, typer.Option(help="vllm, sglang or trtllm.")] = "vllm",
    engine_version: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Left out, the newest that ships."),
    ] = None,
    trace: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE", help="Requests; left out, they are drawn."),
    ] = None,
    request_rate: Annotated[float, typer.Option(help="Requests per second.")] = 4.0,
    input_tokens: Annotated[int, typer.Option(min=1, help="Mean prompt, drawn.")] = 1024,
    output_tokens: Annotated[int, typer.Option(min=1, help="Mean output, drawn.")] = 256,
    num_requests: Annotated[int, typer.Option(min=1, help="How many are drawn.")] = 2000,
    ttft_ms: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="p99 of the time to first token to keep."),
    ] = None,
    tpot_ms: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="p99 of the time per output token to keep."),
    ] = None,
    objective: Annotated[str, typer.Option(help="mean_e2e, devices, throughput ...")] = "mean_e2e",
    output: OutputOption = STDOUT,
) -> None:
    """Write a commented scenario that solves as it stands."""
    from planner.init import Facts, first_scenario

    check_target(output, _OUTPUT)
    target = Path() if output == STDOUT else Path(output).parent
    if output != STDOUT and Path(output).is_file():
        rule = "exists already: remove it first, or write elsewhere"
        raise InputError(source=f"{_OUTPUT} {output}", field="", value=NO_VALUE, rule=rule)
    facts = Facts(
        model=model,
        device=device,
        nodes=nodes,
        devices_per_node=devices_per_node,
        engine=engine,
        version=engine_version,
        trace=trace,
        request_rate=request_rate,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        num_requests=num_requests,
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        objective=objective,
    )
    deliver(first_scenario(facts, target), output, _OUTPUT)
