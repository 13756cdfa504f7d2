"""Which plan to deploy: a constraint-optimization planner for LLM serving.

>>> from planner import Scenario, solve
>>> report = solve(Scenario.load("llama-3.1-70b_8xh100"))  # doctest: +SKIP
>>> report.plan.id  # doctest: +SKIP
'tp8'
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("serveplan")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

if TYPE_CHECKING:
    from planner.api import Simulation, simulate, simulate_requests, solve
    from planner.report import PlanReport
    from planner.scenario import Scenario
    from planner.session import Session
    from planner.session_switching import Switching

__all__ = [
    "PlanReport",
    "Scenario",
    "Session",
    "Simulation",
    "Switching",
    "__version__",
    "simulate",
    "simulate_requests",
    "solve",
]

_HOMES = {
    "Scenario": "planner.scenario",
    "PlanReport": "planner.report",
    "Session": "planner.session",
    "Simulation": "planner.api",
    "Switching": "planner.session_switching",
    "simulate": "planner.api",
    "simulate_requests": "planner.api",
    "solve": "planner.api",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use: the command line must start quickly."""
    if name not in _HOMES:
        raise AttributeError(f"module 'planner' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
