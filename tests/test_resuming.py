"""Runs that are interrupted, and runs side by side: real processes on tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_tiny

NAMES = ("one", "two", "three")

COUNTING = """
import os, signal
import delta_suite.models.loading as loading
import delta_suite.records.cache as cache

original = loading.load

def load(spec, *args, **kwargs):
    with open("loads.txt", "a") as file:
        file.write(spec.name + "\\n")
    return original(spec, *args, **kwargs)

loading.load = load

put = cache.Cache.put

def killed_while_writing(self, key, entry):
    if entry.record.model.name == os.environ.get("KILL_AT"):
        from pathlib import Path
        Path.rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)  # all is written, nothing is in its place
    return put(self, key, entry)

cache.Cache.put = killed_while_writing
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    entries = []
    for seed, name in enumerate(NAMES):
        path = make_tiny(tmp_path / "models" / name, layers=4, hidden=32, seed=seed)
        entries.append(f"[models.{name}]\npath = {str(path)!r}\n")
    (tmp_path / "models.toml").write_text("".join(entries))
    (tmp_path / "conftest.py").write_text(COUNTING)
    (tmp_path / "pytest.ini").write_text("[pytest]\ndelta_suite = true\n")
    (tmp_path / "test_it.py").write_text('def test_it(measurement):\n    assert measurement.value("gamma") > 0\n')
    return tmp_path


def start(project: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    arguments = [
        "-p",
        "no:cacheprovider",
        "-q",
        "test_it.py",
        "--documents=8",
        *(f"--model={name}" for name in NAMES),
        *options,
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=project,
        env=os.environ | {"DELTA_SUITE_CACHE": str(project / "cache"), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def loads(project: Path) -> list[str]:
    return (project / "loads.txt").read_text().split()


def entries(project: Path) -> list[str]:
    """The models in the cache; a half-written one would not parse, and none may lie about."""
    folder = project / "cache" / "measurements"
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return sorted(json.loads((path / "record.json").read_text())["model"]["name"] for path in found)


@pytest.mark.long
def test_a_killed_run_keeps_what_was_measured(project: Path) -> None:
    """SIGKILL at the worst moment of model 2 of 3: its entry is written, and not yet in its place."""
    killed = start(project, KILL_AT="two")
    killed.communicate(timeout=300)
    assert killed.returncode == -9
    assert loads(project) == ["one", "two"]
    assert entries(project) == ["one"]
    (record,) = (project / "results" / "runs").rglob("*.json")
    assert json.loads(record.read_text())["model"]["name"] == "one"

    again = start(project)
    text, _ = again.communicate(timeout=300)
    assert again.returncode == 0, text
    assert loads(project) == ["one", "two", "two", "three"]
    assert entries(project) == sorted(NAMES)
    assert not list((project / "cache" / "measurements").glob(".*")), "what the killed run left is taken away"


@pytest.mark.long
def test_two_runs_of_two_workers_load_each_model_once(project: Path) -> None:
    pytest.importorskip("xdist")
    running = [start(project, "-n", "2"), start(project, "-n", "2")]
    for process in running:
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text
        assert "3 passed" in text
    assert sorted(loads(project)) == sorted(NAMES)
    assert entries(project) == sorted(NAMES)
    assert len(list((project / "results" / "runs").rglob("*.json"))) == len(NAMES)
