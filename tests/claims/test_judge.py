"""Judging: verdicts on planted truth, with the arrays of a record and without, and many claims on many records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from delta_suite.claims.judge import judge, judge_all, judge_claim, parts_of_claims
from delta_suite.claims.null_kinds import NO_CONTROL, NULLS
from delta_suite.claims.schema import Expectation, Hypothesis, Than
from delta_suite.claims.verdict import Judgement, Verdict, combine_verdicts
from delta_suite.records.view import RecordView
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


def judged(view: RecordView, control: RecordView | None = None, **keys: Any) -> Judgement:
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


@pytest.mark.parametrize(("threshold", "verdict"), [(0.9, Verdict.SUPPORTED), (1.1, Verdict.REFUTED)])
def test_claims_of_each_layer_are_judged_without_arrays(
    view: RecordView, bare: RecordView, threshold: float, verdict: Verdict
) -> None:
    for record in (view, bare):
        judgement = judged(record, metric="reliability", scope="E", over="each", mostly=0.8, threshold=threshold)
        assert (judgement.verdict, judgement.required) == (verdict, 0.8)
        assert judgement.observed == (1.0 if verdict is Verdict.SUPPORTED else 0.0)


def test_ranks_and_p_values_are_judged_without_an_interval(view: RecordView) -> None:
    p = judged(view, metric="boundary_p", scope="model", op="<=", threshold=0.05)
    assert p.observation.value is not None
    assert p.observation.interval is None
    assert p.verdict is (Verdict.SUPPORTED if p.observation.value <= 0.05 else Verdict.REFUTED)


# --- the other side --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("than", "verdict"),
    [
        ({"scope": "E", "times": 2.0}, Verdict.SUPPORTED),
        ({"scope": "E", "plus": 0.9}, Verdict.REFUTED),
        ({"null": "window"}, Verdict.SUPPORTED),
        ({"null": "lag"}, Verdict.SUPPORTED),
        ({"null": "lag", "times": 100.0}, Verdict.REFUTED),
        ({"null": "random"}, Verdict.SUPPORTED),
        ({"null": "random-weights"}, Verdict.NOT_MEASURED),
    ],
)
def test_comparisons_find_what_was_planted(view: RecordView, than: dict[str, Any], verdict: Verdict) -> None:
    assert judged(view, than=than).verdict is verdict


def test_the_phase_that_shares_nothing_is_above_no_null(view: RecordView) -> None:
    for null in ("window", "lag", "random"):
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


def test_too_few_windows_decide_nothing(control: RecordView) -> None:
    judgement = judged(control, than={"null": "window"})
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert "null: a model of 12 layers has 9 windows of 4, so no rank among them has a p below 0.111" in str(
        judgement.reason
    )


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
