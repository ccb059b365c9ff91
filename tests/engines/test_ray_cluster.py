"""A Ray cluster of three made-up machines, of which one dies: no record is lost, and all equal those of one process."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from delta_suite import provenance
from delta_suite.engine import dispatch, ray_cluster
from delta_suite.engine.ray_cluster import RayCluster, connect, describe_cluster
from delta_suite.engine.work import work_list
from delta_suite.errors import EngineError, OptionError
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Outcome, Settings, measure_all
from delta_suite.records.cache import Cache
from delta_suite.records.partial_sums import PartialSums, SumsCache
from delta_suite.remote import measure_on
from delta_suite.split import measure_split

from tests.engines import tasks
from tests.engines.conftest import TEXTS, Project, clean, differences, figures
from tests.engines.here import Here

ray = pytest.importorskip("ray")


class MadeUpCluster:
    """A head without CPUs, and machines with one CPU each, as processes here."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.machines = [self.cluster.add_node(num_cpus=1) for _ in range(3)]
        self.address: str = self.cluster.address

    def kill(self, node_id: str | None = None) -> None:
        """Have a machine die, with all that runs on it: this one, or the last."""
        machine = next((each for each in self.machines if each.node_id == node_id), self.machines[-1])
        self.machines.remove(machine)
        self.cluster.remove_node(machine, allow_graceful=False)

    def replace(self) -> None:
        """Start machines until there are three again."""
        while len(self.machines) < 3:
            self.machines.append(self.cluster.add_node(num_cpus=1))
        self.cluster.wait_for_nodes()


@pytest.fixture(scope="module")
def cluster() -> Iterator[MadeUpCluster]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in clean({}).items():  # machines have it from here
            patch.setenv(name, value)
        made_up = MadeUpCluster()
        connect(ray, made_up.address)
        yield made_up
        ray.shutdown()
        made_up.cluster.shutdown()


def run_tasks(workers: RayCluster, made: dict[str, dispatch.Task]) -> dict[str, Any]:
    def finish(name: str, reply: bytes, losses: int) -> Any:
        return reply.decode(), losses

    with workers:
        return dict(dispatch.run(made, workers, made.__getitem__, finish))


def test_too_few_resources_are_an_error_before_anything_is_submitted(cluster: MadeUpCluster) -> None:
    with pytest.raises(EngineError, match=r"no machine of the Ray cluster has 1 CPU and 2 GPUs, .* has 4 machines: "):
        run_tasks(RayCluster(None, 1, 2.0), {"never": (tasks.answer, ("no",))})
    with pytest.raises(EngineError, match="no machine of the Ray cluster has 2 CPUs"):
        run_tasks(RayCluster(None, 2, 0.0), {"never": (tasks.answer, ("no",))})


def test_other_versions_are_an_error_before_anything_is_submitted(
    cluster: MadeUpCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "__version__", "9.9")  # here, and not at the workers
    with pytest.raises(EngineError, match=r"install the same versions:\n  [\d.]+: delta-suite \S+ \(here 9.9\)"):
        run_tasks(RayCluster(None, 1, 0.0), {"never": (tasks.answer, ("no",))})


def test_a_task_whose_machine_dies_is_given_to_another(cluster: MadeUpCluster, tmp_path: Path) -> None:
    mark = tmp_path / "machine"

    def kill_it() -> None:
        while not mark.exists():
            time.sleep(0.05)
        cluster.kill(mark.read_text())

    killing = threading.Thread(target=kill_it)
    killing.start()
    ended = run_tasks(
        RayCluster(None, 1, 0.0),
        {
            "waits": (tasks.wait_for_the_end, (str(mark),)),
            "answers": (tasks.answer, ("yes",)),
            "raises": (tasks.raise_an_error, ("no",)),
            "is killed once": (tasks.kill_the_worker, (str(tmp_path / "once"), 1)),
        },
    )
    killing.join()
    assert ended["waits"] == ("elsewhere", 1)
    assert ended["answers"] == ("yes", 0)
    assert ended["is killed once"] == ("lived", 1)
    assert isinstance(ended["raises"], EngineError)
    assert "ValueError: no" in str(ended["raises"])
    cluster.replace()


def test_records_of_a_cluster_are_those_of_one_process(
    cluster: MadeUpCluster, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.jsonl").write_text(TEXTS)
    monkeypatch.chdir(tmp_path)  # workers are elsewhere, and read no texts there
    specs = [ModelSpec(name=f"step-{step}", path=checkpoints / f"step-{step}") for step in (1, 2, 3)]
    work = work_list(specs, ["texts.jsonl"], controls=True)

    def settings(name: str) -> Settings:
        return Settings(
            calibration="texts.jsonl", device="cpu", results=tmp_path / name, cache=Cache(tmp_path / f"{name}-cache")
        )

    outcomes = []
    for item, outcome in measure_on(RayCluster(None, 1, 0.0), work, settings("cluster")):
        assert isinstance(outcome, Outcome), (item, outcome)
        outcomes.append(outcome)
        if len(outcomes) == 1:
            cluster.kill()
    cluster.replace()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [outcome for _, outcome in measure_all(work, settings("alone"))]
    torch.set_num_threads(threads)
    assert all(isinstance(outcome, Outcome) for outcome in alone)
    assert len(figures(tmp_path / "alone")) == 6
    assert not differences(figures(tmp_path / "cluster"), figures(tmp_path / "alone"))


def test_a_split_calibration_gives_the_same_bits_though_a_machine_dies(
    cluster: MadeUpCluster, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.jsonl").write_text(TEXTS)
    monkeypatch.chdir(tmp_path)
    work = work_list([ModelSpec(name="model", path=checkpoints / "step-1")], ["texts.jsonl"])

    def settings(name: str) -> Settings:
        return Settings(
            calibration="texts.jsonl",
            documents=10,
            device="cpu",
            parts=frozenset({"spectra", "boundaries"}),
            results=tmp_path / name,
            cache=Cache(tmp_path / f"{name}-cache"),
            split_calibration=True,
        )

    kept = SumsCache.put

    def put(self: SumsCache, unit: int, sums: PartialSums) -> None:
        kept(self, unit, sums)
        if len(cluster.machines) == 3:
            cluster.kill()

    threads = torch.get_num_threads()
    ((_, alone),) = measure_split(Here(1), work, settings("alone"))
    torch.set_num_threads(threads)
    monkeypatch.setattr(SumsCache, "put", put)
    ((_, outcome),) = measure_split(RayCluster(None, 1, 0.0), work, settings("cluster"))
    cluster.replace()
    assert isinstance(alone, Outcome), alone
    assert isinstance(outcome, Outcome), outcome
    assert not differences(figures(tmp_path / "cluster"), figures(tmp_path / "alone"))


def test_the_command_tells_what_fails_and_measures_the_rest(cluster: MadeUpCluster, project: Project) -> None:
    (project.path / "run" / "step-2" / "model.safetensors").unlink()
    words = ("measure", "run/step-[12]", "--calibration=texts.jsonl", "--device=cpu", "--engine=ray")
    address = f"--ray-address={cluster.address}"
    ended = project.process(sys.executable, "-m", "delta_suite", *words, address)
    assert ended.code == 1
    assert ended.err.startswith("delta-suite: run--step-2 cannot be measured: ")
    assert "Traceback" not in ended.err
    assert "record: results/runs/run--step-1/" in ended.out


def test_doctor_sees_the_cluster(cluster: MadeUpCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    told = describe_cluster()
    assert told.startswith("4 machines: ")
    assert told.count("(1 CPU, 0 GPUs)") == 3


def test_a_cluster_without_room_any_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would wait for a machine that is gone."""
    workers = RayCluster(None, 1, 0.0)
    gone = SimpleNamespace(nodes=list, wait=lambda handles, **_: ([], handles))
    monkeypatch.setattr(workers, "_ray", gone, raising=False)
    monkeypatch.setattr(ray_cluster, "WITHOUT_ROOM", 0.0)
    with pytest.raises(EngineError, match=r"It has 0 machines: none\. .* What is measured is kept\."):
        workers.next_finished(["task"])


def test_addresses_that_nothing_answers_at(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(EngineError, match=f"--ray-address 127.0.0.1:{port}: nothing answers there"):
        connect(ray, f"127.0.0.1:{port}")
    with pytest.raises(OptionError, match="--ray-address ray://head is no address of a Ray cluster's head"):
        connect(ray, "ray://head")
