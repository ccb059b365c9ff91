"""Ctrl-C and SIGTERM: one line, the right exit code, and nothing half-written, wherever they come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from delta_suite.__main__ import main
from delta_suite.writing import PREFIX

from tests import apart
from tests.crash.killing import kill_before
from tests.tiny import make_tiny
from tests.tiny_claims import NO_FAILURE

ROOT = Path(__file__).parents[2]

INTERRUPTED = """
import sys
sys.argv[0] = "delta-suite"
from delta_suite.__main__ import main

{arrange}
main()
"""

BEFORE_A_CHANGE = """
from tests.crash.killing import kill_before
kill_before({step}, {below!r}, {number})
"""

IN_AN_IMPORT = """
import os
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Interrupting())
"""


def interrupted(folder: Path, arrange: str, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", INTERRUPTED.format(arrange=arrange), *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("module", ["typer", "pydantic", "jinja2"])
def test_an_import_may_be_interrupted(tmp_path: Path, module: str, number: signal.Signals, code: int) -> None:
    (tmp_path / "results" / "runs").mkdir(parents=True)
    done = interrupted(tmp_path, IN_AN_IMPORT.format(module=module, number=int(number)), ["leaderboard"])
    assert (done.returncode, done.stderr, done.stdout) == (code, "delta-suite: interrupted\n", "")


@pytest.mark.parametrize("step", [1, 2, 4])
def test_writing_may_be_interrupted(tmp_path: Path, step: int) -> None:
    (tmp_path / "results" / "runs").mkdir(parents=True)
    below = str(tmp_path / "results")
    arrange = BEFORE_A_CHANGE.format(step=step, below=below, number=int(signal.SIGINT))
    done = interrupted(tmp_path, arrange, ["leaderboard"])
    assert (done.returncode, done.stderr, done.stdout) == (130, "delta-suite: interrupted\n", "")
    assert not list((tmp_path / "results").glob(f"{PREFIX}*"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    for seed, name in enumerate(("one", "two")):
        make_tiny(folder / name, layers=4, hidden=32, seed=seed)
    (folder / "hypotheses").mkdir()
    (folder / "hypotheses" / "claims.toml").write_text(NO_FAILURE)
    return folder


def command(words: Sequence[str]) -> None:
    """Be the program."""
    sys.argv = ["delta-suite", *words]
    main()


def pytest_interrupted_before(below: str, words: Sequence[str]) -> None:
    """Be pytest, and be interrupted before something below a folder is changed."""
    kill_before(1, below, signal.SIGINT)
    sys.exit(pytest.main([*words]))


def test_what_is_kept_is_said(models: Path) -> None:
    """Interrupted when the second model's record is about to be written; the cache has both."""
    below = str(models / "results" / "runs" / "two")
    words = ["measure", "./one", "./two", "--calibration=seed", "--device=cpu", "--parts=spectra"]
    done = interrupted(models, BEFORE_A_CHANGE.format(step=1, below=below, number=int(signal.SIGINT)), words)
    said = "delta-suite: interrupted: 1 of 2 models is measured and kept in results/runs\n"
    assert (done.returncode, done.stderr) == (130, said)
    assert "record: results/runs/one/" in done.stdout
    assert [path.name for path in (models / "results" / "runs").iterdir()] == ["one"]
    again = apart.run(command, words, folder=models)
    assert again.code == 0, again.err
    assert again.out.count("(from the cache)") == 2


def test_pytest_says_what_is_kept(models: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    words = ["-p", "no:cacheprovider", str(models / "hypotheses"), "--calibration=seed"]
    words += [f"--model={models / 'one'}", f"--model={models / 'two'}", "--device=cpu", f"--results-dir={results}"]
    below = str(results / "runs" / f"{models.name}--two")
    done = apart.run(pytest_interrupted_before, below, words, folder=tmp_path, COLUMNS="300")
    assert done.code == 2, done.out
    assert f"delta-suite: interrupted: 1 of 2 models is measured and kept in {results}/runs" in done.out
    assert "Traceback" not in done.out + done.err
