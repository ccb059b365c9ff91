"""Headers of GGUF files: keys, values, and the names and shapes of tensors.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a value -> its code in `struct`."""
_BYTES = {kind: struct.calcsize(f"<{code}") for kind, code in _SCALARS.items()}
_STRING, _ARRAY = 8, 9

# fmt: off
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
    40: (64, 36), 41: (128, 18),
}
# fmt: on
"""Type of a tensor -> numbers and bytes of a block. As `gguf.GGML_QUANT_SIZES`, whose package imports numpy, which
collection and runs from the cache do without."""

_VERSIONS = (2, 3)
"""Versions of the format that are read; the first had shorter lengths, and was current for some weeks of 2023."""

_DAMAGES = (struct.error, KeyError, RecursionError, OverflowError, ValueError)
"""Errors of reading a header that does not end within the file, or holds what no version has."""

LONGEST_ARRAY = 4096
"""Most numbers of an array whose values are read, such as those for each layer; vocabularies are not."""


def gguf_problem(path: Path, size: int) -> str | None:
    """Return the problem with a GGUF file of so many bytes; None if header and size show none."""
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            return f"{path.name} is not a GGUF file: it begins with {magic!r}"
        if problem := _version_problem(path, file.read(4)):
            return problem
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            try:
                end = _end(view)
            except _DAMAGES:
                return f"{path.name} is cut short or damaged: its header does not end within its {size:,} bytes"
    if size < end:
        return f"{path.name} is cut short: {size:,} bytes, where its last tensor ends at {end:,}"
    return None


def _version_problem(path: Path, written: bytes) -> str | None:
    """Return the problem with the four bytes of a file's version, or None."""
    if len(written) < 4 or int.from_bytes(written, "little") in _VERSIONS:
        return None  # a file that ends here is cut short
    if (version := int.from_bytes(written, "big")) in _VERSIONS:
        return (
            f"{path.name} is a GGUF file of version {version} for big-endian machines, and little-endian ones are read"
        )
    version = int.from_bytes(written, "little")
    read = " and ".join(map(str, _VERSIONS))
    return f"{path.name} says that it is a GGUF file of version {version}, and versions {read} are read"


def gguf_content(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return what the header of a complete GGUF file says: key -> value, and name of a tensor -> shape as numpy has it.

    Values are numbers, texts and short lists of numbers; of a vocabulary there is only the key, with None.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        header = _Header.of(view)
        values = {key.decode(errors="replace"): _value(view, at) for key, (at, _) in header.pairs.items()}
        shapes = {}
        for name, (shape, _, _) in header.tensors.items():
            numbers = struct.unpack(f"<{(len(shape) - 4) // 8}Q", shape[4:])
            shapes[name.decode(errors="replace")] = numbers[::-1]
    return values, shapes


def gguf_architecture(path: Path) -> Iterator[bytes]:
    """Yield what the header of a complete GGUF file says of architecture and tokenizer.

    These are keys and their values, names of tensors and their shapes, in an order that does not depend on the file's.
    The name of the model, the types of the weights and the chat template are omitted.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        header = _Header.of(view)
        # Without an architecture the loader refuses the file, with a reason.
        architecture = header.value(view, b"general.architecture") if b"general.architecture" in header.pairs else b""
        prefixes = (b"tokenizer.", architecture[12:] + b".")  # behind the value's type and the string's length
        for key in sorted(header.pairs):
            if key == b"general.architecture" or (key.startswith(prefixes) and key != b"tokenizer.chat_template"):
                yield key
                yield header.value(view, key)
        for name, (shape, _, _) in sorted(header.tensors.items()):
            yield name
            yield shape


@dataclass(frozen=True)
class _Header:
    """Positions of the header's parts in the file; none of its values is parsed."""

    pairs: dict[bytes, tuple[int, int]]
    """Key -> start and end of its value, type included."""
    tensors: dict[bytes, tuple[bytes, int, int]]
    """Name -> shape as it is written, type of its numbers, and offset."""
    end: int
    """End of the header."""

    @classmethod
    def of(cls, view: mmap.mmap) -> Self:
        """Return the positions in a mapped file. Raises one of `_DAMAGES` where the file is no whole GGUF file."""
        version, tensor_count, pair_count = struct.unpack_from("<IQQ", view, 4)
        if version not in _VERSIONS:
            raise KeyError(version)
        at = 24
        pairs: dict[bytes, tuple[int, int]] = {}
        for _ in range(pair_count):
            (length,) = struct.unpack_from("<Q", view, at)
            key = view[at + 8 : at + 8 + length]
            start = at + 8 + length
            (kind,) = struct.unpack_from("<I", view, start)
            at = _skip(view, start + 4, kind)
            pairs[key] = (start, at)
        tensors: dict[bytes, tuple[bytes, int, int]] = {}
        for _ in range(tensor_count):
            (length,) = struct.unpack_from("<Q", view, at)
            name = view[at + 8 : at + 8 + length]
            at += 8 + length
            (dimensions,) = struct.unpack_from("<I", view, at)
            shape = view[at : at + 4 + 8 * dimensions]
            at += 4 + 8 * dimensions
            kind, offset = struct.unpack_from("<IQ", view, at)
            tensors[name] = (shape, kind, offset)
            at += 12
        return cls(pairs, tensors, at)

    def value(self, view: mmap.mmap, key: bytes) -> bytes:
        """Return the bytes of a value, type included."""
        start, end = self.pairs[key]
        return view[start:end]


def _end(view: mmap.mmap) -> int:
    """Return the position in the file at which the last tensor ends; of a type that nobody knows, where it begins."""
    header = _Header.of(view)
    alignment = 32
    if b"general.alignment" in header.pairs:
        (alignment,) = struct.unpack_from("<I", header.value(view, b"general.alignment"), 4)
    last = 0
    for shape, kind, offset in header.tensors.values():
        numbers, size = _BLOCKS.get(kind, (1, 0))
        count = math.prod(struct.unpack(f"<{(len(shape) - 4) // 8}Q", shape[4:]))
        last = max(last, offset + count // numbers * size)
    return (header.end + alignment - 1) // max(1, alignment) * alignment + last


def _value(view: mmap.mmap, at: int) -> Any:
    """Return the value that begins at a position with its type; None for an array that is long or not of numbers."""
    (kind,) = struct.unpack_from("<I", view, at)
    if kind in _SCALARS:
        return struct.unpack_from(f"<{_SCALARS[kind]}", view, at + 4)[0]
    if kind == _STRING:
        (length,) = struct.unpack_from("<Q", view, at + 4)
        return view[at + 12 : at + 12 + length].decode(errors="replace")
    kind, count = struct.unpack_from("<IQ", view, at + 4)
    if kind not in _SCALARS or count > LONGEST_ARRAY:
        return None
    return list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", view, at + 16))


def _skip(view: mmap.mmap, at: int, kind: int) -> int:
    """Return the position at which a value of type `kind` ends that begins at `at`."""
    if kind == _STRING:
        (length,) = struct.unpack_from("<Q", view, at)
        return at + 8 + int(length)
    if kind != _ARRAY:
        return at + _BYTES[kind]
    kind, count = struct.unpack_from("<IQ", view, at)
    at += 12
    if kind in _BYTES:
        return at + _BYTES[kind] * int(count)
    for _ in range(count):
        at = _skip(view, at, kind)
    return at
