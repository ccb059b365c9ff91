"""Sinks and the certificate of a capture, as a record holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from delta_suite.records.record import CertificateRecord, IdentityRecord, SinkRecord

if TYPE_CHECKING:
    from delta_suite.capture.certificate import Certificate, Identity
    from delta_suite.capture.sinks import Sinks


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
