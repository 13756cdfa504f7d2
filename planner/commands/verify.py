"""``planner verify``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from planner.commands.options import DIFFERENT_EXIT, JsonOption, stdout_console
from planner.errors import RefusalError
from planner.io.output import STDOUT, check_target, deliver


def verify(
    certificate: Annotated[str, typer.Argument(help="File that solve --certificate wrote.")],
    sample: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", min=0, help="Finished runs to simulate again (default 16)."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Simulate every finished run again.")
    ] = False,
    traces: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="DIR", help="Folder of the scenario, if not the certificate's."),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Check a certificate without the search, its bounds and its jump engine."""
    from dataclasses import asdict

    from planner.io.yaml_file import read_text
    from planner.report import dump_json
    from planner.verify import SAMPLE
    from planner.verify import verify as verify_text
    from planner.verify_document import RejectedError
    from planner.verify_master import master_disagrees

    check_target(json)
    if everything and sample is not None:
        raise RefusalError("--all and --sample exclude one another: keep one")
    path = Path(certificate)
    text = read_text(path, source=certificate)
    folder = path.parent if traces is None else Path(traces)
    number = None if everything else SAMPLE if sample is None else sample
    reason = None
    try:
        checked, problem = verify_text(text, source=certificate, base_dir=folder, sample=number)
        disagreement = master_disagrees(problem, text)
        if disagreement is not None:
            reason = f"line 2: {disagreement}"
    except RejectedError as error:
        reason = str(error)
    if reason is not None:
        deliver(dump_json({"accepted": False, "reason": reason}), json)
        sys.stderr.write(f"planner: rejected: {certificate}: {reason}\n")
        raise typer.Exit(DIFFERENT_EXIT)
    deliver(dump_json({"accepted": True, **asdict(checked)}), json)
    if json != STDOUT:
        claim = f"{checked.plan} is {checked.status}" if checked.plan else "no plan is feasible"
        console = stdout_console()
        console.print(f"accepted: {claim}", highlight=False)
        console.print(
            f"recomputed: {checked.excluded} plans that cannot run, {checked.supports} supports, "
            f"{checked.bounded} bounds",
            highlight=False,
        )
        console.print(
            f"simulated again, iteration by iteration: {checked.aborted} stopped runs, "
            f"{checked.simulated} of {checked.exact} finished ones",
            highlight=False,
        )
        console.print(
            "on the solver's word: that no deployment has a lower value than the incumbent; the "
            "entries in order say the same",
            highlight=False,
        )
