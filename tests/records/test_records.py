"""Records, views and cache: whole or not at all, readable without a model, honest about damage."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import delta_suite.reduction.reduce
import numpy as np
import pytest
from delta_suite import pipeline
from delta_suite.capture.stream import Memory
from delta_suite.errors import RecordError
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.estimators import phase_metric
from delta_suite.metrics.intervals import interval
from delta_suite.metrics.registry import METRICS
from delta_suite.models import subject
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Outcome, Settings, measure
from delta_suite.records.cache import Cache
from delta_suite.records.format import from_json, to_json
from delta_suite.records.store import JudgedBy, load, save, stamp, stamps
from delta_suite.records.view import RecordView

from tests.tiny import QUICK


def test_a_record_reads_back_as_it_was_written(outcome: tuple[Outcome, Settings]) -> None:
    written, _ = from_json(outcome[0].path.read_text(), "written")
    assert load(outcome[0].path).record == written
    assert to_json(written) == to_json(outcome[0].view.record)


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

    walk(json.loads(outcome[0].path.read_text(), parse_constant=refuse))


def test_a_record_has_one_line_per_layer_and_variant_and_nine_digits(outcome: tuple[Outcome, Settings]) -> None:
    record = outcome[0].view.record
    lines = outcome[0].path.read_text().splitlines()
    for variant in record.variants:
        layer_lines = [line for line in lines if line.startswith(f'"{variant}":') and '"gamma":' in line]
        assert len(layer_lines) == record.model.layers
    digits = [
        re.sub(r"e.*|[-.]", "", number).lstrip("0") for number in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", "".join(lines))
    ]
    assert max(map(len, digits)) == 9
    kept = json.loads("".join(lines))  # those of boundaries take a search each
    assert '"replicates"' not in json.dumps({key: value for key, value in kept.items() if key != "boundaries"})


def test_every_interval_is_formed_again_from_the_arrays_beside_the_record(outcome: tuple[Outcome, Settings]) -> None:
    """From the two files alone, without the cache."""
    view = load(outcome[0].path)
    assert view.arrays is not None
    assert view.arrays.path.parent == outcome[0].path.parent
    checked = 0
    for variant in view.variants:
        for layer, recorded in enumerate(view.layers):
            for name, estimate in recorded.metrics[variant].items():
                if estimate.interval is not None:
                    replicates = view.layer(layer, name, variant).replicates
                    assert_interval(name, estimate, replicates)
                    checked += 1
        for phase, (first, last) in view.phases.items():
            for name, estimate in view.record.scopes[phase].metrics[variant].items():
                if estimate.interval is not None and estimate.value is not None:
                    replicates = view.over(range(first, last + 1), name, variant).replicates
                    assert_interval(name, estimate, replicates)
                    checked += 1
    assert checked > 500


def assert_interval(name: str, estimate: Estimate, replicates: tuple[float, ...] | None) -> None:
    assert replicates is not None, name
    assert estimate.corrected is not None
    assert estimate.interval is not None
    metric = METRICS[name]
    low, high = interval(estimate.corrected, replicates, metric.low, metric.high)
    assert estimate.interval == pytest.approx((low, high), rel=1e-5, abs=1e-6), name


def test_spectra_are_those_that_the_layers_were_measured_from(outcome: tuple[Outcome, Settings]) -> None:
    view = load(outcome[0].path)
    for variant in view.variants:
        energies = view.energies(variant)
        assert energies is not None
        for layer, shares in enumerate(energies):
            assert shares.sum() == pytest.approx(1.0, abs=1e-6)
            top = view.layer(layer, "top10_energy", variant).value
            assert float(shares[:10].sum()) == pytest.approx(top, abs=1e-6)


def test_averages_over_tokens_stand_once(outcome: tuple[Outcome, Settings]) -> None:
    view = outcome[0].view
    assert "update_norm" not in view.layers[3].metrics["centred"]
    for metric in ("update_norm", "alignment"):
        centred, sink_free, raw = (view.layer(3, metric, variant) for variant in ("centred", "sink_free", "raw"))
        assert centred == sink_free
        assert raw.value != sink_free.value


def test_a_view_changes_neither_record_nor_arrays(outcome: tuple[Outcome, Settings]) -> None:
    view = load(outcome[0].path, outcome[1].cache)
    before, arrays = to_json(view.record), {name: array.copy() for name, array in view.content().items()}
    other = view.under({"all": (0, 11)}, name="renamed")
    other.over(range(12), "intra_cosine", "raw")
    other.boundaries("raw")
    assert to_json(view.record) == before
    assert all(np.array_equal(array, view.content()[name], equal_nan=True) for name, array in arrays.items())
    assert (other.model.name, view.model.name) == ("renamed", "tiny")


def test_a_record_without_its_arrays_has_the_figures_of_its_phases_alone(
    outcome: tuple[Outcome, Settings], tmp_path: Path
) -> None:
    path = tmp_path / "alone.json"
    path.write_text(outcome[0].path.read_text())
    view = load(path)
    recorded = view.record.scopes["C"].metrics["sink_free"]["intra_cosine"]
    first, last = view.phases["C"]
    estimate = view.over(range(first, last + 1), "intra_cosine", "sink_free")
    assert (estimate.value, estimate.interval, estimate.replicates) == (recorded.value, recorded.interval, None)
    other = view.over(range(2, 8), "intra_cosine", "sink_free")
    assert other.value is None
    assert outcome[0].path.with_suffix(".safetensors").name in str(other.reason)
    assert view.cosines("raw") is None


def test_arrays_of_another_record_are_refused(outcome: tuple[Outcome, Settings], tmp_path: Path) -> None:
    path = tmp_path / outcome[0].path.name
    path.write_text(outcome[0].path.read_text())
    beside = path.with_suffix(".safetensors")
    packed = bytearray(outcome[0].path.with_suffix(".safetensors").read_bytes())
    packed[-1] ^= 1
    beside.write_bytes(packed)
    with pytest.raises(RecordError, match="its SHA-256 is another"):
        load(path).content()


def test_figures_outside_the_phases_come_from_the_arrays(outcome: tuple[Outcome, Settings]) -> None:
    alone, with_cache = load(outcome[0].path), load(outcome[0].path, outcome[1].cache)
    layers = range(2, 8)
    for name in ("intra_cosine", "block_effective_rank", "subspace_overlap", "principal_angle"):
        estimates = [view.over(layers, name, "sink_free") for view in (alone, with_cache)]
        assert estimates[0].value is not None
        assert estimates[0] == estimates[1]
    missing = alone.over(layers, "capture_fraction", "sink_free")
    assert "delta-suite measure tiny" in str(missing.reason)
    assert with_cache.over(layers, "capture_fraction", "sink_free").interval is not None


@pytest.mark.parametrize("name", ["capture_fraction", "intra_cosine_cross_fitted", "cross_cosine", "shared_fraction"])
def test_the_stored_gram_gives_what_the_full_one_does(outcome: tuple[Outcome, Settings], name: str) -> None:
    view = load(outcome[0].path, outcome[1].cache)
    first, last = view.phases["C"]
    layers = range(first, last + 1)
    stored = view.over(layers, name, "raw")
    full = phase_metric(view.full_gram("raw"), layers, METRICS[name])
    assert stored.value == pytest.approx(full.value, rel=1e-6)
    assert stored.replicates == pytest.approx(full.replicates, rel=1e-5)


def test_a_record_says_where_the_stream_was_kept(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, settings = ModelSpec(name="tiny", path=tiny), Settings(**QUICK, results=tmp_path, cache=Cache(tmp_path / "a"))
    whole = measure(spec, settings).view.record
    calibration, stream = whole.calibration, whole.provenance.stream
    assert stream is not None
    size = (whole.model.layers + 1) * whole.model.hidden * 4 * (calibration.tokens + calibration.dropped)
    assert (stream.storage, stream.shards, stream.largest_bytes) == ("device", 1, size)

    room = size // 3
    monkeypatch.setattr(Memory, "free", classmethod(lambda cls, device, share=0.5: cls(room)))
    apart = load(measure(spec, replace(settings, cache=Cache(tmp_path / "b"))).path).record
    stream = apart.provenance.stream
    assert stream is not None
    assert stream.storage == "device"
    assert stream.shards >= 3
    assert stream.largest_bytes <= room
    # The place is no setting: a table holds both, and the figures agree.
    assert apart.provenance.settings == whole.provenance.settings
    for phase in whole.scopes:
        for name in ("intra_cosine", "capture_fraction"):
            one, two = (record.scopes[phase].metrics["raw"][name].value for record in (whole, apart))
            assert one == pytest.approx(two, abs=1e-6), (phase, name)


def test_another_phase_map_needs_no_model(outcome: tuple[Outcome, Settings], tiny: Path) -> None:
    first, settings = outcome
    spec = ModelSpec(name="tiny", path=tiny, phases={"C": (2, 7), "E": (8, 11)})
    second = measure(spec, replace(settings, parts=frozenset({"spectra", "boundaries"})))
    assert second.cached
    assert second.path != first.path
    assert second.view.phases == {"C": (2, 7), "E": (8, 11)}
    over = second.view.over(range(2, 8), "intra_cosine", "raw")
    assert over.value == pytest.approx(first.view.over(range(2, 8), "intra_cosine", "raw").value, rel=1e-6)
    assert load(second.path).over(range(2, 8), "capture_fraction", "raw").interval is not None
    assert second.view.layers[0].phase != "A"


def test_boundaries_are_in_the_record_and_follow_the_phase_map(outcome: tuple[Outcome, Settings]) -> None:
    view = load(outcome[0].path)
    p = view.over(range(12), "boundary_p", "raw").value
    assert p is not None
    assert 0.001 <= p <= 1.0
    assert view.record.boundaries["raw"].metrics["boundary_p"].value == p
    everything = view.under({"all": (0, 11)})
    assert "one phase holds all layers" in str(everything.over(range(12), "boundary_p", "raw").reason)
    orders = view.over(range(12), "boundary_cost_rank", "raw")  # 2, 4, 3 and 3 layers
    assert "12 orders, too few" in str(orders.reason)
    finer = view.under({"A": (0, 0), "B": (1, 2), "C": (3, 5), "D": (6, 11)})
    assert finer.over(range(12), "boundary_cost_rank", "raw").value


# --- parts -----------------------------------------------------------------------------------------------------


def test_a_metric_that_is_newer_than_the_record_has_a_reason(outcome: tuple[Outcome, Settings]) -> None:
    view = outcome[0].view
    record = view.record.model_copy(deep=True)
    del record.boundaries["raw"].metrics["boundary_p"]
    estimate = RecordView(record, view.arrays).over(range(record.model.layers), "boundary_p", "raw")
    assert (estimate.value, estimate.reason) == (None, "the record is older than the metric boundary_p")


def test_parts_are_measured_when_asked_for_and_completed_later(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModelSpec(name="tiny", path=tiny)
    settings = Settings(documents=12, results=tmp_path / "results", device="cpu", cache=Cache(tmp_path / "cache"))
    spectra = measure(spec, replace(settings, parts=frozenset({"spectra"})))
    assert spectra.view.record.parts == ("spectra",)
    assert "law" not in spectra.view.record.provenance.seconds
    reason = str(spectra.view.over(range(2, 6), "sharing_index", "sink_free").reason)
    assert "delta-suite measure tiny --parts law" in reason
    # A claim on boundaries can be judged all the same: they follow from the stored overlaps.
    assert spectra.view.over(range(12), "boundary_p", "raw").value is not None

    reductions = []
    reduce_stream = delta_suite.reduction.reduce.reduce_stream
    monkeypatch.setattr(
        "delta_suite.reduction.reduce.reduce_stream",
        lambda *args, **options: reductions.append(1) or reduce_stream(*args, **options),
    )
    everything = measure(spec, settings)
    assert not everything.cached
    assert reductions == []  # the law alone was measured
    assert set(everything.view.record.parts) == {"spectra", "boundaries", "law"}
    assert everything.view.layers == spectra.view.layers
    assert everything.view.over(range(2, 6), "sharing_index", "sink_free").replicates is not None
    fresh = replace(settings, results=tmp_path / "fresh", cache=Cache(tmp_path / "other"))
    at_once = measure(spec, fresh)
    assert at_once.view.record.scopes == everything.view.record.scopes
    assert at_once.view.record.boundaries == everything.view.record.boundaries
    assert measure(spec, replace(settings, parts=frozenset({"spectra"}))).cached


def test_the_law_belongs_to_the_phase_map_that_it_was_fitted_under(outcome: tuple[Outcome, Settings]) -> None:
    view = load(outcome[0].path, outcome[1].cache)
    first, last = view.phases["C"]
    moved = view.under({"C": (first, last), "rest": (last + 1, 11)})
    assert moved.over(range(first, last + 1), "sharing_index", "sink_free").value is not None
    other = moved.over(range(last + 1, 12), "sharing_index", "sink_free")
    assert "another phase map" in str(other.reason)
    assert "delta-suite measure tiny --parts law" in str(other.reason)


@pytest.mark.parametrize(
    ("source", "command"),
    [
        ("directory:runs/a b/step-8", "delta-suite measure 'runs/a b/step-8' --parts law"),
        ("random-weights, seed 0, splitmix64, as directory:run", "delta-suite measure run@random-weights --parts law"),
        ("directory:/home/ada/run", "delta-suite measure tiny --parts law"),  # reasons are published
        ("hub:acme/tiny", "delta-suite measure tiny --parts law"),
        ("memory", "measure(model, tokenizer=tokenizer, parts='law')"),
    ],
)
def test_the_command_that_measures_again_finds_the_model(
    outcome: tuple[Outcome, Settings], source: str, command: str
) -> None:
    view = outcome[0].view
    assert view.under(view.phases, source=source).measure_again("law") == command


# --- older and damaged records ---------------------------------------------------------------------------------


def test_replicates_of_schema_2_are_bounded_as_arrays_are(tmp_path: Path) -> None:
    content = json.loads((Path(__file__).parent / "data" / "schema2.json").read_text())
    estimate = content["layers"][0]["metrics"]["raw"]["gamma"]
    estimate["replicates"][0] = 1e300
    (tmp_path / "record.json").write_text(json.dumps(content))
    with pytest.raises(RecordError, match=r"raw\.units\.gamma holds a number above 1e"):
        load(tmp_path / "record.json")


def test_a_record_of_schema_2_is_read() -> None:
    """Written by delta-suite 0.1 from a random Llama of 6 layers.."""
    view = load(Path(__file__).parent / "data" / "schema2.json")
    assert view.record.variants == dict.fromkeys(("raw", "sink_free", "token_normalised", "centred"), 1)
    assert view.variants == ("raw",)
    for changed in ("sink_free", "centred"):
        assert "means something else today" in str(view.variant_problem(changed))
    first, last = view.phases["C"]
    estimate = view.over(range(first, last + 1), "intra_cosine", "raw")
    assert estimate.replicates is not None
    assert estimate.interval is not None
    assert len(view.layer(0, "effective_rank", "raw").replicates or ()) == view.record.resampling.groups
    assert view.over(range(first, last + 1), "sharing_index", "raw").value is not None
    assert view.boundaries("raw").metrics["boundary_p"].value is not None
    assert view.over(range(1, 4), "intra_cosine", "raw").value is None


@pytest.mark.parametrize(
    ("damage", "telling"),
    [
        (lambda text: text[: len(text) // 2], "not a measurement record"),
        (lambda text: text.replace('"schema":3', '"schema":7'), "at schema"),
        (lambda text: text.replace('"value":', '"value":NaN,"x":', 1), "not a measurement record"),
        (lambda text: "[]", "not a measurement record"),
        (lambda text: text.replace('"layers":12', '"layers":14'), "it says 14 layers and holds 12"),
        (lambda text: text.replace("9,11]", "9,12]", 1), "not a whole record: a phase reaches past its 12"),
        (
            lambda text: text.replace('"raw":{"gamma"', '"rough":{"gamma"', 1),
            "not a whole record: its layers and phases were not all",
        ),
        (lambda text: json.dumps(json.loads(text) | {"layers": []}), "it says 12 layers and holds 0"),
    ],
)
def test_damaged_records_are_refused(outcome: tuple[Outcome, Settings], tmp_path: Path, damage, telling) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "record.json"
    path.write_text(damage(outcome[0].path.read_text()))
    with pytest.raises(RecordError, match=telling) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_changed_weights_are_another_measurement(tiny: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    settings = Settings(**QUICK, results=tmp_path / "results", cache=Cache(tmp_path / "cache"))
    first = measure(ModelSpec(name="copy", path=copy), settings)
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.5.mlp.down_proj.weight"] *= 3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    second = measure(ModelSpec(name="copy", path=copy), settings)
    assert not second.cached
    assert second.view.layers[4].metrics["raw"]["gamma"] == first.view.layers[4].metrics["raw"]["gamma"]
    assert second.view.layers[5].metrics["raw"]["gamma"] != first.view.layers[5].metrics["raw"]["gamma"]


def test_json_round_trip_is_exact(outcome: tuple[Outcome, Settings]) -> None:
    text = to_json(outcome[0].view.record)
    assert to_json(from_json(text, "text")[0]) == text


FIRST, SECOND = JudgedBy(version=1, sha256="a" * 64), JudgedBy(version=1, sha256="b" * 64)


def test_what_judged_a_record_is_kept_beside_the_runs_and_written_only_where_it_is_new(
    outcome: tuple[Outcome, Settings], tmp_path: Path
) -> None:
    view, cache = outcome[0].view, outcome[1].cache
    path, _ = save(tmp_path, view, cache)
    content = path.read_bytes()
    assert stamps(path) == {}
    stamp(path, {"phase-c": FIRST}, cache)
    judged = tmp_path / "judged" / "tiny" / path.name
    written = judged.stat()
    stamp(path, {"phase-c": FIRST}, cache)
    assert (judged.stat().st_ino, judged.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    stamp(path, {"phase-e": FIRST, "phase-c": SECOND}, cache)
    assert stamps(path) == {"phase-c": SECOND, "phase-e": FIRST}
    assert path.read_bytes() == content
    assert save(tmp_path, view, cache)[0] == path  # measured again from the cache: the stamps stay
    assert stamps(path) != {}


def test_a_record_outside_a_results_folder_gets_no_stamp(outcome: tuple[Outcome, Settings], tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(outcome[0].path.read_text())
    stamp(path, {"phase-c": FIRST}, outcome[1].cache)
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_runs_that_judge_one_record_at_once_all_leave_their_stamp(
    outcome: tuple[Outcome, Settings], tmp_path: Path
) -> None:
    path, _ = save(tmp_path, outcome[0].view, outcome[1].cache)
    code = (
        "import sys; from pathlib import Path\n"
        "from delta_suite.records.cache import Cache; from delta_suite.records.store import JudgedBy, stamp\n"
        "for turn in range(20):\n"
        "    by = JudgedBy(version=turn + 1, sha256=sys.argv[3] * 64)\n"
        "    stamp(Path(sys.argv[1]), {sys.argv[3]: by}, Cache(Path(sys.argv[2])))"
    )
    arguments = [path, outcome[1].cache.root]
    running = [subprocess.Popen([sys.executable, "-c", code, *arguments, name]) for name in "abc"]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert stamps(path) == {name: JudgedBy(version=20, sha256=name * 64) for name in "abc"}


def test_a_stamp_that_cannot_be_written_is_named(
    outcome: tuple[Outcome, Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = save(tmp_path, outcome[0].view, outcome[1].cache)

    def fail(*args: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RecordError, match=r"\.json cannot be written: Read-only"):
        stamp(path, {"phase-c": FIRST}, outcome[1].cache)
    assert not (tmp_path / "judged" / "tiny" / path.name).exists()


def test_a_sharded_run_has_a_key_of_its_own(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU and several may round differently, so neither answers for the other; which GPU it is does not count."""
    keys = {}
    for device in ("cpu", "cuda", "cuda:1", "sharded"):
        monkeypatch.setattr(subject, "resolve_device", lambda *_, device=device: device)
        settings = Settings(calibration="seed", cache=Cache(tmp_path))
        keys[device] = pipeline.prepare(ModelSpec(name="tiny", path=tiny), settings).key
    assert keys["cuda"] == keys["cuda:1"]
    assert len(set(keys.values())) == 3
