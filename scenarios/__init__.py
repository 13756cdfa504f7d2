"""Bundled scenarios and traces (data only)."""
