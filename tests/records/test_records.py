"""Records and cache: whole or not at all, readable without a model, honest about damage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from delta_suite.capture.stream import Memory
from delta_suite.claims.judge import observe
from delta_suite.errors import RecordError
from delta_suite.measure import Outcome, Settings, measure
from delta_suite.models.registry import ModelSpec
from delta_suite.publish.tables import boundary_table, model_line, stream_text
from delta_suite.records.cache import Cache
from delta_suite.records.record import JudgedBy, Measurement, write_atomically
from delta_suite.records.store import load, save, stamp


@pytest.fixture(scope="module")
def outcome(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Settings]:
    root = tmp_path_factory.mktemp("records")
    settings = Settings(results=root / "results", device="cpu", cache=Cache(root / "cache"))
    return measure(ModelSpec(name="tiny", path=tiny), settings), settings


def test_a_record_reads_back_as_it_was_written(outcome: tuple[Outcome, Settings]) -> None:
    assert load(outcome[0].record).model_dump() == outcome[0].measurement.model_dump()


def test_a_record_holds_no_nan_and_null_only_with_a_reason(outcome: tuple[Outcome, Settings]) -> None:
    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    def walk(node: object) -> None:
        if isinstance(node, dict):
            if "value" in node and node["value"] is None:
                assert node["reason"]
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(json.loads(outcome[0].record.read_text(), parse_constant=refuse))


def test_a_record_says_where_the_stream_was_kept(
    outcome: tuple[Outcome, Settings], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = outcome[0].measurement
    calibration, stream = whole.calibration, whole.provenance.stream
    assert stream is not None
    size = (whole.model.layers + 1) * whole.model.hidden * 4 * (calibration.tokens + calibration.dropped)
    assert (stream.storage, stream.shards, stream.largest_bytes) == ("device", 1, size)
    assert "float32 on cpu; measured" in model_line(whole)
    assert stream_text(stream, "cpu") == f"in the memory of cpu, {size / 1e9:.3g} GB"

    room = size // 3
    monkeypatch.setattr(Memory, "free", classmethod(lambda cls, device, share=0.5: cls(room)))
    settings = Settings(results=tmp_path / "results", device="cpu", cache=Cache(tmp_path / "cache"))
    apart = load(measure(ModelSpec(name="tiny", path=tiny), settings).record)
    stream = apart.provenance.stream
    assert stream is not None
    assert stream.storage == "device"
    assert stream.shards >= 3
    assert stream.largest_bytes <= room
    said = f"float32 on cpu (stream in the memory of cpu, {stream.shards} shards, the largest "
    assert said in model_line(apart)
    # The place is no setting: a table holds both, and the figures agree.
    assert apart.provenance.settings == whole.provenance.settings
    for phase in whole.scopes:
        for name in ("intra_cosine", "capture_fraction"):
            one, two = (own.scopes[phase].metrics["raw"][name].value for own in (whole, apart))
            assert one == pytest.approx(two, abs=1e-6), (phase, name)


def test_a_record_from_before_the_stream_was_noted_reads_as_ever(
    outcome: tuple[Outcome, Settings], tmp_path: Path
) -> None:
    old = json.loads(outcome[0].record.read_text())
    del old["provenance"]["stream"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    read = load(tmp_path / "old.json")
    assert read.provenance.stream is None
    assert model_line(read) == model_line(outcome[0].measurement)


def test_another_phase_map_needs_no_model(outcome: tuple[Outcome, Settings], tiny: Path) -> None:
    first, settings = outcome
    spec = ModelSpec(name="tiny", path=tiny, phases={"C": (2, 7), "E": (8, 11)})
    second = measure(spec, settings)
    assert second.cached
    assert second.record != first.record
    assert second.measurement.phases == {"C": (2, 7), "E": (8, 11)}
    assert (
        observe(second.measurement, "intra_cosine", "C").value
        == observe(first.measurement, "intra_cosine", "layers:2-7").value
    )
    assert second.measurement.layers[0].phase != "A"


def test_a_record_alone_answers_for_its_phases_only(outcome: tuple[Outcome, Settings]) -> None:
    alone = load(outcome[0].record)
    assert observe(alone, "intra_cosine", "C").value is not None
    other = observe(alone, "intra_cosine", "layers:2-7")
    assert other.value is None
    assert "delta-suite measure tiny" in str(other.reason)


def test_boundaries_are_in_the_record_and_follow_the_phase_map(outcome: tuple[Outcome, Settings]) -> None:
    alone = load(outcome[0].record)
    with pytest.raises(RecordError, match="delta-suite measure tiny"):
        alone.under({"all": (0, 11)})
    whole = load(outcome[0].record).with_arrays(outcome[1].cache.arrays(alone.provenance.cache_key))
    p = observe(whole, "boundary_p", "model").value
    assert p is not None
    assert 0.001 <= p <= 1.0
    assert observe(alone, "boundary_p", "model").value == p  # a record has those of its own phases
    table = boundary_table(alone)  # as it is, without the arrays
    assert f"{p:.3f} against smooth drift" in table
    assert "of 999 draws" in table
    assert "not among 12 orders of the declared lengths" in table
    record = json.loads(outcome[0].record.read_text())
    for own in record["boundaries"].values():
        del own["search"]
    assert table.startswith(boundary_table(Measurement.from_json(json.dumps(record), "older")).split("\nmet ")[0])
    del record["boundaries"]
    assert "delta-suite measure tiny" in boundary_table(Measurement.from_json(json.dumps(record), "oldest"))
    assert "one phase holds all layers" in str(observe(whole.under({"all": (0, 11)}), "boundary_p").reason)
    orders = observe(whole, "boundary_cost_rank", "model")  # 2, 4, 3 and 3 layers
    assert "12 orders, too few" in str(orders.reason)
    assert observe(whole.under({"A": (0, 0), "B": (1, 2), "C": (3, 5), "D": (6, 11)}), "boundary_cost_rank").value


@pytest.mark.parametrize(
    ("damage", "telling"),
    [
        (lambda text: text[: len(text) // 2], "not a measurement record"),
        (lambda text: text.replace('"schema": 2', '"schema": 7'), "at schema"),
        (lambda text: text.replace('"value": ', '"value": NaN, "x": ', 1), "not a measurement record"),
        (lambda text: "[]", "not a measurement record"),
        (lambda text: text.replace('"layers": 12', '"layers": 14'), "it says 14 layers and holds 12"),
        (lambda text: text.replace("9, 11 ]", "9, 12 ]", 1), "not a whole record: a phase reaches past its 12"),
        (lambda text: text.replace('"raw": {', '"rough": {', 1), "not a whole record: its layers were not all"),
        (lambda text: json.dumps(json.loads(text) | {"layers": []}), "it says 12 layers and holds 0"),
    ],
)
def test_damaged_records_are_refused(outcome: tuple[Outcome, Settings], tmp_path: Path, damage, telling) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "record.json"
    path.write_text(damage(outcome[0].record.read_text()))
    with pytest.raises(RecordError, match=telling) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_damaged_cache_entry_is_measured_again(tiny: Path, tmp_path: Path) -> None:
    settings = Settings(results=tmp_path / "results", device="cpu", cache=Cache(tmp_path / "cache"))
    spec = ModelSpec(name="tiny", path=tiny)
    first = measure(spec, settings)
    arrays = settings.cache.arrays(first.measurement.provenance.cache_key)
    arrays.write_bytes(arrays.read_bytes()[:100])
    second = measure(spec, settings)
    assert not second.cached
    assert second.note == f"the cache entry {arrays.parent} was damaged, and is removed; tiny was measured again"
    third = measure(spec, settings)
    assert (third.cached, third.note) == (True, None)
    assert second.measurement.layers == first.measurement.layers


def test_changed_weights_are_another_measurement(tiny: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    settings = Settings(results=tmp_path / "results", device="cpu", cache=Cache(tmp_path / "cache"))
    first = measure(ModelSpec(name="copy", path=copy), settings)
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.5.mlp.down_proj.weight"] *= 3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    second = measure(ModelSpec(name="copy", path=copy), settings)
    assert not second.cached
    assert second.measurement.layers[4].metrics["raw"]["gamma"] == first.measurement.layers[4].metrics["raw"]["gamma"]
    assert second.measurement.layers[5].metrics["raw"]["gamma"] != first.measurement.layers[5].metrics["raw"]["gamma"]


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_atomically(path, "old")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RecordError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_a_killed_run_leaves_no_entry_and_no_lock(tiny: Path, tmp_path: Path) -> None:
    """Killed while it measures: the next run starts from nothing and is not held up."""
    code = (
        "import os, sys; from pathlib import Path; import delta_suite.records.cache as c\n"
        "c.Cache.put = lambda *a: os.kill(os.getpid(), 9)\n"
        "from delta_suite.measure import *; from delta_suite.models.registry import ModelSpec\n"
        "measure(ModelSpec(name='tiny', path=Path(sys.argv[1])), Settings(results=Path(sys.argv[2]), device='cpu'))"
    )
    environment = os.environ | {"DELTA_SUITE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code, tiny, tmp_path / "results"], env=environment, check=False)
    assert done.returncode == -9
    settings = Settings(results=tmp_path / "results", device="cpu", cache=Cache(tmp_path / "cache"))
    assert not measure(ModelSpec(name="tiny", path=tiny), settings).cached
    assert len(list((tmp_path / "cache" / "measurements").iterdir())) == 1


def test_two_processes_measure_a_model_once(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from delta_suite.measure import *\n"
        "from delta_suite.models.registry import ModelSpec\n"
        "spec = ModelSpec(name='tiny', path=Path(sys.argv[1]))\n"
        "print(measure(spec, Settings(results=Path(sys.argv[2]), device='cpu')).cached)"
    )
    environment = os.environ | {"DELTA_SUITE_CACHE": str(tmp_path / "cache")}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, tiny, tmp_path / "results"], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert sorted(process.communicate(timeout=120)[0].split()[-1] for process in running) == ["False", "True"]
    assert len(list((tmp_path / "results" / "runs" / "tiny").iterdir())) == 1


def test_unwritable_places_are_named(tiny: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    cache = Cache(tmp_path / "cache")
    with pytest.raises(RecordError, match="cannot be written"):
        measure(ModelSpec(name="tiny", path=tiny), Settings(results=blocked, device="cpu", cache=cache))
    with pytest.raises(RecordError, match="DELTA_SUITE_CACHE"):
        measure(ModelSpec(name="tiny", path=tiny), Settings(results=tmp_path, device="cpu", cache=Cache(blocked)))


def test_a_measurement_that_the_cache_has_no_room_for_is_recorded(
    outcome: tuple[Outcome, Settings], tiny: Path, tmp_path: Path, largest_file: Callable[[int], None]
) -> None:
    arrays = outcome[1].cache.arrays(outcome[0].measurement.provenance.cache_key).stat().st_size
    record = outcome[0].record.stat().st_size
    assert record < 0.9 * arrays
    cache = Cache(tmp_path / "cache")
    largest_file((record + arrays) // 2)
    with pytest.raises(RecordError, match=r"in the cache, cannot be written: File too large\. Free space") as caught:
        measure(ModelSpec(name="tiny", path=tiny), Settings(results=tmp_path / "results", device="cpu", cache=cache))
    (path,) = (tmp_path / "results" / "runs" / "tiny").iterdir()
    assert str(caught.value).endswith(f"The record is written: {path}.")
    assert load(path).layers == outcome[0].measurement.layers
    assert load(path).scopes == outcome[0].measurement.scopes
    assert list((cache.root / "measurements").iterdir()) == []


def test_a_lock_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    (tmp_path / "locks" / "key.lock").mkdir(parents=True)
    with (
        pytest.raises(RecordError, match=r"key\.lock, in the cache, cannot be written: .*DELTA_SUITE_CACHE"),
        Cache(tmp_path).lock("key"),
    ):
        pytest.fail("nothing is held")


def test_json_round_trip_is_exact(outcome: tuple[Outcome, Settings]) -> None:
    text = outcome[0].measurement.to_json()
    assert Measurement.from_json(text, "text").to_json() == text


FIRST, SECOND = JudgedBy(version=1, sha256="a" * 64), JudgedBy(version=1, sha256="b" * 64)


def test_a_stamp_is_beside_what_was_measured_and_written_only_where_it_is_new(
    outcome: tuple[Outcome, Settings], tmp_path: Path
) -> None:
    measurement, cache = outcome[0].measurement, outcome[1].cache
    path = save(tmp_path, measurement, cache)
    assert load(path).judged_by == {}
    stamp(path, {"phase-c": FIRST}, cache)
    written = path.stat()
    stamp(path, {"phase-c": FIRST}, cache)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    stamp(path, {"phase-e": FIRST, "phase-c": SECOND}, cache)
    assert load(path).judged_by == {"phase-c": SECOND, "phase-e": FIRST}
    assert load(path).model_copy(update={"judged_by": {}}).to_json() == measurement.to_json()
    assert save(tmp_path, measurement, cache) == path  # measured again from the cache: the stamps stay
    assert load(path).judged_by != {}


def test_records_older_than_the_stamps_are_read(outcome: tuple[Outcome, Settings], tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    record = json.loads(outcome[0].record.read_text())
    del record["judged_by"]
    path.write_text(json.dumps(record))
    assert load(path).judged_by == {}
    stamp(path, {"phase-c": FIRST}, outcome[1].cache)
    assert load(path).judged_by == {"phase-c": FIRST}


def test_runs_that_judge_one_record_at_once_all_leave_their_stamp(
    outcome: tuple[Outcome, Settings], tmp_path: Path
) -> None:
    path = save(tmp_path, outcome[0].measurement, outcome[1].cache)
    code = (
        "import sys; from pathlib import Path\n"
        "from delta_suite.records.cache import Cache; from delta_suite.records.record import JudgedBy\n"
        "from delta_suite.records.store import stamp\n"
        "for turn in range(20):\n"
        "    own = JudgedBy(version=turn + 1, sha256=sys.argv[3] * 64)\n"
        "    stamp(Path(sys.argv[1]), {sys.argv[3]: own}, Cache(Path(sys.argv[2])))"
    )
    arguments = [path, outcome[1].cache.root]
    running = [subprocess.Popen([sys.executable, "-c", code, *arguments, name]) for name in "abc"]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert load(path).judged_by == {name: JudgedBy(version=20, sha256=name * 64) for name in "abc"}


def test_a_record_that_cannot_be_stamped_is_named_and_stays(
    outcome: tuple[Outcome, Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, outcome[0].measurement, outcome[1].cache)
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RecordError, match=r"\.json cannot be written: Read-only"):
        stamp(path, {"phase-c": FIRST}, outcome[1].cache)
    assert path.read_bytes() == before
