"""Readers of the file formats at the outer edge."""
