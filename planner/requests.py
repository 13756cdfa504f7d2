"""The requests that a scenario means: read from its files or drawn from its seed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from planner.errors import NO_VALUE, InputError
from planner.io.block_ids import block_ids_for
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
from simulator.ragged import starts_of
from simulator.sessions import (
    THINKING,
    TURNS,
    build_sessions,
    geometric_turns,
    session_block_ids,
    think_times_s,
    turns_of,
)
from simulator.workload import Workload, poisson_arrivals_s, uniform_lengths

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from planner.scenario import Scenario
    from planner.scenario_workload import ArrivalShape, LengthRange, SessionSpec, Turns

    Ints = npt.NDArray[np.int64]
    Floats = npt.NDArray[np.float64]


class _Drafts(NamedTuple):
    """Requests before outputs are cut to the context, and what a reader must know of them."""

    workload: Workload
    digest: str
    warnings: list[str]


def requests_of(
    scenario: Scenario, max_model_len: int, block_tokens: int = 0
) -> tuple[Workload, str, list[str]]:
    """Read or draw the requests of a scenario.

    Parameters
    ----------
    scenario
        What a user asks.
    max_model_len
        Longest request that the engine serves, tokens; outputs are cut to it.
    block_tokens
        Tokens of the blocks that a prefix cache would share, to keep what is known of the content
        of prompts; 0: nothing shares, so nothing is kept.

    Returns
    -------
    Workload, str, list of str
        The requests, a digest of where they come from, and what a reader must know of them.

    Raises
    ------
    InputError
        When a file is bad, holds too little, or a prompt leaves no room for an answer.

    """
    if scenario.workload.trace is not None:
        read = _read(scenario, scenario.workload.trace, max_model_len, block_tokens)
    elif scenario.workload.sessions is not None:
        read = _sessions(scenario, scenario.workload.sessions, max_model_len, block_tokens)
    else:
        read = _drawn(scenario, max_model_len)
    workload, digest, warnings = read
    room = max_model_len - workload.prompt_tokens
    cut = int((workload.output_tokens > room).sum())
    if cut:
        warnings.append(
            f"{cut} of {workload.num_requests} outputs are cut: prompt and output exceed "
            f"max_model_len ({max_model_len}), where the engine stops generating"
        )
        output = np.minimum(workload.output_tokens, room)
        workload = dataclasses.replace(workload, output_tokens=output)
    return workload, digest, warnings


def _read(scenario: Scenario, path: str, max_model_len: int, block_tokens: int) -> _Drafts:
    """Requests of a trace."""
    spec = scenario.workload
    trace = read_trace(
        scenario.find(path),
        source=path,
        num_requests=spec.num_requests,
        content=block_tokens > 0,
    )
    warnings = []
    skipped = sum(trace.rows_skipped.values())
    if skipped:
        reasons = ", ".join(f"{n} with {why}" for why, n in sorted(trace.rows_skipped.items()))
        warnings.append(f"trace: {skipped} of {trace.rows_read} rows skipped ({reasons})")
    prompt = trace.prompt_tokens
    arrival_s = _arrivals_s(scenario, len(prompt), trace.arrival_s if trace.has_arrivals else None)
    _check_lengths(scenario, prompt, max_model_len)
    blocks: dict[str, Any] = {}
    if trace.hashes is not None and len(trace.hashes.ids):
        with _too_many_blocks(path):
            found = block_ids_for(trace.hashes, trace.hash_tokens, prompt, block_tokens)
        blocks = _blocks(*found, block_tokens)
    requests = Workload(arrival_s, prompt, trace.output_tokens, spec.concurrency or 0, **blocks)
    return _Drafts(requests, trace.sha256, warnings)


def _drawn(scenario: Scenario, max_model_len: int) -> _Drafts:
    """Requests with drawn lengths, that arrive as drawn or by a file of rates."""
    spec, seed = scenario.workload, scenario.search.seed
    asked = spec.model_dump(mode="json")
    arrival: Floats | None = None
    if spec.rates is not None:
        arrival, asked["rates"] = _rates(scenario, spec.rates)
    number = spec.num_requests if arrival is None else len(arrival)
    prompt, output = _drawn_lengths(scenario, number)
    arrival_s = _arrivals_s(scenario, len(prompt), arrival)
    _check_lengths(scenario, prompt, max_model_len)
    requests = Workload(arrival_s, prompt, output, spec.concurrency or 0)
    return _Drafts(requests, digest_of([asked, seed]), [])


def _sessions(
    scenario: Scenario, spec: SessionSpec, max_model_len: int, block_tokens: int
) -> _Drafts:
    """Turns of drawn sessions."""
    seed, number = scenario.search.seed, scenario.workload.num_requests
    if number is None:
        raise AssertionError("the scenario's own checks require a number of turns")
    turns = turns_of(_turns(spec.turns, number, generator(seed, TURNS)), number)
    new = _lengths(spec.new_tokens, number, *(generator(seed, PROMPTS),) * 2)
    output = _lengths(spec.output_tokens, number, *(generator(seed, OUTPUTS),) * 2)
    _check_lengths(scenario, new[starts_of(turns)[:-1]], max_model_len)
    think = spec.think_time_s
    think_s = think_times_s(
        number, think.mean, think.distribution, think.cv or 0.0, generator(seed, THINKING)
    )
    start_s = _process_s(spec.arrivals.process, spec.arrivals.rate, spec.arrivals, len(turns), seed)
    drawn = build_sessions(turns, start_s, new, output, think_s, max_model_len)
    warnings = []
    if drawn.dropped:
        warnings.append(
            f"sessions: {drawn.dropped} of {number} turns are left out: the history before them "
            f"fills max_model_len ({max_model_len})"
        )
    blocks: dict[str, Any] = {}
    if block_tokens:
        with _too_many_blocks(scenario.source, "workload.sessions"):
            blocks = _blocks(*session_block_ids(drawn, block_tokens), block_tokens)
    requests = Workload(
        drawn.arrival_s,
        drawn.prompt_tokens,
        drawn.output_tokens,
        after=drawn.after,
        think_s=drawn.think_s,
        **blocks,
    )
    asked = scenario.workload.model_dump(mode="json")
    return _Drafts(requests, digest_of([asked, seed]), warnings)


def _blocks(ids: Ints, starts: Ints, block_tokens: int) -> dict[str, Any]:
    """Content ids as a workload's fields."""
    return {"block_ids": ids, "block_starts": starts, "block_tokens": block_tokens}


@contextmanager
def _too_many_blocks(source: str, field: str = "") -> Iterator[None]:
    """Turn the limit on block ids into a line that says what to do."""
    try:
        yield
    except ValueError as error:
        rule = f"{error}: set a lower workload.num_requests"
        raise InputError(source=source, field=field, value=NO_VALUE, rule=rule) from None


def _turns(spec: Turns, sessions: int, rng: np.random.Generator) -> Ints:
    """Turns of each session."""
    if spec.mean is not None:
        return geometric_turns(sessions, spec.mean, rng)
    if spec.min is None or spec.max is None:
        raise AssertionError("the scenario's own checks require a range without a mean")
    return uniform_lengths(sessions, spec.min, spec.max, rng)


def _arrivals_s(scenario: Scenario, num_requests: int, own_s: Floats | None) -> Floats:
    """When each request arrives; ``own_s``: what the trace or the rates say."""
    spec = scenario.workload
    if spec.concurrency is not None:
        return np.zeros(num_requests)
    if spec.arrival is not None:
        seed = scenario.search.seed
        return _process_s(spec.arrival, spec.request_rate, spec, num_requests, seed)
    if own_s is None:
        rule = "holds no arrival times: add arrival: poisson with request_rate, or concurrency"
        raise InputError(
            source=scenario.source, field="workload.trace", value=spec.trace, rule=rule
        )
    source = spec.trace or spec.rates or scenario.source
    return own_s if spec.request_rate is None else rescale(own_s, spec.request_rate, source=source)


def _process_s(
    process: str, rate: float | None, shape: ArrivalShape, number: int, seed: int
) -> Floats:
    """Draws of an arrival process; the scenario's checks give each what it needs."""
    if process == "poisson" and rate is not None:
        return poisson_arrivals_s(number, rate, seed)
    if process == "gamma" and rate is not None and shape.cv is not None:
        return gamma_arrivals_s(number, rate, shape.cv, seed)
    if process == "weibull" and rate is not None and shape.shape is not None:
        return weibull_arrivals_s(number, rate, shape.shape, seed)
    if process == "diurnal" and rate is not None and shape.amplitude is not None and shape.period_s:
        return diurnal_arrivals_s(number, rate, shape.amplitude, shape.period_s, seed)
    return np.zeros(number)  # all at once


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
    name = "sessions.new_tokens" if spec.sessions else "input_tokens"
    lengths = spec.sessions.new_tokens if spec.sessions else spec.input_tokens
    field = "workload.trace" if spec.trace else f"workload.{name}"
    other = "leave the request out" if spec.trace else f"lower {name}"
    if isinstance(lengths, LognormalLength):
        other = f"set {name}.max"
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
