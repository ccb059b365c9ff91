"""The workflow for records of others: what GitHub would run, and what it runs here, on a pull request made in git."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from delta_suite.records.record import SubmitterRecord
from delta_suite.sharing.submitting import submit

ROOT = Path(__file__).parents[2]
if not (ROOT / ".github").exists():
    pytest.skip("no checkout: this is an sdist", allow_module_level=True)
TEXT = (ROOT / ".github/workflows/records.yml").read_text("utf-8")
WORKFLOW: dict[Any, Any] = yaml.safe_load(TEXT)
STEPS = {step["name"]: step for step in WORKFLOW["jobs"]["verify"]["steps"] if "name" in step}


def test_a_pull_request_gets_a_token_that_reads_and_runs_no_code_of_its_own() -> None:
    assert set(WORKFLOW[True]) == {"pull_request", "push"}  # YAML 1.1 reads the key `on` as true
    assert "pull_request_target" not in TEXT
    assert WORKFLOW["permissions"] == {"contents": "read"}
    verify, build = WORKFLOW["jobs"]["verify"], WORKFLOW["jobs"]["build"]
    assert "permissions" not in verify
    assert verify["if"] == "github.event_name == 'pull_request'"
    assert build["if"] == "github.event_name == 'push'"
    assert WORKFLOW[True]["push"]["branches"] == ["main"]
    assert build["permissions"] == {"contents": "write"}
    assert "secrets" not in TEXT
    checkouts = [step["with"] for step in verify["steps"] if "checkout" in step.get("uses", "")]
    assert all(checkout["persist-credentials"] is False for checkout in checkouts)
    runs = [step["run"] for step in verify["steps"] if "run" in step]
    assert [run for run in runs if "${{" in run] == []  # nothing that somebody else wrote becomes part of a script
    assert [run for run in runs if "pip install" in run] == ["pip install -c base/constraints.txt ./base"]


def test_main_is_built_checked_and_committed() -> None:
    steps = [step["run"] for step in WORKFLOW["jobs"]["build"]["steps"] if "run" in step]
    assert steps[1:3] == ["delta-suite leaderboard", "delta-suite leaderboard --check"]
    assert "git push" in steps[3]


# --- a pull request --------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=ada", "-c", "user.email=ada@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A runner's folder: the base with the script, and a checkout whose next commit is the pull request."""
    proposed, base = tmp_path / "proposed", tmp_path / "base"
    (base / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci/added-records", base / ".ci")
    shutil.copytree(ROOT / "hypotheses", base / "hypotheses")
    (proposed / "results" / "runs" / "a").mkdir(parents=True)
    (proposed / "README.md").write_text("a repository")
    git(proposed, "init", "-q", "-b", "main")
    git(proposed, "add", "-A")
    git(proposed, "commit", "-qm", "base")
    return tmp_path


def propose(workspace: Path) -> None:
    git(workspace / "proposed", "add", "-A")
    git(workspace / "proposed", "commit", "-qm", "records", "--allow-empty")


def step(workspace: Path, name: str) -> subprocess.CompletedProcess[str]:
    """Run a step as GitHub does: bash -e, from the workspace."""
    (workspace / "temp").mkdir(exist_ok=True)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RUNNER_TEMP": str(workspace / "temp"),
        "GITHUB_STEP_SUMMARY": str(workspace / "summary.md"),
    }
    command = ["bash", "-e", "-c", STEPS[name]["run"]]
    return subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=False)


ADDED, VERIFY, BUILD, SHOW = STEPS


def test_a_record_is_verified_and_its_table_shown(workspace: Path, record: Path) -> None:
    submit([record], workspace / "proposed" / "results", SubmitterRecord(handle="ada"))
    propose(workspace)
    for name in (ADDED, VERIFY, BUILD, SHOW):
        done = step(workspace, name)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "# Leaderboard" in (workspace / "summary.md").read_text("utf-8")
    assert not (workspace / "proposed" / "results" / "site").exists()


def test_a_forged_record_fails(workspace: Path, record: Path) -> None:
    submit([record], workspace / "proposed" / "results", SubmitterRecord(handle="ada"))
    (copy,) = (workspace / "proposed").glob("results/runs/*/*.json")
    copy.write_text(copy.read_text().replace('"tokens":', '"tokens":1', 1))
    propose(workspace)
    assert step(workspace, ADDED).returncode == 0
    done = step(workspace, VERIFY)
    assert done.returncode != 0
    assert "consistent: 0" in done.stdout


NAME = "results/runs/a/20261124T000000Z-00000000.json"


def changes_a_file(proposed: Path) -> None:
    (proposed / "README.md").write_text("mine")


def adds_another_file(proposed: Path) -> None:
    (proposed / "results/runs/a/run.py").write_text("print()")


def adds_a_link(proposed: Path) -> None:
    (proposed / NAME).symlink_to("/etc/passwd")


def adds_a_record_without_a_submitter(proposed: Path) -> None:
    (proposed / NAME).write_text('{"schema":3,\n"model":{}}\n')


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (changes_a_file, "changes or removes:\nM\tREADME.md"),
        (adds_another_file, "adds:\nresults/runs/a/run.py"),
        (adds_a_link, "plain files"),
        (adds_a_record_without_a_submitter, f"{NAME} has no submitter"),
    ],
)
def test_a_pull_request_that_does_anything_else_is_refused(
    workspace: Path, change: Callable[[Path], None], expected: str
) -> None:
    change(workspace / "proposed")
    propose(workspace)
    done = step(workspace, ADDED)
    assert done.returncode == 1
    assert expected in done.stderr
