"""Model shapes from a checkpoint's ``config.json`` or from the bundled catalogue.

Field names are those of Hugging Face transformers. A family is supported when everything about
it that time and memory depend on fits a :class:`~simulator.model.ModelShape`; all others are
refused, because a shape read halfway gives a confident wrong plan.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Final

from planner.errors import NO_VALUE, InputError, nearest
from planner.io.yaml_file import read_text
from simulator.model import ModelShape

FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` that are read."""

QUANT_METHODS: Final = ("fp8",)
"""Values of ``quantization_config.quant_method`` that are read."""

_EXPERT_FIELDS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

_REQUIRED: Final = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)

_MAX_SIZE: Final = 2**31 - 1


def read_model(
    config: str,
    *,
    base_dir: str | os.PathLike[str] = ".",
    weight_dtype: str | None = None,
    kv_cache_dtype: str = "auto",
    max_model_len: int | None = None,
    source: str = "<scenario>",
) -> ModelShape:
    """Read the shape of a model.

    Parameters
    ----------
    config
        Catalogue name (the part after the ``/`` is enough), or path to a ``config.json`` or to
        the folder that holds it. What ends in ``.json`` or starts with ``.``, ``/`` or ``~`` is
        a path; of the rest, the catalogue comes first.
    base_dir
        Folder that a relative path starts from.
    weight_dtype
        ``bf16``, ``fp8``, or ``None`` for the checkpoint's own.
    kv_cache_dtype
        ``bf16``, ``fp8``, or ``auto`` for the engine's choice, bf16 for these models.
    max_model_len
        Longest request to be served, tokens; ``None`` for the checkpoint's own limit. It only
        decides whether a sliding window matters.
    source
        Name of the scenario in error messages.

    Returns
    -------
    ModelShape
        The shape, with dtypes resolved.

    Raises
    ------
    InputError
        When the model is unknown, its file cannot be read, or it is of a kind not supported.

    """
    kv_dtype = "bf16" if kv_cache_dtype == "auto" else kv_cache_dtype
    path = _config_path(config, Path(base_dir))
    if path is None:
        entry = _catalogue().get(config.lower())
        if entry is None:
            raise _unknown_name(config, source)
        shape = {k: v for k, v in entry.items() if k not in ("aliases", "source")}
        return ModelShape(**shape, weight_dtype=weight_dtype or "bf16", kv_dtype=kv_dtype)
    file_name = config if config.endswith(".json") else f"{config.rstrip('/')}/config.json"
    reader = _Reader(_read_json(path, source=file_name), file_name)
    reader.check_family()
    reader.check_quantization_sidecar(path)
    shape = reader.shape()
    reader.check_sliding_window(max_model_len or shape["max_position_embeddings"])
    return ModelShape(
        name=_display_name(config),
        **shape,
        weight_dtype=reader.weight_dtype(weight_dtype, scenario=source),
        kv_dtype=kv_dtype,
    )


def catalogue_names() -> list[str]:
    """Names in the bundled catalogue, aliases included, sorted."""
    return sorted(name for entry in _entries() for name in (entry["name"], *entry["aliases"]))


@lru_cache(maxsize=1)
def _entries() -> list[dict[str, Any]]:
    """Entries of the catalogue file."""
    file = resources.files("profiles") / "models" / "catalogue.json"
    models: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["models"]
    return models


@lru_cache(maxsize=1)
def _catalogue() -> dict[str, dict[str, Any]]:
    """Catalogue by lower-case name, full and without the organisation."""
    table: dict[str, dict[str, Any]] = {}
    for entry in _entries():
        for name in (entry["name"], *entry["aliases"]):
            named = {**entry, "name": name}
            table[name.lower()] = table[name.lower().rpartition("/")[2]] = named
    return table


def _config_path(config: str, base_dir: Path) -> Path | None:
    """Path that ``config`` stands for, or ``None`` where it is a name."""
    path = base_dir / os.path.expanduser(config)
    if config.endswith(".json"):
        return path
    in_folder = path / "config.json"
    if config.startswith((".", "/", "~")):
        return in_folder
    if config.lower() not in _catalogue() and os.path.isfile(in_folder):
        return in_folder
    return None


def _display_name(config: str) -> str:
    """Name of a model read from a path: its folder or file, never the machine's path."""
    path = Path(config)
    stem = path.parent.name if path.name == "config.json" else path.name.removesuffix(".json")
    return stem or "config.json"


def _unknown_name(config: str, source: str) -> InputError:
    """Error for a name that the catalogue does not have."""
    names = catalogue_names()
    by_short = {name.rpartition("/")[2]: name for name in names}
    close = nearest(config, names) or by_short.get(
        nearest(config.rpartition("/")[2], by_short) or ""
    )
    hint = f"did you mean {close!r}?" if close else "see `planner list`"
    rule = f"is not in the model catalogue; {hint} (a path to a config.json works too)"
    return InputError(source=source, field="model.config", value=config, rule=rule)


def _read_json(path: Path, *, source: str) -> dict[str, Any]:
    """Read a JSON file whose top level is an object."""
    try:
        data = json.loads(read_text(path, source=source))
    except json.JSONDecodeError as error:
        where = f"{source}:{error.lineno}:{error.colno}"
        raise InputError(
            source=where, field="", value=NO_VALUE, rule=f"JSON: {error.msg}"
        ) from None
    except (ValueError, RecursionError) as error:
        rule = f"JSON: cannot be read ({error})"
        raise InputError(source=source, field="", value=NO_VALUE, rule=rule) from None
    if not isinstance(data, dict):
        raise InputError(source=source, field="", value=data, rule="must be a JSON object")
    return data


class _Reader:
    """One parsed ``config.json`` and the rules that it must meet.

    Parameters
    ----------
    data
        The parsed file.
    source
        Its name in error messages.

    """

    def __init__(self, data: dict[str, Any], source: str) -> None:
        self.data = data
        self.source = source

    def error(self, field: str, rule: str, value: object = NO_VALUE) -> InputError:
        """Error about one field of the file."""
        return InputError(source=self.source, field=field, value=value, rule=rule)

    def check_family(self) -> None:
        """Refuse families that do not fit the shape."""
        supported = f"supported model types: {', '.join(FAMILIES)}"
        for field in _EXPERT_FIELDS:
            if self.data.get(field):
                rule = f"mixtures of experts are not supported yet; {supported}"
                raise self.error(field, rule)
        if "model_type" not in self.data:
            raise self.error("model_type", f"required field is missing; {supported}")
        model_type = self.data["model_type"]
        if model_type not in FAMILIES:
            raise self.error("model_type", f"is not supported; {supported}", model_type)

    def check_quantization_sidecar(self, path: Path) -> None:
        """Refuse a checkpoint whose quantisation is stated in a file beside its config."""
        if os.path.isfile(path.parent / "hf_quant_config.json"):
            rule = "lies beside hf_quant_config.json, a quantisation that is not supported"
            raise self.error("", f"{rule}; supported: {', '.join(QUANT_METHODS)}")

    def shape(self) -> dict[str, Any]:
        """Fields of :class:`ModelShape` other than its name and dtypes."""
        missing = [field for field in _REQUIRED if self.data.get(field) is None]
        if missing:
            raise self.error("", f"required fields are missing: {', '.join(missing)}")
        hidden = self._size("hidden_size")
        heads = self._size("num_attention_heads")
        kv_heads = self._size("num_key_value_heads", default=heads)
        if heads % kv_heads:
            rule = f"must be a multiple of num_key_value_heads ({kv_heads})"
            raise self.error("num_attention_heads", rule, heads)
        if self.data.get("head_dim") is None and hidden % heads:
            rule = (
                f"must be a multiple of num_attention_heads ({heads}) where head_dim is not given"
            )
            raise self.error("hidden_size", rule, hidden)
        family = self.data["model_type"]
        return {
            "num_layers": self._size("num_hidden_layers"),
            "hidden_size": hidden,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": self._size("head_dim", default=hidden // heads),
            "intermediate_size": self._size("intermediate_size"),
            "vocab_size": self._size("vocab_size"),
            "tie_word_embeddings": self._flag("tie_word_embeddings"),
            # Qwen2's biases are in its code, not in its config.
            "qkv_bias": family == "qwen2" or self._flag("attention_bias"),
            "qk_norm": family == "qwen3",
            "max_position_embeddings": self._longest_context(),
        }

    def weight_dtype(self, asked: str | None, *, scenario: str) -> str:
        """Dtype of the projections: the one asked for, if the checkpoint allows it."""
        own = self._checkpoint_dtype()
        if own == "fp8" and asked not in (None, "fp8"):
            rule = f"contradicts {self.source}, whose weights are stored in fp8: leave it out"
            raise InputError(source=scenario, field="model.weight_dtype", value=asked, rule=rule)
        return asked or own

    def _checkpoint_dtype(self) -> str:
        """``fp8`` or ``bf16``, from the quantisation that the config states."""
        supported = f"supported: {', '.join(QUANT_METHODS)}"
        if self.data.get("compression_config"):
            raise self.error("compression_config", f"quantisation is not supported; {supported}")
        quantization = self.data.get("quantization_config")
        if quantization is None:
            return "bf16"
        if not isinstance(quantization, dict):
            raise self.error("quantization_config", "must be an object", quantization)
        method = quantization.get("quant_method")
        if method not in QUANT_METHODS:
            rule = f"quantisation is not supported; {supported}"
            raise self.error("quantization_config.quant_method", rule, method)
        for field in ("modules_to_not_convert", "ignored_layers"):
            modules = quantization.get(field) or []
            for module in modules if isinstance(modules, list) else [modules]:
                # Embedding, head and norms are bf16 in any case; a projection would not be.
                if not any(part in str(module) for part in ("lm_head", "embed", "norm")):
                    rule = "is left unquantised; only embedding, head and norms may be"
                    raise self.error(f"quantization_config.{field}", rule, module)
        return "fp8"

    def check_sliding_window(self, max_model_len: int) -> None:
        """Refuse a sliding window that shortens attention for requests up to ``max_model_len``."""
        layer_types = self.data.get("layer_types") or []
        if not isinstance(layer_types, list):
            raise self.error("layer_types", "must be a list", layer_types)
        if self.data["model_type"] == "mistral":
            window = self._size("sliding_window", default=max_model_len)
            if window < max_model_len:
                rule = (
                    "is a sliding window, which is not modelled: "
                    f"set model.max_model_len to at most {window}"
                )
                raise self.error("sliding_window", rule, window)
        elif self._flag("use_sliding_window") or "sliding_attention" in layer_types:
            field = "use_sliding_window" if self.data.get("use_sliding_window") else "layer_types"
            raise self.error(field, "sliding-window attention is not modelled")

    def _longest_context(self) -> int:
        """Longest context that the engine derives from the config, tokens.

        As vLLM does it: yarn multiplies the length before scaling, linear and dynamic scaling
        multiply the stated length, and llama3's length is stated scaled already.
        """
        stated = self._size("max_position_embeddings")
        # transformers 5 nests the settings in rope_parameters; older files have rope_scaling.
        rope = self.data.get("rope_scaling") or self.data.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise self.error("rope_scaling", "must be an object", rope)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("linear", "dynamic", "yarn"):
            return stated
        factor = rope.get("factor", 1.0)
        if (
            isinstance(factor, bool)
            or not isinstance(factor, (int, float))
            or not 1 <= factor < 1e6
        ):
            raise self.error("rope_scaling.factor", "must be a number of at least 1", factor)
        if kind == "yarn":
            stated = rope.get("original_max_position_embeddings", stated)
            if type(stated) is not int or not 0 < stated <= _MAX_SIZE:
                field = "rope_scaling.original_max_position_embeddings"
                raise self.error(field, "must be a whole number greater than 0", stated)
        return int(stated * factor)

    def _size(self, field: str, *, default: int | None = None) -> int:
        """A positive whole number; ``default`` where the field is absent or null."""
        value = self.data.get(field)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value <= _MAX_SIZE:
            raise self.error(field, f"must be a whole number from 1 to {_MAX_SIZE}", value)
        return value

    def _flag(self, field: str) -> bool:
        """A truth value, false where the field is absent or null."""
        value = self.data.get(field)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.error(field, "must be true or false", value)
        return value
