"""Readers of model configs, one module per group of families, and the bundled catalogue."""
