"""The sdist holds what its tests need: every file under version control but for those named here."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LEFT_OUT = (".github/", ".gitattributes", "results/")
"""Files that only the repository needs: GitHub's, and published results, but for those that the documentation shows."""

ALWAYS = ("pyproject.toml", "README.md", "LICENSE", ".gitignore")
"""Files that hatchling puts into every sdist."""


def below(path: str, entry: str) -> bool:
    return path == entry or path.startswith(f"{entry}/")


def test_the_sdist_leaves_out_nothing_but_what_is_named() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout: this is an sdist")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    tracked = listed.stdout.split("\0")[:-1]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    entries = [*settings["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"], *ALWAYS]
    missing = [path for path in tracked if not any(below(path, entry) for entry in entries)]
    assert [path for path in missing if not path.startswith(LEFT_OUT)] == []
    assert {kind for kind in LEFT_OUT if any(path.startswith(kind) for path in missing)} == set(LEFT_OUT)
    stale = [entry for entry in entries if not any(below(path, entry) for path in tracked)]
    assert stale == []
