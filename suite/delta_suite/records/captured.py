"""Texts, sinks, stream, certificate and provenance of a capture, as a record holds them."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from delta_suite.metrics.registry import metric_versions
from delta_suite.process_group import current
from delta_suite.provenance import (
    LIBRARIES,
    git_state,
    hardware_in_words,
    hardware_of_all,
    library_version,
    memory_of_all,
    peak_memory,
    utc_now,
)
from delta_suite.records.record import (
    CalibrationRecord,
    CertificateRecord,
    IdentityRecord,
    Provenance,
    SinkRecord,
    StreamRecord,
)
from delta_suite.version import __version__

if TYPE_CHECKING:
    from delta_suite.capture.calibration import Calibration
    from delta_suite.capture.certificate import Certificate, Identity
    from delta_suite.capture.sinks import Sinks
    from delta_suite.capture.tokens import TokenSequences
    from delta_suite.models.blocks import Decoder
    from delta_suite.models.loading import LoadedModel
    from delta_suite.reduction.passes import Captured

LARGEST_SINKS = 10
"""Number of sinks that a record names."""


def sink_record(sinks: Sequence[Sinks]) -> SinkRecord:
    """Return the tokens that `sink_free` leaves out, from those of each shard."""
    from delta_suite.capture.sinks import SINK_RATIO

    return sinks_of_all(
        [
            SinkRecord(position_zero=each.first, large_norm=each.large, ratio=SINK_RATIO, largest=each.largest)
            for each in sinks
        ]
    )


def sinks_of_all(parts: Sequence[SinkRecord]) -> SinkRecord:
    """Return the sinks of a calibration that was captured in parts, from those of each."""
    largest = sorted((row for part in parts for row in part.largest), key=lambda row: -row[3])
    return SinkRecord(
        position_zero=sum(part.position_zero for part in parts),
        large_norm=sum(part.large_norm for part in parts),
        ratio=parts[0].ratio,
        largest=tuple(largest[:LARGEST_SINKS]),
    )


def identity_record(identity: Identity) -> IdentityRecord:
    """Return an identity of the certificate as a record holds it."""
    return IdentityRecord(says=identity.says, error=identity.error, tolerance=identity.tolerance)


def certificate_record(certificates: Sequence[Certificate]) -> CertificateRecord:
    """Return the certificate of a capture, from those of its shards."""
    return certificate_of_all(
        [
            CertificateRecord(
                holds=True,
                blocks=each.blocks,
                forward_passes=each.forward_passes,
                final_norm=each.final_norm,
                identities={identity.name: identity_record(identity) for identity in each.identities},
            )
            for each in certificates
        ]
    )


def certificate_of_all(parts: Sequence[CertificateRecord]) -> CertificateRecord:
    """Return the certificate of a capture in parts: of each identity the largest error, and all forward passes."""
    identities: dict[str, IdentityRecord] = {}
    for part in parts:
        for name, identity in part.identities.items():
            if name not in identities or identity.error > identities[name].error:
                identities[name] = identity
    passes = sum(part.forward_passes for part in parts)
    return parts[0].model_copy(update={"forward_passes": passes, "identities": identities})


def stream_record(captured: Captured) -> StreamRecord:
    """Return where the stream was held; of several processes, in the one whose memory it filled most."""
    return StreamRecord(
        storage=captured.storage[0][0],
        shards=len(captured.storage),
        largest_bytes=max(size for _, size in captured.storage),
        planned_batch_tokens=captured.planned_tokens,
        batch_tokens=captured.batch_tokens,
    )


def calibration_record(
    calibration: Calibration, sequences: TokenSequences, captured: Captured, chat_template: bool
) -> CalibrationRecord:
    """Return which texts were measured, and what the tokenizer made of them."""
    return CalibrationRecord(
        name=calibration.name,
        sha256=calibration.sha256,
        documents=len(calibration.documents),
        first=calibration.first,
        bytes_per_document=calibration.bytes_per_document,
        tokens=captured.tokens,
        dropped=captured.dropped,
        unknown_tokens=sequences.unknown,
        duplicates=calibration.duplicates,
        begins_with=sequences.begins_with,
        ends_with=sequences.ends_with,
        domains=len(set(calibration.domains)) or None,
        languages=calibration.documents_by_language or None,
        chat_template=chat_template,
    )


def provenance_record(
    choices: Mapping[str, Any],
    cache_key: str,
    loaded: LoadedModel,
    decoder: Decoder,
    captured: Captured,
    seconds: Mapping[str, float],
) -> Provenance:
    """Return how, when and with what a model was measured, in all processes that measure it together."""
    import torch

    devices = [torch.device(name) for name in loaded.devices]
    machines = current().gathered((hardware_in_words(devices), peak_memory())) or [("", {})]
    return Provenance(
        created=utc_now(),
        suite=__version__,
        git=git_state(),
        dtype=loaded.dtype,
        attention=loaded.attention,
        device=devices[0].type,
        hardware=hardware_of_all(machines),
        versions={"python": platform.python_version()} | {name: library_version(name) for name in LIBRARIES},
        settings=dict(choices)
        | {
            "blocks_path": decoder.path,
            "blocks_left_out": list(decoder.left_out),
            "threads": torch.get_num_threads(),  # sums of the CPU are split by them, which moves their last digits
        },
        metric_versions=metric_versions(),
        seconds=dict(seconds),
        peak_memory_bytes=memory_of_all(machines),
        stream=stream_record(captured),
        zero_weights=loaded.zero_weights or None,
        cache_key=cache_key,
    )


def provenance_of_all(parts: Sequence[Provenance], after: Mapping[str, float]) -> Provenance:
    """Return the provenance of a measurement in parts, some of which may have been measured by an earlier run.

    Hardware is every kind there was, and memory that of the largest part. after: seconds of the steps behind them.
    """
    seconds = dict(after)
    memory: dict[str, int] = {}
    for part in parts:
        for step, spent in part.seconds.items():
            seconds[step] = round(seconds.get(step, 0.0) + spent, 3)
        for place, peak in part.peak_memory_bytes.items():
            memory[place] = max(memory.get(place, 0), peak)
    streams = [part.stream for part in parts if part.stream is not None]
    stream = streams[0].model_copy(
        update={
            "shards": sum(each.shards for each in streams),
            "largest_bytes": max(each.largest_bytes for each in streams),
            "batch_tokens": min(each.batch_tokens or 0 for each in streams),
        }
    )
    return parts[0].model_copy(
        update={
            "created": utc_now(),
            "hardware": ", ".join(dict.fromkeys(part.hardware for part in parts)),
            "seconds": seconds,
            "peak_memory_bytes": memory,
            "stream": stream,
        }
    )
