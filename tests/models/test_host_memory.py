"""Memory of the host under the limits of made cgroups of both versions, and shared with other workers."""

import platform
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from delta_suite.capture.stream import Memory
from delta_suite.models import host_memory
from delta_suite.models.host_memory import WORKERS, free_host_memory, kept_pages, workers_here

MEMBERSHIPS = {1: "4:memory:/job\n0::/\n", 2: "0::/job\n"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WORKERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))


def made(tmp_path: Path, version: int, limit: str, used: int, files: int) -> tuple[Path, Path]:
    """Write a cgroup that holds `used` bytes, of which `files` are cached files and 100 more are shared memory."""
    folder = tmp_path / "groups" / ("memory/job" if version == 1 else "job")
    folder.mkdir(parents=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    for name, content in zip(names, (limit, str(used)), strict=True):
        (folder / name).write_text(content)
    keys = ("total_cache", "total_shmem") if version == 1 else ("file", "shmem")
    (folder / "memory.stat").write_text(f"cache 7\n{keys[0]} {files + 100}\n{keys[1]} 100\n")
    (tmp_path / "cgroup").write_text(MEMBERSHIPS[version])
    return tmp_path / "cgroup", tmp_path / "groups"


@pytest.mark.parametrize("version", [1, 2])
class TestFree:
    def test_a_container_has_what_its_limit_leaves(self, tmp_path: Path, version: int) -> None:
        assert free_host_memory(*made(tmp_path, version, "5000", used=3000, files=0)) == 2000

    def test_cached_files_are_free(self, tmp_path: Path, version: int) -> None:
        assert free_host_memory(*made(tmp_path, version, "5000", used=3000, files=1200)) == 3200

    def test_the_machine_may_have_less(self, tmp_path: Path, version: int) -> None:
        assert free_host_memory(*made(tmp_path, version, "50000", used=3000, files=0)) == 10_000

    def test_a_full_container_has_nothing(self, tmp_path: Path, version: int) -> None:
        assert free_host_memory(*made(tmp_path, version, "2000", used=3000, files=0)) == 0

    def test_no_limit_and_no_figures_are_the_machine(self, tmp_path: Path, version: int) -> None:
        files = made(tmp_path, version, "max", used=3000, files=0)
        assert free_host_memory(*files) == 10_000
        assert free_host_memory(tmp_path / "none", tmp_path) == 10_000


@pytest.mark.parametrize("name", WORKERS)
def test_workers_share_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "4")
    assert workers_here() == 4
    assert free_host_memory(*made(tmp_path, 2, "5000", used=1000, files=0)) == 1000


def test_the_stream_takes_its_share_of_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_limited", lambda *files: iter(()))
    monkeypatch.setenv("DELTA_SUITE_WORKERS", "2")
    assert Memory.free(torch.device("cpu"), 0.5).device == 2500


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep memory by rules of their own")
def test_memory_that_is_freed_is_kept_for_the_next_array() -> None:
    resource = pytest.importorskip("resource")

    def new_pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytearray(64 << 20)[:: resource.getpagesize()] = bytes((64 << 20) // resource.getpagesize())
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    with kept_pages():
        first, second = new_pages(), new_pages()
    assert second < first / 10
    assert new_pages() > first / 10  # given back
