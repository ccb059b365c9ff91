"""Make records ready for a pull request: verified, with the name of who contributes them, and in their place.

The name is part of the record that is contributed, so that it goes wherever the record goes. The measurement itself is
not rewritten: what is submitted is a second file, whose name differs because the hash in it covers the submitter, and
in which nothing but the submitter and the name of the file of arrays differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from delta_suite.errors import OptionError, RecordError
from delta_suite.paths import cache_root, is_directory, path_error
from delta_suite.reading import UnreadableFileError, read_bytes
from delta_suite.records.cache import Cache
from delta_suite.records.format import to_json
from delta_suite.records.record import ArrayReference, Record, SubmitterRecord
from delta_suite.records.store import exclusive, record_path
from delta_suite.records.submitter import submitter_problem
from delta_suite.records.verify import not_formed_anew
from delta_suite.sharing.shareable import content_of, shareable
from delta_suite.writing import write_together


def submitter(handle: str, hardware: str | None = None, note: str | None = None) -> SubmitterRecord:
    """Return who submits, and how. Raises OptionError for words that a record does not take.

    Example:
        >>> submitter("@ada", note="two runs").handle
        'ada'
    """
    handle = handle.removeprefix("@")
    if problem := submitter_problem(handle, hardware, note):
        raise OptionError(f"--handle, --hardware, --note: {problem}.")
    return SubmitterRecord(handle=handle, hardware=hardware, note=note)


def submit(records: Sequence[Path], results: Path, who: SubmitterRecord) -> list[Path]:
    """Write a submitted copy of each record and its arrays into a results folder, and return the files.

    What this submitter has submitted is left out. Nothing is written where one of them cannot be submitted. Raises
    OptionError for a folder, whose records may be those of others, and RecordError for a record that `verify --whole`
    refuses, whose arrays are not beside it, or that has another submitter.
    """
    if folder := next(filter(is_directory, records), None):
        raise OptionError(f"{folder} is a folder, and may hold records of others: name the records that are yours.")
    files = [file for path in dict.fromkeys(records) for file in _submitted(path, results, who)]
    written: list[Path] = []
    for json_file, arrays in zip(files[::2], files[1::2], strict=True):
        with exclusive(json_file[0], Cache(cache_root())):
            new = [(path, content) for path, content in (arrays, json_file) if not _there(path, content)]
            if new:
                write_together(new)
        written += [json_file[0], arrays[0]]
    return written


def _submitted(path: Path, results: Path, who: SubmitterRecord) -> list[tuple[Path, bytes]]:
    """Return the two files of a submitted copy: record, then arrays; none of what is submitted already."""
    record, arrays = shareable(path)
    if notes := not_formed_anew(record):
        raise RecordError(
            f"{path} cannot be submitted, as nobody could check all of it: {notes[0]}. Measure again: "
            "delta-suite measure --fresh."
        )
    if record.submitter == who:
        return []
    if record.submitter is not None:
        raise RecordError(
            f"{path} has a submitter, {record.submitter.handle}. Submit the measurement itself, whose record has none."
        )
    named = record.model_copy(update={"submitter": who})
    place = record_path(results, named)
    beside = place.with_suffix(".safetensors")
    sha256 = record.arrays.sha256 if record.arrays is not None else ""
    named = named.model_copy(update={"arrays": ArrayReference(file=beside.name, sha256=sha256)})
    return [(place, to_json(named).encode()), (beside, content_of(arrays))]


def private_place(record: Record) -> str | None:
    """Return the folder of this machine that a record names as the source of the weights, or None.

    Example:
        >>> from types import SimpleNamespace
        >>> private_place(SimpleNamespace(model=SimpleNamespace(source="directory:/home/ada/run/step-8")))
        '/home/ada/run/step-8'
    """
    _, kind, place = record.model.source.partition("directory:")
    return place if kind and Path(place).is_absolute() else None


def _there(path: Path, content: bytes) -> bool:
    """Return True if a file is there with this content. Raises RecordError where it has another one."""
    if path_error(path) is not None:
        return False
    try:
        same = read_bytes(path, max(len(content), 1)) == content
    except UnreadableFileError:
        same = False
    if not same:
        raise RecordError(f"{path} is there already, and is another file. Look at it, and remove it or keep it.")
    return True
