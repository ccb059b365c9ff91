"""The cache: entries whole or not at all, at any moment, and a cache that is read-only, full, damaged or shared."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from delta_suite.errors import RecordError
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Outcome, Settings, measure
from delta_suite.records.arrays import unpack
from delta_suite.records.assemble import Assembled
from delta_suite.records.cache import DIRECTIONS, Cache
from delta_suite.records.record import SubmitterRecord
from delta_suite.records.store import load

from tests import apart
from tests.tiny import DOCUMENTS, QUICK


def test_a_damaged_cache_entry_is_measured_again(small: Path, tmp_path: Path) -> None:
    settings = Settings(**QUICK, results=tmp_path / "results", cache=Cache(tmp_path / "cache"))
    spec = ModelSpec(name="tiny", path=small)
    first = measure(spec, settings)
    arrays = settings.cache.entry(first.view.record.provenance.cache_key) / "arrays.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:100])
    second = measure(spec, settings)
    assert not second.cached
    assert second.notes == (f"the cache entry {arrays.parent} was damaged, and is removed; tiny was measured again",)
    third = measure(spec, settings)
    assert (third.cached, third.notes) == (True, ())
    assert second.view.layers == first.view.layers


def measured(model: Path, results: Path) -> None:
    """Measure a model, and print whether the cache had it."""
    print(measure(ModelSpec(name="tiny", path=model), Settings(**QUICK, results=results)).cached)


def killed_when_it_keeps(model: Path, results: Path) -> None:
    """Measure a model, and be killed when the cache is to keep it."""
    Cache.put = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    measured(model, results)


def test_a_killed_run_leaves_no_entry_and_no_lock(small: Path, tmp_path: Path) -> None:
    """Killed while it measures: the next run starts from nothing and is not held up."""
    done = apart.run(killed_when_it_keeps, small, tmp_path / "results", DELTA_SUITE_CACHE=str(tmp_path / "cache"))
    assert done.code == -signal.SIGKILL
    settings = Settings(**QUICK, results=tmp_path / "results", cache=Cache(tmp_path / "cache"))
    assert not measure(ModelSpec(name="tiny", path=small), settings).cached
    assert len(list((tmp_path / "cache" / "measurements").iterdir())) == 1


def test_two_processes_measure_a_model_once(small: Path, tmp_path: Path) -> None:
    cache = {"DELTA_SUITE_CACHE": str(tmp_path / "cache")}
    running = [apart.start(measured, small, tmp_path / "results", **cache) for _ in range(2)]
    assert sorted(process.ended().out for process in running) == ["False\n", "True\n"]
    assert len(list((tmp_path / "results" / "runs" / "tiny").glob("*.json"))) == 1


def test_a_results_folder_that_cannot_be_written_is_named_and_the_cache_keeps_the_measurement(
    small: Path, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    settings = Settings(**QUICK, results=blocked, cache=Cache(tmp_path / "cache"))
    with pytest.raises(
        RecordError, match=r"cannot be written: Not a directory.* The cache keeps the measurement of tiny"
    ):
        measure(ModelSpec(name="tiny", path=small), settings)
    assert measure(ModelSpec(name="tiny", path=small), replace(settings, results=tmp_path / "results")).cached


def test_a_cache_that_cannot_be_written_is_a_note(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = Settings(**QUICK, results=tmp_path / "results", cache=Cache(tmp_path / "file"))
    measured = measure(ModelSpec(name="tiny", path=small), settings)
    assert "DELTA_SUITE_CACHE" in " ".join(measured.notes)
    assert load(measured.path).layers == measured.view.layers


def test_a_measurement_that_the_cache_has_no_room_for_is_recorded(
    tiny: Path, tmp_path: Path, largest_file: Callable[[int], None]
) -> None:
    spec, roomy = ModelSpec(name="tiny", path=tiny), Cache(tmp_path / "roomy")
    first = measure(spec, Settings(**QUICK, results=tmp_path / "results", cache=roomy))
    directions = (roomy.entry(first.view.record.provenance.cache_key) / DIRECTIONS).stat().st_size
    record = first.path.stat().st_size
    assert record < 0.9 * directions
    cache = Cache(tmp_path / "cache")
    largest_file((record + directions) // 2)
    measured = measure(spec, Settings(**QUICK, results=tmp_path / "others", cache=cache))
    assert re.search(
        r"in the cache, cannot be written: File too large\. Free space.* tiny is measured", " ".join(measured.notes)
    )
    assert load(measured.path).layers == first.view.layers
    assert load(measured.path).record.scopes == first.view.record.scopes
    assert list((cache.root / "measurements").iterdir()) == []


CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.utime")


def measured_read_only(cache: Path, model: Path, results: Path, documents: int) -> None:
    """Measure a model where the cache cannot be written, and print whether it had the model, and the notes."""

    def read_only(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if changes and str(arguments[0]).startswith(str(cache)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[0]))

    sys.addaudithook(read_only)  # root writes whatever the permissions are
    settings = Settings(**QUICK | {"documents": documents}, results=results, cache=Cache(cache))
    outcome = measure(ModelSpec(name="tiny", path=model), settings)
    print(outcome.cached, *outcome.notes)


def from_read_only(cache: Cache, model: Path, results: Path, documents: int) -> str:
    """Return what becomes of a measurement on a cache that is read-only."""
    done = apart.run(measured_read_only, cache.root, model, results, documents)
    assert done.code == 0, done.err
    return done.out


def test_a_read_only_cache_answers_without_a_lock(copied_cache: Cache, tiny: Path, tmp_path: Path) -> None:
    assert from_read_only(copied_cache, tiny, tmp_path / "results", DOCUMENTS) == "True\n"
    assert len(list((tmp_path / "results" / "runs" / "tiny").iterdir())) == 2
    assert not (copied_cache.root / "locks").exists()


def test_a_read_only_cache_does_not_hinder_a_measurement(small: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    cache.root.mkdir()
    text = from_read_only(cache, small, tmp_path / "results", QUICK["documents"])
    assert text.startswith(f"False {cache.root}/measurements")
    assert "Read-only file system. Free space, or set DELTA_SUITE_CACHE" in text
    assert len(list((tmp_path / "results" / "runs" / "tiny").iterdir())) == 2
    assert list(cache.root.iterdir()) == []


def test_an_entry_that_is_replaced_is_the_old_one_or_the_new_one_at_any_moment(
    outcome: tuple[Outcome, Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, cache = outcome[0].view, Cache(tmp_path)
    key = view.record.provenance.cache_key
    path = outcome[1].cache.entry(key) / DIRECTIONS
    directions = unpack(path.read_bytes(), path)
    old = Assembled(view.record, view.content(), directions)
    record = view.record.model_copy(update={"submitter": SubmitterRecord(handle="new")})
    new = Assembled(record, view.content(), directions)
    cache.put(key, old)
    seen = []

    def watched(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("os.rename", "os.remove", "os.rmdir") and not looking and watching:
            looking.append(event)
            entry = cache.get(key)
            seen.append(None if entry is None else entry.record.submitter is not None)
            looking.clear()

    looking: list[str] = []
    watching = [True]
    sys.addaudithook(watched)
    cache.put(key, new)
    watching.clear()
    assert None not in seen
    assert sorted(seen) == seen  # the old one, and from some moment on the new one
    assert set(seen) == {False, True}
    assert len(list((tmp_path / "measurements").iterdir())) == 1


def test_an_older_entry_that_a_killed_run_left_is_removed(
    outcome: tuple[Outcome, Settings], copied_cache: Cache
) -> None:
    cache, key = copied_cache, outcome[0].view.record.provenance.cache_key
    older = cache.entry(key)
    newer = shutil.copytree(older, older.with_name(f"{key}-1"))
    os.utime(older / "record.json", (1, 1))
    assert cache.entry(key) == newer
    assert cache.get(key) is not None
    assert list((cache.root / "measurements").iterdir()) == [newer]


def test_records_that_were_found_right_are_remembered_between_processes(tmp_path: Path) -> None:
    right, other = "a" * 64, "b" * 64
    cache = Cache(tmp_path / "cache")
    assert not cache.verified(right)
    cache.remember(right)
    assert cache.verified(right)
    with next(cache.root.iterdir()).open("a") as file:
        file.write("b" * 20)  # of a run that was killed
    Cache(cache.root).remember(other)
    assert Cache(cache.root).verified(right)
    assert not Cache(cache.root).verified("b" * 20)


def test_a_read_only_cache_remembers_within_one_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file")
    cache.remember("a" * 64)
    assert cache.verified("a" * 64)
