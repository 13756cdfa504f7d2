"""Arguments and exit codes that several commands share."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Final, Optional

import typer

if TYPE_CHECKING:
    from rich.console import Console

INFEASIBLE_EXIT: Final = 3
DIFFERENT_EXIT: Final = 5
"""``check`` found a difference."""

ScenarioArgument = Annotated[
    str, typer.Argument(help="Scenario file, or the name of a bundled scenario.")
]
ScenariosArgument = Annotated[
    list[str],
    typer.Argument(metavar="SCENARIO...", help="Scenario files, or names of bundled scenarios."),
]
# typer reads these annotations at run time, where Python 3.10 needs the long spelling.
JsonOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--json", metavar="PATH|-", help="Write the report as JSON; - for stdout."),
]


def stdout_console() -> Console:
    """Where a command draws its answer."""
    from planner.render import console

    return console(sys.stdout)
