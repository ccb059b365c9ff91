"""What the plugin says: no terminal codes from names, errors in a line or two, and pytest's own exit codes."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from delta_suite.errors import ModelUnavailableError
from delta_suite.models import models_file

from tests.pytest_plugin.test_plugin import RUN

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_a_name_with_terminal_codes_reaches_no_report(project: pytest.Pytester, tiny: Path) -> None:
    folder = project.path / "ti\x1b[31m\x1b]0;own\x07\u202eny"
    shutil.copytree(tiny, folder)
    result = project.runpytest(*RUN, f"--model={folder}", "-v", "-rA", "--junitxml=report.xml")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert not CONTROL.search(str(result.stdout) + str(result.stderr))
    assert r"ti\x1b[31m\x1b]0;own\x07\u202eny" in str(result.stdout)
    assert not CONTROL.search((project.path / "report.xml").read_text("utf-8"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model=\x1b[31mtiny\x1b]0;own\x07"], r"--model \x1b[31mtiny\x1b]0;own\x07: nothing matches"),
        (["--model=tiny", "--device=gpu"], "--device 'gpu' is unknown: use auto, cpu"),
        (["--model=tiny", "--dtype=int4"], "argument --dtype: invalid choice: 'int4'"),
        (["--model=tiny", "--documents=0"], "--documents is out of bounds"),
        (["--model=tiny", "--variant=rawish"], "--variant rawish: no such variant; use one of raw"),
        (["--model=tiny", "--models-file=pipe"], "pipe cannot be read: not a regular file"),
        (["--model=tiny", "--baseline=pipe.json"], "pipe.json cannot be read: not a regular file"),
        (["--model=tiny", "--results-dir=pipe"], "pipe/runs cannot be written: Not a directory. Choose another folder"),
        (
            ["--model=tiny", "--baseline=pipe/x.json", "--baseline-update"],
            "pipe cannot be written: Not a directory. Choose another folder",
        ),
    ],
)
def test_a_wrong_word_ends_the_run_before_anything_is_measured(
    project: pytest.Pytester, words: list[str], says: str
) -> None:
    for name in ("pipe", "pipe.json"):
        os.mkfifo(project.path / name)
    result = project.runpytest("hypotheses/", "--no-control", "-p", "no:cacheprovider", *words)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    told = str(result.stdout) + str(result.stderr)
    assert says in told
    assert not CONTROL.search(told)
    assert "Traceback" not in told


def test_a_cache_that_cannot_be_ends_the_run(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTA_SUITE_CACHE", "/dev/null")
    result = project.runpytest(*RUN, "--model=tiny")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: /dev/null cannot be the cache: Not a directory. Set DELTA_SUITE_CACHE*"])


def test_all_models_without_a_models_file(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    (project.path / "models.toml").unlink()
    monkeypatch.setattr(models_file, "bundled", Path)
    result = project.runpytest(*RUN, "--all-models")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --all-models: there is no models file; see delta-suite models"])


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyError("of a\nkind\x1b[31m"), r"Internal error while measuring tiny: KeyError: 'of a\nkind\x1b[31m' (*"),
        (ModelUnavailableError("gone\x1b[31m"), r"tiny cannot be measured: gone\x1b[31m"),
        (OSError(28, "No space left on device", "big"), "tiny cannot be measured: big: No space left on device."),
    ],
)
def test_an_error_is_told_in_a_line(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("delta_suite.pipeline.measure", broken)
    result = project.runpytest(*RUN, "--model=tiny")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert sum(line.startswith(says.rstrip("*")) for line in result.outlines) == 1
    result.stdout.fnmatch_lines(["and 2 more items for the same reason"])
    assert "Traceback" not in str(result.stdout)
    assert not CONTROL.search(str(result.stdout))


def test_the_other_exit_codes_are_those_of_pytest(project: pytest.Pytester) -> None:
    assert project.runpytest(*RUN, "--model=tiny", "-k", "holds").ret == pytest.ExitCode.OK
    assert project.runpytest(*RUN, "--model=tiny", "-k", "nothing").ret == pytest.ExitCode.NO_TESTS_COLLECTED
