"""The identity of a plan: its text form, its devices and its place in the tie order."""

from __future__ import annotations

import re
from dataclasses import dataclass

_COUNT = r"[1-9][0-9]{0,8}"
_SHAPE = re.compile(rf"(?:(?P<replicas>{_COUNT})x)?tp(?P<tp>{_COUNT})")
_KEYS = {"seqs": "max_num_seqs", "tokens": "max_num_batched_tokens"}


@dataclass(frozen=True)
class BatchingLimits:
    """The engine's per-iteration limits.

    Parameters
    ----------
    max_num_seqs
        Most sequences in one iteration of one replica.
    max_num_batched_tokens
        Most tokens in one iteration of one replica.

    """

    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True)
class Plan:
    """Identical tensor-parallel replicas with their batching limits.

    Parameters
    ----------
    replicas
        Independent servers behind the router.
    tp
        Tensor-parallel width of each, devices.
    limits
        Batching limits of each.

    """

    replicas: int
    tp: int
    limits: BatchingLimits

    def __post_init__(self) -> None:
        """Refuse counts below one."""
        for name, value in (
            ("replicas", self.replicas),
            ("tp", self.tp),
            ("max_num_seqs", self.limits.max_num_seqs),
            ("max_num_batched_tokens", self.limits.max_num_batched_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

    @property
    def devices(self) -> int:
        """Devices that the plan occupies."""
        return self.replicas * self.tp

    def text(self, defaults: BatchingLimits) -> str:
        """Canonical text: keys in fixed order, left out where the engine's default holds.

        Parameters
        ----------
        defaults
            The engine's own limits on this device.

        """
        shape = f"{self.replicas}x" if self.replicas > 1 else ""
        shape += f"tp{self.tp}"
        keys = [
            f"{key}={getattr(self.limits, field)}"
            for key, field in _KEYS.items()
            if getattr(self.limits, field) != getattr(defaults, field)
        ]
        return f"{shape}:{','.join(keys)}" if keys else shape

    def tie_key(self, defaults: BatchingLimits) -> tuple[int, ...]:
        """Order among plans of equal value: fewer devices, then fewer non-default limits.

        The rest of the key only makes the order total.
        """
        changed = sum(getattr(self.limits, f) != getattr(defaults, f) for f in _KEYS.values())
        return (
            self.devices,
            changed,
            self.replicas,
            self.limits.max_num_seqs,
            self.limits.max_num_batched_tokens,
        )


def parse_plan(text: str, defaults: BatchingLimits) -> Plan:
    """Read a plan from its text form ``[Rx]tpA[:seqs=N,tokens=N]``.

    Raises
    ------
    ValueError
        If the text is not of that form; the message says what is wrong.

    """
    shape, colon, keys = text.strip().partition(":")
    match = _SHAPE.fullmatch(shape)
    if match is None:
        raise ValueError(f"{shape!r} is not of the form [Rx]tpA, for example 'tp8' or '2xtp4'")
    values = {field: getattr(defaults, field) for field in _KEYS.values()}
    seen: set[str] = set()
    for item in keys.split(",") if colon else ():
        key, equals, value = item.partition("=")
        if key not in _KEYS or not equals:
            raise ValueError(f"{item!r} is not one of seqs=N, tokens=N")
        if not re.fullmatch(_COUNT, value):
            raise ValueError(f"{key} is {value!r}; it must be a whole number of at least 1")
        if key in seen:
            raise ValueError(f"{key} is given twice")
        seen.add(key)
        values[_KEYS[key]] = int(value)
    return Plan(int(match["replicas"] or 1), int(match["tp"]), BatchingLimits(**values))
