"""Which device a model runs on, found without importing torch.

A run that is answered from the cache and `delta-suite doctor` ask this too, and torch takes seconds to import.
"""

import ast
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from delta_suite.errors import DeviceError
from delta_suite.models.spec import ModelSpec

PROBE_TIMEOUT = 60.0
"""Seconds; waking the driver of a host with many GPUs takes several."""

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
    memory_gb: float
    """All of its memory, free or not, in units of 10^9 bytes."""


@dataclass(frozen=True)
class Hardware:
    """What torch can run on here, beside the CPU."""

    gpus: tuple[Gpu, ...]
    """The GPUs usable by the torch that is installed, as CUDA_VISIBLE_DEVICES leaves them."""
    why_no_gpu: str
    """Why `gpus` is empty, in a few words; "" where it is not."""
    mps: bool
    memory_gb: float
    """Memory of the host, in units of 10^9 bytes; 0 where it cannot be asked."""


def hardware() -> Hardware:
    """What is there, found once per process and value of CUDA_VISIBLE_DEVICES."""
    return _hardware(os.environ.get("CUDA_VISIBLE_DEVICES"))


@lru_cache
def _hardware(visible: str | None) -> Hardware:
    gpus, why = _cuda(visible)
    # Every torch for Apple silicon has the MPS backend; those for Intel Macs ended with 2.2.
    mps = (platform.system(), platform.machine()) == ("Darwin", "arm64")
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
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
    """The CUDA version the installed torch is built for, or None: not built for CUDA, or not there.

    Read from torch/version.py. The version number does not tell: CPU builds carry "+cpu" on some platforms alone.
    """
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    source = ast.parse(Path(found.origin).with_name("version.py").read_text(encoding="utf-8"))
    for node in source.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "cuda" for target in targets):
            value = getattr(node, "value", None)
            return str(value.value) if isinstance(value, ast.Constant) and value.value else None
    return None


SHARDED = "sharded"
"""A model split over all GPUs, and where they do not hold it over the host's memory and disk, as accelerate plans."""


def resolve_device(requested: str, spec: ModelSpec) -> str:
    """The device to load `spec` on: "cpu", "mps", "cuda", "cuda:1", or "sharded", which is all GPUs of the machine.

    requested: one of these, or "auto", which takes the best there is, and all GPUs where one has too little memory for
    what the entry requires. That is held against the one GPU asked for, or all of them together; a CPU is taken for
    such a model only when asked for by name, and with as much memory.
    Raises `DeviceError` where the device is not there, or not enough for the model.
    """
    here = hardware()
    needed = spec.requires.gpu_memory_gb
    if requested == "auto":
        best = "cuda" if here.gpus else "mps" if here.mps else "cpu"
        if best == "cpu" and needed is not None:
            raise DeviceError(
                f"{spec.name} requires a GPU with {needed:g} GB, and there is none here: {here.why_no_gpu}.\n"
                f"  Run it on a machine that has one, or choose a smaller model. --device cpu tries it on the CPU "
                f"({here.memory_gb:.0f} GB of memory here)."
            )
        if best == "cuda" and needed is not None and here.gpus[0].memory_gb < needed <= _all_memory(here):
            best = SHARDED
        requested = best
    if requested == SHARDED:
        if not here.gpus:
            raise DeviceError(f"--device {SHARDED}: {here.why_no_gpu}.\n  {_way_to_cuda(here)} {_what_there_is(here)}")
        return _enough(spec, SHARDED, _all_memory(here), f"this machine with its {len(here.gpus)} GPUs together")
    if requested == "cpu":
        return _enough(spec, requested, here.memory_gb, "the CPU's memory")
    if requested == "mps":
        if not here.mps:
            raise DeviceError(f"--device mps: this is not an Apple silicon machine. {_what_there_is(here)}")
        return _enough(spec, requested, here.memory_gb, "the memory that CPU and GPU share")
    match = re.fullmatch(r"cuda(?::(\d+))?", requested)
    if match is None:
        raise DeviceError(
            f"--device {requested} is unknown: it is auto, cpu, mps, cuda, or cuda:1 and so on, or {SHARDED}. "
            f"{_what_there_is(here)}"
        )
    if not here.gpus:
        raise DeviceError(f"--device {requested}: {here.why_no_gpu}.\n  {_way_to_cuda(here)} {_what_there_is(here)}")
    index = int(match[1] or 0)
    if index >= len(here.gpus):
        raise DeviceError(f"--device {requested}: there is no GPU {index}. {_what_there_is(here)}")
    gpu = here.gpus[index]
    return _enough(spec, requested, gpu.memory_gb, f"GPU {index} ({gpu.name})")


def _all_memory(here: Hardware) -> float:
    return sum(gpu.memory_gb for gpu in here.gpus)


def describe_devices() -> str:
    """One line on what there is, for `delta-suite doctor`."""
    here = hardware()
    listed = [f"cuda:{index} {gpu.name}, {gpu.memory_gb:.0f} GB" for index, gpu in enumerate(here.gpus)]
    listed += [f"mps, {here.memory_gb:.0f} GB shared"] if here.mps else []
    listed.append(f"cpu, {os.cpu_count()} cores, {here.memory_gb:.0f} GB")
    return "; ".join(listed) + (f" (no cuda: {here.why_no_gpu})" if here.why_no_gpu else "")


def _enough(spec: ModelSpec, device: str, memory_gb: float, what: str) -> str:
    needed = spec.requires.gpu_memory_gb
    if needed is not None and memory_gb and memory_gb < needed:
        raise DeviceError(
            f"{spec.name} requires {needed:g} GB, and {what} has {memory_gb:.1f} GB in all.\n"
            "  Use a larger one or a smaller model, or, where less will do (a lower dtype, short texts), lower "
            "requires.gpu_memory_gb of its entry in models.toml."
        )
    return device


def _what_there_is(here: Hardware) -> str:
    listed = [f"cuda:{index} ({gpu.name}, {gpu.memory_gb:.0f} GB)" for index, gpu in enumerate(here.gpus)]
    return f"Here there is: {', '.join([*listed, *(['mps'] if here.mps else []), 'cpu'])}."


def _way_to_cuda(here: Hardware) -> str:
    if "without CUDA" in here.why_no_gpu:
        return "Install a torch built for CUDA (https://pytorch.org/get-started/locally), or use --device auto."
    if "built for CUDA" in here.why_no_gpu:
        return "Update the driver, or install a torch built for an older CUDA."
    return "`nvidia-smi` tells more; --device auto takes what there is."
