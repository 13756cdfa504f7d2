"""The requests that a scenario means: read from its files or drawn from its seed."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

from planner.errors import NO_VALUE, InputError
from planner.io.trace_rates import read_rates
from planner.io.traces import read_trace, rescale
from planner.scenario_workload import MAX_REQUESTS, LognormalLength
from simulator.arrivals import (
    OUTPUTS,
    PROMPTS,
    diurnal_arrivals_s,
    gamma_arrivals_s,
    generator,
    lognormal_lengths,
    weibull_arrivals_s,
    windowed_arrivals_s,
)
from simulator.workload import Workload, poisson_arrivals_s, uniform_lengths

if TYPE_CHECKING:
    import numpy.typing as npt

    from planner.scenario import Scenario
    from planner.scenario_workload import LengthRange

    Ints = npt.NDArray[np.int64]
    Floats = npt.NDArray[np.float64]


def requests_of(scenario: Scenario, max_model_len: int) -> tuple[Workload, str, list[str]]:
    """Read or draw the requests of a scenario.

    Parameters
    ----------
    scenario
        What a user asks.
    max_model_len
        Longest request that the engine serves, tokens; outputs are cut to it.

    Returns
    -------
    Workload, str, list of str
        The requests, a digest of where they come from, and what a reader must know of them.

    Raises
    ------
    InputError
        When a file is bad, holds too little, or a prompt leaves no room for an answer.

    """
    spec, seed = scenario.workload, scenario.search.seed
    warnings: list[str] = []
    arrival: Floats | None = None
    if spec.trace is not None:
        trace = read_trace(
            scenario.find(spec.trace), source=spec.trace, num_requests=spec.num_requests
        )
        prompt, output = trace.prompt_tokens, trace.output_tokens
        arrival = trace.arrival_s if trace.has_arrivals else None
        skipped = sum(trace.rows_skipped.values())
        if skipped:
            reasons = ", ".join(f"{n} with {why}" for why, n in sorted(trace.rows_skipped.items()))
            warnings.append(f"trace: {skipped} of {trace.rows_read} rows skipped ({reasons})")
        digest = trace.sha256
    else:
        asked = spec.model_dump(mode="json")
        if spec.rates is not None:
            arrival, asked["rates"] = _rates(scenario, spec.rates)
        prompt, output = _drawn_lengths(
            scenario, spec.num_requests if arrival is None else len(arrival)
        )
        digest = digest_of([asked, seed])
    arrival_s = _arrivals_s(scenario, len(prompt), arrival)
    _check_lengths(scenario, prompt, max_model_len)
    room = max_model_len - prompt
    cut = int((output > room).sum())
    if cut:
        warnings.append(
            f"{cut} of {len(prompt)} outputs are cut: prompt and output exceed max_model_len "
            f"({max_model_len}), where the engine stops generating"
        )
    workload = Workload(arrival_s, prompt, np.minimum(output, room), spec.concurrency or 0)
    return workload, digest, warnings


def _arrivals_s(scenario: Scenario, num_requests: int, own_s: Floats | None) -> Floats:
    """When each request arrives; ``own_s``: what the trace or the rates say."""
    spec, mode, seed = scenario.workload, scenario.workload.arrival_mode, scenario.search.seed
    rate = spec.request_rate
    if mode in ("closed_loop", "all_at_once"):
        return np.zeros(num_requests)
    if mode == "poisson" and rate is not None:
        return poisson_arrivals_s(num_requests, rate, seed)
    if mode == "gamma" and rate is not None and spec.cv is not None:
        return gamma_arrivals_s(num_requests, rate, spec.cv, seed)
    if mode == "weibull" and rate is not None and spec.shape is not None:
        return weibull_arrivals_s(num_requests, rate, spec.shape, seed)
    if mode == "diurnal" and rate is not None and spec.amplitude is not None and spec.period_s:
        return diurnal_arrivals_s(num_requests, rate, spec.amplitude, spec.period_s, seed)
    if own_s is None:
        rule = "holds no arrival times: add arrival: poisson with request_rate, or concurrency"
        raise InputError(
            source=scenario.source, field="workload.trace", value=spec.trace, rule=rule
        )
    source = spec.trace or spec.rates or scenario.source
    return own_s if rate is None else rescale(own_s, rate, source=source)


def _rates(scenario: Scenario, path: str) -> tuple[Floats, str]:
    """Arrivals drawn from a file of rates, and its digest."""
    windows, sha256 = read_rates(scenario.find(path), source=path)
    asked = scenario.workload.num_requests
    expected = windows.mean_requests
    if asked is None and expected > MAX_REQUESTS:
        rule = f"expects {expected:.4g} requests, above {MAX_REQUESTS:,}: set num_requests"
        raise InputError(source=path, field="", value=NO_VALUE, rule=rule)
    arrival_s = windowed_arrivals_s(windows, asked, scenario.search.seed)
    if len(arrival_s) < (asked or 1):
        rule = (
            "requests were asked for (workload.num_requests), but the windows gave "
            f"{len(arrival_s)}"
        )
        raise InputError(source=path, field="", value=asked or 1, rule=rule)
    return arrival_s, sha256


def _drawn_lengths(scenario: Scenario, num_requests: int | None) -> tuple[Ints, Ints]:
    spec, seed = scenario.workload, scenario.search.seed
    if spec.input_tokens is None or spec.output_tokens is None or num_requests is None:
        raise AssertionError("the scenario's own checks require lengths without a trace")
    rng = np.random.default_rng(seed)  # one stream for both, prompts first
    prompt = _lengths(spec.input_tokens, num_requests, rng, generator(seed, PROMPTS))
    output = _lengths(spec.output_tokens, num_requests, rng, generator(seed, OUTPUTS))
    return prompt, output


def _lengths(
    spec: LengthRange | LognormalLength,
    num_requests: int,
    shared: np.random.Generator,
    own: np.random.Generator,
) -> Ints:
    """Lengths of one kind; only uniform ones draw from the shared stream, as they always did."""
    if isinstance(spec, LognormalLength):
        return lognormal_lengths(num_requests, spec.mean, spec.cv, spec.max, own)
    return uniform_lengths(num_requests, spec.min, spec.max, shared)


def _check_lengths(scenario: Scenario, prompt: Ints, max_model_len: int) -> None:
    """Refuse a prompt that leaves no room for a token: the engine rejects such a request."""
    if int(prompt.max()) < max_model_len:
        return
    request = int(np.argmax(prompt >= max_model_len))
    spec = scenario.workload
    field = "workload.trace" if spec.trace else "workload.input_tokens"
    is_tail = isinstance(spec.input_tokens, LognormalLength)
    other = "set input_tokens.max" if is_tail else "leave the request out"
    raise InputError(
        source=scenario.source,
        field=field,
        value=int(prompt[request]),
        rule=(
            f"prompt tokens of request {request + 1} must be below max_model_len "
            f"({max_model_len}): raise model.max_model_len or {other}"
        ),
    )


def digest_of(data: object) -> str:
    """Hex digest of plain data, the same for every order of its keys."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
