"""Which records count, what may share a table, and what is said of the rest."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from delta_suite.claims.judge import judge
from delta_suite.claims.loader import load_hypotheses
from delta_suite.claims.verdict import Verdict
from delta_suite.errors import RecordError
from delta_suite.publish.board import build
from delta_suite.publish.board_tables import worst_text
from delta_suite.publish.leaderboard import files
from delta_suite.publish.model_tables import calibration_text, special_tokens_text
from delta_suite.publish.site.compare_page import compare_page
from delta_suite.publish.site.index_page import index_page
from delta_suite.publish.verdict_tables import variant_cells
from delta_suite.records import store
from delta_suite.records.record import CalibrationRecord
from delta_suite.records.store import load

from tests.publish.conftest import Place, created, with_calibration, with_source


def test_verdicts_are_those_of_the_judge(place: Place) -> None:
    path = place.add()
    (group,) = place.board().groups
    (entry,) = group.entries
    measurement = load(path)
    expected = [
        (hypothesis.id, expectation.id, judge(hypothesis, expectation, measurement).verdict.value)
        for hypothesis in load_hypotheses([place.root / "hypotheses"])
        for expectation in hypothesis.expect
    ]
    assert [(row.hypothesis, row.expectation, row.verdict) for row in entry.rows] == expected
    tallies = {tally.hypothesis: tally for tally in entry.tallies}
    for name, tally in tallies.items():
        verdicts = [verdict for hypothesis, _, verdict in expected if hypothesis == name]
        assert tally.supported == verdicts.count("PASS")
        assert tally.refuted == verdicts.count("FAIL")
        assert tally.supported + tally.refuted + tally.inconclusive + tally.not_measured == len(verdicts)


@pytest.mark.parametrize(
    "change",
    [
        with_calibration("core", "f" * 64),
        with_calibration("seed", "f" * 64),
        lambda record: record["provenance"]["metric_versions"].update(intra_cosine=99),
        lambda record: record["provenance"].update(dtype="bfloat16"),
        with_source("package:it/Model.Q4_1.gguf"),
        lambda record: record["provenance"]["settings"].update(max_tokens=128),
        lambda record: record["calibration"].update(begins_with=[["<s>", 1]]),
        lambda record: record["calibration"].update(chat_template=True),
        lambda record: [record["calibration"].pop(key) for key in ("begins_with", "ends_with", "chat_template")],
    ],
    ids=[
        "calibration",
        "same name, other texts",
        "metric version",
        "dtype",
        "quantisation",
        "setting",
        "BOS",
        "chat template",
        "not recorded",
    ],
)
def test_what_is_not_comparable_never_shares_a_table(place: Place, change) -> None:  # type: ignore[no-untyped-def]
    place.add("one")
    place.add("two")
    place.add("other", change=change)
    groups = place.board().groups
    assert sorted([entry.model for entry in group.entries] for group in groups) == [["one", "two"], ["other"]]
    assert len({group.title + group.described for group in groups}) == 2


def test_the_newest_record_counts_and_the_others_are_listed(place: Place) -> None:
    place.add(file="20261124T100000Z-aaaaaaaa")
    newest = place.add(file="20200101T000000Z-bbbbbbbb", change=created("2026-11-25T00:00:00Z"))
    board = place.board()
    (entry,) = board.groups[0].entries
    assert entry.record == newest.relative_to(place.results).as_posix()
    (old,) = board.superseded
    assert (old.record, old.by) == ("runs/tiny/20261124T100000Z-aaaaaaaa.json", entry.record)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["provenance"]["metric_versions"].update(gamma=99),
        lambda record: record["provenance"]["metric_versions"].pop("sharing_index"),
    ],
    ids=["a metric that no page compares", "older than a metric"],
)
def test_a_metric_that_is_not_compared_splits_no_table(place: Place, change) -> None:  # type: ignore[no-untyped-def]
    place.add("one")
    place.add("two", change=change)
    (group,) = place.board().groups
    assert [entry.model for entry in group.entries] == ["one", "two"]


def test_another_dtype_is_another_table_and_supersedes_nothing(place: Place) -> None:
    place.add()
    place.add(file="20261124T100000Z-bbbbbbbb", change=lambda record: record["provenance"].update(dtype="bfloat16"))
    board = place.board()
    assert [(group.precision, group.entries[0].model) for group in board.groups] == [
        ("bfloat16", "tiny"),
        ("float32", "tiny"),
    ]
    assert board.superseded == ()


def test_the_worst_is_of_refuted_claims_and_in_standard_errors(place: Place) -> None:
    place.add()
    (entry,) = place.board().groups[0].entries
    near, far = (replace(entry.rows[0], verdict="FAIL", margin=margin) for margin in (-100.0, -0.1))
    rows = (
        replace(near, expectation="near", standard_errors=-2.0),
        replace(far, expectation="far", standard_errors=-9.0),
        replace(far, expectation="open", verdict="INCONCLUSIVE", standard_errors=-50.0),
        replace(far, expectation="rank", standard_errors=None),
    )
    assert worst_text(replace(entry, rows=rows)) == f"-9.0 {rows[0].hypothesis}/far"
    assert replace(entry, rows=rows[2:]).worst is None


def test_a_refuted_claim_that_warns_is_one_word_under_every_variant(place: Place) -> None:
    place.add()
    row = place.board().groups[0].entries[0].rows[0]
    warns = replace(row, severity="warn", verdict="FAIL", variants={"raw": ("FAIL", 0.1), "centred": ("PASS", 0.9)})
    assert [cell.verdict for cell in variant_cells(warns, ["raw", "centred"])] == ["WARN", "PASS"]


@pytest.mark.parametrize(
    ("damage", "telling"),
    [
        (lambda text: text[: len(text) // 2], "at the whole file: "),
        (lambda text: text.replace('"schema": 3', '"schema": 7'), "at schema"),
        (lambda text: text.replace('"value": ', '"value": NaN, "x": ', 1), "NaN is no number"),
        (lambda text: text.replace('"layers": 12', '"layers": 14'), "it says 14 layers and holds 12"),
        (lambda text: text.replace('"E": [9, 11]', '"E": [9, 12]', 1), "reaches past"),
        (lambda text: text.replace('"sink_free": {', '"sinkfree": {', 1), "same variants"),
        (lambda text: "", "at the whole file"),
    ],
    ids=["cut", "schema", "nan", "layers", "phase", "variants", "empty"],
)
def test_a_broken_record_is_one_line_and_the_rest_is_built(place: Place, damage, telling: str) -> None:  # type: ignore[no-untyped-def]
    place.add("whole")
    path = place.add("broken")
    text = path.read_text()
    path.write_text(damage(text))
    assert path.read_text() != text
    board = place.board()
    assert [entry.model for group in board.groups for entry in group.entries] == ["whole"]
    (broken,) = board.broken
    assert telling in broken.why
    assert broken.why.startswith("runs/broken/")
    assert "\n" not in broken.why
    assert str(place.root) not in broken.why


def test_a_record_older_than_a_metric_is_not_measured_by_it(place: Place) -> None:
    def forget(record):  # type: ignore[no-untyped-def]
        for layer in record["layers"]:
            for metrics in layer["metrics"].values():
                del metrics["effective_rank"]

    place.add(change=forget)
    board = place.board()
    row = next(row for row in board.groups[0].entries[0].rows if row.expectation == "more-ranks-per-layer-than-e")
    assert row.verdict == Verdict.NOT_MEASURED.value
    assert "older than the metric effective_rank" in str(row.reason)


def test_links_lead_to_the_claim_and_the_record(place: Place) -> None:
    path = place.add()
    board = place.board()
    row = next(row for row in board.groups[0].entries[0].rows if row.hypothesis == "phase-c")
    page = board.claim_link(row.where, "site/models")
    link = board.claim_link(row.where, "")
    assert link is not None
    file, _, line = link.partition("#L")
    assert page == f"../hypotheses/phase-c.html#L{line}"
    target = place.results / file
    assert target.resolve() == (place.root / "hypotheses" / "phase_c.toml").resolve()
    assert "[[expect]]" in target.resolve().read_text().splitlines()[int(line) - 1]
    record = board.groups[0].entries[0].record
    assert board.record_link(record, "site") is None  # the site's folder alone does not have it
    assert (place.results / str(board.record_link(record, ""))).resolve() == path.resolve()
    copied = place.board(with_records=True)
    assert copied.record_link(record, "site/models") == f"../{record.replace('runs/', 'records/')}"
    content = dict(files(copied))
    assert content[f"site/{record.replace('runs/', 'records/')}"] == path.read_bytes()
    assert f"site/{record.replace('runs/', 'records/').replace('.json', '.safetensors')}" in content
    away = place.board("https://example.org/me/it/blob/main/")
    assert away.claim_link(row.where, "") == f"https://example.org/me/it/blob/main/hypotheses/phase_c.toml#L{line}"
    assert str(away.record_link(record, "site")).startswith("https://example.org/me/it/blob/main/results/runs/tiny/")


def test_a_claim_outside_the_repository_has_a_place_but_no_link(place: Place, tmp_path: Path) -> None:
    place.add()
    elsewhere = tmp_path / "elsewhere" / "claims"
    (place.root / "hypotheses").rename(elsewhere.parent.mkdir() or elsewhere)
    board = build(place.results, load_hypotheses([elsewhere]))
    row = next(row for row in board.groups[0].entries[0].rows if row.hypothesis == "phase-c")
    assert board.claim_link(row.where, "") is None
    assert str(board.claim_link(row.where, "site")).startswith("hypotheses/phase-c.html#L")
    assert board.claim_place(row.where).startswith("claims/phase_c.toml:")


def test_without_records_it_says_where_they_are_written(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="delta-suite measure NAME"):
        build(tmp_path, [])


def test_building_imports_neither_torch_nor_transformers(place: Place) -> None:
    place.add()
    code = (
        "import sys; from pathlib import Path; from delta_suite.claims.loader import load_hypotheses\n"
        "from delta_suite.publish.board import build; from delta_suite.publish.leaderboard import files\n"
        "root = Path(sys.argv[1]); dict(files(build(root / 'results', load_hypotheses([root / 'hypotheses']))))\n"
        "print({'torch', 'transformers', 'matplotlib', 'plotly'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, place.root], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "set()"


def test_what_the_tokenizer_did_is_told() -> None:
    record = CalibrationRecord(name="mine", sha256="", documents=3, tokens=40, dropped=0)
    assert calibration_text(record) == "calibration mine, 3 documents, 40 tokens"
    assert special_tokens_text(record) == "not recorded"
    known = record.model_copy(update={"unknown_tokens": 0.05, "duplicates": 0, "begins_with": (), "ends_with": ()})
    assert calibration_text(known) == calibration_text(record)
    assert special_tokens_text(known) == "none before each document, none after it"
    told = record.model_copy(update={"unknown_tokens": 0.0712, "duplicates": 2, "chat_template": True})
    assert calibration_text(told) == (
        "calibration mine, 3 documents (2 more were repetitions, and left out) in the model's chat template, 40 tokens "
        "(7.1% of the text unknown to the tokenizer)"
    )


def test_a_record_is_examined_once_in_its_place_and_its_arrays_are_looked_at_each_time(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place.add()
    examined = []
    examine = store.examine
    monkeypatch.setattr(store, "examine", lambda path, cache=None: examined.append(path) or examine(path, cache))
    for _ in range(2):
        assert len(place.board().groups) == 1
    assert examined == [path]
    elsewhere = path.parent.with_name("other") / path.name
    shutil.copytree(path.parent, elsewhere.parent)
    place.board()
    assert examined == [path, elsewhere]
    shutil.rmtree(elsewhere.parent)
    beside = path.with_suffix(".safetensors")
    beside.write_bytes(beside.read_bytes()[:-1] + b"?")
    assert "its SHA-256 is another" in place.board().broken[0].why


def test_the_first_page_and_the_comparison_begin_with_the_table_of_most_models(place: Place) -> None:
    place.add("a", change=with_calibration("core", "0" * 64))
    for name in ("b", "c"):
        place.add(name)
    board = place.board()
    assert [len(group.entries) for group in board.groups] == [1, 2]  # as in the CSV
    ids = [group.id for group in board.largest_first]
    assert re.findall(r'<h2 id="([^"]+)">Calibration', index_page(board)) == ids
    options = re.findall(r'<option value="([^/"]+)/', compare_page(board))
    assert [*dict.fromkeys(options)] == ids
