"""Units of resampling: domains where they are declared, and the groups and halves that they are dealt into."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from delta_suite.capture.calibration import load_calibration
from delta_suite.capture.units import ADDED_GROUPS, DOMAIN_GROUPS, Units
from delta_suite.errors import CalibrationError
from hypothesis import given, settings
from hypothesis import strategies as st

DOMAINS = st.integers(1, 300).flatmap(lambda most: st.lists(st.integers(0, most).map(str), min_size=2, max_size=400))


@settings(deadline=None)
@given(DOMAINS, st.integers(2, 128).map(lambda most: most // 2 * 2))
def test_all_documents_of_a_domain_are_in_one_group_of_one_half(domains: list[str], most: int) -> None:
    units = Units.of(len(domains), domains)
    if len(set(domains)) == 1:
        assert units == Units.of(len(domains))
        return
    assert (units.unit, units.count) == ("domain", len(set(domains)))
    for dealt in (units, units.at_most(most)):
        assert len(set(zip(domains, dealt.groups, strict=True))) == units.count
        assert set(dealt.groups) == set(range(min(units.count, DOMAIN_GROUPS if dealt is units else most)))
    # The narrower question keeps the halves, and splits domains.
    assert (units.documents is None) == (min(Counter(domains).values()) == 1)
    if units.documents is None:
        return
    assert [group % 2 for group in units.documents] == [group % 2 for group in units.groups]
    assert set(units.documents) == set(range(units.document_group_count))


@settings(deadline=None)
@given(DOMAINS)
def test_halves_have_as_many_domains_and_nearly_as_many_documents(domains: list[str]) -> None:
    units = Units.of(len(domains), domains)
    half = {domain: group % 2 for domain, group in zip(domains, units.groups, strict=True)}
    if units.unit == "domain":
        assert abs(list(half.values()).count(0) - list(half.values()).count(1)) <= 1
        documents = Counter(group % 2 for group in units.groups)
        assert abs(documents[0] - documents[1]) <= max(Counter(domains).values())


def test_core_is_resampled_by_domain_and_the_first_documents_too() -> None:
    core = load_calibration("core")
    assert core.units.unit == "domain"
    assert core.units.count == len(set(core.domains)) >= 17
    assert len(core.languages) == len(core.domains) == len(core.documents)
    first = load_calibration("core", documents=5)
    assert first.domains == core.domains[:5]
    assert load_calibration("seed").units == Units.of(1)
    assert core.units.at_most(ADDED_GROUPS).group_count <= ADDED_GROUPS
    assert core.units.groups == tuple(range(len(core.documents)))  # one document each, in order
    assert core.units.documents is None


def _jsonl(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_tables_may_name_domain_and_language(tmp_path: Path, ending: str) -> None:
    rows: list[dict[str, object]] = [
        {"text": "one", "domain": "news", "language": "en"},
        {"text": "zwei", "domain": "law", "language": None},
        {"text": "three", "domain": "news", "language": "en"},
    ]
    path = tmp_path / f"texts.{ending}"
    if ending == "jsonl":
        _jsonl(path, rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    calibration = load_calibration(str(path))
    assert calibration.domains == ("news", "law", "news")
    assert calibration.languages == ("en", None, "en")
    # What a text is taken for changes no text: the hash is that of the texts.
    assert (
        calibration.sha256
        == load_calibration(_jsonl(tmp_path / "bare.jsonl", [{"text": r["text"]} for r in rows])).sha256
    )


def test_a_domain_is_named_for_every_document_or_for_none(tmp_path: Path) -> None:
    some = _jsonl(tmp_path / "some.jsonl", [{"text": "a", "domain": "x"}, {"text": "b"}])
    with pytest.raises(
        CalibrationError, match=r"some.jsonl:1 has a `domain` and .*some.jsonl:2 has none\. Name that of every"
    ):
        load_calibration(some)
    odd = _jsonl(tmp_path / "odd.jsonl", [{"text": "a", "domain": ["x"]}])
    with pytest.raises(CalibrationError, match=r"odd.jsonl:1: not a document: `domain` is list, not text\. Write"):
        load_calibration(odd)
    numbered = _jsonl(tmp_path / "numbered.jsonl", [{"text": "a", "domain": 1}, {"text": "b", "domain": 2}])
    assert load_calibration(numbered).domains == ("1", "2")
