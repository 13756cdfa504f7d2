"""The identity of a plan: its text form, its devices and its place in the tie order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_COUNT = r"[1-9][0-9]{0,8}"
_SHAPE = re.compile(
    rf"(?:(?P<replicas>{_COUNT})x)?tp(?P<tp>{_COUNT})"
    rf"(?:pp(?P<pp>{_COUNT}))?(?:dp(?P<dp>{_COUNT}))?(?:ep(?P<ep>{_COUNT}))?"
    r"(?:@(?P<device>[^@:,+\s]+))?"
)
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


Defaults = BatchingLimits | Mapping[str, BatchingLimits]
"""The engine's own limits: on every device, or by `Shape.device`."""


@dataclass(frozen=True, order=True)
class Shape:
    """How one replica is spread over devices.

    Each of its ``pp`` pipeline stages is ``width`` devices wide: attention as ``dp`` groups of
    ``tp`` devices, experts as ``ep`` groups of ``moe_tp``.

    Parameters
    ----------
    tp
        Attention's tensor-parallel width.
    pp
        Pipeline stages.
    dp
        Attention's data-parallel groups.
    ep
        Groups that the routed experts are spread over, each holding its share of them.
    layers
        Layers of each stage where they are uneven; empty where the engine deals them out.
    device
        Pool that the devices are of, by its device's name; empty where there is one pool.

    """

    tp: int
    pp: int = 1
    dp: int = 1
    ep: int = 1
    layers: tuple[int, ...] = ()
    device: str = ""

    def __post_init__(self) -> None:
        """Refuse counts below one and sizes that do not fit one another."""
        for name in ("tp", "pp", "dp", "ep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.width % self.ep:
            raise ValueError(
                f"ep is {self.ep}; it must divide the {self.width} devices of a pipeline stage"
            )
        if self.layers and len(self.layers) != self.pp:
            raise ValueError(f"layers names {len(self.layers)} stages; pp is {self.pp}")

    @property
    def width(self) -> int:
        """Devices of one pipeline stage."""
        return self.tp * self.dp

    @property
    def devices(self) -> int:
        """Devices of one replica."""
        return self.pp * self.width

    @property
    def moe_tp(self) -> int:
        """Devices that one routed expert is cut over."""
        return self.width // self.ep

    @property
    def text(self) -> str:
        """Canonical text: parts of size one left out."""
        others = "".join(
            f"{name}{getattr(self, name)}" for name in ("pp", "dp", "ep") if getattr(self, name) > 1
        )
        pool = f"@{self.device}" if self.device else ""
        return f"tp{self.tp}{others}{pool}"


@dataclass(frozen=True)
class Plan:
    """Identical replicas with their batching limits.

    Parameters
    ----------
    replicas
        Independent servers behind the router.
    shape
        How each is spread over devices.
    limits
        Batching limits of each.

    """

    replicas: int
    shape: Shape
    limits: BatchingLimits

    def __post_init__(self) -> None:
        """Refuse counts below one."""
        for name, value in (
            ("replicas", self.replicas),
            ("max_num_seqs", self.limits.max_num_seqs),
            ("max_num_batched_tokens", self.limits.max_num_batched_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

    @property
    def devices(self) -> int:
        """Devices that the plan occupies."""
        return self.replicas * self.shape.devices

    def same_devices(self, other: Plan) -> bool:
        """Whether both spread the same replicas in the same way, limits aside."""
        return (self.replicas, self.shape) == (other.replicas, other.shape)

    def text(self, defaults: Defaults) -> str:
        """Canonical text: keys in fixed order, left out where the engine's default holds.

        Parameters
        ----------
        defaults
            The engine's own limits.

        """
        own = _defaults_on(self.shape.device, defaults)
        shape = f"{self.replicas}x" if self.replicas > 1 else ""
        shape += self.shape.text
        uneven = "-".join(map(str, self.shape.layers))
        keys = [f"layers={uneven}"] if uneven else []
        keys += [
            f"{key}={getattr(self.limits, field)}"
            for key, field in _KEYS.items()
            if getattr(self.limits, field) != getattr(own, field)
        ]
        return f"{shape}:{','.join(keys)}" if keys else shape

    def tie_key(self, defaults: Defaults) -> tuple[int | str, ...]:
        """Order among plans of equal value: fewer devices, then fewer non-default limits.

        The rest of the key only makes the order total.
        """
        own = _defaults_on(self.shape.device, defaults)
        changed = sum(getattr(self.limits, f) != getattr(own, f) for f in _KEYS.values())
        return (
            self.devices,
            changed,
            self.shape.pp,
            self.replicas,
            self.shape.dp,
            self.shape.ep,
            *(self.shape.layers or (0,) * self.shape.pp),
            self.limits.max_num_seqs,
            self.limits.max_num_batched_tokens,
            self.shape.device,
        )


def parse_plan(text: str, defaults: Defaults) -> Plan:
    """Read a plan's text, ``[Rx]tpA[ppB][dpC][epD][@device][:layers=N-N,seqs=N,tokens=N]``.

    Raises
    ------
    ValueError
        If the text is not of that form, or names a pool that ``defaults`` does not have; the
        message says what is wrong.

    """
    head, colon, keys = text.strip().partition(":")
    match = _SHAPE.fullmatch(head)
    if match is None:
        raise ValueError(
            f"{head!r} is not of the form [Rx]tpA[ppB][dpC][epD][@device], "
            "for example 'tp8' or '2xtp4pp2'"
        )
    device = match["device"] or ""
    own = _defaults_on(device, defaults)
    values = {field: getattr(own, field) for field in _KEYS.values()}
    layers: tuple[int, ...] = ()
    seen: set[str] = set()
    for item in keys.split(",") if colon else ():
        key, equals, value = item.partition("=")
        if key not in ("layers", *_KEYS) or not equals:
            raise ValueError(f"{item!r} is not one of layers=N-N, seqs=N, tokens=N")
        if key in seen:
            raise ValueError(f"{key} is given twice")
        seen.add(key)
        numbers = value.split("-") if key == "layers" else [value]
        if not all(re.fullmatch(_COUNT, number) for number in numbers):
            raise ValueError(f"{key} is {value!r}; it must be a whole number of at least 1")
        if key == "layers":
            layers = tuple(map(int, numbers))
        else:
            values[_KEYS[key]] = int(value)
    sizes = {name: int(match[name] or 1) for name in ("tp", "pp", "dp", "ep")}
    shape = Shape(**sizes, layers=layers, device=device)
    return Plan(int(match["replicas"] or 1), shape, BatchingLimits(**values))


def _defaults_on(device: str, defaults: Defaults) -> BatchingLimits:
    """The engine's own limits on the pool of ``device``."""
    if isinstance(defaults, BatchingLimits):
        return defaults
    if device in defaults:
        return defaults[device]
    if "" in defaults:
        raise ValueError(f"the scenario has one pool of devices: leave '@{device}' out")
    pools = ", ".join(f"@{name}" for name in defaults)
    if not device:
        raise ValueError(f"it must end in the pool that it runs on: one of {pools}")
    raise ValueError(f"@{device} is no pool of the scenario: one of {pools}")
