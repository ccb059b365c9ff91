"""Documents that users bring: text files, folders, .jsonl, .parquet, and datasets of the Hugging Face hub.

Everything is read lazily, so that the first documents of a large set can be read without the rest.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delta_suite.errors import CalibrationError, brief
from delta_suite.paths import expand_user, is_directory, path_error, shorten
from delta_suite.reading import UnreadableFileError, decode, open_regular, read_text, system_reason

HUB = "hf:"
"""Prefix of a dataset of the hub: `hf:org/name[/config][:split[:column]]`."""

HUB_DOCUMENTS = 128
"""Number of documents taken from a hub dataset where none is given, as it may have billions."""

COLUMN = "text"
"""Key or column that holds the text of a document, unless another is named."""

DOMAIN, LANGUAGE = "domain", "language"
"""Keys or columns that hold the domain and the language of a document, where a source has them."""

TEXT_SUFFIXES = (".txt", ".md")
"""Endings of the files in a folder that are documents."""

_TABLES = (".parquet", ".jsonl")

_UNREAD_TABLES = (".json", ".ndjson", ".csv", ".tsv")

DOCUMENT_LIMIT = 256 << 20
"""Most bytes of one document, in a file of its own or in a line."""

_FORMS = f"a text file, a .jsonl or .parquet file, a folder of {' or '.join(TEXT_SUFFIXES)} files, or {HUB}org/name"


@dataclass(frozen=True)
class Document:
    """One text, and what its source says of it."""

    text: str
    domain: str | None = None
    """The domain, such as `news`: documents of one domain are no independent draws."""
    language: str | None = None
    where: str = ""
    """The place of the document in its source, for messages."""


def read_texts(name: str, documents: int | None) -> tuple[tuple[Document, ...], int]:
    """Return the first `documents` texts of a source, in order, and how many repeated ones were left out.

    All texts are returned if `documents` is None. Blank ones are left out. So is one that differs from an earlier one
    in nothing but white space: in both halves of the documents it would make directions look more reliable than they
    are.

    `name` is a path, or `hf:org/name[/config][:split[:column]]`, where org/name may also be a local folder, and split
    and column are `train` and `text` unless given. In `.jsonl` and `.parquet` files the key or column is `text`. Files
    are UTF-8. Tables may have `domain` and `language`, too.

    Raises CalibrationError where the source does not exist, cannot be read, or holds no text, and where some of the
    documents have a domain and others none.
    """
    try:
        chosen, repeated = distinct(_hub(name) if name.startswith(HUB) else _path(expand_user(name)), documents)
    except UnreadableFileError as error:
        raise CalibrationError(f"calibration file {error} --calibration takes {_FORMS}, all of them UTF-8.") from None
    if not chosen:
        raise CalibrationError(f"calibration {name} holds no text. Put at least one document into it.")
    return chosen, repeated


def distinct(texts: Iterable[Document], documents: int | None = None) -> tuple[tuple[Document, ...], int]:
    """Return the first `documents` texts, without blank and repeated ones, and how many repeated ones were left out.

    Raises CalibrationError where some of them have a domain and others none.

    Example:
        >>> chosen, repeated = distinct(map(Document, ["one text", " ", "another", "one  text"]))
        >>> [document.text for document in chosen], repeated
        (['one text', 'another'], 1)
    """
    chosen: list[Document] = []
    seen: set[bytes] = set()
    repeated = 0
    for document in texts:
        if not document.text.strip():
            continue
        digest = _without_white_space(document.text)
        if digest in seen:
            repeated += 1
            continue
        seen.add(digest)
        if chosen and (document.domain is None) != (chosen[0].domain is None):
            one, other = (chosen[0], document) if document.domain is None else (document, chosen[0])
            raise CalibrationError(
                f"{one.where} has a `{DOMAIN}` and {other.where} has none. Name that of every document, or of none."
            )
        chosen.append(document)
        if len(chosen) == documents:
            break
    return tuple(chosen), repeated


def listed(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts of a list. Raises CalibrationError for what is no text, and says which."""
    if isinstance(texts, str):
        raise CalibrationError("texts is one string, and a calibration is a list of them: texts=[...].")
    kind = type(texts).__name__
    if isinstance(texts, os.PathLike):
        raise CalibrationError(f"texts is {kind}, and a file or folder is read by calibration={os.fspath(texts)!r}.")
    # Iterated, these give their keys, the names of their columns, or another order in each process.
    if isinstance(texts, Mapping) or hasattr(texts, "columns"):
        raise CalibrationError(f"texts is {kind}, whose keys or columns are no texts. Give its texts: texts=[...].")
    if isinstance(texts, Set):
        raise CalibrationError(f"texts is {kind}, which has no order, and figures must repeat: texts=sorted(...).")
    if not isinstance(texts, Iterable) or isinstance(texts, bytes | bytearray | memoryview):
        raise CalibrationError(f"texts is {kind}, and a calibration is a list of texts: texts=[...].")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise CalibrationError(f"texts[{number}] is {type(text).__name__}, not text. Give a list of strings.")
        yield _string(text, f"texts[{number}]", COLUMN)


def _without_white_space(text: str) -> bytes:
    """Return a hash of the words of a text, which is not copied: it may have 100 MB."""
    digest = hashlib.sha256()
    for word in re.finditer(r"\S+", text):
        digest.update(word[0].encode() + b" ")
    return digest.digest()


def _path(path: Path) -> Iterator[Document]:
    if why := path_error(path):
        raise CalibrationError(
            f"no calibration {shorten(path)!r} (looked for {shorten(path.absolute())}: {why}). "
            f"--calibration takes core, core-english, seed, {_FORMS}."
        )
    if path.is_dir():
        return _folder(path)
    suffix = _suffix(path)
    if suffix == ".jsonl":
        return _jsonl(path)
    if suffix == ".parquet":
        return _parquet(path)
    if suffix in _UNREAD_TABLES:
        raise CalibrationError(
            f"calibration file {path} is a {suffix} file, whose marks would be measured as text. Write a .jsonl file, "
            f'with {{"{COLUMN}": "..."}} on each line; if it is one text as it stands, call it .txt.'
        )
    return iter([Document(read_text(path, DOCUMENT_LIMIT))])


def _suffix(path: Path) -> str:
    """Return the end of a file's name that tells its form."""
    return path.suffix.lower()


def _folder(path: Path) -> Iterator[Document]:
    try:
        # What is no file under such a name, or leads nowhere, is not passed over: reading it says why.
        files = sorted(file for file in path.iterdir() if _suffix(file) in TEXT_SUFFIXES and not file.is_dir())
    except OSError as error:
        raise UnreadableFileError(path, system_reason(error)) from None
    if not files:
        # Not deeper: the folder may be the root of a disk.
        tables = sorted(file.name for depth in ("*", "*/*") for file in path.glob(depth) if _suffix(file) in _TABLES)
        hint = f" For the tables in it ({tables[0]}) write {HUB}{path}, or name one of them." if tables else ""
        raise CalibrationError(
            f"calibration folder {path} holds no {' or '.join(TEXT_SUFFIXES)} file. Put one document in each.{hint}"
        )
    return (Document(read_text(file, DOCUMENT_LIMIT)) for file in files)


def _jsonl(path: Path) -> Iterator[Document]:
    with open_regular(path) as lines:
        number = 0
        while line := lines.readline(DOCUMENT_LIMIT + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > DOCUMENT_LIMIT:
                raise CalibrationError(f"{where}: not a document: the line has more than {DOCUMENT_LIMIT:,} bytes.")
            try:
                text = decode(line, path)
            except UnreadableFileError as error:
                raise CalibrationError(f"{where}: not a document: {error.why}.") from None
            if text.strip():
                yield _document_of(text, where)


def _document_of(line: str, where: str) -> Document:
    try:
        row = json.loads(line, object_pairs_hook=_unrepeated)
    except RecursionError:
        raise CalibrationError(f"{where}: not a document: it is nested too deeply.") from None
    except ValueError as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)  # its line is that of the text
        raise CalibrationError(f"{where}: not a document: not JSON: {why.removesuffix('.')}.") from None
    if not isinstance(row, dict):
        raise CalibrationError(f"{where}: not a document: each line must be a JSON object with the key `{COLUMN}`.")
    if COLUMN not in row:
        raise CalibrationError(
            f"{where}: not a document: it has no key `{COLUMN}` (its keys: {shorten(', '.join(row) or 'none')}). "
            f"Rename the one that holds the text."
        )
    return _document(row, COLUMN, where)


def _document(row: Mapping[str, Any], column: str, where: str) -> Document:
    """Return the document of a row. Raises CalibrationError where its text or domain is none."""
    domain, language = row.get(DOMAIN), row.get(LANGUAGE)
    if isinstance(domain, int) and not isinstance(domain, bool):
        domain = str(domain)
    if domain is not None:
        domain = _string(domain, where, DOMAIN).strip() or None
    return Document(_string(row[column], where, column), domain, language if isinstance(language, str) else None, where)


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs) and sum(key == COLUMN for key, _ in pairs) > 1:
        raise ValueError(f"the key `{COLUMN}` stands twice")
    return row


def _string(value: object, where: str, column: str) -> str:
    if not isinstance(value, str):
        cure = (
            "Write its name, or leave it out of every document"
            if column == DOMAIN
            else "Name or write a column of texts"
        )
        kind = "null" if value is None else type(value).__name__
        raise CalibrationError(f"{where}: not a document: `{column}` is {kind}, not text. {cure}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where}: not a document: character {error.start} of `{column}` is half of a surrogate pair "
            f"(\\u{ord(value[error.start]):04x}), which UTF-8 has not. Remove it, or put the whole character there."
        ) from None
    return value


def _parquet(path: Path) -> Iterator[Document]:
    if importlib.util.find_spec("pyarrow") is None:
        raise _without_extra(str(path), "pyarrow", "parquet")
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with open_regular(path) as content, ParquetFile(content) as file:
            names = file.schema_arrow.names
            if COLUMN not in names:
                raise CalibrationError(
                    f"calibration file {path} has no column `{COLUMN}` (its columns: {', '.join(names)}). Rename the "
                    f"one that holds the texts, or name it: {HUB}FOLDER:train:COLUMN, with the folder of the file."
                )
            row = 0
            columns = [COLUMN, *(name for name in (DOMAIN, LANGUAGE) if name in names)]
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for value in batch.to_pylist():
                    row += 1
                    yield _document(value, COLUMN, f"{path}, row {row}")
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise CalibrationError(
            f"calibration file {path} cannot be read as parquet: {brief(error)}. Is it whole?"
        ) from None


def _hub(name: str) -> Iterator[Document]:
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
    read = iter(rows.select_columns([column, *({DOMAIN, LANGUAGE} & set(columns) - {column})]))
    number = 0
    while True:
        try:
            row = next(read, None)
        except Exception as error:
            raise _unloadable(name, dataset, error) from error
        if row is None:
            return
        number += 1
        yield _document(row, column, f"calibration {name}, row {number}")


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
