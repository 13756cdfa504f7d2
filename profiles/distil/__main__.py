"""Command line of ``python -m profiles.distil``."""

from __future__ import annotations

import argparse
from pathlib import Path

import profiles.distil
from profiles.distil.systems import TARGETS, find_systems
from profiles.distil.write import write


def main() -> None:
    """Write every target."""
    parser = argparse.ArgumentParser(prog="profiles.distil", description=profiles.distil.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--data", type=Path, help="a 'systems' folder; default: installed package")
    arguments = parser.parse_args()
    systems = arguments.data or find_systems()
    for target in TARGETS:
        file = write(systems, arguments.out, target)
        print(f"{file}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
