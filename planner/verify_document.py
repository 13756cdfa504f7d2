"""A certificate as a document: its parts, the line of each, and what comes of checking it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from planner.certificate import PARTS
from planner.errors import NO_VALUE, InputError


class RejectedError(Exception):
    """Something in the certificate is wrong: where, and what.

    Parameters
    ----------
    line
        Line of the file, from 1.
    what
        The entry and what is wrong with it.
    """

    def __init__(self, line: int, what: str) -> None:
        self.line = line
        super().__init__(f"line {line}: {what}")


@dataclass(frozen=True)
class Verified:
    """What was checked.

    Parameters
    ----------
    status, plan
        The claim.
    excluded, bounded, supports
        Plans recounted as impossible, bounds and supports evaluated again.
    simulated, exact
        Finished runs simulated again, of so many that the certificate has.
    aborted
        Stopped runs simulated again up to their stop.
    """

    status: str
    plan: str | None
    excluded: int
    bounded: int
    supports: int
    simulated: int
    exact: int
    aborted: int


@dataclass
class Document:
    """A certificate and the line of each of its parts."""

    data: dict[str, Any]
    lines: dict[tuple[str, int], int]

    @classmethod
    def read(cls, text: str, source: str) -> Document:
        """Read a certificate's text.

        Raises
        ------
        RejectedError
            When it is not JSON.
        InputError
            When it is no certificate.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RejectedError(getattr(error, "lineno", 1), f"is not JSON: {error}") from None
        parts = ("header", *PARTS, "digest")
        if not isinstance(data, dict) or sorted(data) != sorted(parts):
            rule = f"is no certificate: it must have {', '.join(parts)}"
            raise InputError(source=source, field="", value=NO_VALUE, rule=rule)
        line, lines = 3, {("header", 0): 2}
        for part in PARTS:
            for i in range(len(data[part])):
                lines[part, i] = line + 1 + i
            line += 2 + len(data[part])
        return cls(data, lines)

    def reject(self, part: str, index: int, what: str) -> RejectedError:
        """The error that names an entry and its line."""
        return RejectedError(self.lines.get((part, index), 1), f"{part} {index}: {what}")


def difference(name: str, theirs: Any, mine: Any) -> str:
    """Dotted path to the first value that differs."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in sorted(set(theirs) | set(mine)):
            if theirs.get(key) != mine.get(key):
                return difference(f"{name}.{key}", theirs.get(key), mine.get(key))
    return name
