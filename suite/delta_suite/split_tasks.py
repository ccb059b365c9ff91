"""Tasks of a measurement whose calibration is split, as they travel to a worker and back; split.py puts them together.

A worker keeps the model that it has loaded from one task to the next.
"""

from __future__ import annotations

import hashlib
import pickle
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from delta_suite.capture.units import Units
from delta_suite.capture.work_units import work_units
from delta_suite.errors import DeviceError, EngineError, brief
from delta_suite.paths import cache_root
from delta_suite.pipeline import prepare, stored, token_sequences
from delta_suite.provenance import Clock, started_gpus
from delta_suite.records.arrays import pack, unpack
from delta_suite.records.cache import Cache
from delta_suite.records.captured import calibration_record, certificate_record, provenance_record, sink_record
from delta_suite.records.partial_sums import Facts, LawTokens, PartialSums, law_file, moments_file
from delta_suite.records.record import CalibrationRecord, ModelRecord
from delta_suite.remote import Terms, fix_threads, portable

if TYPE_CHECKING:
    from delta_suite.capture.stream import ResidualStream
    from delta_suite.models.blocks import Decoder
    from delta_suite.models.loading import LoadedModel
    from delta_suite.models.spec import ModelSpec
    from delta_suite.models.subject import StoredModel
    from delta_suite.reduction.replicates import LayerSpectra


@dataclass(frozen=True)
class Survey:
    """Answer of the first task of a measurement."""

    key: str
    revision: str | None
    notes: tuple[str, ...]
    plan: Plan | None = None
    """None where the sender's cache holds the measurement."""


@dataclass(frozen=True)
class Plan:
    """Everything about a measurement that its other tasks follow from."""

    model: ModelRecord
    calibration: CalibrationRecord
    choices: dict[str, Any]
    medians: tuple[float | None, ...]
    """The median norm of each state over the first documents of the calibration, None where no token has one."""
    units: tuple[bytes, ...]
    """The token sequences of each unit of work, pickled."""


@dataclass(frozen=True)
class UnitTask:
    """One unit of work, as it travels to a worker."""

    spec: ModelSpec
    fingerprint: str
    key: str
    choices: dict[str, Any]
    medians: tuple[float | None, ...]
    groups: Units
    group: int
    """The group of its documents, of at most ADDED_GROUPS."""
    law: bool
    """True to add up the law's sums, too."""
    sequences: bytes


@dataclass(frozen=True)
class LayerTask:
    """The sums of one layer over all units of work, as they travel to a worker."""

    layer: int
    hidden: int
    tokens: int
    epsilon: float
    groups: Units
    device: str
    sums: tuple[bytes, ...]
    """The sums of each unit, in the order in which they are added."""


@dataclass
class _OpenModel:
    """A model that a worker has loaded."""

    subject: StoredModel
    asked: tuple[Any, ...]
    """What decides which model it is, and where it lies."""
    loaded: LoadedModel
    decoder: Decoder
    stack: ExitStack
    seconds: float
    """Seconds that loading took, until a task has told them."""


_open: list[_OpenModel] = []
"""The model that this worker has loaded, which it keeps from one unit of work to the next."""


def _opened(terms: Terms, spec: ModelSpec) -> _OpenModel:
    """Return the model, loaded; another one is freed. Raises EngineError for a worker of other versions."""
    terms.adopt()
    settings = replace(terms.settings, cache=Cache(cache_root()))
    subject = stored(spec, settings)
    asked = (spec, settings.device, settings.dtype, subject.fingerprint)
    if not _open or _open[0].asked != asked:
        from delta_suite.models.blocks import find_decoder

        while _open:
            _open.pop().stack.close()
        started, stack = time.perf_counter(), ExitStack()
        loaded = stack.enter_context(subject.opened())
        decoder = find_decoder(loaded.model, subject.layers_path)
        _open.append(_OpenModel(subject, asked, loaded, decoder, stack, round(time.perf_counter() - started, 3)))
    return _open[0]


def _answered(name: str, answer: Callable[[], object]) -> bytes:
    """Return what a task answers, or the error that it ends with, in a form that travels."""
    from delta_suite.models.undisturbed import usual_torch

    try:
        with usual_torch():
            return pickle.dumps((answer(), None))
    except Exception as error:  # whatever hinders it is told by the sender
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
            error = DeviceError(
                f"memory ran out at {platform.node()} ({brief(error)}). Let fewer workers run on a machine, or use one "
                f"with more memory."
            )
        return pickle.dumps((None, portable(error, name)))


def survey(terms: bytes, spec: bytes, held: frozenset[str]) -> bytes:
    """Return the `Survey` of a model. held: keys of the measurements that the sender's cache holds."""
    model: ModelSpec = pickle.loads(spec)
    return _answered(model.name, lambda: _surveyed(pickle.loads(terms), model, held))


def _surveyed(terms: Terms, spec: ModelSpec, held: frozenset[str]) -> Survey:
    ((name, calibration),) = terms.calibrations.items()
    settings = replace(terms.settings, calibration=name, cache=Cache(cache_root()))
    run = prepare(stored(spec, settings), settings, calibration)
    known = run.subject.revision, run.subject.notes
    if run.key in held:
        return Survey(run.key, *known)
    import torch

    from delta_suite.capture.residual import Capture
    from delta_suite.models.parallel import class_name
    from delta_suite.reduction.passes import Captured

    opened = _opened(terms, spec)
    model, decoder = opened.loaded.model, opened.decoder
    sequences = token_sequences(run, model, decoder, opened.loaded.tokenizer)
    capture = Capture(model, decoder, sequences, device=torch.device(opened.loaded.devices[0]))
    norms = capture.reference_norms()
    captured = Captured(len(decoder.blocks), sequences.tokens - sequences.dropped, sequences.dropped, 0, 0)
    plan = Plan(
        model=ModelRecord(
            name=run.subject.name,
            source=run.subject.source,
            fingerprint=run.subject.fingerprint,
            architecture=class_name(model),
            layers=captured.blocks,
            hidden=capture.hidden,
        ),
        calibration=calibration_record(calibration, sequences, captured, run.choices["chat_template"]),
        choices=run.choices,
        medians=tuple(float(each.median()) if len(each) else None for each in norms),
        units=tuple(pickle.dumps(sequences.of(set(unit.documents))) for unit in work_units(calibration.units)),
    )
    return Survey(run.key, *known, plan)


def sum_unit(terms: bytes, task: bytes) -> bytes:
    """Capture one unit of work, and return its `PartialSums`."""
    unit: UnitTask = pickle.loads(task)
    return _answered(unit.spec.name, lambda: _summed(pickle.loads(terms), unit))


def _summed(terms: Terms, task: UnitTask) -> PartialSums:
    import torch

    from delta_suite.capture.residual import Capture, hidden_size
    from delta_suite.capture.sinks import Sinks, find_sinks
    from delta_suite.reduction.lanes import rows_at_once
    from delta_suite.reduction.law_units import LawUnit
    from delta_suite.reduction.packed import packed
    from delta_suite.reduction.passes import Captured
    from delta_suite.reduction.reduce import add_up

    opened = _opened(terms, task.spec)
    if opened.subject.fingerprint != task.fingerprint:
        raise EngineError(
            f"the files of {task.spec.name} at {platform.node()} are not those of the other workers. "
            "Copy the same files to every machine."
        )
    for gpu in started_gpus():
        torch.cuda.reset_peak_memory_stats(gpu)
    loaded, decoder, clock = opened.loaded, opened.decoder, Clock()
    clock.seconds["load"], opened.seconds = opened.seconds, 0.0
    devices = [torch.device(name) for name in loaded.devices]
    sequences = pickle.loads(task.sequences)
    reference = [torch.zeros(0) if median is None else torch.tensor([median]) for median in task.medians]
    rows = rows_at_once(hidden_size(loaded.model, decoder))
    capture = Capture(loaded.model, decoder, sequences, device=devices[0], shard_rows=rows)
    kept, planned = sequences.tokens - sequences.dropped, capture.planned_tokens
    captured = Captured(len(decoder.blocks), kept, sequences.dropped, planned, planned)
    epsilons = set()

    def shards() -> Iterator[ResidualStream]:
        waiting = capture.shards()
        while True:
            with clock("capture"):
                item = next(waiting, None)
            if item is None:
                return
            epsilons.add(torch.finfo(item[0].states[0].dtype).eps)
            captured.certificates.append(item[1])
            captured.storage.append((item[0].storage, item[0].nbytes))
            yield item[0]
            del item  # a shard is large, and the next one is filled now

    law = LawUnit(captured.blocks, capture.hidden, devices) if task.law else None

    def sinks(stream: ResidualStream) -> Sinks:
        chosen = find_sinks(stream, reference)
        captured.sinks.append(replace(chosen, dropped=chosen.dropped[:0]))
        if law is not None:
            with clock("law"):
                law.add(stream, chosen.dropped)
        return chosen

    with torch.no_grad(), clock("analysis"):
        moments = add_up(shards(), layers=captured.blocks, units=task.groups, devices=devices, sinks=sinks)
    for inner in {"capture", "law"} & clock.seconds.keys():
        clock.subtract("analysis", inner)
    captured.batch_tokens = capture.batch_tokens
    files = {}
    for layer in range(captured.blocks):
        files[moments_file(layer)] = pack(packed(moments[layer]))
        moments[layer] = {}
        if law is not None:
            files[law_file(layer)] = pack(law.products.pop(0).packed(task.group))
    facts = Facts(
        sinks=sink_record(captured.sinks),
        certificate=certificate_record(captured.certificates),
        provenance=provenance_record(task.choices, task.key, loaded, decoder, captured, clock.seconds),
        epsilon=max(epsilons),
        law=None if law is None else LawTokens(tokens=law.tokens, documents=len(law.documents)),
        files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    )
    return PartialSums(facts, files)


def solve_layer(terms: bytes, task: bytes) -> bytes:
    """Add up the sums of a layer, and return its spectra by variant."""
    layer: LayerTask = pickle.loads(task)
    return _answered(f"layer {layer.layer}", lambda: _solved(pickle.loads(terms), layer))


def _solved(terms: Terms, task: LayerTask) -> dict[str, LayerSpectra]:
    import torch

    from delta_suite.reduction.gram import algebra_device
    from delta_suite.reduction.packed import added, unpacked
    from delta_suite.reduction.reduce import solve_moments

    fix_threads(terms.threads)
    device = algebra_device(torch.device(task.device))
    total = added(unpack(content, cache_root()) for content in task.sums)
    moments = unpacked(total, task.hidden, device)
    with torch.no_grad():
        return solve_moments(
            moments, layer=task.layer, tokens=task.tokens, units=task.groups, device=device, epsilon=task.epsilon
        )
