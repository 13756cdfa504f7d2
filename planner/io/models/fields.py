"""Typed look-ups in one parsed ``config.json``: each wrong value is one line that names it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from planner.errors import NO_VALUE, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_SIZE: Final = 2**31 - 1
"""Largest count or width that is read; the kernels' own index type ends there."""

MAX_LAYERS: Final = 10_000
"""Most layers that are read, so that a slip of the pen does not fill the memory."""


class Fields:
    """One JSON object of a config and the rules that its values must meet.

    A field that is ``null`` counts as absent, as transformers treats it.

    Parameters
    ----------
    data
        The parsed object.
    source
        Name of its file in error messages.
    path
        Dotted path to the object within the file; empty for the file itself.

    """

    def __init__(self, data: Mapping[str, Any], source: str, path: str = "") -> None:
        self.data = data
        self.source = source
        self.path = path

    def error(self, field: str, rule: str, value: object = NO_VALUE) -> InputError:
        """Error about one field of the object, or about all of it where ``field`` is empty."""
        where = ".".join(part for part in (self.path, field) if part)
        return InputError(source=self.source, field=where, value=value, rule=rule)

    def has(self, field: str) -> bool:
        """Whether the field is there and not null."""
        return self.data.get(field) is not None

    def require(self, *fields: str) -> None:
        """Refuse the object when any of ``fields`` is absent."""
        missing = [field for field in fields if not self.has(field)]
        if missing:
            raise self.error("", f"required fields are missing: {', '.join(missing)}")

    def size(
        self, field: str, default: int | None = None, *, low: int = 1, high: int = MAX_SIZE
    ) -> int:
        """A whole number from ``low`` to ``high``; ``default`` where the field is absent."""
        value = self.data.get(field)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.error(field, "required field is missing")
        return self._checked_size(field, value, low, high)

    def sizes(
        self, field: str, length: int | None, *, low: int = 0, high: int = MAX_SIZE
    ) -> list[int]:
        """A list of whole numbers, ``length`` of them where that is given."""
        return [self._checked_size(field, v, low, high) for v in self._list(field, length)]

    def words(self, field: str, length: int, options: Sequence[str]) -> list[str]:
        """A list of ``length`` words out of ``options``."""
        values = self._list(field, length)
        for value in values:
            if value not in options:
                raise self.error(field, f"is not supported; supported: {', '.join(options)}", value)
        return values

    def texts(self, field: str) -> list[str]:
        """A list of texts of any length, empty where the field is absent; one text is a list."""
        values = self.data.get(field)
        values = [values] if isinstance(values, str) else values or []
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise self.error(field, "must be a list of texts", values)
        return values

    def number(self, field: str, default: float | None = None) -> float:
        """A finite positive number of at most `MAX_SIZE`."""
        value = self.data.get(field)
        if value is None and default is not None:
            return default
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not numeric or not math.isfinite(value) or not 0 < value <= MAX_SIZE:  # type: ignore[arg-type, operator]
            raise self.error(field, "must be a number greater than 0", value)
        return float(value)  # type: ignore[arg-type]

    def flag(self, field: str, *, default: bool = False) -> bool:
        """A truth value; ``default`` where the field is absent."""
        value = self.data.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(field, "must be true or false", value)
        return value

    def word(self, field: str, default: str = "") -> str:
        """A text; ``default`` where the field is absent."""
        value = self.data.get(field)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(field, "must be a text", value)
        return value

    def section(self, field: str) -> Fields:
        """The JSON object of a field, empty where the field is absent."""
        value = self.data.get(field)
        if value is None:
            value = {}
        return self._object(field, value)

    def sections(self, field: str, length: int | None = None) -> list[Fields]:
        """A list of JSON objects, ``length`` of them where that is given."""
        values = self._list(field, length)
        return [self._object(f"{field}.{i}", value) for i, value in enumerate(values)]

    def refuse(self, field: str, rule: str) -> None:
        """Refuse the object where ``field`` is set to anything but null, false, 0 or empty."""
        value = self.data.get(field)
        if value:
            raise self.error(field, rule, value)

    def _object(self, field: str, value: object) -> Fields:
        if not isinstance(value, dict):
            raise self.error(field, "must be an object", value)
        return Fields(value, self.source, ".".join(part for part in (self.path, field) if part))

    def _list(self, field: str, length: int | None) -> list[Any]:
        values = self.data.get(field)
        if not isinstance(values, list):
            raise self.error(field, "must be a list", values)
        if length is not None and len(values) != length:
            raise self.error(field, f"must have {length} entries, has {len(values)}")
        return values

    def _checked_size(self, field: str, value: object, low: int, high: int) -> int:
        if type(value) is not int or not low <= value <= high:
            raise self.error(field, f"must be a whole number from {low} to {high}", value)
        return value
