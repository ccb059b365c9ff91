"""The choice of the engine that a sweep runs on, from the options of the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence

from delta_suite.engine.dispatch import Workers
from delta_suite.engine.processes import Processes
from delta_suite.engine.ray_cluster import RayCluster, load_ray
from delta_suite.errors import OptionError
from delta_suite.models.device import hardware
from delta_suite.paths import shorten

ENGINES = ("local", "ray")
"""The values of `--engine`."""

DEFAULT_THREADS = 1
"""Threads of a worker. Bits follow from their number, so that it is fixed, and not that of the cores."""


def chosen_workers(
    engine: str,
    workers: int = 1,
    threads: int | None = None,
    address: str | None = None,
    gpus: float | None = None,
    *,
    device: str = "cpu",
) -> Workers | None:
    """Return the workers of these options; None where models are measured in this process, one after the other.

    address, gpus: of Ray alone: host:port of the head of its cluster, and the GPUs of a task. device: the one that was
    asked for; where any GPU will do, each of several processes has one. Raises OptionError for options that do not go
    together, and MissingPackageError where Ray is not installed.

    Example:
        >>> chosen_workers("local", workers=4).slots
        4
    """
    if engine not in ENGINES:
        raise OptionError(f"--engine {shorten(repr(engine))} is unknown: use {' or '.join(ENGINES)}.")
    if engine == "ray":
        if workers != 1:
            raise OptionError("--workers is for --engine local: on Ray, the resources of the cluster say how many run.")
        load_ray()
        return RayCluster(address, threads or DEFAULT_THREADS, gpus or 0.0)
    if address is not None or gpus is not None:
        raise OptionError("--ray-address and --gpus-per-task are for --engine ray: add it, or leave them out.")
    if workers == 1 and threads is None:
        return None
    return Processes(workers, threads or DEFAULT_THREADS, _gpus(device) if workers > 1 else ())


def _gpus(device: str) -> Sequence[str]:
    """Return the GPUs of this machine, as CUDA_VISIBLE_DEVICES names them; none where a device is chosen by name."""
    if device not in {"auto", "cuda"}:
        return ()
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = [str(number) for number in range(len(hardware().gpus))]
    return numbers if shown is None else [name.strip() for name in shown.split(",")][: len(numbers)]
