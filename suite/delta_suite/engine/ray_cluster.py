"""Workers on a Ray cluster: the one module that imports Ray.

Ray waits without a word for resources that no machine has, and for machines that are gone. So both are looked at here:
before anything is submitted, and while tasks wait.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

from delta_suite.engine.dispatch import LostWorkerError, Task
from delta_suite.errors import EngineError, MissingPackageError, OptionError, brief
from delta_suite.provenance import shared_versions, version_problem

ANSWER_TIMEOUT = 120.0
"""Seconds that every machine has to start a worker and tell its versions."""

CONNECT_TIMEOUT = 10.0
"""Seconds that the head of a cluster has to take a connection."""

LOOK_EVERY = 5.0
"""Seconds between two looks at the cluster while tasks run."""

WITHOUT_ROOM = 60.0
"""Seconds after which tasks are given up that no machine of the cluster is large enough for any more; one may be
replaced."""

Node = Mapping[str, Any]
"""A machine, as Ray describes it."""


def load_ray() -> Any:
    """Return the module ray. Raises MissingPackageError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here reports to nobody
    try:
        return import_module("ray")
    except ModuleNotFoundError:
        raise MissingPackageError(
            "--engine ray needs Ray, which is not installed: pip install 'delta-suite[ray]'."
        ) from None


class RayCluster:
    """Workers on the machines of a Ray cluster, each with a number of CPUs, which is that of its threads, and GPUs.

    address: host:port of the head; None for the cluster that RAY_ADDRESS names or that runs here, else one is started
        on this machine for as long as the command runs.
    """

    def __init__(self, address: str | None, threads: int, gpus: float) -> None:
        self.address, self.threads, self.gpus = address, threads, gpus
        self._connected_here = False

    def __enter__(self) -> RayCluster:
        """Connect, and make sure that the tasks can run. Raises MissingPackageError or EngineError."""
        self._ray = load_ray()
        self._connected_here = not self._ray.is_initialized()
        if self._connected_here:
            connect(self._ray, self.address)
        # Retries are those of `dispatch`, which counts and tells them.
        take = self._ray.remote(num_cpus=self.threads, num_gpus=self.gpus, max_retries=0)
        self._run = take(run_task if self.gpus else run_without_gpus)
        try:
            if not any(self._room(node) for node in self._nodes()):
                raise EngineError(self._no_room())
            self._compare_versions()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *raised: Any) -> None:
        """Leave the cluster, which ends the tasks that run."""
        if self._connected_here:
            self._ray.shutdown()

    @property
    def slots(self) -> int:
        """The number of tasks that the machines of the cluster have room for, whatever else runs there."""
        return sum(map(self._room, self._nodes()))

    def _nodes(self) -> list[Node]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _room(self, node: Node) -> int:
        """Return the number of tasks that a machine has room for."""
        resources = node["Resources"]
        by_cpus = int(resources.get("CPU", 0) // self.threads)
        return min(by_cpus, int(resources.get("GPU", 0) / self.gpus + 1e-9)) if self.gpus else by_cpus

    def _no_room(self) -> str:
        wanted = _amount(self.threads, "CPU") + (f" and {_amount(self.gpus, 'GPU')}" if self.gpus else "")
        return (
            f"no machine of the Ray cluster has {wanted}, which each task takes (--threads, --gpus-per-task). "
            f"It has {describe_nodes(self._nodes())}. Ask for less, or add machines."
        )

    def _compare_versions(self) -> None:
        at_node = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        ask = self._ray.remote(num_cpus=0, max_retries=0)(shared_versions)
        asked = {}
        for node in self._nodes():
            there = at_node(node["NodeID"], soft=False)
            asked[ask.options(scheduling_strategy=there).remote()] = node["NodeManagerAddress"]
        answered, silent = self._ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_TIMEOUT)
        if silent:
            names = ", ".join(asked[answer] for answer in silent)
            raise EngineError(f"no answer within {ANSWER_TIMEOUT:.0f} s from {names}, of the Ray cluster.")
        problems = {}
        for answer in answered:
            try:
                problem = version_problem(shared_versions(), self._ray.get(answer))
            except self._ray.exceptions.RayError as error:
                problem = brief(getattr(error, "cause", None) or error)
            if problem:
                problems[asked[answer]] = problem
        if problems:
            listed = "".join(f"\n  {name}: {problem}" for name, problem in sorted(problems.items()))
            raise EngineError(f"machines of the Ray cluster differ from this one; install the same versions:{listed}")

    def share(self, content: bytes) -> Any:
        """Put the bytes into the cluster once."""
        return self._ray.put(content)

    def submit(self, task: Task) -> Any:
        """Start a task wherever there is room."""
        function, arguments = task
        return self._run.remote(function, *arguments)

    def next_finished(self, handles: Iterable[Any]) -> Any:
        """Wait for one of these tasks. Raises EngineError where no machine is left that could run them."""
        waiting, without_room = list(handles), None
        while True:
            ready, _ = self._ray.wait(waiting, num_returns=1, timeout=LOOK_EVERY, fetch_local=True)
            if ready:
                return ready[0]
            if self.slots:
                without_room = None
            elif without_room is None:
                without_room = time.monotonic()
            elif time.monotonic() - without_room > WITHOUT_ROOM:
                raise EngineError(f"{self._no_room()} What is measured is kept.")

    def result(self, handle: Any) -> bytes:
        """Return what a task returned."""
        errors = self._ray.exceptions
        try:
            reply: bytes = self._ray.get(handle)
        except errors.RayTaskError as error:
            raise EngineError(f"a worker of the Ray cluster failed: {brief(error.cause or error)}") from None
        except errors.RayError as error:
            raise LostWorkerError(brief(error)) from None
        return reply


def run_task(function: Callable[..., bytes], *arguments: Any) -> bytes:
    """Run a task at a worker."""
    return function(*arguments)


def run_without_gpus(function: Callable[..., bytes], *arguments: Any) -> bytes:
    """Run a task at a worker that was given no GPU. Ray would let it see all of its machine."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return function(*arguments)


def connect(ray: Any, address: str | None) -> None:
    """Connect to a cluster, or start one on this machine. Raises EngineError."""
    if address is not None:
        _require_reachable(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # of many kinds
        where = f"the Ray cluster at {address}" if address else "Ray"
        raise EngineError(f"{where} cannot be used: {brief(error)}.") from None
    finally:
        for number, handler in handlers.items():  # Ray puts its own in their places
            signal.signal(number, handler)


def _require_reachable(address: str) -> None:
    """Raise EngineError for an address that nothing listens at: Ray would try for a minute, and end the process.

    Raises OptionError for what is no address.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise OptionError(
            f"--ray-address {address} is no address of a Ray cluster's head: it is host:port, as `ray start --head` "
            f"says it, such as 10.0.0.1:6379. Run the command on a machine of the cluster."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT).close()
    except OSError as error:
        raise EngineError(
            f"--ray-address {address}: nothing answers there ({error.strerror or error}). `ray status`, on the machine "
            f"of the head, says whether the cluster runs."
        ) from None


def _amount(count: float, noun: str) -> str:
    return f"{count:g} {noun}{'' if count == 1 else 's'}"


def describe_nodes(nodes: Iterable[Node]) -> str:
    """Return the machines of a cluster in words.

    Example:
        >>> describe_nodes([{"NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 8.0, "GPU": 1.0}}])
        '1 machine: 10.0.0.1 (8 CPUs, 1 GPU)'
    """
    listed = [
        f"{node['NodeManagerAddress']} ({_amount(node['Resources'].get('CPU', 0), 'CPU')}, "
        f"{_amount(node['Resources'].get('GPU', 0), 'GPU')})"
        for node in nodes
    ]
    return f"{_amount(len(listed), 'machine')}: {', '.join(listed) or 'none'}"


_LOOK = """
import json, logging, sys, ray
try:
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
except ConnectionError:
    print("null"); sys.exit()
nodes = [node for node in ray.nodes() if node["Alive"]]
print(json.dumps([{key: node[key] for key in ("NodeManagerAddress", "Resources")} for node in nodes]))
"""


def describe_cluster() -> str:
    """Return which cluster `--engine ray` would take without an address, in words; Ray is installed.

    A child looks, as Ray may wait for long, or end the process.
    """
    try:
        child = subprocess.run(
            [sys.executable, "-c", _LOOK], capture_output=True, text=True, timeout=ANSWER_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"a cluster did not answer within {ANSWER_TIMEOUT:.0f} s"
    if child.returncode != 0:
        last = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        return f"a cluster cannot be used: {last[0]}"
    nodes = json.loads(child.stdout.strip().splitlines()[-1])
    return "no cluster is running here: one is started on this machine" if nodes is None else describe_nodes(nodes)
