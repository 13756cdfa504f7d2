"""Keep numba's compiled loops apart by the sources they were compiled from.

numba's on-disk cache notices an edit of the file that holds a function, but not of the modules
that the function calls, so an edited policy would be tested in its old form.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_SOURCES = sorted([*_ROOT.glob("simulator/**/*.py"), _ROOT / "planner" / "bounds.py"])

_digest = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:16]
os.environ.setdefault("NUMBA_CACHE_DIR", str(_ROOT / ".pytest_cache" / f"numba-{_digest}"))
