"""Results of ``planner check`` as CI systems read them."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from planner.check import CheckResult, Difference

_SUITE = "planner check"


def junit(results: Sequence[CheckResult]) -> str:
    """JUnit XML: one test case a scenario, as GitLab, Jenkins and GitHub's reporters read it.

    The elements and attributes are those of Jenkins' schema
    (github.com/jenkinsci/xunit-plugin, junit-10.xsd).
    """
    failures = str(sum(not r.passed for r in results))
    counts = {"tests": str(len(results)), "failures": failures, "errors": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": _SUITE, **counts})
    for result in results:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": "planner.check", "name": result.scenario}
        )
        if not result.passed:
            first, *rest = (line.strip() for line in result.lines()[1:])
            failure = ElementTree.SubElement(case, "failure", {"message": first})
            failure.text = "\n".join(rest)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def markdown(results: Sequence[CheckResult]) -> str:
    """Markdown for a pull request's comment or a job's summary."""
    different = [r for r in results if not r.passed]
    lines = [f"## planner check: {len(results) - len(different)} of {len(results)} as locked", ""]
    for result in results:
        lines += [
            f"- {'ok' if result.passed else '**different**'} `{result.scenario}`:"
            f" {_code(result.plan or 'infeasible')}"
        ]
    for result in different:
        lines += ["", f"### `{result.scenario}`", "", "| | locked | now |", "|---|---|---|"]
        lines += [_row(difference) for difference in (*result.results, *result.inputs)]
        lines += ["", *(f"- because {_escaped(cause)}" for cause in result.causes)]
    return "\n".join(lines) + "\n"


def _row(difference: Difference) -> str:
    cells = (difference.what, *map(_cell, (difference.was, difference.now)))
    return f"| {' | '.join(cells)} |"


def _cell(value: object) -> str:
    return "" if value is None else _code(str(value))


def _code(text: str) -> str:
    return f"`{_escaped(text)}`"


def _escaped(text: str) -> str:
    """``text`` without what would end a cell of a table or a line of code."""
    return text.replace("|", "\\|").replace("`", "'")
