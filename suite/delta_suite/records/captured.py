"""Texts, sinks, stream and certificate of a capture, as a record holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from delta_suite.records.record import (
    CalibrationRecord,
    CertificateRecord,
    IdentityRecord,
    SinkRecord,
    StreamRecord,
)

if TYPE_CHECKING:
    from delta_suite.capture.calibration import Calibration
    from delta_suite.capture.certificate import Certificate, Identity
    from delta_suite.capture.sinks import Sinks
    from delta_suite.capture.tokens import TokenSequences
    from delta_suite.reduction.passes import Captured


def sink_record(sinks: Sequence[Sinks]) -> SinkRecord:
    """Return the tokens that `sink_free` leaves out, from those of each shard."""
    from delta_suite.capture.sinks import SINK_RATIO

    largest = sorted((row for shard in sinks for row in shard.largest), key=lambda row: -row[3])
    return SinkRecord(
        position_zero=sum(shard.first for shard in sinks),
        large_norm=sum(shard.large for shard in sinks),
        ratio=SINK_RATIO,
        largest=tuple(largest[:10]),
    )


def identity_record(identity: Identity) -> IdentityRecord:
    """Return an identity of the certificate as a record holds it."""
    return IdentityRecord(says=identity.says, error=identity.error, tolerance=identity.tolerance)


def certificate_record(certificates: Sequence[Certificate]) -> CertificateRecord:
    """Return the certificate of a capture, from those of its shards."""
    certificate = certificates[0]
    for other in certificates[1:]:
        certificate = certificate + other
    identities = {identity.name: identity_record(identity) for identity in certificate.identities}
    return CertificateRecord(
        holds=True,
        blocks=certificate.blocks,
        forward_passes=certificate.forward_passes,
        final_norm=certificate.final_norm,
        identities=identities,
    )


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
