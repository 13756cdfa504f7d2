"""When a better plan is worth the switch: drain, load and warm-up against what it gains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.errors import InputError

if TYPE_CHECKING:
    from simulator.plan import Plan


@dataclass(frozen=True)
class Switching:
    """What a change of plan costs, and how much a better one must gain beyond that.

    Parameters
    ----------
    load_s, warm_up_s
        From the order of a replica to its first request: loading weights, then capturing graphs
        and warming up. Its devices are taken, and serve nobody.
    drain_s
        From the last request that a replica is given to its end: it serves on, but its devices
        are taken twice while the new one already serves.
    horizon_s
        How long the new plan is expected to stay; the time over which its gain counts.
    hysteresis
        What a better plan must gain beyond the cost of the switch, a share of its objective
        value; what keeps two plans of nearly equal value from taking turns.

    Raises
    ------
    InputError
        When a time is negative or not finite, or the horizon or the hysteresis is out of range.

    """

    load_s: float
    warm_up_s: float
    drain_s: float
    horizon_s: float
    hysteresis: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no switch could mean."""
        for name, value in vars(self).items():
            if not 0 <= value < float("inf") or (name == "horizon_s" and value == 0):
                rule = "must be a finite number, and " + (
                    "above 0" if name == "horizon_s" else "at least 0"
                )
                raise InputError(source="switching", field=name, value=value, rule=rule)

    def device_seconds(self, current: Plan, new: Plan) -> float:
        """Device time that a switch takes and that serves nobody.

        Replicas that both plans have stay as they are; any difference in shape or limits starts
        all of them anew.
        """
        same = current.shape == new.shape and current.limits == new.limits
        kept = min(current.replicas, new.replicas) if same else 0
        started = (new.replicas - kept) * new.shape.devices
        ended = (current.replicas - kept) * current.shape.devices
        return started * (self.load_s + self.warm_up_s) + ended * self.drain_s

    def needed_gain(self, current: Plan, new: Plan) -> float:
        """Share of the new plan's value by which the current one must be worse to be left.

        For a cost it is exact: what the switch takes over what the new plan takes in the horizon.
        A latency has no price; the same share of it then stands for what the switch is worth.
        """
        return self.hysteresis + self.device_seconds(current, new) / (self.horizon_s * new.devices)
