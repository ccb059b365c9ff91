"""The scripts of examples/ run, and what they print is so."""

from __future__ import annotations

import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import make_tiny

EXAMPLES = Path(__file__).parents[2] / "examples"


def main_of(script: str) -> Callable[[list[str]], None]:
    main: Callable[[list[str]], None] = runpy.run_path(str(EXAMPLES / script))["main"]
    return main


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("small") / "checkpoint-100", layers=6)


def test_own_prompts(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = main_of("own_prompts.py")
    main(["--model", str(small)])
    told = capsys.readouterr().out
    assert re.findall(r"^(\w+): 3 prompts$", told, re.MULTILINE) == ["prose", "code"]
    assert "[" not in told  # too few for intervals
    (tmp_path / "mine.txt").write_text("".join(f"This is prompt {number}.\n" for number in range(50)))
    main(["--model", str(small), str(tmp_path / "mine.txt")])
    told = capsys.readouterr().out
    assert told.lstrip().startswith("mine: 50 prompts\n")
    assert re.search(r"^C +\d+\.\d+ \[\d+\.\d+, \d+\.\d+\]", told, re.MULTILINE)


def test_merged_lora(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    main_of("merged_lora.py")([])
    told = capsys.readouterr().out
    rows = [line.split() for line in told.splitlines() if re.match(r"^ +\d ", line)]
    # The adapter is in layers 3 and 4; what comes after them reads another stream.
    assert [row[0] for row in rows if row[-1] == "changed"] == ["3", "4", "5"]
    (apart,) = re.findall(r"differ by (\S+) at most", told)
    assert float(apart) < 1e-4


def test_checkpoint_sweep(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (20, 100):
        shutil.copytree(small, tmp_path / f"checkpoint-{step}")
    page = tmp_path / "sweep.html"
    words = [str(tmp_path / "checkpoint-*"), "--calibration", "seed", "--metric", "effective_rank", "--out", str(page)]
    main_of("checkpoint_sweep.py")(words)
    assert re.findall(r"^step (\d+)", capsys.readouterr().out, re.MULTILINE) == ["20", "100"]
    drawn = page.read_text("utf-8")
    assert re.findall(r'"name":"(\w+)"', drawn)[:4] == ["A", "C", "D", "E"]
    assert '"x":[20,100]' in drawn
    with pytest.raises(SystemExit):
        main_of("checkpoint_sweep.py")([str(tmp_path / "none-*")])
    assert "names no folder" in capsys.readouterr().err
