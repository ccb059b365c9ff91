"""Baseline files: written, read, renewed, added to and refused; on records of planted truth."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from delta_suite.errors import BaselineError, RecordError
from delta_suite.metrics.estimate import Estimate
from delta_suite.records.arrays import ArrayFile, pack, unpack
from delta_suite.records.record import LawRecord
from delta_suite.records.view import RecordView
from delta_suite.regression.baseline import (
    BaselineFile,
    VerdictEntry,
    arrays_path,
    baseline_path,
    directions_path,
    load_baseline,
    load_outdated,
    refuse_shared,
    unknown_keys,
)
from delta_suite.regression.comparison import Comparison, Status, by_item, estimate_at, figures, item_of, worst
from delta_suite.regression.items import RECORD, TURN_ITEMS, item_names
from delta_suite.regression.turns import direction_figures
from delta_suite.regression.update import update_baseline

from tests.regression.planted import GROUPS, HIDDEN, LAYERS, PHASES, planted

PASSED = VerdictEntry(verdict="PASS", observed=0.5, claim="a claim", file="hypotheses/claims.toml")
FAILED = PASSED.model_copy(update={"verdict": "FAIL"})
UNDECIDED = PASSED.model_copy(update={"verdict": "INCONCLUSIVE"})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a baseline of the planted model, for tests to copy."""
    folder = tmp_path_factory.mktemp("written")
    update_baseline(folder / "m.json", planted(), {"claims/one": PASSED})
    return folder


@pytest.fixture
def path(written: Path, tmp_path: Path) -> Path:
    """A baseline of the planted model that a test may change."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return tmp_path / "m.json"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def compared(file: BaselineFile, now: RecordView, **options: Any) -> list[Comparison]:
    return file.compare(now, direction_figures(now), **options)


def changed_items(file: BaselineFile, now: RecordView) -> set[str]:
    return {item for item, group in by_item(compared(file, now)).items() if worst(group) is not Status.SAME}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- a file and those beside it --------------------------------------------------------------------------------


def test_a_baseline_is_three_files_that_read_back_without_a_cache(path: Path) -> None:
    assert {file.name for file in path.parent.iterdir()} == {"m.json", "m.arrays.safetensors", "m.safetensors"}
    file, measured = load_baseline(path), planted()
    assert file.content.verdicts == {"claims/one": PASSED}
    assert [change.action for change in file.content.history] == ["created"]
    directions = direction_figures(measured)
    assert directions.keys() == file.directions.keys()
    assert file.directions["raw.directions"].dtype == np.float16
    assert file.directions["raw.halves.direction_turn"] == pytest.approx(directions["raw.halves.direction_turn"])
    for place in (
        ("raw", "layer:2", "stream_norm"),
        ("sink_free", "C", "intra_cosine"),
        ("raw", "C", "shared_fraction"),
    ):
        assert estimate_at(file.view, place).value == pytest.approx(estimate_at(measured, place).value, rel=1e-8)
        assert estimate_at(file.view, place).replicates == pytest.approx(estimate_at(measured, place).replicates)


def test_the_same_record_is_the_same_and_a_changed_one_names_what_changed(path: Path) -> None:
    file = load_baseline(path)
    assert {comparison.status for comparison in compared(file, planted())} == {Status.SAME}
    assert changed_items(file, planted(shift=1.0)) == {"layers/stream_norm"}
    turned = changed_items(file, planted(turn=40.0))
    assert "layers/direction_turn" in turned
    assert "layers/stream_norm" not in turned


def test_only_raw_and_sink_free_and_only_what_the_cosines_give_is_compared_over_the_model(path: Path) -> None:
    items = by_item(compared(load_baseline(path), planted()))
    assert {comparison.variant for group in items.values() for comparison in group} == {"raw", "sink_free"}
    assert {"model/intra_cosine", "C/shared_fraction"} <= items.keys()
    assert items.keys().isdisjoint({"model/shared_fraction", "model/capture_fraction_held_out"})


def test_comparing_needs_no_cache_but_for_the_turning(path: Path) -> None:
    comparisons = compared(load_baseline(path), planted(with_directions=False))
    counted = Counter((comparison.status, comparison.metric.endswith("_turn")) for comparison in comparisons)
    assert set(counted) == {(Status.SAME, False), (Status.NOT_MEASURED, True)}


@pytest.mark.parametrize("beside", [arrays_path, directions_path])
def test_a_file_beside_that_is_another_is_refused(path: Path, beside: Callable[[Path], Path]) -> None:
    arrays = unpack(beside(path).read_bytes(), path)
    beside(path).write_bytes(pack({name: -array for name, array in arrays.items()}))
    with pytest.raises(BaselineError, match=rf"{beside(path).name} is not .*its SHA-256 is another\.\n  Take"):
        load_baseline(path)


def test_arrays_that_are_gone_are_an_error_that_says_how_to_write_them_anew(path: Path) -> None:
    arrays_path(path).unlink()
    with pytest.raises(BaselineError, match=r"(?s)arrays\.safetensors cannot be read.*remove both.*--baseline-update"):
        load_baseline(path)


@pytest.mark.parametrize("shape", [(3,), (), (LAYERS, 8, HIDDEN + 1), (LAYERS + 1, 8, HIDDEN)])
def test_directions_of_another_shape_are_refused_without_a_sha256_too(path: Path, shape: tuple[int, ...]) -> None:
    directions_path(path).write_bytes(pack({"raw.directions": np.zeros(shape)}))
    edit(path, lambda content: content.pop("directions_sha256"))
    with pytest.raises(BaselineError, match=f"of a model of {LAYERS} layers x {HIDDEN}"):
        load_baseline(path)


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        (lambda content: content.update(tolerance={}), "at tolerance: Extra inputs"),
        (lambda content: content.update(tolerances={"gamma": -1}), r"at tolerances\.gamma: "),
        (lambda content: content.update(schema=99), "at schema: "),
        (lambda content: content.pop("record"), "at record: "),
        (lambda content: content["record"]["layers"].pop(), "at record: .*it says 4 layers and holds 3"),
    ],
)
def test_a_damaged_baseline_is_refused_with_the_key(path: Path, change: Callable[..., object], telling: str) -> None:
    edit(path, change)
    with pytest.raises(BaselineError, match=rf"(?s)is not a baseline of schema 2:\n  {telling}.*Correct it"):
        load_baseline(path)


@pytest.mark.parametrize(
    ("content", "kind"),
    [({"foo": 1}, "another JSON file"), ({}, "another JSON file"), (None, "a measurement record")],
)
def test_another_file_is_told_by_what_it_is(path: Path, content: object, kind: str) -> None:
    content = json.loads(path.read_text())["record"] if content is None else content
    path.write_text(json.dumps(content))
    with pytest.raises(
        BaselineError, match=rf"m\.json is {kind}, not a baseline: .*\n.*PATH --baseline-update` writes"
    ):
        load_baseline(path)


def test_a_baseline_that_is_not_there_names_those_that_are(path: Path) -> None:
    with pytest.raises(BaselineError, match=r"no baseline .*other\.json: .* holds m\.json"):
        load_baseline(path.with_name("other.json"))


def test_where_baselines_lie() -> None:
    results = Path("results")
    assert baseline_path(None, results, "org/m") == results / "baselines" / "org--m.json"
    assert baseline_path(Path("folder"), results, "m") == Path("folder/m.json")
    assert baseline_path(Path("run.json"), results, "m") == Path("run.json")
    with pytest.raises(BaselineError, match=r"a and b would both be written to run\.json"):
        refuse_shared({"a": Path("run.json"), "b": Path("run.json")})


def test_tolerances_for_what_does_not_exist_are_listed(path: Path) -> None:
    known = ("gamma", "layers/gamma", "C/intra_cosine", "model/intra_cosine", "layers/direction_turn")
    edit(path, lambda content: content.update(tolerances=dict.fromkeys([*known, "gama", "Z/gamma"], 1.0)))
    assert unknown_keys(load_baseline(path)) == ["gama", "Z/gamma"]


# --- verdicts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "calibration", "status"),
    [
        (PASSED, PASSED, "a", Status.SAME),
        (PASSED, FAILED, "a", Status.FLIP),
        (PASSED, UNDECIDED, "a", Status.FLIP),
        (PASSED, FAILED, "b", Status.FLIP),
        (PASSED, UNDECIDED, "b", Status.SAME),
        (PASSED, None, "a", Status.GONE),
        (PASSED, PASSED.model_copy(update={"claim": "another"}), "a", Status.NOT_COMPARABLE),
    ],
)
def test_a_verdict_flips_between_decisions_and_on_the_same_documents_always(
    path: Path, before: VerdictEntry, after: VerdictEntry | None, calibration: str, status: Status
) -> None:
    edit(path, lambda content: content.update(verdicts={"claims/one": before.model_dump()}))
    now = planted(calibration=calibration * 64)
    comparison = load_baseline(path).compare_verdict("claims/one", after, now, other_documents=True)
    assert comparison.status is status
    assert load_baseline(path).compare_verdict("claims/two", PASSED, now).status is Status.NEW


def test_an_expected_failure_has_the_reason_of_its_pattern(path: Path) -> None:
    edit(path, lambda content: content.update(xfail={"layers/*": "known"}))
    file = load_baseline(path)
    assert (file.expected_failure("layers/gamma"), file.expected_failure("C/gamma")) == ("known", None)
    assert file.idle_patterns(["layers/gamma", "C/intra_cosine"]) == []


def test_an_expected_failure_of_nothing_is_told_with_the_nearest_item(path: Path) -> None:
    edit(path, lambda content: content.update(xfail={"verdict/claims/onne": "known", "layers/*": "", "zzz": ""}))
    file = load_baseline(path)
    assert file.idle_patterns(["layers/gamma", "verdict/claims/one"]) == [
        f"{path}: xfail 'verdict/claims/onne' matches no item: did you mean 'verdict/claims/one'?",
        f"{path}: xfail 'zzz' matches no item.",
    ]


# --- overwriting and renewing ----------------------------------------------------------------------------------


def test_overwriting_needs_a_reason_and_leaves_the_users_keys(path: Path) -> None:
    edit(path, lambda content: content.update(tolerances={"gamma": 3.0}, other_documents=True))
    before = bytes_of(path.parent)
    with pytest.raises(BaselineError, match="is overwritten only with a reason"):
        update_baseline(path, planted(shift=1.0), {}, overwrite=True, reason=" ")
    assert bytes_of(path.parent) == before
    now = planted(shift=1.0, fingerprint="e" * 64)
    update_baseline(path, now, {"claims/two": FAILED}, overwrite=True, reason="another mix")
    file = load_baseline(path)
    assert (file.content.tolerances, file.content.other_documents) == ({"gamma": 3.0}, True)
    assert [(change.action, change.before) for change in file.content.history] == [
        ("created", None),
        ("overwritten", "f" * 64),
    ]
    assert file.content.verdicts == {"claims/two": FAILED}
    assert changed_items(file, now) == set()


def test_directions_that_the_cache_lost_do_not_stay_beside_another_record(path: Path) -> None:
    update_baseline(path, planted(turn=40.0, with_directions=False), {}, overwrite=True, reason="another mix")
    assert load_baseline(path).directions == {}


def schema_1(path: Path, **changes: Any) -> None:
    """Put a baseline of schema 1 in place of one of today, as delta-suite 0.1 wrote them."""
    record = json.loads(path.read_text())["record"]
    change = {"date": "2026-01-01T00:00:00Z", "action": "created", "reason": "first", "source": "m", "before": None}
    content = {
        "schema": 1,
        "tolerances": {"gamma": 3.0},
        "xfail": {"layers/*": "known"},
        "other_documents": True,
        "history": [change | {"entries": []}],
        "verdicts": {"claims/one": PASSED.model_dump()},
        "directions_sha256": None,
        "figures": {"model": record["model"], "estimates": {"raw": {}}, "created": "2026-01-01T00:00:00Z"},
    }
    path.write_text(json.dumps(content | changes))
    arrays_path(path).unlink()


def test_a_baseline_of_schema_1_is_refused_with_the_command_that_renews_it(path: Path) -> None:
    schema_1(path)
    command = f'pytest hypotheses --model=m --baseline={path} --baseline-update=all --baseline-reason="schema 2"'
    with pytest.raises(BaselineError) as refusal:
        load_baseline(path)
    assert str(refusal.value).splitlines()[-1].strip() == command
    with pytest.raises(BaselineError, match="baseline of schema 1"):
        update_baseline(path, planted(), {})


def test_renewing_a_baseline_of_schema_1_leaves_the_users_keys_and_its_history(path: Path) -> None:
    schema_1(path)
    update_baseline(path, planted(), {"claims/one": FAILED}, overwrite=True, reason="schema 2")
    file = load_baseline(path)
    assert (file.content.tolerances, file.content.xfail) == ({"gamma": 3.0}, {"layers/*": "known"})
    assert file.content.other_documents
    assert [change.reason for change in file.content.history] == ["first", "schema 2"]
    assert file.content.history[-1].before == "f" * 64
    assert file.content.verdicts == {"claims/one": FAILED}
    assert changed_items(file, planted()) == set()


def test_a_baseline_of_schema_1_about_another_model_or_damaged_is_left_as_it_was(path: Path) -> None:
    schema_1(path)
    edit(path, lambda content: content["figures"]["model"].update(layers=9))
    before = bytes_of(path.parent)
    with pytest.raises(BaselineError, match=r"is about another model, m \(Llama, 9 layers x 32\)"):
        update_baseline(path, planted(), {}, overwrite=True, reason="schema 2")
    assert bytes_of(path.parent) == before
    edit(path, lambda content: content.update(tolerances={"gamma": -3}))
    with pytest.raises(BaselineError, match=r"is not a baseline of schema 1:\n  at tolerances\.gamma: "):
        update_baseline(path, planted(), {}, overwrite=True, reason="schema 2")


def test_only_a_baseline_of_schema_1_is_outdated(path: Path) -> None:
    assert load_outdated(path) is None
    schema_1(path)
    outdated = load_outdated(path)
    assert outdated is not None
    assert set(outdated.verdicts) == {"claims/one"}


def test_a_model_of_another_shape_is_never_written(path: Path) -> None:
    before = bytes_of(path.parent)
    for overwrite in (True, False):
        with pytest.raises(BaselineError, match="is about another model, m"):
            update_baseline(path, planted(layers=3, phases={"A": (0, 2)}), {}, overwrite=overwrite, reason="why")
    assert bytes_of(path.parent) == before


def test_without_arrays_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="are not beside the record"):
        update_baseline(tmp_path / "m.json", RecordView(planted().record), {})
    assert list(tmp_path.iterdir()) == []


# --- adding ----------------------------------------------------------------------------------------------------


def without(path: Path, metric: str) -> None:
    """Take a metric of all layers and phases out of a baseline, as it is in one that is older than the metric."""

    def change(content: dict[str, Any]) -> None:
        content["record"]["provenance"]["metric_versions"].pop(metric)
        for holder in (*content["record"]["layers"], *content["record"]["scopes"].values()):
            for metrics in holder["metrics"].values():
                metrics.pop(metric, None)

    edit(path, change)


def test_what_is_there_is_left_as_it_was(path: Path) -> None:
    before = bytes_of(path.parent)
    line = update_baseline(path, planted(shift=9.0, turn=40.0), {"claims/one": FAILED})
    assert line.endswith("nothing new, left as it was")
    assert bytes_of(path.parent) == before


def test_added_figures_have_the_replicates_of_the_record_that_they_come_from(path: Path) -> None:
    """Layer by layer and over phases, also where the old arrays still hold replicates of another checkpoint."""
    without(path, "stream_norm")
    without(path, "intra_cosine")
    later = planted(spread=0.7, turn=20.0, seed=5, fingerprint="e" * 64)
    line = update_baseline(path, later, {"claims/two": PASSED})
    assert line.endswith("added A/intra_cosine, C/intra_cosine, layers/stream_norm, claims/two")
    file = load_baseline(path)
    for place in (("raw", "layer:1", "stream_norm"), ("raw", "A", "intra_cosine"), ("raw", "C", "intra_cosine")):
        assert estimate_at(file.view, place).value == pytest.approx(estimate_at(later, place).value)
        assert estimate_at(file.view, place).replicates == pytest.approx(estimate_at(later, place).replicates)
    untouched = ("sink_free", "layer:1", "reliability")
    assert estimate_at(file.view, untouched).replicates == pytest.approx(estimate_at(planted(), untouched).replicates)
    change = file.content.history[-1]
    assert (change.action, change.before) == ("added", "f" * 64)
    assert change.entries == ("A/intra_cosine", "C/intra_cosine", "layers/stream_norm", "claims/two")
    assert update_baseline(path, later, {}).endswith("nothing new, left as it was")


def test_a_figure_that_had_no_value_is_added_and_the_other_layers_keep_their_replicates(path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        layer = content["record"]["layers"][1]["metrics"]["raw"]
        layer["stream_norm"] = {"value": None, "reason": "no update"}

    edit(path, change)
    later = planted(spread=0.7)
    assert update_baseline(path, later, {}).endswith("added layers/stream_norm")
    view = load_baseline(path).view
    for layer, expected in ((0, planted()), (1, later)):
        place = ("raw", f"layer:{layer}", "stream_norm")
        assert estimate_at(view, place).replicates == pytest.approx(estimate_at(expected, place).replicates)


def test_a_new_phase_is_added_and_one_over_other_layers_is_not(path: Path) -> None:
    with_another = {"A": (0, 0), "C": (2, 3), "X": (1, 1)}
    update_baseline(path, planted(phases=with_another), {})
    file = load_baseline(path)
    assert file.view.phases == PHASES | {"X": (1, 1)}
    statuses = {item: worst(group) for item, group in by_item(compared(file, planted(phases=with_another))).items()}
    assert statuses["A/intra_cosine"] is Status.NOT_COMPARABLE
    assert statuses["C/shared_fraction"] is statuses["X/shared_fraction"] is Status.SAME


def with_law(view: RecordView) -> RecordView:
    """Return the view with a metric of the law over every phase, with its replicates."""
    scopes, rows = {}, []
    for index, (name, scope) in enumerate(view.record.scopes.items()):
        share, layers = 0.5 + index, range(scope.layers[0], scope.layers[1] + 1)
        estimate = Estimate(
            value=share,
            corrected=share,
            interval=(share, share),
            per_layer=dict.fromkeys(layers, share),
            detail={"tokens": 400, "documents": 40, "hidden": 32, "components": 32, "ridge": [0.1, 0.1]},
        )
        metrics = {**scope.metrics["sink_free"], "sharing_index": estimate}
        scopes[name] = scope.model_copy(update={"metrics": {**scope.metrics, "sink_free": metrics}})
        rows.append(np.full(GROUPS, 0.5 + index))
    update = {"scopes": scopes, "law": LawRecord(phases=view.phases), "parts": ("spectra", "law")}
    arrays = {**view.content(), "law.units.sharing_index": np.stack(rows)}
    return RecordView(view.record.model_copy(update=update), ArrayFile(Path("memory"), content=arrays), view.directions)


def test_a_part_that_is_measured_later_is_added_and_compared_once(path: Path) -> None:
    later = with_law(planted())
    assert update_baseline(path, later, {}).endswith("added A/sharing_index, C/sharing_index")
    file = load_baseline(path)
    assert file.content.record.parts == ("spectra", "law")
    assert estimate_at(file.view, ("sink_free", "C", "sharing_index")).replicates == (1.5,) * GROUPS
    group = by_item(compared(file, later))["C/sharing_index"]
    assert [(comparison.variant, comparison.status) for comparison in group] == [("sink_free", Status.SAME)]
    (missing,) = by_item(compared(file, planted()))["C/sharing_index"]
    assert (missing.status, missing.fails) == (Status.NOT_MEASURED, False)


def test_a_phase_that_is_added_later_has_its_law_too(path: Path) -> None:
    update_baseline(path, with_law(planted()), {})
    later = with_law(planted(phases={"X": (1, 1), "C": (2, 3), "A": (0, 1)}))
    update_baseline(path, later, {})
    view = load_baseline(path).view
    for name, first in (("A", 0.5), ("C", 1.5), ("X", 0.5)):
        assert estimate_at(view, ("sink_free", name, "sharing_index")).replicates == (first,) * GROUPS


def test_what_cannot_stand_beside_the_old_figures_is_refused(path: Path) -> None:
    without(path, "stream_norm")
    before = bytes_of(path.parent)
    with pytest.raises(BaselineError, match=r"(?s)stand beside the old figures: the calibration is another.*=all"):
        update_baseline(path, planted(calibration="b" * 64), {})
    assert bytes_of(path.parent) == before


def test_a_metric_that_this_version_does_not_have_any_more_is_gone(path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["record"]["provenance"]["metric_versions"] |= {"a_removed_metric": 1, "another_one": 1}
        content["record"]["scopes"]["C"]["metrics"]["raw"]["a_removed_metric"] = {"value": 1.0}
        content["record"]["layers"][0]["metrics"]["raw"]["another_one"] = {"value": 1.0}

    edit(path, change)
    items = by_item(compared(load_baseline(path), planted()))
    assert worst(items["C/a_removed_metric"]) is worst(items["layers/another_one"]) is Status.GONE


# --- what a run selected ---------------------------------------------------------------------------------------


def accept(path: Path, view: RecordView, *selected: str, **verdicts: VerdictEntry) -> str:
    claims = {f"claims/{name}": entry for name, entry in verdicts.items()}
    return update_baseline(path, view, claims, overwrite=True, reason="meant", selected=selected)


def test_only_what_was_selected_is_overwritten(path: Path) -> None:
    old, later = load_baseline(path), planted(shift=9.0, spread=0.7, turn=40.0, seed=5, fingerprint="e" * 64)
    directions = directions_path(path).read_bytes()
    line = accept(path, later, "layers/stream_norm", "C/intra_cosine")
    assert line.endswith("overwritten from m eeeeeeeeeeee: C/intra_cosine, layers/stream_norm")
    file = load_baseline(path)
    taken = 0
    for place in figures(planted()):
        selected = item_of(place) in {"layers/stream_norm", "C/intra_cosine"}
        expected, found = estimate_at((later if selected else old.view), place), estimate_at(file.view, place)
        assert found.value == pytest.approx(expected.value), place
        assert found.replicates == pytest.approx(expected.replicates), place
        taken += selected
    assert taken == 2 * (LAYERS + 1)
    assert file.content.verdicts == {"claims/one": PASSED}
    assert directions_path(path).read_bytes() == directions
    change = file.content.history[-1]
    assert (change.action, change.reason, change.before) == ("overwritten", "meant", "f" * 64)
    assert {"layers/stream_norm", "C/intra_cosine"}.isdisjoint(changed_items(file, later))
    assert "layers/direction_turn" in changed_items(file, later)


def test_verdicts_and_directions_are_selected_by_name(path: Path) -> None:
    update_baseline(path, planted(), {"claims/two": PASSED})
    later = planted(turn=40.0)
    accept(path, later, "verdict/claims/one", one=FAILED)
    assert load_baseline(path).content.verdicts == {"claims/one": FAILED, "claims/two": PASSED}
    accept(path, later, "verdict/claims/two")  # the claim is gone
    assert load_baseline(path).content.verdicts == {"claims/one": FAILED}
    assert "layers/direction_turn" in changed_items(load_baseline(path), later)
    accept(path, later, *TURN_ITEMS)
    assert set(TURN_ITEMS).isdisjoint(changed_items(load_baseline(path), later))


@pytest.mark.parametrize(
    ("selected", "options"),
    [
        (["layers/direction_turn"], {"turn": 40.0}),
        (["C/a_removed_metric"], {}),
        (["A/intra_cosine"], {"phases": {"A": (0, 0), "C": (2, 3)}}),
        ([RECORD], {"phases": {"A": (0, 0), "C": (2, 3)}}),
    ],
)
def test_what_cannot_be_overwritten_alone_is_refused(path: Path, selected: list[str], options: dict[str, Any]) -> None:
    def change(content: dict[str, Any]) -> None:
        content["record"]["provenance"]["metric_versions"]["a_removed_metric"] = 1
        content["record"]["scopes"]["C"]["metrics"]["raw"]["a_removed_metric"] = {"value": 1.0}

    edit(path, change)
    before = bytes_of(path.parent)
    with pytest.raises(BaselineError, match=rf"{selected[0]} cannot be overwritten alone"):
        accept(path, planted(**options), *selected)
    with pytest.raises(BaselineError, match=r"stand beside the old figures: the calibration is another"):
        accept(path, planted(calibration="b" * 64), *selected)
    assert bytes_of(path.parent) == before


def test_only_what_was_selected_is_added(path: Path) -> None:
    without(path, "stream_norm")
    without(path, "intra_cosine")
    directions_path(path).unlink()
    claims = {"claims/two": PASSED}
    line = update_baseline(path, planted(), claims, selected=["C/intra_cosine", "verdict/claims/two"])
    assert line.endswith("added C/intra_cosine, claims/two")
    assert not directions_path(path).exists()
    assert update_baseline(path, planted(), {}, selected=TURN_ITEMS).endswith("added directions")
    assert {"A/intra_cosine", "layers/stream_norm"} <= changed_items(load_baseline(path), planted())


def test_a_baseline_of_schema_1_is_not_renewed_in_part(path: Path) -> None:
    schema_1(path)
    with pytest.raises(BaselineError, match="renewed as a whole"):
        accept(path, planted(), "C/intra_cosine")


def test_all_names_of_items(path: Path) -> None:
    file = load_baseline(path)
    expected = {RECORD, *TURN_ITEMS, *by_item(compared(file, planted())), "verdict/claims/one"}
    assert expected <= set(item_names(file.view, file.content.verdicts))


# --- several writers, and one that is killed -------------------------------------------------------------------


def test_two_writers_with_caches_of_their_own_lose_nothing(path: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from delta_suite.regression.baseline import VerdictEntry\n"
        "from delta_suite.regression.update import update_baseline; from tests.regression.planted import planted\n"
        "for turn in range(5):\n"
        "    entry = VerdictEntry(verdict='PASS', observed=1.0, claim='c', file='h.toml')\n"
        "    update_baseline(Path(sys.argv[1]), planted(), {f'{sys.argv[2]}/{turn}': entry})"
    )
    before = set(load_baseline(path).content.verdicts)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, path, name],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"DELTA_SUITE_CACHE": str(tmp_path / name)},
        )
        for name in "ab"
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    content = load_baseline(path).content
    assert set(content.verdicts) - before == {f"{name}/{turn}" for name in "ab" for turn in range(5)}
    assert sum(change.action == "added" for change in content.history) == 10


KILLED = """
import sys
from pathlib import Path
from delta_suite.regression.update import update_baseline
from tests.crash.killing import kill_before
from tests.regression.planted import planted

path, step = Path(sys.argv[1]), int(sys.argv[2])
view = planted(turn=40.0, fingerprint="e" * 64)
kill_before(step, str(path.parent))
update_baseline(path, view, {}, overwrite=True, reason="meant")
"""


@pytest.mark.parametrize("step", [6, 8, 10, 12, 13, 14, 15])
def test_a_writer_that_is_killed_leaves_the_old_baseline_or_the_new_one(path: Path, step: int) -> None:
    """While files are written, and before each move: of the arrays, the directions, the JSON, and of the two again."""
    names = sorted(file.name for file in path.parent.iterdir())
    command = [sys.executable, "-c", KILLED, path, str(step)]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], check=False).returncode == -9
    file = load_baseline(path)
    turned = planted(turn=40.0, fingerprint="e" * 64)
    expected = {"f": planted(), "e": turned}[file.content.model.fingerprint[0]]
    assert all(comparison.status is Status.SAME for comparison in file.compare(expected, direction_figures(expected)))
    update_baseline(path, turned, {"claims/new": PASSED})
    assert sorted(file.name for file in path.parent.iterdir()) == names
