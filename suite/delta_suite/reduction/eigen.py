"""Eigenproblems of symmetric matrices: several of one size in one batch on a GPU, one after the other elsewhere.

One eigenproblem leaves a GPU nearly idle: the reduction to tridiagonal form is a chain of small steps. cuSOLVER's
XsyevBatched takes the steps of many matrices at once: on an H100 64 of size 2,047 cost 12 ms each instead of 28, 64 of
size 1,023 2.4 instead of 12. `torch.linalg.eigh` hands it no matrices above 32 (pytorch/pytorch#175585), so it is
called here, from the library that torch has loaded. Few small matrices are bound by the host, which launches some 8,000
kernels: twelve of size 768 take 61 ms on an H200, of which the GPU is busy 30. A CUDA graph cannot record the call.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from types import TracebackType

import torch
from jaxtyping import Float64
from torch import Tensor

Eigen = tuple[Float64[Tensor, " _"], Float64[Tensor, "_ _"]]
"""n eigenvalues, ascending, and the eigenvectors, the columns of (n, n). The halves of a layer differ in n."""

LARGEST_BATCHED = 5120
"""Largest matrix size that is solved in batches. At 4,096 a batch of sixteen cost 80 ms each instead of 126, at 5,120
140 instead of 218, for 0.5 and 0.9 GB of memory each: there is room for it once the weights are gone."""

SMALLEST_BATCH = 8
"""Fewer matrices are solved faster one after the other: four of size 2,047 take as long as sixteen, 0.3 s. A batch of
twelve of size 768 takes 0.11 s with everything around it, a batch of six in each of two lanes 0.13."""

LARGEST_BATCH = 32
"""Larger batches save little time: 12.4 ms a matrix for 48 of size 2,047, 11.8 for 64."""

MATRICES_EACH = 6
"""Memory for solving one matrix, in multiples of its size: the matrix itself and cuSOLVER's workspace, which was
measured at 4.0 to 4.8 for sizes 511 to 5,120."""

_VECTORS, _LOWER, _DOUBLE = 1, 0, 1  # CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER, CUDA_R_64F

FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""Compute capabilities of NVIDIA GPUs whose float64 rate is half of float32: P100, V100, A100, H100, B200.

https://docs.nvidia.com/cuda/cuda-c-programming-guide/#arithmetic-instructions
"""


def slow_float64(device: torch.device) -> bool:
    """Return True if the device multiplies in float64 at a small fraction of its float32 rate, or not at all."""
    if device.type != "cuda" or torch.version.hip is not None:
        return device.type == "mps"
    return torch.cuda.get_device_capability(device) not in FAST_FLOAT64


def can_batch(device: torch.device) -> bool:
    """Return True if several matrices on this device can be solved in one batch."""
    return device.type == "cuda" and not slow_float64(device) and _cusolver() is not None


def eigh(matrix: Float64[Tensor, "n n"]) -> Eigen:
    """Return the eigenpairs of one matrix, which may be overwritten.

    They are computed on the host where the device is slow in float64, and returned on the matrix's device.

    Example:
        >>> eigh(torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)))[0]
        tensor([1., 2.], dtype=torch.float64)
    """
    if not slow_float64(matrix.device):
        values, vectors = torch.linalg.eigh(matrix)
    else:
        values, vectors = (part.to(matrix.device) for part in torch.linalg.eigh(matrix.cpu()))
    return values, vectors


class Eigensolver(AbstractContextManager["Eigensolver"]):
    """Solver of eigenproblems for one thread, on the CUDA stream that is current.

    It is a context manager and holds cuSOLVER's handle while it is entered. It solves in batches on a GPU that is fast
    in float64; for other devices, and for None, it solves one matrix after the other.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._library = _cusolver() if device is not None and can_batch(device) else None
        self._handle, self._options = ctypes.c_void_p(), ctypes.c_void_p()

    def __enter__(self) -> Eigensolver:
        if self._library is not None:
            _done(self._library.cusolverDnCreate(ctypes.byref(self._handle)), "cusolverDnCreate")
            _done(self._library.cusolverDnCreateParams(ctypes.byref(self._options)), "cusolverDnCreateParams")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._library is not None:
            self._library.cusolverDnDestroyParams(self._options)
            self._library.cusolverDnDestroy(self._handle)

    def __call__(self, matrices: Iterable[Float64[Tensor, "_ _"]], sizes: Sequence[int]) -> list[Eigen]:
        """Return the eigenpairs of each matrix.

        `matrices` is read one by one, so a generator can form each when it is needed; they have the given sizes and may
        be overwritten.

        Raises torch.linalg.LinAlgError where the iteration does not converge.
        """
        if self._library is None:
            return [eigh(matrix) for matrix in matrices]
        packed = bordered(matrices, sizes)
        try:
            values = self._overwrite(packed)
        except torch.OutOfMemoryError:  # by the workspace, which is allocated before anything is overwritten
            values = torch.cat([self._overwrite(packed[i : i + 1]) for i in range(len(packed))])
        return [without_border(values[i], packed[i].T, size) for i, size in enumerate(sizes)]

    def _overwrite(self, matrices: Float64[Tensor, "matrices n n"]) -> Float64[Tensor, "matrices n"]:
        """Return the eigenvalues, and overwrite each matrix with its eigenvectors as rows.

        They are rows because cuSOLVER stores matrices by columns.
        """
        library = self._library
        assert library is not None
        count, n = matrices.shape[:2]
        values = matrices.new_empty(count, n)
        failed = torch.empty(count, dtype=torch.int32, device=matrices.device)
        stream = torch.cuda.current_stream(matrices.device).cuda_stream
        _done(library.cusolverDnSetStream(self._handle, ctypes.c_void_p(stream)), "cusolverDnSetStream")
        problem = (
            self._handle,
            self._options,
            ctypes.c_int(_VECTORS),
            ctypes.c_int(_LOWER),
            ctypes.c_int64(n),
            ctypes.c_int(_DOUBLE),
            ctypes.c_void_p(matrices.data_ptr()),
            ctypes.c_int64(n),
            ctypes.c_int(_DOUBLE),
            ctypes.c_void_p(values.data_ptr()),
            ctypes.c_int(_DOUBLE),
        )
        on_device, on_host = ctypes.c_size_t(), ctypes.c_size_t()
        _done(
            library.cusolverDnXsyevBatched_bufferSize(
                *problem, ctypes.byref(on_device), ctypes.byref(on_host), ctypes.c_int64(count)
            ),
            "cusolverDnXsyevBatched_bufferSize",
        )
        work = torch.empty(on_device.value, dtype=torch.uint8, device=matrices.device)
        host_work = ctypes.create_string_buffer(max(1, on_host.value))
        _done(
            library.cusolverDnXsyevBatched(
                *problem,
                ctypes.c_void_p(work.data_ptr()),
                on_device,
                host_work,
                on_host,
                ctypes.c_void_p(failed.data_ptr()),
                ctypes.c_int64(count),
            ),
            "cusolverDnXsyevBatched",
        )
        if failed.any():  # waits for the stream, before the workspace on the host is freed
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                f"cusolverDnXsyevBatched: matrix {int(failed.nonzero()[0])} of {count} did not converge"
            )
        return values


def bordered(
    matrices: Iterable[Float64[Tensor, "_ _"]], sizes: Sequence[int]
) -> Float64[Tensor, "matrices largest largest"]:
    """Pack matrices into one tensor; smaller ones get a border of zeros, which only adds eigenvalues of 0."""
    largest = max(sizes)
    packed: Tensor | None = None
    for index, (matrix, size) in enumerate(zip(matrices, sizes, strict=True)):
        if packed is None:
            if len(sizes) == 1:
                return matrix.contiguous()[None]
            packed = matrix.new_empty(len(sizes), largest, largest)
        packed[index, :size, :size] = matrix
        packed[index, size:] = 0.0
        packed[index, :size, size:] = 0.0
    assert packed is not None
    return packed


def without_border(
    values: Float64[Tensor, " largest"], vectors: Float64[Tensor, "largest largest"], size: int
) -> Eigen:
    """Return the eigenpairs of the matrix inside a border of zeros.

    These are the largest ones, because a Gram matrix has no eigenvalue below 0 beyond rounding.
    """
    border = len(values) - size
    return values[border:], vectors[:size, border:]


@lru_cache
def load_algebra() -> None:
    """Load torch's CUDA linear algebra: torch does so at the first call, and fails if two threads make it at once."""
    torch.linalg.eigh(torch.eye(2, device="cuda", dtype=torch.float64))


@lru_cache
def _cusolver() -> ctypes.CDLL | None:
    """Return the cuSOLVER that torch has loaded, or None if it lacks XsyevBatched (CUDA 12.6.2 and later, on Linux)."""
    load_algebra()
    for name in ("libcusolver.so.12", "libcusolver.so.11"):
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        except (OSError, AttributeError):
            continue
        return library if hasattr(library, "cusolverDnXsyevBatched") else None
    return None


def _done(status: int, what: str) -> None:
    """Raise RuntimeError if a call of cuSOLVER returned an error."""
    if status != 0:
        raise RuntimeError(f"{what} failed with status {status}")
