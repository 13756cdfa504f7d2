"""Honest measurement: nothing depends on a model's name or on its exact widths."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import yaml

from planner.io.models import catalogue
from simulator import model as shapes

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for folder in ("planner", "simulator", "bench") for path in (ROOT / folder).rglob("*.py")
)
INSIDE = [path for path in SOURCES if path.relative_to(ROOT).parts[0] != "bench"]

HF_WIDTHS = frozenset(
    (
        *("num_hidden_layers", "moe_intermediate_size", "num_attention_heads"),
        *("num_key_value_heads", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
    )
)
"""Names that a ``config.json`` has for widths, beside those that the simulator shares with it."""

WIDTHS: Final = HF_WIDTHS | {
    name
    for kind in vars(shapes).values()
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__")
    for name, field in kind.__dataclass_fields__.items()
    if field.type == "int"
}


def names_in(text: str) -> list[str]:
    """Catalogue names, with or without their organisation, that a text holds."""
    folded = text.lower()
    every = {name for full in catalogue.names() for name in (full, full.rpartition("/")[2])}
    return sorted(name for name in every if name.lower() in folded)


def test_the_searches_find_what_they_look_for() -> None:
    """Names of the catalogue and widths of the shape are known to the checks below."""
    known = names_in("one of meta-llama/llama-3.1-70b and gpt-oss-120b")
    assert {"gpt-oss-120b", "meta-llama/Llama-3.1-70B"} <= set(known)
    assert {"hidden_size", "num_experts", "num_heads", "head_dim", "num_hidden_layers"} <= WIDTHS
    tree = ast.parse('"""gpt-oss-120b"""\nT = {"gpt-oss-120b": 2.0}\nx = m.hidden_size == 4096')
    assert [text for text, _ in literals(tree)] == ["gpt-oss-120b"]
    assert [text for text, _ in keys_and_tests(tree)] == ["gpt-oss-120b"]
    assert list(width_tests(tree)) == ["m.hidden_size == 4096"]


@pytest.mark.parametrize("path", INSIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_model_is_named_in_planner_or_simulator(path: Path) -> None:
    """No string in code holds a catalogue name; docstrings may, as sources."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [(text, line) for text, line in literals(tree) if names_in(text)] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_keyed_by_a_models_name_or_width(path: Path) -> None:
    """Benchmarks may name the models they run; no key, comparison or pattern may hold one.

    Nor is a width of a model compared with a number above 1 anywhere.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [(text, line) for text, line in keys_and_tests(tree) if names_in(text)] == []
    assert list(width_tests(tree)) == []


@pytest.mark.parametrize("folder", ["engines", "hardware"])
def test_no_profile_is_keyed_by_a_models_name(folder: str) -> None:
    """Constants of engines and devices hold for every model: no key in their files names one."""
    for path in sorted((ROOT / "profiles" / folder).iterdir()):
        if path.suffix in (".yaml", ".json"):
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
            assert [key for key in keys_of(data) if names_in(key)] == [], path.name


def keys_of(data: Any) -> Iterator[str]:
    """Every key of nested mappings."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield str(key)
            yield from keys_of(value)
    elif isinstance(data, list):
        for item in data:
            yield from keys_of(item)


def literals(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Strings of a module and their lines, without docstrings."""
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value, node.lineno


def keys_and_tests(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Strings by which something is looked up or decided, and their lines."""
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.Dict):
            parts = list(node.keys)
        elif isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            decides = ("startswith", "endswith", "get", "match", "fullmatch", "search", "find")
            parts = list(node.args) if node.func.attr in decides else []
        for part in parts:
            for leaf in ast.walk(part) if part is not None else ():
                if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                    yield leaf.value, leaf.lineno


def width_tests(tree: ast.AST) -> Iterator[str]:
    """Comparisons of a width with a number above 1."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            names = {name for operand in operands if (name := width_of(operand))}
            if names & WIDTHS and any(holds_number(operand) for operand in operands):
                yield ast.unparse(node)


def width_of(operand: ast.expr) -> str | None:
    """Last part of a name, or the key of a look-up: ``m.hidden_size``, ``c["hidden_size"]``."""
    if isinstance(operand, ast.Subscript) and isinstance(operand.slice, ast.Constant):
        return str(operand.slice.value)
    if isinstance(operand, ast.Attribute):
        return operand.attr
    return operand.id if isinstance(operand, ast.Name) else None


def holds_number(operand: ast.expr) -> bool:
    """Whether an operand is a number above 1, or a collection that has one."""
    items = operand.elts if isinstance(operand, ast.Tuple | ast.List | ast.Set) else [operand]
    return any(
        isinstance(i, ast.Constant) and isinstance(i.value, int | float) and i.value > 1
        for i in items
    )
