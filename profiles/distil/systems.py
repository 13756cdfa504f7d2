"""What is read from the source package: systems, engines, versions, and the allow-list of files.

The wheel ``aiconfigurator-core`` (Apache-2.0) carries hundreds of measured kernel tables and also
measured *serving* points; only the kernel tables named in `ALLOWED_TABLES` are ever opened,
because accuracy is judged on serving points and must not have seen any.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

PACKAGE: Final = "aiconfigurator_core"
DISTRIBUTION: Final = "aiconfigurator-core"
LICENCE: Final = "Apache-2.0"
REUSE: Final = "reuse.yaml"
"""A file of this name in a version folder says that its tables are another version's."""

BLOCK_GEMM: Final = "block_gemm"
"""The fp8_block GEMM of another engine. vLLM's was timed outside a CUDA graph: it takes 57 us and
more (Blackwell: 170 us and more) whatever the size, which is the host's launches, not the kernel.
Other engines' times of the same kind of kernel start at 7 us."""

FOLDERS: Final = {
    "gemm": "gemm",
    BLOCK_GEMM: "gemm",
    "context_attention": "attention",
    "generation_attention": "attention",
    "moe": "moe",
    "mla_context_module": "mla",
    "mla_generation_module": "mla",
    "context_mla": "mla",
    "generation_mla": "mla",
    "dsa_context_module": "sparse_attention",
    "dsa_generation_module": "sparse_attention",
    "mla_bmm": "mla_bmm",
    "gdn": "linear_attention",
    "mamba2": "linear_attention",
    "custom_allreduce": "comm",
    "nccl": "comm",
    "moe_a2a": "comm",
    "wideep_deepep_ll": "comm",
    "wideep_deepep_normal": "comm",
    "trtllm_alltoall": "comm",
}
"""The package's folder of each kind of table."""

LEFT_OUT_FOLDERS: Final = (
    "encoder_attention: no planned model has an encoder",
    "kda, msa, mhc, and the dsv4 and glm5 tables of sparse_attention: no model needs them yet",
    "mlp, and the wideep tables of mla and moe: older versions, one model only",
    "quantize: GEMMs were timed with the quantisation of their activations (static for fp8)",
)
"""What is in the package and never opened."""

Columns = dict[str, "NDArray[Any]"]
Versions = dict[str, tuple[str, ...]]
"""By kind of table, the versions taken, in order of preference."""


class ForbiddenTableError(ValueError):
    """A file outside `ALLOWED_TABLES` was asked for."""


class ReusedTableError(ValueError):
    """A version folder holds another version's tables, and `TARGETS` does not say which."""


@dataclass(frozen=True)
class Target:
    """One file to write: a device, an engine, and the version of each table that goes in.

    Parameters
    ----------
    folder
        The system's folder in the package.
    device
        Its name in our device catalogue.
    engine
        ``vllm``, ``sglang`` or ``trtllm``.
    version
        The engine version that the file stands for: that of its GEMM and attention.
    tables
        By kind of table, the versions taken, in order of preference: a later one only adds what
        the earlier ones lack.
    notes
        What a reader must know where a table is not what its name says.

    """

    folder: str
    device: str
    engine: str
    version: str
    tables: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def path(self, kind: str, version: str) -> str:
        """One table's file, relative to the package's ``systems`` folder."""
        if kind == BLOCK_GEMM:  # its version names the other engine too
            return f"data/{self.folder}/{FOLDERS[kind]}/{version}/gemm_perf.parquet"
        source = "nccl" if kind == "nccl" else self.engine
        return f"data/{self.folder}/{FOLDERS[kind]}/{source}/{version}/{kind}_perf.parquet"

    @property
    def paths(self) -> tuple[str, ...]:
        """Every file that this target is made of."""
        return tuple(self.path(kind, v) for kind, versions in self.tables.items() for v in versions)


@dataclass(frozen=True)
class System:
    """One system of the package: its folder, our name for it, its NCCL, and its exceptions.

    Parameters
    ----------
    folder, device
        As in `Target`.
    nccl
        The newest version with every operation on every width that the all-reduce has.
    versions
        The engines' versions; those of `NEWEST` unless given.
    tables
        By engine, kinds of table that are taken from other versions, or from none (``()``).
    block_gemm
        Engine and version whose fp8_block GEMM stands in for vLLM's, or empty.
    notes
        By engine, as in `Target`.

    """

    folder: str
    device: str
    nccl: str
    versions: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Versions] = field(default_factory=dict)
    block_gemm: str = "sglang/0.5.14"
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def target(self, engine: str) -> Target:
        """What is distilled for one engine."""
        version = self.versions.get(engine, NEWEST[engine])
        tables: Versions = {"nccl": (self.nccl,)}
        tables |= dict.fromkeys(KINDS[engine], (version,))
        tables |= self.tables.get(engine, {})
        notes = self.notes.get(engine, ())
        if engine == "vllm" and self.block_gemm:
            tables[BLOCK_GEMM] = (self.block_gemm,)
            notes += (f"fp8_block GEMM: {self.block_gemm}, as vLLM's shows host launches",)
        return Target(
            self.folder,
            self.device,
            engine,
            version,
            {kind: versions for kind, versions in tables.items() if versions},
            notes,
        )


NEWEST: Final = {"vllm": "0.24.0", "sglang": "0.5.14", "trtllm": "1.3.0rc20"}
"""Each engine's newest version with GEMM and attention on most systems."""

_DENSE: Final = ("gemm", "context_attention", "generation_attention", "moe", "custom_allreduce")
_MODULES: Final = ("mla_context_module", "mla_generation_module")
_KERNELS: Final = ("context_mla", "generation_mla", "mla_bmm")
_SPARSE: Final = ("dsa_context_module", "dsa_generation_module")
_DEEPEP: Final = ("wideep_deepep_ll", "wideep_deepep_normal")

KINDS: Final[dict[str, tuple[str, ...]]] = {
    "vllm": (*_DENSE, *_MODULES, *_SPARSE, "mla_bmm", "gdn", "moe_a2a"),
    "sglang": (*_DENSE, *_KERNELS, *_SPARSE, "gdn", *_DEEPEP),
    "trtllm": (*_DENSE, *_MODULES, *_KERNELS, *_SPARSE, "gdn", "mamba2", "moe_a2a"),
}
"""The kinds of table that an engine has on a datacentre system of today."""


def _none(*kinds: str) -> Versions:
    return dict.fromkeys(kinds, ())


_SGLANG_DEEPEP: Final[Versions] = dict.fromkeys(_DEEPEP, ("0.5.12",))
_SGLANG_DEEPEP_NODES: Final[Versions] = dict.fromkeys(_DEEPEP, ("0.5.12", "0.5.6.post2"))
_TRTLLM_A2A: Final[Versions] = {"moe_a2a": ("1.3.0rc11",)}
_HOPPER_MOE: Final[Versions] = {"moe": ("1.3.0rc20", "1.3.0rc23")}
_DEEPEP_NOTE: Final = (
    "DeepEP: versions 0.5.12 (one node) and 0.5.6.post2 (1 to 8 nodes) of the package, "
    "none newer measured"
)
_DEEPEP_ONE_NODE_NOTE: Final = "DeepEP: version 0.5.12 of the package, none newer measured"
_TRTLLM_A2A_NOTE: Final = "expert all-to-all: 1.3.0rc11, none newer measured"
_BLACKWELL: Final = {"sglang": _SGLANG_DEEPEP, "trtllm": _TRTLLM_A2A}
_BLACKWELL_MOE_NOTE: Final = (
    "MoE layouts that 1.3.0rc23 added lie in a folder that declares reuse: left out"
)
_BLACKWELL_NOTES: Final = {
    "sglang": (_DEEPEP_ONE_NODE_NOTE,),
    "trtllm": (_TRTLLM_A2A_NOTE, _BLACKWELL_MOE_NOTE),
}
_HOPPER_NOTES: Final = {
    "sglang": (_DEEPEP_NOTE,),
    "trtllm": (_TRTLLM_A2A_NOTE, "MoE layouts that 1.3.0rc20 lacks are from 1.3.0rc23"),
}

SYSTEMS: Final = (
    System(
        "h100_sxm",
        "H100-SXM-80GB",
        "2.29.2",
        tables={
            "sglang": _SGLANG_DEEPEP_NODES | {"gemm": ("0.5.14", "0.5.6.post2")},
            "trtllm": _TRTLLM_A2A | _HOPPER_MOE,
        },
        notes=_HOPPER_NOTES
        | {"sglang": (_DEEPEP_NOTE, "int8_wo GEMM: 0.5.6.post2, none newer measured")},
    ),
    System(
        "h200_sxm",
        "H200-SXM-141GB",
        "2.29.2",
        tables={"sglang": _SGLANG_DEEPEP_NODES, "trtllm": _TRTLLM_A2A | _HOPPER_MOE},
        notes=_HOPPER_NOTES,
    ),
    System("b200_sxm", "B200-SXM-180GB", "2.29.2", tables=_BLACKWELL, notes=_BLACKWELL_NOTES),
    System("b300_sxm", "B300-SXM", "2.29.2", tables=_BLACKWELL, notes=_BLACKWELL_NOTES),
    System(
        "gb200",
        "GB200-NVL72",
        "2.29.2",
        tables=_BLACKWELL | {"trtllm": _TRTLLM_A2A | {"trtllm_alltoall": ("1.3.0rc10",)}},
        notes=_BLACKWELL_NOTES
        | {
            "trtllm": (
                _TRTLLM_A2A_NOTE,
                _BLACKWELL_MOE_NOTE,
                "all-to-all over NVLink on 2 to 64 ranks: folder 1.3.0rc10, whose rows name "
                "1.2.0rc6 as the version measured",
            )
        },
    ),
    System(
        "gb300",
        "GB300-NVL72",
        "2.29.2",
        tables=_BLACKWELL,
        notes=_BLACKWELL_NOTES
        | {"vllm": ("0.27.0, newer than the GEMM and attention measured here, is left out",)},
    ),
    System(
        "a100_sxm",
        "A100-SXM4-80GB",
        "2.27.3",
        versions={"vllm": "0.14.0", "sglang": "0.5.10", "trtllm": "1.0.0"},
        block_gemm="",
        tables={
            "vllm": _none(*_MODULES, *_SPARSE, "mla_bmm", "gdn", "moe_a2a"),
            "sglang": _none("context_mla", "generation_mla", *_SPARSE, *_DEEPEP),
            "trtllm": _none(*_MODULES, *_SPARSE, "gdn", "mamba2", "moe_a2a"),
        },
        notes={
            "vllm": ("0.14.0 is the only version measured on this system: head width 128",),
            "sglang": (
                "0.5.10 is the newest version with GEMM and attention on this system; of gated "
                "delta net its prefill scan was not measured",
            ),
            "trtllm": ("1.0.0 is the only version measured on this system",),
        },
    ),
    System(
        "l40s",
        "L40S",
        "2.27.3",
        block_gemm="trtllm/1.3.0rc20",
        tables={
            "vllm": _none(*_SPARSE, "mla_bmm", "moe_a2a") | {"custom_allreduce": ("0.22.0",)},
            "sglang": _none(*_SPARSE, *_DEEPEP),
            "trtllm": _none(*_MODULES, *_SPARSE, "moe_a2a")
            | {
                "context_mla": ("1.0.0",),
                "generation_mla": ("1.0.0",),
                "moe": ("1.3.0rc20", "1.0.0"),
            },
        },
        notes={
            "vllm": (
                "all-reduce: 0.22.0 is the newest version folder of this system; its rows name "
                "0.14.0 as the version measured, and equal those of the 0.14.0 folder",
            ),
            "trtllm": (
                "latent attention kernels: 1.0.0, none newer measured; so are the MoE layouts and "
                "the w4afp8 precision that 1.3.0rc20 lacks",
                "all-reduce: the rows of folder 1.3.0rc20 name 1.0.0 as the version measured",
            ),
        },
    ),
    System(
        "rtx_pro_6000_server",
        "RTX-PRO-6000-Server",
        "2.29.2",
        block_gemm="trtllm/1.3.0rc20",
        tables={
            "vllm": _none(*_SPARSE, "mla_bmm", "moe_a2a"),
            "sglang": _none(*_SPARSE, *_DEEPEP),
            "trtllm": _none(*_SPARSE, "moe_a2a"),
        },
    ),
)
"""Every system that is distilled; a new one is an entry here."""

TARGETS: Final = tuple(system.target(engine) for system in SYSTEMS for engine in NEWEST)
"""Every file that is written."""

ALLOWED_TABLES: Final = tuple(dict.fromkeys(path for target in TARGETS for path in target.paths))
"""Every file this program may open, relative to the package's ``systems`` folder."""


@dataclass(frozen=True)
class SourceTable:
    """One opened table: its columns, and what the metadata says about it."""

    name: str
    rows: int
    sha256: str
    columns: Columns


def find_systems() -> Path:
    """The ``systems`` folder of the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"{DISTRIBUTION} is not installed: install the extra 'distil' or pass --data"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "systems"


def source_version(systems: Path) -> str:
    """Version of the unpacked wheel, from its dist-info folder's *name*: nothing is opened."""
    found = sorted(systems.parent.parent.glob(f"{PACKAGE}-*.dist-info"))
    if len(found) != 1:
        raise SystemExit(
            f"expected one {PACKAGE}-*.dist-info beside the package, found {len(found)}"
        )
    return found[0].name.removesuffix(".dist-info").removeprefix(f"{PACKAGE}-")


def open_table(systems: Path, name: str) -> SourceTable:
    """Read one allowed parquet table.

    Raises
    ------
    ForbiddenTableError
        If ``name`` is not literally in `ALLOWED_TABLES`; checked before the file is touched.
    ReusedTableError
        If its folder declares reuse: `SYSTEMS` must then name the version that was measured.

    """
    if name not in ALLOWED_TABLES:
        raise ForbiddenTableError(f"{name!r} is not on the allow-list of kernel tables")
    if (systems / name).with_name(REUSE).exists():
        raise ReusedTableError(f"{name!r} is declared another version's: name that one instead")
    import pyarrow as pa
    import pyarrow.parquet as pq

    blob = (systems / name).read_bytes()
    table = pq.read_table(pa.BufferReader(blob))
    columns = {c: table[c].to_numpy() for c in table.column_names}
    return SourceTable(name, int(table.num_rows), hashlib.sha256(blob).hexdigest(), columns)
