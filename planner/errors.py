"""Every error that a user can cause, and the exit code each one ends a command with.

====  =========================================================================
code  meaning
====  =========================================================================
0     an answer, also a plan in hand when a limit or Ctrl-C stopped the search
1     our bug (:class:`PlannerError` itself, or any exception outside this file)
2     bad input, or a refusal: a plan that the engine cannot launch, data that
      cannot calibrate (:class:`InputError`, :class:`RefusalError`)
3     proved infeasible, also ``simulate`` of a plan that does not fit
      (:class:`InfeasibleError`)
4     a limit or Ctrl-C before any plan was found (:class:`LimitError`)
5     ``check`` found a difference or ``verify`` rejected a certificate; these
      commands return it themselves, no exception carries it
====  =========================================================================

Each message is one line, so that a CI log or a controller can keep it whole.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MAX_VALUE_CHARS: Final = 80
"""Longest text of an offending value that a message repeats."""


class _NoValue:
    """Type of :data:`NO_VALUE`."""

    def __repr__(self) -> str:
        return "NO_VALUE"

    def __reduce__(self) -> str:
        # By name, so that a pickled error still holds the one sentinel.
        return "NO_VALUE"


NO_VALUE: Final = _NoValue()
"""Stands for the value of an :class:`InputError` that concerns no single value."""


def one_line(text: str) -> str:
    """Join ``text`` into one line; anything that a terminal would not print becomes a space."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def short_repr(value: object) -> str:
    """One-line ``repr`` of at most :data:`MAX_VALUE_CHARS` characters, whatever ``value`` holds."""
    # reprlib bounds depth and breadth: a YAML file with anchors can describe a value whose full
    # repr would not fit in memory.
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = shortener.maxlong = 60
    try:
        text = one_line(shortener.repr(value))
    except ValueError:  # an int with more digits than Python agrees to print
        text = f"<{type(value).__name__}>"
    return _clip(text)


def _clip(text: str) -> str:
    """``text``, or its start and three dots where it is longer than a message should repeat."""
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[: MAX_VALUE_CHARS - 3]}..."


def nearest(word: str, options: Iterable[str]) -> str | None:
    """Closest of ``options`` to a misspelt ``word``, or ``None`` where nothing is close.

    The one option that has the word as one of its parts comes first (``rate`` for
    ``request_rate``), then spelling, then the one option that contains it.
    """
    by_folded = {option.lower(): option for option in options}
    folded = word.lower()
    partly = [o for o in by_folded if folded in re.split(r"[_/.-]", o)]
    if len(partly) == 1:
        return by_folded[partly[0]]
    close = difflib.get_close_matches(folded, by_folded, n=1, cutoff=0.6)
    if close:
        return by_folded[close[0]]
    if len(folded) < 3:
        return None
    inside = [o for o in by_folded if folded in o or o in folded]
    return by_folded[inside[0]] if len(inside) == 1 else None


class PlannerError(Exception):
    """Base of the planner's errors; raised as itself it means a bug of ours.

    Parameters
    ----------
    message
        What went wrong and what to change; line breaks are removed.

    """

    exit_code: int = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class InputError(PlannerError):
    """A file or value from outside breaks a rule.

    Parameters
    ----------
    source
        File as the user wrote it, or ``<scenario>`` for a scenario given as a mapping.
    field
        Dotted path of the offending field; empty where the whole file is at fault.
    value
        The offending value, or :data:`NO_VALUE` where there is none to show.
    rule
        What the value must be, worded to follow it: ``must be greater than 0``.
    more
        Number of further errors in the same file that are not shown.

    """

    exit_code = 2

    def __init__(self, *, source: str, field: str, value: object, rule: str, more: int = 0) -> None:
        self.source = source
        self.field = field
        self.value = value
        self.rule = rule
        self.more = more
        shown = "" if value is NO_VALUE else f"{short_repr(value)} "
        # A field can be any text that a user wrote as a key, so it is kept short like a value.
        where = ": ".join(part for part in (source, _clip(field)) if part)
        super().__init__(f"{where}: {shown}{rule}" + (f" (and {more} more)" if more else ""))

    def __reduce__(self) -> tuple[Callable[..., InputError], tuple[dict[str, Any]]]:
        # The default would replay args positionally; worker processes send errors by pickle.
        fields = ("source", "field", "value", "rule", "more")
        return _rebuild_input_error, ({name: getattr(self, name) for name in fields},)


def _rebuild_input_error(fields: dict[str, Any]) -> InputError:
    """Inverse of :meth:`InputError.__reduce__`."""
    return InputError(**fields)


class RefusalError(PlannerError):
    """A well-formed request that is refused: a plan that the engine cannot launch."""

    exit_code = 2


class InfeasibleError(PlannerError):
    """No plan in the space meets the constraints, and that is proved.

    Parameters
    ----------
    reason
        The rule, and the figures, that exclude every plan.
    relaxation
        The smallest change known to make the scenario feasible; may be empty.

    """

    exit_code = 3

    def __init__(self, reason: str, relaxation: str) -> None:
        self.reason = reason
        self.relaxation = relaxation
        super().__init__(f"{reason}; {relaxation}" if relaxation else reason)

    def __reduce__(self) -> tuple[type[InfeasibleError], tuple[str, str]]:
        return type(self), (self.reason, self.relaxation)


class LimitError(PlannerError):
    """A limit or Ctrl-C ended the search before any plan was found."""

    exit_code = 4
