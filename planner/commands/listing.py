"""``planner list``."""

from __future__ import annotations

from typing import Annotated

import typer

from planner.commands.options import JsonOption, stdout_console
from planner.errors import NO_VALUE, InputError
from planner.io.output import STDOUT, check_target, deliver


def list_names(
    kind: Annotated[
        str, typer.Argument(help="devices, models, engines, kernels or interconnects.")
    ],
    json: JsonOption = None,
) -> None:
    """List what a scenario may name."""
    from planner.listing import KINDS
    from planner.render import render_list
    from planner.report import dump_json

    check_target(json)
    if kind not in KINDS:
        rule = f"must be one of: {', '.join(KINDS)}"
        raise InputError(source="list", field=kind, value=NO_VALUE, rule=rule)
    rows = KINDS[kind]()
    deliver(dump_json({kind: rows}), json)
    if json != STDOUT:
        render_list(rows, stdout_console())
