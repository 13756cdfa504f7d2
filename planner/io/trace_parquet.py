"""Traces in Parquet, with the columns of a plain CSV trace."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from planner.io.trace_csv import PLAIN_COLUMNS
from planner.io.trace_file import Batch, check_seconds, check_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from planner.errors import InputError
    from planner.io.trace_file import TraceFile

PARQUET_MAGIC: Final = b"PAR1"
"""First four bytes of a Parquet file."""

_BATCH_ROWS: Final = 2**18
"""Rows held at once; as CSV they would be about one chunk of text."""


def parquet_batches(file: TraceFile) -> Iterator[Batch]:
    """Rows of a Parquet trace: numbers of seconds, and whole numbers of tokens.

    Raises
    ------
    InputError
        When pyarrow is not installed, a column is missing or of another type, or a value is null.

    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        rule = "is Parquet, which needs pyarrow: pip install 'serveplan[parquet]', or save as CSV"
        raise file.error("", rule) from None
    try:
        with pq.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            missing = [name for name in PLAIN_COLUMNS if name not in names]
            if missing:
                rule = f"has no column {missing[0]}; a trace has {','.join(PLAIN_COLUMNS)}"
                raise file.error("", rule)
            first = 1
            for part in table.iter_batches(_BATCH_ROWS, columns=list(PLAIN_COLUMNS)):
                yield _batch([part.column(name) for name in PLAIN_COLUMNS], first, file)
                first += part.num_rows
    except (pa.ArrowException, OSError) as error:
        raise file.error("", f"Parquet: {error}") from None
    with file.path.open("rb") as data:
        file.sha256 = _digest(data)


def _digest(data: Any) -> str:
    digest = hashlib.sha256()
    while piece := data.read(2**20):
        digest.update(piece)
    return digest.hexdigest()


def _batch(columns: list[Any], first: int, file: TraceFile) -> Batch:
    """Some rows, the first of them numbered ``first``."""

    def where(row: int, column: int, rule: str) -> InputError:
        place = f"row {first + row}, {PLAIN_COLUMNS[column]}"
        return file.error(place, rule, columns[column][row].as_py())

    for column, values in enumerate(columns):
        if values.null_count:
            raise where(int(np.argmax(values.is_null().to_numpy(False))), column, "is empty")
    time, prompt, output = (values.to_numpy(zero_copy_only=False) for values in columns)
    if time.dtype.kind not in "iuf":
        raise where(0, 0, "must be a number of seconds")
    seconds = check_seconds(time.astype(np.float64), where)
    return Batch(seconds, _tokens(prompt, 1, where), _tokens(output, 2, where), where)


def _tokens(values: NDArray[Any], column: int, where: Any) -> NDArray[np.int64]:
    """Column of whole token counts."""
    if values.dtype.kind not in "iu":
        raise where(0, column, "must be a whole number of tokens")
    if values.dtype == np.uint64:  # a count beyond int64 would turn negative
        values = np.minimum(values, np.uint64(2**62))
    return check_tokens(values.astype(np.int64), column, where)
