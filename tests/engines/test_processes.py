"""Several workers on one machine: the same bits as one process, and none of it lost with a worker or the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from delta_suite.engine import choice, dispatch
from delta_suite.engine.choice import chosen_workers
from delta_suite.engine.processes import Processes
from delta_suite.errors import EngineError, OptionError
from delta_suite.models.device import Gpu, Hardware
from delta_suite.records.store import record_paths

from tests.engines import tasks
from tests.engines.conftest import Project, clean, differences, figures

SHORT = ("--calibration=texts.jsonl", "--device=cpu")


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_tasks(workers: Any, made: dict[str, dispatch.Task]) -> dict[str, Any]:
    """Run tasks by name, and return what became of each: its answer and the workers lost at it, or its error."""

    def finish(name: str, reply: bytes, losses: int) -> Any:
        return reply.decode(), losses

    with workers:
        return dict(dispatch.run(made, workers, made.__getitem__, finish))


def test_a_lost_worker_costs_its_own_task_alone(tmp_path: Path) -> None:
    ended = run_tasks(
        Processes(2, 1),
        {
            "answers": (tasks.answer, ("yes",)),
            "raises": (tasks.raise_an_error, ("no",)),
            "is killed once": (tasks.kill_the_worker, (str(tmp_path / "once"), 1)),
            "is always killed": (tasks.kill_the_worker, (str(tmp_path / "always"), 99)),
        },
    )
    assert ended["answers"] == ("yes", 0)
    assert ended["is killed once"] == ("lived", 1)
    assert isinstance(ended["raises"], ValueError)
    assert isinstance(ended["is always killed"], EngineError)
    assert str(ended["is always killed"]).startswith("4 workers were lost at it, the last one so: its process ended")
    assert (tmp_path / "always").read_text() == "xxxx"


def test_each_process_has_a_gpu_which_the_one_after_it_takes_over(tmp_path: Path) -> None:
    made = {name: (tasks.gpu_seen, (str(tmp_path / name),)) for name in ("first", "second")}
    ended = run_tasks(Processes(2, 1, ("3", "5")), made)
    assert sorted(answer for answer, _ in ended.values()) == ["3", "5"]
    assert {losses for _, losses in ended.values()} == {1}


@pytest.mark.parametrize(
    ("visible", "device", "gpus"),
    [
        (None, "auto", ("0", "1")),
        ("4,6", "cuda", ("4", "6")),
        (None, "cuda:1", ()),
        (None, "sharded", ()),
        (None, "cpu", ()),
    ],
)
def test_several_processes_have_a_gpu_each_unless_one_is_named(
    visible: str | None, device: str, gpus: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    two = Hardware((Gpu("H100", 80.0), Gpu("H100", 80.0)), "", False, 100.0)
    monkeypatch.setattr(choice, "hardware", lambda: two)
    chosen: list[Any] = []
    monkeypatch.setattr(choice, "Processes", lambda *words: chosen.append(words))
    chosen_workers("local", workers=3, device=device)
    assert [tuple(words[2]) for words in chosen] == [gpus]


def test_workers_give_the_records_of_one_process(
    project: Project, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = ["measure", "run/step-[12]", *SHORT]
    (project.path / "run" / "step-2" / "model.safetensors").rename(project.path / "weights")
    started = project.suite(*sweep, "--parts=spectra", "--results-dir=parallel", "--threads=1")
    assert started.code == 1
    assert "run--step-2 cannot be measured" in started.err  # told, while the other one was measured
    (project.path / "weights").rename(project.path / "run" / "step-2" / "model.safetensors")
    # One is completed from the cache's entry, which only this process reads, and one is new.
    completed = project.suite(*sweep, "--results-dir=parallel", "--workers=2")
    assert completed.code == 0, completed.err
    again = project.suite(*sweep, "--results-dir=parallel", "--threads=1")
    assert again.out.count("(from the cache)") == 2
    monkeypatch.setenv("DELTA_SUITE_CACHE", str(project.path / "another"))
    alone = project.suite(*sweep, "--results-dir=sequential")
    assert alone.out.count("(from the cache)") == 0
    parallel, sequential = (figures(project.path / name) for name in ("parallel", "sequential"))
    assert parallel.keys() == sequential.keys() == {"run--step-1", "run--step-2"}
    assert not differences(parallel, sequential)
    assert parallel["run--step-1"]["provenance"]["settings"]["threads"] == 1
    assert parallel["run--step-1"]["model"]["source"] == "directory:run/step-1"


def wait_until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_a_killed_command_costs_what_was_under_way(project: Project) -> None:
    words = [sys.executable, "-m", "delta_suite", "measure", "run/step-*", *SHORT, "--workers=1", "--threads=1"]
    with subprocess.Popen(words, cwd=project.path, env=clean({}), stdout=subprocess.DEVNULL) as command:
        wait_until(lambda: any((project.path / "results" / "runs").glob("*/*.json")))
        children = psutil.Process(command.pid).children(recursive=True)
        os.kill(command.pid, signal.SIGKILL)
    assert children
    wait_until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))
    kept = len(record_paths(project.path / "results"))
    again = project.suite("measure", "run/step-*", *SHORT, "--workers=1", "--threads=1")
    assert again.code == 0, again.err
    assert again.out.count("(from the cache)") == kept < 3
    assert len(record_paths(project.path / "results")) == 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"engine": "dask"}, "--engine 'dask' is unknown: use local or ray."),
        ({"engine": "local", "gpus": 1.0}, "--ray-address and --gpus-per-task are for --engine ray"),
        ({"engine": "local", "address": "a:1"}, "--ray-address and --gpus-per-task are for --engine ray"),
        ({"engine": "ray", "workers": 2}, "--workers is for --engine local"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        chosen_workers(**options)


def test_one_model_after_the_other_needs_no_workers() -> None:
    assert chosen_workers("local") is None
    fixed = chosen_workers("local", threads=2)
    assert (fixed.slots, fixed.threads) == (1, 2)


def test_without_ray_there_is_one_clear_error(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    ended = project.suite("measure", "run/step-1", "--engine=ray")
    assert ended.code == 1
    assert ended.err == (
        "delta-suite: --engine ray needs Ray, which is not installed: pip install 'delta-suite[ray]'.\n"
    )
