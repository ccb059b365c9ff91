"""Records that others can be given: verified, whole, and under their own names."""

from __future__ import annotations

from pathlib import Path

from delta_suite.errors import RecordError
from delta_suite.reading import ARRAYS_LIMIT, UnreadableFileError, read_bytes
from delta_suite.records.record import SCHEMA, Record
from delta_suite.records.store import load, record_path


def shareable(path: Path) -> tuple[Record, Path]:
    """Return a stored record and the file of its arrays, for others to verify.

    Raises RecordError for a record that `verify` refuses, of an older schema, under another name than its own, or
    without its arrays.
    """
    view = load(path)
    record = view.record
    if record.schema_version != SCHEMA:
        raise RecordError(f"{path} is of schema {record.schema_version}. Measure again: delta-suite measure --fresh.")
    if view.arrays is None or record.arrays is None:
        raise RecordError(
            f"{path} cannot be shared: its arrays are not beside it, and nobody could verify it. Copy them there, or "
            "measure again: delta-suite measure --fresh."
        )
    proper = record_path(Path(), record).name
    if (path.name, record.arrays.file) != (proper, Path(proper).with_suffix(".safetensors").name):
        raise RecordError(
            f"{path} cannot be shared under this name: its own is {proper}. Give both files their names back."
        )
    return record, path.parent / record.arrays.file


def content_of(path: Path) -> bytes:
    """Return the content of a file of a record. Raises RecordError where it cannot be read."""
    try:
        return read_bytes(path, ARRAYS_LIMIT)
    except UnreadableFileError as error:
        raise RecordError(str(error)) from None
