"""From pydantic's errors to one line that says the field, the value and what to write."""

from __future__ import annotations

import re
import typing
from typing import TYPE_CHECKING, Any, Final, NoReturn

from pydantic import BaseModel
from pydantic_core import PydanticCustomError

from planner.errors import NO_VALUE, InputError, nearest, short_repr

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

_UNIT_OF_SUFFIX: Final = {
    "ms": "milliseconds",
    "s": "seconds",
    "tokens": "tokens",
    "per_hour": "USD per device and hour",
    "rate": "requests per second",
    "utilization": "a fraction of 1",
}
"""Unit that the end of a field's name stands for."""

_WRITTEN_SUFFIX: Final = re.compile(
    r"_(s|ms|us|ns|sec|secs|seconds|m|min|minutes|h|hours|milliseconds|msec|tokens|"
    r"per_hour|per_h|hourly|usd|pct|percent|rps|qps|per_s)$"
)
"""Endings by which users state a unit in a field's name."""

_NUMBER_WITH_UNIT: Final = re.compile(r"^[^\w.+-]*\s*[-+]?(\d[\d_,]*\.?\d*|\.\d+)([eE][-+]?\d+)?")

RANGE_TAG: Final = "<LengthRange>"
LOGNORMAL_TAG: Final = "<LognormalLength>"
"""What pydantic adds to a location for the model of a union that it chose, by the model's name."""

_INPUT_SHOWN: Final = (str, int, float, bool)


def refuse(rule: str, *, at: str = "", value: object = NO_VALUE, show: bool = True) -> NoReturn:
    """Raise, inside a validator, an error that :func:`to_input_error` shows with ``rule``.

    Parameters
    ----------
    rule
        What the value must be, as in :class:`~planner.errors.InputError`.
    at
        Field below the validated one that is at fault, dotted.
    value
        Value to show; left out, the validated value is shown if it is a plain one.
    show
        Whether to show a value at all.

    """
    context = {"rule": rule, "at": at, "value": value, "show": show}
    raise PydanticCustomError("rule", "{rule}", context)


def to_input_error(error: ValidationError, *, source: str, root: type[BaseModel]) -> InputError:
    """Turn the most telling of pydantic's errors into ours, and count the others.

    Parameters
    ----------
    error
        What pydantic raised for ``root``.
    source
        Name of the scenario in the message.
    root
        Model that was validated; its fields are what misspelt names are compared with.

    """
    details = error.errors(include_url=False)
    unknown = [d for d in details if d["type"] == "extra_forbidden"]
    # A misspelt required field is reported twice: as unknown, and as missing under its true name.
    meant = {(*d["loc"][:-1], _meant_field(d, root)) for d in unknown}
    others = [
        d
        for d in details
        if d["type"] != "extra_forbidden" and not (d["type"] == "missing" and d["loc"] in meant)
    ]
    first, *rest = [*_schema_version_first(unknown + others)]
    value, rule = _describe(first, root)
    at = str(first.get("ctx", {}).get("at", ""))
    field = ".".join(part for part in (_dotted(first["loc"]), at) if part)
    return InputError(source=source, field=field, value=value, rule=rule, more=len(rest))


def _schema_version_first(details: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Sort stably; a file of another version breaks other rules only because of that."""
    return sorted(details, key=lambda d: d["loc"] != ("schema_version",) or d["type"] == "missing")


def _dotted(loc: Sequence[int | str]) -> str:
    """``cluster.pools[0].nodes`` for a location of pydantic's."""
    text = ""
    for part in loc:
        if part != "[key]" and not _is_tag(part):
            text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _describe(detail: ErrorDetails, root: type[BaseModel]) -> tuple[object, str]:
    """Value to show and rule to state for one error."""
    kind, given, loc = detail["type"], detail["input"], detail["loc"]
    context: Mapping[str, Any] = detail.get("ctx", {})
    if kind == "rule":
        shown = given if context["value"] is NO_VALUE else context["value"]
        plain = context["show"] and isinstance(shown, _INPUT_SHOWN)
        text_rule = _text_for_number(given, loc) if isinstance(given, str) else ""
        return (shown if plain else NO_VALUE), text_rule or str(context["rule"])
    if kind == "extra_forbidden":
        return NO_VALUE, _unknown_field(str(loc[-1]), _section(root, loc[:-1]), root)
    if kind == "missing":
        extra = ": write schema_version: 1" if loc == ("schema_version",) else ""
        return NO_VALUE, f"required field is missing{extra}"
    if kind == "literal_error":
        return given, _literal(given, str(context["expected"]))
    shown = NO_VALUE if given is None else given
    return shown, _type_or_range(kind, given, loc, context, root)


def _type_or_range(
    kind: str,
    given: object,
    loc: Sequence[int | str],
    context: Mapping[str, Any],
    root: type[BaseModel],
) -> str:
    """Rule for a value of the wrong type or out of range."""
    if kind.startswith(("int_", "float_")):
        return _not_a_number(given, loc, whole=kind.startswith("int_"))
    if kind == "finite_number":
        hint = ": use arrival: all_at_once" if loc[-1] == "request_rate" else ""
        return f"must be a finite number{hint}"
    for name, words in (("gt", "greater than"), ("ge", "at least"), ("le", "at most")):
        if name in context:
            is_share = str(loc[-1]).endswith("utilization") and name == "le"
            hint = " (a fraction, not a percentage)" if is_share else ""
            return f"must be {words} {context[name]:.15g}{hint}"
    if kind == "string_type":
        return (
            "must be text: put it in quotes"
            if isinstance(given, (int, float))
            else ("is empty: write a value" if given is None else "must be text")
        )
    if kind == "string_too_short":
        return "must not be empty"
    if kind in ("tuple_type", "list_type"):
        inside = short_repr(given) if type(given) is int else "..."
        return f"must be a list: write [{inside}]"
    if kind.startswith("model_"):
        if given is None:
            return "is empty: indent its fields under it, or remove it"
        if loc[:1] == ("slo",) and len(loc) == 2 and type(given) in (int, float):
            return f"must name a statistic: write {{p99: {short_repr(given)}}}"
        fields = ", ".join(_section(root, loc))
        return f"must be a mapping of fields ({fields})"
    return (
        "must be text, as the name of every field"
        if kind == "invalid_key"
        else f"is not valid ({kind})"
    )


def _not_a_number(given: object, loc: Sequence[int | str], *, whole: bool) -> str:
    """Rule for something that should have been a number."""
    name = "a whole number" if whole else "a number"
    if given is None:
        return f"is empty: write {name}, or remove the line"
    if isinstance(given, str):
        return _text_for_number(given, loc) or f"must be {name}{_in_unit(loc)}"
    if isinstance(given, dict) and "goodput" in loc:
        return f"must be {name}{_in_unit(loc)}: goodput limits each request, not a statistic"
    return f"must be {name}{_in_unit(loc)}"


def _text_for_number(given: str, loc: Sequence[int | str]) -> str:
    """Rule for a number with a unit or in quotes; empty where ``given`` is no such thing."""
    match = _NUMBER_WITH_UNIT.match(given.strip())
    if match is None:
        return ""
    if match.end() == len(given.strip()) and given.strip()[0] in "0123456789.+-":
        return "must be a bare number, not text: no quotes, separators or leading zeros"
    return f"must be a bare number{_in_unit(loc)}, without a unit"


def _in_unit(loc: Sequence[int | str]) -> str:
    """``, in milliseconds`` for a field whose name, or whose section's name, states a unit."""
    for part in reversed(loc):
        unit = _unit(str(part))
        if unit:
            return f" in {unit}" if not unit.startswith("a ") else f", {unit}"
    return ""


def _unit(name: str) -> str:
    """Unit of a field, empty where it has none."""
    for suffix, unit in _UNIT_OF_SUFFIX.items():
        if name.endswith(f"_{suffix}"):
            return unit
    return ""


def _literal(given: object, expected: str) -> str:
    """Rule for a value outside a closed list."""
    options = re.findall(r"'([^']*)'", expected)
    close = nearest(given, options) if isinstance(given, str) else None
    hint = f"; did you mean {close!r}?" if close else ""
    if len(options) == 1:
        return f"must be {options[0]!r}"
    return f"must be one of {', '.join(options)}{hint}"


def _unknown_field(name: str, fields: Sequence[str], root: type[BaseModel]) -> str:
    """Rule for a field that its section does not know."""
    close = _same_stem(name, fields) or nearest(name, fields)
    elsewhere = _paths_of(name, root)
    if elsewhere:
        return f"unknown field; it belongs at {' or '.join(elsewhere)}"
    if close is None:
        return f"unknown field; known here: {', '.join(fields)}"
    unit = _unit(close)
    return f"unknown field; did you mean {close!r}{f', in {unit}' if unit else ''}?"


def _meant_field(detail: ErrorDetails, root: type[BaseModel]) -> str | None:
    """Field that an unknown one was probably meant to be."""
    name, fields = str(detail["loc"][-1]), _section(root, detail["loc"][:-1])
    return _same_stem(name, fields) or nearest(name, fields)


def _same_stem(name: str, fields: Sequence[str]) -> str | None:
    """Field that differs from ``name`` only in the unit at its end."""
    stem = _WRITTEN_SUFFIX.sub("", name)
    return next((f for f in fields if _WRITTEN_SUFFIX.sub("", f) == stem), None)


def _paths_of(name: str, root: type[BaseModel], prefix: str = "") -> list[str]:
    """Every place in the scenario where a field is called ``name``."""
    found: list[str] = []
    for field, info in root.model_fields.items():
        path = f"{prefix}.{field}" if prefix else field
        if field == name:
            found.append(path)
        for section in _models_in(info.annotation):
            found += (p for p in _paths_of(name, section, path) if p not in found)
    return found


def _section(root: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """Names of the fields of the section at ``loc``; empty where it is no section."""
    section: type[BaseModel] | None = root
    models: list[type[BaseModel]] = []
    for part in loc:
        if _is_tag(part):
            section = next(model for model in models if f"<{model.__name__}>" == part)
        elif isinstance(part, str) and section is not None:
            info = section.model_fields.get(part)
            models = _models_in(info.annotation) if info is not None else []
            section = models[0] if models else None
    return list(section.model_fields) if section is not None else []


def _is_tag(part: int | str) -> bool:
    """Whether a part of a location names one model of a union, and no field."""
    return part in (RANGE_TAG, LOGNORMAL_TAG)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every model inside an annotation such as ``tuple[PoolSpec, ...]`` or ``X | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for a in typing.get_args(annotation) for model in _models_in(a)]
