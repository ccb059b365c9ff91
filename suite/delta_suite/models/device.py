"""The choice of the device that a model runs on, without importing torch.

A run that is answered from the cache needs it too, and so does `delta-suite doctor`; torch takes seconds to import.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from delta_suite.errors import DeviceError
from delta_suite.models.host_memory import cgroup_limits
from delta_suite.models.spec import ModelSpec
from delta_suite.process_group import MODES, current

PROBE_TIMEOUT = 60.0
"""Seconds the NVIDIA driver has to answer; waking that of a host with many GPUs takes several."""

_PROBE = """
import ctypes, json, sys
try:
    cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
except OSError:
    print(json.dumps({"error": "no NVIDIA driver is installed (libcuda is not found)"})); sys.exit()
code = cuda.cuInit(0)
if code:
    words = {100: "the driver finds no GPU", 803: "driver and libcuda are of different versions"}
    print(json.dumps({"error": words.get(code, f"the NVIDIA driver does not start (cuInit: {code})")})); sys.exit()
version, count = ctypes.c_int(), ctypes.c_int()
cuda.cuDriverGetVersion(ctypes.byref(version)); cuda.cuDeviceGetCount(ctypes.byref(count))
gpus = []
for ordinal in range(count.value):
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), ordinal); cuda.cuDeviceGetName(name, 256, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    gpus.append([name.value.decode(), memory.value])
print(json.dumps({"driver": version.value, "gpus": gpus}))
"""


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU that this process may use."""

    name: str
    """Name that the driver reports, such as "NVIDIA H100"."""
    memory_gb: float
    """Total memory, free or not, in units of 10^9 bytes."""


@dataclass(frozen=True)
class Hardware:
    """The devices on which torch can run here, and the host's memory."""

    gpus: tuple[Gpu, ...]
    """GPUs that the installed torch can use and CUDA_VISIBLE_DEVICES shows."""
    why_no_gpu: str
    """Reason why `gpus` is empty, in a few words; "" if it is not."""
    mps: bool
    """True on Apple silicon."""
    memory_gb: float
    """Memory of the host, or of the container or job where that has less, in units of 10^9 bytes; 0 if the system does
    not tell."""


def hardware() -> Hardware:
    """Return the hardware of this machine, looked up once per process and value of CUDA_VISIBLE_DEVICES."""
    return _hardware(os.environ.get("CUDA_VISIBLE_DEVICES"))


@lru_cache
def _hardware(visible: str | None) -> Hardware:
    gpus, why = _cuda(visible)
    # Every torch for Apple silicon has the MPS backend; those for Intel Macs ended with 2.2.
    mps = (platform.system(), platform.machine()) == ("Darwin", "arm64")
    try:
        memory = min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *cgroup_limits()]) / 1e9
    except (AttributeError, ValueError, OSError):
        memory = 0.0
    return Hardware(gpus, why, mps, memory)


def _cuda(visible: str | None) -> tuple[tuple[Gpu, ...], str]:
    build = _torch_cuda()
    if build is None:
        return (), "the installed torch is built without CUDA"
    # A child asks the driver: cuInit here would fix CUDA_VISIBLE_DEVICES for this process and break its forks.
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return (), f"the NVIDIA driver did not answer within {PROBE_TIMEOUT:.0f} s"
    if child.returncode != 0:
        return (), f"the NVIDIA driver crashed when asked (exit code {child.returncode})"
    answer = json.loads(child.stdout)
    if not answer.get("gpus"):
        hidden = f", with CUDA_VISIBLE_DEVICES={visible!r}" if visible is not None else ""
        return (), answer.get("error", "the driver shows no GPU") + hidden
    # Within one major version of CUDA an older driver will do.
    if answer["driver"] // 1000 < int(build.split(".")[0]):
        driver = f"{answer['driver'] // 1000}.{answer['driver'] % 1000 // 10}"
        return (), f"the NVIDIA driver knows CUDA {driver}, and the installed torch is built for CUDA {build}"
    return tuple(Gpu(name, memory / 1e9) for name, memory in answer["gpus"]), ""


def _torch_cuda() -> str | None:
    """Return the CUDA version the installed torch is built for; None if it is not built for CUDA or not installed.

    It is read from torch/version.py, as CPU builds have "+cpu" in their version number only on some platforms.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    source = ast.parse(Path(torch.origin).with_name("version.py").read_text(encoding="utf-8"))
    for node in source.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "cuda" for target in targets):
            value = getattr(node, "value", None)
            return str(value.value) if isinstance(value, ast.Constant) and value.value else None
    return None


SHARDED = "sharded"
"""Device of a model that accelerate splits over all GPUs and, if they cannot hold it, host memory and disk."""


def resolve_device(requested: str, spec: ModelSpec) -> str:
    """Return the device to load `spec` on: "cpu", "mps", "cuda", "cuda:1", "sharded" (all GPUs of the machine), or
    "fsdp" or "tp" (one GPU for each process that was started).

    requested: one of these, or "auto" for the best one here, which is "sharded" if one GPU has too little memory for
        what the entry requires. A model that requires GPU memory runs on a CPU only if that is requested by name, and
        has as much memory.

    Raises:
        DeviceError: the device is not there, or has too little memory for the model.
    """
    here = hardware()
    if requested == "auto":
        requested = _best_device(spec, here)
    if requested in MODES:
        return _of_processes(requested, spec, here)
    if requested.startswith((SHARDED, "cuda")) and not here.gpus:
        raise DeviceError(f"--device {requested}: {here.why_no_gpu}.\n  {_cure(here)} {_listed(here)}")
    if requested == SHARDED:
        return _enough(spec, SHARDED, _gpu_memory(here), f"this machine with its {len(here.gpus)} GPUs together")
    if requested == "cpu":
        return _enough(spec, requested, here.memory_gb, "the CPU's memory")
    if requested == "mps":
        if not here.mps:
            raise DeviceError(f"--device mps: this is not an Apple silicon machine. {_listed(here)}")
        return _enough(spec, requested, here.memory_gb, "the memory that CPU and GPU share")
    index = int(requested.partition(":")[2] or 0)
    if index >= len(here.gpus):
        raise DeviceError(f"--device {requested}: there is no GPU {index}. {_listed(here)}")
    gpu = here.gpus[index]
    return _enough(spec, requested, gpu.memory_gb, f"GPU {index} ({gpu.name})")


def _of_processes(mode: str, spec: ModelSpec, here: Hardware) -> str:
    """Return the mode in which several processes hold a model, or raise DeviceError."""
    team = current()
    if team.mode != mode:
        raise DeviceError(
            f"--device {mode} is for `torchrun --nproc-per-node N -m delta_suite measure` alone. "
            f"In one process {SHARDED} spreads a model over the GPUs of the machine."
        )
    if not here.gpus:
        return _enough(spec, mode, here.memory_gb, "the CPU's memory")
    memory = team.size * min(gpu.memory_gb for gpu in here.gpus)
    return _enough(spec, mode, memory, f"what {team.size} processes hold together, a GPU each,")


def _best_device(spec: ModelSpec, here: Hardware) -> str:
    needed = spec.requires.gpu_memory_gb
    best = "cuda" if here.gpus else "mps" if here.mps else "cpu"
    if needed is None:
        return best
    if best == "cpu":
        raise DeviceError(
            f"{spec.name} requires a GPU with {needed:g} GB, and there is none here: {here.why_no_gpu}.\n"
            f"  Run it on a machine that has one, or choose a smaller model. --device cpu tries it on the CPU "
            f"({here.memory_gb:.0f} GB of memory here)."
        )
    return SHARDED if best == "cuda" and here.gpus[0].memory_gb < needed <= _gpu_memory(here) else best


def _gpu_memory(here: Hardware) -> float:
    """Return the memory of all GPUs together, in units of 10^9 bytes."""
    return sum(gpu.memory_gb for gpu in here.gpus)


def describe_devices() -> str:
    """Return one line on the devices of this machine, for `delta-suite doctor`."""
    here = hardware()
    listed = [f"cuda:{index} {gpu.name}, {gpu.memory_gb:.0f} GB" for index, gpu in enumerate(here.gpus)]
    listed += [f"mps, {here.memory_gb:.0f} GB shared"] if here.mps else []
    listed.append(f"cpu, {os.cpu_count()} cores, {here.memory_gb:.0f} GB")
    return "; ".join(listed) + (f" (no cuda: {here.why_no_gpu})" if here.why_no_gpu else "")


def _enough(spec: ModelSpec, device: str, memory_gb: float, what: str) -> str:
    """Return `device`, or raise `DeviceError` if its memory is less than the model requires."""
    needed = spec.requires.gpu_memory_gb
    if needed is not None and memory_gb and memory_gb < needed:
        raise DeviceError(
            f"{spec.name} requires {needed:g} GB, and {what} has {memory_gb:.1f} GB in all.\n"
            "  Use a larger one or a smaller model, or, where less will do (a lower dtype, short texts), lower "
            "requires.gpu_memory_gb of its entry in models.toml."
        )
    return device


def _listed(here: Hardware) -> str:
    """Return a sentence that lists the devices of this machine."""
    listed = [f"cuda:{index} ({gpu.name}, {gpu.memory_gb:.0f} GB)" for index, gpu in enumerate(here.gpus)]
    return f"This machine has {', '.join([*listed, *(['mps'] if here.mps else []), 'cpu'])}."


def _cure(here: Hardware) -> str:
    """Return a sentence that says how to make a GPU usable."""
    if "without CUDA" in here.why_no_gpu:
        return "Install a torch built for CUDA (https://pytorch.org/get-started/locally), or use --device auto."
    if "built for CUDA" in here.why_no_gpu:
        return "Update the driver, or install a torch built for an older CUDA."
    return "Run `nvidia-smi` for details; --device auto takes what is here."
