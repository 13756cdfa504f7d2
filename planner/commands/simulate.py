"""``planner simulate``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from planner.commands.options import JsonOption, ScenarioArgument, stdout_console
from planner.errors import RefusalError
from planner.io.output import STDOUT, check_target, deliver


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
    from planner.render import render_simulation
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
        render_simulation(simulation.report, stdout_console())
