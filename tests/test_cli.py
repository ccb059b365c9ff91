"""The shell's front door, command by command."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from delta_suite.cli import app
from delta_suite.metrics.registry import METRICS
from delta_suite.models import models_file
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Outcome, Settings, measure
from delta_suite.records.cache import Cache
from delta_suite.writing import require_writable
from typer.testing import CliRunner, Result

from tests.tiny import DOCUMENTS

QUICK = ("--documents", 8, "--parts", "spectra")
"""Options of a measurement that takes a second."""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def record(outcome: tuple[Outcome, Settings]) -> Path:
    """The record of the tiny model."""
    return outcome[0].path


@pytest.mark.parametrize(
    "command",
    [
        *("measure", "compare", "trajectory", "judge", "leaderboard", "card", "verify", "submit", "push", "pull"),
        *("models", "hypotheses", "metrics", "schema", "selftest", "doctor", "init", "export"),
    ],
)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: delta-suite {command}" in result.output


def test_the_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    command = [sys.executable, "-m", "delta_suite", "metrics"]
    folder, env = Path(__file__).parents[1], dict(os.environ)
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=env).stdout
    assert shown == run("metrics").output
    assert max(map(len, shown.splitlines())) <= 100


def test_measure_writes_a_record_and_shows_the_phases(tiny: Path, tmp_path: Path) -> None:
    result = run("measure", tiny, "--documents", 12, "--results-dir", tmp_path, "--device", "cpu", "--layers")
    assert result.exit_code == 0, result.output
    written = Path(re.findall(r"record: (\S+)", result.output)[0])
    assert json.loads(written.read_text())["model"]["layers"] == 12
    assert "block rank" in result.output
    assert "influence" in result.output
    assert re.search(r"^p +0\.\d{3} against smooth drift", result.output, re.MULTILINE)


def test_the_user_is_told_of_an_adapter_also_of_one_that_came_later(
    small: Path, tmp_path: Path, own_cache: Path
) -> None:
    model = shutil.copytree(small, tmp_path / "model")
    options = ("--results-dir", tmp_path / "results", "--device", "cpu", *QUICK)
    assert "adapter" not in run("measure", model, *options).output
    (model / "adapter_config.json").write_text("{}")
    output = run("measure", model, *options).output
    assert "model: the adapter in" in output
    assert "is not measured, the model beside it is" in output


def test_a_damaged_cache_entry_is_one_line(small: Path, tmp_path: Path, own_cache: Path) -> None:
    options = ("--results-dir", tmp_path, "--device", "cpu", "--calibration", "seed")
    for command in (("measure", small), ("compare", small, small)):
        run("measure", small, *options)
        (arrays,) = own_cache.glob("measurements/*/arrays.safetensors")
        arrays.write_bytes(b"")
        result = run(*command, *options)
        assert result.exit_code == 0, result.output
        (line,) = [own for own in result.stderr.splitlines() if "cache" in own or "Warning" in own]
        assert line.startswith(f"delta-suite: the cache entry {arrays.parent} was damaged, and is removed; ")
        assert line.endswith("small was measured again")


def test_measure_goes_on_after_a_model_that_cannot_be_measured(small: Path, tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(
        f'[models.gone]\npackage="absent"\ngguf="x.gguf"\n[models.tiny]\npath={str(small)!r}\n'
    )
    result = run(
        "measure",
        "gone",
        "tiny",
        *QUICK,
        "--models-file",
        tmp_path / "models.toml",
        "--results-dir",
        tmp_path / "r",
    )
    assert result.exit_code == 1
    assert "gone cannot be measured" in result.stderr
    assert len(list((tmp_path / "r" / "runs").iterdir())) == 1


def test_measure_goes_on_after_an_error_that_nobody_foresaw(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def broken(spec: ModelSpec, *options: Any) -> Outcome:
        asked.append(spec.name)
        if spec.name == "first":
            raise ZeroDivisionError("of a kind that\nnobody foresaw")
        return measure(spec, *options)

    monkeypatch.setattr("delta_suite.pipeline.measure", broken)
    models = tmp_path / "models.toml"
    models.write_text(f"[models.first]\npath={str(small)!r}\n[models.second]\npath={str(small)!r}\n")
    arguments = (
        "measure",
        "first",
        "second",
        *QUICK,
        "--models-file",
        models,
        "--results-dir",
        tmp_path / "r",
    )
    result = run(*arguments, "--device", "cpu")
    assert result.exit_code == 1
    told, advice, *_ = result.stderr.splitlines()
    assert re.fullmatch(
        r"delta-suite: Internal error while measuring first: ZeroDivisionError: of a kind that nobody foresaw "
        r"\(test_cli.py:\d+, in broken\); please report it\.",
        told,
    )
    assert "DELTA_SUITE_TRACEBACK=1 shows the whole traceback" in advice
    assert "Traceback" not in result.stderr
    assert [path.name for path in (tmp_path / "r" / "runs").iterdir()] == ["second"]

    def interrupted(spec: ModelSpec, *options: Any) -> Outcome:
        asked.append(spec.name)
        raise KeyboardInterrupt

    asked.clear()
    monkeypatch.setattr("delta_suite.pipeline.measure", interrupted)
    assert run(*arguments).exit_code != 0
    assert asked == ["first"]


def test_a_model_s_folder_of_records_is_told_from_a_results_folder(record: Path) -> None:
    result = run("judge", record.parent)
    assert result.exit_code == 1
    assert f"Name its records, {record.parent}/*.json." in result.stderr


def test_judge_needs_no_model(record: Path, tmp_path: Path) -> None:
    claims = tmp_path / "claims.toml"
    claims.write_text(
        'schema=1\nid="x"\ntitle="t"\nversion=1\nrationale="r"\n'
        '[[expect]]\nid="low"\nmetric="top1_energy"\nscope="C"\nop="<="\nthreshold=1.0\norigin="o"\n'
    )
    result = run("judge", record, "--hypotheses", claims)
    assert result.exit_code == 0, result.output
    assert re.search(r"\. low\s+(mean top1_energy over C <= 1\s+)?✓ PASS", result.output)
    claims.write_text(claims.read_text().replace("threshold=1.0", "threshold=0.0"))
    result = run("judge", record, "--hypotheses", claims, "--explain")
    assert result.exit_code == 1
    assert "x/low is refuted for tiny" in result.output
    assert f"stated at  {claims}:6" in result.output


def test_a_phase_that_no_model_and_no_record_has_is_an_error(record: Path, tmp_path: Path) -> None:
    claims = tmp_path / "claims.toml"
    claims.write_text(
        'schema=1\nid="x"\ntitle="t"\nversion=1\nrationale="r"\n'
        '[[expect]]\nid="low"\nmetric="top1_energy"\nscope="Q"\nop="<="\nthreshold=1.0\norigin="o"\n'
    )
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-2").mkdir()
    for command in (("judge", record), ("trajectory", f"{tmp_path}/checkpoint-*")):
        result = run(*command, "--hypotheses", claims)
        assert result.exit_code == 1
        assert re.fullmatch(
            r"delta-suite: \S*claims.toml:6: \[\[expect\]\] low: unknown phase 'Q': .*\n", result.stderr
        )
    content = json.loads(record.read_text())
    for key in ("phases", "scopes"):
        content[key] = {{"C": "Q"}.get(name, name): item for name, item in content[key].items()}
    for layer in content["layers"]:
        layer["phase"] = {"C": "Q"}.get(layer["phase"], layer["phase"])
    other = Path(shutil.copy(record.with_suffix(".safetensors"), tmp_path)).with_suffix(".json")
    other.write_text(json.dumps(content))
    result = run("judge", other, "--hypotheses", claims)
    assert result.exit_code == 0, result.output
    assert re.search(r"\. low\s+(mean top1_energy over Q <= 1\s+)?✓ PASS", result.output)


def test_judge_without_a_record_says_where_records_are() -> None:
    result = run("judge", "nowhere.json")
    assert result.exit_code == 1
    assert "results/runs" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(layers=record["layers"][:4]),
        lambda record: record.update(phases={"C": [2, 50]}, scopes={}),
    ],
)
def test_no_command_goes_on_with_a_record_that_is_not_whole(
    record: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    path = tmp_path / "results" / "runs" / "tiny" / "cut.json"
    path.parent.mkdir(parents=True)
    content = json.loads(record.read_text())
    change(content)
    path.write_text(json.dumps(content))
    for command in (("judge", path), ("compare", path, record), ("compare", record, path), ("card", "--record", path)):
        result = run(*command)
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert "cut.json is not a whole record: " in line
    assert "cut.json is not a whole record: " in run("leaderboard", "--results-dir", tmp_path / "results").stderr


def test_metrics_lists_all(tmp_path: Path) -> None:
    table = run("metrics").output
    listed = json.loads(run("metrics", "--json").output)
    assert [row["name"] for row in listed] == list(METRICS)
    assert all(name in table for name in METRICS)


def test_hypotheses_lists_each_claim_with_its_threshold_and_origin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = run("hypotheses")
    assert shipped.exit_code == 0, shipped.output
    assert "phase-c: Phase C: one broad shared subspace\n" in shipped.output
    claims = tmp_path / "hypotheses"
    claims.mkdir()
    (claims / "x.toml").write_text(
        'schema=1\nid="x"\ntitle="t"\nversion=3\nrationale="r"\n'
        '[[expect]]\nid="low"\nmetric="gamma"\nscope="C"\nop="<="\nthreshold=1.5\nseverity="warn"\norigin="a guess"\n'
    )
    listed = run("hypotheses")
    assert listed.output == (
        "x: t\n  version 3, hypotheses/x.toml\n"
        "  low (line 6): mean gamma over C <= 1.5; a refutation only warns\n      origin: a guess\n\n"
        "1 claim in 1 hypothesis file, without an error\n"
    )
    assert run("hypotheses", claims / "x.toml", "--check").output == "1 claim in 1 hypothesis file, without an error\n"


@pytest.mark.parametrize("options", [(), ("--check",)])
def test_hypotheses_shows_every_error_of_every_file(tmp_path: Path, options: tuple[str, ...]) -> None:
    head = 'schema=1\nid="x"\ntitle="t"\nversion=1\nrationale="r"\n'
    (tmp_path / "a.toml").write_text(f'{head}[[expect]]\nid="low"\nmetric="gama"\nscope="C"\nop="<="\norigin="o"\n')
    (tmp_path / "b.toml").symlink_to("nowhere")
    result = run("hypotheses", tmp_path, *options)
    assert result.exit_code == 1
    assert not result.stdout
    assert re.search(r"a.toml:8: unknown metric 'gama'", result.stderr)
    assert re.search(r"b.toml: cannot be read: No such file", result.stderr)
    (tmp_path / "b.toml").unlink()
    (tmp_path / "a.toml").write_text(
        f'{head}[[expect]]\nid="low"\nmetric="gamma"\nscope="Q"\nop="<="\nthreshold=1\norigin="o"\n'
    )
    assert re.search(r"a.toml:6: \[\[expect\]\] low: unknown phase 'Q'", run("hypotheses", tmp_path, *options).stderr)


def test_models_tells_what_is_here_and_why_not(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "models.toml").write_text(
        '[models.gone]\npackage="absent"\ngguf="x.gguf"\n'
        f'[models.tiny]\npath={str(tiny)!r}\nlicence="CC-BY-4.0"\n'
        '[models.cut]\npackage="absent_part"\nparts=2\ngguf="x.gguf"\n'
    )
    lines = run("models", "--models-file", tmp_path / "models.toml").output.splitlines()
    gone, here, cut = (next(line for line in lines if line.startswith(name)) for name in ("gone", "tiny", "cut"))
    assert gone.split()[1] == "no"
    assert "pip install" in gone
    assert here.split()[1] == "yes"
    assert "CC-BY-4.0" in here
    assert "pip install --no-deps absent-part{1..2} (in bash or zsh)" in cut


def test_doctor_names_versions_device_and_cache(own_cache: Path) -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for word in ("torch", "transformers", "devices", "cpu", str(own_cache)):
        assert word in result.output


def test_unknown_calibration_is_one_clear_error(tiny: Path, tmp_path: Path) -> None:
    result = run("measure", tiny, "--calibration", "seeds", "--results-dir", tmp_path)
    assert result.exit_code == 1
    assert "seeds" in result.stderr
    assert "Traceback" not in result.output


def test_a_misspelt_calibration_is_refused_before_another_is_measured(tiny: Path, tmp_path: Path) -> None:
    result = run("measure", tiny, "--calibration", "seed", "--calibration", "cor", "--results-dir", tmp_path / "r")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "no calibration 'cor'" in result.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("command", ["measure", "compare", "trajectory", "selftest"])
def test_what_cannot_be_written_is_told_before_anything_is_measured(
    command: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pipeline.measure_all", "selftest.proof.selftest"):
        monkeypatch.setattr(f"delta_suite.{name}", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    for step in (1, 2):
        shutil.copytree(tiny, tmp_path / f"x-{step}")
    words: list[object] = ["--results-dir", tmp_path / "file"]
    arguments = {
        "measure": [tiny, *words],
        "compare": [tiny, tmp_path / "x-1", *words],
        "trajectory": [tmp_path / "x-*", "--out", tmp_path],
        "selftest": ["--out", tmp_path],
    }
    result = run(command, *arguments[command])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert re.search(r"cannot be written: (Not|Is) a directory\. Choose another folder or free space\.", result.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "x-1", "x-2"]


def test_a_results_folder_that_is_not_there_yet_is_not_made_to_see_whether_it_can_be(tmp_path: Path) -> None:
    require_writable(tmp_path / "results" / "runs")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *(("measure", option) for option in ("--calibration", "--device", "--dtype", "--results-dir", "--models-file")),
        ("trajectory", "--out"),
        ("judge", "--hypotheses"),
        ("card", "--model"),
    ],
)
def test_an_option_that_a_shell_left_empty_is_an_error(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, option: str
) -> None:
    """As a path it would be the current folder, which has something to read here."""
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("not meant to be measured on, and long enough that it could be")
    for words in ([option, ""], [f"{option}="]):
        result = run(command, tiny, *words)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"delta-suite: {option} is empty: is a shell variable not set?")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_argument_is_an_error(tiny: Path) -> None:
    result = run("measure", tiny, "")
    assert result.exit_code == 2
    assert result.stderr.startswith("delta-suite: an argument is empty")


def test_compare_prints_two_side_by_side(
    record: Path, tiny: Path, copied_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTA_SUITE_CACHE", str(copied_cache.root))
    result = run("compare", record, tiny, "--documents", DOCUMENTS, "--results-dir", tmp_path, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert re.search(r"C +intra_cosine +(\S+) +\1 +0\.000", result.output)
    assert "paired by document" in result.output
    assert "≠" not in re.findall(r"^C .*$", result.output, re.MULTILINE)[0]


def test_trajectory_writes_a_page_that_needs_nothing_else(tiny: Path, tmp_path: Path) -> None:
    from tests.tiny import make_tiny

    for step in (5, 20):
        make_tiny(tmp_path / "run" / f"checkpoint-{step}", layers=4, hidden=32, seed=step)
    claims = tmp_path / "claims.toml"
    claims.write_text(
        'schema=1\nid="x"\ntitle="t"\nversion=1\nrationale="r"\n'
        '[[expect]]\nid="low"\nmetric="top1_energy"\nscope="C"\nop="<="\nthreshold=1.0\norigin="o"\n'
    )
    page = tmp_path / "run.html"
    pattern = f"{tmp_path}/run/checkpoint-*"
    common = ("--documents", 8, "--device", "cpu", "--results-dir", tmp_path, "--hypotheses", claims)
    result = run("trajectory", pattern, "--out", page, *common)
    assert result.exit_code == 0, result.output
    assert re.search(r"x/low +\S ([A-Z]+) \S+ +\S [A-Z]+ ", result.output)
    text = page.read_text()
    assert "<option>effective_rank</option>" in text
    assert "x/low" in text
    for reference in ('<script src="', '<link rel="stylesheet"', 'href="..'):
        assert reference not in text
    (tmp_path / "run" / "checkpoint-10").mkdir()
    page.unlink()
    holed = run("trajectory", pattern, "--out", page, *common)
    assert holed.exit_code == 1
    assert re.search(r"^delta-suite: \S*checkpoint-10 cannot be measured: .* has no config.json", holed.stderr)
    assert re.search(r"^delta-suite: the page is without \S*checkpoint-10, which cannot", holed.stderr, re.MULTILINE)
    assert re.search(r"x/low +\S ([A-Z]+) \S+ +- +\S [A-Z]+ ", holed.output)
    assert page.read_text() == text
    alone = run("trajectory", tmp_path / "run" / "checkpoint-5", *common)
    assert alone.exit_code == 1
    assert "a trajectory is of several checkpoints of one run" in alone.stderr
    for step in (5, 20):
        (tmp_path / "run" / f"checkpoint-{step}" / "config.json").unlink()
    none = run("trajectory", pattern, "--out", tmp_path / "none.html", *common)
    assert none.exit_code == 1
    assert "no checkpoint of " in none.stderr
    assert not (tmp_path / "none.html").exists()


def test_no_models_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models_file, "bundled", Path)
    result = run("models")
    assert result.exit_code == 0
    assert "There is no models file. A directory or a hub id (org/name) can be given" in result.output
    assert re.search(r"^models +there is no models file$", run("doctor").output, re.MULTILINE)
