"""The part `stream`: the states in the record, against plain hooks, in the cache, in verdicts and in the export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from delta_suite.capture.calibration import load_calibration
from delta_suite.capture.tokens import tokenize
from delta_suite.claims.judge import judge, parts_of_claims
from delta_suite.claims.observe import observe
from delta_suite.claims.verdict import Verdict
from delta_suite.metrics.estimators import state_metrics
from delta_suite.metrics.registry import METRICS
from delta_suite.metrics.state import OF_VARIANT
from delta_suite.models.blocks import find_decoder
from delta_suite.pipeline import Measured
from delta_suite.provenance import Clock
from delta_suite.records.cache import Cache
from delta_suite.records.figures import figures
from delta_suite.records.record import Record
from delta_suite.records.verify import problems
from delta_suite.records.view import RecordView
from delta_suite.reduction.passes import Passes
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.claims.test_judge import expectation, hypothesis
from tests.records.test_writes import measured, read_again
from tests.reference import state_figures
from tests.training import passages, write_documents

DOCUMENTS = 30
NAMES = {name for name, metric in METRICS.items() if metric.takes == "stream"}


@pytest.fixture(scope="module")
def paths(trained_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Cache]:
    """Return a small trained model, texts that it has not seen, and a cache."""
    folder = tmp_path_factory.mktemp("stream")
    texts = write_documents(folder / "texts.jsonl", passages()[-DOCUMENTS:])
    return trained_checkpoints / "checkpoint-20", texts, Cache(folder / "cache")


@pytest.fixture(scope="module")
def without(paths: tuple[Path, Path, Cache]) -> RecordView:
    return measured(*paths).view


@pytest.fixture(scope="module")
def completed(paths: tuple[Path, Path, Cache], without: RecordView) -> Measured:
    return measured(*paths, "stream")


@pytest.fixture(scope="module")
def view(completed: Measured) -> RecordView:
    return completed.view


Figures = dict[int, dict[str, dict[str, float]]]


@pytest.fixture(scope="module")
def expected(paths: tuple[Path, Path, Cache]) -> Figures:
    """Return figures of two states in float64, by layer, from what hooks see, with sinks and halves chosen anew."""
    folder, texts, _ = paths
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    calibration = load_calibration(str(texts))
    tokens = tokenize(calibration, AutoTokenizer.from_pretrained(folder), 512, None)
    blocks = [*model.model.layers, model.model.norm]
    states: list[list[np.ndarray]] = [[] for _ in blocks]
    handles = [
        block.register_forward_pre_hook(lambda m, args, kept=kept: kept.append(args[0][0].numpy()))
        for block, kept in zip(blocks, states, strict=True)
    ]
    with torch.no_grad():
        for ids in tokens.ids:
            model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    rows = [np.concatenate(kept) for kept in states]
    lengths = [len(ids) for ids in tokens.ids]
    document = np.repeat(tokens.documents, lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    norms = np.linalg.norm(np.stack(rows), axis=2)
    sink = (position == 0) | (norms > 6 * np.median(norms[:, position > 0], axis=1, keepdims=True)).any(axis=0)
    group = np.array(calibration.units.groups)[document]
    return {layer: state_figures(rows[layer], rows[layer + 1], document, position, sink, group) for layer in (0, 3)}


def test_the_figures_are_those_of_plain_hooks(view: RecordView, expected: Figures) -> None:
    for layer, by_variant in expected.items():
        for variant, names in OF_VARIANT.items():
            for name in names:
                estimate = view.layer(layer, name, variant)
                assert estimate.value == pytest.approx(by_variant[variant][name], rel=1e-6), (layer, variant, name)
                assert estimate.interval is not None


def test_in_float64_only_rounding_is_between_them(paths: tuple[Path, Path, Cache], expected: Figures) -> None:
    """Most of it is that of arccos, by which the reference takes the angles of a curvature."""
    folder, texts, _ = paths
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    calibration = load_calibration(str(texts))
    tokens = tokenize(calibration, AutoTokenizer.from_pretrained(folder), 512, None)
    passes = Passes(model, find_decoder(model), tokens, [torch.device("cpu")], Clock(), states=True)
    states = passes.run(None, units=calibration.units).states
    assert isinstance(states, dict)
    for layer, by_variant in expected.items():
        for variant, names in OF_VARIANT.items():
            figures = state_metrics(states[variant][layer], variant)
            for name in names:
                wanted = pytest.approx(by_variant[variant][name], rel=1e-10)
                assert figures[name].value == wanted, (layer, variant, name)


def test_a_record_without_the_states_is_completed_and_otherwise_as_it_was(
    paths: tuple[Path, Path, Cache], without: RecordView, completed: Measured
) -> None:
    assert not completed.cached
    assert completed.view.record.parts == ("spectra", "stream")
    one, other = read_again(without), read_again(completed.view)
    for before, after in zip(one.layers, other.layers, strict=True):
        kept = {
            variant: {name: each for name, each in metrics.items() if name not in NAMES}
            for variant, metrics in after.metrics.items()
        }
        assert kept == dict(before.metrics)
    assert measured(*paths, "stream").cached
    assert without.layer(0, "curvature", "raw").reason == (
        "the states of the stream were not measured: delta-suite measure small --parts stream"
    )


def moved(record: Record, variant: str, name: str) -> Record:
    """Return the record with a figure of its second layer one percent off."""
    layer = record.layers[1]
    figure = layer.metrics[variant][name]
    assert figure.value is not None
    other = figure.model_copy(update={"value": figure.value * 1.01})
    metrics = {**layer.metrics, variant: {**layer.metrics[variant], name: other}}
    layers = [*record.layers]
    layers[1] = layer.model_copy(update={"metrics": metrics})
    return record.model_copy(update={"layers": tuple(layers)})


def test_the_record_is_consistent_and_a_change_of_a_figure_is_seen(view: RecordView) -> None:
    record, arrays = read_again(view), view.content()
    assert problems(record, arrays) == []
    for variant, names in OF_VARIANT.items():
        for name in names:
            assert any(name in str(problem) for problem in problems(moved(record, variant, name), arrays)), name
    gone = {name: array for name, array in arrays.items() if name != "centred.stream_eigenvalues"}
    assert "centred.stream_eigenvalues: the array is missing" in [str(problem) for problem in problems(record, gone)]
    unlisted = record.model_copy(update={"parts": ("spectra",)})
    assert any("no place here" in str(problem) for problem in problems(unlisted, arrays))


def test_figures_about_sinks_stand_for_every_variant(view: RecordView) -> None:
    for layer in range(view.model.layers):
        values = {variant: view.layer(layer, "sink_norm_ratio", variant).value for variant in view.variants}
        assert len(set(values.values())) == 1
        centred = view.layer(layer, "curvature", "centred").value
        assert centred == view.layer(layer, "curvature", "sink_free").value


def test_claims_need_the_part_and_are_judged(view: RecordView) -> None:
    claim = expectation(
        metric="sink_norm_ratio", scope="model", over="correlation", **{"with": "stream_effective_rank"}, threshold=-1
    )
    assert parts_of_claims([claim]) == {"spectra", "stream"}
    judgement = judge(hypothesis(claim), claim, view)
    assert judgement.observation.interval is not None
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert [gate.name for gate in judgement.gates] == ["documents"]
    assert observe(view, "linearity", "depth:0.5-1", "sink_free").value is not None


def test_every_figure_is_exported(view: RecordView) -> None:
    rows = [row for row in figures(view) if row["metric"] in NAMES]
    assert len(rows) == view.model.layers * sum(map(len, OF_VARIANT.values()))
    assert all(row["value"] is not None and row["low"] is not None for row in rows)
