"""The CP-SAT master: variables, constraints, objective and model."""
