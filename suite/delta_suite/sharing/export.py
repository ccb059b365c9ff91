"""The figures of records as a file for other programs: CSV, JSON lines or parquet."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Callable, Iterable, Iterator

from delta_suite.errors import OptionError, SuiteError
from delta_suite.escaping import csv_cell
from delta_suite.records.figures import COLUMNS, Figure


class ExportError(SuiteError):
    """Error for a format whose package is not installed."""


def export(rows: Iterable[Figure], form: str) -> Iterator[bytes]:
    r"""Yield the rows as the bytes of a file, piece by piece. An absent value is an empty cell, or null.

    form: a key of FORMATS.

    Raises:
        OptionError: the format does not exist.
        ExportError: it needs a package that is not installed.

    Example:
        >>> b"".join(export([], "csv")).startswith(b"record,measured,model,")
        True
    """
    if form not in FORMATS:
        raise OptionError(f"--format {form}: no such format; use one of {', '.join(FORMATS)}")
    return FORMATS[form](rows)


def _csv(rows: Iterable[Figure]) -> Iterator[bytes]:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: csv_cell(value) for name, value in row.items()})
        yield _taken(buffer)
    yield _taken(buffer)


def _taken(buffer: io.StringIO) -> bytes:
    """Return the content of a buffer, and empty it."""
    content = buffer.getvalue().encode()
    buffer.seek(0)
    buffer.truncate()
    return content


def _jsonl(rows: Iterable[Figure]) -> Iterator[bytes]:
    for row in rows:
        yield json.dumps(row, allow_nan=False).encode() + b"\n"


def _parquet(rows: Iterable[Figure]) -> Iterator[bytes]:
    if importlib.util.find_spec("pyarrow") is None:
        raise ExportError(
            "--format parquet needs the Python package pyarrow, which is not installed. "
            "Install it: pip install 'delta-suite[parquet]'; or use --format csv."
        )
    import pyarrow
    from pyarrow import parquet

    kinds = {str: pyarrow.string(), int: pyarrow.int32(), float: pyarrow.float64()}
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in COLUMNS.items()])
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema), buffer)
    yield buffer.getvalue()


FORMATS: dict[str, Callable[[Iterable[Figure]], Iterator[bytes]]] = {"csv": _csv, "parquet": _parquet, "jsonl": _jsonl}
"""Every format, with the function that writes it."""
