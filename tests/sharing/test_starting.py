"""`delta-suite init`: a folder in which everything works, and never a file overwritten."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from delta_suite.cli import app
from delta_suite.models.models_file import load_registry
from delta_suite.paths import bundled
from delta_suite.sharing.starting import STARTER
from typer.testing import CliRunner, Result

FILES = {
    *(f"hypotheses/{name}.toml" for name in ("boundaries", "phase_c", "phase_e", "update_law")),
    *("hypotheses/hypothesis.schema.json", "hypotheses/test_depth.py"),
    *("models.toml", ".github/workflows/checkpoint.yml", ".gitignore"),
}


def init(*words: str) -> Result:
    return CliRunner().invoke(app, ["init", *words])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", [(), ("new/claims",)])
def test_it_writes_and_names_every_file_and_says_what_to_type(here: Path, words: tuple[str, ...]) -> None:
    result = init(*words)
    assert result.exit_code == 0, result.output
    folder = here.joinpath(*words)
    assert set(contents(folder)) == FILES
    assert {line.removeprefix("written: ") for line in result.output.splitlines() if line.startswith("written: ")} == {
        str(Path(*words, name)) for name in FILES
    }
    assert (folder / "hypotheses" / "phase_c.toml").read_bytes() == (
        bundled("hypotheses") / "phase_c.toml"
    ).read_bytes()
    assert ("  cd new/claims\n" in result.output) == bool(words)
    assert "  pytest hypotheses/ --model=" in result.output


@pytest.mark.long
def test_what_it_writes_can_be_used(here: Path, tiny: Path) -> None:
    """In a new process, as a user does: the claims on a tiny model, from the folder alone."""
    assert init("mine").exit_code == 0
    command = [sys.executable, "-m", "pytest", "hypotheses/", "-p", "no:cacheprovider", "--no-control"]
    run = subprocess.run(
        [*command, f"--model={tiny}", "--calibration=seed", "--device=cpu"],
        cwd=here / "mine",
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode in (0, 1), run.stdout + run.stderr  # 1 is a refuted claim
    assert "phase-c" in run.stdout
    assert re.search(r"^=+ 2 passed, 12 not measured, 7 inconclusive in ", run.stdout, re.MULTILINE)
    assert len(list((here / "mine" / "results" / "runs").glob("*/*.json"))) == 1


def test_its_models_file_can_be_read_also_with_the_examples(here: Path) -> None:
    init()
    assert list(load_registry(Path("models.toml")).specs) == ["smollm2-135m-q4"]
    text = (STARTER / "models.toml").read_text()
    head, *examples = text.split("\n\n")
    Path("models.toml").write_text("\n\n".join([head, *(example.replace("# ", "") for example in examples[1:])]))
    assert list(load_registry(Path("models.toml")).specs) == ["my-model", "pythia-70m", "my-large-model"]


@pytest.mark.parametrize("name", sorted(FILES - {".gitignore"}))
def test_where_a_file_is_there_nothing_is_written(here: Path, name: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("mine")
    result = init()
    assert result.exit_code == 1
    assert result.stderr.startswith(f"delta-suite: {name} is there already, and nothing was written. ")
    assert contents(here) == {name: b"mine"}


def test_a_dangling_link_is_not_written_through(here: Path) -> None:
    Path("models.toml").symlink_to("elsewhere.toml")
    assert init().exit_code == 1
    assert not Path("elsewhere.toml").exists()


def test_a_gitignore_that_is_there_stays(here: Path) -> None:
    Path(".gitignore").write_text("mine\n")
    result = init()
    assert result.exit_code == 0
    assert ".gitignore is there already, and stays as it is" in result.output
    assert contents(here)[".gitignore"] == b"mine\n"
    assert set(contents(here)) == FILES


def test_a_folder_that_cannot_be_written_is_one_line(here: Path) -> None:
    Path("file").write_text("mine")
    result = init("file")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "cannot be written: Not a directory" in line
    assert contents(here) == {"file": b"mine"}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_keeps_results_and_leaves_out_what_runs_leave_behind(here: Path) -> None:
    init()
    subprocess.run(["git", "init", "-q"], check=True)
    for path in ("results/runs/a/b.json", "junit.xml", "page/index.html", "hypotheses/__pycache__/x.pyc"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    shown = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    ).stdout.split()
    assert set(shown) == FILES | {"results/runs/a/b.json"}
