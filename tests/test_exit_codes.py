"""How commands end: the code of the documented table and one message, also where nobody takes the output."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from delta_suite.cli import app
from delta_suite.command_line import EXIT_CODES, ExitCode
from delta_suite.pipeline import Outcome, Settings
from typer.testing import CliRunner

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def record(outcome: tuple[Outcome, Settings], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's record, in a results folder to which commands may write."""
    root = tmp_path_factory.mktemp("codes")
    path = outcome[0].path
    shutil.copytree(path.parent, root / "runs" / path.parent.name)
    return root / "runs" / path.parent.name / path.name


def start(words: Sequence[object], **streams: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "delta_suite", *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **streams)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, told = process.communicate(timeout=100)
    return process.returncode, told


def commands(record: Path, results: Path) -> list[list[object]]:
    """Every command that needs no model, with enough to do."""
    return [
        ["--help"],
        ["--version"],
        ["models"],
        ["metrics"],
        ["metrics", "--json"],
        ["schema"],
        ["doctor"],
        ["hypotheses"],
        ["export", results],
        ["export", results, "--format", "jsonl"],
        ["init", results / "fresh"],
        ["judge", record],
        ["compare", record, record],
        ["leaderboard", "--results-dir", results],
        ["card", "--record", record, "--out", results / "card"],
    ]


EACH_ON_A_FULL_OUTPUT = """
import json, os, sys
from delta_suite.__main__ import main
import delta_suite.cli
# What each command would import anew.
import delta_suite.claims.judge, delta_suite.models.models_file, delta_suite.publish.screen, delta_suite.records.store
import rich.console, scipy.linalg

for words in json.loads(sys.argv[1]):
    reader, writer = os.pipe()
    if not os.fork():
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        os.dup2(writer, 2)
        os.close(reader)
        os.close(writer)
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        sys.argv = ["delta-suite", *words]
        sys.exit(main())
    os.close(writer)
    with open(reader) as errors:
        told = errors.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.wait()[1]), told]), flush=True)
"""
"""A program that runs each command in a fork of its own, which ends as a process does, and prints codes and errors."""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_output_is_one_line(record: Path) -> None:
    results = record.parents[2]
    asked = [[str(word) for word in words] for words in commands(record, results)]
    program = [sys.executable, "-c", EACH_ON_A_FULL_OUTPUT, json.dumps(asked)]
    lines = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True, timeout=300).stdout.splitlines()
    for words, line in zip(asked, lines, strict=True):
        code, told = json.loads(line)
        assert code == ExitCode.FAILED, words
        assert told.count("\n") == 1, (words, told)
        assert told.startswith("delta-suite: ")
        assert "No space left on device" in told
    assert (results / "leaderboard.md").exists()  # what was written before is kept
    assert (results / "card" / "README.md").exists()
    assert (results / "fresh" / "models.toml").exists()


def test_an_output_that_nobody_reads_is_one_line(record: Path) -> None:
    for words in (["models"], ["schema"], ["judge", record], ["export", record]):
        reader, writer = os.pipe()
        os.close(reader)
        process = start(words, stdout=writer)
        os.close(writer)
        code, told = ended(process)
        assert (code, told.count("\n")) == (ExitCode.FAILED, 1), (words, told)
        assert "the output cannot be written: Broken pipe" in told


def test_a_closed_output_is_one_line_before_anything_is_done(tiny: Path, tmp_path: Path) -> None:
    words = ["measure", tiny, "--results-dir", tmp_path / "r"]
    code, told = ended(start(words, preexec_fn=lambda: os.close(1)))
    assert code == ExitCode.FAILED
    assert told == "delta-suite: the output is closed. Send it to /dev/null if nobody is to read it.\n"
    assert not (tmp_path / "r").exists()


def test_closed_errors_hinder_nothing(record: Path) -> None:
    script = f'"{sys.executable}" -m delta_suite judge "{record}" 2>&- <&-'
    ran = subprocess.run(script, shell=True, stdout=subprocess.PIPE, text=True, check=False)
    assert ran.returncode in (ExitCode.OK, ExitCode.FAILED)
    assert "hypothesis" in ran.stdout


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["measure", "x", "--device", "gpu"], "--device 'gpu' is unknown: use auto, cpu"),
        (["measure", "x", "--device", "cuda:x"], "--device 'cuda:x' is unknown"),
        (["measure", "x", "--dtype", "int4"], "--dtype 'int4' is unknown: use auto, float32"),
        (["measure", "x", "--parts", "spectra,walls"], "no part 'walls'"),
        (["measure", "x", "--documents", "0"], "--documents is out of bounds"),
        (["measure", "x", "--documents", "many"], "'--documents'"),
        (["compare", "a.json", "b.json", "--variant", "rawish"], "variant 'rawish' is unknown"),
        (["compare", "a.json", "b.json", "--device", "gpu"], "--device 'gpu' is unknown"),
        (["trajectory", "x-*", "--variant", "rawish"], "--variant rawish is unknown: use one of raw"),
        (["leaderboard", "--repository", "ftp://x.org/a"], "--repository ftp://x.org/a is no address"),
        (["export", "--format", "xml", "x.json"], "--format xml: no such format; use one of csv"),
        (["selftest", "--only", "nothing"], "nothing planted is called 'nothing'"),
        (["selftest", "--repeats", "0"], "--repeats 0"),
        (["judge", "--nosuch"], "No such option: --nosuch"),
        (["measuer"], "No such command 'measuer'. Did you mean 'measure'? See `"),
        (["judge"], "Missing argument"),
        (["judge", ""], "an argument is empty"),
        (["meas\x1b[31mure\u202e"], r"No such command 'meas\x1b[31mure\u202e'"),
    ],
)
def test_what_does_not_exist_on_a_command_line_is_named(words: list[str], says: str) -> None:
    code, told = run(*words)
    assert code == ExitCode.USAGE
    assert says in told
    assert told.startswith("delta-suite: ")
    assert told.count("\n") == 1


def test_other_errors_are_failures(record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("judge", tmp_path / "none.json")[0] == ExitCode.FAILED
    assert run("measure", tmp_path / "none")[0] == ExitCode.FAILED
    for cache in (f"{tmp_path}/{'x' * 300}", f"{tmp_path}/{'x/' * 2500}", "/dev/null/cache", "/dev/null"):
        monkeypatch.setenv("DELTA_SUITE_CACHE", cache)
        for words in (["compare", record, record], ["judge", record], ["measure", "x"]):
            code, told = run(*words)
            assert code == ExitCode.FAILED
            assert "cannot be the cache" in told
            assert "DELTA_SUITE_CACHE" in told
            assert len(told) < 500
        assert run("doctor")[0] == ExitCode.OK


def test_no_home_is_named(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("DELTA_SUITE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    code, told = run("judge", record)
    assert code == ExitCode.FAILED
    assert told == (
        "delta-suite: there is no home folder for the cache. Set DELTA_SUITE_CACHE to a folder that can be written.\n"
    )
    assert run("doctor")[0] == run("models")[0] == ExitCode.OK


def test_an_error_that_nobody_foresaw_says_where_and_how_to_report_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("of a\nkind\x1b[31m")

    monkeypatch.setattr("delta_suite.models.models_file.load_registry", broken)
    code, told = run("models")
    assert code == ExitCode.INTERNAL
    first, advice = told.splitlines()
    assert first.startswith("delta-suite: Internal error while running the command: KeyError: 'of a\\nkind\\x1b[31m' (")
    assert "(test_exit_codes.py:" in first
    assert first.endswith(", in broken); please report it.")
    assert "DELTA_SUITE_TRACEBACK=1" in advice
    monkeypatch.setenv("DELTA_SUITE_TRACEBACK", "1")
    code, told = run("models")
    assert code == ExitCode.INTERNAL
    assert "Traceback (most recent call last)" in told
    assert told.splitlines()[-1] == first.removeprefix("delta-suite: ")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(13, "Permission denied", "results"), "results: Permission denied."),
        (MemoryError(), "not enough memory while running the command."),
    ],
)
def test_a_limit_of_the_system_is_no_internal_error(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("delta_suite.models.models_file.load_registry", broken)
    assert run("models") == (ExitCode.FAILED, f"delta-suite: {says}\n")


def test_the_codes_are_one_table_that_help_shows() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    assert set(EXIT_CODES) == set(ExitCode)
    for code, meaning in EXIT_CODES.items():
        assert f"{code}  {meaning}" in shown
    assert "{{ exit_codes }}" in (DOCS / "command-line.md").read_text("utf-8")
    assert int(pytest.ExitCode.OK) == ExitCode.OK
    assert int(pytest.ExitCode.TESTS_FAILED) == ExitCode.FAILED
    assert int(pytest.ExitCode.INTERNAL_ERROR) == ExitCode.INTERNAL
