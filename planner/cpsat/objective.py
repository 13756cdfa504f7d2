"""The master's objective: levels minimised one after the other, so that ties are decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ortools.sat.python import cp_model

    from planner.cpsat.variables import Variables

Column = tuple[int, int]


@dataclass(frozen=True)
class Objective:
    """Column values by level, most important first.

    Parameters
    ----------
    model, variables
        What is optimised.
    levels
        For each level, the value of every column; whole numbers.
    """

    model: cp_model.CpModel
    variables: Variables
    levels: tuple[Mapping[Column, int], ...]

    def expression(self, level: int) -> cp_model.LinearExprT:
        """The level's value of a deployment."""
        values = self.levels[level]
        # Only differences matter, and small coefficients keep the solver's sums in range.
        base = min(values.values(), default=0)
        return sum(
            (values[column] - base) * variable
            for column, variable in sorted(self.variables.column.items())
            if column in values
        )

    def minimize(self, level: int) -> None:
        """Make ``level`` the objective."""
        self.model.minimize(self.expression(level))

    def hold(self, level: int, chosen: Column) -> None:
        """Keep ``level`` as low as in the column ``chosen`` from now on."""
        values = self.levels[level]
        base = min(values.values(), default=0)
        self.model.add(self.expression(level) <= values[chosen] - base)
