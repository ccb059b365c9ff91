"""The one way to read a file that a user may have written, damaged or replaced: within bounds, or one clear reason.

A FIFO or a device never ends, a file system may hang, and a file of a few gigabytes fills the memory before anything
can be said of it. Every reader of the package goes through `read_bytes` or one of the functions made of it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from delta_suite.errors import SuiteError
from delta_suite.paths import shorten
from delta_suite.toml_lines import Loc, key_lines, line_of

TEXT_LIMIT = 64 << 20
"""Most bytes of a text that is read whole: a record of 126 layers has 2 MB, a tokenizer.json of 256,000 words 35 MB."""

TOML_LIMIT = 1 << 20
"""Most bytes of a TOML file; hypothesis files have some 10 KB, and a parser reads 1 MB in a few seconds."""

ARRAYS_LIMIT = 1 << 30
"""Most bytes of a file of arrays that is read whole; those beside a record of 64 layers of 5,120 have 8 MB."""

DEEPEST = 64
"""Most levels of a JSON or TOML document; readers further in walk it by recursion. A config or a record has fewer than
ten, hypothesis files have 4, models.toml 5."""

SECONDS = 60.0
"""Longest time to read one file; at 1 GiB a disk of 20 MB/s needs 54 s."""

_CHUNK = 1 << 20

_LONG_KEY = re.compile(
    r"""(?<![\w-])(?:(?:[A-Za-z0-9_-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){%d}""" % DEEPEST  # noqa: UP031
)
"""A dotted key of more levels; tomllib needs a minute and gigabytes for one of 60,000."""

_MANY_DIGITS = re.compile(r"(?<![0-9_])[0-9][0-9_]{4299}")


class UnreadableFileError(SuiteError):
    """Error for a file that cannot be read.

    `why` says it in a few words and `line` where, if it is known, for callers that word their own message.
    """

    def __init__(self, path: Path, why: str, line: int | None = None) -> None:
        """Make the error from the file, the reason and the line."""
        super().__init__(path, why, line)
        self.path, self.why, self.line = path, why, line

    def __str__(self) -> str:
        """Return the file, the line and the reason in one line."""
        place = shorten(self.path)
        return f"{place} cannot be read: {self.why}." if self.line is None else f"{place}:{self.line}: {self.why}."


def read_bytes(path: Path, limit: int = TEXT_LIMIT) -> bytes:
    """Return the content of a regular file.

    limit: the most bytes that are read; a larger file is refused before its content is.

    Raises:
        UnreadableFileError: the path is missing, no regular file, too large, too slow, or not accessible.

    Example:
        >>> read_bytes(Path("/dev/zero"))
        Traceback (most recent call last):
        ...
        delta_suite.reading.UnreadableFileError: /dev/zero cannot be read: not a regular file.
    """
    started = time.monotonic()
    content = bytearray()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        while size <= limit and (chunk := file.read(_CHUNK)):
            content += chunk
            size = max(size, len(content))
            if time.monotonic() - started > SECONDS:
                raise UnreadableFileError(path, f"reading it took more than {SECONDS:.0f} seconds")
    if size > limit:
        raise UnreadableFileError(path, f"it has {size:,} bytes, and at most {limit:,} are read")
    return bytes(content)


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file, for callers that read it piece by piece.

    Raises:
        UnreadableFileError: the path is missing, no regular file, or not accessible; also for an OSError of the body.
    """
    try:
        # O_NONBLOCK: opening a FIFO would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UnreadableFileError(path, system_reason(error)) from None
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise UnreadableFileError(path, "a folder, not a file")
        if not stat.S_ISREG(mode):
            raise UnreadableFileError(path, "not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    except OSError as error:
        raise UnreadableFileError(path, system_reason(error)) from None
    finally:
        os.close(descriptor)


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """Return the content of a UTF-8 file, without a byte order mark.

    Raises UnreadableFileError where `read_bytes` does, and for other encodings and binary data.
    """
    return decode(read_bytes(path, limit), path)


def decode(content: bytes, path: Path) -> str:
    r"""Return bytes as text; a byte order mark of UTF-8 is left out.

    Raises UnreadableFileError for other encodings and binary data, with line and cure.

    Example:
        >>> decode(b"\xef\xbb\xbfid = 1", Path("x.toml"))
        'id = 1'
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = None
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            why = "it is UTF-16, and UTF-8 is read: iconv -f UTF-16 -t UTF-8 converts"
        elif b"\0" in content:
            why = "it is binary data, not text"
        else:
            line = content.count(b"\n", 0, error.start) + 1
            why = f"byte 0x{content[error.start]:02x} is not UTF-8: save the file in that encoding"
        raise UnreadableFileError(path, why, line) from None
    if "\0" in text:
        raise UnreadableFileError(path, "it is binary data, not text")
    return text


def read_json(path: Path, limit: int = TEXT_LIMIT) -> Any:
    """Return the content of a JSON file, in which every number is finite.

    Raises UnreadableFileError where `read_text` does, and for text that is not JSON, nested too deeply, or holds NaN,
    Infinity, or a number outside what a float can hold.
    """
    return parse_json(read_text(path, limit), path)


def parse_json(text: str, path: Path) -> Any:
    """Return a JSON text as Python objects. Raises UnreadableFileError as `read_json` does.

    Example:
        >>> parse_json('{"value": 1e999}', Path("x.json"))
        Traceback (most recent call last):
        ...
        delta_suite.reading.UnreadableFileError: x.json cannot be read: not JSON: the number 1e999 is out of bounds.
    """
    content = _parsed(
        lambda: json.loads(text, parse_float=_finite, parse_int=_whole, parse_constant=_no_constant), path, "JSON"
    )
    level = [content]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _members(outer) if isinstance(inner, dict | list)]
        if not level:
            return content
    raise UnreadableFileError(path, "not JSON: it is nested too deeply")


def _members(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def parse_toml(text: str, path: Path) -> dict[str, Any]:
    """Return a TOML text as a dictionary.

    Raises UnreadableFileError for text that is not TOML, is nested too deeply, or has a whole number of more than the
    64 bits of the format.

    Example:
        >>> parse_toml("a = 0x8000000000000000", Path("x.toml"))
        Traceback (most recent call last):
        ...
        delta_suite.reading.UnreadableFileError: x.toml:1: not TOML: the number of `a` is out of bounds.
    """
    if match := _LONG_KEY.search(text):
        raise UnreadableFileError(path, f"not TOML: a key has more than {DEEPEST} parts", _line_at(text, match))
    try:
        content: dict[str, Any] = _parsed(lambda: tomllib.loads(text), path, "TOML")
    except UnreadableFileError as error:
        # Python converts at most 4,300 digits, and says neither which nor where.
        if "Exceeds the limit" in error.why and (match := _MANY_DIGITS.search(text)):
            why = f"not TOML: the number {match[0][:20]}... is out of bounds"
            raise UnreadableFileError(path, why, _line_at(text, match)) from None
        raise
    if (place := _large_number(content)) is not None:
        why = f"not TOML: the number of `{'.'.join(map(str, place))}` is out of bounds"
        raise UnreadableFileError(path, why, line_of(key_lines(text), place))
    return content


def _line_at(text: str, match: re.Match[str]) -> int:
    return text.count("\n", 0, match.start()) + 1


def _large_number(content: dict[str, Any]) -> Loc | None:
    """Return the place of a whole number that 64 bits do not hold, or None."""
    remaining: list[tuple[Loc, Any]] = [((), content)]
    while remaining:
        place, value = remaining.pop()
        if isinstance(value, int) and value.bit_length() > 63:
            return place
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        remaining += [((*place, key), item) for key, item in inside]
    return None


def _parsed(parse: Callable[[], Any], path: Path, form: str) -> Any:
    try:
        return parse()
    except RecursionError:
        raise UnreadableFileError(path, f"not {form}: it is nested too deeply") from None
    except ValueError as error:
        # tomllib puts the place into its message, "Invalid value (at line 3, column 5)".
        place = re.search(r"\(at line (\d+)", str(error))
        why = f"not {form}: {str(error).removesuffix('.')}"
        raise UnreadableFileError(path, why, int(place[1]) if place else None) from None


def _finite(written: str) -> float:
    value = float(written)
    if not math.isfinite(value):
        raise ValueError(f"the number {shorten(written)} is out of bounds")
    return value


def _whole(written: str) -> int:
    # Python converts at most 4,300 digits, and its message for more does not show the number.
    if len(written) > 300:
        raise ValueError(f"the number {written[:20]}... of {len(written)} digits is out of bounds")
    return int(written)


def _no_constant(written: str) -> float:
    raise ValueError(f"{written} is no number")


def system_reason(error: Exception) -> str:
    """Return the system's words for an error of opening or reading.

    Example:
        >>> system_reason(FileNotFoundError(2, "No such file or directory", "x"))
        'No such file or directory'
    """
    if isinstance(error, OSError):
        if error.errno == errno.ENXIO:
            return "not a regular file"  # a socket
        return error.strerror or str(error)
    return str(error)
