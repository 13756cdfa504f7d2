"""Distil published kernel tables into the compact files that ship with this package.

Run as ``python -m profiles.distil --out profiles/kernels [--data SYSTEMS_DIR]`` with the extra
``distil`` installed. `systems` lists what is read, `families` says what it means, `records` makes
grids of it, `encode` codes them and `write` writes them.
"""
