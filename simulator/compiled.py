"""How the hot loops are compiled, in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
from numba.extending import overload

if TYPE_CHECKING:
    from collections.abc import Callable

# Reference counting of the arrays in the state tuples takes three quarters of the plain loop's
# time. The loops allocate nothing and the caller owns every array, so it is switched off. The
# option is not part of numba's documented surface: a test compares results with and without it.
_FLAGS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "_nrt": False}
_CALLED_FLAGS: dict[str, Any] = {**_FLAGS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_INNER_FLAGS: dict[str, Any] = {**_CALLED_FLAGS, "forceinline": True}
_CHOSEN_FLAGS: Any = {k: v for k, v in _FLAGS.items() if k != "cache"}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop that allocates nothing, and keep the machine code on disk."""
    dispatcher: Callable[..., Any] = numba.njit(**_FLAGS)(function)
    return dispatcher


def allocating(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop that keeps lists of its own, and keep the machine code on disk."""
    flags = {k: v for k, v in _FLAGS.items() if k != "_nrt"}
    dispatcher: Callable[..., Any] = numba.njit(**flags)(function)
    return dispatcher


def inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a part of a loop that only compiled code calls, into its callers.

    Without the wrapper that lets Python call it, which unpacks every array of the state, it
    compiles in a third of the time; a call from Python crashes. Inlined, the jump engine runs
    three to five times as fast: a call would hand over some 200 registers' worth of arrays.
    """
    dispatcher: Callable[..., Any] = numba.njit(**_INNER_FLAGS)(function)
    return dispatcher


def called(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a part of a loop that only compiled code calls, with few arguments, as it stands."""
    dispatcher: Callable[..., Any] = numba.njit(**_CALLED_FLAGS)(function)
    return dispatcher


def chosen_by_rules(choose: Callable[[type], Callable[..., Any]]) -> Callable[..., Any]:
    """Let compiled code call the decorated function's choice for the class of its third argument.

    Parameters
    ----------
    choose
        From the class of the rules to a compiled function; only the one chosen is compiled.

    Returns
    -------
    decorator
        For a plain function of the same arguments that does the same without compiling.

    """

    def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
        @overload(function, strict=False, jit_options=_CHOSEN_FLAGS)
        def _chosen(state: Any, limits: Any, rules: Any, *rest: Any) -> Callable[..., Any]:
            part = choose(rules.instance_class)

            def call(state: Any, limits: Any, rules: Any, *rest: Any) -> Any:
                return part(state, limits, rules, *rest)

            return call

        return function

    return decorated
