"""Calibration files: constants that ``planner calibrate`` fitted, and what it knows of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planner.errors import NO_VALUE, InputError
from planner.io.yaml_file import read_bytes, read_mapping
from simulator.engine_rules import HostConstants
from simulator.units import S_PER_MS

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA_VERSION: Final = 1

Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Constant(_Entry):
    """One constant: fitted, as it was before, and the spread left, all in the unit of its name."""

    value: Share
    before: Share
    spread: Share
    identified: bool
    """Whether the runs tell it; if not, it is about where it was before."""


class Constants(_Entry):
    """The constants, named as in ``profiles/engines``."""

    iteration_ms: Constant
    sequence_ms: Constant
    ingress_ms: Constant
    prefill_multiplier: Constant
    eager_layer_ms: Share
    """Not calibrated: as it was before."""


class HeldOut(_Entry):
    """Mean absolute errors on runs that the constants judged did not see, percent by metric."""

    runs: Annotated[int, Field(ge=1)]
    folds: Annotated[int, Field(ge=2)]
    before_pct: dict[str, Share]
    after_pct: dict[str, Share]


class Source(_Entry):
    """A file of measured runs."""

    file: Text
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    runs: Annotated[int, Field(ge=1)]


class NextRun(_Entry):
    """The further run that would narrow predictions most."""

    plan: Text
    concurrency: Annotated[int, Field(ge=1)]
    input_len: Annotated[int, Field(ge=1)]
    output_len: Annotated[int, Field(ge=1)]
    spread_before_pct: Share
    """Mean spread of predictions over candidate plans and loads, from the constants alone."""
    spread_after_pct: Share
    """The same once it has been measured."""


class Calibrated(_Entry):
    """What the runs were measured on."""

    engine: Text
    version: Text
    device: Text
    model: Text
    plans: tuple[Text, ...]


class Calibration(_Entry):
    """A calibration file."""

    schema_version: Literal[1]
    planner: Text
    calibrated: Calibrated
    constants: Constants
    held_out: HeldOut
    measurements: tuple[Source, ...]
    next_run: NextRun | None
    warnings: tuple[str, ...]

    def to_json(self) -> str:
        """Canonical text; JSON is YAML too, so a scenario takes it under either suffix."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    @property
    def host(self) -> HostConstants:
        """The constants, as the simulator takes them."""
        own = self.constants
        return HostConstants(
            iteration_s=own.iteration_ms.value * S_PER_MS,
            sequence_s=own.sequence_ms.value * S_PER_MS,
            ingress_s=own.ingress_ms.value * S_PER_MS,
            eager_layer_s=own.eager_layer_ms * S_PER_MS,
            prefill_multiplier=own.prefill_multiplier.value,
        )


@dataclass(frozen=True)
class LoadedCalibration:
    """A calibration and the digest of its file."""

    calibration: Calibration
    sha256: str

    def warnings_for(self, *, engine: str, version: str, device: str, model: str) -> list[str]:
        """What a report must say where it is used on something else than was measured."""
        was = self.calibration.calibrated
        pairs = (("version", was.version, version), ("device", was.device, device))
        other = [f"{what} {old}, not {new}" for what, old, new in pairs if old != new]
        if was.model != model:
            other.append(f"model {was.model}, not {model}")
        if not other:
            return []
        return [f"the calibration was measured on {engine} {', '.join(other)}"]


def read_calibration(path: Path, *, source: str, engine: str) -> LoadedCalibration:
    """A calibration file.

    Parameters
    ----------
    path, source
        Where it lies, and what messages call it.
    engine
        Engine that it must have been measured on.

    Raises
    ------
    InputError
        If it cannot be read, breaks the schema, or is another engine's.

    """
    data = read_mapping(path, source=source)
    digest = hashlib.sha256(read_bytes(path, source=source)).hexdigest()
    version: Any = data.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        rule = f"is no calibration that this planner reads (schema_version {SCHEMA_VERSION})"
        raise InputError(source=source, field="schema_version", value=version, rule=rule)
    try:
        calibration = Calibration.model_validate(data)
        # Built here once, so that a factor out of range is the file's fault and not the run's.
        _ = calibration.host
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            source=source,
            field=".".join(str(part) for part in first["loc"]),
            value=NO_VALUE if first["type"] == "missing" else first["input"],
            rule=f"is wrong: {first['msg']}",
            more=error.error_count() - 1,
        ) from None
    except ValueError as error:
        raise InputError(
            source=source, field="constants", value=NO_VALUE, rule=str(error)
        ) from None
    if calibration.calibrated.engine != engine:
        rule = f"is what it was measured on; the scenario's engine is {engine}"
        raise InputError(
            source=source,
            field="calibrated.engine",
            value=calibration.calibrated.engine,
            rule=rule,
        )
    return LoadedCalibration(calibration, digest)
