"""Examples in README and docs run as they stand, and print what the text says.

In a ``console`` block each line after ``$`` is a command, and what follows is its whole output; a
line ``...`` stands for any lines, ``...`` inside a line for any text in it. A comment
``<!-- file: NAME -->`` before a block makes that block a file.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.command import Cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- file: (?P<file>\S+) -->\n)?^```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.M | re.S
)
STATUS = "; echo $?"
SHIPPED = sorted((ROOT / "docs" / "scenarios").glob("*.md"))
"""One page for each bundled scenario of a mixture of experts; their commands take long."""


@dataclass(frozen=True)
class Step:
    """A file to write, or a command with the output that the text promises."""

    command: str
    expected: str
    file: str | None = None


def steps(page: Path) -> list[Step]:
    """What a page does, in its order."""
    found = []
    for block in BLOCK.finditer(page.read_text()):
        if block["file"]:
            found.append(Step("", block["body"], block["file"]))
        elif block["kind"] == "console":
            for part in re.split(r"^\$ ", block["body"], flags=re.M)[1:]:
                command, _, expected = part.partition("\n")
                found.append(Step(command, expected))
    return found


def printed(cli: Cli, command: str) -> str:
    """What a terminal shows of a command."""
    name, *arguments = shlex.split(command.removesuffix(STATUS))
    assert name == "planner"
    code, out, err = cli(*arguments)
    status = f"{code}\n" if command.endswith(STATUS) else ""
    assert status or code == 0, err
    return out + err + status


def pattern(expected: str) -> str:
    """A regular expression of an output, ends of lines aside."""
    lines = []
    for line in expected.splitlines():
        if line.strip() == "...":
            lines.append(r"(?:.*\n)*?")
        else:
            lines.append(
                ".*".join(re.escape(part.rstrip()) for part in line.split("...")) + r" *\n"
            )
    return "".join(lines)


WITH_STEPS = [page for page in PAGES if steps(page)]


@pytest.mark.parametrize(
    "page",
    WITH_STEPS + [pytest.param(page, marks=pytest.mark.slow) for page in SHIPPED],
    ids=lambda page: page.name,
)
def test_page(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: Path) -> None:
    """Every command of a page prints what the page shows."""
    monkeypatch.chdir(tmp_path)
    for step in steps(page):
        if step.file is not None:
            Path(step.file).write_text(step.expected)
            continue
        output = printed(cli, step.command)
        assert re.fullmatch(pattern(step.expected), output), f"{step.command}\n{output}"


def test_the_pages_that_have_examples() -> None:
    """A page that loses its examples is noticed."""
    pages = {page.name for page in WITH_STEPS}
    assert {"README.md", "autoscaling.md", "ci.md", "deploy.md"} <= pages


@pytest.mark.parametrize("page", SHIPPED, ids=lambda page: page.name)
def test_page_of_a_scenario_names_its_locked_plan(page: Path) -> None:
    """What a page says is deployed is what the scenario's lock holds."""
    lock = json.loads((ROOT / "scenarios" / f"{page.stem}.lock.json").read_text())
    text = " ".join(page.read_text().split())
    assert f"`planner solve {page.stem}` deploys `{lock['answer']['plan']}`" in text
    assert steps(page)


def test_library_example_of_deploy(capsys: pytest.CaptureFixture[str]) -> None:
    """The Python block prints what the line below it says."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    found = re.search(r"^```python\n(.*?)^```\n\nprints `(.*?)`", text, re.M | re.S)
    assert found is not None
    exec(found[1], {})
    assert capsys.readouterr().out == f"{found[2]}\n"


def test_pattern() -> None:
    """Dots stand for lines or text; everything else must be there."""
    assert re.fullmatch(pattern("a\n...\nb ... d\n"), "a\nx\ny\nb c d\n")
    assert not re.fullmatch(pattern("a\nb\n"), "a\nb\nc\n")
