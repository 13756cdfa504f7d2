"""JSON data that ships in the `profiles` package: read whole and checked, or one clear line."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from planner.errors import NO_VALUE, InputError

PACKAGE: Final = "profiles"


class Entry(BaseModel):
    """Base of everything in a data file: unknown fields are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Schema = TypeVar("Schema", bound=Entry)


def read_json(folder: str, name: str) -> Any:
    """A parsed data file.

    Raises
    ------
    InputError
        If it is missing or no JSON.

    """
    try:
        return json.loads((files(PACKAGE) / folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        source, rule = f"{PACKAGE}/{folder}/{name}", f"cannot be read: {error}"
        raise InputError(source=source, field="", value=NO_VALUE, rule=rule) from None


def read_checked(folder: str, name: str, schema: type[Schema]) -> Schema:
    """A data file that meets its schema.

    Raises
    ------
    InputError
        If it is missing, no JSON, or breaks the schema; the first mistake is named.

    """
    try:
        return schema.model_validate(read_json(folder, name))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            source=f"{PACKAGE}/{folder}/{name}",
            field=".".join(str(part) for part in first["loc"]),
            value=first["input"],
            rule=f"is wrong: {first['msg']}",
            more=error.error_count() - 1,
        ) from None
