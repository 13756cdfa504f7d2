"""A JSON array read element by element, so that no file's size is its size in memory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from planner.errors import InputError
    from planner.io.trace_file import TraceFile

_DECODER: Final = json.JSONDecoder()


class JsonArray:
    """A file that is one JSON array, of which a chunk is in memory.

    Parameters
    ----------
    file
        The file; an element must fit the memory, the array need not.
    """

    def __init__(self, file: TraceFile) -> None:
        self.file = file
        self.chunks = file.chunks()
        self.text, self.at, self.line = "", 0, 1  # `at`: parsed so far; `line`: of text's start

    def elements(self) -> Iterator[Any]:
        """Every element in turn.

        Raises
        ------
        InputError
            When the file is not one JSON array and nothing else, with the line of the fault.
        """
        self.mark("[")
        if self.peek() == "]":
            self.mark("]")
        else:
            mark = ","
            while mark == ",":
                self.peek()
                yield self.element()
                mark = self.mark(",]")
        if self.peek():
            raise self.error("Extra data", self.at)

    def element(self) -> Any:
        """The value that begins here."""
        try:
            value, self.at = _DECODER.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            # No string crosses a line, so a value that goes on in the next chunk fails at the end
            # of this one.
            if self.text[error.pos :].strip(" \t\r\n,") or not self.more():
                raise self.error(error.msg, error.pos) from None
            return self.element()
        except RecursionError:
            raise self.file.error("", "JSON: nested too deeply") from None
        except ValueError:  # a number of thousands of digits
            raise self.error("cannot be read", self.at) from None
        return value

    def mark(self, known: str) -> str:
        """The next character, one of ``known``."""
        mark = self.peek()
        if not mark or mark not in known:
            raise self.error(f"Expecting {' or '.join(map(repr, known))}", self.at)
        self.at += 1
        return mark

    def peek(self) -> str:
        """The next character that is not blank, which is not consumed; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def more(self) -> bool:
        """Put the next chunk in the place of what has been parsed; whether there is one."""
        _, lines = next(self.chunks, (0, None))
        if lines is None:
            return False
        self.line += self.text.count("\n", 0, self.at)
        self.text = self.text[self.at :] + "\n".join([*lines, ""])
        self.at = 0
        return True

    def error(self, message: str, at: int) -> InputError:
        """Error of the JSON text at a place in the chunk."""
        # What is missing at the end of the file is missing on its last line with any text.
        line = self.line + self.text.count("\n", 0, min(at, len(self.text.rstrip())))
        return self.file.error(f"line {line}", f"JSON: {message}")
