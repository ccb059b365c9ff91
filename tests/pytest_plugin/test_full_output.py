"""A run of pytest whose output takes no more: one line, exit code 1, and what was measured is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import DOCUMENTS

OPTIONS = ("--model=tiny", f"--documents={DOCUMENTS}", "--device=cpu", "--no-control", "-p", "no:cacheprovider")
FULL = Path("/dev/full")


def ended(project: pytest.Pytester, *words: str, output: int) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "hypotheses", *OPTIONS, *words]
    done = subprocess.run(
        command, cwd=project.path, stdout=output, stderr=subprocess.PIPE, text=True, timeout=100, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("words", [("-q",), ("-q", "--junitxml=junit.xml"), ("--collect-only",), ("--help",)])
def test_a_full_output_is_one_line(project: pytest.Pytester, words: tuple[str, ...]) -> None:
    with FULL.open("w") as full:
        code, told = ended(project, *words, output=full.fileno())
    assert (code, told.count("\n")) == (1, 1), told
    assert told.startswith("delta-suite: the output cannot be written: No space left on device.")
    assert ("--junitxml=junit.xml" in words) == (project.path / "junit.xml").exists()
    assert ("-q" in words) == bool(list(project.path.glob("results/runs/tiny/*.json")))


def test_a_run_whose_reader_has_gone_ends(project: pytest.Pytester) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code, told = ended(project, "-v", output=writer)
    os.close(writer)
    assert (code, told.count("\n")) == (1, 1), told
    assert "Broken pipe" in told
    assert not list(project.path.glob("results/runs/**/*.json"))  # nothing is measured for nobody
