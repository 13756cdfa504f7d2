"""A YAML reader that refuses what PyYAML would quietly misread."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from planner.errors import NO_VALUE, InputError, one_line

if TYPE_CHECKING:
    from collections.abc import Hashable
    from pathlib import Path


_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")
"""Types of YAML values that a scenario may hold."""


class _Loader(yaml.SafeLoader):
    """Safe loader with YAML 1.2 scalars and no duplicate keys.

    YAML 1.1 reads ``1e3`` as text, ``1:30`` as 90, ``010`` as 8 and ``on`` as true. Here the
    first is a number and the others are text, which a numeric field then refuses.
    """

    # Emptied, so that add_implicit_resolver below starts from nothing.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    # Dates, sets and binary data can only be asked for by an explicit tag; None is the entry that
    # refuses an unknown tag.
    yaml_constructors = {  # noqa: RUF012
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in _TAGS
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping; a key that appears twice is an error, not an overwrite."""
        first_line: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            mark = key_node.start_mark
            if not isinstance(key_node, yaml.ScalarNode):
                raise _construct_error("a key must be plain text", mark)
            key = self.construct_object(key_node, deep=True)
            if key in first_line:
                problem = f"key {key!r} appears twice (first on line {first_line[key]})"
                raise _construct_error(problem, mark)
            first_line[key] = mark.line + 1
        return super().construct_mapping(node, deep=deep)


def _construct_error(problem: str, mark: yaml.Mark) -> yaml.constructor.ConstructorError:
    """Error that carries its own line and column."""
    return yaml.constructor.ConstructorError(None, None, problem, mark)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*([eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+))"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first
    )


def read_text(path: Path, *, source: str) -> str:
    """Text of a UTF-8 file, a byte-order mark at its start left out.

    Raises
    ------
    InputError
        When the file is missing, cannot be read or is not UTF-8.

    """
    return decode(read_bytes(path, source=source), source=source)


def read_bytes(path: Path, *, source: str) -> bytes:
    """Bytes of a file, or an :class:`InputError` that says why there are none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _file_error(source, "no such file") from None
    except IsADirectoryError:
        raise _file_error(source, "is a directory, not a file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _file_error(source, f"cannot be read ({reason})") from None


def decode(data: bytes, *, source: str) -> str:
    """Decode UTF-8 bytes, or raise an :class:`InputError` that names the first bad byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        rule = f"is not UTF-8 text (byte {error.start}, line {line}): save it as UTF-8"
        raise _file_error(source, rule) from None


def read_mapping(path: Path, *, source: str) -> dict[Any, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises
    ------
    InputError
        When the file cannot be read, breaks YAML's syntax (with line and column), repeats a key
        or holds something other than one mapping.

    """
    text = read_text(path, source=source)
    try:
        # yaml.load with a SafeLoader subclass: constructs plain data only.
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        parts = (error.context if str(error.problem).startswith("but") else None, error.problem)
        raise _file_error(where, f"YAML: {', '.join(filter(None, parts))}") from None
    except yaml.YAMLError as error:
        raise _file_error(source, f"YAML: {one_line(str(error))}") from None
    except (ValueError, LookupError) as error:
        raise _file_error(source, f"YAML: a value cannot be read ({error})") from None
    except RecursionError:
        raise _file_error(source, "YAML: nested too deeply") from None
    if not isinstance(data, dict):
        kind = "is empty" if data is None else f"holds a {type(data).__name__}"
        rule = f"{kind}; a scenario is a mapping that starts with schema_version: 1"
        raise _file_error(source, rule)
    return data


def _file_error(source: str, rule: str) -> InputError:
    """Error about the file as a whole."""
    return InputError(source=source, field="", value=NO_VALUE, rule=rule)
