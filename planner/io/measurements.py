"""Measured runs of a server, from the output of benchmark clients.

Read here: ``vllm bench serve`` (``--save-result``, with or without ``--save-detailed``), aiperf and
genai-perf (``profile_export*.json``), guidellm (``benchmarks.json``), and a CSV with the columns of
`planner.io.measurements_csv`. A JSON file is known by its keys.

The clients mean different things by one word. TPOT here is (E2E - TTFT) / (output tokens - 1), mean
over requests: vLLM calls it ``tpot``, aiperf, genai-perf and guidellm call it inter-token latency
(guidellm's own ``time_per_output_token`` counts the first token in). guidellm states
``request_latency`` in seconds.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from planner.errors import NO_VALUE, InputError
from planner.io.yaml_file import decode, read_bytes
from simulator.units import MS_PER_S

if TYPE_CHECKING:
    from collections.abc import Mapping

METRICS: Final = ("mean_tpot_ms", "mean_ttft_ms", "mean_e2el_ms", "output_throughput")
"""Metrics that a calibration reads: vLLM's names; means over requests in milliseconds, and output
tokens per second of the whole deployment."""

_READS: Final = "vllm bench serve, aiperf, genai-perf, guidellm JSON or a CSV (docs/calibration.md)"

MOST_REQUESTS: Final = 30_000
"""Most requests of one measured run, above every public table's (TensorRT-LLM: 30,000)."""


@dataclass(frozen=True)
class Lengths:
    """Token counts of the requests: each one's own, or a range they are spread over evenly.

    Parameters
    ----------
    low, high
        Shortest and longest, tokens.
    each
        Every request's, in the order sent; empty where only the range is known.

    """

    low: int
    high: int
    each: tuple[int, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """One measured run: how it was loaded, and what was measured.

    Parameters
    ----------
    source
        File, and the run in it, for messages.
    plan
        Text of the plan that served it; empty where the file does not say.
    concurrency
        Requests in flight of a closed loop, else 0.
    request_rate
        Mean arrivals per second of an open loop, else 0. Neither: all requests at once.
    burstiness
        Shape of the gamma distribution of the gaps of an open loop; 1: a Poisson process.
    num_requests
        Requests completed.
    prompt, output
        Lengths.
    metrics
        Values by the names of `METRICS`; at least one.
    notes
        What the file leaves open and was taken as given.

    """

    source: str
    plan: str
    concurrency: int
    request_rate: float
    num_requests: int
    prompt: Lengths
    output: Lengths
    metrics: Mapping[str, float]
    burstiness: float = 1.0
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        """Refuse runs that no simulation could repeat."""
        if not 0 < self.num_requests <= MOST_REQUESTS:
            rule = f"must be 1 to {MOST_REQUESTS} completed requests"
            raise _bad(self.source, "completed requests", self.num_requests, rule)
        for name, lengths in (("input tokens", self.prompt), ("output tokens", self.output)):
            if not 1 <= lengths.low <= lengths.high:
                raise _bad(self.source, name, lengths.low, "must be at least 1")
        if not self.metrics:
            rule = f"holds none of the metrics that calibrate: {', '.join(METRICS)}"
            raise _bad(self.source, "", NO_VALUE, rule)
        for name, value in self.metrics.items():
            if not (math.isfinite(value) and value > 0):
                raise _bad(self.source, name, value, "must be greater than 0")

    @property
    def load(self) -> str:
        """The load in words."""
        if self.concurrency:
            return f"concurrency {self.concurrency}"
        return f"{self.request_rate:g} requests/s" if self.request_rate else "all at once"


@dataclass(frozen=True)
class MeasuredFile:
    """A file of measured runs and the digest of its bytes."""

    name: str
    sha256: str
    runs: tuple[Measurement, ...]


def read_measurements(path: str) -> MeasuredFile:
    """Measured runs of one file.

    Raises
    ------
    InputError
        If the file cannot be read, or is none of the formats, or a run in it says too little.

    """
    from planner.io.measurements_csv import read_csv

    data = read_bytes(Path(path), source=path)
    text = decode(data, source=path)
    runs = _read_json(text, path) if text.lstrip()[:1] in ("{", "[") else read_csv(text, path)
    if not runs:
        raise _bad(path, "", NO_VALUE, "holds no measured run")
    return MeasuredFile(Path(path).name, hashlib.sha256(data).hexdigest(), tuple(runs))


def _read_json(text: str, source: str) -> list[Measurement]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad(source, "", NO_VALUE, f"is not JSON ({error})") from None
    if isinstance(document, dict):
        if isinstance(document.get("benchmarks"), list):
            return [
                _guidellm(_Fields(entry, f"{source}: benchmarks.{i}"))
                for i, entry in enumerate(document["benchmarks"])
            ]
        if "time_to_first_token" in document or "inter_token_latency" in document:
            return [_aiperf(_Fields(document, source))]
        if "mean_ttft_ms" in document or "mean_tpot_ms" in document:
            return [_vllm(_Fields(document, source))]
    raise _bad(source, "", NO_VALUE, f"is no benchmark output known here: {_READS}")


class _Fields:
    """A JSON mapping whose numbers are checked as they are read."""

    def __init__(self, data: Any, source: str) -> None:
        if not isinstance(data, dict):
            raise _bad(source, "", NO_VALUE, "must be a mapping")
        self.data, self.source = data, source

    def get(self, path: str) -> Any:
        """What lies under a dotted path, or ``None``."""
        found: Any = self.data
        for key in path.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def number(self, *paths: str) -> float | None:
        """The first of these paths that holds something, as a number; ``None``: none does."""
        for path in paths:
            value = self.get(path)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise _bad(self.source, path, value, "must be a number")
            return float(value)
        return None

    def need(self, *paths: str) -> float:
        """The same, where a run without it says too little."""
        value = self.number(*paths)
        if value is None or not math.isfinite(value):
            raise _bad(self.source, paths[0], NO_VALUE, "is missing")
        return value

    def metrics(self, paths: Mapping[str, str], factors: Mapping[str, float]) -> dict[str, float]:
        """Metrics by name, from one path each, times a factor where the unit is another."""
        found = {name: self.number(path) for name, path in paths.items()}
        return {
            name: value * factors.get(name, 1.0)
            for name, value in found.items()
            if value is not None and value != 0
        }


def _vllm(run: _Fields) -> Measurement:
    completed = int(run.need("completed", "num_prompts"))
    rate_text = run.get("request_rate")
    rate = 0.0 if rate_text in (None, "inf") else run.need("request_rate")
    rate = rate if math.isfinite(rate) else 0.0
    concurrency = int(run.number("max_concurrency") or 0)
    if rate and concurrency:
        rule = "limits an open loop (request_rate is finite): measure with one of the two"
        raise _bad(run.source, "max_concurrency", concurrency, rule)
    notes: list[str] = []
    lengths = {}
    for name, total in (("input", "total_input_tokens"), ("output", "total_output_tokens")):
        each = run.get(f"{name}_lens")
        if isinstance(each, list) and len(each) == completed and all(_is_count(n) for n in each):
            lengths[name] = Lengths(min(each), max(each), tuple(each))
            continue
        mean = round(run.need(total) / max(completed, 1))
        lengths[name] = Lengths(mean, mean)
        notes.append(f"{name} lengths fixed at their mean ({mean}): --save-detailed states each")
    return Measurement(
        source=run.source,
        plan="",
        concurrency=concurrency,
        request_rate=rate,
        burstiness=run.number("burstiness") or 1.0,
        num_requests=completed,
        prompt=lengths["input"],
        output=lengths["output"],
        metrics=run.metrics({name: name for name in METRICS}, {}),
        notes=tuple(notes),
    )


def _aiperf(run: _Fields) -> Measurement:
    loadgen = "input_config.loadgen"
    concurrency = run.number(
        f"{loadgen}.concurrency",
        "input_config.perf_analyzer.stimulus.concurrency",
        "input_config.concurrency",
    )
    rate = run.number(
        f"{loadgen}.request_rate",
        "input_config.perf_analyzer.stimulus.request_rate",
        "input_config.request_rate",
    )
    if not concurrency and not rate:
        rule = "states neither concurrency nor request_rate"
        raise _bad(run.source, "input_config", NO_VALUE, rule)
    requests = run.number("request_count.avg")
    if requests is None:
        requests = run.need(f"{loadgen}.request_count")
    return Measurement(
        source=run.source,
        plan="",
        concurrency=0 if rate else int(concurrency or 0),
        request_rate=rate or 0.0,
        num_requests=int(requests),
        prompt=_range_of(run, "input_sequence_length"),
        output=_range_of(run, "output_sequence_length"),
        metrics=run.metrics(
            {
                "mean_ttft_ms": "time_to_first_token.avg",
                "mean_tpot_ms": "inter_token_latency.avg",
                "mean_e2el_ms": "request_latency.avg",
                "output_throughput": "output_token_throughput.avg",
            },
            {},
        ),
    )


def _range_of(run: _Fields, name: str) -> Lengths:
    """A length that aiperf sums up: its range where that is centred on the mean, else the mean."""
    mean = run.need(f"{name}.avg")
    low, high = run.number(f"{name}.min") or mean, run.number(f"{name}.max") or mean
    return spread(mean, low, high)


def _guidellm(run: _Fields) -> Measurement:
    kind, strategy = "", ""
    for strategy in ("config.strategy", "args.strategy", "scheduler.strategy"):
        kind = run.get(f"{strategy}.type_") or ""
        if kind:
            break
    concurrency, rate = 0, 0.0
    if kind == "synchronous":
        concurrency = 1
    elif kind == "concurrent":
        concurrency = int(run.need(f"{strategy}.streams", f"{strategy}.max_concurrency"))
    elif kind == "poisson":
        rate = run.need(f"{strategy}.rate")
    elif kind != "throughput":
        rule = "must be synchronous, concurrent, poisson or throughput"
        raise _bad(run.source, "config.strategy.type_", kind or NO_VALUE, rule)
    done = "metrics.{}.successful.{}".format
    requests = run.number("metrics.request_totals.successful", done("request_latency", "count"))
    if requests is None:
        raise _bad(run.source, "metrics.request_totals.successful", NO_VALUE, "is missing")
    lengths = [
        spread(
            run.need(done(name, "mean")),
            run.number(done(name, "min")) or 0.0,
            run.number(done(name, "max")) or 0.0,
        )
        for name in ("prompt_token_count", "output_token_count")
    ]
    return Measurement(
        source=run.source,
        plan="",
        concurrency=concurrency,
        request_rate=rate,
        num_requests=int(requests),
        prompt=lengths[0],
        output=lengths[1],
        metrics=run.metrics(
            {
                "mean_ttft_ms": done("time_to_first_token_ms", "mean"),
                "mean_tpot_ms": done("inter_token_latency_ms", "mean"),
                "mean_e2el_ms": done("request_latency", "mean"),
                "output_throughput": done("output_tokens_per_second", "mean"),
            },
            {"mean_e2el_ms": MS_PER_S},
        ),
    )


_CENTRED: Final = 0.05
"""How far the middle of a range may lie from the mean for the range to be taken as evenly filled;
beyond it lengths have a shape that nobody stated, and the mean alone stands for them."""


def spread(mean: float, low: float, high: float) -> Lengths:
    """Lengths of which mean, least and most are known, tokens."""
    if 0 < low <= mean <= high and abs((low + high) / 2 - mean) <= _CENTRED * mean:
        return Lengths(max(round(low), 1), max(round(high), 1))
    return Lengths(max(round(mean), 1), max(round(mean), 1))


def drawn(lengths: Lengths, num_requests: int, rng: np.random.Generator) -> Any:
    """(N,) tokens of every request: as stated, or drawn evenly from the range."""
    if lengths.each:
        return np.array(lengths.each, np.int64)
    return rng.integers(lengths.low, lengths.high + 1, num_requests).astype(np.int64)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _bad(source: str, where: str, value: object, rule: str) -> InputError:
    return InputError(source=source, field=where, value=value, rule=rule)
