"""The deep training run at toy size: it learns, goes on where a leg ended, measures each checkpoint, and packs."""

from __future__ import annotations

import csv
import doctest
import importlib.util
import json
import lzma
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import delta_suite as ds
import pytest

from tests.examples.test_scripts import EXAMPLES

STEPS = [0, 4, 6]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "deep_training_run.py"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl.xz"
    with lzma.open(path, "wt", encoding="utf-8") as file:
        for name in sorted(topics):
            file.write(json.dumps({"package": "python", "file": name, "text": topics[name]}) + "\n")
    return path


@pytest.mark.parametrize("name", ["deep_training_run", "deep_training_text"])
def test_examples_in_docstrings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    failed, attempted = doctest.testmod(module)
    assert (failed, attempted) == (0, 2)


def words_of(folder: Path, text: Path, *others: str) -> list[str]:
    size = ["--layers=3", "--hidden=32", "--vocabulary=300", "--steps=6", "--batch=4", "--context=32"]
    places = ["--text", str(text), "--out", str(folder / "out"), "--work", str(folder / "run")]
    return [*places, *size, "--device", "cpu", "--calibration", "seed", "--documents", "4", *others]


def test_a_run_in_legs_is_the_run_in_one(
    script: dict[str, Any], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, legs = tmp_path / "whole", tmp_path / "legs"
    assert script["main"](words_of(whole, text))
    for _ in range(5):  # a leg without time takes one step, and measures nothing
        assert not script["main"](words_of(legs, text, "--minutes", "0"))
    assert "not finished: 2 to measure. Run the same command again." in capsys.readouterr().out
    assert not list((legs / "out").glob("*.tar"))
    assert script["main"](words_of(legs, text))
    assert (whole / "out/loss.csv").read_text() == (legs / "out/loss.csv").read_text()

    with (whole / "out/loss.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["tokens"] for row in rows] == [str(128 * step) for step in range(7)]
    assert [int(row["step"]) for row in rows if row["held_out_loss"]] == STEPS
    assert float(rows[6]["held_out_loss"]) < float(rows[0]["held_out_loss"])

    run = json.loads((whole / "out/run.json").read_text())
    assert (run["steps"], run["tokens"]) == (6, 6 * 128)
    assert run["distinct_tokens"] > 100_000
    with tarfile.open(whole / "out/records-1.tar") as tar:
        tar.extractall(tmp_path / "results", filter="data")
    records = ds.load_results(tmp_path / "results")
    names = {record.name.rpartition("checkpoint-")[2] for record in records}
    assert names == {*map(str, STEPS), "6@random-weights"}
    assert all({"spectra", "boundaries", "law", "writes"} <= set(record.record.parts) for record in records)
    assert ds.verify(tmp_path / "results").consistent


def test_text_is_taken_from_packages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Debian package with a page, a manual page and a paragraph that is there twice."""
    root, debs = tmp_path / "tiny", tmp_path / "debs"
    documents = root / "usr/share/doc/tiny"
    (root / "DEBIAN").mkdir(parents=True)
    documents.mkdir(parents=True)
    debs.mkdir()
    paragraph = "The words of this paragraph stand in two files, and are taken from the first one alone. " * 3
    (root / "DEBIAN/control").write_text(
        "Package: tiny\nVersion: 1.5\nArchitecture: all\nMaintainer: A <a@example.org>\nDescription: t\n"
    )
    (documents / "copyright").write_text("Files: *\nLicense: GPL-2+\n")
    (documents / "one.html").write_text(f"<script>no()</script><p>{paragraph}</p><p>{'One more line. ' * 20}</p>")
    (documents / "two.txt").write_text(f"{paragraph}\n\n{'Another line. ' * 20}")
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", root, debs / "tiny.deb"], check=True)
    script = runpy.run_path(str(EXAMPLES / "deep_training_text.py"))
    out, page = tmp_path / "text.jsonl.xz", tmp_path / "text.md"
    script["main"](["--out", str(out), "--debs", str(debs), "--datasheet", str(page), "--cap", "5000", "--debian-only"])
    with lzma.open(out, "rt", encoding="utf-8") as file:
        taken = [json.loads(line) for line in file]
    assert {one["file"] for one in taken} == {"usr/share/doc/tiny/one.html", "usr/share/doc/tiny/two.txt"}
    assert sum(one["text"].count("stand in two files") for one in taken) == 3
    assert "no()" not in str(taken)
    assert "| tiny | 1.5 | GPL-2+ | 2 |" in page.read_text()
    assert "2 documents" in capsys.readouterr().out
