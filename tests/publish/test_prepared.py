"""What is formed of a record once, and kept by content: never stale, and the same in one process as in two."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from delta_suite.claims.loader import load_hypotheses
from delta_suite.pool import Pool
from delta_suite.publish import prepared
from delta_suite.publish.board import build
from delta_suite.publish.leaderboard import files

from tests.planted_records import planted_view, write_copies
from tests.publish.conftest import HYPOTHESES, Place, checkpoint, with_boundaries, with_intervals


def content(place: Place) -> dict[str, bytes]:
    return dict(files(place.board()))


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The records that were read whole, in order."""
    paths: list[Path] = []
    load = prepared.load_content

    def noted(stored: Any, cache: Any) -> Any:
        paths.append(stored.path)
        return load(stored, cache)

    monkeypatch.setattr(prepared, "load_content", noted)
    return paths


def test_what_was_formed_is_not_formed_again(place: Place, formed: list[Path]) -> None:
    paths = {place.add("a", change=with_intervals), place.add("b", change=with_boundaries)}
    paths |= {place.add(f"big--checkpoint-{step}", change=checkpoint(step)) for step in (1, 2)}
    before = content(place)
    assert any(name.startswith("site/trajectories/") for name in before)
    assert sorted(formed) == sorted(paths)  # each once: it is judged when it is read
    formed.clear()
    assert content(place) == before
    assert formed == []


def test_a_changed_record_array_or_hypothesis_is_noticed(place: Place, formed: list[Path]) -> None:
    path, other = place.add("a", change=with_intervals), place.add("b")
    before = content(place)
    formed.clear()
    path.write_text(path.read_text("utf-8").replace('"LlamaForCausalLM"', '"Other"'), "utf-8")
    assert content(place) != before
    assert set(formed) == {path}
    formed.clear()
    other.with_suffix(".safetensors").write_bytes(b"damaged")
    assert "b" not in place.board().models
    assert set(formed) == {other}
    formed.clear()
    file = place.root / "hypotheses" / "phase_c.toml"
    file.write_text(re.sub(r"^threshold = .*$", "threshold = 0.01", file.read_text("utf-8"), flags=re.MULTILINE))
    content(place)
    assert path in formed


def test_what_the_cache_has_damaged_is_formed_again(place: Place, own_cache: Path, formed: list[Path]) -> None:
    path = place.add("a", change=with_intervals)
    before = content(place)
    kept = [file for file in (own_cache / "formed").rglob("*") if file.is_file()]
    assert len(kept) == 3  # its head, what is drawn of it, and its verdicts
    for damage in (b"", b"x\x9c", kept[0].read_bytes()):
        formed.clear()
        for file in kept:
            file.write_bytes(damage)
        assert content(place) == before
        assert path in formed


def test_without_a_cache_that_can_be_written_the_bytes_are_the_same(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.add("a", change=with_intervals)
    before = content(place)
    monkeypatch.setenv("DELTA_SUITE_CACHE", "/dev/null/nowhere")
    assert content(place) == before


def test_what_other_code_kept_is_removed(place: Place, own_cache: Path) -> None:
    earlier = own_cache / "formed" / "0123456789abcdef" / "x-head"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"")
    place.add("a")
    content(place)
    assert not earlier.parent.exists()
    assert len([*(own_cache / "formed").iterdir()]) == 1


def test_one_process_and_two_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, hypotheses = tmp_path / "results", load_hypotheses([HYPOTHESES / "phase_e.toml"])
    write_copies(results, planted_view(), 12)
    torn = next(results.glob("runs/*11*/*.json"))
    torn.write_text("{")
    built = []
    for processes in (1, 2):
        monkeypatch.setenv("DELTA_SUITE_CACHE", str(tmp_path / str(processes)))
        with Pool(processes, worthwhile=0.0) as pool:
            board = build(results, hypotheses, pool=pool)
            assert (len(board.models), len(board.broken)) == (11, 1)
            built.append(dict(files(board, pool)))
    assert built[0] == built[1]
