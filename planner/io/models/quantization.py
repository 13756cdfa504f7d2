"""Which modules of a checkpoint are stored in which precision, from its quantisation settings.

Settings are those of transformers (``quantization_config.quant_method``), of compressed-tensors
and of NVIDIA ModelOpt (also in ``hf_quant_config.json``). Modules are named ``layers.3.mlp``
onward, without what a checkpoint puts before ``layers``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import translate
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from planner.io.models.fields import Fields

_PREFIXES: Final = ("model.", "language_model.", "backbone.")
_SPELLINGS: Final = ("model.", "language_model.model.", "model.language_model.", "backbone.", "")
"""What checkpoints put before ``layers``."""

_BLOCK: Final = [128, 128]
"""The one block of weights per scale that engines have fast kernels for (DeepSeek-V3)."""


class Patterns:
    """Names of modules, as exclusion and target lists give them.

    A plain name stands for every module that has it as a run of whole parts, ``re:`` for a
    regular expression from the name's start, ``*`` for a wildcard.
    """

    def __init__(self, fields: Fields, field: str, texts: Iterable[str]) -> None:
        self._plain: set[str] = set()
        self._regexes: list[re.Pattern[str]] = []
        globs = []
        for text in texts:
            if text.startswith("re:"):
                try:
                    self._regexes.append(re.compile(text[3:]))
                except (re.error, RecursionError, OverflowError):
                    raise fields.error(field, "is not a regular expression", text) from None
            elif "*" in text:
                globs += [translate(text), translate(f"{text}.*")]
            else:
                self._plain.add(_without_prefix(text))
        if globs:
            self._regexes.append(re.compile("|".join(globs)))

    def match(self, module: str) -> bool:
        """Whether any pattern stands for ``module``."""
        parts = module.split(".")
        runs = (
            ".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)
        )
        if self._plain and any(run in self._plain for run in runs):
            return True
        names = [prefix + module for prefix in _SPELLINGS]
        return any(regex.match(name) for regex in self._regexes for name in names)


def _without_prefix(text: str) -> str:
    while text.startswith(_PREFIXES):
        text = text.partition(".")[2]
    return text


@dataclass(frozen=True)
class Group:
    """Modules that share a precision; ``targets`` of ``None`` are all linear ones."""

    dtype: str
    targets: Patterns | None = None


@dataclass(frozen=True)
class Quantization:
    """How the linear modules of a checkpoint's layers are stored.

    Parameters
    ----------
    dtype_name
        Precision of the quantised modules, ``bf16`` where there are none.
    groups
        The first group that a module belongs to gives its precision.
    ignored
        Modules left in bf16.
    fields, field
        Where the list of ignored modules stands, for error messages.
    has_kv_dtype
        Whether the checkpoint also states a dtype for the KV cache.

    """

    dtype_name: str = "bf16"
    groups: tuple[Group, ...] = ()
    ignored: Patterns | None = None
    fields: Fields | None = None
    field: str = ""
    has_kv_dtype: bool = False

    def dtype(self, part: str, modules: tuple[str, ...]) -> str:
        """Precision of the ``modules`` of ``part``, which must agree on it."""
        found = {module: self._module(f"{part}.{module}") for module in modules}
        first = found[modules[0]]
        for module, dtype in found.items():
            if dtype != first and self.fields:
                rule = (
                    f"stores {part}.{modules[0]} in {first} and {module} in {dtype}; "
                    "precisions within one attention or feed-forward part must be equal"
                )
                raise self.fields.error(self.field, rule)
        return first

    def _module(self, name: str) -> str:
        if self.ignored is not None and self.ignored.match(name):
            return "bf16"
        for group in self.groups:
            if group.targets is None or group.targets.match(name):
                return group.dtype
        return "bf16"


def quantized_on_load(dtype: str) -> Quantization:
    """Every linear module of the layers in ``dtype``: what an engine does to a bf16 checkpoint."""
    return Quantization(dtype, (Group(dtype),) if dtype != "bf16" else ())


def read_quantization(settings: Fields) -> Quantization:
    """Quantisation that a ``quantization_config`` or ``hf_quant_config.json`` object states."""
    default = "modelopt" if settings.has("quant_algo") else ""
    method = settings.word("quant_method", default)
    reader = _METHODS.get(method)
    if reader is None:
        rule = f"quantisation is not supported; supported: {', '.join(_METHODS)}"
        raise settings.error("quant_method", rule, method or None)
    return reader(settings)


def _quantization(
    settings: Fields, groups: tuple[Group, ...], *ignore_fields: str, has_kv_dtype: bool = False
) -> Quantization:
    field = next((f for f in ignore_fields if settings.has(f)), ignore_fields[0])
    ignored = Patterns(settings, field, settings.texts(field))
    return Quantization(groups[0].dtype, groups, ignored, settings, field, has_kv_dtype)


def _fp8(settings: Fields) -> Quantization:
    block = settings.data.get("weight_block_size")
    if block not in (None, _BLOCK):
        raise settings.error("weight_block_size", f"must be {_BLOCK} or absent", block)
    group = Group("fp8" if block is None else "fp8_block")
    return _quantization(settings, (group,), "modules_to_not_convert", "ignored_layers")


def _mxfp4(settings: Fields) -> Quantization:
    # vLLM's Mxfp4Config quantises expert layers only (layers/quantization/mxfp4.py).
    group = Group("mxfp4", Patterns(settings, "", ["experts"]))
    return _quantization(settings, (group,), "modules_to_not_convert")


def _int4(settings: Fields) -> Quantization:
    settings.refuse("dynamic", "rules per module are not supported")
    bits = settings.size("bits")
    if bits != 4:
        raise settings.error("bits", "must be 4", bits)
    dtype = _int4_name(settings, "group_size")
    return _quantization(settings, (Group(dtype),), "modules_to_not_convert")


def _int4_name(settings: Fields, field: str) -> str:
    names = {128: "int4", 32: "int4_g32"}
    size = settings.size(field, low=-1)
    if size not in names:
        raise settings.error(field, "must be 32 or 128", size)
    return names[size]


def _compressed_tensors(settings: Fields) -> Quantization:
    groups = []
    names = settings.section("config_groups").data
    for name in names:
        group = settings.section("config_groups").section(name)
        targets = group.texts("targets")
        everything = "Linear" in targets or not targets
        patterns = None if everything else Patterns(group, "targets", targets)
        groups.append(Group(_compressed_dtype(group), patterns))
    if not groups:
        raise settings.error("config_groups", "required field is missing")
    return _quantization(
        settings, tuple(groups), "ignore", has_kv_dtype=settings.has("kv_cache_scheme")
    )


def _compressed_dtype(group: Fields) -> str:
    """Precision of one group of compressed-tensors."""
    weights = group.section("weights")
    kind = (
        weights.word("type", "int"),
        weights.size("num_bits"),
        weights.word("strategy", "tensor"),
        group.has("input_activations"),
    )
    if kind == ("int", 4, "group", False):
        return _int4_name(weights, "group_size")
    if kind == ("float", 8, "block", True) and weights.data.get("block_structure") == _BLOCK:
        return "fp8_block"
    name = _COMPRESSED.get(kind)
    if name is None:
        shown = f"{kind[0]}{kind[1]} per {kind[2]}" + ("" if kind[3] else ", weights only")
        raise weights.error("", f"{shown} is not a supported precision")
    return name


_COMPRESSED: Final[dict[tuple[str, int, str, bool], str]] = {
    ("float", 8, "tensor", True): "fp8",
    ("float", 8, "channel", True): "fp8",
    ("int", 8, "tensor", True): "int8",
    ("int", 8, "channel", True): "int8",
    ("float", 4, "tensor_group", True): "nvfp4",
}
"""Type, bits, one scale per what, whether activations are quantised too."""


def _modelopt(settings: Fields) -> Quantization:
    algorithm = settings.word("quant_algo")
    dtype = _MODELOPT.get(algorithm)
    if dtype is None:
        rule = f"is not supported; supported: {', '.join(_MODELOPT)}"
        raise settings.error("quant_algo", rule, algorithm)
    has_kv = settings.has("kv_cache_quant_algo") or settings.has("kv_cache_scheme")
    return _quantization(
        settings, (Group(dtype),), "ignore", "exclude_modules", has_kv_dtype=has_kv
    )


_MODELOPT: Final = {
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8",
    "FP8_PB_WO": "fp8_block",
    "NVFP4": "nvfp4",
}

_METHODS: Final[dict[str, Callable[[Fields], Quantization]]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "mxfp4": _mxfp4,
    "awq": _int4,
    "gptq": _int4,
}
