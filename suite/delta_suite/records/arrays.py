"""The arrays beside a record, and the larger ones of directions that the cache keeps.

Beside a record, for each variant V (`raw`, or of what the MLP writes `sink_free.mlp`), all layers, U groups of units
left out in turn, and the pairs of layers L <= M:

    V.eigenvalues          (layers, rank)      squared singular values, float32
    V.stream_eigenvalues   (layers, rank)      the same of the states h_L, where the part `stream` is measured
    V.units.METRIC         (U, layers)         a layer metric without each group
    V.halves.METRIC        (2, layers)         a layer metric of each half of the units, where its bias needs them
    V.cosines, V.cross, V.overlaps, V.cross_overlaps, V.angles      (pairs,) matrices of a DirectionGram
    V.NAME.units           (U, pairs)          the same without each group, less the whole, float16
    V.cosines_a, V.cosines_b    (pairs,)       cosines of directions fitted on one half
    V.scope_units.METRIC   (phases, U)         metrics of stacked subspaces, which need more than the above
    V.random.METRIC        (phases, draws)     a metric with each v_L drawn at random
    law.units.METRIC       (phases, groups)    the law's metrics without each group
    law.transfer           (layers, layers)    R^2 on layer L (row) of layer M's map, held out

Where the unit is the domain, `documents` in place of `units` is the same without each group of documents. Replicates of
metrics are float32. Missing values are NaN. In the cache, `directions` hold the leading 8 directions of every layer and
their inner products without each group, from which the figures of any other phase map are formed.

Replicates differ little from the whole, and an interval needs no more of the difference than its first digits: as
float16 it has three, and an array of many units half of the size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from jaxtyping import Float, Float64

from delta_suite.capture.writes import SUBLAYERS
from delta_suite.errors import RecordError
from delta_suite.metrics.direction_gram import DirectionGram, GramStack, Products, inner_products
from delta_suite.paths import path_error, shorten
from delta_suite.reading import ARRAYS_LIMIT, UnreadableFileError, decode, parse_json, read_bytes
from delta_suite.writing import staged_path

if TYPE_CHECKING:
    from delta_suite.reduction.replicates import LayerSpectra, Replicates

Arrays = Mapping[str, np.ndarray]

KINDS = ("units", "documents")
"""Kinds of groups that are left out in turn: of units, and where the unit is the domain also of documents."""

STATES = "stream_eigenvalues"
"""The array of the squared singular values of the states, by variant."""

_GRAMS_OF = {"units": "replicates", "documents": "documents"}
"""The attribute of grams and layers that holds what each kind leaves."""


def variant_and_kind(name: str) -> tuple[str, str]:
    """Return the variant of an array, and what it holds of it.

    Example:
        >>> variant_and_kind("raw.units.gamma"), variant_and_kind("sink_free.mlp.eigenvalues")
        (('raw', 'units.gamma'), ('sink_free.mlp', 'eigenvalues'))
    """
    variant, _, kind = name.partition(".")
    write, _, rest = kind.partition(".")
    return (f"{variant}.{write}", rest) if write in SUBLAYERS else (variant, kind)


_PRODUCTS = ("whole", "own", "ab")
MATRICES = ("cosines", "overlaps", "angles", "cross", "cross_overlaps")
"""Matrices of pairs of layers; the last two compare the halves of the units."""


class ArrayFile:
    """Arrays in memory or in a safetensors file, which is read when they are first asked for."""

    def __init__(self, path: Path, sha256: str | None = None, content: Arrays | None = None) -> None:
        self.path, self.sha256 = path, sha256
        if content is not None:
            self.content = content

    @property
    def available(self) -> bool:
        """True if the arrays are in memory, or their file is there."""
        if "content" in self.__dict__ or path_error(self.path) is None:
            return True
        return self.sha256 is not None and staged_path(self.path, self.sha256).exists()

    @cached_property
    def content(self) -> Arrays:
        """The arrays by name. Raises RecordError where the file is gone, damaged, or not the one that was named."""
        if self.sha256 is None:
            return unpack(self._read(self.path), self.path)
        staged = staged_path(self.path, self.sha256)
        # Staged where a writer was killed; one that is at work may move it between two of these looks.
        for path in (self.path, staged, self.path):
            if path.exists() and hashlib.sha256(packed := self._read(path)).hexdigest() == self.sha256:
                return unpack(packed, self.path)
        self._read(self.path)
        raise RecordError(f"{self.path} is not the file that its record names: its SHA-256 is another")

    def _read(self, path: Path) -> bytes:
        try:
            return read_bytes(path, ARRAYS_LIMIT)
        except UnreadableFileError as error:
            raise RecordError(f"{self.path} cannot be read: {error.why}") from None


LARGEST = 1e100
"""Largest number of an array; squares and sums of larger ones overflow. Those of float32 end at 3e38."""

_DTYPES: Mapping[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
"""The dtypes of arrays by their names in a safetensors file."""


def unpack(packed: bytes, where: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a safetensors file, as views of its bytes.

    Raises RecordError where it is damaged, or holds what no array of ours is. Nothing is allocated by what the header
    says: every array must lie within the bytes that are there.
    """
    try:
        if len(packed) < 8:
            raise ValueError("it ends before its header")
        size = int.from_bytes(packed[:8], "little")
        if size > len(packed) - 8:
            raise ValueError("its header is longer than the file")
        header = parse_json(decode(packed[8 : 8 + size], where), where)
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        data = memoryview(packed)[8 + size :]
        return {name: _array(data, name, entry) for name, entry in header.items() if name != "__metadata__"}
    except UnreadableFileError as error:
        why = f"its header is {error.why.removeprefix('it is ')}"
    except ValueError as error:
        why = str(error)
    raise RecordError(f"{where} is not a readable safetensors file: {why}.")


def _array(data: memoryview, name: str, entry: Any) -> np.ndarray:
    """Return one array. Raises ValueError where its entry of the header does not fit the data."""
    shown = shorten(repr(name))
    if not isinstance(entry, dict):
        raise ValueError(f"the entry of {shown} is no object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{shown} has the dtype {shorten(repr(dtype))}, and those read are {', '.join(_DTYPES)}")
    if not all(
        isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)
        for numbers in (shape, offsets)
    ):
        raise ValueError(f"{shown} has no shape and place of whole numbers")
    if len(offsets) != 2 or len(shape) > 8 or not offsets[0] <= offsets[1] <= len(data):
        raise ValueError(f"{shown} does not lie within the file")
    if math.prod(shape) * _DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
        raise ValueError(f"{shown} of shape {shape} has {offsets[1] - offsets[0]} bytes")
    array = np.asarray(np.frombuffer(data[offsets[0] : offsets[1]], _DTYPES[dtype]).reshape(shape))
    if dtype == "F64" and (np.abs(array) > LARGEST).any():
        raise ValueError(f"{shown} holds a number above {LARGEST:g}")
    return array


def pack(arrays: Arrays) -> bytes:
    """Return the arrays as a safetensors file, so that a full disk is an OSError as for any other file."""
    from safetensors.numpy import save

    content: bytes = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return content


# --- beside a record -------------------------------------------------------------------------------------------


@lru_cache
def pairs_of_layers(layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and the second layer of each pair L <= M, in the order of the arrays."""
    return np.triu_indices(layers)


def square(pairs: Float[np.ndarray, "*stack pairs"], layers: int) -> Float64[np.ndarray, "*stack layers layers"]:
    """Return symmetric matrices over layers, given the numbers of their pairs."""
    first, second = pairs_of_layers(layers)
    matrices = np.zeros((*pairs.shape[:-1], layers, layers))
    matrices[..., first, second] = matrices[..., second, first] = pairs
    return matrices


def gram_arrays(variant: str, gram: DirectionGram) -> dict[str, np.ndarray]:
    """Return what is kept beside a record of the directions of a variant."""
    first, second = pairs_of_layers(gram.layers)
    arrays: dict[str, np.ndarray] = {}
    for name in MATRICES:
        matrix = getattr(gram, name)
        if matrix is None:
            continue
        whole = arrays[f"{variant}.{name}"] = matrix[first, second]
        for kind in KINDS:
            if without := getattr(gram, _GRAMS_OF[kind]):
                rows = np.stack([getattr(replicate, name)[first, second] for replicate in without])
                arrays[f"{variant}.{name}.{kind}"] = (rows - whole).astype(np.float16)
    for half, cosines in zip("ab", gram.halves or (), strict=False):
        arrays[f"{variant}.cosines_{half}"] = cosines.cosines[first, second]
    return arrays


def matrices_without(arrays: Arrays, name: str, kind: str) -> Float64[np.ndarray, "groups pairs"] | None:
    """Return the matrices `name` (such as `raw.cosines`) without each group, or None where the arrays have none."""
    stored = arrays.get(f"{name}.{kind}")
    if stored is None:
        return None
    # Records whose units were ten groups of documents held them as they are, in float32.
    whole = arrays[name] if stored.dtype == np.float16 else 0.0
    return np.asarray(whole + stored.astype(np.float64))


def stored_gram(arrays: Arrays, variant: str, layers: int, hidden: int) -> DirectionGram | None:
    """Return the gram that `gram_arrays` kept, without inner products of all directions; None where it kept none."""
    if f"{variant}.cosines" not in arrays:
        return None

    def matrices(pairs: np.ndarray | None) -> np.ndarray | None:
        return None if pairs is None else square(pairs, layers)

    def without(kind: str) -> _Grams:
        squares = {name: matrices(matrices_without(arrays, f"{variant}.{name}", kind)) for name in MATRICES}
        return _Grams(squares, hidden)

    halves = [matrices(arrays.get(f"{variant}.cosines_{half}")) for half in "ab"]
    a, b = (None if cosines is None else DirectionGram(hidden, cosines) for cosines in halves)
    replicates, documents = (without(kind) for kind in KINDS)
    whole = replace(
        _gram({name: matrices(arrays.get(f"{variant}.{name}")) for name in MATRICES}, hidden),
        halves=None if a is None or b is None else (a, b),
        replicates=replicates,
        documents=documents,
    )
    whole.__dict__["stack"] = _stack_of(replicates, documents)
    return whole


def _gram(squares: Mapping[str, np.ndarray | None], hidden: int) -> DirectionGram:
    cosines = squares["cosines"]
    assert cosines is not None
    others = {name: matrix for name, matrix in squares.items() if name != "cosines"}
    return DirectionGram(hidden, cosines, **others)  # type: ignore[arg-type]


class _Grams(Sequence[DirectionGram]):
    """The grams without each group in turn, each made when it is asked for: most figures are formed of all at once."""

    def __init__(self, squares: Mapping[str, np.ndarray | None], hidden: int) -> None:
        self.squares, self.hidden = squares, hidden

    def __len__(self) -> int:
        cosines = self.squares["cosines"]
        return 0 if cosines is None else len(cosines)

    @overload
    def __getitem__(self, group: int) -> DirectionGram: ...
    @overload
    def __getitem__(self, group: slice) -> tuple[DirectionGram, ...]: ...

    def __getitem__(self, group: int | slice) -> DirectionGram | tuple[DirectionGram, ...]:
        chosen = range(len(self))[group]  # an IndexError past the end, where iteration stops
        if isinstance(chosen, range):
            return tuple(self[index] for index in chosen)
        of_group = {name: None if rows is None else rows[chosen] for name, rows in self.squares.items()}
        return _gram(of_group, self.hidden)


def _stack_of(*kinds: _Grams) -> GramStack | None:
    """Return the grams of all groups as `DirectionGram.stack` makes it of each by itself."""
    present = [grams.squares for grams in kinds if len(grams)]
    if not present:
        return None
    cosines, cross = ([squares[name] for squares in present] for name in ("cosines", "cross"))

    def stacked(rows: Sequence[np.ndarray | None]) -> np.ndarray | None:
        known = [array for array in rows if array is not None]
        if len(known) < len(rows):
            return None
        return known[0] if len(known) == 1 else np.concatenate(known)

    whole = stacked(cosines)
    assert whole is not None
    return GramStack(whole, stacked(cross))


# --- in the cache ----------------------------------------------------------------------------------------------


def direction_arrays(variant: str, layers: Sequence[LayerSpectra]) -> dict[str, np.ndarray]:
    """Return what the cache keeps of the directions of all layers, in float32: the arrays `full_gram` reads.

    Compared in float32 as well, so that the cache gives back exactly what was measured.
    """
    # In numpy: torch's threads, still spinning from the reduction, took as long as the work on a machine of many cores.
    random = np.stack([layer.random.numpy() for layer in layers], axis=1)
    arrays = {
        "directions": np.stack([layer.directions.numpy() for layer in layers]),
        "random": random @ random.transpose(0, 2, 1),
    }
    halves = [layer.half_directions for layer in layers if layer.half_directions is not None]
    if len(halves) == len(layers):
        arrays["directions_a"], arrays["directions_b"] = (
            np.stack([directions.numpy() for directions in half]) for half in zip(*halves, strict=True)
        )
    for kind in KINDS if "directions_a" in arrays else ():
        without = [replicates for layer in layers if (replicates := getattr(layer, _GRAMS_OF[kind])) is not None]
        if len(without) == len(layers):
            arrays |= {f"{kind}_{name}": rows for name, rows in _products_without(arrays, without).items()}
    return {
        f"{variant}.{name}": array if array.dtype == np.float16 else array.astype(np.float32)
        for name, array in arrays.items()
    }


def _products_without(arrays: Arrays, without: Sequence[Replicates]) -> dict[str, np.ndarray]:
    """Return the inner products of directions without each group, less those of the whole, in float16.

    A group lies in one half, so the directions of the other half are those of the whole: `own` are the products of the
    group's half with itself.
    """
    # Rounded as the cache keeps them, so that it gives back exactly what was measured.
    whole, a, b = (arrays[name].astype(np.float32) for name in ("directions", "directions_a", "directions_b"))
    base = DirectionGram.of(whole, (a, b)).products
    assert base is not None
    out: dict[str, list[np.ndarray]] = {name: [] for name in _PRODUCTS}
    for group in range(len(without[0].directions)):
        sides, side = [a, b], group % 2
        sides[side] = np.stack([layer.half_directions[group].numpy() for layer in without])
        of_all = np.stack([layer.directions[group].numpy() for layer in without])
        same_half = base.bb if side else base.aa
        assert same_half is not None
        for name, products, of_whole in (
            ("whole", inner_products(of_all, of_all), base.whole),
            ("own", inner_products(sides[side], sides[side]), same_half),
            ("ab", inner_products(*sides), base.ab),
        ):
            out[name].append((products - of_whole).astype(np.float16))
    return {name: np.stack(rows) for name, rows in out.items()}


def full_gram(arrays: Arrays, variant: str) -> DirectionGram:
    """Return the gram of the directions that `direction_arrays` kept, with all inner products.

    Its replicates are as `gram_arrays` keeps them, so that the figures of a record follow from what lies beside it.
    """
    a, b = arrays.get(f"{variant}.directions_a"), arrays.get(f"{variant}.directions_b")
    whole = DirectionGram.of(arrays[f"{variant}.directions"], None if a is None or b is None else (a, b))
    replicates, documents = (_grams_without(arrays, variant, whole, kind) for kind in KINDS)
    gram = replace(whole, replicates=replicates, documents=documents, random=arrays.get(f"{variant}.random"))
    return as_kept(gram)


def as_kept(gram: DirectionGram) -> DirectionGram:
    """Return a gram whose replicates are rounded as `gram_arrays` keeps them."""

    def rounded(replicate: DirectionGram) -> DirectionGram:
        matrices = {}
        for name in MATRICES:
            whole, matrix = getattr(gram, name), getattr(replicate, name)
            if matrix is not None:
                matrices[name] = whole + (matrix - whole).astype(np.float16).astype(np.float64)
        return replace(replicate, **matrices)

    replicates, documents = (tuple(map(rounded, without)) for without in (gram.replicates, gram.documents))
    return replace(gram, replicates=replicates, documents=documents)


def _grams_without(arrays: Arrays, variant: str, whole: DirectionGram, kind: str) -> tuple[DirectionGram, ...]:
    """Return the grams without each group, or none where they were not kept."""
    stacks = [arrays.get(f"{variant}.{kind}_{name}") for name in _PRODUCTS]
    base = whole.products
    if base is None or base.aa is None or base.ab is None or base.bb is None or any(stack is None for stack in stacks):
        return ()
    out = []
    for group, (of_all, same_half, ab) in enumerate(
        zip(*(stack for stack in stacks if stack is not None), strict=True)
    ):
        halves = [base.aa, base.bb]
        halves[group % 2] = halves[group % 2] + same_half
        gram = DirectionGram.from_products(
            whole.hidden, Products(base.whole + of_all, halves[0], base.ab + ab, halves[1])
        )
        assert gram.products is not None
        out.append(replace(gram, products=gram.products.single()))
    return tuple(out)
