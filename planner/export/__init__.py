"""What leaves the planner as something that launches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from planner.errors import RefusalError

if TYPE_CHECKING:
    from planner.scenario import Scenario

_ENGINES: Final = ("vllm", "sglang", "trtllm")
FORMATS: Final = (*_ENGINES, "docker-compose", "lws", "kserve", "dynamo")
"""What a plan can be exported as: an engine's own commands, or a document."""


def export_plan(scenario: Scenario, plan_text: str, form: str, *, image: str | None = None) -> str:
    """Text of a file that launches a plan.

    Parameters
    ----------
    scenario, plan_text
        What to launch, for example ``2xtp4``.
    form
        One of :data:`FORMATS`.
    image
        Container image in place of the engine's own; for documents alone.

    Raises
    ------
    InputError
        When the scenario or the plan's text is bad.
    RefusalError
        When the engine cannot launch the plan, or ``form`` cannot describe it.
    InfeasibleError
        When the plan does not fit into memory.

    """
    from planner.export.flags import has_server, launch_commands
    from planner.export.manifests import as_yaml, manifest
    from planner.plan_text import require_plan
    from planner.resolve import resolve

    problem = resolve(scenario)
    plan = require_plan(problem, plan_text)
    engine = problem.engine
    if form in _ENGINES and form != engine.name:
        raise RefusalError(f"--format {form}: the scenario's engine is {engine.name}")
    if not has_server(problem):
        raise RefusalError(
            f"{engine.name} {engine.version} has no server of its own: 1.0 is the first with one"
        )
    if form in _ENGINES:
        if image is not None:
            raise RefusalError(f"--image: {form} commands start no container")
        return "".join(f"{command}\n" for command in launch_commands(problem, plan))
    return as_yaml(manifest(problem, plan, form, image))
