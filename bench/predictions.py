"""Simulated metrics of many cases at once, in their order, over a few processes."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Final

from bench.uncovered import UncoveredError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.runs_csv import Case
    from simulator.engine_rules import HostConstants

Prediction = dict[str, float] | str
"""Metrics by column of ``runs_columns.md``, or the reason why there are none."""

WORKERS: Final = 2
"""Processes by default: what a small machine for continuous integration has."""

_CHUNK: Final = 8
"""Cases handed to a process at a time."""


def predict_all(
    jobs: Sequence[tuple[Case, HostConstants | None]], *, workers: int = WORKERS
) -> list[Prediction]:
    """Simulate every case under its host constants (``None``: the engine version's own).

    Every run is independent of the others, so the answer does not depend on ``workers``.
    """
    if workers <= 1 or len(jobs) <= _CHUNK:
        return [_predict(job) for job in jobs]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return pool.map(_predict, jobs, chunksize=_CHUNK)


def _predict(job: tuple[Case, HostConstants | None]) -> Prediction:
    case, host = job
    try:
        return case.predict(host)
    except UncoveredError as error:
        return str(error)
