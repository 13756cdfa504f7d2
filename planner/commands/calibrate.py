"""``planner calibrate``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from planner.commands.options import ScenarioArgument  # noqa: TC001
from planner.io.output import STDOUT, check_target, deliver, deliver_file

if TYPE_CHECKING:
    from planner.io.calibration import Calibration

_OPTION = "--output"


def calibrate(
    scenario: ScenarioArgument,
    measurements: Annotated[
        list[str],
        typer.Argument(
            metavar="MEASUREMENTS...",
            help="Output of vllm bench serve, aiperf, genai-perf or guidellm, or a CSV.",
        ),
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE|-", help="Calibration file to write.")
    ],
    plan: Annotated[
        str, typer.Option("--plan", help="Plan that was measured, where the files do not say.")
    ] = "",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Fit the engine's constants to measured runs of one plan; refuse what does not calibrate."""
    from planner.io.measurements import read_measurements
    from planner.measured_runs import calibrate as fit
    from planner.scenario import Scenario

    check_target(output, _OPTION)
    loaded = Scenario.load(scenario)
    files = [read_measurements(path) for path in measurements]

    def tell(text: str) -> None:
        if not quiet:
            sys.stderr.write(f"planner: calibrate: {text}\n")

    found = fit(loaded, files, plan=plan, on_progress=tell)
    if output == STDOUT:
        deliver(found.to_json(), STDOUT)
        return
    deliver_file(output, _OPTION, lambda file: file.write(found.to_json().encode()))
    sys.stdout.write(_summary(found, output))


def _summary(found: Calibration, output: str) -> str:
    """What was found, in lines for people."""
    held = found.held_out
    lines = [f"{'constant':<22} {'before':>9} {'fitted':>9} {'spread':>9}"]
    for name, entry in found.constants:
        if isinstance(entry, float):
            continue
        told = "" if entry.identified else "  not told by these runs"
        lines.append(
            f"{name:<22} {entry.before:>9.4g} {entry.value:>9.4g} {entry.spread:>9.2g}{told}"
        )
    lines.append(f"held-out error of {held.runs} runs in {held.folds} parts, mean:")
    lines += [
        f"  {name:<20} {held.before_pct[name]:.1f} % before, {held.after_pct[name]:.1f} % after"
        for name in held.before_pct
    ]
    if found.next_run is not None:
        run = found.next_run
        lines.append(
            f"next, measure {run.plan} at concurrency {run.concurrency} ({run.input_len} tokens "
            f"in, {run.output_len} out): spread of predictions {run.spread_before_pct:.2f} % "
            f"to {run.spread_after_pct:.2f} %"
        )
    lines += [f"warning: {text}" for text in found.warnings]
    lines.append(f"written: {output}; use it with engine: {{calibration: {output}}}")
    return "\n".join(lines) + "\n"
