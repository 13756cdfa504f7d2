"""From a scenario and measured runs of it to a calibration file (``planner calibrate``).

Each run is simulated as its client loaded the server: the scenario gives model, device, engine and
settings, the run gives lengths, load and the plan. What the scenario says of its own workload, SLO
and objective has no part in it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from planner import __version__
from planner.calibrate import IDENTIFIED, LEAST_RUNS, NOISE, TERMS, Runs, narrowed
from planner.errors import NO_VALUE, InputError, PlannerError, RefusalError
from planner.io.calibration import (
    SCHEMA_VERSION,
    Calibrated,
    Calibration,
    Constant,
    Constants,
    HeldOut,
    NextRun,
    Source,
)
from planner.io.measurements import METRICS, Lengths, Measurement, drawn
from planner.resolve import resolve
from planner.scenario import Scenario
from planner.space import broken_rule, explain_rule
from simulator.arrivals import gamma_arrivals_s
from simulator.metrics import statistic_s
from simulator.plan import Plan, parse_plan
from simulator.units import MS_PER_S, S_PER_MS
from simulator.workload import Workload, poisson_arrivals_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

    from planner.calibrate import Posterior
    from planner.io.measurements import MeasuredFile
    from planner.problem import Problem
    from simulator.engine_rules import HostConstants

    Floats = npt.NDArray[np.float64]

_ROUNDS: Final = 10
"""Requests per concurrent one of a suggested run, as public benchmark scripts send."""
_LOADS: Final = (1, 4, 16, 64, 256)
"""Concurrencies that a suggested run may have."""
_NOISE: Final = np.array([NOISE[name] for name in METRICS])


def calibrate(
    scenario: Scenario,
    files: Sequence[MeasuredFile],
    *,
    plan: str = "",
    on_progress: Callable[[str], None] | None = None,
) -> Calibration:
    """Constants of the scenario's engine from measured runs.

    Parameters
    ----------
    scenario
        What was measured: model, device, engine and its settings.
    files
        Measured runs.
    plan
        Text of the plan of every run that does not name its own.
    on_progress
        Told what is being done.

    Raises
    ------
    InputError
        If a run names no plan or its requests do not fit the model.
    RefusalError
        If the runs do not calibrate, or a plan is one that the engine cannot launch.

    """
    tell = on_progress or (lambda text: None)
    runs = [run for file in files for run in file.runs]
    if len(runs) < LEAST_RUNS:
        raise RefusalError(
            f"{len(runs)} measured runs are too few: {LEAST_RUNS} loads or lengths of one plan are "
            "needed, so that some can be held out"
        )
    plans = [_plan_text(run, plan) for run in runs]
    server = _Server(scenario)
    shipped = server.shipped
    servers = [server.loaded(run, text) for run, text in zip(runs, plans, strict=True)]
    tell(f"simulating {len(runs)} runs")
    measured = np.array([_measured(run) for run in runs])
    fitter = Runs(lambda host: _logs(servers, host), measured, _NOISE, shipped)
    fitted = fitter.fit()
    tell("judging on held-out runs")
    judged = fitter.judge(fitted)
    fitter.check(fitted, judged)
    tell("looking for the run that would tell most")
    next_run = _next_run(server, runs, plans, fitted)
    notes = sorted({note for run in runs for note in run.notes})
    weak = [t.name for t, left in zip(TERMS, fitted.spread, strict=True) if left > IDENTIFIED]
    if weak:
        notes.append(f"these runs do not tell {', '.join(weak)}: about as they were")
    return Calibration(
        schema_version=SCHEMA_VERSION,
        planner=__version__,
        calibrated=Calibrated(
            engine=server.problem.engine.name,
            version=server.problem.engine.version,
            device=server.problem.pool.device.name,
            model=scenario.model.config,
            plans=tuple(sorted(set(plans))),
        ),
        constants=_constants(fitted),
        held_out=HeldOut(
            runs=len(runs),
            folds=judged.folds,
            before_pct=_by_metric(judged.before),
            after_pct=_by_metric(judged.after),
        ),
        measurements=tuple(
            Source(file=file.name, sha256=file.sha256, runs=len(file.runs)) for file in files
        ),
        next_run=next_run,
        warnings=tuple(notes),
    )


def _plan_text(run: Measurement, plan: str) -> str:
    text = run.plan or plan
    if not text:
        rule = "is not stated: give --plan, for example --plan tp4"
        raise InputError(source=run.source, field="plan", value=NO_VALUE, rule=rule)
    return text


def _measured(run: Measurement) -> Floats:
    """Logarithms of the metrics that count: TPOT and TTFT, or what stands in for TPOT."""
    known = dict(run.metrics)
    if "mean_tpot_ms" in known:
        # These follow from TPOT and TTFT: counted too, they would say everything twice.
        known.pop("mean_e2el_ms", None)
        known.pop("output_throughput", None)
    elif "mean_e2el_ms" in known:
        known.pop("output_throughput", None)
    return np.array([math.log(known[name]) if name in known else np.nan for name in METRICS])


class _Server:
    """The scenario's model, device and engine, to be loaded in any way."""

    def __init__(self, scenario: Scenario) -> None:
        data = scenario.model_dump(exclude_unset=True, mode="json")
        for section in ("slo", "goodput"):
            data.pop(section, None)
        data["objective"] = {"minimize": "mean_e2e"}
        data["engine"].pop("calibration", None)
        data["workload"] = {
            "input_tokens": {"min": 1, "max": 1},
            "output_tokens": {"min": 1, "max": 1},
            "num_requests": 1,
            "arrival": "all_at_once",
        }
        self._seed = scenario.search.seed
        self._scenario = Scenario.model_validate(
            data, base_dir=scenario.base_dir, source=scenario.source
        )
        self.problem = resolve(self._scenario)

    @property
    def shipped(self) -> HostConstants:
        """The engine version's own constants."""
        return self.problem.engine.host

    def under(self, host: HostConstants) -> Problem:
        """The problem under other constants."""
        return resolve(self._scenario, host=host)

    def loaded(self, run: Measurement, text: str) -> _Loaded:
        """The server under one run's load, or a refusal that says why it cannot be simulated."""
        problem = self.problem
        try:
            plan = parse_plan(text, problem.default_limits)
        except ValueError as error:
            rule = f"is not a plan: {error}"
            raise InputError(source=run.source, field="plan", value=text, rule=rule) from None
        rng = np.random.default_rng(self._seed)
        workload = _workload(run, rng)
        longest = int((workload.prompt_tokens + workload.output_tokens).max())
        if longest > problem.max_model_len:
            rule = f"prompt and output of one request exceed max_model_len {problem.max_model_len}"
            raise InputError(source=run.source, field="lengths", value=longest, rule=rule)
        rule_broken = broken_rule(dataclasses.replace(problem, workload=workload), plan)
        if rule_broken is not None:
            why = explain_rule(problem, plan, rule_broken)
            raise RefusalError(f"{run.source}: plan {text}: {rule_broken}: {why}")
        return _Loaded(self, run, plan, workload)


@dataclasses.dataclass(frozen=True, eq=False)
class _Loaded:
    """A server, its plan and its requests."""

    server: _Server
    run: Measurement
    plan: Plan
    workload: Workload

    def logs(self, problem: Problem) -> list[float]:
        """Logarithms of the predicted metrics; NaN where there is none."""
        try:
            result = dataclasses.replace(problem, workload=self.workload).start(self.plan).finish()
        except (PlannerError, ValueError):
            return [np.nan] * len(METRICS)
        tpot_s = result.values.of("tpot")
        found = {
            "mean_tpot_ms": MS_PER_S * statistic_s(tpot_s, "mean") if len(tpot_s) else np.nan,
            "mean_ttft_ms": MS_PER_S * statistic_s(result.values.of("ttft"), "mean"),
            "mean_e2el_ms": MS_PER_S * statistic_s(result.values.of("e2e"), "mean"),
            "output_throughput": float(self.workload.output_tokens.sum()) / result.makespan_s,
        }
        return [math.log(found[name]) if found[name] > 0 else np.nan for name in METRICS]


def _logs(loaded: Iterable[_Loaded], host: HostConstants) -> Floats:
    loaded = list(loaded)
    # Costs of a plan are compiled once per host and shared by every run of it.
    problem = loaded[0].server.under(host)
    return np.array([one.logs(problem) for one in loaded])


def _workload(run: Measurement, rng: np.random.Generator) -> Workload:
    n = run.num_requests
    prompts, outputs = drawn(run.prompt, n, rng), drawn(run.output, n, rng)
    arrival_s = np.zeros(n)
    if run.request_rate:
        seed = int(rng.integers(2**31))
        if run.burstiness == 1.0:
            arrival_s = poisson_arrivals_s(n, run.request_rate, seed)
        else:
            cv = 1.0 / math.sqrt(run.burstiness)
            arrival_s = gamma_arrivals_s(n, run.request_rate, cv, seed)
    return Workload(arrival_s, prompts, outputs, concurrency=run.concurrency)


def _constants(fitted: Posterior) -> Constants:
    entries: dict[str, Any] = {}
    for j, term in enumerate(TERMS):
        entries[term.name] = Constant(
            value=_rounded(fitted.values[j]),
            before=_rounded(fitted.shipped[j]),
            spread=_rounded(fitted.spread[j] * term.spread),
            identified=bool(fitted.spread[j] <= IDENTIFIED),
        )
    return Constants(**entries, eager_layer_ms=_rounded(fitted.eager_layer_s / S_PER_MS))


def _by_metric(errors: Floats) -> dict[str, float]:
    return {
        name: round(100 * float(value), 2)
        for name, value in zip(METRICS, errors, strict=True)
        if not math.isnan(value)
    }


def _rounded(value: float) -> float:
    """Digits beyond these depend on the machine."""
    return float(f"{value:.4g}")


def _next_run(
    server: _Server, runs: Sequence[Measurement], plans: Sequence[str], fitted: Posterior
) -> NextRun | None:
    """Of the plans of the space at a few loads, the run that narrows all of them most.

    Each candidate is a closed loop with the median lengths of the runs given. A prediction's spread
    is that of the constants alone, through slopes at the fitted ones.
    """
    prompt, output = (
        int(np.median([(lengths.low + lengths.high) / 2 for lengths in both]))
        for both in ([run.prompt for run in runs], [run.output for run in runs])
    )
    candidates = _candidates(server, prompt, output, plans)
    if not candidates:
        return None
    unmeasured = np.full((len(candidates), len(METRICS)), np.nan)
    points = Runs(lambda host: _logs(candidates, host), unmeasured, _NOISE, fitted.host)
    # Nothing was measured at these, so the slopes are all that is asked for: TPOT and TTFT.
    slopes = points.slopes(np.zeros(len(TERMS)))[:, :2]
    known = np.flatnonzero(~np.isnan(slopes).any(axis=(1, 2)))
    slopes, candidates = slopes[known], [candidates[i] for i in known]
    if not candidates:
        return None
    every = slopes.reshape(-1, len(TERMS))

    def mean_spread(covariance: Floats) -> float:
        variances = np.einsum("ij,jk,ik->i", every, covariance, every)
        return float(np.sqrt(np.maximum(variances, 0.0)).mean())

    after = [mean_spread(narrowed(fitted.covariance, own, _NOISE[:2])) for own in slopes]
    best = int(np.argmin(np.round(after, 9)))
    chosen = candidates[best]
    return NextRun(
        plan=server.problem.plan_text(chosen.plan),
        concurrency=chosen.run.concurrency,
        input_len=prompt,
        output_len=output,
        spread_before_pct=round(100 * mean_spread(fitted.covariance), 3),
        spread_after_pct=round(100 * after[best], 3),
    )


def _candidates(server: _Server, prompt: int, output: int, plans: Sequence[str]) -> list[_Loaded]:
    """One replica of every shape that can run, under every load; measured plans included."""
    problem = server.problem
    shapes = {parse_plan(text, problem.default_limits).shape for text in plans}
    shapes |= set(problem.space.shapes)
    found = []
    for shape in sorted(shapes):
        plan = Plan(1, shape, problem.pool.default_limits)
        for load in _LOADS:
            run = Measurement(
                source="candidate",
                plan="",
                concurrency=load,
                request_rate=0.0,
                num_requests=_ROUNDS * load,
                prompt=Lengths(prompt, prompt),
                output=Lengths(output, output),
                metrics={"mean_tpot_ms": 1.0},
            )
            try:
                found.append(server.loaded(run, problem.plan_text(plan)))
            except (InputError, RefusalError):
                break
    return found
