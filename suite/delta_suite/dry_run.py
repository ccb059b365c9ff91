"""Forecast of a measurement: what would run, what the cache has, what it would take. No weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from delta_suite.command_line import PARTS
from delta_suite.errors import IncompleteError, RecordError
from delta_suite.models.device import SHARDED, hardware
from delta_suite.models.spec import ModelSpec
from delta_suite.models.subject import StoredModel
from delta_suite.pipeline import ALONE, Run, Settings, prepare, stored, token_sequences
from delta_suite.provenance import hardware_in_words
from delta_suite.reading import UnreadableFileError, parse_json, read_text
from delta_suite.records.cache import RECORD
from delta_suite.records.parts import missing_parts
from delta_suite.records.store import RUNS

ABOUT_AS_MANY = 0.01
"""Relative difference up to which two numbers of tokens take the same time."""


@dataclass(frozen=True)
class Size:
    """Size of a measurement, from the config's shape and the tokenizer."""

    described: str
    """Architecture, layers, width, tokens."""
    parameters: int
    weights: int
    """Bytes of the weights in memory."""
    stream: int
    """Bytes of the residual stream."""
    law: int | None
    """Bytes of the sums and the algebra of the update law; None where it would not be fitted."""


@dataclass(frozen=True)
class Like:
    """A stored measurement of the same architecture and as many tokens, on this hardware."""

    path: Path
    seconds: dict[str, float]
    """Seconds of each step that would run."""
    peak: dict[str, int]
    """Peak memory of the process and of each GPU, in bytes."""


@dataclass(frozen=True)
class Forecast:
    """Forecast of the measurement of one model."""

    spec: ModelSpec
    absent: str | None = None
    """Message about a model that has to be downloaded; nothing else is known before."""
    where: str = ""
    """Dtype and device, and the memory of all devices of its kind."""
    missing: tuple[str, ...] = ()
    """The parts that would be measured."""
    note: str | None = None
    """Message about a damaged entry of the cache, or about a forecast that is not complete."""
    size: Size | None = None
    like: Like | None = None

    @property
    def runs(self) -> str:
        """The parts that would run, in words."""
        if not self.missing:
            return "nothing: every part is in the cache"
        cached = "nothing of it" if "spectra" in self.missing else "the rest"
        return f"{', '.join(self.missing)} ({cached} is in the cache)"

    def lines(self) -> Iterator[str]:
        """Yield the forecast as lines of text."""
        if self.absent is not None:
            yield f"{self.spec.name}: not on this machine, and nothing more is known before it is"
            yield f"  would run  a download, then the measurement. {self.absent}"
            return
        described = "" if self.size is None else f" {self.size.described};"
        yield f"{self.spec.name}:{described} {self.where}"
        yield f"  would run  {self.runs}"
        if self.note is not None:
            yield f"  note       {self.note}"
        if self.size is not None:
            law = "" if self.size.law is None else f", update law {_bytes(self.size.law)}"
            yield (
                f"  memory     weights {_bytes(self.size.weights)} ({self.size.parameters:,} parameters), "
                f"residual stream {_bytes(self.size.stream)}{law};"
            )
            yield "             the forward pass of a batch and the algebra of a layer come on top"
        if self.like is not None:
            steps = ", ".join(f"{step} {seconds:.0f} s" for step, seconds in self.like.seconds.items())
            peaks = ", ".join(f"{_bytes(peak)} on {place}" for place, peak in self.like.peak.items())
            yield f"  time       about {sum(self.like.seconds.values()):.0f} s ({steps}), and a peak of {peaks},"
            yield f"             as {self.like.path} took: the same architecture, tokens, dtype and hardware"
        elif self.missing == ("boundaries",):
            yield "  time       seconds, from what is in the cache; no model is loaded"
        elif self.missing:
            yield "  time       unknown: no record of this architecture, with as many tokens, dtype and hardware"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def forecast(spec: ModelSpec, settings: Settings) -> Forecast:
    """Return what a measurement would do. Weights are hashed for the cache's key, and neither downloaded nor loaded.

    Raises the SuiteError that a measurement would end with, as far as it shows before weights are loaded.
    """
    try:
        model = stored(spec, settings, download=False)
        run = prepare(model, settings)
    except IncompleteError as error:
        if spec.hub is None:
            raise
        return Forecast(spec, absent=f"{error.what}. {error.do}")
    note, record = None, None
    try:
        entry = settings.cache.read(run.key, settings.fresh_since)
        record = None if entry is None else entry.record
    except RecordError as error:
        note = f"{error}, and would be measured again"
    missing = missing_parts(run.subject.phases, record, settings.parts)
    known = Forecast(spec, missing=tuple(part for part in PARTS if part in missing), note=note)
    if record is not None and missing <= {"boundaries"}:
        return replace(known, where=_where(record.provenance.dtype, run))
    return _sized(model, run, settings, known)


def _where(dtype: str, run: Run) -> str:
    here = hardware()
    memory = (
        sum(gpu.memory_gb for gpu in here.gpus) if run.subject.device.startswith(("cuda", SHARDED)) else here.memory_gb
    )
    return f"{dtype} on {run.subject.device} (of {memory:.0f} GB)"


def _sized(stored_model: StoredModel, run: Run, settings: Settings, known: Forecast) -> Forecast:
    """Return the forecast with memory and time, from the architecture without weights and the tokenizer."""
    from delta_suite.capture.residual import hidden_size, stream_bytes
    from delta_suite.models.blocks import find_decoder
    from delta_suite.models.loading import SkeletonError, skeleton
    from delta_suite.models.tokenizer import load_tokenizer
    from delta_suite.reduction.law_fit import expected_law_bytes

    try:
        model, quantised = skeleton(stored_model.spec, stored_model.files, stored_model.dtype)
    except SkeletonError as error:
        note = f"memory unknown: the architecture cannot be built without its weights ({error})"
        return replace(known, where=_where(run.subject.dtype, run), note=note)
    decoder = find_decoder(model, run.subject.layers_path)
    sequences = token_sequences(run, model, decoder, load_tokenizer(stored_model.spec, stored_model.files))
    dtype, layers, hidden = str(model.dtype).removeprefix("torch."), len(decoder.blocks), hidden_size(model, decoder)
    documents, units = len(run.calibration.documents), run.calibration.units.count
    stored_bytes = sum(path.stat().st_size for path in stored_model.files.weights)
    size = Size(
        described=f"{type(model).__name__}, {layers} layers x {hidden}; calibration {run.calibration.name}, "
        f"{documents} document{'' if documents == 1 else 's'}, {sequences.tokens} tokens",
        parameters=model.num_parameters(),
        weights=stored_bytes if quantised else model.get_memory_footprint(),
        stream=stream_bytes(model, decoder, sequences.tokens),
        law=expected_law_bytes(layers, hidden, sequences.tokens, units) if "law" in known.missing else None,
    )
    shape = {"architecture": type(model).__name__, "layers": layers, "hidden": hidden}
    like = _like(run, settings, known.missing, shape, dtype, sequences.tokens)
    return replace(known, where=_where(dtype, run), size=size, like=like)


def _like(
    run: Run, settings: Settings, missing: tuple[str, ...], shape: dict[str, Any], dtype: str, tokens: int
) -> Like | None:
    """Return the newest record of this shape, dtype and hardware and of as many tokens, if there is one."""
    import torch

    device = run.subject.device
    names = [f"cuda:{index}" for index in range(len(hardware().gpus))] if device == SHARDED else [device]
    here = hardware_in_words([torch.device(name) for name in names])
    steps = [
        "load",
        "capture",
        *(["analysis"] if "spectra" in missing else []),
        *sorted(ALONE & set(missing)),
    ]
    newest: tuple[str, Like] | None = None
    kept = [*settings.results.glob(f"{RUNS}/*/*.json"), *settings.cache.root.glob(f"measurements/*/{RECORD}")]
    for path in kept:
        try:
            text = read_text(path)
            if f'"{shape["architecture"]}"' not in text:
                continue
            record = parse_json(text, path)
            provenance, calibration = record["provenance"], record["calibration"]
            run_tokens = calibration["tokens"] + calibration["dropped"]
            alike = (
                {name: record["model"][name] for name in shape} == shape
                and (provenance["dtype"], provenance["hardware"]) == (dtype, here)
                and abs(run_tokens - tokens) <= ABOUT_AS_MANY * tokens
                and all(step in provenance["seconds"] for step in steps)
            )
            if alike and (newest is None or provenance["created"] > newest[0]):
                spent = provenance["seconds"]  # older ones have no clock for what is in no other
                seconds = {step: float(spent[step]) for step in (*steps, "other") if step in spent}
                newest = provenance["created"], Like(path, seconds, provenance["peak_memory_bytes"])
        except (UnreadableFileError, LookupError, TypeError, ValueError):
            continue  # no record, or a damaged one: others may do
    return newest and newest[1]
