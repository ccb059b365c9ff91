"""Which records somebody else has measured again, and found the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from delta_suite.records.record import Record
from delta_suite.records.view import RecordView
from delta_suite.regression.agreement import agreement, other_subject


def same_measurement_key(record: Record) -> tuple[str, ...]:
    """Return what two records must share to be measurements of the same thing; a record without its figures will do.

    These are fingerprint, calibration, chat template and metric versions; not the name, nor the place of the files.
    """
    calibration = record.calibration
    versions = json.dumps(record.provenance.metric_versions, sort_keys=True)
    return record.model.fingerprint, calibration.sha256, str(bool(calibration.chat_template)), versions


def submitter_of(record: Record) -> str | None:
    """Return the handle of who contributed a record, in small letters; None where nobody is named."""
    return None if record.submitter is None else record.submitter.handle.lower()


def may_confirm(record: Record, other: Record) -> bool:
    """Return True if `other` is a measurement of the same thing by somebody else, whatever its figures are.

    Somebody else has a name, and another one than the submitter of `record`. A copy under another name is the same
    measurement: it was made in the same second, took as long, and used as much memory. Heads will do.
    """
    by = submitter_of(other)
    if by is None or by == submitter_of(record) or record.provenance == other.provenance:
        return False
    return same_measurement_key(record) == same_measurement_key(other)


def recomputed_by(record: Record, others: Iterable[Record]) -> tuple[str, ...]:
    """Return the handles of those whose records find the figures of this one again, in order; empty without any.

    A row of the leaderboard is recomputed where there is one. It says that two names stand for the figures. It does not
    prove that two people measured: nothing in a record proves where it comes from.
    """
    agreeing = {
        other.submitter.handle
        for other in others
        if other.submitter is not None
        and may_confirm(record, other)
        and other_subject(record, other) is None
        and agreement(record, other).agrees
    }
    return tuple(sorted(agreeing, key=str.lower))


class SecondMeasurements:
    """All records of a board, among which those of others are looked for. Figures are read where they are needed."""

    def __init__(self, heads: Iterable[tuple[Path, Record]], read: Callable[[Path], RecordView]) -> None:
        """Take the records without their figures, the oldest first, and the function that reads a whole one."""
        self._read = read
        self._same: dict[tuple[str, ...], list[tuple[Path, Record]]] = {}
        for path, head in heads:
            self._same.setdefault(same_measurement_key(head), []).append((path, head))

    def recomputed_by(self, path: Path, head: Record) -> tuple[str, ...]:
        """Return who found the figures of a record again: see `recomputed_by`. The newest record of each is asked."""
        others = [(place, other) for place, other in self._same[same_measurement_key(head)] if may_confirm(head, other)]
        newest = {submitter_of(other): place for place, other in others}
        if not newest:
            return ()
        return recomputed_by(self._read(path).record, (self._read(place).record for place in newest.values()))
