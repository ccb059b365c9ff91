"""Three small checkpoints, claims on them, and how a command of the suite runs in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from delta_suite.cli import app
from delta_suite.records.store import load, record_paths
from typer.testing import CliRunner

from tests.apart import Ended
from tests.tiny import make_tiny
from tests.tiny_claims import ABOVE_ITS_CONTROL, HEAD, HOLDS

ROOT = Path(__file__).parents[2]

TEXTS = "".join(json.dumps({"text": f"Text {number} is about {number % 7} rivers."}) + "\n" for number in range(60))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with step-1, step-2 and step-3: three small models of different weights."""
    folder = tmp_path_factory.mktemp("run")
    for step in (1, 2, 3):
        make_tiny(folder / f"step-{step}", layers=4, hidden=16, seed=step)
    # Loads every module: pytester's runs in this process forget those that they load themselves, and then classes of
    # one name are two.
    import_module("delta_suite.reduction.passes")
    import_module("delta_suite.reduction.law_units")
    return folder


@dataclass(frozen=True)
class Project:
    """A folder with hypotheses/claims.toml, texts.jsonl, and the checkpoints in run/; commands run in it."""

    pytester: pytest.Pytester

    @property
    def path(self) -> Path:
        """The folder."""
        return self.pytester.path

    def pytest(self, *words: str) -> Ended:
        """Run pytest in this process."""
        ended = self.pytester.runpytest_inprocess(*words)
        return Ended(int(ended.ret), ended.stdout.str(), ended.stderr.str())

    def suite(self, *words: str) -> Ended:
        """Run a command of delta-suite in this process."""
        ended = CliRunner().invoke(app, list(words), prog_name="delta-suite")
        return Ended(ended.exit_code, ended.stdout, ended.stderr)

    def process(self, *command: str, **environment: str) -> Ended:
        """Run a program in a process of its own."""
        ended = subprocess.run(
            command, cwd=self.path, env=clean(environment), capture_output=True, text=True, check=False
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)


@pytest.fixture
def project(pytester: pytest.Pytester, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A user's project with its three checkpoints."""
    (pytester.path / "hypotheses").mkdir()
    (pytester.path / "hypotheses" / "claims.toml").write_text(HEAD + HOLDS + ABOVE_ITS_CONTROL)
    (pytester.path / "texts.jsonl").write_text(TEXTS)
    shutil.copytree(checkpoints, pytester.path / "run")
    monkeypatch.setenv("COLUMNS", "250")  # so that what a test looks for stands on one line
    return Project(pytester)


def clean(environment: Mapping[str, str] = {}) -> dict[str, str]:
    """Return the environment of a command, with one thread and wide tables."""
    path = os.pathsep.join([str(ROOT / "suite"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "250"} | dict(environment)


def figures(results: Path) -> dict[str, Any]:
    """Return by model what its newest record says, but for time, host, memory and the state of the repository."""
    records = {}
    for path in record_paths(results):
        view = load(path)
        content = view.record.model_dump(mode="json")
        for key in ("created", "seconds", "hardware", "peak_memory_bytes", "git"):
            content["provenance"].pop(key, None)
        content["arrays"] = content["arrays"]["sha256"]
        records[view.model.name] = content
    return records


def differences(first: Any, second: Any, where: str = "") -> list[str]:
    """Return the places at which two figures differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = first.keys() | second.keys()
        return [line for key in keys for line in differences(first.get(key), second.get(key), f"{where}/{key}")]
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return [line for index, pair in pairs for line in differences(*pair, f"{where}/{index}")]
    return [] if first == second else [f"{where}: {first} and {second}"]


def grid(told: str) -> list[str]:
    """Return the lines of the grid of verdicts."""
    return [
        re.sub(r" +", " ", line).strip() for line in told.splitlines() if re.match(r"(hypothesis|claims|\. )", line)
    ]
