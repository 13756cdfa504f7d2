"""The command line: arguments in, reports out, exit codes as in :mod:`planner.errors`."""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, Final

import typer

from planner import __version__
from planner.commands.calibrate import calibrate
from planner.commands.compare import compare, explain
from planner.commands.crossovers import crossovers
from planner.commands.export import export
from planner.commands.listing import list_names
from planner.commands.lock import check, lock
from planner.commands.scenario import init, schema
from planner.commands.simulate import simulate
from planner.commands.solve import solve
from planner.commands.verify import verify
from planner.errors import PlannerError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_COMMANDS: Final[Mapping[str, Callable[..., None]]] = {
    "solve": solve,
    "simulate": simulate,
    "verify": verify,
    "lock": lock,
    "check": check,
    "calibrate": calibrate,
    "explain": explain,
    "compare": compare,
    "crossovers": crossovers,
    "export": export,
    "list": list_names,
    "init": init,
    "schema": schema,
}
"""Every command, in the order in which the help shows them: register a new one here."""

_BUG_EXIT: Final = 1
_LIMIT_EXIT: Final = 4
_INTERRUPTED: Final = 130
"""What typer turns Ctrl-C into: 128 + SIGINT."""

app = typer.Typer(
    name="planner",
    help="Name the parallel plan to deploy for an LLM serving scenario, and prove it.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(value: bool) -> None:
    if value:
        sys.stdout.write(f"planner {__version__}\n")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options of every command."""


for _name, _command in _COMMANDS.items():
    app.command(name=_name)(_command)


def main() -> None:
    """Run the command line and end the process with the documented code."""
    try:
        code = app(standalone_mode=False)  # an Exit comes back as its code
    except PlannerError as error:
        sys.stderr.write(f"planner: error: {error}\n")
        code = error.exit_code
    except typer.Exit as stop:
        code = stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except Exception as error:  # the last resort: a bug must not end in a traceback
        code = _report_other(error)
    if code == _INTERRUPTED:
        sys.stderr.write("planner: interrupted before any plan was found\n")
        code = _LIMIT_EXIT
    sys.exit(code)


def _report_other(error: Exception) -> int:
    """Exit code of a usage error, which carries its own, or of a bug of ours."""
    code = getattr(error, "exit_code", None)
    message = getattr(error, "format_message", None)
    if isinstance(code, int) and callable(message):
        text = message()
        if text:  # without any argument the help is the whole message
            sys.stderr.write(f"planner: error: {' '.join(text.split())}\n")
        return code
    if os.environ.get("PLANNER_DEBUG"):
        traceback.print_exc()
    sys.stderr.write(
        f"planner: bug: {type(error).__name__}: {' '.join(str(error).split())}"
        " (set PLANNER_DEBUG=1 for the traceback)\n"
    )
    return _BUG_EXIT


if __name__ == "__main__":
    main()
