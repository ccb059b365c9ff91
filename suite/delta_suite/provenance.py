"""Record where a measurement came from: versions, hardware, the state of the code, seconds and memory."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from delta_suite.paths import PACKAGE
from delta_suite.version import __version__

LIBRARIES = ("torch", "transformers", "numpy", "tokenizers", "safetensors", "accelerate", "gguf")
"""The libraries whose versions a record names."""


UTC_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
"""Format of every time that is stored, always in UTC."""


def library_version(distribution: str) -> str:
    """Return the installed version of a distribution, or "not installed"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@cache
def code_version() -> str:
    """Return a hash of the suite's code and of numpy's version, for what is kept only until either changes."""
    digest = hashlib.sha256(library_version("numpy").encode())
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def keyed_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the figures: they are in the cache key."""
    return {name: library_version(name) for name in ("torch", "transformers")}


def shared_versions() -> dict[str, str]:
    """Return the versions that must be the same wherever parts of one sweep or model are measured."""
    return {"delta-suite": __version__, "python": ".".join(platform.python_version_tuple()[:2])} | keyed_versions()


def version_problem(here: Mapping[str, str], there: Mapping[str, str]) -> str | None:
    """Return how versions differ from those here, or None.

    Example:
        >>> version_problem({"torch": "2.13.0"}, {"torch": "2.11.0"})
        'torch 2.11.0 (here 2.13.0)'
    """
    unequal = [f"{name} {there[name]} (here {version})" for name, version in here.items() if there[name] != version]
    return ", ".join(unequal) or None


def git_state() -> dict[str, Any] | None:
    """Return commit and dirty flag of the checkout that the suite's code is imported from, if it is one."""
    root = PACKAGE.parents[1]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "suite"))}
    except (OSError, subprocess.SubprocessError):
        return None  # no git program, or no commit yet: the record then says that the state is unknown


def hardware_in_words(devices: Sequence[Any] = ()) -> str:
    """Return the hardware that figures and seconds were measured on, as a record names it; without devices, the CPU."""
    if devices and devices[0].type == "cuda":
        import torch

        names = [torch.cuda.get_device_name(device) for device in devices]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return f"{processor}, {os.cpu_count()} cores"


def utc_now() -> str:
    """Return the time as records and baselines write it."""
    return datetime.now(UTC).strftime(UTC_FORMAT)


def started_gpus() -> range:
    """Return the GPUs if CUDA has been started: before that torch has no figures of them, and refuses to be asked."""
    import torch

    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)  # type: ignore[no-untyped-call]


def peak_memory() -> dict[str, int]:
    """Return the peak memory of the process and of each GPU used, in bytes."""
    import resource

    import torch

    scale = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    for index in started_gpus():
        if used := torch.cuda.max_memory_allocated(index):
            peak[f"cuda:{index}"] = used
    return peak


def hardware_of_all(machines: Sequence[tuple[str, object]]) -> str:
    """Return the hardware of several processes in words, from that of each.

    Example:
        >>> hardware_of_all([("1 x H100", {}), ("1 x H100", {}), ("1 x H200", {})])
        '2 x H100, 1 x H200'
        >>> hardware_of_all([("EPYC, 2 cores", {})] * 2)
        'EPYC, 2 cores'
    """
    names = [name for name, _ in machines]
    if len(names) == 1 or not all(name.startswith("1 x ") for name in names):
        return ", ".join(dict.fromkeys(names))
    return ", ".join(f"{names.count(name)} x {name.removeprefix('1 x ')}" for name in dict.fromkeys(names))


def memory_of_all(machines: Sequence[tuple[object, dict[str, int]]]) -> dict[str, int]:
    """Return the peak memory of several processes: of the largest one, and of the GPUs, numbered through.

    Example:
        >>> memory_of_all([("", {"host": 5, "cuda:0": 7}), ("", {"host": 6, "cuda:1": 8})])
        {'host': 6, 'cuda:0': 7, 'cuda:1': 8}
    """
    gpus = [peak for _, peaks in machines for place, peak in peaks.items() if place != "host"]
    host = {"host": max(peaks["host"] for _, peaks in machines)} if all(p for _, p in machines) else {}
    if len(machines) == 1:
        return dict(machines[0][1])
    return host | {f"cuda:{number}": peak for number, peak in enumerate(gpus)}


class Clock:
    """Wall seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = round(self.seconds.get(step, 0.0) + time.perf_counter() - started, 3)

    def subtract(self, outer: str, inner: str) -> None:
        """Take the seconds of `inner`, which ran inside `outer`, from those of `outer`."""
        self.seconds[outer] = round(self.seconds[outer] - self.seconds[inner], 3)
