"""Writing a file where the user asked for it: whole, or not at all."""

from __future__ import annotations

import io
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

from planner.errors import NO_VALUE, InputError

if TYPE_CHECKING:
    from collections.abc import Callable

STDOUT = "-"
"""Target that means standard output."""

JSON = "--json"
"""Option that says where a report goes."""


def check_target(target: str | None, option: str = JSON) -> None:
    """Refuse a target that cannot be written, before any work is done for it.

    Raises
    ------
    InputError
        When its folder is missing or closed, or it is a folder itself.
    """
    if target is None or target == STDOUT:
        return
    path = Path(target)
    if path.is_dir():
        raise _cannot(target, option, "Is a directory")
    if not path.parent.is_dir():
        raise _cannot(target, option, "No such directory")
    if not os.access(path if is_special(path) else path.parent, os.W_OK):
        raise _cannot(target, option, "Permission denied")


def deliver(text: str, target: str | None, option: str = JSON) -> None:
    """Write ``text`` to ``target``: a path, ``-`` for standard output, or ``None`` for nowhere.

    ``option`` is what a message calls the target by.

    Raises
    ------
    InputError
        When it cannot be written; what was there before is then untouched.
    """
    if target is None:
        return
    if target == STDOUT:
        sys.stdout.write(text)
        return
    deliver_file(target, option, lambda file: file.write(text.encode()))


def deliver_file(target: str, option: str, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill the file ``target`` that ``option`` names.

    A regular file is replaced in one step, at the end; a pipe or device is written to as it is.

    Raises
    ------
    InputError
        When it cannot be written; what was there before is then untouched.
    """
    path = Path(target)
    try:
        if is_special(path):
            content = io.BytesIO()  # a pipe cannot seek, and is to get all or nothing
            write(content)
            path.write_bytes(content.getvalue())
        else:
            _replace(path, write)
    except OSError as error:
        raise _cannot(target, option, error.strerror or str(error)) from None


def is_special(path: Path) -> bool:
    """Whether a pipe or a device is there, which must never be replaced."""
    return path.exists() and not path.is_file()


def _replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(handle)  # or a crash of the machine could keep the name and lose the bytes
        os.chmod(temporary, _mode(path))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _mode(path: Path) -> int:
    """Mode of the file that is replaced, or what a new file of the user's would get."""
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _cannot(target: str, option: str, reason: str) -> InputError:
    return InputError(
        source=f"{option} {target}", field="", value=NO_VALUE, rule=f"cannot be written ({reason})"
    )
