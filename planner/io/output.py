"""Writing a report where the user asked for it: whole, or not at all."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path

from planner.errors import NO_VALUE, InputError

STDOUT = "-"
"""Target that means standard output."""


def check_target(target: str | None) -> None:
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
        raise _cannot(target, "Is a directory")
    if not path.parent.is_dir():
        raise _cannot(target, "No such directory")
    if not os.access(path if _is_special(path) else path.parent, os.W_OK):
        raise _cannot(target, "Permission denied")


def deliver(text: str, target: str | None) -> None:
    """Write ``text`` to ``target``: a path, ``-`` for standard output, or ``None`` for nowhere.

    A regular file is replaced in one step; a pipe or device is written to as it is.

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
    path = Path(target)
    try:
        if _is_special(path):
            path.write_text(text, encoding="utf-8")
        else:
            _replace(path, text)
    except OSError as error:
        raise _cannot(target, error.strerror or str(error)) from None


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, _mode(path))
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def _mode(path: Path) -> int:
    """Mode of the file that is replaced, or what a new file of the user's would get."""
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()


def _cannot(target: str, reason: str) -> InputError:
    return InputError(
        source=f"--json {target}", field="", value=NO_VALUE, rule=f"cannot be written ({reason})"
    )
