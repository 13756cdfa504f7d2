"""Caches that forget what was used least recently, by number or by bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """A map of limited size; safe to use from several threads.

    Parameters
    ----------
    limit
        Most that all values may weigh together; the newest one stays whatever its weight.
    weight
        Weight of a value; left out, each weighs 1.

    """

    def __init__(self, limit: int, weight: Callable[[V], int] = lambda _: 1) -> None:
        self._limit, self._weight = limit, weight
        self._kept: OrderedDict[K, V] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def total(self) -> int:
        """Weight of all values."""
        return self._total

    def get(self, key: K) -> V | None:
        """The value of ``key``, now the most recently used, or ``None``."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key]

    def put(self, key: K, value: V) -> None:
        """Keep ``value``, and forget as many old ones as that takes."""
        with self._lock:
            if key in self._kept:
                self._total -= self._weight(self._kept.pop(key))
            self._kept[key] = value
            self._total += self._weight(value)
            while self._total > self._limit and len(self._kept) > 1:
                self._total -= self._weight(self._kept.popitem(last=False)[1])

    def items(self) -> list[tuple[K, V]]:
        """What is kept, least recently used first."""
        with self._lock:
            return list(self._kept.items())
