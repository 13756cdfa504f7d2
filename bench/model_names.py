"""From the names that public tables use to a model of the catalogue and its precisions.

Tables say ``LLaMA v3.1 70B``, ``nvidia/Llama-3.3-70B-Instruct-FP8`` or ``Mixtral 8x7B``. A name is
read as a set of words: family, generation, size. It stands for a catalogue name that has all of
these words and, beside them, only words that change no shape (``Instruct``, a date). No name is
listed here: a new model needs only its entry in the catalogue.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from bench.uncovered import UncoveredError
from planner.io.models import catalogue

_NOISE: Final = frozenset(
    ("v", "meta", "instruct", "chat", "hf", "it", "pt", "base", "thinking", "of", "model", "zero")
)
"""Words that change no shape: who published it, and what it was tuned for."""

_WORD: Final = re.compile(
    r"\d+x\d+(?:\.\d+)?b"  # experts times size: 8x7b
    r"|[ae]?\d+(?:\.\d+)?[bm](?![a-z])"  # size, or active size: 70b, a22b
    r"|\d+(?:\.\d+)*"  # generation or date: 3.1, 2507
    r"|[a-z]+"
)
_DATE: Final = re.compile(r"\d{4}|\d{6}|\d{8}")
_ACTIVE: Final = re.compile(r"a\d+(\.\d+)?b")
_OPTIONAL_GENERATION: Final = re.compile(r"\d+\.\d+")

_SUFFIXES: Final = (
    (r"(w4a16|awq|gptq|int4|4bit)", "int4"),
    (r"(quantized\.)?w8a8|int8", "int8"),
    (r"mxfp4", "mxfp4"),
    (r"(nv)?fp4", "nvfp4"),
    (r"fp8", "fp8"),
    (r"bf16|bfloat16|fp16|float16", "bf16"),
)
"""Precisions that a checkpoint's name may end in, and ours for them."""

_SUFFIX: Final = re.compile(
    r"[-_ ]+(?:"
    + "|".join(f"(?P<p{i}>{pattern})" for i, (pattern, _) in enumerate(_SUFFIXES))
    + r")(?:[-_ ]*(?:dynamic|block|kv|int4|g\d+|marlin|v\d+))*$",
    re.IGNORECASE,
)

_PRECISIONS: Final = {
    "": "",
    "?": "",
    "as-published": "",
    "as published": "",
    "unknown": "",
    "none": "",
    "auto": "",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "bf16",
    "float16": "bf16",
    "half": "bf16",
    "fp16/bf16": "bf16",
    "bf16/fp16": "bf16",
    "16": "bf16",
    "w16a16": "bf16",
    "fp8": "fp8",
    "fp8_e4m3": "fp8",
    "e4m3": "fp8",
    "w8a8-fp8": "fp8",
    "w8a8_fp8": "fp8",
    "fp8-dynamic": "fp8",
    "fp8_block": "fp8_block",
    "fp8-block": "fp8_block",
    "block-fp8": "fp8_block",
    "fp8_blockwise": "fp8_block",
    "fp4": "nvfp4",
    "nvfp4": "nvfp4",
    "w4a4": "nvfp4",
    "mxfp4": "mxfp4",
    "int4": "int4",
    "awq": "int4",
    "gptq": "int4",
    "w4a16": "int4",
    "int8": "int8",
    "w8a8": "int8",
}
"""Precision names of public tables; 16-bit floats of either kind take the same time and room."""

_BLOCK_FP8_PUBLISHERS: Final = frozenset(("qwen", "deepseek-ai", "minimaxai", "zai-org"))
"""Makers whose own ``-FP8`` checkpoints scale blocks of 128 x 128 (their ``config.json``); those of
NVIDIA and Red Hat scale tensors or channels."""

_SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "fp8": {"quant_method": "fp8"},
    "fp8_block": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4"},
    # NVIDIA's checkpoints of mixture models leave attention in 16 bits (hf_quant_config.json of
    # nvidia/DeepSeek-R1-FP4 and nvidia/Qwen3-235B-A22B-FP4 exclude self_attn).
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["self_attn"]},
    "int4": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "int8": {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "group_0": {
                "weights": {"type": "int", "num_bits": 8, "strategy": "channel"},
                "input_activations": {"num_bits": 8},
                "targets": ["Linear"],
            }
        },
    },
}
"""``quantization_config`` of a checkpoint stored in each precision."""


@dataclass(frozen=True)
class Checkpoint:
    """A catalogue model stored in some precision.

    Parameters
    ----------
    name
        Name in the catalogue.
    precision
        Precision of its projections as `simulator.precision.PRECISIONS` calls it, or empty for
        the catalogue's own.
    kv_cache_dtype
        ``auto``, ``bf16`` or ``fp8``.
    is_moe
        Whether it has experts.
    longest_tokens
        Context that a run used beyond the checkpoint's own, or 0.

    """

    name: str
    precision: str
    kv_cache_dtype: str
    is_moe: bool
    longest_tokens: int = 0

    def reaching(self, tokens: int) -> Checkpoint:
        """The same checkpoint, its context stretched to ``tokens`` where that is longer.

        Offline benchmarks build engines for lengths that the model was not trained for; time and
        memory do not care.
        """
        own = _config(self.name).get("max_position_embeddings", 0)
        own = own or _config(self.name).get("text_config", {}).get("max_position_embeddings", 0)
        return replace(self, longest_tokens=tokens) if tokens > own else self

    def section(self, max_model_len: int | None = None) -> dict[str, Any]:
        """The scenario's ``model`` section; its ``config`` is a name, or a file written for it.

        Parameters
        ----------
        max_model_len
            Longest request, tokens; ``None``: what the checkpoint supports.

        """
        own = not self.precision and not self.longest_tokens
        return {
            "config": self.name if own else str(_config_file(self)),
            "kv_cache_dtype": self.kv_cache_dtype,
            "max_model_len": max_model_len,
        }


def checkpoint_of(
    model: str,
    quantization: str = "",
    *,
    weight_dtype: str = "",
    kv_cache_dtype: str = "",
    checkpoint: str = "",
) -> Checkpoint:
    """The model that a row names and how it is stored.

    Parameters
    ----------
    model
        Name as published, with or without its organisation and precision.
    quantization
        The table's word for the precision; ``?``, ``as-published`` and nothing mean the
        checkpoint's own.
    weight_dtype
        A better-known precision of the weights, which then counts.
    kv_cache_dtype
        Dtype of the KV cache; nothing means the engine's choice.
    checkpoint
        Weights repository, whose name may state a precision where nothing else does.

    Raises
    ------
    UncoveredError
        If no catalogue entry or precision answers to the names.

    """
    name, named = _split_precision(model)
    entry = _find(name)
    if entry is None and checkpoint:
        entry = _find(_split_precision(checkpoint)[0])
    if entry is None:
        raise UncoveredError(f"model {model} is not in the catalogue")
    asked = (
        _precision(weight_dtype)
        or _precision(quantization)
        or _split_precision(checkpoint)[1]
        or named
    )
    own = _own_precision(entry)
    if asked == "fp8" and not weight_dtype:
        publisher = (checkpoint or model).partition("/")[0].lower()
        if own == "fp8_block" or publisher in _BLOCK_FP8_PUBLISHERS:
            asked = "fp8_block"
    if asked == "nvfp4" and own == "mxfp4":
        asked = "mxfp4"  # tables write fp4 for both
    kv = _precision(kv_cache_dtype)
    if kv not in ("", "bf16", "fp8"):
        raise UncoveredError(f"KV cache dtype {kv_cache_dtype}")
    text = json.dumps(entry["config"])
    is_moe = any(field in text for field in ("num_experts", "num_local_experts", "n_routed"))
    precision = "" if asked in ("", own) else asked
    return Checkpoint(entry["name"], precision, kv or "auto", is_moe)


def _precision(text: str) -> str:
    key = text.strip().lower()
    if key not in _PRECISIONS:
        raise UncoveredError(f"precision {text}")
    return _PRECISIONS[key]


def _split_precision(name: str) -> tuple[str, str]:
    """The name without its precision, and that precision or nothing."""
    match = _SUFFIX.search(name)
    if match is None:
        return name, ""
    found = next(i for i in range(len(_SUFFIXES)) if match[f"p{i}"])
    return name[: match.start()], _SUFFIXES[found][1]


def _own_precision(entry: catalogue.Entry) -> str:
    settings = entry["config"].get("quantization_config")
    if settings is None:
        return "bf16"
    method, algorithm = settings.get("quant_method"), settings.get("quant_algo")
    if method == "fp8" and settings.get("weight_block_size"):
        return "fp8_block"
    return str(method or algorithm).lower()


def _words(name: str) -> frozenset[str]:
    text = name.rpartition("/")[2].lower()
    text = re.sub(r"(?<=\d)_(?=\d)", ".", text)
    return frozenset(_WORD.findall(text)) - _NOISE


@lru_cache(maxsize=256)
def _find(name: str) -> catalogue.Entry | None:
    """Entry that ``name`` stands for: the exact name, or else the one with fewest extra words."""
    exact = catalogue.find(name)
    if exact is not None:
        return exact
    asked = _words(name)
    if not asked - _dates(asked):
        return None
    best: tuple[int, int] | None = None
    found = None
    for place, known in enumerate(_known_names()):
        words = _words(known)
        missing, extra = asked - words, words - asked
        if missing - _dates(missing) or not all(map(_is_optional, extra)):
            continue
        rank = (len(missing) + len(extra), place)
        if best is None or rank < best:
            best, found = rank, known
    return None if found is None else catalogue.find(found)


@lru_cache(maxsize=1)
def _known_names() -> tuple[str, ...]:
    """Names and aliases in the catalogue's order."""
    listed = catalogue.entries()
    return tuple(name for entry in listed for name in (entry["name"], *entry["aliases"]))


def _dates(words: frozenset[str]) -> frozenset[str]:
    return frozenset(word for word in words if _DATE.fullmatch(word))


def _is_optional(word: str) -> bool:
    """Whether a table may leave ``word`` of a full name out: date, active size, minor version."""
    return any(p.fullmatch(word) for p in (_DATE, _ACTIVE, _OPTIONAL_GENERATION))


def _config(name: str) -> dict[str, Any]:
    entry = catalogue.find(name)
    if entry is None:
        raise AssertionError(f"{name} came from the catalogue")
    config: dict[str, Any] = entry["config"]
    return config


@lru_cache(maxsize=256)
def _config_file(checkpoint: Checkpoint) -> Path:
    """A ``config.json`` of the catalogue's model with the precision and context asked for."""
    config = dict(_config(checkpoint.name))
    if checkpoint.precision:
        config.pop("quantization_config", None)
        if checkpoint.precision in _SETTINGS:
            config["quantization_config"] = _SETTINGS[checkpoint.precision]
    if checkpoint.longest_tokens:
        holder = config if "max_position_embeddings" in config else dict(config["text_config"])
        holder["max_position_embeddings"] = checkpoint.longest_tokens
        if holder is not config:
            config["text_config"] = holder
    text = json.dumps(config, sort_keys=True)
    # Named by content and by user, so that processes share the file and none finds it half written.
    folder = Path(tempfile.gettempdir()) / f"bench-checkpoints-{os.getuid()}"
    stem = checkpoint.name.rpartition("/")[2]
    path = folder / f"{stem}-{sha256(text.encode()).hexdigest()[:16]}" / "config.json"
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}")
        own.write_text(text, encoding="utf-8")
        own.replace(path)
    return path
