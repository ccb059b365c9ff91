"""The pipeline: ModelSpec -> Measurement. Torch is imported only where the cache has no answer."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import delta_suite
from delta_suite.capture.calibration import DEFAULT_CALIBRATION, MAX_TOKENS, Calibration, load_calibration, tokenize
from delta_suite.errors import RecordError
from delta_suite.metrics.estimate import absent
from delta_suite.metrics.law import law_estimates
from delta_suite.metrics.registry import METRICS
from delta_suite.models.control import control_fingerprint
from delta_suite.models.device import resolve_device
from delta_suite.models.files import ModelFiles, fingerprint, locate
from delta_suite.models.phases import phase_map
from delta_suite.models.registry import ModelSpec
from delta_suite.progress import Progress, no_progress
from delta_suite.records.cache import Cache, cache_key, cache_root
from delta_suite.records.record import (
    SCHEMA,
    CalibrationRecord,
    CertificateRecord,
    IdentityRecord,
    LawRecord,
    Measurement,
    ModelRecord,
    Provenance,
    SinkRecord,
    StreamRecord,
    assemble,
    metric_versions,
)
from delta_suite.records.store import RESULTS, save
from delta_suite.reduction.statistics import TOP_K
from delta_suite.reduction.variants import VARIANTS

if TYPE_CHECKING:
    from delta_suite.capture.certificate import Certificate
    from delta_suite.capture.sinks import Sinks
    from delta_suite.capture.stream import Storage
    from delta_suite.reduction.law_scores import Law

LIBRARIES = ("torch", "transformers", "numpy", "tokenizers", "safetensors", "accelerate", "gguf")
"""Whose versions a record names."""


@dataclass(frozen=True)
class Settings:
    """What the user chose for a run; everything else follows from the model."""

    calibration: str = DEFAULT_CALIBRATION
    documents: int | None = None
    """Only the first documents of the calibration; None: all of them (of a hub dataset, a fixed number)."""
    device: str = "auto"
    dtype: str | None = None
    """None: what the model's entry says."""
    results: Path = RESULTS
    fresh_since: float | None = None
    """Cache entries made before this moment (seconds since the epoch) do not count."""
    cache: Cache = field(default_factory=lambda: Cache(cache_root()))


@dataclass(frozen=True)
class Outcome:
    """A measurement, the record it was written to, and whether the cache had it."""

    measurement: Measurement
    record: Path
    cached: bool
    note: str | None = None
    """What the user is told of how it came about, in one line."""


def measure(spec: ModelSpec, settings: Settings, progress: Progress = no_progress) -> Outcome:
    """Measure one model, or take it from the cache, and write its record.

    Raises a SuiteError whose message says what to do: the model or its device is not there, the calibration is unfit,
    the stream cannot be captured, an identity of the certificate fails, a folder cannot be written. Where that is the
    cache's, the record is written all the same.
    """
    calibration = load_calibration(settings.calibration, settings.documents)
    device = resolve_device(settings.device, spec)
    files = locate(spec)
    weights = control_fingerprint(files) if spec.random_weights else fingerprint(files, settings.cache.memo)
    revision = None if spec.random_weights else files.revision or spec.revision  # a control is of no commit
    dtype = spec.dtype if settings.dtype is None else settings.dtype
    choices = {
        "dtype": dtype,
        "device": device.split(":")[0],
        "layers_path": spec.layers_path,
        "max_tokens": MAX_TOKENS,
        "top_k": TOP_K,
        "variants": list(VARIANTS),
        "drop_first_token": calibration.drop_first_token,
    }
    key = cache_key(
        schema=SCHEMA,
        weights=weights,
        calibration=calibration.sha256,
        metrics=metric_versions(),
        libraries={name: library_version(name) for name in ("torch", "transformers")},
        **choices,
    )
    note, not_kept = None, None
    with settings.cache.lock(key):
        try:
            measurement = settings.cache.get(key, settings.fresh_since)
        except RecordError as error:
            measurement, note = None, f"{error}; {spec.name} was measured again"
        cached = measurement is not None
        if measurement is None:
            run = _Run(spec, files, calibration, device, dtype, weights, key, choices)
            measurement, arrays = _measure(run, progress)
            try:
                measurement = settings.cache.put(key, measurement, arrays)
            except RecordError as error:
                not_kept = error  # raised once the record is written: what was measured is not lost
    # Phases and names are the user's, not the measurement's: put on anew each time, without a model.
    shown = measurement.under(
        phase_map(measurement.model.layers, spec.phases),
        name=spec.name,
        source=spec.source,
        revision=revision,
    )
    record = save(settings.results, shown, settings.cache)
    if not_kept is not None:
        raise RecordError(f"{not_kept} The record is written: {record}.")
    return Outcome(shown, record, cached, note)


@dataclass(frozen=True)
class _Run:
    spec: ModelSpec
    files: ModelFiles
    calibration: Calibration
    device: str
    dtype: str
    fingerprint: str
    key: str
    choices: dict[str, Any]


def _measure(run: _Run, progress: Progress) -> tuple[Measurement, dict[str, np.ndarray]]:
    """Load, tokenize, capture, reduce, assemble."""
    import torch

    from delta_suite.capture.residual import capture
    from delta_suite.capture.sinks import SINK_RATIO
    from delta_suite.capture.stream import ResidualStream
    from delta_suite.models.blocks import find_decoder
    from delta_suite.models.loading import load
    from delta_suite.reduction.law_fit import measure_law
    from delta_suite.reduction.reduce import reduce_stream

    clock = _Clock()
    for gpu in _started_gpus():  # a second model in one process; before the first there is nothing to reset
        torch.cuda.reset_peak_memory_stats(gpu)
    with clock("load"):
        loaded = load(run.spec, run.files, device=run.device, dtype=run.dtype)
        model: Any = loaded.model
        devices = [torch.device(name) for name in loaded.devices]
        decoder = find_decoder(model, run.spec.layers_path)
        sequences = tokenize(
            run.calibration,
            loaded.tokenizer,
            model.get_input_embeddings().weight.shape[0],
            getattr(decoder.config, "max_position_embeddings", None),
        )
    certificates: list[Certificate] = []
    kept: list[tuple[Storage, int]] = []  # where a shard was, and its bytes
    sinks: list[Sinks] = []
    laws: list[Law | None] = []
    blocks = len(decoder.blocks)
    phases = phase_map(blocks, run.spec.phases)
    dropped = sum(first and sequences.drop_first_token for first in sequences.starts_document)

    tokens = sequences.tokens - dropped
    with (
        progress(f"{run.spec.name}: capture", sequences.tokens, "token") as captured,
        progress(f"{run.spec.name}: analysis", tokens * blocks, "token") as analysed,
    ):

        def streams() -> Iterator[ResidualStream]:
            shards = capture(model, decoder, sequences, device=devices[0], advance=captured.update)
            while True:
                with clock("capture"):
                    item = next(shards, None)
                if item is None:
                    return
                stream, certificate = item
                certificates.append(certificate)
                kept.append((stream.storage, stream.nbytes))
                whole = len(stream.kept) == sequences.tokens
                yield stream  # its sinks are found, and its layers reduced, when the next one is asked for
                with clock("law"):
                    laws.append(measure_law(stream, phases, devices, sinks=sinks[-1]) if whole else None)
                del item, stream  # a shard is large, and the next one is filled now

        with torch.no_grad(), clock("analysis"):
            spectra = reduce_stream(
                streams(),
                layers=blocks,
                tokens=tokens,
                documents=len(run.calibration.documents),
                variants=list(VARIANTS),
                devices=devices,
                advance=analysed.update,
                found_sinks=sinks.append,
            )
    clock.subtract("analysis", "capture")
    clock.subtract("analysis", "law")

    certificate = certificates[0]
    for other in certificates[1:]:
        certificate = certificate + other
    measurement, arrays = assemble(
        spectra,
        model=ModelRecord(
            name=run.spec.name,
            source=run.spec.source,
            revision=None,  # as the name and the source, put on by `measure` each time
            fingerprint=run.fingerprint,
            architecture=type(loaded.model).__name__,
            layers=blocks,
            hidden=spectra["raw"][0].statistics.hidden,
        ),
        calibration=CalibrationRecord(
            name=run.calibration.name,
            sha256=run.calibration.sha256,
            documents=len(run.calibration.documents),
            first=run.calibration.first,
            tokens_per_document=run.calibration.tokens_per_document,
            tokens=tokens,
            dropped=dropped,
        ),
        sinks=SinkRecord(
            position_zero=sum(own.first for own in sinks),
            large_norm=sum(own.large for own in sinks),
            ratio=SINK_RATIO,
            largest=tuple(sorted((row for own in sinks for row in own.largest), key=lambda row: -row[3])[:10]),
        ),
        certificate=_certificate_record(certificate),
        provenance=Provenance(
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            suite=delta_suite.__version__,
            git=_git(),
            dtype=loaded.dtype,
            attention=loaded.attention,
            device=devices[0].type,
            hardware=hardware(devices),
            versions={"python": platform.python_version()} | {name: library_version(name) for name in LIBRARIES},
            settings=run.choices | {"blocks_path": decoder.path, "blocks_left_out": list(decoder.left_out)},
            metric_versions=metric_versions(),
            seconds=clock.seconds,
            peak_memory_bytes=_peak_memory(),
            stream=StreamRecord(storage=kept[0][0], shards=len(kept), largest_bytes=max(size for _, size in kept)),
            cache_key=run.key,
        ),
        law=law_record(laws[0], phases),
    )
    # Computed for the model's phases once, here; other phase maps are put on from the arrays.
    return measurement.under(phases), arrays


def law_record(law: Law | None, phases: Mapping[str, tuple[int, int]]) -> LawRecord:
    """The law's part of a record. `law`: None where the stream came in several shards."""
    own = {name: (first, last) for name, (first, last) in phases.items()}
    if law is None:
        why = absent("the update law needs the whole stream at once, and it came in several shards")
        metrics = {name: {m.name: why for m in METRICS.values() if m.from_law} for name in own}
        return LawRecord(phases=own, metrics=metrics, transfer=())
    transfer = law.transfer[0].round(5).tolist() if law.reason is None else []
    return LawRecord(
        phases=own,
        metrics={name: law_estimates(law, name) for name in own},
        transfer=tuple(tuple(None if math.isnan(r2) else r2 for r2 in row) for row in transfer),
    )


def _certificate_record(certificate: Certificate) -> CertificateRecord:
    identities = {
        identity.name: IdentityRecord(says=identity.says, error=identity.error, tolerance=identity.tolerance)
        for identity in certificate.identities
    }
    return CertificateRecord(
        holds=True,
        blocks=certificate.blocks,
        forward_passes=certificate.forward_passes,
        final_norm=certificate.final_norm,
        identities=identities,
    )


class _Clock:
    """Wall seconds per step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = round(self.seconds.get(step, 0.0) + time.perf_counter() - started, 3)

    def subtract(self, outer: str, inner: str) -> None:
        """What `inner` took inside `outer` is not outer's own."""
        self.seconds[outer] = round(self.seconds[outer] - self.seconds[inner], 3)


def library_version(distribution: str) -> str:
    """The installed version, or "not installed"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git() -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout that the suite's code is imported from, if it is one."""
    root = Path(delta_suite.__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "suite"))}
    except (OSError, subprocess.SubprocessError):
        return None  # no git program, or no commit yet: the record then says that the state is unknown


def hardware(devices: Sequence[Any] = ()) -> str:
    """What the numbers and seconds were measured on, in words; without devices, the CPU."""
    if devices and devices[0].type == "cuda":
        import torch

        names = [torch.cuda.get_device_name(device) for device in devices]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return f"{processor}, {os.cpu_count()} cores"


def _started_gpus() -> range:
    """The GPUs, if CUDA has been started: before that torch has no figures of them, and refuses to be asked."""
    import torch

    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)  # type: ignore[no-untyped-call]


def _peak_memory() -> dict[str, int]:
    import resource

    import torch

    scale = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    for index in _started_gpus():
        if used := torch.cuda.max_memory_allocated(index):
            peak[f"cuda:{index}"] = used
    return peak
