"""Documents that users bring: text files, folders, .jsonl, .parquet, and datasets of the Hugging Face hub.

Everything is read lazily, so that the first documents of a large set can be read without the rest.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from delta_suite.errors import CalibrationError, brief
from delta_suite.paths import expand_user, is_directory, path_error, shorten

HUB = "hf:"
"""Prefix of a dataset of the hub: `hf:org/name[/config][:split[:column]]`."""

HUB_DOCUMENTS = 128
"""Number of documents taken from a hub dataset where none is given, as it may have billions."""

COLUMN = "text"
"""Key or column that holds the text of a document, unless another is named."""

TEXT_SUFFIXES = (".txt", ".md")
"""Endings of the files in a folder that are documents."""

_FORMS = f"a text file, a .jsonl or .parquet file, a folder of {' or '.join(TEXT_SUFFIXES)} files, or {HUB}org/name"


def read_texts(name: str, documents: int | None) -> tuple[str, ...]:
    """Return the first `documents` texts of a source that are not blank, in order; all of them if `documents` is None.

    `name` is a path, or `hf:org/name[/config][:split[:column]]`, where org/name may also be a local folder, and split
    and column are `train` and `text` unless given. In `.jsonl` and `.parquet` files the key or column is `text`. Files
    are UTF-8.

    Raises CalibrationError where the source does not exist, cannot be read, or holds no text.
    """
    texts = _hub(name) if name.startswith(HUB) else _path(expand_user(name))
    chosen = tuple(islice((text for text in texts if text.strip()), documents))
    if not chosen:
        raise CalibrationError(f"calibration {name} holds no text. Put at least one document into it.")
    return chosen


def _path(path: Path) -> Iterator[str]:
    if why := path_error(path):
        raise CalibrationError(
            f"no calibration {shorten(path)!r} (looked for {shorten(path.absolute())}: {why}). "
            f"--calibration takes core, seed, {_FORMS}."
        )
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".jsonl":
        return _jsonl(path)
    if path.suffix == ".parquet":
        return _parquet(path)
    return iter([_read(path)])


def _folder(path: Path) -> Iterator[str]:
    files = sorted(file for file in path.iterdir() if file.suffix in TEXT_SUFFIXES and file.is_file())
    if not files:
        tables = sorted(file.name for file in path.rglob("*") if file.suffix in {".parquet", ".jsonl"})
        hint = f" For the tables in it ({tables[0]}) write {HUB}{path}, or name one of them." if tables else ""
        raise CalibrationError(
            f"calibration folder {path} holds no {' or '.join(TEXT_SUFFIXES)} file. Put one document in each.{hint}"
        )
    return map(_read, files)


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"calibration file {path} cannot be read: {error.strerror or error}.") from None
    return _decoded(content, path, "it")


def _decoded(content: bytes, path: Path, what: str) -> str:
    """Decode UTF-8, with or without a byte order mark. Raises CalibrationError for other encodings and binary data."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise _not_text(path, what, "is UTF-16", encoding="UTF-16") from None
        if b"\0" in content:
            raise _not_text(path, what, "is binary data") from None
        raise _not_text(path, what, f"is not UTF-8 at byte {error.start}", encoding="LATIN1") from None
    if "\0" in text:
        raise _not_text(path, what, "is binary data")
    return text


def _not_text(path: Path, what: str, why: str, encoding: str = "") -> CalibrationError:
    """Return the error of a file that is not text; `encoding` is the one it may have, where a conversion can help."""
    cure = f" (iconv -f {encoding} -t UTF-8 converts)" if encoding else ""
    return CalibrationError(
        f"calibration file {path} cannot be read: {what} {why}. --calibration takes {_FORMS}, all of them UTF-8{cure}."
    )


def _jsonl(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _text_of(_decoded(line, path, f"line {number}"), path, number)
    except OSError as error:
        raise CalibrationError(f"calibration file {path} cannot be read: {error.strerror or error}.") from None


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise CalibrationError(f"{path}:{number}: not a document: each line must be a JSON object with the key `text`.")
    if COLUMN not in row:
        raise CalibrationError(
            f"{path}:{number}: not a document: it has no key `{COLUMN}` (its keys: {', '.join(row) or 'none'}). "
            f"Rename the one that holds the text."
        )
    return _string(row[COLUMN], f"{path}:{number}", COLUMN)


def _string(value: object, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise CalibrationError(
            f"{where}: not a document: `{column}` is {type(value).__name__}, not text. Name or write a column of texts."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where}: not a document: character {error.start} of `{column}` is half of a surrogate pair "
            f"(\\u{ord(value[error.start]):04x}), which UTF-8 has not. Remove it, or put the whole character there."
        ) from None
    return value


def _parquet(path: Path) -> Iterator[str]:
    if importlib.util.find_spec("pyarrow") is None:
        raise _without_extra(str(path), "pyarrow", "parquet")
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if COLUMN not in names:
                raise CalibrationError(
                    f"calibration file {path} has no column `{COLUMN}` (its columns: {', '.join(names)}). Rename the "
                    f"one that holds the texts, or name it: {HUB}FOLDER:train:COLUMN, with the folder of the file."
                )
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[COLUMN]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _string(value, f"{path}, row {row}", COLUMN)
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise CalibrationError(
            f"calibration file {path} cannot be read as parquet: {brief(error)}. Is it whole?"
        ) from None


def _hub(name: str) -> Iterator[str]:
    """Stream the texts of a dataset. No code of the dataset runs: `datasets` cannot run any from 4.0 on."""
    dataset, config, split, column = _parts(name)
    if importlib.util.find_spec("datasets") is None:
        raise _without_extra(name, "datasets", "datasets")
    import datasets
    from huggingface_hub import HfApi

    from delta_suite.models.sources.hub import TIMEOUT

    # Any exception: it comes from a chain of libraries (datasets, fsspec, huggingface_hub, its HTTP client, pyarrow).
    try:
        if not is_directory(Path(dataset)):
            HfApi().dataset_info(dataset, timeout=TIMEOUT)  # load_dataset would retry for half a minute
        rows: Any = datasets.load_dataset(dataset, config, split=split, streaming=True)
        columns = rows.column_names or list(next(iter(rows), {}))
    except Exception as error:
        raise _unloadable(name, dataset, error) from error
    if column not in columns:
        raise CalibrationError(
            f"calibration {name}: the dataset has no column `{column}` (its columns: {', '.join(columns)}). "
            f"Name the one that holds the texts: {HUB}{dataset}{f'/{config}' if config else ''}:{split}:COLUMN."
        )
    read = iter(rows.select_columns([column]))
    number = 0
    while True:
        try:
            row = next(read, None)
        except Exception as error:
            raise _unloadable(name, dataset, error) from error
        if row is None:
            return
        number += 1
        yield _string(row[column], f"calibration {name}, row {number}", column)


def _parts(name: str) -> tuple[str, str | None, str, str]:
    """Split the name of a dataset into dataset, config, split and column."""
    dataset, split, column, *rest = [*name.removeprefix(HUB).split(":"), "", ""]
    if not dataset or any(rest):
        raise CalibrationError(
            f"calibration {name!r} names no dataset: write {HUB}org/name, {HUB}org/name:split, "
            f"{HUB}org/name:split:column, or {HUB}org/name/config:... where the dataset has several."
        )
    config = None
    if not is_directory(Path(dataset)) and dataset.count("/") == 2:
        dataset, _, config = dataset.rpartition("/")
    return dataset, config, split or "train", column or COLUMN


def _unloadable(name: str, dataset: str, error: Exception) -> CalibrationError:
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        if not isinstance(cause, Exception) or cause in chain:
            break
        chain.append(cause)
    # Many exception classes mean offline mode or a lost network; one means that the dataset does not exist.
    unreached = not is_directory(Path(dataset)) and any(
        isinstance(link, ConnectionError) or type(link).__name__ in {"ConnectError", "OfflineModeIsEnabled"}
        for link in chain
    )
    if unreached:
        return CalibrationError(
            f"calibration {name}: the hub cannot be reached ({brief(error)}). Run it where there is a network and"
            f" without HF_HUB_OFFLINE, or bring the dataset here (hf download --repo-type dataset {dataset} "
            f"--local-dir FOLDER) and use {HUB}FOLDER."
        )
    return CalibrationError(
        f"calibration {name}: the dataset cannot be loaded ({brief(error)}). Check its id, its config "
        f"({HUB}org/name/config), its split ({HUB}org/name:split), and for a gated one the login (hf auth login)."
    )


def _without_extra(name: str, package: str, extra: str) -> CalibrationError:
    return CalibrationError(
        f"calibration {name} needs the Python package {package}, which is not installed. "
        f"Install it: pip install 'delta-suite[{extra}]'."
    )
