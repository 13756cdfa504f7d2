"""What a run would measure, predicted from its settings alone."""

from __future__ import annotations

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Final, Protocol

from bench.model_names import checkpoint_of
from bench.points import CONSTANTS, host_of
from bench.runs_csv import case_of
from bench.uncovered import UncoveredError
from planner.errors import PlannerError, one_line
from planner.space import KV_CACHE, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from bench.choice_groups import Row, Run

METRICS: Final = (
    *("ttft_ms", "tpot_ms", "itl_median_ms", "e2e_ms"),
    *("output_tok_per_s", "total_tok_per_s"),
)
"""Metrics that a choice may ask for, named and measured as the columns of ``runs_columns.md``;
throughputs are of the whole deployment."""

_MEMORY_RULES: Final = (WEIGHTS, KV_CACHE)
"""Rules of the plan space that say that a plan does not fit."""

_ROWS_PER_TASK: Final = 4
"""Runs that a worker process takes at a time: few, as some take a hundred times as long."""


@dataclass(frozen=True)
class Prediction:
    """Metrics of one run, or why there are none.

    Parameters
    ----------
    metrics
        Values by the names of :data:`METRICS`; empty where there are none.
    reason
        Why the run is not covered; empty where it is.
    fits
        Whether the plan fits into memory. One that does not is covered: the answer is that it
        cannot serve.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    fits: bool = True


class Predictor(Protocol):
    """Anything that predicts a run; it sees no measured value, as the row holds none."""

    def predict(self, run_row: Row) -> Prediction:
        """Predict the metrics of one run.

        Parameters
        ----------
        run_row
            Columns of ``bench.choice_groups.SETTINGS``.
        """
        ...  # pragma: no cover


@dataclass(frozen=True)
class SimulatedRuns:
    """Predicts by simulation of the case that ``bench.runs_csv`` makes of a run.

    Parameters
    ----------
    constants
        Host constants, one of ``bench.points.CONSTANTS``: by default those of a fit that has not
        seen the run's cluster.
    """

    constants: str = CONSTANTS[0]

    def predict(self, run_row: Row) -> Prediction:
        """Simulate one run."""
        calibration = "none" if self.constants == "none" else None
        try:
            case = case_of(run_row, calibration=calibration)
            found = case.predict(host_of(case, self.constants), record_gaps=True)
        except UncoveredError as error:
            return Prediction(reason=str(error), fits=str(error) not in _MEMORY_RULES)
        except PlannerError as error:
            return Prediction(reason=str(error))
        # A judge of files that nobody has seen names what broke it and goes on: the run counts
        # as uncovered, so a bug can only cost.
        except Exception as error:
            return Prediction(reason=f"bug: {type(error).__name__}: {one_line(str(error))}")
        return Prediction({n: found[n] for n in METRICS if math.isfinite(found.get(n, math.nan))})


def predict_all(
    predictor: Predictor, runs: Iterable[Run], *, workers: int = 1
) -> dict[tuple[str, ...], Prediction]:
    """Predict every run once, however many groups share it.

    Parameters
    ----------
    predictor
        Must be picklable where ``workers`` is above 1.
    runs
        Runs, in any order, repeated or not.
    workers
        Processes; the answer does not depend on it.

    Returns
    -------
    dict
        Predictions by ``Run.key``.
    """
    rows = {run.key: run.settings for run in sorted(runs, key=lambda r: r.settings["run_id"])}
    keys = sorted(rows)
    todo = [rows[key] for key in keys]
    if workers == 1:
        predictions: Sequence[Prediction] = [predictor.predict(row) for row in todo]
    else:
        # Spawned: a fork would copy the locks of whatever threads libraries have started.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            predictions = list(pool.map(predictor.predict, todo, chunksize=_ROWS_PER_TASK))
    return dict(zip(keys, predictions, strict=True))


@cache
def kind_of_model(name: str) -> str:
    """``moe`` or ``dense`` by the model's layers, ``unknown`` for a name outside the catalogue."""
    try:
        return "moe" if checkpoint_of(name).is_moe else "dense"
    except UncoveredError:
        return "unknown"
