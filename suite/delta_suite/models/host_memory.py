"""Memory of the host as this process has it: that of its container or batch job, shared with other workers here."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
"""Folder in which Linux shows the limits of groups of processes, such as containers and batch jobs."""

MEMBERSHIP = Path("/proc/self/cgroup")
"""File in which Linux tells the groups of this process."""

WORKERS = ("LOCAL_WORLD_SIZE", "PYTEST_XDIST_WORKER_COUNT", "DELTA_SUITE_WORKERS")
"""Variables of the environment that tell how many processes measure on this host: of torchrun, of pytest-xdist, and
one for any other way to start several."""


def cgroup_limits(membership: Path = MEMBERSHIP, root: Path = CGROUPS) -> list[int]:
    """Return the limits, in bytes, on the memory of the cgroups (of either version) that this process is in."""
    return [limit for _, _, limit in _limited(membership, root)]


def free_host_memory(membership: Path = MEMBERSHIP, root: Path = CGROUPS) -> int:
    """Return the bytes of host memory that this process may take now.

    They are what is free on the machine, or under the limit of a cgroup where that is less, divided by the number of
    workers on this host. Cached files count as free.
    """
    import psutil  # only where memory is asked for: collecting claims reads none

    free = [int(psutil.virtual_memory().available)]
    for folder, version, limit in _limited(membership, root):
        with suppress(OSError, ValueError, KeyError):
            free.append(max(0, limit - _held(folder, version)))
    return min(free) // workers_here()


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # M_TRIM_THRESHOLD and others of glibc's malloc.h

_GLIBC_MMAPS = 65536  # how many arrays glibc maps apart at most, by default

_GLIBC_LARGEST = 32 << 20  # what it maps apart at most once it has adapted, and may keep twice of (mallopt(3))


@contextmanager
def kept_pages() -> Iterator[None]:
    """Keep the memory of arrays that are freed for the next ones; give it back on leaving. Does nothing without glibc.

    glibc maps each array of more than 32 MB anew, and Linux clears it page by page when it is first written: the law of
    SmolLM2-135M under `core` spent 15 of 67 CPU seconds so, and 2 of 52 with this.
    """
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, _GLIBC_MMAPS)
        libc.mallopt(_MMAP_THRESHOLD, _GLIBC_LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _GLIBC_LARGEST)
        libc.malloc_trim(0)


def workers_here() -> int:
    """Return the number of processes that measure on this host, as the environment tells it."""
    told = [os.environ.get(name, "") for name in WORKERS]
    return max([1, *(int(count) for count in told if count.isdecimal())])


def _limited(membership: Path, root: Path) -> Iterator[tuple[Path, int, int]]:
    """Yield the folder, the version and the memory limit of each cgroup of this process that has one."""
    try:
        lines = membership.read_text("utf-8").splitlines()
    except OSError:  # no Linux
        return
    for _, kinds, inside in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if kinds not in ("", "memory"):
            continue
        top, name = (root / kinds, "memory.limit_in_bytes") if kinds else (root, "memory.max")
        group = top / inside.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                with suppress(OSError, ValueError):  # the group of the container seen from outside; "max"
                    yield folder, 1 if kinds else 2, int((folder / name).read_text("utf-8"))


def _held(folder: Path, version: int) -> int:
    """Return the bytes that a cgroup holds and cannot give back, which cached files are not."""
    used = int((folder / ("memory.usage_in_bytes" if version == 1 else "memory.current")).read_text("utf-8"))
    lines = (line.split() for line in (folder / "memory.stat").read_text("utf-8").splitlines())
    parts = {words[0]: int(words[1]) for words in lines if len(words) == 2}
    if version == 1:  # those of its children are included
        return used - (parts["total_cache"] - parts["total_shmem"])
    return used - (parts["file"] - parts["shmem"])
