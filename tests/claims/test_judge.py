"""Judging: verdicts on planted truth, with the arrays of a record and without, and many claims on many records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from delta_suite.claims.judge import judge, judge_all, judge_claim, parts_of_claims
from delta_suite.claims.null_kinds import NO_CONTROL, NULLS, Control, undecidable_at
from delta_suite.claims.schema import Expectation, Hypothesis, Than
from delta_suite.claims.verdict import Judgement, Verdict, combine_verdicts
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.intervals import interval
from delta_suite.metrics.law import CEILING_FROM
from delta_suite.records.view import RecordView
from delta_suite.selftest.law_worlds import LAW_C, LAW_E, law
from delta_suite.selftest.planted import noise
from pydantic import ValidationError

from tests.planted_records import planted_view

GONE = (
    "its arrays, gone.safetensors, are not beside the record of planted: copy them there, or measure it again: "
    "delta-suite measure planted"
)


def expectation(**keys: Any) -> Expectation:
    claim = {"id": "x", "metric": "intra_cosine", "scope": "C", "op": ">=", "origin": "x"}
    return Expectation.model_validate(claim | keys)


def hypothesis(*claims: Expectation) -> Hypothesis:
    head = {"schema": 1, "id": "h", "title": "x", "version": 1, "rationale": "x", "path": Path("h.toml"), "sha256": ""}
    return Hypothesis.model_validate(head | {"expect": claims})


def judged(view: RecordView, control: Control = None, **keys: Any) -> Judgement:
    claim = expectation(**keys)
    return judge(hypothesis(claim), claim, view, control)


@pytest.fixture(scope="module")
def control() -> RecordView:
    """Return a record of noise in the place of random weights."""
    return planted_view(
        noise, phases={"C": (2, 5), "E": (6, 10)}, variants=("raw", "sink_free"), name="planted@control"
    )


def test_a_claim_of_each_layer_needs_an_interval_of_each(view: RecordView) -> None:
    """A figure of a phase has shares of its layers without intervals: such a claim is judged, and says why not."""
    for than in (None, {"null": "random"}, {"null": "lag"}, {"scope": "E"}):
        required = {"threshold": 0.1} if than is None else {"than": than}
        judgement = judged(view, metric="intra_cosine", over="each", mostly=0.5, **required)
        assert judgement.verdict is Verdict.INCONCLUSIVE
        assert "intra_cosine has an interval over all layers together alone" in str(judgement.reason)
    claim = judged(view, metric="effective_rank", over="each", mostly=0.5, than={"null": "random"})
    assert claim.verdict is Verdict.NOT_MEASURED
    assert "random" in str(claim.reason)


# --- thresholds ------------------------------------------------------------------------------------------------


def test_a_verdict_is_where_the_interval_lies(view: RecordView) -> None:
    low, high = judged(view, threshold=0.5).observation.interval or (math.nan, math.nan)
    for threshold, at_least, at_most in (
        (low - 0.01, Verdict.SUPPORTED, Verdict.REFUTED),
        ((low + high) / 2, Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE),
        (high + 0.01, Verdict.REFUTED, Verdict.SUPPORTED),
    ):
        assert judged(view, threshold=threshold).verdict is at_least
        assert judged(view, threshold=threshold, op="<=").verdict is at_most


def test_a_threshold_at_the_end_of_the_interval_is_met_and_not_passed(bare: RecordView) -> None:
    low, _ = bare.record.scopes["C"].metrics["raw"]["intra_cosine"].interval or (math.nan, math.nan)
    verdicts = [judged(bare, threshold=low, op=op).verdict for op in (">=", ">", "<", "<=")]
    assert verdicts == [Verdict.SUPPORTED, Verdict.INCONCLUSIVE, Verdict.REFUTED, Verdict.INCONCLUSIVE]


@pytest.mark.parametrize("threshold", [0.5, 0.788, 0.9])
@pytest.mark.parametrize("op", [">=", "<="])
def test_thresholds_are_judged_alike_without_arrays(
    view: RecordView, bare: RecordView, op: str, threshold: float
) -> None:
    with_arrays, without = (judged(record, op=op, threshold=threshold) for record in (view, bare))
    assert without.verdict is with_arrays.verdict
    assert without.observed == pytest.approx(with_arrays.observed)
    assert without.margin == pytest.approx(with_arrays.margin)
    assert without.distance.interval == pytest.approx(with_arrays.distance.interval)
    assert with_arrays.p is not None
    assert (without.p, without.detectable) == (None, None)
    assert without.holds_for == with_arrays.holds_for


@pytest.mark.parametrize(("op", "verdict"), [(">=", Verdict.SUPPORTED), ("<=", Verdict.REFUTED)])
def test_claims_of_each_layer_are_judged_without_arrays(
    view: RecordView, bare: RecordView, op: str, verdict: Verdict
) -> None:
    for record in (view, bare):
        judgement = judged(record, metric="reliability", scope="E", over="each", mostly=0.8, op=op, threshold=0.9)
        assert (judgement.verdict, judgement.required) == (verdict, 0.8)
        assert judgement.observed == judgement.as_measured == (1.0 if verdict is Verdict.SUPPORTED else 0.0)


def test_layers_that_hold_as_measured_are_counted_beside_those_whose_intervals_do(view: RecordView) -> None:
    """A threshold amid the layers' values: most intervals reach over it, and half of the values lie on either side."""
    values = sorted(view.layer(layer, "reliability", "raw").best or 0.0 for layer in range(14, 22))
    judgement = judged(
        view, metric="reliability", scope="E", over="each", mostly=0.8, threshold=(values[3] + values[4]) / 2
    )
    assert judgement.as_measured == 0.5
    assert judgement.observed is not None
    assert judgement.observed < 0.5
    assert judgement.notes == (f"50% of the layers hold as measured, {judgement.observed:.0%} by their intervals",)


def boundaries_with(view: RecordView, metric: str, value: float, spread: float) -> RecordView:
    """Return the record with a metric of its boundaries at a value, and an interval of about this half-width."""
    boundary = view.record.boundaries["raw"]
    replicates = tuple(value + spread * side for side in (-0.25, 0.25) * 5)
    figure = Estimate(value=value, corrected=value, interval=interval(value, replicates, 0.0, 1.0))
    changed = boundary.model_copy(
        update={
            "metrics": {**boundary.metrics, metric: figure},
            "replicates": {**(boundary.replicates or {}), metric: replicates},
        }
    )
    record = view.record.model_copy(update={"boundaries": {**view.record.boundaries, "raw": changed}})
    return RecordView(record, view.arrays, view.directions)


@pytest.mark.parametrize(
    ("metric", "value", "spread", "verdict"),
    [
        ("boundary_p", 0.01, 0.01, Verdict.SUPPORTED),
        ("boundary_p", 0.03, 0.1, Verdict.INCONCLUSIVE),  # significant, and without one group of documents not
        ("boundary_p", 0.27, 0.01, Verdict.INCONCLUSIVE),  # no evidence against
        ("boundary_p", 0.27, 0.5, Verdict.INCONCLUSIVE),
        ("boundary_p", 0.99, 0.01, Verdict.REFUTED),  # fewer boundaries than 95% of drifts have
        ("boundary_cost_rank", 0.01, 0.01, Verdict.SUPPORTED),
        ("boundary_cost_rank", 0.27, 0.01, Verdict.REFUTED),  # the order is a fact about this model
        ("boundary_cost_rank", 0.27, 0.5, Verdict.INCONCLUSIVE),
    ],
)
def test_a_p_that_is_not_significant_is_no_evidence_against(
    view: RecordView, metric: str, value: float, spread: float, verdict: Verdict
) -> None:
    judgement = judged(
        boundaries_with(view, metric, value, spread), metric=metric, scope="model", op="<=", threshold=0.05
    )
    assert judgement.verdict is verdict
    assert judgement.observation.interval is not None
    assert judgement.p is not None
    assert judgement.p >= (value if metric == "boundary_p" else 0.0)


def test_boundaries_have_intervals_and_a_p_beside_a_record_and_without_its_arrays(
    view: RecordView, bare: RecordView
) -> None:
    for metric in ("boundary_p", "boundary_cost_rank", "boundary_agreement"):
        with_arrays, without = (
            judged(each, metric=metric, scope="model", op="<=", threshold=0.5) for each in (view, bare)
        )
        assert with_arrays.observation.interval is not None
        assert without.verdict is with_arrays.verdict
        assert without.p == pytest.approx(with_arrays.p)


def test_a_requirement_that_no_value_could_meet_is_not_measured(view: RecordView) -> None:
    share = view.over(range(6, 11), "intra_cosine", "raw").best
    assert share is not None
    judgement = judged(view, scope="E", than={"scope": "C", "times": 2.0})
    assert judgement.verdict is Verdict.NOT_MEASURED
    assert judgement.reason == (
        f"no value could meet it: >= {2 * share:.4g} is asked for, and intra_cosine is at most 1"
    )
    assert judged(view, threshold=1.0).verdict is Verdict.REFUTED  # 1 is a value of it
    assert judged(view, op=">", threshold=1.0).verdict is Verdict.NOT_MEASURED
    assert judged(view, metric="gamma", op="<", threshold=0.0).verdict is Verdict.NOT_MEASURED
    assert judged(view, metric="block_effective_rank", threshold=5.5).verdict is Verdict.NOT_MEASURED  # 5 layers
    assert judged(view, metric="effective_rank", threshold=33).verdict is Verdict.NOT_MEASURED  # 32 dimensions


# --- the other side --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("than", "verdict"),
    [
        ({"scope": "E", "times": 2.0}, Verdict.SUPPORTED),
        ({"scope": "E", "plus": 0.8}, Verdict.REFUTED),
        ({"null": "window"}, Verdict.SUPPORTED),
        ({"null": "drift"}, Verdict.SUPPORTED),
        ({"null": "lag"}, Verdict.SUPPORTED),
        ({"null": "lag", "times": 5.5}, Verdict.REFUTED),
        ({"null": "random"}, Verdict.SUPPORTED),
        ({"null": "random-weights"}, Verdict.NOT_MEASURED),
    ],
)
def test_comparisons_find_what_was_planted(view: RecordView, than: dict[str, Any], verdict: Verdict) -> None:
    assert judged(view, than=than).verdict is verdict


def test_the_phase_that_shares_nothing_is_above_no_null(view: RecordView) -> None:
    for null in ("window", "drift", "lag", "random"):
        assert judged(view, scope="E", than={"null": null}).verdict is not Verdict.SUPPORTED


@pytest.mark.parametrize("than", [{"scope": "E"}, *({"null": name} for name in NULLS)])
@pytest.mark.parametrize(("metric", "scope"), [("intra_cosine", "C"), ("effective_rank", "C"), ("gamma", "layer:8")])
def test_comparisons_need_the_arrays(
    bare: RecordView, control: RecordView, than: dict[str, Any], metric: str, scope: str
) -> None:
    judgement = judged(bare, control, metric=metric, scope=scope, than=than)
    assert judgement.verdict is Verdict.NOT_MEASURED
    assert GONE in str(judgement.reason)


def test_windows_need_the_cosines_of_all_layers(view: RecordView) -> None:
    """A is a window of as many layers as C, and its figure is in the record, but two windows rank nothing."""
    assert view.arrays is not None
    arrays = {name: array for name, array in view.content().items() if "cosines" not in name}
    older = RecordView(view.record, type(view.arrays)(view.arrays.path, content=arrays))
    judgement = judged(older, than={"null": "window"})
    assert judgement.verdict is Verdict.NOT_MEASURED
    assert "holds no cosines of raw" in str(judgement.reason)


def test_a_null_that_cannot_decide_at_a_depth_says_so_and_is_not_measured(control: RecordView) -> None:
    for null, needs in (
        ("window", "12 layers have 9 windows of 4, and a rank with p <= 0.05 needs 23 layers"),
        ("drift", "12 layers, and a comparison with smooth drifts needs 20 layers"),
    ):
        claim = expectation(than={"null": null})
        judgement = judge(hypothesis(claim), claim, control)
        assert judgement.verdict is Verdict.NOT_MEASURED
        assert judgement.reason == f"this depth cannot decide: {needs}"
        assert undecidable_at(claim, 12, {"C": (2, 5)}) == judgement.reason
        assert undecidable_at(claim, 24, {"C": (2, 5)}) is None
        assert undecidable_at(claim, 12, {"A": (2, 5)}) is None  # it has no phase C, which is another matter


@pytest.mark.parametrize("null", ["window", "drift", "random"])
def test_a_rank_that_is_not_significant_refutes_nothing(view: RecordView, null: str) -> None:
    """Layers 5-9 are C but for one layer at each end; E shares no less than windows elsewhere, by chance."""
    for scope in ("layers:5-9", "E"):
        judgement = judged(view, scope=scope, than={"null": null, "quantile": 0.95})
        assert judgement.verdict is not Verdict.REFUTED
        if judgement.verdict is Verdict.INCONCLUSIVE and judgement.margin is not None and judgement.margin < -0.05:
            assert judgement.reason == "not significant, which is no evidence against the claim"


def test_a_phase_declared_two_layers_off_has_the_edges_all_the_same(view: RecordView) -> None:
    for first in range(4, 9):
        judgement = judged(view, scope=f"layers:{first}-{first + 4}", than={"null": "drift"})
        assert judgement.verdict is Verdict.SUPPORTED, first
    assert judged(view, scope="layers:0-4", than={"null": "drift"}).verdict is not Verdict.SUPPORTED


def test_drifts_are_for_claims_that_a_phase_shares_more() -> None:
    with pytest.raises(ValidationError, match="is for claims that a phase shares more, with > or >="):
        expectation(op="<", than={"null": "drift"})


def test_a_claim_against_random_weights_needs_their_record(view: RecordView, control: RecordView) -> None:
    than = {"null": "random-weights", "times": 2.0}
    assert judged(view, than=than).reason == f"the other side: {NO_CONTROL}"
    judgement = judged(view, control, than=than)
    assert judgement.verdict is Verdict.SUPPORTED
    assert judgement.reference is not None
    assert judgement.reference.model == "planted@control"


def test_a_claim_that_random_weights_support_is_vacuous(view: RecordView, control: RecordView) -> None:
    assert judged(view, control, metric="effective_rank", threshold=1.5).vacuous
    assert not judged(view, metric="effective_rank", threshold=1.5).vacuous
    assert not judged(view, control, threshold=0.5).vacuous


def test_a_control_is_measured_only_where_it_is_needed(view: RecordView, control: RecordView) -> None:
    measured: list[str] = []

    def measure() -> RecordView:
        measured.append("control")
        return control

    assert judged(view, measure, metric="effective_rank", threshold=1e6).verdict is not Verdict.SUPPORTED
    assert not measured
    assert judged(view, measure, metric="effective_rank", threshold=1.5).vacuous
    assert measured == ["control"]
    assert not judged(view, lambda: None, metric="effective_rank", threshold=1.5).vacuous


def test_random_weights_that_meet_a_claim_behind_a_gate_are_told(view: RecordView, control: RecordView) -> None:
    """Noise has nearly orthogonal directions, and its gates are shut: it supports nothing, and E is no better."""
    judgement = judged(view, control, scope="E", op="<=", threshold=0.3)
    assert (judgement.verdict, judgement.vacuous, judgement.no_better) == (Verdict.SUPPORTED, False, True)
    assert not judged(view, control, threshold=0.5).no_better  # noise does not share a direction
    assert not judged(view, scope="E", op="<=", threshold=0.3).no_better


def test_a_claim_of_each_layer_can_be_vacuous(view: RecordView, control: RecordView) -> None:
    each = {"metric": "effective_rank", "over": "each", "mostly": 0.8, "threshold": 1.5}
    assert judged(view, control, **each).vacuous
    assert not judged(view, **each).vacuous


def test_a_claim_of_the_law_has_one_variant_and_shows_its_ceiling() -> None:
    view = planted_view(
        law, phases={"C": LAW_C, "E": LAW_E}, variants=("raw", "sink_free"), parts=("spectra", "law"), name="lawful"
    )
    claim = expectation(metric="rank_one_closure", variant="sink_free", threshold=0.5)
    row = judge_claim(hypothesis(claim), claim, view)
    assert list(row.variants) == ["sink_free"]
    metrics = view.record.scopes["C"].metrics["sink_free"]
    share, shared, alone = (metrics[name].per_layer or {} for name in CEILING_FROM)
    ceilings = [share[layer] * (1 - shared[layer]) / (alone[layer] - shared[layer]) for layer in share]
    assert row.judgement.ceiling == pytest.approx(np.median(ceilings))
    assert row.judgement.notes == (
        f"one direction with any f could close at most {row.judgement.ceiling:.3g} (median over layers)",
    )
    closed = metrics["rank_one_closure"].per_layer or {}
    assert all((closed[layer] or 0) <= ceiling + 0.05 for layer, ceiling in zip(share, ceilings, strict=True))
    assert judge_claim(hypothesis(claim), expectation(threshold=0.5), view).judgement.ceiling is None


# --- what cannot be judged -------------------------------------------------------------------------------------


def test_a_part_that_was_not_measured_names_the_command(view: RecordView) -> None:
    judgement = judged(view, metric="sharing_index", threshold=0.5)
    assert judgement.verdict is Verdict.NOT_MEASURED
    assert judgement.reason == "the update law was not measured: delta-suite measure planted --parts law"


def test_a_closed_gate_is_inconclusive_with_its_reason(control: RecordView) -> None:
    judgement = judged(control, threshold=0.5)
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert [gate.name for gate in judgement.gates] == ["reliability", "gap"]
    assert str(judgement.reason).startswith("reliability: 0 of 4 layers point the same way")


@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize("key", ["scope", "quantile", "times", "plus", "metric"])
def test_a_null_takes_the_keys_of_its_entry(null: str, key: str) -> None:
    values = {"scope": "E", "quantile": 0.9, "times": 2.0, "plus": 1.0, "metric": "gamma"}
    if key in NULLS[null].allows:
        assert Than.model_validate({"null": null, key: values[key]}).null == null
    else:
        with pytest.raises(ValidationError, match=f'{key} does not go with null = "{null}": remove it'):
            Than.model_validate({"null": null, key: values[key]})


# --- many claims on many records -------------------------------------------------------------------------------


def test_every_claim_is_judged_on_every_record_and_under_every_variant(view: RecordView, control: RecordView) -> None:
    claims = (expectation(id="a", threshold=0.5, line=7), expectation(id="b", threshold=0.5, variant="sink_free"))
    rows = list(judge_all([hypothesis(*claims)], [(view, control), (control, None)]))
    shown = [(row.view.model.name, row.judgement.expectation.id, row.judgement.verdict) for row in rows]
    assert shown == [
        ("planted", "a", Verdict.SUPPORTED),
        ("planted", "b", Verdict.SUPPORTED),
        ("planted@control", "a", Verdict.INCONCLUSIVE),
        ("planted@control", "b", Verdict.INCONCLUSIVE),
    ]
    assert rows[0].where == "h.toml:7"
    assert list(rows[0].variants) == ["raw", "sink_free"]
    assert [row.judgement for row in rows[:2]] == [rows[0].variants["raw"], rows[1].variants["sink_free"]]
    assert rows[0].variants["sink_free"].observed == rows[1].judgement.observed


def test_a_claim_of_a_variant_that_was_not_measured_is_shown_with_those_that_were(view: RecordView) -> None:
    claim = expectation(threshold=0.5, variant="centred")
    row = judge_claim(hypothesis(claim), claim, view)
    assert row.judgement.reason == "variant centred was not measured"
    assert [judgement.verdict for judgement in row.variants.values()] == [Verdict.SUPPORTED] * 2


def test_claims_against_random_weights_are_judged_so_under_every_variant(view: RecordView, control: RecordView) -> None:
    claim = expectation(than={"null": "random-weights"})
    variants = judge_claim(hypothesis(claim), claim, view, control).variants
    assert {judgement.verdict for judgement in variants.values()} == {Verdict.SUPPORTED}


def test_a_run_measures_the_parts_that_its_claims_name_on_either_side() -> None:
    assert parts_of_claims([expectation(threshold=1)]) == {"spectra"}
    assert parts_of_claims([expectation(metric="sharing_index", threshold=1)]) == {"spectra", "law"}
    other = expectation(metric="gamma", scope="model", than={"scope": "model", "metric": "boundary_p"})
    assert parts_of_claims([expectation(threshold=1), other]) == {"spectra", "boundaries"}


@pytest.mark.parametrize(
    ("verdicts", "combined"),
    [
        ([Verdict.SUPPORTED, Verdict.SUPPORTED], Verdict.SUPPORTED),
        ([Verdict.SUPPORTED, Verdict.INCONCLUSIVE], Verdict.INCONCLUSIVE),
        ([Verdict.INCONCLUSIVE, Verdict.NOT_MEASURED], Verdict.NOT_MEASURED),
        ([Verdict.NOT_MEASURED, Verdict.REFUTED, Verdict.SUPPORTED], Verdict.REFUTED),
    ],
)
def test_a_hypothesis_holds_when_all_its_claims_hold(verdicts: list[Verdict], combined: Verdict) -> None:
    assert combine_verdicts(verdicts) is combined


def test_a_control_without_arrays_leaves_open_whether_a_claim_is_vacuous(view: RecordView, control: RecordView) -> None:
    unknown = judged(view, RecordView(control.record), metric="intra_cosine", than={"scope": "E"})
    assert unknown.verdict is Verdict.SUPPORTED
    assert not unknown.vacuous
    assert "not known whether random weights meet it, too" in unknown.notes[-1]
