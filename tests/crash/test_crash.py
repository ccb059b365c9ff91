"""A small part of `make crash`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_runs_that_are_killed_leave_the_old_state_or_the_new_one(tmp_path: Path) -> None:
    """Two points a run; without pytest -n 2, which takes as long as all others."""
    table = tmp_path / "table.md"
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash", "--points=12", "--without=pytest", f"--out={table}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| update a baseline | 2 | 0 | 0 | 2 | 0 |" in table.read_text()
