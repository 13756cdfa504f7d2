"""How the hot loops are compiled, in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba

if TYPE_CHECKING:
    from collections.abc import Callable

# Reference counting of the arrays in the state tuples takes three quarters of the plain loop's
# time. The loops allocate nothing and the caller owns every array, so it is switched off. The
# option is not part of numba's documented surface: a test compares results with and without it.
_FLAGS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "_nrt": False}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop that allocates nothing, and keep the machine code on disk."""
    dispatcher: Callable[..., Any] = numba.njit(**_FLAGS)(function)
    return dispatcher
