"""``planner compare`` and ``planner explain``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from planner.commands.options import JsonOption, ScenarioArgument, stdout_console
from planner.io.output import STDOUT, check_target, deliver


def compare(
    first: Annotated[str, typer.Argument(help="A report's JSON file; with --scenario, a plan.")],
    second: Annotated[str, typer.Argument(help="The other one.")],
    scenario: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--scenario", metavar="S", help="Scenario whose plans are compared."),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Hold two plans of a scenario, or the plans of two reports, side by side."""
    from planner.compare import compare_plans, compare_reports
    from planner.render_compare import render_comparison
    from planner.report import dump_json
    from planner.scenario import Scenario

    check_target(json)
    comparison = (
        compare_reports(first, second)
        if scenario is None
        else compare_plans(Scenario.load(scenario), first, second)
    )
    deliver(dump_json(comparison.to_dict()), json)
    if json != STDOUT:
        render_comparison(comparison, stdout_console())


def explain(
    scenario: ScenarioArgument,
    plan: Annotated[str, typer.Option("--plan", help="Plan text, for example 2xtp4.")],
    json: JsonOption = None,
) -> None:
    """Say why a plan is not the best: value or bound, time by operator, limits that bind."""
    from planner.explain import explain as explain_plan
    from planner.render_compare import render_explanation
    from planner.report import dump_json
    from planner.scenario import Scenario

    check_target(json)
    explanation = explain_plan(Scenario.load(scenario), plan)
    deliver(dump_json(explanation.to_dict()), json)
    if json != STDOUT:
        render_explanation(explanation, stdout_console())
