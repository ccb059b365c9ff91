"""The pipeline: a model becomes a record. Torch is imported only where the cache has no answer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_suite.capture.calibration import Calibration, load_calibration, load_calibrations
from delta_suite.capture.plan import REFERENCE_DOCUMENTS, tokens_per_batch
from delta_suite.capture.tokens import MAX_TOKENS, TokenSequences, tokenize
from delta_suite.capture.work_units import work_units
from delta_suite.command_line import DEFAULT_CALIBRATION, DEFAULT_DEVICE, DEFAULT_PARTS, check_settings
from delta_suite.engine import local
from delta_suite.engine.work import Item
from delta_suite.errors import RecordError
from delta_suite.metrics.registry import chosen_parts, metric_versions
from delta_suite.models.phases import PhaseMap, phase_map
from delta_suite.models.spec import ModelSpec
from delta_suite.models.subject import StoredModel, Subject
from delta_suite.models.zeros import zero_note
from delta_suite.paths import cache_root
from delta_suite.process_group import MODES, current
from delta_suite.progress import Progress, no_progress
from delta_suite.provenance import Clock, keyed_versions, started_gpus
from delta_suite.records.arrays import ArrayFile
from delta_suite.records.assemble import Assembled, assemble, measured_later, with_boundaries, with_rest
from delta_suite.records.cache import ARRAYS, DIRECTIONS, Cache, cache_key
from delta_suite.records.captured import calibration_record, certificate_record, provenance_record, sink_record
from delta_suite.records.format import from_json, to_json
from delta_suite.records.parts import missing_parts, with_parts
from delta_suite.records.record import SCHEMA, ModelRecord, Provenance
from delta_suite.records.store import RESULTS, save
from delta_suite.records.view import RecordView
from delta_suite.reduction.statistics import TOP_K
from delta_suite.reduction.variants import BLOCK_VARIANTS

if TYPE_CHECKING:
    from delta_suite.reduction.passes import Captured


ALONE = frozenset({"law", "writes", "stream", "causal", "damage"})
"""Parts that one process measures alone."""


@dataclass(frozen=True)
class Settings:
    """The choices of a run; everything else follows from the model."""

    calibration: str = DEFAULT_CALIBRATION
    documents: int | None = None
    """Only the first documents of the calibration; None for all of them (of a hub dataset, a fixed number)."""
    chat_template: bool = False
    """True if each document is one message of a user in the model's own chat template."""
    device: str = DEFAULT_DEVICE
    dtype: str | None = None
    """None for the dtype of the model's entry."""
    parts: frozenset[str] = frozenset(DEFAULT_PARTS)
    """The parts that are measured: spectra always; boundaries, law, writes, stream, causal and damage where named."""
    results: Path = RESULTS
    fresh_since: float | None = None
    """Cache entries written before this moment (seconds since the epoch) do not count."""
    split_calibration: bool = False
    """True if the calibration is captured in units of work, by several workers together."""
    cache: Cache = field(default_factory=lambda: Cache(cache_root()))

    def __post_init__(self) -> None:
        """Raise OptionError for a value that does not exist, before anything is measured."""
        check_settings(self.device, self.dtype, self.documents)


def chosen_settings(
    *,
    calibration: str | None = None,
    documents: int | None = None,
    chat_template: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    parts: str | Iterable[str] = DEFAULT_PARTS,
    results: Path = RESULTS,
    fresh: bool = False,
) -> Settings:
    """Return the settings of a measurement from the options of the command line, or what Python is given.

    fresh: measure again, whatever the cache holds. Raises OptionError for a value that does not exist.
    """
    return Settings(
        calibration=DEFAULT_CALIBRATION if calibration is None else calibration,
        documents=documents,
        chat_template=chat_template,
        device=DEFAULT_DEVICE if device is None else device,
        dtype=dtype,
        parts=chosen_parts(parts),
        results=results,
        fresh_since=time.time() if fresh else None,
    )


@dataclass(frozen=True)
class Outcome:
    """A measured model, the record it was written to, and whether the cache had all of it."""

    view: RecordView
    path: Path
    cached: bool
    notes: tuple[str, ...] = ()
    """Lines for the user about how the measurement came about."""


def measure_all(
    work: Iterable[Item], settings: Settings, progress: Progress = no_progress
) -> Iterator[tuple[Item, Outcome | Exception]]:
    """Measure one item after the other here; yield each with its outcome, or the error that hindered it.

    settings: those of every item but for its calibration, which it names itself. Where several processes measure
        together, the first of them reads the texts and yields. Raises CalibrationError before anything is measured.
    """
    items = list(work)
    texts = load_calibrations((item.calibration for item in items if not current().rank), settings.documents)

    def measure_item(item: Item) -> Outcome:
        return measure(item.spec, replace(settings, calibration=item.calibration), progress, texts[item.calibration])

    if current().mode:
        return local.run_together(items, measure_item, lambda item, told: take_part(item.spec, told, settings))
    return local.run(items, measure_item)


def measure(
    spec: ModelSpec, settings: Settings, progress: Progress = no_progress, calibration: Calibration | None = None
) -> Outcome:
    """Measure one model, or take it from the cache, and write its record.

    What the cache has under the same key is completed, not repeated. `calibration`: the texts, where they are read.
    Raises a SuiteError whose message says what to do: the model or its device is not there, the calibration is unfit,
    the stream cannot be captured, an identity of the certificate fails, the results folder cannot be written. A cache
    that cannot be written is a note of the outcome.
    """
    return written(measure_view(spec, settings, progress, calibration), settings)


@dataclass(frozen=True)
class Measured:
    """A measured model whose record has not been written."""

    view: RecordView
    cached: bool
    """True if the cache had all of it."""
    notes: tuple[str, ...] = ()
    """Lines for the user about how the measurement came about."""
    kept: bool = True
    """True if the cache holds it; else a note says why not."""

    @property
    def told(self) -> tuple[str, ...]:
        """The notes, and what the record says of the weights, whether or not it comes from the cache."""
        zero = self.view.record.provenance.zero_weights
        return (*self.notes, zero_note(self.view.model.name, zero)) if zero else self.notes


def written(measured: Measured, settings: Settings) -> Outcome:
    """Write the record of a measured model. Raises RecordError where the results folder cannot be written."""
    try:
        path, view = save(settings.results, measured.view, settings.cache)
    except RecordError as error:
        if measured.kept:
            raise RecordError(f"{error} The cache keeps the measurement of {measured.view.model.name}.") from None
        raise
    return Outcome(view, path, measured.cached, measured.told)


def measure_view(
    model: ModelSpec | Subject,
    settings: Settings,
    progress: Progress = no_progress,
    calibration: Calibration | None = None,
) -> Measured:
    """Measure one model, or take it from the cache, without writing a record. Raises as `measure` does.

    calibration: the texts, where they are not those that the settings name.
    """
    started = time.perf_counter()
    run = prepare(model, settings, calibration, progress)
    subject = run.subject
    notes, parts = [*subject.notes], settings.parts - (ALONE if current().mode else frozenset())
    if parts < settings.parts:
        left_out = ", ".join(sorted(settings.parts - parts))
        notes.append(f"{subject.name}: not measured with --device {current().mode}: {left_out}.")
    with settings.cache.lock(run.key):
        entry = held_entry(settings, run.key, subject.name, notes)
        complete = _complete(run, entry, parts, progress)
        cached, kept = complete is entry, True
        if not cached:
            complete = with_rest(complete, entry, time.perf_counter() - started)
            complete, kept = keep_entry(settings.cache, run.key, complete, subject.name, notes)
    view = view_of(settings.cache, run.key, complete)
    view = labelled(view, subject.phases, subject.name, subject.source, subject.revision)
    return Measured(view, cached, tuple(notes), kept)


def held_entry(settings: Settings, key: str, name: str, notes: list[str]) -> Assembled | None:
    """Return what the cache holds of a model; None where that is nothing, or damaged, which is added to the notes."""
    try:
        return settings.cache.get(key, settings.fresh_since)
    except RecordError as error:
        notes.append(f"{error}; {name} was measured again")
        return None


def keep_entry(cache: Cache, key: str, entry: Assembled, name: str, notes: list[str]) -> tuple[Assembled, bool]:
    """Keep an entry; return it as the cache gives it back, and whether it is kept: if not, the notes say why.

    What was measured is not lost then: the caller has it.
    """
    record, _ = from_json(to_json(entry.record), name)
    entry = replace(entry, record=record)
    try:
        cache.put(key, entry)
    except RecordError as error:
        notes.append(not_kept(error, name))
        return entry, False
    return entry, True


def not_kept(error: RecordError, name: str) -> str:
    """Return the note on a measurement that the cache has no room for: what was measured is not lost."""
    return f"{error} {name} is measured, and only the cache does not keep it."


def labelled(view: RecordView, phases: PhaseMap | None, name: str, source: str, revision: str | None) -> RecordView:
    """Return a measurement under the names and phases of this run.

    They are the user's, not the measurement's, and are put on each time, without a model.
    """
    return view.under(phase_map(view.model.layers, phases), name=name, source=source, revision=revision)


@dataclass(frozen=True)
class Run:
    """Everything about a measurement that is known before the model is loaded."""

    subject: Subject
    calibration: Calibration
    cache: Cache
    choices: dict[str, Any]
    key: str
    """The cache key: the SHA-256 of everything that the numbers depend on."""


def prepare(
    model: ModelSpec | Subject,
    settings: Settings,
    calibration: Calibration | None = None,
    progress: Progress = no_progress,
) -> Run:
    """Locate the model and everything it is measured with, without loading it.

    calibration: the texts, where they are not those that the settings name.
    """
    calibration = calibration or load_calibration(settings.calibration, settings.documents)
    subject = stored(model, settings, progress=progress) if isinstance(model, ModelSpec) else model
    device, team = subject.device.split(":")[0], current()
    choices: dict[str, Any] = {
        "dtype": subject.dtype,
        "device": device,
        "layers_path": subject.layers_path,
        "max_tokens": MAX_TOKENS,
        "top_k": TOP_K,
        # Without the writes: an entry that lacks them, or has them in an older version, is completed.
        "variants": {variant.name: variant.version for variant in BLOCK_VARIANTS.values()},
        "drop_first_token": calibration.drop_first_token,
        "units": calibration.units.sha256,
        "chat_template": settings.chat_template,  # without it, special tokens are those that the tokenizer adds
        "sink_reference_documents": REFERENCE_DOCUMENTS,
        "tokens_per_batch": tokens_per_batch(team.device.split(":")[0] if device in MODES else device),
    }
    if device in MODES:
        choices["processes"] = team.size
    if settings.split_calibration:
        choices["work_units"] = len(work_units(calibration.units))
    key = cache_key(
        schema=SCHEMA,
        weights=subject.fingerprint,
        calibration=calibration.sha256,
        metrics=metric_versions(),
        libraries=keyed_versions(),
        **choices,
    )
    return Run(subject, calibration, settings.cache, choices, key)


def stored(
    spec: ModelSpec, settings: Settings, *, download: bool = True, progress: Progress = no_progress
) -> StoredModel:
    """Return the model of a spec as it is measured under these settings; nothing is looked up yet.

    download: fetch the files of a hub model that are not here.
    """
    return StoredModel(spec, settings.device, settings.dtype, settings.cache.memo, download, progress)


def view_of(cache: Cache, key: str, entry: Assembled) -> RecordView:
    """Return a view of an entry as the cache holds it."""
    folder = cache.entry(key)
    return RecordView(
        entry.record,
        ArrayFile(folder / ARRAYS, content=entry.arrays),
        ArrayFile(folder / DIRECTIONS, content=entry.directions),
    )


def _complete(run: Run, entry: Assembled | None, parts: frozenset[str], progress: Progress) -> Assembled:
    """Return the entry with all parts: the one given where it has them, else one with what was missing measured."""
    missing = missing_parts(run.subject.phases, None if entry is None else entry.record, parts)
    if entry is not None and "law" in missing:
        placed = view_of(run.cache, run.key, entry).under(phase_map(entry.record.model.layers, run.subject.phases))
        entry = Assembled(placed.record, placed.content(), entry.directions)
    if entry is None or missing - {"boundaries"}:  # boundaries alone need no model
        entry = _measure(run, entry, missing, progress)
    return entry_with_boundaries(run.cache, run.key, entry) if "boundaries" in missing else entry


def entry_with_boundaries(cache: Cache, key: str, entry: Assembled) -> Assembled:
    """Return an entry with its boundaries, which need no model."""
    return replace(entry, record=with_boundaries(entry.record, view_of(cache, key, entry).gram))


def token_sequences(run: Run, model: Any, decoder: Any, tokenizer: Any) -> TokenSequences:
    """Return the token sequences of the calibration under a model's tokenizer, vocabulary and context."""
    from delta_suite.models.blocks import context_length

    vocabulary, context = model.get_input_embeddings().weight.shape[0], context_length(decoder.config)
    return tokenize(run.calibration, tokenizer, vocabulary, context, chat_template=run.choices["chat_template"])


def _measure(run: Run, entry: Assembled | None, missing: frozenset[str], progress: Progress) -> Assembled:
    """Measure what is missing; assemble a new entry, or complete the one given with what it lacks."""
    run.subject.require_parallel()
    with current().together(run.subject.name, (run.calibration, run.choices, missing, entry is None)):
        return _entry(run, entry, _run_model(run, missing, progress, with_spectra=entry is None))


def take_part(spec: ModelSpec, work: Any, settings: Settings) -> None:
    """Run a model in a process that is not the first: it writes nothing, and returns nothing."""
    calibration, choices, missing, with_spectra = work
    run = Run(stored(spec, settings), calibration, settings.cache, choices, "")
    with current().together(spec.name, None):
        _run_model(run, missing, no_progress, with_spectra=with_spectra)


@dataclass(frozen=True)
class _Ran:
    """What a model was reduced to, and with what."""

    architecture: str
    sequences: TokenSequences
    phases: PhaseMap
    captured: Captured
    provenance: Provenance


def _run_model(run: Run, missing: frozenset[str], progress: Progress, *, with_spectra: bool) -> _Ran:
    """Load, tokenize, capture and reduce.

    The process is left as it was: what the caller has set of torch, and random states.
    """
    import torch

    from delta_suite.models.blocks import find_decoder
    from delta_suite.models.host_memory import kept_pages
    from delta_suite.models.parallel import class_name
    from delta_suite.models.undisturbed import usual_torch
    from delta_suite.reduction.passes import Passes

    clock = Clock()
    for gpu in started_gpus():  # a second model in one process; before the first there is nothing to reset
        torch.cuda.reset_peak_memory_stats(gpu)
    with usual_torch(), ExitStack() as stack:
        with clock("load"):
            loaded = stack.enter_context(run.subject.opened())
            model: Any = loaded.model
            devices = [torch.device(name) for name in loaded.devices]
            if devices[0].type == "cpu":
                stack.enter_context(kept_pages())
            decoder = find_decoder(model, run.subject.layers_path)
            sequences = token_sequences(run, model, decoder, loaded.tokenizer)
        name, phases = run.subject.name, phase_map(len(decoder.blocks), run.subject.phases)
        with progress(f"{name}: capture", sequences.tokens, "token") as capture_bar:
            extra = {"writes": "writes" in missing, "states": "stream" in missing}
            passes = Passes(model, decoder, sequences, devices, clock, capture_bar.update, **extra)
            with progress(f"{name}: analysis", passes.captured.tokens * passes.captured.blocks, "token") as bar:
                captured = passes.run(
                    phases if "law" in missing else None,
                    units=run.calibration.units,
                    with_spectra=with_spectra,
                    causes=phases if "causal" in missing else None,
                    damage="damage" in missing,
                    advance=bar.update,
                    law_progress=partial(progress, f"{name}: law", unit="fit"),
                    release=loaded.release,
                )
        provenance = provenance_record(run.choices, run.key, loaded, decoder, captured, clock.seconds)
        return _Ran(class_name(model), sequences, phases, captured, provenance)


def _entry(run: Run, entry: Assembled | None, ran: _Ran) -> Assembled:
    """Return a new entry, or the one given with what it lacked."""
    captured, provenance = ran.captured, ran.provenance
    if entry is None:
        entry = assemble(
            captured.spectra,
            ran.phases,
            model=ModelRecord(
                name=run.subject.name,
                source=run.subject.source,
                fingerprint=run.subject.fingerprint,
                architecture=ran.architecture,
                layers=captured.blocks,
                hidden=captured.spectra["raw"][0].statistics.hidden,
            ),
            calibration=calibration_record(run.calibration, ran.sequences, captured, run.choices["chat_template"]),
            sinks=sink_record(captured.sinks),
            certificate=certificate_record(captured.certificates),
            provenance=provenance,
            units=run.calibration.units,
        )
    else:
        entry = measured_later(entry, provenance)
    entry = with_parts(entry, captured)
    if (error := captured.error) is not None:
        run.cache.put(run.key, entry)  # the next run need not measure the rest again
        raise error
    return entry
