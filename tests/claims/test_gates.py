"""Gates: conditions on a measurement under which a verdict may be drawn from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from delta_suite.capture.stream import ResidualStream
from delta_suite.claims.gates import failed_gates
from delta_suite.claims.observe import observe
from delta_suite.claims.schema import Expectation
from delta_suite.records.view import RecordView
from delta_suite.reduction.variants import BLOCK_VARIANTS, VARIANTS
from delta_suite.selftest.documents import DOCUMENTS
from delta_suite.selftest.planted import noise, sinks

from tests.planted_records import planted_view, view_of_stream

LAYERS, LENGTH, HIDDEN = 4, 8, 24


@pytest.fixture(scope="module")
def constant() -> RecordView:
    """Every update is one vector on all tokens, so that without its mean only rounding of the sums remains."""
    draw = torch.Generator().manual_seed(0)
    document = torch.arange(DOCUMENTS * LENGTH) // LENGTH
    states = [torch.randn(len(document), HIDDEN, generator=draw)]
    for _ in range(LAYERS):
        states.append(states[-1] + torch.randn(HIDDEN, generator=draw))
    position = torch.arange(len(document)) % LENGTH + 1
    stream = ResidualStream(states, document, position, torch.ones(len(document), dtype=torch.bool), "device")
    return view_of_stream(stream, phases={"C": (0, LAYERS - 1)}, variants=list(BLOCK_VARIANTS))


def gates_of(view: RecordView, metric: str, scope: str, **keys: Any) -> dict[str, str]:
    """Return the closed gates of a claim, each with its reason."""
    claim = {"id": "x", "metric": metric, "scope": scope, "op": ">=", "threshold": 0.5, "origin": "x"} | keys
    expectation = Expectation.model_validate(claim)
    observed = observe(view, metric, scope, expectation.variant, expectation.over)
    return {gate.name: gate.says for gate in failed_gates(observed, None, view)}


@pytest.mark.parametrize(("domains", "closed"), [(None, False), (1, True), (11, True), (12, False)])
def test_few_domains_decide_nothing(constant: RecordView, domains: int | None, closed: bool) -> None:
    calibration = constant.record.calibration.model_copy(update={"domains": domains})
    view = RecordView(constant.record.model_copy(update={"calibration": calibration}), constant.arrays)
    gates = gates_of(view, "gamma", "C")
    assert ("domains" in gates) == closed
    if closed:
        assert "a claim about other text needs 12" in gates["domains"]


@pytest.mark.parametrize(("variant", "closed"), [("raw", False), ("sink_free", False), ("centred", True)])
@pytest.mark.parametrize("metric", ["effective_rank", "intra_cosine"])
def test_rounding_decides_nothing(constant: RecordView, metric: str, variant: str, closed: bool) -> None:
    gates = gates_of(constant, metric, "C", variant=variant)
    assert ("rounding" in gates) == closed
    if closed:
        assert f"of {LAYERS} layers half of the update's energy or more is rounding" in gates["rounding"]


def test_noise_has_no_directions_and_no_gap() -> None:
    view = planted_view(noise, phases={"C": (2, 5), "single": (7, 7)})
    assert gates_of(view, "intra_cosine", "C").keys() == {"reliability", "gap"}
    assert gates_of(view, "gamma", "C") == {}
    assert gates_of(view, "reliability", "C", over="each") == {}
    assert gates_of(view, "block_effective_rank", "single").keys() == {"layers"}


def test_sinks_close_the_gate_on_raw_directions() -> None:
    view = planted_view(sinks, phases={"C": (2, 5)}, variants=("raw", "sink_free"))
    assert "in 4 of 4 layers sinks hold half of the energy or more" in gates_of(view, "intra_cosine", "C")["sinks"]
    assert "sinks" not in gates_of(view, "intra_cosine", "C", variant="sink_free")
    assert "sinks" not in gates_of(view, "gamma", "C")


def test_sinks_close_the_gate_of_every_variant_that_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    view = planted_view(sinks, phases={"C": (2, 5)}, variants=("raw", "sink_free", "centred"))
    for keeps in (False, True):
        monkeypatch.setitem(VARIANTS, "centred", replace(VARIANTS["centred"], keeps_sinks=keeps))  # type: ignore[arg-type]
        layers = [layer.metrics["raw"] if keeps else layer.metrics["sink_free"] for layer in view.layers]
        kept = [
            each.model_copy(
                update={
                    "metrics": {**each.metrics, "centred": each.metrics["centred"] | {"frobenius": one["frobenius"]}}
                }
            )
            for each, one in zip(view.layers, layers, strict=True)
        ]
        other = RecordView(view.record.model_copy(update={"layers": tuple(kept)}), view.arrays)
        assert ("sinks" in gates_of(other, "intra_cosine", "C", variant="centred")) == keeps


def test_too_few_documents_and_tokens_close_their_gates(constant: RecordView) -> None:
    record = constant.record
    calibration = record.calibration.model_copy(update={"documents": 49, "tokens": 2 * HIDDEN - 1})
    few = RecordView(record.model_copy(update={"calibration": calibration}), constant.arrays)
    gates = gates_of(few, "effective_rank", "C")
    assert gates["documents"] == "49 documents; an interval needs 50 (try --calibration core)"
    assert gates["n/d"] == f"{2 * HIDDEN - 1} tokens for {HIDDEN} dimensions; effective_rank needs 2 for each"
    assert "n/d" not in gates_of(few, "stable_rank", "C")


def test_a_figure_without_an_interval_decides_nothing(view: RecordView) -> None:
    assert gates_of(view, "intra_cosine", "C", over="median").keys() == {"interval"}
    assert gates_of(view, "intra_cosine", "C") == {}


@pytest.mark.parametrize(("share", "closed"), [(None, False), (0.0, False), (0.05, False), (0.051, True), (0.5, True)])
@pytest.mark.parametrize(("metric", "scope"), [("effective_rank", "C"), ("intra_cosine", "C")])
def test_a_text_that_the_tokenizer_hardly_knows_decides_nothing(
    view: RecordView, metric: str, scope: str, share: float | None, closed: bool
) -> None:
    calibration = view.record.calibration.model_copy(update={"unknown_tokens": share})
    other = RecordView(view.record.model_copy(update={"calibration": calibration}), view.arrays, view.directions)
    gates = gates_of(other, metric, scope)
    assert ("unknown" in gates) == closed
    if closed:
        assert gates["unknown"].startswith(f"{share:.1%} of the text is unknown to the model's tokenizer")
