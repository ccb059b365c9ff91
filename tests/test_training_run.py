"""Regression of checkpoints, proved on a real training run: a small Llama, trained on text, saved and damaged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Settings, measure
from delta_suite.records.cache import Cache
from delta_suite.records.view import RecordView
from delta_suite.regression.baseline import load_baseline
from delta_suite.regression.comparison import Comparison, Status, compare_figures, first_changed_layer
from delta_suite.regression.turns import compare_turns, direction_figures
from delta_suite.regression.update import update_baseline
from delta_suite.selftest.report import wilson
from filelock import FileLock

from tests.tiny_claims import CLAIMS
from tests.training import TRAINED_ON, damaged, passages, scale_output_projection, train, write_documents, zero_head

STEPS = (80, 160, 240)
DOCUMENTS = 30


@dataclass(frozen=True)
class Run:
    """The folder of the run, its cache, and the passages it was not trained on."""

    folder: Path
    cache: Path
    documents: Path
    held_out: tuple[str, ...]

    def measured(self, name: str, documents: Path | None = None) -> RecordView:
        settings = Settings(
            calibration=str(documents or self.documents),
            device="cpu",
            results=self.folder / "results",
            cache=Cache(self.cache),
        )
        return measure(ModelSpec(name=name, path=self.folder / name), settings).view

    def compared(self, old: str, new: str) -> list[Comparison]:
        return compare(self.measured(old), self.measured(new))


def compare(old: RecordView, new: RecordView, **options: bool) -> list[Comparison]:
    """Compare the figures and the directions of two records."""
    directions = direction_figures(old), direction_figures(new)
    return compare_figures(old, new, **options) + compare_turns(old, new, directions, **options)


@pytest.fixture(scope="module")
def run(shared: Path) -> Run:
    """The run, which one worker trains and the others read."""
    folder = shared / "training-run"
    texts = passages()
    held_out = texts[TRAINED_ON:]
    documents = folder / "documents.jsonl"
    with FileLock(shared / "training-run.lock"):
        if not documents.exists():
            *_, last = train(folder, steps=STEPS, texts=texts[:TRAINED_ON])
            damaged(last, folder / "scaled", scale_output_projection(3))
            damaged(last, folder / "headless", zero_head(2))
            write_documents(documents, held_out[:DOCUMENTS])
    return Run(folder, folder / "cache", documents, tuple(held_out[DOCUMENTS:]))


def test_it_learns(run: Run) -> None:
    losses = [json.loads((run.folder / f"checkpoint-{step}" / "loss.json").read_text())["loss"] for step in STEPS]
    assert losses[0] > losses[2]  # each is of one batch: another processor orders the middle one otherwise
    assert losses[2] < 4.5  # ln 512 = 6.2 is the loss of a model that knows nothing


def test_an_unchanged_checkpoint_is_the_same(run: Run) -> None:
    """Also where it is measured again, not taken from the cache."""
    first = run.measured("checkpoint-240")
    again = Run(run.folder, run.folder / "other-cache", run.documents, run.held_out).measured("checkpoint-240")
    compared = compare(first, again)
    assert {own.status for own in compared} == {Status.SAME}


def test_a_later_checkpoint_drifts(run: Run) -> None:
    compared = run.compared("checkpoint-160", "checkpoint-240")
    drifted = [own for own in compared if own.fails]
    assert len(drifted) > 0.3 * len(compared)
    assert {"effective_rank", "update_norm", "direction_turn"} <= {own.metric for own in drifted}
    assert first_changed_layer(compared) == 0


@pytest.mark.parametrize(("name", "layer"), [("scaled", 3), ("headless", 2)])
def test_damage_is_caught_and_its_layer_named(run: Run, name: str, layer: int) -> None:
    compared = run.compared("checkpoint-240", name)
    assert first_changed_layer(compared) == layer
    before = [own for own in compared if own.layer is not None and own.layer < layer]
    assert before
    assert {own.status for own in before} == {Status.SAME}


@pytest.mark.long
def test_other_documents_raise_no_alarm(run: Run) -> None:
    """20 repeats, an unchanged checkpoint on other passages of the same text: no more alarms than one in twenty gives.

    Another processor trains another model, so the count differs; the rate that was measured is 3 in 120.
    """
    old = run.measured("checkpoint-240")
    alarms = 0
    for repeat in range(20):
        own = run.held_out[repeat * DOCUMENTS : (repeat + 1) * DOCUMENTS]
        assert len(own) == DOCUMENTS
        new = run.measured("checkpoint-240", write_documents(run.folder / f"other-{repeat}.jsonl", own))
        compared = compare(old, new, other_documents=True)
        assert sum(one.status is Status.NOT_MEASURED for one in compared) < 0.05 * len(compared)
        alarms += any(one.fails for one in compared)
    assert wilson(alarms, 20)[0] <= 0.05


def test_other_documents_still_show_a_large_damage(run: Run) -> None:
    old = run.measured("checkpoint-240")
    documents = write_documents(run.folder / "others.jsonl", run.held_out[:DOCUMENTS])
    new = run.measured("scaled", documents)
    compared = compare(old, new, other_documents=True)
    assert first_changed_layer(compared) == 3


@pytest.fixture
def project(pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """What a training team has: claims, and a run somewhere else."""
    monkeypatch.setenv("DELTA_SUITE_CACHE", str(run.cache))
    monkeypatch.setenv("COLUMNS", "250")  # so that what a test looks for stands on one line
    (pytester.path / "hypotheses").mkdir()
    (pytester.path / "hypotheses" / "claims.toml").write_text(CLAIMS)
    (pytester.path / "models.toml").write_text("[models]\n")
    return pytester


def test_a_nightly_run(project: pytest.Pytester, run: Run) -> None:
    """What a training team types: a baseline once, and then each checkpoint against it."""
    nightly = ("hypotheses/", "--device=cpu", f"--calibration={run.documents}", "--baseline=baselines/small.json")
    project.runpytest(*nightly, f"--model={run.folder}/checkpoint-240", "--baseline-update", "-q")
    same = project.runpytest(*nightly, f"--model={run.folder}/checkpoint-240", "-m", "baseline")
    assert same.ret == 0
    broken = project.runpytest(*nightly, f"--model={run.folder}/headless", "-m", "baseline")
    assert broken.ret == 1
    broken.stdout.fnmatch_lines(
        [
            "layers/effective_rank_roy of *headless: drift",
            "  layer 2 *effective_rank_roy *raw *",
            "  first at   layer 2: the layers before it are the same",
            "  tolerance  the interval of the difference, paired by document, *",
            "*headless *baselines/small.json * 2",
        ]
    )


def test_a_trajectory_is_measured_in_order(project: pytest.Pytester, run: Run) -> None:
    pattern = f"--model={run.folder}/checkpoint-*"
    result = project.runpytest("hypotheses/", "--device=cpu", f"--calibration={run.documents}", pattern)
    result.stdout.fnmatch_lines(
        [
            "*checkpoint-[*]: over training*",
            "expectation * step 80 * step 160 * step 240",
            "claims/no-such-phase * NOT MEASURED * NOT MEASURED * NOT MEASURED*",
            "metric, phase * step 80 * step 160 * step 240",
            "intra C *",
        ]
    )


def test_a_baseline_keeps_what_a_comparison_needs(run: Run, tmp_path: Path) -> None:
    """Figures rounded to 9 digits and directions to float16 are as good as the measurement itself."""
    settings = Settings(
        calibration=str(run.documents), device="cpu", results=tmp_path / "results", cache=Cache(run.cache)
    )
    old = measure(ModelSpec(name="small", path=run.folder / "checkpoint-240"), settings).view
    path = tmp_path / "small.json"
    update_baseline(path, old, {})
    kept = load_baseline(path)
    assert {own.status for own in kept.compare(old, direction_figures(old))} == {Status.SAME}
    new = run.measured("headless")
    direct = compare(old, new)
    through = kept.compare(new, direction_figures(new))
    assert [own.status for own in through] == [own.status for own in direct]
