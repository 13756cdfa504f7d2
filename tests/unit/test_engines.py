"""Engine profiles: every value has an origin, and no version takes over another's silently."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import yaml
from pydantic import ValidationError

from planner.engine_settings import EngineSettings
from planner.errors import InputError
from planner.io import engine_file, engines
from planner.io.devices import load_device
from planner.io.engine_file import ENGINES, EngineFile, filled_in
from simulator.plan import BatchingLimits
from simulator.rules import SGLANG, STATIC, TRTLLM, VLLM_V0, VLLM_V1, Rules

if TYPE_CHECKING:
    from pathlib import Path

WANTED = {
    "vllm": (
        "0.6.0 0.10.2 0.11.0 0.11.1 0.11.2 0.12.0 0.13.0 0.14.0 0.15.1 0.16.0 0.17.0 0.18.0 0.19.0 "
        "0.20.0 0.22.0 0.24.0 0.33.0"
    ),
    "sglang": "0.4.5 0.5.1.post1 0.5.5.post1 0.5.6.post2 0.5.8.post1 0.5.9 0.5.10 0.5.14 0.5.23",
    "trtllm": "0.11.0 0.14.0 1.0.0rc3 1.1.0rc2.post2 1.2.0rc6.post2 1.3.0rc20",
}
EVERY = [(name, version) for name in ENGINES for version in WANTED[name].split()]
H100, H200, B200 = map(load_device, ("H100-SXM-80GB", "H200-SXM-141GB", "B200-SXM-180GB"))
L40S, A100, RTX_4090 = map(load_device, ("L40S", "A100-SXM4-80GB", "RTX-4090"))
LONG = 131_072


@pytest.fixture
def data(request: pytest.FixtureRequest) -> dict:
    """The shipped vLLM file as plain data, everything filled in."""
    path: Path = request.config.rootpath / "profiles" / "engines" / "vllm.yaml"
    return filled_in(yaml.safe_load(path.read_text(encoding="utf-8")))


def rules(
    name: str, version: str, settings: EngineSettings = engines.DEFAULTS, context: int = 8192
) -> Rules:
    """Batching rules of a version."""
    return engines.load_engine(name, version).rules(context, settings)


def test_every_version_ships() -> None:
    """Those that measured runs and kernel tables need, in order of release."""
    assert list(engines.engine_versions()) == EVERY


def test_the_shipped_file_is_read(data: dict) -> None:
    """What ships passes its own rules."""
    assert EngineFile.model_validate(data).engine == "vllm"


@pytest.mark.parametrize("origin", [{}, {"source": "a file", "fit": "some runs"}])
def test_a_value_needs_one_origin(data: dict, origin: dict[str, str]) -> None:
    """A constant without source or fit, or with both, is refused."""
    changed = copy.deepcopy(data)
    changed["versions"]["0.10.2"]["host"]["iteration_ms"] = {"value": 0.3, **origin}
    with pytest.raises(ValidationError, match="either its source or its fit"):
        EngineFile.model_validate(changed)


def test_same_as_takes_over_what_is_not_stated() -> None:
    """Own fields win, ``null`` removes one, and what was fitted becomes a transfer."""
    base = {
        "a": 1,
        "b": 2,
        "rule": {"x": 1},
        "host": {"iteration_ms": {"value": 1, "fit": "runs"}},
        "overhead_gib": {"value": 1.5, "fit": "runs"},
    }
    document = {"versions": {"1": base, "2": {"same_as": "1", "b": 3, "rule": None}}}
    document["versions"]["3"] = {"same_as": "2"}
    versions = filled_in(document)["versions"]
    transfers = {
        "host": {"transferred_from": "1"},
        "overhead_gib": {"transferred_from": "1"},
    }
    assert versions["1"] == base
    assert versions["2"] == {"same_as": "1", "a": 1, "b": 3, "rule": None, **transfers}
    assert versions["3"] == {**versions["2"], "same_as": "2"}


def test_same_as_must_stand_above() -> None:
    """A version that is the same as a later one, or as none, is refused."""
    with pytest.raises(ValueError, match="2 is same_as 3, which no version above it is"):
        filled_in({"versions": {"2": {"same_as": "3"}, "3": {}}})


def test_a_transfer_is_said_aloud() -> None:
    """0.24.0 runs on 0.10.2's host constants, and its profile carries the sentence that says so."""
    old, new = engines.load_engine("vllm", "0.10.2"), engines.load_engine("vllm", "0.24.0")
    assert new.host == old.host
    assert not old.host_warnings
    assert any("transferred from 0.10.2" in warning for warning in new.host_warnings)
    assert any("transferred from 0.10.2" in warning for warning in new.warnings)


CALIBRATED = {("vllm", "0.6.0"), ("vllm", "0.10.2")}


@pytest.mark.parametrize(("name", "version"), EVERY)
def test_constants_of_another_engine_are_named_with_it(name: str, version: str) -> None:
    """Every version that was not calibrated says from where its host constants are."""
    engine = engines.load_engine(name, version)
    if (name, version) in CALIBRATED:
        assert not engine.host_warnings
    else:
        assert engine.host == engines.load_engine("vllm", "0.10.2").host
        origin = "0.10.2" if name == "vllm" else "vllm 0.10.2"
        assert engine.host_warnings == (
            f"host constants of {name} {version} are transferred from {origin}: "
            "no measured run of this version has calibrated them",
        )


def test_a_version_never_stands_in_for_another() -> None:
    """A version that does not ship is refused even if its neighbour does."""
    with pytest.raises(InputError, match=r"known: 0\.6\.0, 0\.10\.2, .*0\.24\.0"):
        engines.load_engine("vllm", "0.23.0")
    with pytest.raises(InputError, match=r"engine\.name: 'tgi' is not known"):
        engines.load_engine("tgi", "1.0")


@pytest.mark.parametrize("name", ENGINES)
def test_a_table_that_does_not_ship_is_never_named(name: str) -> None:
    """The stand-ins of each file exist on the devices that it names."""
    tables = engine_file.read_engine_file(name).kernel_tables
    shipped = engines.available_kernel_tables()
    assert ("H100-SXM-80GB", name, tables.version) in shipped
    for device, table in tables.devices.items():
        assert (device, name, table.version) in shipped


@pytest.mark.parametrize(
    ("name", "version", "device", "table", "note"),
    [
        (
            "vllm",
            "0.10.2",
            "H100-SXM-80GB",
            "0.24.0",
            "kernel times of vLLM 0.24.0 stand in for 0.10.2, for which none are published",
        ),
        ("vllm", "0.14.0", "A100-SXM4-80GB", "0.14.0", None),  # its own ships there
        (
            "sglang",
            "0.5.9",
            "A100-SXM4-80GB",
            "0.5.10",
            "kernel times of SGLang 0.5.10 stand in for 0.5.9 on A100-SXM4-80GB, the newest "
            "version published for it",
        ),
        (
            "trtllm",
            "1.0.0rc3",
            "L40S",
            "1.3.0rc20",
            "kernel times of TensorRT-LLM 1.3.0rc20 stand in for 1.0.0rc3, for which none are "
            "published; all-reduce and latent-attention times on L40S are those of TensorRT-LLM "
            "1.0.0, the newest for it",
        ),
        ("trtllm", "1.3.0rc20", None, "1.3.0rc20", None),
    ],
)
def test_kernel_tables_that_stand_in(
    name: str, version: str, device: str | None, table: str, note: str | None
) -> None:
    """A version's own table where it ships, else the stand-in and the note that says so."""
    engine = engines.load_engine(name, version, device=device)
    assert engine.kernel_table_version == table
    notes = [text for text in engine.warnings if text.startswith("kernel times")]
    assert notes == ([note] if note else [])


@pytest.mark.parametrize(
    ("name", "version", "device", "limits"),
    [
        # engines-versions.md: from 70 GiB on and not A100 8192 and 1024, else 2048 and 256.
        ("vllm", "0.13.0", H100, (1024, 8192)),
        ("vllm", "0.13.0", A100, (256, 2048)),
        ("vllm", "0.24.0", B200, (1024, 8192)),
        ("vllm", "0.33.0", B200, (1024, 16_384)),  # the tier from 160 GiB came after 0.24
        ("sglang", "0.4.5", H200, (2048, 8192)),
        ("sglang", "0.4.5", RTX_4090, (2048, 2048)),
        ("sglang", "0.5.1.post1", L40S, (2048, 8192)),
        ("sglang", "0.5.9", L40S, (2048, 4096)),
        ("sglang", "0.5.9", RTX_4090, (2048, 2048)),
        ("sglang", "0.5.23", RTX_4090, (2048, 4096)),
        ("sglang", "0.5.9", B200, (2048, 16_384)),
        ("trtllm", "0.11.0", H100, (256, 8192)),
        ("trtllm", "1.2.0rc6.post2", L40S, (2048, 8192)),
    ],
)
def test_default_limits(name: str, version: str, device: object, limits: tuple[int, int]) -> None:
    """Seats and budget by device memory, whatever the context."""
    for context in (4096, LONG):
        assert engines.load_engine(name, version).default_limits(device, context) == BatchingLimits(
            *limits
        )


@pytest.mark.parametrize(
    ("context", "chunked", "budget"),
    [(1024, False, 2048), (8192, False, 8192), (32_768, False, 32_768), (32_769, True, 512)],
)
def test_v0_cuts_prompts_of_long_contexts_only(context: int, chunked: bool, budget: int) -> None:
    """VLLM 0.6.0: above 32,768 tokens chunks of 512, else a budget that holds any prompt."""
    engine = engines.load_engine("vllm", "0.6.0")
    v0 = engine.rules(context)
    assert (v0.policy, v0.chunked, v0.mixed) == (VLLM_V0, chunked, chunked)
    assert (v0.watermark, v0.reserve_full_prompt, v0.prefix_caching) == (0.01, True, False)
    assert engine.default_limits(H100, context) == BatchingLimits(256, budget)
    asked = EngineSettings(chunked=not chunked)
    assert engine.rules(context, asked).chunked is not chunked
    other = max(context, 2048) if chunked else 512
    assert engine.default_limits(H100, context, asked).max_num_batched_tokens == other


def test_v1_rules_by_version() -> None:
    """Asynchronous scheduling from 0.14.0, with stages from 0.15.1; full-prompt gate 0.19.0."""
    versions = WANTED["vllm"].split()[1:]
    late = {v for v in versions if rules("vllm", v).late_results}
    assert late == set(versions[versions.index("0.14.0") :])
    staged = {v for v in versions if engines.load_engine("vllm", v).overlaps_with_pipeline}
    assert staged == set(versions[versions.index("0.15.1") :])
    gated = {v for v in versions if rules("vllm", v).reserve_full_prompt}
    assert gated == set(versions[versions.index("0.19.0") :])
    for version in versions:
        v1 = rules("vllm", version)
        assert (v1.policy, v1.chunked, v1.mixed, v1.evict) == (VLLM_V1, True, True, True)
        assert v1.prefix_caching
        assert engines.load_engine("vllm", version).budget_covers_sequences


@pytest.mark.parametrize("version", WANTED["sglang"].split())
def test_sglang_rules(version: str) -> None:
    """The constants that are the same in all versions, and what binds a prefill batch."""
    got = rules("sglang", version)
    assert (got.policy, got.chunked, got.mixed, got.own_micro_batches) == (
        SGLANG,
        True,
        False,
        True,
    )
    assert got.new_token_ratio == 0.7
    assert got.least_new_token_ratio == pytest.approx(0.098)
    # 600 steps from one to the other.
    assert got.new_token_ratio - 600 * got.ratio_decay == pytest.approx(0.098)
    assert got.reserved_output_tokens == 4096
    binds = version not in ("0.5.14", "0.5.23")
    assert got.prefill_tokens == (16_384 if binds else 0)
    whole = EngineSettings(chunked=False)
    assert rules("sglang", version, whole).prefill_tokens == 16_384
    paged = rules("sglang", version, EngineSettings(block_tokens=64))
    assert paged.chunk_unit == (1 if version in ("0.4.5", "0.5.1.post1") else 64)
    assert got.late_results
    assert not engines.load_engine("sglang", version).overlaps_with_pipeline


def test_sglang_settings() -> None:
    """A conservative scheduler starts higher, at most at one, and the least follows."""
    half = rules("sglang", "0.5.9", EngineSettings(conservativeness=0.5))
    assert (half.new_token_ratio, half.least_new_token_ratio) == (0.35, pytest.approx(0.049))
    assert rules("sglang", "0.5.9", EngineSettings(conservativeness=3.0)).new_token_ratio == 1.0
    engine = engines.load_engine("sglang", "0.5.9")
    whole = EngineSettings(chunked=False)
    assert engine.default_limits(H100, LONG, whole).max_num_batched_tokens == LONG
    assert engine.default_limits(H100, 4096, whole).max_num_batched_tokens == 16_384


def test_trtllm_rules() -> None:
    """No eviction, chunks of whole blocks, and overlap from the PyTorch backend on."""
    old, new = rules("trtllm", "0.14.0"), rules("trtllm", "1.0.0rc3")
    for got, block, late in ((old, 64, False), (new, 32, True)):
        assert (got.policy, got.evict, got.chunked) == (TRTLLM, False, False)
        assert (got.chunk_unit, got.late_results, got.prefix_caching) == (block, late, late)
    asked = EngineSettings(
        capacity_policy="max_utilization",
        chunked=True,
        block_tokens=64,
        prefix_caching=False,
        async_scheduling=False,
    )
    got = rules("trtllm", "1.3.0rc20", asked)
    assert (got.evict, got.chunked, got.chunk_unit) == (True, True, 64)
    assert (got.prefix_caching, got.late_results) == (False, False)
    assert not engines.load_engine("trtllm", "1.3.0rc20").budget_covers_sequences
    static = rules("trtllm", "1.3.0rc20", EngineSettings(capacity_policy="static_batch"))
    assert (static.policy, static.evict) == (STATIC, False)


@pytest.mark.parametrize(("name", "version"), EVERY)
def test_async_scheduling_can_be_fixed(name: str, version: str) -> None:
    """The scenario has the last word."""
    for wanted in (False, True):
        settings = EngineSettings(async_scheduling=wanted)
        assert rules(name, version, settings).late_results is wanted


@pytest.mark.parametrize(
    ("version", "device", "tp", "largest"),
    [
        # engines-versions.md, "Decode graph max bs".
        ("0.4.5", H100, 1, 160),
        ("0.4.5", RTX_4090, 1, 8),
        ("0.4.5", RTX_4090, 4, 80),
        ("0.5.1.post1", H100, 8, 160),
        ("0.5.1.post1", H200, 1, 256),
        ("0.5.1.post1", B200, 1, 512),
        ("0.5.9", L40S, 1, 32),
        ("0.5.9", L40S, 8, 160),
        ("0.5.9", H100, 2, 256),
        ("0.5.9", H100, 4, 512),
        ("0.5.9", B200, 1, 512),
        ("0.5.23", RTX_4090, 1, 48),
    ],
)
def test_sglang_decode_graphs(version: str, device: object, tp: int, largest: int) -> None:
    """The largest follows memory and width; where seats are fewer, seats are captured."""
    graphs = engines.load_engine("sglang", version).graphs_on(device)
    assert graphs.captured(BatchingLimits(2048, 64), tp)[-1] == largest
    seats = largest - 1
    assert graphs.captured(BatchingLimits(seats, 64), tp)[-1] == seats


def test_graphs_of_batches_with_prompts() -> None:
    """VLLM V1 shares the sizes, SGLang has its own from 0.5.10, TensorRT-LLM and V0 have none."""
    limits = BatchingLimits(128, 2048)

    def prompts(name: str, version: str) -> tuple[int, ...]:
        return engines.load_engine(name, version).graphs_on(H100).captured_with_prompts(limits)

    v1 = engines.load_engine("vllm", "0.24.0").graphs
    assert prompts("vllm", "0.24.0") == v1.captured(limits)
    assert v1.captured(limits)[-1] == 256  # twice the sequences
    # 4..32 step 4, 48..256 step 16, 288..512 step 32, 576..1024 step 64, 1280..2048 step 256.
    assert len(prompts("sglang", "0.5.10")) == 8 + 14 + 8 + 8 + 4
    for name, version in (("sglang", "0.5.9"), ("trtllm", "1.3.0rc20"), ("vllm", "0.6.0")):
        assert prompts(name, version) == ()


def test_trtllm_graphs_are_not_padded() -> None:
    """1 to 31, 32, 64 and 128, each for itself."""
    graphs = engines.load_engine("trtllm", "1.0.0rc3").graphs
    assert not graphs.padded
    assert graphs.captured(BatchingLimits(2048, 8192)) == (*range(1, 33), 64, 128)
    assert engines.load_engine("trtllm", "0.14.0").graphs.captured(BatchingLimits(64, 64)) == ()


def test_vllm_graph_sizes_by_version() -> None:
    """67 sizes up to 0.11.0, 51 from 0.11.1; up to 1024 on the largest devices in 0.33.0."""
    limits = BatchingLimits(1024, 8192)

    def sizes(version: str, device: object = H100) -> tuple[int, ...]:
        return engines.load_engine("vllm", version).graphs_on(device).captured(limits)

    assert {version: len(sizes(version)) for version in ("0.10.2", "0.11.0", "0.11.1")} == {
        "0.10.2": 67,
        "0.11.0": 67,
        "0.11.1": 51,
    }
    assert (sizes("0.33.0")[-1], sizes("0.33.0", B200)[-1]) == (512, 1024)
    assert sizes("0.24.0", B200)[-1] == 512
    full = [v for v in WANTED["vllm"].split() if engines.load_engine("vllm", v).graphs.full_decode]
    assert set(WANTED["vllm"].split()) - set(full) == {"0.10.2"}
