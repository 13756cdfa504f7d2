"""``planner solve``."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Final, Optional

import typer

from planner.commands.options import (
    INFEASIBLE_EXIT,
    JsonOption,
    ScenarioArgument,
    stdout_console,
)
from planner.io.output import STDOUT, check_target, deliver

if TYPE_CHECKING:
    from planner.report import PlanReport
    from planner.search_result import Progress

CERTIFICATE: Final = "--certificate"

CertificateOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(CERTIFICATE, metavar="FILE", help="Write the proof, for planner verify."),
]
WarmStartOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--warm-start", metavar="REPORT", help="Simulate an earlier answer's plan first."),
]


def solve(
    scenario: ScenarioArgument,
    json: JsonOption = None,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Also simulate every plan and compare.")
    ] = False,
    certificate: CertificateOption = None,
    warm_start: WarmStartOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
    timings: Annotated[
        bool, typer.Option("--timings", help="Add search.seconds, which differs between runs.")
    ] = False,
) -> None:
    """Find the best plan and prove that no other in the space is better."""
    from planner.api import solve as solve_scenario
    from planner.render import render_solve
    from planner.report import plan_of_report
    from planner.scenario import Scenario

    check_target(json)
    check_target(certificate, CERTIFICATE)
    earlier = None if warm_start is None else plan_of_report(warm_start)
    loaded = Scenario.load(scenario)
    progress = None if quiet else ProgressLine()
    certified: list[str] = []
    began_s = time.perf_counter()
    try:
        report = solve_scenario(
            loaded,
            exhaustive=exhaustive,
            on_progress=progress,
            on_certificate=certified.append if certificate is not None else None,
            warm_start=earlier,
        )
    finally:
        if progress is not None:
            progress.end()
    if timings:
        seconds = time.perf_counter() - began_s
        report = replace(report, search=replace(report.search, seconds=seconds))
    for text in certified:
        deliver(text, certificate, CERTIFICATE)
    deliver(report.to_json(), json)
    if json != STDOUT:
        render_solve(report, stdout_console())
    _exit_for(report)


def _exit_for(report: PlanReport) -> None:
    """End with the code of an infeasible answer, its reason on one line of stderr."""
    if report.infeasible is None:
        return
    reason, relaxation = report.infeasible["reason"], report.infeasible["relaxation"]
    sys.stderr.write(f"planner: infeasible: {reason}; {relaxation}\n")
    raise typer.Exit(INFEASIBLE_EXIT)


class ProgressLine:
    """Where the search stands: one line that is rewritten, on a terminal only."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._settled = 0

    def __call__(self, progress: Progress) -> None:
        """Rewrite the line."""
        self._settled += 1
        if not self._live:
            return
        best = progress.incumbent
        shape = "none yet" if best is None else f"{best.replicas}x{best.shape.text}"
        sys.stderr.write(
            f"\rsettled {self._settled}, left {progress.plans_left}, best {shape}, "
            f"{progress.iterations:,} iterations \033[K"
        )
        sys.stderr.flush()

    def end(self) -> None:
        """Clear the line."""
        if self._live:
            sys.stderr.write("\r\033[K")
