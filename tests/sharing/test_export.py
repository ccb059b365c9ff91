"""Figures as rows: the same in every format and in a data frame."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import delta_suite as ds
import pytest
from delta_suite.cli import app
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Settings, measure
from delta_suite.records.cache import Cache
from delta_suite.records.figures import COLUMNS
from typer.testing import CliRunner, Result


def export(*words: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, words)])


@pytest.fixture(scope="module")
def results(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two records of one model."""
    root = tmp_path_factory.mktemp("results")
    for name in ("first", "second"):
        spec = ModelSpec(name=name, path=tiny)
        measure(
            spec, Settings(calibration="core", documents=8, results=root, device="cpu", cache=Cache(root / "cache"))
        )
    return root


def rows_of(text: str) -> list[dict[str, Any]]:
    """Return the rows of a CSV file with the types of the columns, None for an empty cell."""
    return [
        {name: COLUMNS[name](cell) if cell else None for name, cell in row.items()}
        for row in csv.DictReader(io.StringIO(text))
    ]


def test_every_format_and_the_data_frame_have_the_same_rows(results: Path, tmp_path: Path) -> None:
    rows = list(ds.load_results(results).rows())
    assert rows_of(export(results).stdout) == rows
    assert [json.loads(line) for line in export(results, "--format", "jsonl").stdout.splitlines()] == rows
    parquet = pytest.importorskip("pyarrow.parquet")
    assert export(results, "--format", "parquet", "-o", tmp_path / "x.parquet").exit_code == 0
    assert parquet.read_table(tmp_path / "x.parquet").to_pylist() == rows
    pytest.importorskip("pandas")
    frame = ds.load_results(results).to_frame()
    assert list(frame) == list(COLUMNS)
    assert frame["layer"].dropna().tolist() == [row["layer"] for row in rows if row["layer"] is not None]
    assert frame["value"].dropna().tolist() == [row["value"] for row in rows if row["value"] is not None]


def test_each_figure_of_the_record_is_one_row(results: Path) -> None:
    rows = rows_of(export(results).stdout)
    keys = [tuple(row[name] for name in ("record", "scope", "metric", "variant")) for row in rows]
    assert len(set(keys)) == len(keys)
    assert {row["model"] for row in rows} == {"first", "second"}
    (path,) = results.glob("runs/first/*.json")
    record = json.loads(path.read_text())
    recorded = record["layers"][3]["metrics"]["sink_free"]["effective_rank"]
    wanted = {"record": path.as_posix(), "scope": "layer:3", "metric": "effective_rank", "variant": "sink_free"}
    (row,) = [row for row in rows if wanted.items() <= row.items()]
    assert (row["value"], row["corrected"]) == (recorded["value"], recorded["corrected"])
    assert [row["low"], row["high"]] == recorded["interval"]
    assert (row["layer"], row["phase"], row["write"], row["reason"]) == (3, record["layers"][3]["phase"], None, None)
    assert row["measured"] == record["provenance"]["created"]
    assert (row["calibration"], row["source"]) == ("core", record["model"]["source"])
    of_c = [row for row in rows if row["scope"] == "C" and row["record"] == path.as_posix()]
    assert {row["phase"] for row in of_c} == {"C"}
    assert {row["layer"] for row in of_c} == {None}
    assert "sharing_index" in {row["metric"] for row in of_c}
    boundaries = {(row["phase"], row["variant"]) for row in rows if row["metric"] == "boundary_agreement"}
    assert boundaries == {(None, variant) for variant in record["variants"]}


def test_a_figure_without_a_value_has_its_reason(results: Path) -> None:
    rows = rows_of(export(results).stdout)
    assert all((row["value"] is None) == (row["reason"] is not None) for row in rows)
    assert any(row["value"] is None for row in rows)


def test_a_variant_of_an_older_meaning_has_no_values() -> None:
    rows = rows_of(export(Path(__file__).parents[1] / "records" / "data" / "schema2.json").stdout)
    old = [row for row in rows if row["variant"] == "centred"]
    assert old
    assert all(row["value"] is None and "means something else today" in row["reason"] for row in old)
    assert all(row["value"] is not None or row["reason"] for row in rows)


def test_a_damaged_record_is_named_and_the_others_are_exported(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results / "runs", tmp_path / "runs")
    (bad,) = tmp_path.glob("runs/first/*.json")
    bad.write_text("{")
    out = tmp_path / "x.csv"
    result = export(tmp_path, "-o", out)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"delta-suite: left out: {bad} is not a measurement record")
    assert {row["model"] for row in rows_of(out.read_text())} == {"second"}
    before = out.read_bytes()
    assert export(bad, "-o", out).exit_code == 1
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--format", "xml"), "--format xml: no such format; use one of csv, parquet, jsonl"),
        (("--format", "parquet"), "name it, as in -o figures.parquet"),
        (("-o", "."), ". cannot be written: "),
    ],
)
def test_what_cannot_be_written_is_one_line(results: Path, words: tuple[str, ...], says: str) -> None:
    result = export(results, *words)
    assert result.exit_code == (2 if "xml" in words else 1)
    (line,) = result.stderr.splitlines()
    assert says in line


def test_a_folder_without_records_says_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = export()
    assert result.exit_code == 1
    assert result.stderr.startswith("delta-suite: results/runs is not a folder. Records lie in results/runs/<model>/")
    (tmp_path / "results" / "runs").mkdir(parents=True)
    assert export().stderr == "delta-suite: there are no records in results: `delta-suite measure NAME` writes one\n"
    assert list(ds.load_results().rows()) == []
    with pytest.raises(ds.SuiteError, match="is not a folder"):
        ds.load_results("nowhere")


def test_parquet_without_pyarrow_names_the_extra(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = export(results, "--format", "parquet", "-o", tmp_path / "x.parquet")
    assert result.exit_code == 1
    assert "pip install 'delta-suite[parquet]'" in result.stderr
    assert not (tmp_path / "x.parquet").exists()


def test_no_cell_begins_a_formula_and_no_line_obeys(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results / "runs", tmp_path / "runs")
    for path in tmp_path.glob("runs/*/*.json"):
        record = json.loads(path.read_text("utf-8"))
        record["calibration"]["name"] = "=1+2\x1b[31m\u202e"
        path.write_text(json.dumps(record), "utf-8")
    assert {row["calibration"] for row in rows_of(export(tmp_path).stdout)} == {r"'=1+2\x1b[31m\u202e"}
    lines = export(tmp_path, "--format", "jsonl").stdout
    assert not re.search("[\x1b\u202e]", lines)
    assert {json.loads(line)["calibration"] for line in lines.splitlines()} == {"=1+2\x1b[31m\u202e"}  # the data itself
