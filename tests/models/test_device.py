"""The choice of the device on simulated machines, and the probe against a driver that the test compiles."""

import importlib.machinery
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from delta_suite.errors import DeviceError
from delta_suite.models import device as module
from delta_suite.models.device import Gpu, Hardware, describe_devices, hardware, resolve_device
from delta_suite.models.host_memory import cgroup_limits
from delta_suite.models.spec import ModelSpec, Requires

SMALL = ModelSpec(name="small", hub="a/small")
HUGE = ModelSpec(name="huge", hub="a/huge", requires=Requires(gpu_memory_gb=900))
LARGE = ModelSpec(name="large", hub="a/large", requires=Requires(gpu_memory_gb=70))

CPU = Hardware((), "the driver finds no GPU", mps=False, memory_gb=25)
BIG_CPU = Hardware((), "the installed torch is built without CUDA", mps=False, memory_gb=512)
TWO = Hardware((Gpu("A40", 42.9), Gpu("A40", 42.9)), "", mps=False, memory_gb=256)
H100 = Hardware((Gpu("H100", 85.0), Gpu("T4", 15.8)), "", mps=False, memory_gb=256)
MAC = Hardware((), "the installed torch is built without CUDA", mps=True, memory_gb=34)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    module._hardware.cache_clear()
    yield
    module._hardware.cache_clear()


def on(here: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "hardware", lambda: here)


class TestChoice:
    @pytest.mark.parametrize(
        ("here", "requested", "spec", "chosen"),
        [
            (CPU, "auto", SMALL, "cpu"),
            (H100, "auto", SMALL, "cuda"),
            (MAC, "auto", SMALL, "mps"),
            (H100, "auto", LARGE, "cuda"),
            (H100, "cuda:0", LARGE, "cuda:0"),
            (H100, "cuda:1", SMALL, "cuda:1"),
            (H100, "cpu", LARGE, "cpu"),
            (TWO, "auto", LARGE, "sharded"),
            (TWO, "auto", SMALL, "cuda"),
            (TWO, "sharded", SMALL, "sharded"),
            (BIG_CPU, "cpu", LARGE, "cpu"),
        ],
    )
    def test_the_device_is(
        self, here: Hardware, requested: str, spec: ModelSpec, chosen: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        on(here, monkeypatch)
        assert resolve_device(requested, spec) == chosen

    @pytest.mark.parametrize(
        ("here", "requested", "spec", "expected"),
        [
            (CPU, "auto", LARGE, r"large requires a GPU with 70 GB, and there is none here: the driver finds no GPU"),
            (BIG_CPU, "auto", LARGE, r"--device cpu tries it on the CPU \(512 GB of memory here\)"),
            (CPU, "cpu", LARGE, r"requires 70 GB, and the CPU's memory has 25.0 GB in all"),
            (MAC, "auto", LARGE, r"requires 70 GB, and the memory that CPU and GPU share has 34.0 GB"),
            (H100, "cuda:1", LARGE, r"requires 70 GB, and GPU 1 \(T4\) has 15.8 GB in all"),
            (
                H100,
                "cuda:2",
                SMALL,
                r"no GPU 2. This machine has cuda:0 \(H100, 85 GB\), cuda:1 \(T4, 16 GB\), cpu",
            ),
            (
                CPU,
                "cuda",
                SMALL,
                r"--device cuda: the driver finds no GPU(?s:.*)nvidia-smi(?s:.*)This machine has cpu\.",
            ),
            (BIG_CPU, "cuda", SMALL, r"built without CUDA(?s:.*)Install a torch built for CUDA"),
            (CPU, "mps", SMALL, r"not an Apple silicon machine. This machine has cpu"),
            (TWO, "sharded", HUGE, r"requires 900 GB, and this machine with its 2 GPUs together has 85.8 GB"),
            (CPU, "sharded", SMALL, r"--device sharded: the driver finds no GPU"),
        ],
    )
    def test_a_missing_or_too_small_device(
        self, here: Hardware, requested: str, spec: ModelSpec, expected: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        on(here, monkeypatch)
        with pytest.raises(DeviceError, match=expected):
            resolve_device(requested, spec)


class TestTorchBuild:
    @pytest.mark.parametrize(
        ("source", "cuda"),
        [
            ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n", None),
            ("__version__ = '2.11.0+cu128'\ncuda: Optional[str] = '12.8'\n", "12.8"),
            ("__version__ = '2.6.0'\ncuda = '12.4'\n", "12.4"),
            ("__version__ = '2.6.0'\n", None),
        ],
    )
    def test_the_cuda_version_is_read_from_version_py(
        self, source: str, cuda: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "version.py").write_text(source)
        spec = importlib.machinery.ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: spec)
        assert module._torch_cuda() == cuda

    def test_the_installed_torch(self) -> None:
        import torch

        assert module._torch_cuda() == torch.version.cuda

    def test_without_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
        assert module._torch_cuda() is None


DRIVER = """
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned flags) { return %(init)d; }
int cuDriverGetVersion(int *version) { *version = %(version)d; return 0; }
int cuDeviceGetCount(int *count) { char *v = getenv("CUDA_VISIBLE_DEVICES"); *count = v ? atoi(v) : 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int n, int device) { strcpy(name, device ? "NVIDIA T4" : "NVIDIA H100"); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = device ? 15843721216 : 85024112640; return 0; }
"""


@pytest.mark.skipif(
    shutil.which("cc") is None or not sys.platform.startswith("linux"), reason="needs a C compiler on Linux"
)
class TestProbe:
    """The child process that asks the driver, with a libcuda.so.1 whose answers the test sets."""

    @pytest.fixture(autouse=True)
    def _torch_for_cuda_12(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_torch_cuda", lambda: "12.8")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    @staticmethod
    def install(folder: Path, monkeypatch: pytest.MonkeyPatch, *, init: int = 0, version: int = 12040) -> None:
        (folder / "driver.c").write_text(DRIVER % {"init": init, "version": version})
        command = ["cc", "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(folder / "driver.c")]
        subprocess.run(command, check=True)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))

    def test_the_gpus_and_their_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.install(tmp_path, monkeypatch)
        assert [gpu.name for gpu in hardware().gpus] == ["NVIDIA H100", "NVIDIA T4"]
        assert hardware().gpus[0].memory_gb == pytest.approx(85.02, abs=0.01)
        assert resolve_device("auto", LARGE) == "cuda"
        assert describe_devices().startswith("cuda:0 NVIDIA H100, 85 GB; cuda:1 NVIDIA T4, 16 GB; cpu, ")

    def test_a_changed_environment_is_noticed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.install(tmp_path, monkeypatch)
        assert len(hardware().gpus) == 2
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # the driver above takes it for a count
        assert len(hardware().gpus) == 1

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"init": 100}, "the driver finds no GPU"),
            ({"init": 803}, "driver and libcuda are of different versions"),
            ({"init": 999}, r"does not start \(cuInit: 999\)"),
            ({"version": 11080}, "knows CUDA 11.8, and the installed torch is built for CUDA 12.8"),
        ],
    )
    def test_a_driver_that_cannot_be_used(
        self, options: dict[str, int], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.install(tmp_path, monkeypatch, **options)
        assert hardware().gpus == ()
        with pytest.raises(DeviceError, match=expected):
            resolve_device("cuda", SMALL)

    def test_all_gpus_are_hidden(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.install(tmp_path, monkeypatch)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        with pytest.raises(DeviceError, match="CUDA_VISIBLE_DEVICES='0'"):
            resolve_device("cuda", SMALL)

    def test_a_crash_of_the_driver_does_not_crash_this_process(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "libcuda.so.1").write_bytes(b"not a library")
        monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
        monkeypatch.setattr(module, "_PROBE", "import os; os.abort()")
        assert "crashed when asked" in hardware().why_no_gpu
        assert resolve_device("auto", SMALL) == "cpu"


@pytest.mark.parametrize(
    ("membership", "file", "content", "limits"),
    [
        ("0::/job/step\n", "job/memory.max", "4096\n", [4096]),
        ("0::/job/step\n", "job/step/memory.max", "max\n", []),
        ("0::/../outside\n", "memory.max", "4096\n", [4096]),
        ("9:memory:/job\n0::/\n", "memory/job/memory.limit_in_bytes", "4096\n", [4096]),
        ("9:memory:/seen/from/outside\n", "memory/memory.limit_in_bytes", "4096\n", [4096]),
        ("8:cpu:/job\nnonsense\n", "cpu/job/memory.limit_in_bytes", "4096\n", []),
    ],
)
def test_the_memory_of_a_container_is_its_limit(
    tmp_path: Path, membership: str, file: str, content: str, limits: list[int]
) -> None:
    (tmp_path / "groups" / file).parent.mkdir(parents=True)
    (tmp_path / "groups" / file).write_text(content)
    (tmp_path / "cgroup").write_text(membership)
    assert cgroup_limits(tmp_path / "cgroup", tmp_path / "groups") == limits
    assert cgroup_limits(tmp_path / "none", tmp_path / "groups") == []
