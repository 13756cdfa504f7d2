"""The command line: arguments in, reports out, exit codes as in :mod:`planner.errors`."""

from __future__ import annotations

import os
import sys
import time
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Final, Optional

import typer

from planner import __version__
from planner.errors import PlannerError, RefusalError
from planner.io.output import STDOUT, check_target, deliver

if TYPE_CHECKING:
    from planner.report import PlanReport
    from planner.search import Progress

INFEASIBLE_EXIT: Final = 3
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

ScenarioArgument = Annotated[
    str, typer.Argument(help="Scenario file, or the name of a bundled scenario.")
]
# typer reads these annotations at run time, where Python 3.10 needs the long spelling.
JsonOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--json", metavar="PATH|-", help="Write the report as JSON; - for stdout."),
]


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


@app.command()
def solve(
    scenario: ScenarioArgument,
    json: JsonOption = None,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Also simulate every plan and compare.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
    timings: Annotated[
        bool, typer.Option("--timings", help="Add search.seconds, which differs between runs.")
    ] = False,
) -> None:
    """Find the best plan and prove that no other in the space is better."""
    from planner.api import solve as solve_scenario
    from planner.render import console, render_solve
    from planner.scenario import Scenario

    check_target(json)
    loaded = Scenario.load(scenario)
    progress = None if quiet else _ProgressLine()
    began_s = time.perf_counter()
    try:
        report = solve_scenario(loaded, exhaustive=exhaustive, on_progress=progress)
    finally:
        if progress is not None:
            progress.end()
    if timings:
        seconds = time.perf_counter() - began_s
        report = replace(report, search=replace(report.search, seconds=seconds))
    deliver(report.to_json(), json)
    if json != STDOUT:
        render_solve(report, console(sys.stdout))
    _exit_for(report)


@app.command()
def simulate(
    scenario: ScenarioArgument,
    plan: Annotated[str, typer.Option("--plan", help="Plan text, for example 2xtp4:seqs=256.")],
    json: JsonOption = None,
    requests: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE", help="Write a row per request: CSV, or Parquet by its name."),
    ] = None,
    series: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE", help="Write a row per iteration: CSV or Parquet."),
    ] = None,
    series_rows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", min=1, help="Thin --series to N equal time steps per replica."),
    ] = None,
    timeline: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE", help="Write the iterations for Perfetto; .gz compresses."),
    ] = None,
) -> None:
    """Simulate one plan on the scenario's workload."""
    from planner.api import simulate_requests
    from planner.io import run_files
    from planner.render import console, render_simulation
    from planner.scenario import Scenario

    check_target(json)
    targets = {
        run_files.REQUESTS: requests,
        run_files.SERIES: series,
        run_files.TIMELINE: timeline,
    }
    run_files.check_run_files(targets, json)
    if series_rows is not None and series is None:
        raise RefusalError("--series-rows thins the file of --series, which is not given")
    loaded = Scenario.load(scenario)
    simulation = simulate_requests(
        loaded, plan, record_iterations=series is not None or timeline is not None
    )
    result = simulation.result
    if requests is not None:
        run_files.write_requests(requests, simulation.workload, result)
    if result.log is not None and series is not None:
        run_files.write_series(series, result.log, series_rows)
    if result.log is not None and timeline is not None:
        run_files.write_timeline(timeline, result.log)
    deliver(simulation.report.to_json(), json)
    if json != STDOUT:
        render_simulation(simulation.report, console(sys.stdout))


@app.command(name="list")
def list_names(
    kind: Annotated[str, typer.Argument(help="devices, models, engines or interconnects.")],
    json: JsonOption = None,
) -> None:
    """List what a scenario may name."""
    from planner.errors import NO_VALUE, InputError
    from planner.listing import KINDS
    from planner.render import console, render_list
    from planner.report import dump_json

    check_target(json)
    if kind not in KINDS:
        rule = f"must be one of: {', '.join(KINDS)}"
        raise InputError(source="list", field=kind, value=NO_VALUE, rule=rule)
    rows = KINDS[kind]()
    deliver(dump_json({kind: rows}), json)
    if json != STDOUT:
        render_list(rows, console(sys.stdout))


def _exit_for(report: PlanReport) -> None:
    """End with the code of an infeasible answer, its reason on one line of stderr."""
    if report.infeasible is None:
        return
    reason, relaxation = report.infeasible["reason"], report.infeasible["relaxation"]
    sys.stderr.write(f"planner: infeasible: {reason}; {relaxation}\n")
    raise typer.Exit(INFEASIBLE_EXIT)


class _ProgressLine:
    """Where the search stands: one line that is rewritten, on a terminal only."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._settled = 0

    def __call__(self, progress: Progress) -> None:
        self._settled += 1
        if not self._live:
            return
        best = progress.incumbent
        shape = "none yet" if best is None else f"{best.replicas}xtp{best.tp}"
        sys.stderr.write(
            f"\rsettled {self._settled}, left {progress.plans_left}, best {shape}, "
            f"{progress.iterations:,} iterations \033[K"
        )
        sys.stderr.flush()

    def end(self) -> None:
        """Clear the line."""
        if self._live:
            sys.stderr.write("\r\033[K")


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
