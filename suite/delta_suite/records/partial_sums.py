"""Sums over the units of work of a calibration, kept in the cache until they are added up."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from delta_suite.errors import RecordError
from delta_suite.reading import UnreadableFileError, read_bytes, read_text
from delta_suite.records.record import CertificateRecord, Provenance, SinkRecord
from delta_suite.writing import temporary_folder

FACTS = "facts.json"
"""The file of an entry that says what was captured. Each layer has a file, and another one for the law."""

FILE_LIMIT = 16 << 30
"""Most bytes of the sums of one layer over one unit: 16,384 dimensions take 3.2 GB."""


class LawTokens(BaseModel):
    """Numbers of tokens that enter the law, and of documents of which one does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    documents: int


class Facts(BaseModel):
    """Facts about the capture of one unit of work, beside its sums."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sinks: SinkRecord
    certificate: CertificateRecord
    provenance: Provenance
    epsilon: float
    """Machine epsilon of the dtype in which the stream was computed."""
    law: LawTokens | None = None
    """None where the law's sums were not asked for."""
    files: dict[str, str]
    """SHA-256 of each file, by name."""


@dataclass(frozen=True)
class PartialSums:
    """Sums over one unit of work, as they travel: safetensors files by name."""

    facts: Facts
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class SumsCache:
    """Entries `<root>/sums/<key>/<unit>/` of one measurement, by the number of the unit of work."""

    root: Path
    key: str
    """Key of the measurement, which decides what its units are and how they are captured."""

    @property
    def folder(self) -> Path:
        """Folder of all entries."""
        return self.root / "sums" / self.key

    def entry(self, unit: int) -> Path:
        """Return the folder of one entry, whether there is one or not."""
        return self.folder / f"{unit:06d}"

    def put(self, unit: int, sums: PartialSums) -> None:
        """Keep the sums over a unit, whole or not at all. Raises RecordError where the cache cannot be written."""
        folder = self.entry(unit)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary_folder(self.folder) as written:
                fresh = written / "entry"
                fresh.mkdir()
                for name, content in sums.files.items():
                    (fresh / name).write_bytes(content)
                (fresh / FACTS).write_text(sums.facts.model_dump_json(), "utf-8")
                shutil.rmtree(folder, ignore_errors=True)
                fresh.rename(folder)
        except OSError as error:
            raise RecordError(
                f"{folder}, in the cache, cannot be written: {error.strerror}. The sums of a calibration that is split "
                f"lie there. Free space, or set DELTA_SUITE_CACHE to another folder."
            ) from None

    def facts(self, unit: int, newer_than: float | None = None) -> Facts | None:
        """Return the facts of a unit whose entry is whole; None where there is none, or only an older or damaged one.

        newer_than: the moment (seconds since the epoch) before which an entry does not count.
        """
        try:
            path = self.entry(unit) / FACTS
            facts = Facts.model_validate_json(read_text(path))
            for name in facts.files:
                self.read(unit, name, facts)
            return facts if path.stat().st_mtime >= (newer_than or 0.0) else None
        except (UnreadableFileError, RecordError, ValidationError, OSError):
            return None

    def read(self, unit: int, name: str, facts: Facts) -> bytes:
        """Return a file of an entry. Raises RecordError where it is gone or damaged."""
        path = self.entry(unit) / name
        try:
            content = read_bytes(path, FILE_LIMIT)
        except UnreadableFileError as error:
            raise RecordError(f"{path}, in the cache, cannot be read: {error.why}. Run it again.") from None
        if hashlib.sha256(content).hexdigest() != facts.files[name]:
            raise RecordError(f"{path}, in the cache, is damaged. Run it again.")
        return content

    def clear(self) -> None:
        """Remove all entries: what they add up to is kept elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)


def moments_file(layer: int) -> str:
    """Return the name of the file of a layer's moments."""
    return f"layer-{layer:04d}.safetensors"


def law_file(layer: int) -> str:
    """Return the name of the file of the law's sums of a layer."""
    return f"law-{layer:04d}.safetensors"
