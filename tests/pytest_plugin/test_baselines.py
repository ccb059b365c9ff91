"""Baselines from the user's side, on the tiny model of the other tests: options, items, what is written and refused."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from delta_suite.errors import RecordError
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Outcome, Settings, measure
from delta_suite.records.arrays import pack, unpack
from delta_suite.regression.update import update_baseline
from filelock import FileLock

from tests.pytest_plugin.test_plugin import count_loads
from tests.tiny import DOCUMENTS, make_tiny

RUN = (
    "hypotheses/",
    f"--documents={DOCUMENTS}",
    "--device=cpu",
    "--no-control",
    "-p",
    "no:cacheprovider",
    "--model=tiny",
)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test puts the baseline that it has written, for the others."""
    return tmp_path_factory.mktemp("baselines")


@pytest.fixture
def baseline(project: pytest.Pytester, written: Path) -> Path:
    """A baseline of the tiny model, written as a user does."""
    folder = project.path / "results" / "baselines"
    if not any(written.iterdir()):
        project.runpytest(*RUN, "--baseline-update", "-q")
        shutil.copytree(folder, written, dirs_exist_ok=True)
    shutil.copytree(written, folder, dirs_exist_ok=True)
    return folder / "tiny.json"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def of_two_records(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the record of a baseline, and say that figures of another checkpoint were added to it."""
    content = json.loads(path.read_text())
    change(content["record"])
    content["history"].append({"date": "", "action": "added", "reason": "a test", "source": ""})
    path.write_text(json.dumps(content))


def set_value(estimate: dict[str, Any], value: float) -> None:
    """Set the value of a figure of a phase, and of each of its layers."""
    estimate |= {"value": value, "per_layer": dict.fromkeys(estimate["per_layer"], value)}


def test_an_unchanged_model_is_the_same(project: pytest.Pytester, baseline: Path) -> None:
    content = json.loads(baseline.read_text())
    assert set(content["verdicts"]) == {"claims/holds", "claims/fails", "claims/no-such-phase"}
    assert content["verdicts"]["claims/no-such-phase"]["verdict"] == "NOT MEASURED"
    assert [change["action"] for change in content["history"]] == ["created"]
    assert baseline.with_suffix(".safetensors").stat().st_size < 25_000  # 12 layers x 8 x 48 x 2 bytes x 2 variants
    result = project.runpytest(*RUN, "-m", "baseline", "--baseline", "--junit-xml=junit.xml")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*- baselines -*", "tiny *results/baselines/tiny.json * -"])
    cases = {case.get("name"): case for case in ET.parse(project.path / "junit.xml").iter("testcase")}
    properties = {p.get("name"): p.get("value") for p in cases["C/intra_cosine[tiny]"].iter("property")}
    assert properties["status"] == "same"
    assert properties["baseline"] == "results/baselines/tiny.json"
    assert {"record[tiny]", "layers/gamma[tiny]", "layers/direction_turn[tiny]", "model/intra_cosine[tiny]"} <= set(
        cases
    )
    assert "verdict/claims/fails[tiny]" in cases


def test_items_are_chosen_by_name_and_by_node(project: pytest.Pytester, baseline: Path) -> None:
    assert project.runpytest(*RUN, "--baseline", "-k", "C/intra_cosine[").parseoutcomes()["passed"] == 1
    node = "results/baselines/tiny.json::C/intra_cosine[tiny]"
    project.runpytest(node, *RUN[1:], "--baseline").assert_outcomes(passed=1)


def test_a_baseline_that_an_option_names_is_enough(project: pytest.Pytester, baseline: Path) -> None:
    result = project.runpytest(*RUN[1:], f"--baseline={baseline}", "--collect-only", "-q")
    result.stdout.fnmatch_lines(["results/baselines/tiny.json::C/intra_cosine[[]tiny[]]"])
    assert result.ret == 0


def test_a_changed_figure_fails_with_its_layer(project: pytest.Pytester, baseline: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        record["layers"][5]["metrics"]["raw"]["effective_rank"]["value"] += 2

    of_two_records(baseline, change)
    result = project.runpytest(*RUN, "--baseline", "-m", "baseline")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "layers/effective_rank of tiny: drift",
            "  baseline   results/baselines/tiny.json, tiny of *",
            "  layer 5 *effective_rank *raw * -2.000 *",
            "  first at   layer 5: the layers before it are the same",
            "  reproduce  pytest 'results/baselines/tiny.json::layers/effective_rank[[]tiny[]]' --model=tiny "
            f"--documents={DOCUMENTS} --device=cpu --baseline=results/baselines/tiny.json --no-control",
        ]
    )
    edit(baseline, tolerances={"effective_rank": 2.5})
    assert project.runpytest(*RUN, "--baseline", "-m", "baseline").ret == 0
    edit(baseline, tolerances={}, xfail={"layers/effective_*": "known: the optimiser changed", "C/intra_cosin": ""})
    result = project.runpytest(*RUN, "--baseline", "-m", "baseline", "-rx")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "*xfail 'C/intra_cosin' matches no item: did you mean 'C/intra_cosine'?",
            "XFAIL *layers/effective_rank*known: the optimiser changed*",
        ]
    )


def test_verdicts_that_changed_are_flips(project: pytest.Pytester, baseline: Path) -> None:
    content = json.loads(baseline.read_text())
    gone = {"verdict": "PASS", "observed": 1.0, "claim": "a claim", "file": "hypotheses/claims.toml"}
    content["verdicts"]["claims/fails"]["verdict"] = "PASS"
    content["verdicts"]["claims/holds"]["claim"] = "mean top1_energy over C >= 0.2, raw"
    content["verdicts"]["claims/was-there"] = gone
    content["verdicts"].pop("claims/no-such-phase")
    edit(baseline, **content)
    result = project.runpytest(*RUN, "--baseline", "-k", "verdict/", "-v")
    # Inside another pytest the suite is imported already, which pytest warns of, or not, as the tests before it went.
    outcomes = {key: n for key, n in result.parseoutcomes().items() if key not in {"deselected", "warnings"}}
    assert outcomes == {"failed": 3, "new": 1}
    result.stdout.fnmatch_lines(
        [
            "*verdict/claims/no-such-phase[[]tiny[]] NEW*",
            "  reason     the claim was `*top1_energy over C >= 0.2, raw` and is `*top1_energy over C >= 0, raw`",
            "verdict/claims/fails of tiny: flip",
            "  reason     PASS -> FAIL",
            "verdict/claims/was-there of tiny: gone",
            "*hypotheses/claims.toml does not state it any more; it was PASS",
        ]
    )


def test_what_cannot_be_compared_fails(project: pytest.Pytester, baseline: Path) -> None:
    content = json.loads(baseline.read_text())
    content["record"]["calibration"] |= {"name": "docs", "sha256": "0" * 64}
    edit(baseline, **content)
    result = project.runpytest(*RUN, "--baseline", "-m", "baseline")
    assert result.ret == 1
    assert "passed" not in result.parseoutcomes()
    result.stdout.fnmatch_lines(
        ["* of tiny: not comparable", "  reason     the calibration is another: docs (50 documents, 00000000) there*"]
    )


def test_without_directions_their_turning_is_not_measured(project: pytest.Pytester, baseline: Path) -> None:
    baseline.with_suffix(".safetensors").unlink()
    result = project.runpytest(*RUN, "--baseline", "-k", "turn", "-v")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*layers/direction_turn[[]tiny[]] NOT MEASURED*"])
    result = project.runpytest(*RUN, "--baseline-update", "-q")
    result.stdout.fnmatch_lines(["*tiny.json: added directions"])


def test_update_writes_only_what_is_new(project: pytest.Pytester, baseline: Path) -> None:
    before = json.loads(baseline.read_text())

    def change(record: dict[str, Any]) -> None:
        for metrics in record["scopes"]["C"]["metrics"].values():
            metrics.pop("intra_cosine")
            set_value(metrics["cross_cosine"], 0.9)

    of_two_records(baseline, change)
    verdicts = json.loads(baseline.read_text())["verdicts"]
    verdicts.pop("claims/holds")
    edit(baseline, verdicts=verdicts)
    result = project.runpytest(*RUN, "--baseline-update", "-q")
    result.stdout.fnmatch_lines(["*tiny.json: added C/intra_cosine, claims/holds"])
    after = json.loads(baseline.read_text())
    assert (
        after["record"]["scopes"]["C"]["metrics"]["raw"]["intra_cosine"]
        == (before["record"]["scopes"]["C"]["metrics"]["raw"]["intra_cosine"])
    )
    assert after["record"]["scopes"]["C"]["metrics"]["raw"]["cross_cosine"]["value"] == 0.9
    assert after["history"][-1]["entries"] == ["C/intra_cosine", "claims/holds"]
    result = project.runpytest(*RUN, "--baseline-update", "-q")
    result.stdout.fnmatch_lines(["*tiny.json: nothing new, left as it was"])


def test_overwriting_needs_a_reason_that_is_kept(project: pytest.Pytester, baseline: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        record["model"]["fingerprint"] = "e" * 64
        set_value(record["scopes"]["C"]["metrics"]["raw"]["intra_cosine"], 0.9)

    of_two_records(baseline, change)
    edit(baseline, tolerances={"gamma": 3.0})
    other = baseline.with_name("other.json")
    other.write_text("another model's")
    refused = project.runpytest(*RUN, "--baseline-update=all")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["*--baseline-reason*"])
    result = project.runpytest(*RUN, "--baseline-update=all", "--baseline-reason=new data mix", "-m", "baseline")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*1 accepted*"])
    after = json.loads(baseline.read_text())
    assert after["record"]["scopes"]["C"]["metrics"]["raw"]["intra_cosine"]["value"] < 0.5
    assert after["tolerances"] == {"gamma": 3.0}
    assert after["history"][-1] | {"date": "", "source": ""} == {
        "date": "",
        "action": "overwritten",
        "reason": "new data mix",
        "source": "",
        "before": "e" * 64,
        "entries": [],
    }
    assert other.read_text() == "another model's"


def test_a_full_disk_leaves_all_files_as_they_were(
    outcome: tuple[Outcome, Settings], tmp_path: Path, largest_file: Callable[[int], None]
) -> None:
    measurement = outcome[0].view
    path = tmp_path / "baselines" / "tiny.json"
    update_baseline(path, measurement, {})
    files = {file.name: file.stat() for file in path.parent.iterdir()}
    sizes = sorted(file.st_size for file in files.values())
    assert sizes[1] < 0.9 * sizes[2]
    largest_file((sizes[1] + sizes[2]) // 2)  # room for all but the largest
    with pytest.raises(RecordError, match=r"cannot be written"):
        update_baseline(path, measurement, {}, overwrite=True, reason="meant")
    assert {file.name: file.stat().st_ino for file in path.parent.iterdir()} == {
        name: file.st_ino for name, file in files.items()
    }
    shutil.rmtree(path.parent)
    with pytest.raises(RecordError, match=r"cannot be written"):
        update_baseline(path, measurement, {})
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "telling"),
    [
        (lambda arrays: b"garbage", "*is not a readable safetensors file: *"),
        (lambda arrays: pack(arrays)[:-100], "*is not a readable safetensors file: *"),
        (lambda arrays: pack({name: array[:3] for name, array in arrays.items()}), "*(3*of a model of 12 layers x 48*"),
    ],
)
def test_damaged_directions_are_one_error_before_anything_runs(
    project: pytest.Pytester,
    baseline: Path,
    damage: Callable[[dict[str, np.ndarray]], bytes],
    telling: str,
) -> None:
    """Told by the SHA-256, and in a baseline without one as far as can be told."""
    beside = baseline.with_suffix(".safetensors")
    beside.write_bytes(damage(unpack(beside.read_bytes(), beside)))
    for telling_now in ("*its SHA-256 is another.", telling):
        result = project.runpytest(*RUN, "--baseline")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(
            [f"ERROR: *tiny.safetensors is not what was written with *tiny.json: {telling_now}", "*or remove *"]
        )
        edit(baseline, directions_sha256=None)
    beside.unlink()  # as the error says
    project.runpytest(*RUN, "--baseline-update", "-q").stdout.fnmatch_lines(["*tiny.json: added directions"])


def test_directions_of_another_baseline_are_not_compared(project: pytest.Pytester, baseline: Path) -> None:
    from safetensors.numpy import load_file, save_file

    beside = baseline.with_suffix(".safetensors")
    turned = {name: -array if name.endswith(".directions") else array for name, array in load_file(beside).items()}
    save_file(turned, beside)
    result = project.runpytest(*RUN, "--baseline")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *tiny.safetensors is not what was written with *: its SHA-256 is another."])
    content = json.loads(baseline.read_text())
    del content["directions_sha256"]  # as in baselines older than this field
    baseline.write_text(json.dumps(content))
    assert project.runpytest(*RUN, "--baseline", "-k", "turn").parseoutcomes()["passed"] == 2


def test_a_model_of_another_shape_never_overwrites(project: pytest.Pytester, baseline: Path, tmp_path: Path) -> None:
    other = make_tiny(tmp_path / "wide", layers=3, hidden=32)
    before = baseline.read_bytes()
    arguments = (
        "hypotheses/",
        "--documents=8",
        "--device=cpu",
        "--no-control",
        f"--model={other}",
        f"--baseline={baseline}",
    )
    result = project.runpytest(*arguments, "--baseline-update=all", "--baseline-reason=wrong path", "-q")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["not written: *is about another model, tiny (*12 layers x 48)*"])
    assert baseline.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "telling"),
    [
        (["--baseline"], "no baseline results/baselines/tiny.json: results/baselines holds no baseline*"),
        (["--baseline=other/big.json"], "no baseline other/big.json: *"),
        (["--baseline", "hypotheses/"], "*that folder holds tests, not baselines*"),
        (["--baseline=b[1]/x.json", "--baseline-update"], "--baseline b*: pytest collects no path with a bracket*"),
        (["--baseline-reason=why"], "*--baseline-reason is for --baseline-update=all"),
        (["--baseline", "--baseline-reason=why"], "*--baseline-reason is for --baseline-update=all"),
        (["--model=twin", "--baseline=x.json", "--baseline-update"], "*tiny and twin would both be written to x.json*"),
    ],
)
def test_options_that_do_not_work_are_usage_errors(project: pytest.Pytester, options: list[str], telling: str) -> None:
    result = project.runpytest("hypotheses/", "--model=tiny", *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {telling}"])


def test_a_damaged_or_misspelt_baseline_is_a_usage_error(project: pytest.Pytester, baseline: Path) -> None:
    edit(baseline, tolerances={"effective_rnak": 1.0})
    result = project.runpytest(*RUN, "--baseline")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*tolerances for what does not exist: effective_rnak"])
    edit(baseline, tolerances={}, tolerance={"gamma": 1.0})
    project.runpytest(*RUN, "--baseline").stderr.fnmatch_lines(["*is not a baseline of schema 2:", "*at tolerance:*"])
    baseline.write_text(baseline.read_text()[:200])
    project.runpytest(*RUN, "--baseline").stderr.fnmatch_lines(["*is not a baseline of schema 2:*"])
    baseline.write_text("{}", "utf-16")
    project.runpytest(*RUN, "--baseline").stderr.fnmatch_lines(["*tiny.json cannot be read: it is UTF-16*"])


def test_a_damaged_baseline_is_only_written_anew_once_it_is_removed(project: pytest.Pytester, baseline: Path) -> None:
    baseline.write_text(baseline.read_text()[:3000])
    before = {file.name: file.read_bytes() for file in baseline.parent.iterdir()}
    refused = project.runpytest(*RUN, "--baseline-update=all", "--baseline-reason=it is cut")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["*or remove it, *, and write it anew: --baseline-update --baseline-reason *"])
    assert {file.name: file.read_bytes() for file in baseline.parent.iterdir()} == before
    baseline.unlink()
    project.runpytest(*RUN, "--baseline-update", "--baseline-reason=it was cut", "-q")
    (change,) = json.loads(baseline.read_text())["history"]
    assert (change["action"], change["reason"]) == ("created", "it was cut")
    assert project.runpytest(*RUN, "--baseline", "-m", "baseline").ret == 0


@pytest.mark.long
def test_workers_compare_and_one_process_writes(
    project: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xdist")
    monkeypatch.setenv("DELTA_SUITE_CACHE", str(tmp_path / "empty"))
    other = make_tiny(tmp_path / "other", layers=6, seed=1)
    with (project.path / "models.toml").open("a") as file:
        file.write(f"[models.other]\npath = {str(other)!r}\n")
    log = count_loads(project)
    both = (*RUN, "--model=other", "--documents=8", "-n", "2", "-q")
    project.runpytest_subprocess(*both, "--baseline-update")
    assert sorted(path.name for path in (project.path / "results" / "baselines").glob("*.json")) == [
        "other.json",
        "tiny.json",
    ]
    result = project.runpytest_subprocess(*both, "--baseline", "-m", "baseline")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["tiny *results/baselines/tiny.json*", "other *results/baselines/other.json*"])
    assert sorted(log.read_text().split()) == ["other", "tiny"]


# --- an update of a selection ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def other(shared: Path, outcome: tuple[Outcome, Settings]) -> Path:
    """Another model of the tiny one's shape, whose spectra are in the same cache: they are what the claims need."""
    folder = shared / "other"
    with FileLock(shared / "other.lock"):
        if not (folder / "model.safetensors").exists():
            make_tiny(folder, seed=7)
    measure(ModelSpec(name="other", path=folder), replace(outcome[1], parts=frozenset({"spectra"})))
    return folder


UPDATE = (
    f"--documents={DOCUMENTS}",
    "--device=cpu",
    "--no-control",
    "-p",
    "no:cacheprovider",
    "--baseline-update=all",
    "--baseline-reason=meant",
)
NODE = "hypotheses/claims.toml::claims/holds"
KEPT = ("layers/gamma", "model/intra_cosine")
"""Items that are not selected: one, and one that the whole record decides, which cannot be overwritten alone."""


@pytest.mark.parametrize(
    ("options", "figures", "verdicts"),
    [
        (["hypotheses/", "-k", "C/intra_cosine["], {"C/intra_cosine"}, set()),
        (["hypotheses/", "-k", "C/intra_cosine[", "-n", "2"], {"C/intra_cosine"}, set()),
        (["hypotheses/", "-m", "tiny-claims"], set(), {"claims/holds", "claims/fails", "claims/no-such-phase"}),
        ([f"{NODE}[other]"], set(), {"claims/holds"}),
        (["{baseline}::D/intra_cosine[other]", f"{NODE}[other]"], {"D/intra_cosine"}, {"claims/holds"}),
        (["hypotheses/", "-m", "baseline", *(f"--deselect={{baseline}}::{item}[other]" for item in KEPT)], None, None),
        (["hypotheses/", "-k", "nothing-of-this-name"], set(), set()),
    ],
    ids=["-k", "-n", "-m", "node of a claim", "nodes", "--deselect", "nothing"],
)
def test_an_update_touches_only_what_was_selected(
    project: pytest.Pytester,
    baseline: Path,
    other: Path,
    options: list[str],
    figures: set[str] | None,
    verdicts: set[str] | None,
) -> None:
    with (project.path / "models.toml").open("a") as file:
        file.write(f"[models.other]\npath = {str(other)!r}\n")
    old = "former"
    content = json.loads(baseline.read_text())
    for entry in content["verdicts"].values():
        entry["claim"] = old
    edit(baseline, **content)
    words = [word.format(baseline="results/baselines/tiny.json") for word in options]
    run = project.runpytest_subprocess if "-n" in options else project.runpytest
    result = run(*words, *UPDATE, "--model=other", f"--baseline={baseline}", "-q")
    said = " ".join(result.stdout.str().split())  # lines are wrapped
    after = json.loads(baseline.read_text())
    changed = {
        f"{scope}/{metric}"
        for scope, held in content["record"]["scopes"].items()
        for metric, estimate in held["metrics"]["raw"].items()
        if estimate != after["record"]["scopes"][scope]["metrics"]["raw"][metric]
    }
    layers = [[layer["metrics"]["raw"]["gamma"] for layer in side["record"]["layers"]] for side in (content, after)]
    assert layers[0] == layers[1]
    judged = {name for name, entry in after["verdicts"].items() if entry["claim"] != old}
    if figures is None:  # all but two, which stay; figures of the model have intervals, and those of both agree
        assert "2 other items were not selected, and stayed as they were" in said
        assert len(changed) > 10
        return
    assert (changed, judged) == (figures, verdicts)
    told = "stayed as they were" if changed or judged else "nothing of .* was selected, so nothing was written"
    assert re.search(f"tiny.json: .*{told}", said)
    assert len(after["history"]) == 1 + bool(changed or judged)


def test_a_first_baseline_has_the_verdicts_that_were_selected(project: pytest.Pytester) -> None:
    path = project.path / "results" / "baselines" / "tiny.json"
    result = project.runpytest(*RUN, "--baseline-update", "-q", "-k", "nothing-of-this-name")
    result.stdout.fnmatch_lines(["*tiny.json: nothing of tiny was selected, so nothing was written"])
    assert not path.exists()
    result = project.runpytest(*RUN, "--baseline-update", "-q", "-k", "holds")
    result.stdout.fnmatch_lines(["*tiny.json: created *figures and 1 verdicts; other verdicts were not selected*"])
    assert set(json.loads(path.read_text())["verdicts"]) == {"claims/holds"}


def test_comparing_imports_no_torch(project: pytest.Pytester, baseline: Path) -> None:
    project.makeconftest(
        "import sys\n"
        "def pytest_unconfigure():\n"
        "    print('heavy:', [name for name in ('torch', 'transformers', 'plotly') if name in sys.modules])\n"
    )
    result = project.runpytest_subprocess(*RUN, "--baseline", "-q", "-s")
    result.stdout.fnmatch_lines(["heavy: []"])
