"""The scenario: what a user asks, checked field by field before anything is computed.

Every problem is an :class:`~planner.errors.InputError` with a one-line message, whether the
scenario comes from a file (:meth:`Scenario.load`) or from a mapping
(:meth:`Scenario.model_validate`).
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from planner.engine_settings import OWN_NAMES
from planner.errors import NO_VALUE, InputError, nearest
from planner.io.yaml_file import read_mapping
from planner.scenario_errors import refuse, to_input_error
from planner.scenario_goals import GoodputSpec, Limits, ObjectiveSpec, SloSpec
from planner.scenario_sections import (
    ClusterSpec,
    EngineSpec,
    ModelSpec,
    PoolSpec,
    SearchSpec,
    Section,
    SpaceSpec,
)
from planner.scenario_workload import LengthRange, LognormalLength, WorkloadSpec

SCHEMA_VERSIONS = (1,)
"""Versions of the scenario format that this planner reads."""

__all__ = [
    "ClusterSpec",
    "EngineSpec",
    "GoodputSpec",
    "LengthRange",
    "Limits",
    "LognormalLength",
    "ModelSpec",
    "ObjectiveSpec",
    "PoolSpec",
    "Scenario",
    "SearchSpec",
    "SloSpec",
    "SpaceSpec",
    "WorkloadSpec",
]


def _check_version(version: Any) -> Any:
    # By type first: 1 == True == 1.0, and a literal would take all three.
    if type(version) is not int or version not in SCHEMA_VERSIONS:
        known = ", ".join(map(str, SCHEMA_VERSIONS))
        refuse(f"is not a schema version that this planner reads (known: {known})")
    return version


class Scenario(Section):
    """Everything that a plan depends on, as the user states it.

    Relative paths in it are found by :meth:`find`.
    """

    schema_version: Annotated[Literal[1], BeforeValidator(_check_version)]
    """Version of this format."""
    model: ModelSpec
    """The checkpoint."""
    cluster: ClusterSpec
    """The hardware."""
    engine: EngineSpec
    """The serving engine."""
    workload: WorkloadSpec
    """The requests."""
    slo: SloSpec | None = None
    """Constraints on statistics over the run."""
    goodput: GoodputSpec | None = None
    """Limits on each request."""
    objective: ObjectiveSpec
    """What to optimise."""
    search: SearchSpec = SearchSpec()
    """Limits and choices of the search."""

    _base_dir: Path | None = PrivateAttr(default=None)
    _source: str = PrivateAttr(default="<scenario>")

    @model_validator(mode="after")
    def _check(self) -> Scenario:
        if self.engine.num_gpu_blocks is not None and len(self.cluster.pools) > 1:
            refuse(
                "was measured on one kind of device: leave it out where there are several pools",
                at="engine.num_gpu_blocks",
            )
        own = OWN_NAMES.get(self.engine.name, {})
        for name in ("max_num_seqs", "max_num_batched_tokens") if own else ():
            pinned = getattr(self.engine.settings, name)
            if pinned is not None and name in self.search.space.model_fields_set:
                refuse(
                    f"is pinned by engine.{own[name]} ({pinned}): keep one of the two",
                    at=f"search.space.{name}",
                )
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _one_error(
        cls, data: Any, handler: ModelWrapValidatorHandler[Scenario], info: ValidationInfo
    ) -> Scenario:
        # The last validator is the outermost: it sees the errors of all others. Done here and not
        # in model_validate, so that the constructor raises InputError too.
        source = str((info.context or {}).get("source", "<scenario>"))
        try:
            return handler(data)
        except ValidationError as error:
            raise to_input_error(error, source=source, root=cls) from None

    def model_post_init(self, context: Any, /) -> None:
        """Keep where the scenario came from; it is no part of what the scenario says."""
        known = context or {}
        self._source = known.get("source", "<scenario>")
        base_dir = known.get("base_dir")
        self._base_dir = None if base_dir is None else Path(base_dir)

    @classmethod
    def model_validate(  # type: ignore[override]
        cls,
        obj: Any,
        *,
        base_dir: str | os.PathLike[str] | None = None,
        source: str = "<scenario>",
    ) -> Scenario:
        """Check a scenario given as a mapping.

        Parameters
        ----------
        obj
            The scenario's fields.
        base_dir
            Folder that relative paths start from; ``None``: the working folder.
        source
            Name of the scenario in error messages.

        Raises
        ------
        InputError
            When a field breaks a rule.

        """
        if isinstance(obj, Scenario):  # checked again, so that the copy gets its own folder
            obj = obj.model_dump(exclude_unset=True)
        return super().model_validate(obj, context={"source": source, "base_dir": base_dir})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scenario:
        """Read a scenario file, or a bundled scenario by its name.

        Parameters
        ----------
        path
            Path of a YAML file; where there is no such file, the name of a bundled scenario
            with or without ``.yaml``.

        Raises
        ------
        InputError
            When the file cannot be read, is not YAML or breaks a rule.

        """
        source = os.fspath(path)
        file = Path(source)
        if not os.path.lexists(file):
            bundled = [_bundled() / f"{source}{suffix}" for suffix in ("", ".yaml")]
            found = next((b for b in bundled if os.path.isfile(b)), None)
            if found is None:
                raise _no_such_scenario(source)
            file = found
        data = read_mapping(file, source=source)
        return cls.model_validate(data, base_dir=file.parent, source=source)

    @property
    def source(self) -> str:
        """Name of the scenario in messages: the file as the user wrote it."""
        return self._source

    @property
    def base_dir(self) -> Path:
        """Folder that relative paths start from."""
        return self._base_dir or Path()

    def find(self, path: str) -> Path:
        """Find a file that the scenario names.

        Parameters
        ----------
        path
            As written in the scenario: absolute, relative to :attr:`base_dir`, or the name of a
            bundled file such as ``traces/x.csv``, tried in this order.

        Returns
        -------
        Path
            The file; where none exists, the place beside the scenario, for the reader to report.

        """
        beside = self.base_dir / os.path.expanduser(path)
        bundled = _bundled() / path
        return bundled if not os.path.isfile(beside) and os.path.isfile(bundled) else beside


def _bundled() -> Path:
    """Folder of the scenarios that ship with the package."""
    return Path(str(resources.files("scenarios")))


def _no_such_scenario(name: str) -> InputError:
    """Error for a name that is neither a file nor a bundled scenario."""
    close = nearest(name, sorted(file.stem for file in _bundled().glob("*.yaml")))
    hint = f"; did you mean {close!r}?" if close else ""
    rule = f"no such file, and no bundled scenario of this name{hint}"
    return InputError(source=name or "''", field="", value=NO_VALUE, rule=rule)
