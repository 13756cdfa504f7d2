"""A first scenario, commented, from a few facts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml

from planner.errors import InputError
from planner.io.engines import engine_versions
from planner.resolve import resolve
from planner.scenario import Scenario

if TYPE_CHECKING:
    from pathlib import Path

_SOURCE = "init"


@dataclass(frozen=True)
class Facts:
    """What a first scenario is made of.

    Parameters
    ----------
    model, device
        Names of the catalogues, or for the model a path to a ``config.json``.
    nodes, devices_per_node
        The pool.
    engine, version
        The engine; without a version the newest that ships.
    trace
        Path of a trace; without one, requests of these mean lengths arrive at random.
    request_rate
        Requests per second.
    input_tokens, output_tokens, num_requests
        Mean lengths of drawn requests, and how many.
    ttft_ms, tpot_ms
        99th percentiles to keep, or ``None``.
    objective
        For example ``mean_e2e`` or ``throughput``.
    """

    model: str
    device: str
    nodes: int = 1
    devices_per_node: int = 8
    engine: str = "vllm"
    version: str | None = None
    trace: str | None = None
    request_rate: float = 4.0
    input_tokens: int = 1024
    output_tokens: int = 256
    num_requests: int = 2000
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    objective: str = "mean_e2e"


def first_scenario(facts: Facts, folder: Path) -> str:
    """Text of a scenario for a file in ``folder``, checked by resolving it.

    Raises
    ------
    InputError
        When a fact names something unknown or breaks a rule of scenarios.

    """
    text = _text(facts)
    # Parsed from what is written, so that a quote in a name cannot change the scenario.
    resolve(Scenario.model_validate(yaml.safe_load(text), base_dir=folder, source=_SOURCE))
    return text


def _text(facts: Facts) -> str:
    version = facts.version or _newest(facts.engine)
    limits = {"ttft_ms": facts.ttft_ms, "tpot_ms": facts.tpot_ms}
    kept = {name: limit for name, limit in limits.items() if limit is not None}
    slo = ", ".join(f"{name}: {{p99: {limit:g}}}" for name, limit in kept.items())
    counted = ", ".join(f"{name}: {limit:g}" for name, limit in kept.items())
    sense = "maximize" if facts.objective == "throughput" else "minimize"
    if facts.trace is not None:
        workload = f"trace: {_quoted(facts.trace)}, request_rate: {facts.request_rate:g}"
        note = "# Lengths and bursts of the trace, its arrivals rescaled to this many a second.\n"
    else:
        # The spread is a stand-in: chat traces have coefficients of variation around 1.
        workload = (
            f"\n  input_tokens: {{mean: {facts.input_tokens}, cv: 1.0}}"
            f"\n  output_tokens: {{mean: {facts.output_tokens}, cv: 1.0}}"
            f"\n  num_requests: {facts.num_requests}"
            f"\n  arrival: poisson\n  request_rate: {facts.request_rate:g}\n"
        )
        note = "# Drawn requests; a trace of real ones (trace: chat.csv) says more.\n"
    section = f"workload: {{{workload}}}\n" if facts.trace is not None else f"workload:{workload}"
    slo_lines = (
        "# What the plan must keep over the run, and what counts as good for each request.\n"
        f"slo: {{{slo}}}\ngoodput: {{{counted}}}\n"
        if kept
        else "# What the plan must keep over the run: none. For example\n"
        "# slo: {ttft_ms: {p99: 2000}, tpot_ms: {p99: 50}}\n"
    )
    return (
        "schema_version: 1\n"
        "# A name of `planner list models`, or the path of a config.json. Optional: weight_dtype,\n"
        "# kv_cache_dtype, max_model_len.\n"
        f"model: {{config: {_quoted(facts.model)}}}\n"
        "# A device of `planner list devices`; price_per_hour (USD per device) is the catalogue's\n"
        "# where left out; several nodes need an interconnect.\n"
        f"cluster:\n  pools: [{{device: {_quoted(facts.device)}, nodes: {facts.nodes}, "
        f"devices_per_node: {facts.devices_per_node}}}]\n"
        "# A version of `planner list engines`; its batching limits are searched unless fixed\n"
        "# here under the engine's own names.\n"
        f"engine: {{name: {_quoted(facts.engine)}, version: {_quoted(version)}}}\n"
        f"{note}{section}{slo_lines}"
        "# Or minimize: p99_ttft, devices ...; maximize: throughput.\n"
        f"objective: {{{sense}: {_quoted(facts.objective)}}}\n"
    )


def _newest(engine: str) -> str:
    """The newest version of ``engine`` that ships; profiles list them oldest first."""
    versions = [version for name, version in engine_versions() if name == engine]
    if not versions:
        known = ", ".join(sorted({name for name, _ in engine_versions()}))
        raise InputError(source="--engine", field="", value=engine, rule=f"must be one of: {known}")
    return versions[-1]


def _quoted(text: str) -> str:
    """``text`` as YAML reads it back: plain where it can be, else a JSON string."""
    try:
        plain = yaml.safe_load(f"[{text}]") == [text] and not text.startswith("*")
    except yaml.YAMLError:
        plain = False
    return text if plain else json.dumps(text)
