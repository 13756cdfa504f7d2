"""``planner lock`` and ``planner check``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from planner.commands.options import DIFFERENT_EXIT, JsonOption, ScenariosArgument
from planner.errors import InputError
from planner.io.output import STDOUT, check_target, deliver

if TYPE_CHECKING:
    from planner.scenario import Scenario

_JUNIT = "--junit"
_MARKDOWN = "--markdown"


def lock(scenarios: ScenariosArgument) -> None:
    """Write the answer of each scenario beside it, for planner check to compare with."""
    from planner.lock import lock as lock_scenario
    from planner.lock import lock_path, write_lock

    loaded = _load(scenarios)
    for scenario in loaded:
        check_target(str(lock_path(scenario)), "lock")
    # All are solved before any file is written: a bad scenario leaves every lock as it was.
    locks = [lock_scenario(scenario).lock for scenario in loaded]
    for scenario, locked in zip(loaded, locks, strict=True):
        write_lock(scenario, locked)
        answer = locked.answer
        sys.stdout.write(f"{scenario.source}: locked {answer.plan or answer.status}\n")


def check(
    scenarios: ScenariosArgument,
    json: JsonOption = None,
    junit: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(_JUNIT, metavar="FILE", help="Write the results as JUnit XML."),
    ] = None,
    markdown: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(_MARKDOWN, metavar="FILE", help="Write the results as Markdown."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(metavar="SHARE", min=0, help="Relative change of a metric to let pass.")
    ] = 0.01,
    allow_changed_inputs: Annotated[
        bool,
        typer.Option(
            "--allow-changed-inputs", help="Pass where inputs changed but plan and metrics hold."
        ),
    ] = False,
) -> None:
    """Solve each scenario again and compare with its lock; exit code 5 on a difference."""
    from planner import check_formats
    from planner.check import check as check_scenario
    from planner.lock import read_lock
    from planner.report import dump_json

    if not tolerance >= 0:  # older versions of typer let nan pass
        rule = "must be a share of at least 0"
        raise InputError(source="--tolerance", field="", value=tolerance, rule=rule)
    check_target(json)
    for target, option in ((junit, _JUNIT), (markdown, _MARKDOWN)):
        check_target(target, option)
    loaded = _load(scenarios)
    for scenario in loaded:
        read_lock(scenario)  # a missing one is reported before anything is solved
    results = []
    for scenario in loaded:
        result = check_scenario(
            scenario, tolerance=tolerance, inputs_count=not allow_changed_inputs
        )
        results.append(result)
        if json != STDOUT:
            sys.stdout.write("\n".join(result.lines()) + "\n")
            sys.stdout.flush()
    passed = all(result.passed for result in results)
    deliver(dump_json({"passed": passed, "checks": [r.to_dict() for r in results]}), json)
    deliver(check_formats.junit(results), junit, _JUNIT)
    deliver(check_formats.markdown(results), markdown, _MARKDOWN)
    if not passed:
        raise typer.Exit(DIFFERENT_EXIT)


def _load(names: list[str]) -> list[Scenario]:
    from planner.scenario import Scenario

    return [Scenario.load(name) for name in names]
