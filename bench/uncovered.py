"""What a benchmark raises for a measured run that the planner cannot reproduce."""

from __future__ import annotations


class UncoveredError(Exception):
    """A row that the planner cannot simulate; the text is the reason, one line, by name."""
