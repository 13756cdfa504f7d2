"""From an engine's command line back to the plan."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from planner.errors import NO_VALUE, InputError
from simulator.plan import BatchingLimits, Plan, Shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SOURCE: Final = "command"

_ALIASES: Final[Mapping[str, Mapping[str, str]]] = {
    "vllm": {
        "-tp": "tensor-parallel-size",
        "-pp": "pipeline-parallel-size",
        "-dp": "data-parallel-size",
        "-ep": "enable-expert-parallel",
    },
    "sglang": {
        "--tensor-parallel-size": "tp-size",
        "--tp": "tp-size",
        "--pipeline-parallel-size": "pp-size",
        "--pp": "pp-size",
        "--data-parallel-size": "dp-size",
        "--dp": "dp-size",
        "--expert-parallel-size": "ep-size",
        "--ep": "ep-size",
    },
    "trtllm": {
        "--tensor_parallel_size": "tp-size",
        "--pipeline_parallel_size": "pp-size",
        "--moe_expert_parallel_size": "ep-size",
    },
}
"""Other spellings of a flag in the engines' own parsers (the sources named in `flags`)."""

_LIMITS: Final[Mapping[str, tuple[str, str]]] = {
    "vllm": ("max-num-seqs", "max-num-batched-tokens"),
    "sglang": ("max-running-requests", "chunked-prefill-size"),
    "trtllm": ("max-batch-size", "max-num-tokens"),
}
_STAGES: Final = ("VLLM_PP_LAYER_PARTITION", "SGLANG_PP_LAYER_PARTITION")


@dataclass(frozen=True)
class Launch:
    """What a set of commands starts."""

    engine: str
    model: str
    plan: Plan


@dataclass(frozen=True)
class _Command:
    """One command: engine, model, flags by name, variables, and options of its file."""

    engine: str
    model: str
    flags: Mapping[str, str]
    environment: Mapping[str, str]
    options: Mapping[str, Any]


def read_launch(commands: Sequence[str], defaults: BatchingLimits) -> Launch:
    """The plan that ``commands`` start, one command a replica or, for SGLang, a node of one.

    Parameters
    ----------
    commands
        Lines of a shell.
    defaults
        The engine's own limits, for flags that are left out.

    Raises
    ------
    InputError
        When a line starts no engine known here, or the lines start different replicas.

    """
    parsed = [_parse(line) for line in commands]
    if not parsed:
        raise _error("", "is empty")
    replicas = {(c.engine, c.model, _shape(c), _limits(c, defaults)) for c in parsed}
    if len(replicas) > 1:
        raise _error(commands[-1], "starts another replica than the first command")
    ((engine, model, shape, limits),) = replicas
    nodes = int(parsed[0].flags.get("nnodes", "1"))
    if len(parsed) % nodes:
        raise _error(commands[-1], f"is one of {len(parsed)}; a replica takes {nodes}")
    return Launch(engine, model, Plan(len(parsed) // nodes, shape, limits))


def _parse(line: str) -> _Command:
    """One command, its options file and variables included."""
    options: Mapping[str, Any] = {}
    try:
        words = shlex.split(line)
        if words[:1] == ["echo"] and "&&" in words:
            options = json.loads(words[1])
            words = words[words.index("&&") + 1 :]
    except ValueError as error:
        raise _error(line, f"is no shell command ({error})") from None
    environment = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    if words[:2] == ["vllm", "serve"]:
        engine, rest = "vllm", words[2:]
    elif "sglang.launch_server" in words[:3]:
        engine, rest = "sglang", words[words.index("sglang.launch_server") + 1 :]
    elif words[:1] == ["trtllm-serve"]:
        engine, rest = "trtllm", words[1:]
    else:
        rule = "starts none of vllm serve, sglang.launch_server, trtllm-serve"
        raise _error(line, rule)
    flags, places = _flags(engine, rest)
    model = flags.get("model-path", places[0] if places else "")
    if not model:
        raise _error(line, "names no model")
    return _Command(engine, model, flags, environment, options)


def _flags(engine: str, words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Flags by name, a switch with an empty value, and the words that belong to no flag."""
    flags: dict[str, str] = {}
    places: list[str] = []
    open_flag = None
    for word in words:
        if re.match(r"--?[a-zA-Z]", word):
            name, equals, value = word.partition("=")
            spelling = _ALIASES[engine].get(name, name.lstrip("-"))
            name = spelling.replace("_", "-")
            flags[name] = value
            open_flag = None if equals else name
        elif open_flag is not None:
            flags[open_flag], open_flag = word, None
        else:
            places.append(word)
    return flags, places


def _shape(command: _Command) -> Shape:
    """The shape that a command's flags describe."""
    flags = command.flags
    layers = [
        int(part)
        for name in _STAGES
        for part in command.environment.get(name, "").split(",")
        if part
    ]
    stages = tuple(layers or command.options.get("pp_partition", ()))
    try:
        if command.engine == "vllm":
            tp, dp = _size(flags, "tensor-parallel-size"), _size(flags, "data-parallel-size")
            ep = tp * dp if "enable-expert-parallel" in flags else 1
            return Shape(tp, _size(flags, "pipeline-parallel-size"), dp, ep, stages)
        width = _size(flags, "tp-size")
        dp = 1
        if "enable-dp-attention" in flags:
            dp = _size(flags, "dp-size")
        elif command.options.get("enable_attention_dp"):
            dp = width
        if width % dp:
            raise ValueError(f"tp size {width} does not divide by attention's data parallel {dp}")
        ep = width if "enable-ep-moe" in flags else _size(flags, "ep-size")
        return Shape(width // dp, _size(flags, "pp-size"), dp, ep, stages)
    except ValueError as error:
        raise _error(command.model, f"has sizes that make no plan: {error}") from None


def _limits(command: _Command, defaults: BatchingLimits) -> BatchingLimits:
    """The limits that a command's flags set."""
    seqs, tokens = _LIMITS[command.engine]
    chunk = command.flags.get(tokens, "")
    return BatchingLimits(
        _size(command.flags, seqs, defaults.max_num_seqs),
        # SGLang's -1 switches chunking off and leaves the plan's budget unsaid.
        defaults.max_num_batched_tokens
        if chunk == "-1"
        else _size(command.flags, tokens, defaults.max_num_batched_tokens),
    )


def _size(flags: Mapping[str, str], name: str, default: int = 1) -> int:
    text = flags.get(name)
    if text is None:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise _error(f"{name} {text}", "must be a whole number of at least 1")
    return int(text)


def _error(value: str, rule: str) -> InputError:
    return InputError(source=_SOURCE, field="", value=value or NO_VALUE, rule=rule)
