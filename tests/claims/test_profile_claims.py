"""Claims about a profile over depth, and about a share of the depth, on a record whose truth is known."""

from __future__ import annotations

import pytest
from delta_suite.claims.observe import layers_of, observe
from delta_suite.claims.verdict import Verdict
from delta_suite.records.view import RecordView
from scipy.stats import spearmanr

from tests.claims.test_judge import expectation, judged


@pytest.mark.parametrize(
    ("scope", "layers"),
    [
        ("depth:0-0.5", range(12)),
        ("depth:0.5-1", range(12, 24)),
        ("depth:0.25-0.3", range(6, 8)),
        ("depth:0.26-0.29", "no layer of 24 is in depth:0.26-0.29"),
    ],
)
def test_a_share_of_the_depth_is_its_layers(view: RecordView, scope: str, layers: range | str) -> None:
    assert layers_of(scope, view.model.layers, view.phases) == layers


def test_figures_of_a_profile_are_those_of_its_layers(view: RecordView) -> None:
    ranks = [view.layer(layer, "effective_rank", "raw").value or 0.0 for layer in range(24)]
    gammas = [view.layer(layer, "gamma", "raw").value or 0.0 for layer in range(24)]
    trend, peak, valley = (observe(view, "effective_rank", over=over) for over in ("trend", "peak", "valley"))
    assert trend.value == pytest.approx(spearmanr(range(24), ranks).statistic)
    assert (peak.value, valley.value) == (ranks.index(max(ranks)) / 24, ranks.index(min(ranks)) / 24)
    both = observe(view, "effective_rank", over="correlation", with_metric="gamma")
    assert both.value == pytest.approx(spearmanr(ranks, gammas).statistic)
    assert both.interval is not None
    assert list(both.per_layer.values()) == ranks


def test_claims_of_a_profile_read_as_sentences() -> None:
    trend = expectation(metric="gamma", scope="model", over="trend", threshold=0.5)
    assert trend.claim() == "trend of gamma with depth over model >= 0.5"
    both = expectation(metric="gamma", scope="depth:0.5-1", over="correlation", **{"with": "stable_rank"}, threshold=0)
    assert both.claim() == "correlation of gamma with stable_rank over depth:0.5-1 >= 0"
    assert both.metrics == ("gamma", "stable_rank")
    assert both.phases == ()
    peak = expectation(metric="gamma", over="peak", than={"scope": "model", "metric": "stable_rank"})
    assert peak.claim() == "depth of the peak of gamma over C >= depth of the peak of stable_rank over model"


def test_verdicts_on_a_profile(view: RecordView) -> None:
    """Phase C shares a direction: the largest cosines stand there, and the spectra of the layers do not differ."""
    keys = {"metric": "reliability", "scope": "model", "over": "correlation"}
    assert judged(view, **keys, **{"with": "top1_energy"}, threshold=0.2).observation.interval is not None
    with_itself = judged(view, metric="frobenius", scope="model", over="correlation", **{"with": "gamma"}, threshold=-1)
    assert with_itself.verdict is Verdict.SUPPORTED
    deeper = judged(view, metric="gamma", scope="C", over="peak", op="<", than={"scope": "E"})
    assert deeper.verdict is Verdict.SUPPORTED
    beyond = judged(view, metric="gamma", scope="C", over="peak", threshold=0.9)
    assert beyond.verdict is Verdict.NOT_MEASURED
    assert beyond.reason == "no value could meet it: >= 0.9 is asked for, and a peak is at most 0.416667"


def test_a_profile_can_be_held_against_windows(view: RecordView) -> None:
    claim = judged(view, metric="gamma", scope="C", over="trend", op="<=", than={"null": "window", "quantile": 0.9})
    assert claim.p is not None


def test_without_arrays_a_profile_is_not_measured(bare: RecordView) -> None:
    observation = observe(bare, "gamma", over="trend")
    assert observation.value is None
    assert "not beside the record" in str(observation.reason)


def test_a_correlation_needs_two_metrics_of_layers(view: RecordView) -> None:
    with pytest.raises(ValueError, match="a correlation is of two metrics: give over='correlation' together"):
        observe(view, "gamma", over="correlation")
    with pytest.raises(ValueError, match="no trend of intra_cosine: it is a metric of a phase, not of layers"):
        observe(view, "intra_cosine", over="trend")
