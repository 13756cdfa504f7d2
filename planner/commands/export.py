"""``planner export``."""

from __future__ import annotations

import sys
from typing import Annotated, Optional

import typer

from planner.commands.options import INFEASIBLE_EXIT, ScenarioArgument
from planner.errors import NO_VALUE, InputError
from planner.io.output import STDOUT, check_target, deliver

_OUTPUT = "--output"


def export(
    scenario: ScenarioArgument,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="vllm, sglang or trtllm (the engine's commands), docker-compose, lws, kserve or "
            "dynamo.",
        ),
    ],
    plan: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--plan", help="Plan text; left out, the scenario is solved."),
    ] = None,
    image: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="Container image in place of the engine's own."),
    ] = None,
    output: Annotated[
        str, typer.Option(_OUTPUT, "-o", metavar="PATH|-", help="Where to write it.")
    ] = STDOUT,
) -> None:
    """Write what launches a plan: the engine's commands, or a manifest."""
    from planner.api import solve
    from planner.export import FORMATS, export_plan
    from planner.scenario import Scenario

    if form not in FORMATS:
        rule = f"must be one of: {', '.join(FORMATS)}"
        raise InputError(source="--format", field="", value=form or NO_VALUE, rule=rule)
    check_target(output, _OUTPUT)
    loaded = Scenario.load(scenario)
    if plan is None:
        report = solve(loaded)
        if report.plan is None:
            reason = report.infeasible["reason"] if report.infeasible else report.status
            sys.stderr.write(f"planner: infeasible: {reason}\n")
            raise typer.Exit(INFEASIBLE_EXIT)
        plan = report.plan.id
    deliver(export_plan(loaded, plan, form, image=image), output, _OUTPUT)
