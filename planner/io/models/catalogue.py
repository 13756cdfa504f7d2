"""The bundled catalogue: config facts of common checkpoints by name."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any

from pydantic import Field

from planner.errors import InputError, nearest
from planner.io import data_file

Entry = dict[str, Any]
"""``name``, ``aliases``, ``source``, ``config`` and, where known, ``published_params``."""


class _Published(data_file.Entry):
    billions: Annotated[float, Field(gt=0)]
    source: str
    note: str | None = None


class _Model(data_file.Entry):
    name: str
    aliases: tuple[str, ...]
    source: str
    config: dict[str, Any]
    published_params: _Published | None = None


class _Catalogue(data_file.Entry):
    schema_version: Annotated[int, Field(ge=2, le=2)]
    comment: str
    models: tuple[_Model, ...]


@lru_cache(maxsize=1)
def entries() -> list[Entry]:
    """Entries of the catalogue file, in its order.

    Raises
    ------
    InputError
        If the file is missing or damaged.

    """
    catalogue = data_file.read_checked("models", "catalogue.json", _Catalogue)
    return [model.model_dump(exclude_unset=True) for model in catalogue.models]


def names() -> list[str]:
    """Names in the catalogue, aliases included, sorted."""
    return sorted(name for entry in entries() for name in (entry["name"], *entry["aliases"]))


def find(name: str) -> Entry | None:
    """Entry of a name, its ``name`` as the catalogue spells the one asked for.

    Case does not matter, and the organisation before the ``/`` may be left out.
    """
    return _by_lower_name().get(name.lower())


def unknown_name(name: str, source: str) -> InputError:
    """Error for a name that the catalogue does not have, with the nearest one that it has."""
    known = names()
    by_short = {full.rpartition("/")[2]: full for full in known}
    close = nearest(name, known) or by_short.get(nearest(name.rpartition("/")[2], by_short) or "")
    hint = f"did you mean {close!r}?" if close else "no name in it is close"
    rule = f"is not in the model catalogue; {hint} (a path to a config.json works too)"
    return InputError(source=source, field="model.config", value=name, rule=rule)


@lru_cache(maxsize=1)
def _by_lower_name() -> dict[str, Entry]:
    table: dict[str, Entry] = {}
    for entry in entries():
        for name in (entry["name"], *entry["aliases"]):
            named = {**entry, "name": name}
            table[name.lower()] = table[name.lower().rpartition("/")[2]] = named
    return table
