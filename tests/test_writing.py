"""Writing: files whole or not at all, with the parts that they name, and what killed runs leave is swept."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from delta_suite.errors import RecordError
from delta_suite.records.arrays import ArrayFile, pack
from delta_suite.writing import (
    PREFIX,
    folder_lock,
    sweep,
    temporary_folder,
    write_atomically,
    write_together,
    write_with_parts,
)


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_atomically(path, "old")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RecordError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_a_file_that_cannot_be_written_leaves_all_as_they_were(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "one", tmp_path / "b" / "two"]
    write_together([(path, b"old") for path in paths], tmp_path)

    def content() -> Iterator[tuple[Path, bytes]]:
        yield paths[0], b"new"
        raise OSError(28, "No space left on device")

    with pytest.raises(RecordError, match="No space left"):
        write_together(content(), tmp_path)
    assert [path.read_bytes() for path in paths] == [b"old", b"old"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b"]


def test_a_folder_on_another_file_system_is_written_too(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    with temporary_folder(memory) as elsewhere:
        (tmp_path / "site").symlink_to(elsewhere)
        write_together([(tmp_path / "site" / "page", b"text")], tmp_path)
        assert (elsewhere / "page").read_bytes() == b"text"
        assert [entry.name for entry in elsewhere.iterdir()] == ["page"]


# --- a file that names others by their SHA-256 -----------------------------------------------------------------


def write_pair(path: Path, value: float) -> None:
    arrays = pack({"value": np.full(3, value)})
    named = {"value": value, "sha256": hashlib.sha256(arrays).hexdigest()}
    write_with_parts(path, json.dumps(named).encode(), {path.with_suffix(".safetensors"): arrays})


def read_pair(path: Path) -> tuple[float, float]:
    named = json.loads(path.read_text())
    return named["value"], ArrayFile(path.with_suffix(".safetensors"), named["sha256"]).content["value"][0]


KILLED = """
import sys
from pathlib import Path
from tests.crash.killing import kill_before
from tests.test_writing import write_pair

path, value, step = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
kill_before(step, str(path.parent))
write_pair(path, value)
"""


def test_a_file_and_its_part_are_the_old_ones_or_the_new_ones_wherever_the_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_pair(path, 1.0)
    ends = []
    for step in range(1, 30):
        before = read_pair(path)[0]
        command = [sys.executable, "-c", KILLED, path, str(before + 1), str(step)]
        code = subprocess.run(command, cwd=Path(__file__).parents[1], check=False).returncode
        assert code in (0, -9)
        value, part = read_pair(path)
        assert value == part
        assert value in (before, before + 1)
        ends.append((code, value > before))
        if code == 0:
            break
    assert ends[-1] == (0, True), "no step is left untried"
    assert {(-9, False), (-9, True)} <= set(ends)
    write_pair(path, 50.0)
    assert read_pair(path) == (50.0, 50.0)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run.json", "run.safetensors"]


# --- temporary folders -----------------------------------------------------------------------------------------

HELD = """
import sys, time
from pathlib import Path
from delta_suite.writing import temporary_folder

with temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("")
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_stays_and_that_of_a_killed_run_is_swept(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HELD, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        (folder,) = tmp_path.iterdir()
        assert folder.name.startswith(PREFIX)
        sweep(tmp_path)
        assert (folder / "half").exists()
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    assert (folder / "half").exists()
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_machine_is_swept_after_a_day(tmp_path: Path) -> None:
    folder = tmp_path / f"{PREFIX}00000000-abcdefgh"
    folder.mkdir()
    sweep(tmp_path)
    assert folder.exists()
    two_days_ago = time.time() - 2 * 86400
    os.utime(folder, (two_days_ago, two_days_ago))
    sweep(tmp_path)
    assert not folder.exists()


def test_a_folders_lock_keeps_others_waiting(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from delta_suite.writing import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])): print((Path(sys.argv[1]) / 'text').read_text())"
    )
    with folder_lock(tmp_path):
        (tmp_path / "text").write_text("half")
        waiting = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
        time.sleep(0.5)
        (tmp_path / "text").write_text("whole")
    assert waiting.communicate(timeout=60)[0] == "whole\n"
