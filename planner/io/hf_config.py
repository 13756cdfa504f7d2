"""Model shapes from a checkpoint's ``config.json`` or from the bundled catalogue.

Field names are those of Hugging Face transformers. A family is supported when everything about
it that time and memory depend on fits a :class:`~simulator.model.ModelShape`; all others are
refused, because a shape read halfway gives a confident wrong plan. `planner/io/models/` holds
the readers, one module per group of families.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

from planner.errors import NO_VALUE, InputError
from planner.io.models import catalogue
from planner.io.models.checkpoint import Checkpoint, Decoder
from planner.io.models.families import FAMILIES, MISSING_RULES, Family
from planner.io.models.fields import Fields
from planner.io.models.quantization import Quantization, quantized_on_load, read_quantization
from planner.io.yaml_file import read_text
from simulator.model import ModelShape

_EXPERT_FIELDS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

_REQUIRED: Final = ("hidden_size", "vocab_size", "max_position_embeddings")
"""Fields that every family has."""

_SIDECAR: Final = "hf_quant_config.json"
"""Where NVIDIA ModelOpt states a quantisation that older configs do not repeat."""


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
        ``bf16``, ``fp8``, or ``None`` for the checkpoint's own. ``fp8`` on a bf16 checkpoint
        means that the engine quantises every linear layer but router, embedding and head.
    kv_cache_dtype
        ``bf16``, ``fp8``, or ``auto`` for the engine's choice, bf16 unless the checkpoint states
        a KV dtype itself; then engines differ and ``auto`` is refused.
    max_model_len
        Longest request to be served, tokens; ``None`` for the checkpoint's own limit. A sliding
        window that no request outgrows is left out of the shape.
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
    path = _config_path(config, Path(base_dir))
    if path is None:
        entry = catalogue.find(config)
        if entry is None:
            raise catalogue.unknown_name(config, source)
        name, whole = entry["name"], Fields(entry["config"], f"catalogue entry {entry['name']}")
        sidecar = None
    else:
        name = _display_name(config)
        file_name = config if config.endswith(".json") else f"{config.rstrip('/')}/config.json"
        whole = Fields(_read_json(path, source=file_name), file_name)
        sidecar = path.parent / _SIDECAR
    family = _family(whole)
    fields = _decoder_fields(whole, family)
    own = _stored_quantization(whole, fields, sidecar)
    longest = _longest_context(fields, family)
    checkpoint = Checkpoint(
        fields,
        whole,
        _asked_quantization(own, weight_dtype, file=whole.source, scenario=source),
        min(max_model_len or longest, longest),
    )
    return _shape(
        name,
        checkpoint,
        family.read(checkpoint),
        kv_dtype=_kv_dtype(kv_cache_dtype, own, file=whole.source, scenario=source),
        longest_context_tokens=longest,
    )


def catalogue_names() -> list[str]:
    """Names in the bundled catalogue, aliases included, sorted."""
    return catalogue.names()


def _shape(
    name: str, c: Checkpoint, decoder: Decoder, *, kv_dtype: str, longest_context_tokens: int
) -> ModelShape:
    tied = c.whole.flag("tie_word_embeddings", default=decoder.tied_by_default)
    return ModelShape(
        name=name,
        layers=decoder.layers,
        hidden_size=c.fields.size("hidden_size"),
        vocab_size=c.fields.size("vocab_size"),
        tie_word_embeddings=c.fields.flag("tie_word_embeddings", default=tied),
        max_position_embeddings=longest_context_tokens,
        weight_dtype=c.quantization.dtype_name,
        kv_dtype=kv_dtype,
        other_params=decoder.other_params,
    )


def _config_path(config: str, base_dir: Path) -> Path | None:
    """Path that ``config`` stands for, or ``None`` where it is a name."""
    path = base_dir / os.path.expanduser(config)
    if config.endswith(".json"):
        return path
    in_folder = path / "config.json"
    if config.startswith((".", "/", "~")):
        return in_folder
    if catalogue.find(config) is None and os.path.isfile(in_folder):
        return in_folder
    return None


def _display_name(config: str) -> str:
    """Name of a model read from a path: its folder or file, never the machine's path."""
    path = Path(config)
    stem = path.parent.name if path.name == "config.json" else path.name.removesuffix(".json")
    return stem or "config.json"


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


def _family(whole: Fields) -> Family:
    """Reader of the config's family; all others are refused."""
    supported = f"supported model types: {', '.join(FAMILIES)}"
    if not whole.has("model_type"):
        raise whole.error("model_type", f"required field is missing; {supported}")
    model_type = whole.word("model_type")
    if model_type in MISSING_RULES:
        rule = f"is not supported: {MISSING_RULES[model_type]}"
        raise whole.error("model_type", rule, model_type)
    if model_type not in FAMILIES:
        raise whole.error("model_type", f"is not supported; {supported}", model_type)
    return FAMILIES[model_type]


def _decoder_fields(whole: Fields, family: Family) -> Fields:
    """Settings of the decoder, with what every family needs."""
    if family.is_nested and not whole.has("text_config"):
        raise whole.error("text_config", "required field is missing")
    fields = whole.section("text_config") if family.is_nested else whole
    fields.require(*_REQUIRED)
    if family.is_dense:
        for field in _EXPERT_FIELDS:
            fields.refuse(field, "experts do not belong to this model type, which is dense")
    return fields


def _stored_quantization(whole: Fields, fields: Fields, sidecar: Path | None) -> Quantization:
    """How the checkpoint is stored, from the config or else the file beside it."""
    for holder in (whole, fields):
        for field in ("quantization_config", "compression_config"):
            if holder.has(field):
                settings = holder.section(field)
                # ModelOpt nests its settings in some versions.
                nested = settings.has("quantization")
                return read_quantization(settings.section("quantization") if nested else settings)
    if sidecar is None or not os.path.isfile(sidecar):
        return Quantization()
    name = f"{whole.source.rpartition('/')[0] or '.'}/{_SIDECAR}".removeprefix("./")
    settings = Fields(_read_json(sidecar, source=name), name).section("quantization")
    return read_quantization(settings)


def _asked_quantization(
    own: Quantization, asked: str | None, *, file: str, scenario: str
) -> Quantization:
    """The quantisation asked for, if the checkpoint allows it."""
    if own.dtype_name == "bf16":
        return quantized_on_load(asked or "bf16")
    if asked is None or own.dtype_name.startswith(asked):
        return own
    rule = (
        f"contradicts {file}, whose weights are stored in {own.dtype_name.partition('_')[0]}: "
        "leave it out"
    )
    raise InputError(source=scenario, field="model.weight_dtype", value=asked, rule=rule)


def _kv_dtype(asked: str, own: Quantization, *, file: str, scenario: str) -> str:
    if asked != "auto":
        return asked
    if own.has_kv_dtype:
        rule = (
            f"is ambiguous: {file} states a KV dtype, which not all engines heed: say bf16 or fp8"
        )
        raise InputError(source=scenario, field="model.kv_cache_dtype", value=asked, rule=rule)
    return "bf16"


def _longest_context(fields: Fields, family: Family) -> int:
    """Longest context that the engine derives from the config, tokens.

    As vLLM does it: yarn multiplies the length before scaling, linear and dynamic scaling
    multiply the stated length, and llama3's length is stated scaled already.
    """
    stated = fields.size("max_position_embeddings")
    # transformers 5 nests the settings in rope_parameters; older files have rope_scaling.
    rope = fields.section("rope_scaling" if fields.data.get("rope_scaling") else "rope_parameters")
    kind = rope.word("rope_type", rope.word("type", "default"))
    if not family.scales_context or kind not in ("linear", "dynamic", "yarn"):
        return stated
    factor = rope.number("factor", 1.0)
    if not 1 <= factor < 1e6:
        raise rope.error("factor", "must be at least 1 and below 1000000", factor)
    if kind == "yarn":
        stated = rope.size("original_max_position_embeddings", stated)
    return int(stated * factor)
