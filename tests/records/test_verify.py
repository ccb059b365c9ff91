"""The door: an honest record passes, and every number that does not follow from the others is named."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from delta_suite.capture.calibration import CORE_BYTES, load_calibration
from delta_suite.cli import app
from delta_suite.errors import RecordError
from delta_suite.metrics.estimators import phase_metric
from delta_suite.metrics.registry import METRICS
from delta_suite.records import store, verify
from delta_suite.records.arrays import MATRICES, ArrayFile, Arrays, pack, unpack
from delta_suite.records.cache import Cache
from delta_suite.records.format import from_json, to_json
from delta_suite.records.store import examine, load, save
from delta_suite.records.verify_facts import EARLIER_CORE, EARLIER_CORE_TOKENS
from delta_suite.records.view import RecordView
from delta_suite.selftest.planted import sinks
from typer.testing import CliRunner

from tests.planted_records import planted_view
from tests.records.random_streams import ordinary_record, random_record

REPOSITORY = Path(__file__).parents[2]

Content = dict[str, Any]
Change = Callable[[Content], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of six layers with every part, in a results folder."""
    root = tmp_path_factory.mktemp("door")
    record, content = ordinary_record()
    view = RecordView(record, ArrayFile(root, content=content))
    return save(root / "results", view, Cache(root / "cache"))[0]


@pytest.fixture(scope="module")
def arrays(saved: Path) -> Arrays:
    return load(saved).content()


def problems_of(content: Mapping[str, Any], arrays: Arrays | None) -> list[str]:
    """Return what is found in a record, or why it is no record."""
    try:
        record, _ = from_json(json.dumps(content), "a record")
    except RecordError as error:
        return [str(error)]
    return [str(problem) for problem in verify.problems(record, arrays)]


WITHOUT_ARRAYS = ("training--deep--", "qwen2.5-coder-1.5b-q4@")
"""Folders of published records whose arrays are too large for the repository."""


# --- honest records --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((REPOSITORY / "results" / "runs").glob("*/*.json")), ids=lambda path: path.stem)
def test_the_records_of_this_repository_pass(path: Path) -> None:
    examined = examine(path)
    assert examined.problems == []
    notes = [note for note in examined.unchecked if not note.startswith("figures of older versions")]
    if path.parent.name.startswith(WITHOUT_ARRAYS):
        notes = [note for note in notes if "is not beside it" not in note]
    assert notes == []


def test_a_record_of_schema_2_passes_by_its_own_rules() -> None:
    examined = examine(Path(__file__).parent / "data" / "schema2.json")
    assert examined.problems == []
    assert "schema is 2" in examined.unchecked[0]


def test_a_planted_record_passes_with_and_without_arrays() -> None:
    view = planted_view(sinks, phases={"C": (2, 5)}, variants=("raw", "sink_free", "centred"))
    record, _ = from_json(to_json(view.record), "planted")
    assert verify.problems(record, view.content()) == []
    assert verify.problems(record, None) == []


@pytest.mark.parametrize("seed", range(8))
def test_random_tiny_records_pass(seed: int) -> None:
    """With layers that are zero, of rank one, zero in one half, tiny or huge, of one document or many, in any dtype."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is divided by zero on the way
        record, arrays = random_record(seed)
    assert [str(problem) for problem in verify.problems(record, arrays)] == []
    assert verify.problems(record, None) == []


def test_what_is_formed_anew_from_the_cosines_is_what_the_metrics_compute(saved: Path) -> None:
    """The door computes many replicates at once; the metrics one by one."""
    view = load(saved)
    content = json.loads(saved.read_text())
    for phase, (first, last) in view.phases.items():
        for name, estimate in content["scopes"][phase]["metrics"]["raw"].items():
            if METRICS[name].takes == "directions" and "per_layer" in estimate:
                computed = phase_metric(view.gram("raw"), range(first, last + 1), METRICS[name])
                if computed.value is not None:
                    assert estimate["value"] == pytest.approx(computed.value, rel=1e-7)


def test_a_record_without_arrays_passes_and_says_what_was_not_checked(saved: Path, tmp_path: Path) -> None:
    alone = shutil.copy(saved, tmp_path / "alone.json")
    examined = examine(alone)
    assert examined.problems == []
    assert saved.with_suffix(".safetensors").name in examined.unchecked[0]


def test_the_door_imports_no_torch(saved: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from delta_suite.records.store import load\n"
        "load(Path(sys.argv[1])); print([n for n in ('torch', 'safetensors', 'ruptures') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, saved], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- one number changed ----------------------------------------------------------------------------------------

FREE = re.compile(
    r"(layers\.N|scopes\.\w+)\.metrics\.\w+\.(relative_step|block_influence|angular_distance|stream_norm)\.sd"
    r"|layers\.N\.metrics\.raw\.mean_energy\.value"
    r"|scopes\.\w+\.metrics\.\w+\.shared_fraction\.detail\.eigenvalues\.N"
    r"|boundaries\.\w+\.(metrics\.boundary_p\.detail\.drift_dimensions|recurrence\.N)"
    r"|sinks\.(largest\.N\.N|ratio)|certificate\.(forward_passes|identities\.\w+\.error)"
    r"|calibration\.(dropped|first|unknown_tokens|duplicates)"
    r"|provenance\.(seconds|peak_memory_bytes|stream|settings)\..*"
)
"""Numbers that nothing else in a record follows from: docs/records.md lists them."""


def leaves(node: object, at: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], float]]:
    """Yield the place of every number."""
    if isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(child, (*at, key))
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield at, node


def pattern(at: tuple[str | int, ...]) -> str:
    return ".".join("N" if isinstance(key, int) or key.isdigit() else key for key in at)


def put(content: Any, at: tuple[str | int, ...], value: object) -> None:
    for key in at[:-1]:
        content = content[key]
    content[at[-1]] = value


def test_a_changed_number_is_caught_wherever_another_follows_from_it(saved: Path, arrays: Arrays) -> None:
    """A sample of one number of each kind, and of 100 others; each is changed by a thousandth of its size, or by 1."""
    content = json.loads(saved.read_text())
    draw = random.Random(0)
    places = [(at, value) for at, value in leaves(content) if not FREE.fullmatch(pattern(at))]
    by_kind = {pattern(at): (at, value) for at, value in draw.sample(places, len(places))}
    kinds = [item for kind, item in by_kind.items() if "metrics" not in kind]
    chosen = kinds + draw.sample([item for kind, item in by_kind.items() if "metrics" in kind], 50)
    missed = []
    for at, value in chosen + draw.sample(places, 30):
        put(content, at, value + 1 if isinstance(value, int) else value * 1.001 + (0.001 if value == 0 else 0.0))
        if not problems_of(content, arrays):
            missed.append(pattern(at))
        put(content, at, value)
    assert missed == []


def estimate(content: Content, layer: int, metric: str, variant: str = "raw") -> Content:
    found: Content = content["layers"][layer]["metrics"][variant][metric]
    return found


def moved(content: Content, metric: str, by: float) -> None:
    """Move a figure of layer 3 with its centre and its interval."""
    figure = estimate(content, 3, metric)
    figure["value"] += by
    figure["corrected"] += by
    figure["interval"] = [end + by for end in figure["interval"]]


def set_all(content: Content, metric: str, value: float) -> None:
    """Set a figure of phase C, and everything about it that stands in the record."""
    figure = content["scopes"]["C"]["metrics"]["raw"][metric]
    figure |= {"value": value, "corrected": value, "interval": [value, value]}
    figure["per_layer"] = dict.fromkeys(figure["per_layer"], value)


EDITS: list[tuple[Change, str]] = [
    (lambda c: estimate(c, 3, "top1_energy").update(value=1e300), "layer 3, raw, top1_energy: the value is 1e+300"),
    (lambda c: set_all(c, "intra_cosine", 5.0), "phase C, raw, intra_cosine: the value is 5, outside 0 to 1"),
    (lambda c: set_all(c, "intra_cosine", 0.5), "phase C, raw, intra_cosine: the value is 0.5, and the cosines"),
    (lambda c: moved(c, "effective_rank", 0.5), "layer 3, raw, effective_rank: the value is"),
    (lambda c: moved(c, "alignment", 0.01), "layer 3, raw, alignment"),
    (lambda c: moved(c, "stream_norm", 1e-3), "layer 3, raw, stream_norm: the corrected value"),
    (lambda c: estimate(c, 3, "effective_rank").pop("interval"), "without the other"),
    (lambda c: estimate(c, 3, "relative_step").pop("sd"), "layer 3, raw, relative_step: its sd is missing"),
    (lambda c: estimate(c, 3, "gamma").update(value=None, reason="lost"), "layer 3, raw, gamma"),
    (lambda c: estimate(c, 3, "reliability").update(value=1.0, corrected=1.0, interval=[1.0, 1.0]), "raw.cross"),
    (lambda c: c["layers"][3]["metrics"]["raw"].clear(), "layer 3, raw: adjacent_cosine, alignment, angular_distance"),
    (lambda c: c["scopes"]["C"]["metrics"]["raw"].pop("intra_cosine"), "phase C, raw: intra_cosine is missing"),
    (lambda c: c["scopes"]["C"]["metrics"].pop("raw"), "not all measured in the same variants"),
    (lambda c: c["boundaries"].pop("raw"), "boundaries: they stand in"),
    (lambda c: c["boundaries"]["raw"]["metrics"]["boundary_p"].update(value=0.0005), "is no share of 1000"),
    (lambda c: c["boundaries"]["raw"]["search"].update(detected_cost=0.0), "boundaries, raw"),
    (lambda c: c["parts"].remove("law"), "law: "),
    (lambda c: c["model"].update(layers=10**9), "it says 1000000000 layers"),
    (lambda c: c["model"].update(hidden=10**12), "raw.eigenvalues: its shape"),
    (lambda c: c["calibration"].update(tokens=10**15), "update_norm: its mean square is"),
    (lambda c: c["calibration"].update(tokens=1), "calibration.tokens"),
    (lambda c: c["calibration"].update(name="core", bytes_per_document=512), "not that of core"),
    (lambda c: c["calibration"].update(name="core", tokens_per_document=128), "not that of core, 239458170252"),
    (lambda c: c["resampling"].update(groups=9), "its shape is (10, 6)"),
    (lambda c: c["sinks"].update(large_norm=-1), "sinks.large_norm"),
    (lambda c: c["certificate"]["identities"]["telescoping"].update(error=5.0), "certificate, telescoping: its error"),
    (lambda c: c["certificate"]["identities"]["telescoping"].update(error=5.0, tolerance=6.0), "it tolerates 6, more"),
    (lambda c: c["certificate"]["identities"].pop("continuity"), "certificate, continuity: the identity is missing"),
    (lambda c: c["certificate"].update(holds=False), "certificate.holds"),
    (lambda c: c["certificate"].update(blocks=3), "certificate.blocks"),
    (lambda c: c["provenance"].update(created="2999-01-01T00:00:00Z"), "lies in the future"),
    (lambda c: c["provenance"].update(created="yesterday"), "is no date"),
    (lambda c: c["provenance"].update(git={"commit": 5}), "provenance.git"),
    (lambda c: c["provenance"].update(peak_memory_bytes={"host": 10**299}), "provenance.peak_memory_bytes"),
    (lambda c: c["provenance"].update(peak_memory_bytes={"host": 10**400}), "401 digits"),
    (lambda c: c["provenance"]["metric_versions"].update(gamma=9), "metric gamma: it has version 9"),
    (lambda c: c["provenance"]["metric_versions"].pop("gamma"), "layer 0, raw: gamma has no metric version"),
    (lambda c: c["phases"].update(C=[0, 2]), "its scopes are not its phases"),
    (lambda c: c["layers"][0].update(phase="C"), "layer 0: its phase is 'C'"),
    (lambda c: c["arrays"].update(file="../../x.safetensors"), "arrays.file"),
    (lambda c: c["model"].update(fingerprint="\x1b[31m"), "model.fingerprint: '\\x1b[31m' is no SHA-256"),
    (lambda c: c["scopes"]["C"]["metrics"]["sink_free"]["own_r2"]["detail"].update(ridge=[9.0, 9.0]), "the fit"),
]


@pytest.mark.parametrize(("change", "telling"), EDITS, ids=[telling[:40] for _, telling in EDITS])
def test_an_edit_is_named_with_its_place(saved: Path, arrays: Arrays, change: Change, telling: str) -> None:
    content = json.loads(saved.read_text())
    change(content)
    found = problems_of(content, arrays)
    assert any(telling in problem for problem in found), found[:5]
    assert not any("\x1b" in problem for problem in found)


@pytest.mark.parametrize(
    ("limit", "texts"),
    [({"tokens_per_document": EARLIER_CORE_TOKENS}, EARLIER_CORE), ({"bytes_per_document": CORE_BYTES}, None)],
    ids=["earlier", "present"],
)
def test_both_sets_that_were_called_core_are_known_by_their_hash(
    saved: Path, arrays: Arrays, limit: dict[str, int], texts: str | None
) -> None:
    core = load_calibration("core")
    present = core.sha256
    content = json.loads(saved.read_text())
    content["calibration"] |= {"name": "core", "sha256": texts or present, **limit}
    if texts is None:  # the planted documents were left out in groups of their own
        content["resampling"]["assignment"] = "0" * 64
        assert [problem.split(":")[0] for problem in problems_of(content, arrays)] == ["resampling.assignment"]
        content["resampling"]["assignment"] = core.units.sha256
    assert problems_of(content, arrays) == []
    content["calibration"]["sha256"] = present if texts else EARLIER_CORE
    assert [problem.split(":")[0] for problem in problems_of(content, arrays)] == ["calibration.sha256"]


# --- arrays ----------------------------------------------------------------------------------------------------


def changed(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], dict[str, np.ndarray]]:
    return lambda arrays: {**arrays, name: edit(arrays[name].copy())}


def first_entry(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def edit(array: np.ndarray) -> np.ndarray:
        array.flat[0] = value
        return array

    return edit


def without(*names: str) -> Callable[[Arrays], dict[str, np.ndarray]]:
    return lambda arrays: {name: array for name, array in arrays.items() if name not in names}


@pytest.mark.parametrize(
    ("edit", "telling"),
    [
        (lambda arrays: {k: v for k, v in arrays.items() if k != "raw.cosines"}, "raw.cosines: the array is missing"),
        (lambda arrays: {k: v for k, v in arrays.items() if k != "raw.units.gamma"}, "no replicates of it"),
        (changed("raw.eigenvalues", lambda array: array[:, :-1]), "raw.eigenvalues: its shape is (6, 11)"),
        (changed("raw.eigenvalues", lambda array: -array), "no eigenvalue is negative"),
        (changed("raw.eigenvalues", lambda array: array[:, ::-1]), "do not descend"),
        (changed("raw.eigenvalues", lambda array: array * 1.001), "layer 0, raw, gamma: the value is"),
        (changed("raw.cosines", lambda array: array * 5), "raw.cosines: it holds"),
        (changed("raw.cosines", lambda array: np.where(array > 0.99, array, -0.9)), "no directions have these cosines"),
        (changed("raw.cross", first_entry(np.nan)), "raw.cross: it holds nan"),
        (changed("raw.units.gamma", first_entry(np.inf)), "a replicate or half of it is infinite"),
        (changed("raw.units.gamma", first_entry(1.0)), "layer 0, raw, gamma: the lower end of the interval"),
        (changed("raw.halves.update_norm", first_entry(1.0)), "layer 0, raw, update_norm: the corrected value"),
        (changed("law.transfer", lambda array: array * 1.001), "the transfer matrix"),
        (without("raw.cross_overlaps.units"), "raw.cross_overlaps.units: the array is missing, and others"),
        (without("raw.cross_overlaps"), "raw.cross_overlaps: the array is missing, and others"),
        (without("raw.cosines_a"), "raw.cosines_a: the array is missing, and others"),
        (without(*(f"raw.{name}.units" for name in MATRICES)), "it has an interval, and the arrays have no replicates"),
        (changed("raw.units.gamma", lambda array: array[::-1]), "raw, gamma: its replicates over units are not those"),
        (changed("raw.units.frobenius", lambda array: np.roll(array, 1, 0)), "are not those of frobenius and stable_r"),
        (changed("raw.units.top1_energy", lambda array: array[::-1]), "are not those of stable_rank, group by group"),
        (changed("raw.units.reliability", lambda array: array[::-1]), "not those of the array raw.cross.units"),
        (changed("raw.cross.units", lambda array: np.roll(array, 2, 0)), "not those of the array raw.cross.units"),
        (changed("raw.cosines.units", lambda array: array[::-1]), "not those of the array raw.cosines.units"),
    ],
)
def test_arrays_that_contradict_the_record_are_named(
    saved: Path, arrays: Arrays, edit: Callable[[Arrays], Arrays], telling: str
) -> None:
    found = problems_of(json.loads(saved.read_text()), edit(arrays))
    assert any(telling in problem for problem in found), found[:5]


def header(entry: object, data: bytes = b"") -> bytes:
    text = json.dumps({"raw.cosines": entry}).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("packed", "telling"),
    [
        (b"", "ends before its header"),
        ((10**15).to_bytes(8, "little") + b"{}", "longer than the file"),
        ((1).to_bytes(8, "little") + b"[", "not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "no object"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "nested too deeply"),
        (header(5), "is no object"),
        (header({"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}, b"00"), "has the dtype 'BF16'"),
        (header({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, b"0000"), "has the dtype"),
        (header({"dtype": "F32", "shape": [10**12, 10**12], "data_offsets": [0, 4]}, b"0000"), "has 4 bytes"),
        (header({"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}), "lie within the file"),
        (header({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, b"0000"), "no shape and place"),
        (header({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, b"0000"), "no shape and place"),
        (header({"dtype": "F32", "shape": [0] * 99, "data_offsets": [0, 0]}), "lie within the file"),
        (header({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, b"0000"), "lie within the file"),
    ],
)
def test_a_file_of_arrays_is_read_within_its_bounds(packed: bytes, telling: str) -> None:
    with pytest.raises(RecordError, match=r"x.safetensors is not a readable safetensors file: ") as error:
        unpack(packed, Path("x.safetensors"))
    assert telling in str(error.value)


def test_arrays_are_read_as_safetensors_writes_them(arrays: Arrays) -> None:
    from safetensors.numpy import load as load_safetensors

    packed = pack(arrays)
    ours, theirs = unpack(packed, Path("x")), load_safetensors(packed)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name], equal_nan=True) for name in ours)


# --- place -----------------------------------------------------------------------------------------------------


def test_a_record_of_a_results_folder_counts_in_its_own_place_alone(saved: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "results" / "runs" / "someone-elses"
    shutil.copytree(saved.parent, elsewhere)
    with pytest.raises(RecordError, match=r"it lies in the folder 'someone-elses', and is of the model 'r'"):
        load(elsewhere / saved.name)
    renamed = tmp_path / "results" / "runs" / "r" / "20260101T000000Z-00000000.json"
    shutil.copytree(saved.parent, renamed.parent)
    (renamed.parent / saved.name).rename(renamed)
    with pytest.raises(RecordError, match="its content makes it"):
        load(renamed)


def test_a_record_outside_a_results_folder_is_read_wherever_it_lies(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(saved, tmp_path / "own.json")
    monkeypatch.chdir(tmp_path)
    assert load(Path("own.json")).model.name == "r"
    monkeypatch.chdir(saved.parent)
    assert load(Path(saved.name)).model.name == "r"


def test_a_cache_entry_under_another_key_or_of_other_directions_is_removed(tmp_path: Path) -> None:
    view = planted_view(variants=("raw",), parts=("spectra",))
    assert view.directions is not None
    cache, key = Cache(tmp_path), view.record.provenance.cache_key
    entry = store_entry(view)
    cache.put(key, entry)
    found = cache.get(key)
    assert found is not None
    assert found.record.model == view.record.model
    cache.put("0" * 64, entry)
    with pytest.raises(RecordError, match="was damaged, and is removed"):
        cache.get("0" * 64)
    assert cache.get("0" * 64) is None
    turned = {name: array[::-1] if name == "raw.directions" else array for name, array in entry.directions.items()}
    cache.put(key, store_entry(view, turned))
    with pytest.raises(RecordError, match="was damaged, and is removed"):
        cache.get(key)


def store_entry(view: RecordView, directions: Arrays | None = None) -> Any:
    from delta_suite.records.assemble import Assembled

    assert view.directions is not None
    return Assembled(view.record, view.content(), directions or view.directions.content)


# --- the command -----------------------------------------------------------------------------------------------


def test_verify_lists_each_contradiction_and_reads_the_rest(saved: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(saved.parents[2], results)
    path = results / "runs" / "r" / saved.name
    run = CliRunner().invoke(app, ["verify", str(results)])
    assert run.exit_code == 0, run.output
    assert re.search(r"\.json: ok\nrecords: 1, consistent: 1, not: 0\n$", run.stdout)
    content = json.loads(path.read_text())
    moved(content, "effective_rank", 0.5)
    path.write_text(json.dumps(content))
    (path.parent / "torn.json").write_text('{"schema": 3')
    run = CliRunner().invoke(app, ["verify", str(results)])
    assert run.exit_code == 1
    assert re.search(r"\.json: \d+ contradictions\n(.*\n)*  layer 3, raw, effective_rank: the value is", run.stdout)
    assert re.search(r"^\S+torn.json is not a measurement record of schema 3: at the whole file: ", run.stdout, re.M)
    assert run.stdout.count("torn.json") == 1
    assert "records: 2, consistent: 0, not: 2" in run.stdout
    judged = CliRunner().invoke(app, ["judge", str(path)])
    assert judged.exit_code == 1
    assert judged.stderr.count("\n") == 1
    assert "layer 3, raw, effective_rank" in judged.stderr


@pytest.mark.parametrize("given", ["/dev/zero", "nowhere.json", "."])
def test_verify_says_what_is_no_record(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(app, ["verify", given])
    assert run.exit_code == 1
    assert "Traceback" not in run.output
    assert given in run.output


def test_a_verified_record_is_read_without_a_second_check(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "problems", lambda *_: pytest.fail("checked again"))
    assert load(saved, verified=True).model.name == "r"
