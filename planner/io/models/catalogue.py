"""The bundled catalogue: config facts of common checkpoints by name."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from typing import Any

from planner.errors import InputError, nearest

Entry = dict[str, Any]
"""``name``, ``aliases``, ``source``, ``config`` and, where known, ``published_params``."""


@lru_cache(maxsize=1)
def entries() -> list[Entry]:
    """Entries of the catalogue file, in its order."""
    file = resources.files("profiles") / "models" / "catalogue.json"
    models: list[Entry] = json.loads(file.read_text(encoding="utf-8"))["models"]
    return models


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
