"""Checks that a weights file is complete, from headers and sizes alone, before anything is loaded.

Formats: https://huggingface.co/docs/safetensors and https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

LFS_POINTER = b"version https://git-lfs"
"""First bytes of a file that git wrote in place of the content, which is still on the LFS server."""

MAX_SAFETENSORS_HEADER = 100_000_000
"""Bytes; the safetensors library refuses longer headers as well."""

_GGUF_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""GGUF value type -> bytes: uint8, int8, uint16, int16, uint32, int32, float32, bool, uint64, int64, float64."""
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def weights_problem(path: Path) -> str | None:
    """Return the problem with a .safetensors or .gguf file, or None; other files are only checked for LFS pointers.

    Whatever the headers and the size of a file do not show is noticed when it is loaded.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        return f"{path.name} is a Git LFS pointer of {size} bytes, not the content"
    if size == 0 and path.suffix in (".safetensors", ".gguf"):
        return f"{path.name} is empty"
    if path.suffix == ".safetensors":
        return _safetensors_problem(path, size)
    if path.suffix == ".gguf":
        return _gguf_problem(path, size)
    return None


def _safetensors_problem(path: Path, size: int) -> str | None:
    broken = f"{path.name} is not a safetensors file"
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            return f"{broken}: it ends within its first 8 bytes"
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_SAFETENSORS_HEADER:
            return f"{broken}: its first 8 bytes ask for a header of {length:,} bytes"
        header = file.read(length)
    if len(header) < length:
        return f"{path.name} is cut short within its header: {size:,} of at least {8 + length:,} bytes"
    try:
        tensors = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
        return f"{broken}: its header does not parse"
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        return f"{path.name} is cut short: {size:,} bytes, where its header declares {whole:,}"
    if size > whole:
        return f"{path.name} is damaged: {size:,} bytes, where its header declares {whole:,}"
    return None


def _gguf_problem(path: Path, size: int) -> str | None:
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            return f"{path.name} is not a GGUF file: it begins with {magic!r}"
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            try:
                start = _gguf_last_tensor(view)
            except (struct.error, KeyError, RecursionError):
                return f"{path.name} is cut short or damaged: its header does not end within its {size:,} bytes"
    # The length of the last tensor depends on its quantisation; the loader notices a cut within it.
    if size <= start:
        return f"{path.name} is cut short: {size:,} bytes, where its last tensor begins at {start:,}"
    return None


def gguf_architecture(path: Path) -> Iterator[bytes]:
    """Yield what the header of a complete GGUF file says of architecture and tokenizer.

    These are keys and their values, names of tensors and their shapes, in an order that does not depend on the file's.
    The name of the model, the types of the weights and the chat template are omitted.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        header = _GgufHeader.of(view)
        # Without an architecture the loader refuses the file, with a reason.
        architecture = header.value(view, b"general.architecture") if b"general.architecture" in header.pairs else b""
        prefixes = (b"tokenizer.", architecture[12:] + b".")  # behind the value's type and the string's length
        for key in sorted(header.pairs):
            if key == b"general.architecture" or (key.startswith(prefixes) and key != b"tokenizer.chat_template"):
                yield key
                yield header.value(view, key)
        for name, (shape, _) in sorted(header.tensors.items()):
            yield name
            yield shape


@dataclass(frozen=True)
class _GgufHeader:
    """Positions of the header's parts in the file; none of its values is parsed."""

    pairs: dict[bytes, tuple[int, int]]
    """Key -> start and end of its value, type included."""
    tensors: dict[bytes, tuple[bytes, int]]
    """Name -> shape as it is written, and offset."""
    end: int
    """End of the header."""

    @classmethod
    def of(cls, view: mmap.mmap) -> Self:
        """Return the positions in a mapped file.

        Raises:
            struct.error: the file ends within the header.
            KeyError: version or a type of value is unknown.
            RecursionError: arrays are nested too deep.
        """
        version, tensor_count, pair_count = struct.unpack_from("<IQQ", view, 4)
        if version not in (2, 3):
            raise KeyError(version)
        at = 24
        pairs: dict[bytes, tuple[int, int]] = {}
        for _ in range(pair_count):
            (length,) = struct.unpack_from("<Q", view, at)
            key = view[at + 8 : at + 8 + length]
            start = at + 8 + length
            (kind,) = struct.unpack_from("<I", view, start)
            at = _gguf_skip(view, start + 4, kind)
            pairs[key] = (start, at)
        tensors: dict[bytes, tuple[bytes, int]] = {}
        for _ in range(tensor_count):
            (length,) = struct.unpack_from("<Q", view, at)
            name = view[at + 8 : at + 8 + length]
            at += 8 + length
            (dimensions,) = struct.unpack_from("<I", view, at)
            shape = view[at : at + 4 + 8 * dimensions]
            at += 4 + 8 * dimensions + 4
            (offset,) = struct.unpack_from("<Q", view, at)
            tensors[name] = (shape, offset)
            at += 8
        return cls(pairs, tensors, at)

    def value(self, view: mmap.mmap, key: bytes) -> bytes:
        """Return the bytes of a value, type included."""
        start, end = self.pairs[key]
        return view[start:end]


def _gguf_last_tensor(view: mmap.mmap) -> int:
    """Return the position in the file at which the last tensor begins."""
    header = _GgufHeader.of(view)
    alignment = 32
    if b"general.alignment" in header.pairs:
        (alignment,) = struct.unpack_from("<I", header.value(view, b"general.alignment"), 4)
    last = max((offset for _, offset in header.tensors.values()), default=0)
    return (header.end + alignment - 1) // alignment * alignment + last


def _gguf_skip(view: mmap.mmap, at: int, kind: int) -> int:
    """Return the position at which a value of type `kind` ends that begins at `at`."""
    if kind == _GGUF_STRING:
        (length,) = struct.unpack_from("<Q", view, at)
        return at + 8 + int(length)
    if kind != _GGUF_ARRAY:
        return at + _GGUF_SCALARS[kind]
    kind, count = struct.unpack_from("<IQ", view, at)
    at += 12
    if kind in _GGUF_SCALARS:
        return at + _GGUF_SCALARS[kind] * int(count)
    for _ in range(count):
        at = _gguf_skip(view, at, kind)
    return at
