"""JSON files that a user names: read whole and checked, or one clear line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError

from planner.errors import NO_VALUE, InputError
from planner.io.yaml_file import read_text

if TYPE_CHECKING:
    from pathlib import Path

Schema = TypeVar("Schema", bound=BaseModel)


def read_object(path: Path, *, source: str) -> dict[str, object]:
    """The JSON object in a file.

    Raises
    ------
    InputError
        When the file cannot be read, is no JSON or holds no object.

    """
    try:
        data = json.loads(read_text(path, source=source))
    except (ValueError, RecursionError) as error:
        raise InputError(
            source=source, field="", value=NO_VALUE, rule=f"is not JSON ({error})"
        ) from None
    if not isinstance(data, dict):
        rule = f"holds a {type(data).__name__} where a JSON object belongs"
        raise InputError(source=source, field="", value=NO_VALUE, rule=rule)
    return data


def read_checked(path: Path, schema: type[Schema], *, source: str) -> Schema:
    """The JSON object in a file as ``schema`` sees it.

    Raises
    ------
    InputError
        When the file cannot be read or breaks the schema; the first mistake is named.

    """
    try:
        return schema.model_validate(read_object(path, source=source))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            source=source,
            field=".".join(str(part) for part in first["loc"]),
            value=NO_VALUE if first["type"] == "missing" else first["input"],
            rule="is missing" if first["type"] == "missing" else f"is wrong: {first['msg']}",
            more=error.error_count() - 1,
        ) from None
