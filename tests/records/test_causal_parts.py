"""The parts `causal` and `damage` in records, caches, verdicts and tables, and models that have no loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from delta_suite import pipeline
from delta_suite.claims.judge import judge_claim, parts_of_claims
from delta_suite.claims.loader import load_hypothesis
from delta_suite.claims.observe import observe
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.registry import METRICS, OF_LOSSES
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Measured, Settings, measure_view
from delta_suite.publish.model_tables import losses_tables
from delta_suite.records.cache import Cache
from delta_suite.records.figures import figures
from delta_suite.records.format import from_json, to_json
from delta_suite.records.record import Record
from delta_suite.records.verify import problems
from delta_suite.records.view import RecordView

from tests.training import passages, write_documents

DOCUMENTS = 20
CAUSES = [name for name, metric in METRICS.items() if metric.takes == "causes"]
DAMAGE = [name for name, metric in METRICS.items() if metric.takes == "damage"]
PHASES = {"A": (0, 0), "C": (1, 3), "E": (4, 5)}


@dataclass(frozen=True)
class Run:
    """A small trained model, measured first without its losses and then with them."""

    folder: Path
    texts: Path
    cache: Cache
    without: RecordView
    view: RecordView

    def again(self, *parts: str, phases: dict[str, tuple[int, int]] = PHASES) -> Measured:
        return measured(self.folder, self.texts, self.cache, *parts, phases=phases)


def measured(
    folder: Path, texts: Path, cache: Cache, *parts: str, phases: dict[str, tuple[int, int]] = PHASES
) -> Measured:
    settings = Settings(
        calibration=str(texts), device="cpu", dtype="float32", cache=cache, parts=frozenset({"spectra", *parts})
    )
    return measure_view(ModelSpec(name="small", path=folder, phases=phases), settings)


@pytest.fixture(scope="module")
def run(trained_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("losses")
    checkpoint = trained_checkpoints / "checkpoint-30"
    held_out = write_documents(folder / "texts.jsonl", passages()[-DOCUMENTS:])
    cache = Cache(folder / "cache")
    without = measured(checkpoint, held_out, cache).view
    return Run(checkpoint, held_out, cache, without, measured(checkpoint, held_out, cache, "causal", "damage").view)


def test_every_figure_has_a_value_and_its_interval(run: Run) -> None:
    for phase in ("C", "E"):
        for name in CAUSES:
            figure = observe(run.view, name, phase).estimate
            assert figure.value is not None or "not clearly above 0" in (figure.reason or ""), (phase, name)
            assert (figure.interval is None) == (figure.value is None)
            assert figure.value is None or len(figure.replicates or ()) == run.view.record.resampling.groups
    for layer in range(6):
        for name in DAMAGE:
            assert run.view.layer(layer, name, "raw").interval is not None
    arrays = run.view.content()
    rows, tokens = arrays["damage.nats"].sum(axis=1), arrays["damage.tokens"].sum()
    assert run.view.layer(2, "layer_damage", "raw").value == pytest.approx((rows[3] - rows[0]) / tokens)
    swaps = (rows[7 + 1] + rows[7 + 2]) / 2  # after the undisturbed pass and six blocks left out: of 1, 2 and of 2, 3
    assert run.view.layer(2, "exchange_damage", "raw").value == pytest.approx((swaps - rows[0]) / tokens)
    absent = observe(run.view, "causal_effect", "A")
    assert absent.value is None
    assert absent.reason.startswith("causes were measured in the phases C (1 to 3), E (4 to 5) alone")


def test_the_rest_is_as_it_was_without_them(run: Run) -> None:
    without, record = read_again(run.without), read_again(run.view)
    assert (without.layers, without.scopes) == (record.layers, record.scopes)
    assert without.causes is None
    assert without.damage is None
    reason = observe(run.without, "causal_effect", "C").reason
    assert reason == f"the causes of the loss were not measured: {run.without.measure_again('causal')}"
    assert "--parts damage" in run.without.layer(0, "layer_damage", "raw").reason


def test_the_record_is_consistent_and_every_change_of_a_figure_is_seen(run: Run) -> None:
    record, arrays = read_again(run.view), run.view.content()
    assert problems(record, arrays) == []
    assert problems(record, None) == []

    def moved(figures: dict[str, Estimate], name: str) -> dict[str, Estimate]:
        figure = figures[name]
        return {**figures, name: figure.model_copy(update={"value": (figure.value or 0.0) + 1e-4, "reason": None})}

    causes, damage = record.causes, record.damage
    for name in CAUSES:
        metrics = {**causes.metrics, "C": moved(causes.metrics["C"], name)}
        changed = record.model_copy(update={"causes": causes.model_copy(update={"metrics": metrics})})
        assert any(name in str(problem) for problem in problems(changed, arrays)), name
    for name in DAMAGE:
        layers = tuple(moved(each, name) if layer == 1 else each for layer, each in enumerate(damage.layers))
        changed = record.model_copy(update={"damage": damage.model_copy(update={"layers": layers})})
        assert any(name in str(problem) for problem in problems(changed, arrays)), name
    for name in ("causal.nats", "damage.tokens"):
        assert problems(record, {key: array for key, array in arrays.items() if key != name})
        assert problems(record, arrays | {name: arrays[name] * 1.001})
    assert problems(record.model_copy(update={"causes": None}), arrays)


def test_the_cache_answers_and_other_phases_are_measured_anew(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def measures(*_: Any) -> Any:
        raise AssertionError("the model is measured again")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_measure", measures)
        assert run.again("causal", "damage").cached
        with pytest.raises(AssertionError):
            run.again("causal", phases={"A": (0, 2), "C": (3, 5)})
    moved = run.view.under({"A": (0, 2), "C": (3, 5)})
    assert "alone" in observe(moved, "causal_effect", "C").reason
    assert observe(moved, "layer_damage", "C").value == pytest.approx(
        sum(run.view.layer(layer, "layer_damage", "raw").value for layer in (3, 4, 5)) / 3
    )


CLAIMS = """\
schema = 1
id = "losses"
title = "Losses"
version = 1
rationale = "made up"

[[expect]]
id = "matters"
metric = "causal_effect"
scope = "C"
op = ">"
threshold = 0
origin = "made up"

[[expect]]
id = "more-than-random"
metric = "causal_effect"
scope = "C"
op = ">"
than = { scope = "C", metric = "causal_effect_random" }
origin = "made up"

[[expect]]
id = "damage"
metric = "layer_damage"
scope = "C"
op = "<"
threshold = 100
origin = "made up"
"""


def test_claims_choose_the_parts_and_are_decided(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "losses.toml"
    path.write_text(CLAIMS)
    hypothesis = load_hypothesis(path)
    assert parts_of_claims(hypothesis.expect) == {"spectra", "causal", "damage"}
    for claim in hypothesis.expect:
        judged = judge_claim(hypothesis, claim, run.view)
        assert list(judged.variants) == ["sink_free"]
        assert judged.judgement.distance.interval is not None


def test_tables_and_exports_show_them(run: Run) -> None:
    causes, damage = losses_tables(run.view, ["causal", "damage"])
    assert [line.cells[0].text for line in causes.lines] == ["C", "E"]
    assert len(damage.lines) == 6
    rows = [row for row in figures(run.view) if METRICS[row["metric"]].takes in OF_LOSSES]
    assert len(rows) == 2 * len(CAUSES) + 6 * len(DAMAGE)
    assert {row["variant"] for row in rows} == {None}


def read_again(view: RecordView) -> Record:
    record, _ = from_json(to_json(view.record), "test")
    return record
