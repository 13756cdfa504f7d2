"""``planner crossovers``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from planner.commands.options import JsonOption, ScenarioArgument, stdout_console
from planner.errors import InputError, RefusalError
from planner.io.output import STDOUT, check_target, deliver


def crossovers(
    scenario: ScenarioArgument,
    rate: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="LOW:HIGH", help="Requests per second."),
    ] = None,
    input_tokens: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="LOW:HIGH", help="Mean prompt, tokens."),
    ] = None,
    output_tokens: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="LOW:HIGH", help="Mean output, tokens."),
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="Places to ask before bisection.")] = 9,
    resolution: Annotated[
        float, typer.Option(metavar="SHARE", help="Distance of a crossover's two sides.")
    ] = 0.01,
    shapes: Annotated[
        bool, typer.Option("--shapes", help="Ignore plans that differ in batching limits only.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Find at which rate or length of requests the best plan changes, each side proved."""
    from planner.crossovers import crossovers as find
    from planner.report import dump_json
    from planner.scenario import Scenario
    from planner.session import Session

    asked = {"rate": rate, "input_tokens": input_tokens, "output_tokens": output_tokens}
    given = [(axis, text) for axis, text in asked.items() if text is not None]
    if len(given) != 1:
        raise RefusalError("give one of --rate, --input-tokens and --output-tokens as LOW:HIGH")
    axis, text = given[0]
    low, high = _ends(axis, text)
    check_target(json)
    with Session(Scenario.load(scenario)) as session:
        found = find(
            session, low, high, axis=axis, points=points, resolution=resolution, shapes=shapes
        )
    deliver(dump_json(found.to_dict()), json)
    if json != STDOUT:
        console = stdout_console()
        for line in found.lines():
            console.print(line, highlight=False)


def _ends(axis: str, text: str) -> tuple[float, float]:
    """The two numbers of ``LOW:HIGH``."""
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        option = f"--{axis.replace('_', '-')}"
        rule = "must be LOW:HIGH, two numbers"
        raise InputError(source=option, field="", value=text, rule=rule) from None
    return low, high
