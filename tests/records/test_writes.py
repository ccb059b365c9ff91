"""The part `writes`: attention and MLP apart, in the record, against an independent recomputation, and in verdicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from delta_suite import pipeline
from delta_suite.capture.calibration import load_calibration
from delta_suite.capture.tokens import tokenize
from delta_suite.claims.judge import judge_claim, parts_of_claims
from delta_suite.claims.loader import load_hypothesis
from delta_suite.claims.observe import observe
from delta_suite.claims.verdict import Verdict
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Measured, Settings, measure_view
from delta_suite.records.cache import Cache
from delta_suite.records.figures import figures
from delta_suite.records.format import from_json, to_json
from delta_suite.records.record import Record
from delta_suite.records.verify import problems
from delta_suite.records.view import RecordView
from delta_suite.reduction.variants import BLOCK_VARIANTS, WRITE_VARIANTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.reference import phase_figures, sublayer_rows, write_figures
from tests.training import passages, write_documents

DOCUMENTS = 12


@dataclass(frozen=True)
class Run:
    """A small trained model, measured first without the writes and then with them."""

    folder: Path
    texts: Path
    cache: Cache
    without: RecordView
    apart: RecordView

    def again(self, *parts: str) -> Measured:
        return measured(self.folder, self.texts, self.cache, *parts)


def measured(folder: Path, texts: Path, cache: Cache, *parts: str) -> Measured:
    settings = Settings(
        calibration=str(texts), device="cpu", dtype="float32", cache=cache, parts=frozenset({"spectra", *parts})
    )
    return measure_view(ModelSpec(name="small", path=folder), settings)


@pytest.fixture(scope="module")
def run(trained_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("writes")
    checkpoint = trained_checkpoints / "checkpoint-20"
    held_out = write_documents(folder / "texts.jsonl", passages()[-DOCUMENTS:])
    cache = Cache(folder / "cache")
    without = measured(checkpoint, held_out, cache).view
    return Run(checkpoint, held_out, cache, without, measured(checkpoint, held_out, cache, "writes", "boundaries").view)


def test_the_figures_are_those_of_an_independent_recomputation(run: Run) -> None:
    model = AutoModelForCausalLM.from_pretrained(run.folder, dtype=torch.float64, attn_implementation="eager").eval()
    tokens = tokenize(load_calibration(str(run.texts)), AutoTokenizer.from_pretrained(run.folder), 512, None)
    expected = write_figures(sublayer_rows(model, list(tokens.ids)))
    assert expected.keys() == WRITE_VARIANTS.keys()
    for variant, layers in expected.items():
        for layer, values in enumerate(layers):
            for name in ("gamma", "effective_rank", "top3_energy"):
                estimate = run.apart.layer(layer, name, variant)
                assert estimate.value == pytest.approx(values[name], rel=1e-6), (variant, layer, name)
                assert estimate.interval is not None
        directions = [values["directions"] for values in layers]
        for phase, (first, last) in run.apart.phases.items():
            wanted = phase_figures(directions, list(range(first, last + 1)))
            for name in ("intra_cosine", "cross_cosine", "block_effective_rank"):
                value = observe(run.apart, name, phase, variant).value
                if value is not None:
                    assert value == pytest.approx(wanted[name], abs=1e-6), (variant, phase, name)


def test_the_block_is_as_it_was_without_the_writes(run: Run) -> None:
    without, apart = read_again(run.without), read_again(run.apart)
    for one, other in zip(without.layers, apart.layers, strict=True):
        assert {name: other.metrics[name] for name in BLOCK_VARIANTS} == dict(one.metrics)
    for phase, scope in without.scopes.items():
        also = apart.scopes[phase].metrics
        assert {name: also[name] for name in BLOCK_VARIANTS} == dict(scope.metrics)
    assert run.apart.variants == tuple(BLOCK_VARIANTS)
    assert set(run.apart.record.boundaries) == set(BLOCK_VARIANTS)


def test_both_at_once_give_the_same_record(run: Run, tmp_path: Path) -> None:
    at_once = measured(run.folder, run.texts, Cache(tmp_path), "writes", "boundaries").view
    one, other = read_again(at_once), read_again(run.apart)
    assert (one.layers, one.scopes, one.boundaries) == (other.layers, other.scopes, other.boundaries)
    assert one.certificate.identities == other.certificate.identities


def test_the_record_is_consistent_and_every_change_of_a_figure_is_seen(run: Run) -> None:
    record, arrays = read_again(run.apart), run.apart.content()
    assert problems(record, arrays) == []
    assert "writes" in record.certificate.identities
    for variant in WRITE_VARIANTS:
        layer = record.layers[1]
        figure = layer.metrics[variant]["effective_rank"]
        assert figure.value is not None
        moved = figure.model_copy(update={"value": figure.value * 1.01})
        metrics = {**layer.metrics, variant: {**layer.metrics[variant], "effective_rank": moved}}
        layers = [
            layer.model_copy(update={"metrics": metrics}) if index == 1 else other
            for index, other in enumerate(record.layers)
        ]
        changed = record.model_copy(update={"layers": tuple(layers)})
        assert any(variant in str(problem) for problem in problems(changed, arrays)), variant
    lacking = record.model_copy(update={"parts": ("spectra", "boundaries")})
    assert any("no part of the record" in str(problem) for problem in problems(lacking, arrays))


def read_again(view: RecordView) -> Record:
    return from_json(to_json(view.record), "here")[0]


def test_the_cache_completes_an_entry_and_has_it_from_then_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_measure", None)
    assert run.again("writes", "boundaries").cached
    assert run.again().view.record.parts == ("spectra", "writes", "boundaries")


def test_another_phase_map_takes_the_writes_along(run: Run) -> None:
    other = run.apart.under({"early": (0, 2), "late": (3, 5)})
    value = observe(other, "block_effective_rank", "late", "centred.mlp").value
    again = observe(run.apart, "block_effective_rank", "layers:3-5", "centred.mlp").value
    assert value == pytest.approx(again)
    assert problems(from_json(to_json(other.record), "here")[0], other.content()) == []


def test_figures_name_the_write_in_a_column_of_its_own(run: Run) -> None:
    rows = [row for row in figures(run.apart) if row["metric"] == "gamma" and row["layer"] == 0]
    assert [(row["variant"], row["write"]) for row in rows] == [
        *((name, None) for name in BLOCK_VARIANTS),
        *((variant.rows, variant.write) for variant in WRITE_VARIANTS.values()),
    ]


CLAIMS = """\
schema = 1
id = "apart"
title = "Apart"
version = 1
rationale = "made up"

[[expect]]
id = "mlp"
metric = "gamma"
scope = "C"
variant = "sink_free"
write = "mlp"
op = ">="
threshold = 0
origin = "made up"

[[expect]]
id = "against-attention"
metric = "gamma"
scope = "C"
variant = "sink_free"
write = "mlp"
op = ">="
than = { scope = "C", write = "attention", times = 0.5 }
origin = "made up"
"""


@pytest.fixture
def claims(tmp_path: Path) -> Path:
    path = tmp_path / "apart.toml"
    path.write_text(CLAIMS)
    return path


def test_claims_are_judged_on_what_they_name(run: Run, claims: Path) -> None:
    hypothesis = load_hypothesis(claims)
    assert parts_of_claims(hypothesis.expect) == {"spectra", "writes"}
    one, two = hypothesis.expect
    assert one.claim() == "mean gamma of the MLP over C >= 0 (sink_free)"
    assert two.claim() == "mean gamma of the MLP over C >= 0.5 x mean gamma of attention over C (sink_free)"
    judged = judge_claim(hypothesis, two, run.apart)
    assert set(judged.variants) == {"sink_free", "centred"}
    assert judged.judgement.observation.variant == "sink_free.mlp"
    assert judged.judgement.reference is not None
    assert judged.judgement.reference.variant == "sink_free.attention"
    gammas = [run.apart.layer(layer, "gamma", "sink_free.mlp").value for layer in (1, 2)]
    assert all(gammas)


def test_a_record_without_the_part_says_how_to_measure_it(run: Run, claims: Path) -> None:
    hypothesis = load_hypothesis(claims)
    judgement = judge_claim(hypothesis, hypothesis.expect[0], run.without).judgement
    assert judgement.verdict is Verdict.NOT_MEASURED
    assert "delta-suite measure small --parts writes" in str(judgement.reason)


def test_a_claim_about_a_write_is_not_measured_with_sinks(run: Run, claims: Path) -> None:
    """As under `pytest --variant raw`."""
    hypothesis = load_hypothesis(claims)
    claim = hypothesis.expect[0].model_copy(update={"variant": "raw"})
    judgement = judge_claim(hypothesis, claim, run.apart).judgement
    assert judgement.verdict is Verdict.NOT_MEASURED
    assert judgement.reason == f"what attention and MLP write is measured without sinks: in {', '.join(WRITE_VARIANTS)}"


def test_a_token_metric_of_a_write_does_not_exist(run: Run) -> None:
    assert "not measured of what attention and MLP write" in str(
        observe(run.apart, "relative_step", "layer:1", "sink_free.mlp").reason
    )


def test_a_model_whose_blocks_have_one_sublayer_says_so_and_is_not_tried_again(
    tmp_path: Path, claims: Path, monkeypatch: pytest.MonkeyPatch, mamba: Callable[[], Path]
) -> None:
    texts = write_documents(tmp_path / "texts.jsonl", passages()[-DOCUMENTS:])
    cache = Cache(tmp_path / "cache")
    view = measured(mamba(), texts, cache, "writes").view
    assert view.record.not_apart == "block 0 (MambaBlock) has one sublayer, mixer"
    assert problems(read_again(view), view.content()) == []
    hypothesis = load_hypothesis(claims)
    judgement = judge_claim(hypothesis, hypothesis.expect[0], view).judgement
    assert judgement.verdict is Verdict.NOT_MEASURED
    assert judgement.reason == (
        "attention and MLP are not measured apart: block 0 (MambaBlock) has one sublayer, mixer"
    )
    monkeypatch.setattr(pipeline, "_measure", None)
    assert measured(mamba(), texts, cache, "writes").cached


@pytest.fixture
def mamba(run: Run, tmp_path: Path) -> Callable[[], Path]:
    """Return a function that saves a Mamba with the tokenizer of the small model, and returns its folder."""
    from transformers import MambaConfig, MambaForCausalLM

    folder = tmp_path / "mamba"

    def saved() -> Path:
        if not folder.exists():
            torch.manual_seed(0)
            sizes = {"vocab_size": 512, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 4}
            MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(folder)
            AutoTokenizer.from_pretrained(run.folder).save_pretrained(folder)
        return folder

    return saved
