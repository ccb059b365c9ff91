"""Headers of safetensors files, and the checks that a weights file is complete before anything is loaded.

The format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_suite.models.gguf_header import gguf_problem
from delta_suite.reading import UnreadableFileError, decode, parse_json

if TYPE_CHECKING:
    import torch

LFS_POINTER = b"version https://git-lfs"
"""First bytes of a file that git wrote in place of the content, which is still on the LFS server."""

MAX_HEADER = 100_000_000
"""Bytes; the safetensors library refuses longer headers as well."""


class _NotSafetensorsError(Exception):
    """Error for a file that is no whole safetensors file; its text says why."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, as its header describes it."""

    path: Path
    """The file."""
    name: str
    """Its name there."""
    dtype: str
    """Its dtype, such as "BF16"."""
    shape: tuple[int, ...]
    """Its shape."""

    def read(self) -> torch.Tensor:
        """Return the tensor itself."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.name)
        return tensor


def stored_tensors(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the tensors of those of the files that are safetensors, by name. The files were checked before."""
    return {
        name: StoredTensor(path, name, entry["dtype"], tuple(entry["shape"]))
        for path in paths
        if path.suffix == ".safetensors"
        for name, entry in _header(path)[0].items()
    }


def differing_copies(paths: Iterable[Path]) -> tuple[StoredTensor, StoredTensor] | None:
    """Return two tensors of one name in two of the safetensors files that are not equal; None where there are none."""
    seen: dict[str, StoredTensor] = {}
    for path in paths:
        for name, tensor in stored_tensors([path]).items():
            first = seen.setdefault(name, tensor)
            if first is not tensor and not first.read().equal(tensor.read()):
                return first, tensor
    return None


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
    if path.suffix == ".gguf":
        return gguf_problem(path, size)
    if path.suffix != ".safetensors":
        return None
    try:
        tensors, begins = _header(path)
    except _NotSafetensorsError as error:
        return str(error)
    whole = begins + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if size < whole:
        return f"{path.name} is cut short: {size:,} bytes, where its header declares {whole:,}"
    if size > whole:
        return f"{path.name} is damaged: {size:,} bytes, where its header declares {whole:,}"
    return None


def _header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the entries of the tensors in a header, and the position at which their data begins.

    Raises _NotSafetensorsError where there is no such header.
    """
    broken = f"{path.name} is not a safetensors file"
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _NotSafetensorsError(f"{broken}: it ends within its first 8 bytes")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER:
            raise _NotSafetensorsError(f"{broken}: its first 8 bytes ask for a header of {length:,} bytes")
        header = file.read(length)
    if len(header) < length:
        size = 8 + len(header)
        raise _NotSafetensorsError(
            f"{path.name} is cut short within its header: {size:,} of at least {8 + length:,} bytes"
        )
    try:
        content = parse_json(decode(header, path), path)
    except UnreadableFileError as error:
        raise _NotSafetensorsError(f"{broken}: its header does not parse ({error.why})") from None
    tensors: dict[str, dict[str, Any]] = dict(content) if isinstance(content, dict) else {"": {}}
    tensors.pop("__metadata__", None)
    if not all(_is_entry(entry) for entry in tensors.values()):
        raise _NotSafetensorsError(f"{broken}: its header does not parse (it does not list tensors)")
    return tensors, 8 + length


def _is_entry(entry: Any) -> bool:
    """Return True for what a header says of one tensor: whole numbers for shape and place."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, place = entry.get("shape"), entry.get("data_offsets")
    numbers = [*shape, *place] if isinstance(shape, list) and isinstance(place, list) and len(place) == 2 else [None]
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)
