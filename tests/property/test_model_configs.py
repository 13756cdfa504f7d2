"""Damaged model configs: one line of explanation or a shape whose weights can be counted."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import InputError
from planner.io.hf_config import read_model
from planner.io.models import catalogue
from simulator.plan import Shape
from simulator.weights import active_parameter_count, parameter_count, weight_bytes_per_rank

if TYPE_CHECKING:
    from simulator.model import ModelShape

CONFIGS = [entry["config"] for entry in catalogue.entries()]

GARBAGE = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 3, 2**31 - 1, 2**31, 10**30, 0.5, -1.5, 1e308]),
    st.sampled_from(["", "fp8", "re:(", "re:.*", "*", "llama", "sliding_attention", "M*E-"]),
    st.just([]),
    st.lists(st.integers(-2, 200), max_size=4),
    st.just({}),
    st.dictionaries(st.sampled_from(["a", "quant_method", "model_type"]), st.text(max_size=5)),
)


def places(config: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Path of every value in a config."""
    items: list[tuple[Any, Any]] = []
    if isinstance(config, dict):
        items = list(config.items())
    elif isinstance(config, list):
        items = list(enumerate(config))
    return [path, *(p for key, value in items for p in places(value, (*path, key)))]


def shape_or_error(path: Path, **options: Any) -> ModelShape | InputError:
    """What reading a config gives; any other exception fails the test."""
    try:
        return read_model(str(path), **options)
    except InputError as error:
        return error


@st.composite
def damaged(draw: st.DrawFn) -> dict[str, Any]:
    """A config of the catalogue with some values dropped or replaced."""
    config: dict[str, Any] = copy.deepcopy(draw(st.sampled_from(CONFIGS)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(config)[1:]))
        parent = config
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = draw(GARBAGE)
        if not config:
            break
    return config


@given(damaged(), st.sampled_from([None, "bf16", "fp8"]), st.sampled_from([None, 1, 100_000]))
@settings(max_examples=400, deadline=None)
def test_damaged_configs(
    config: dict[str, Any], weight_dtype: str | None, max_model_len: int | None
) -> None:
    """Nothing but an InputError of one line comes out, or a shape with positive weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        shape = shape_or_error(path, weight_dtype=weight_dtype, max_model_len=max_model_len)
    if isinstance(shape, InputError):
        assert "\n" not in str(shape)
        assert shape.exit_code == 2
        return
    assert shape.max_position_embeddings > 0
    assert 0 < active_parameter_count(shape) <= parameter_count(shape)
    assert weight_bytes_per_rank(shape, Shape(2)) > 0


@given(st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    """A file of any bytes is an InputError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_bytes(content)
        error = shape_or_error(path)
    assert isinstance(error, InputError)
    assert "\n" not in str(error)
