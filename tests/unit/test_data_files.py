"""Damaged data files: one line, exit code 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from planner.errors import InputError
from planner.io import data_file
from planner.io.devices import device_names
from planner.io.devices import load_device as _load_device
from planner.io.interconnects import interconnect_names
from planner.io.models import catalogue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHIPPED = Path(__file__).parents[2] / "profiles"
READERS: dict[str, Callable[[], object]] = {
    "models/catalogue.json": catalogue.names,
    "hardware/interconnects.json": interconnect_names,
    "hardware/devices.json": device_names,
}


def forget() -> None:
    """Drop what was read from the shipped files."""
    for cached in (catalogue.entries, catalogue._by_lower_name, _load_device):
        cached.cache_clear()
    for module in ("planner.io.interconnects", "planner.io.devices"):
        found = __import__(module, fromlist=["_known", "_read"])
        for name in ("_known", "_read"):
            if hasattr(found, name):
                getattr(found, name).cache_clear()


@pytest.fixture(params=sorted(READERS))
def damaged(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, Callable[[], object], str]]:
    """A copy of one data file that its reader reads, the reader, and the file's shown name."""
    name = str(request.param)
    for one in READERS:
        (tmp_path / one).parent.mkdir(exist_ok=True)
        shutil.copy(SHIPPED / one, tmp_path / one)
    monkeypatch.setattr(data_file, "files", lambda _: tmp_path)
    forget()
    yield tmp_path / name, READERS[name], f"profiles/{name}"
    forget()


Damaged = tuple[Path, "Callable[[], object]", str]


def test_an_undamaged_copy_is_read(damaged: Damaged) -> None:
    """The fixture itself changes nothing."""
    _, read, _ = damaged
    assert read()


@pytest.mark.parametrize("kept_bytes", [0, 1, 700])
def test_a_cut_file_is_one_line(damaged: Damaged, kept_bytes: int) -> None:
    """Empty or cut: not JSON, and the line says which file."""
    file, read, shown = damaged
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(InputError) as error:
        read()
    assert str(error.value).startswith(f"{shown}: cannot be read: ")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_a_missing_file_is_one_line(damaged: Damaged) -> None:
    """An installation that lost a file."""
    file, read, shown = damaged
    file.unlink()
    with pytest.raises(InputError, match=f"^{shown}: cannot be read: "):
        read()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"schema_version": 99}, "schema_version"),
        ({"surplus": 1}, "surplus"),
    ],
)
def test_a_wrong_field_is_named(damaged: Damaged, change: dict[str, int], field: str) -> None:
    """Another version of the format, or a field that nobody knows."""
    file, read, shown = damaged
    document = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(document | change), encoding="utf-8")
    with pytest.raises(InputError, match=rf"^{shown}: {field}: "):
        read()


def test_a_list_in_place_of_a_mapping_is_refused(damaged: Damaged) -> None:
    """Valid JSON of another kind."""
    file, read, shown = damaged
    file.write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(InputError, match=rf"^{shown}: "):
        read()
