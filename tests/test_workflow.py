"""The GitHub Actions workflow that `init` writes: GitHub would take it, and every command of it runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from delta_suite.sharing.starting import WORKFLOW, starter_files

from tests.tiny import make_tiny
from tests.training import damaged, scale_output_projection

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "regression.md").read_text("utf-8")
WRITTEN = starter_files()[WORKFLOW].decode()

INPUT = re.compile(r"\$\{\{ inputs\.(\w+) \}\}")

JOB_KEYS = {"runs-on", "env", "steps", "name", "needs", "if", "permissions", "timeout-minutes", "strategy", "defaults"}
STEP_KEYS = {"id", "name", "if", "uses", "with", "run", "env", "shell", "working-directory", "continue-on-error"}
INPUT_KEYS = {"description", "required", "default", "type", "options", "deprecationMessage"}
ACTIONS = {
    "actions/checkout@v4": {"repository", "ref", "fetch-depth", "lfs", "path", "submodules", "token"},
    "actions/setup-python@v5": {"python-version", "python-version-file", "cache", "architecture"},
    "actions/upload-artifact@v4": {"name", "path", "if-no-files-found", "retention-days", "overwrite"},
}
"""The actions that the workflow may use, at the version whose inputs these are: from each action's action.yml."""


def fenced(after: str) -> str:
    """Return the first block behind a text of the page."""
    block = re.search(rf"{re.escape(after)}.*?\n```\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None, f"docs/regression.md has no block behind {after!r}"
    return block[1]


@pytest.fixture(scope="module")
def workflow() -> dict[Any, Any]:
    content: dict[Any, Any] = yaml.safe_load(WRITTEN)
    return content


@pytest.fixture(scope="module")
def job(workflow: dict[Any, Any]) -> dict[str, Any]:
    (only_job,) = workflow["jobs"].values()
    return dict(only_job)


def test_github_would_take_it(workflow: dict[Any, Any], job: dict[str, Any]) -> None:
    assert set(workflow) == {"name", True, "jobs"}  # YAML 1.1 reads the key `on` as true, and GitHub does not
    (trigger,) = workflow[True]
    assert trigger == "workflow_dispatch"
    inputs = workflow[True][trigger]["inputs"]
    for name, definition in inputs.items():
        assert set(definition) <= INPUT_KEYS, name
        assert isinstance(definition["required"], bool)
    assert set(job) <= JOB_KEYS
    assert job["runs-on"] == ["self-hosted", "gpu"]
    for step in job["steps"]:
        assert set(step) <= STEP_KEYS, step
        assert ("uses" in step) != ("run" in step), step
        if "uses" in step:
            assert set(step.get("with", {})) <= ACTIONS[step["uses"]], step
        else:
            assert "with" not in step, step
    version = next(step for step in job["steps"] if "setup-python" in step.get("uses", ""))["with"]["python-version"]
    assert isinstance(version, str)  # 3.10 without quotes is 3.1
    assert set(INPUT.findall(WRITTEN)) == set(inputs)
    assert WRITTEN.count("${{") == len(inputs)  # no other context is asked for
    conditions = [step["if"] for step in job["steps"] if "if" in step]
    assert set(conditions) == {"always()"}
    assert "if" in job["steps"][-1]  # the results are kept also where the comparison fails


@dataclass(frozen=True)
class Runner:
    """A self-hosted runner with the environment there, and no network."""

    checkout: Path
    environment: dict[str, str]

    def bash(self, script: str) -> subprocess.CompletedProcess[str]:
        """As GitHub runs a step that names no shell: bash -e, from the checkout."""
        return subprocess.run(
            ["bash", "-e", "-c", script],
            cwd=self.checkout,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def start(self, job: dict[str, Any], **inputs: str) -> tuple[list[subprocess.CompletedProcess[str]], list[Path]]:
        """Run the steps in order, but for the installing of packages; what each `run` did, and what is uploaded.

        After a step that failed only those with `if: always()` run.
        """
        filled = {name: INPUT.sub(lambda match: inputs[match[1]], text) for name, text in job["env"].items()}
        here = Runner(self.checkout, self.environment | filled)
        done: list[subprocess.CompletedProcess[str]] = []
        uploaded: list[Path] = []
        for step in job["steps"]:
            if any(step_done.returncode for step_done in done) and step.get("if") != "always()":
                continue
            if "upload-artifact" in step.get("uses", ""):
                uploaded = [self.checkout / line for line in step["with"]["path"].split()]
            elif "run" in step and not step["run"].startswith("pip install "):
                done.append(here.bash(step["run"]))
        return done, uploaded


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A repository with hypotheses and a baseline, written by the command of the same page, and three checkpoints."""
    root = tmp_path_factory.mktemp("runner")
    checkout = root / "checkout"
    (checkout / "hypotheses").mkdir(parents=True)
    for name in ("phase_c.toml", "test_depth.py"):  # claims and plain tests: one file of each is enough
        shutil.copy(ROOT / "hypotheses" / name, checkout / "hypotheses")
    first = make_tiny(checkout / "runs" / "big" / "checkpoint-4000", layers=6, hidden=16)
    shutil.copytree(first, first.with_name("checkpoint-8000"))
    damaged(first, first.with_name("checkpoint-12000"), scale_output_projection(3))
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DELTA_SUITE_CACHE": str(root / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTEST_ADDOPTS": "--no-control",  # another measurement, of which no step is about
        "TOKENIZERS_PARALLELISM": "false",
    }
    here = Runner(checkout, environment)
    once = fenced("A training team keeps one baseline for a run").splitlines()[1]
    assert once.endswith("--baseline-update")
    run = here.bash(once)
    assert (checkout / "results" / "baselines" / "big.json").is_file(), run.stdout + run.stderr
    return here


def cases(runner: Runner) -> dict[str, bool]:
    """The comparisons that JUnit reports, and whether each failed."""
    reported = ET.parse(runner.checkout / "junit.xml").iter("testcase")
    return {str(case.get("name")): case.find("failure") is not None for case in reported}


def test_every_command_runs_and_leaves_what_is_uploaded(runner: Runner, job: dict[str, Any]) -> None:
    done, uploaded = runner.start(job, run="runs/big", checkpoint="checkpoint-8000")
    assert [step.returncode for step in done] == [0, 0], "".join(step.stdout + step.stderr for step in done)
    assert len(done) == sum("run" in step for step in job["steps"]) - 1
    compared = cases(runner)
    assert len(compared) > 100
    assert "layers/effective_rank[runs--big--checkpoint-8000]" in compared
    assert not any(compared.values())
    assert len(uploaded) == 3
    for path in uploaded:
        assert path.is_file() or any(file.is_file() for file in path.rglob("*")), path
    assert "checkpoint-12000" in (runner.checkout / "page" / "index.html").read_text("utf-8")


def test_a_damaged_checkpoint_fails_the_job_and_is_uploaded_all_the_same(runner: Runner, job: dict[str, Any]) -> None:
    shutil.rmtree(runner.checkout / "page", ignore_errors=True)
    done, uploaded = runner.start(job, run="runs/big", checkpoint="checkpoint-12000")
    assert [step.returncode for step in done] == [1, 0]
    assert "first at   layer 3" in done[0].stdout
    assert any(failed for name, failed in cases(runner).items() if name.startswith("layers/"))
    assert all(path.exists() for path in uploaded)
