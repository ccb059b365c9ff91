"""results/: one JSON record per measured model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from delta_suite.errors import RecordError
from delta_suite.records.cache import Cache
from delta_suite.records.record import JudgedBy, Measurement, write_atomically

RESULTS = Path("results")
"""The default results folder, relative to where the command runs."""


def record_path(results: Path, measurement: Measurement) -> Path:
    """`results/runs/<model>/<utc>-<hash8>.json`; the hash tells phase maps and settings apart."""
    shown = f"{measurement.provenance.cache_key} {measurement.model.name} {measurement.phases}"
    stamp = measurement.provenance.created.replace("-", "").replace(":", "")
    name = f"{stamp}-{hashlib.sha256(shown.encode()).hexdigest()[:8]}.json"
    return results / "runs" / folder_name(measurement.model.name) / name


def folder_name(model: str) -> str:
    """A model's name as one folder: hub ids and paths keep their letters, separators become `--`."""
    return model.strip("./").replace("/", "--").replace("\\", "--") or "model"


def save(results: Path, measurement: Measurement, cache: Cache) -> Path:
    """Write the record, unless this very one is there. Raises RecordError."""
    path = record_path(results, measurement)
    with _lock(path, cache):
        if not path.exists():
            write_atomically(path, measurement.to_json())
    return path


def stamp(path: Path, judged_by: Mapping[str, JudgedBy], cache: Cache) -> None:
    """Leave in a record which hypothesis files judged it, by hypothesis; what other runs left of others stays.

    Nothing that was measured changes, and the file not at all where these were the last to judge it already.
    Raises RecordError where the record cannot be read or written.
    """
    with _lock(path, cache):
        found = load(path)
        update = dict(sorted({**found.judged_by, **judged_by}.items()))
        if update != found.judged_by:
            write_atomically(path, found.model_copy(update={"judged_by": update}).to_json())


@contextmanager
def _lock(path: Path, cache: Cache) -> Iterator[None]:
    """Two runs may judge one record: what one of them writes, the other reads before it writes, too."""
    with cache.lock(f"record-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"):
        yield


def newest(results: Path, model: str, calibration: str) -> Measurement | None:
    """The newest readable record of a model under the calibration set with this SHA-256; None where there is none."""
    for path in sorted((results / "runs" / folder_name(model)).glob("*.json"), reverse=True):
        try:
            found = load(path)
        except RecordError:
            continue  # one of another schema, say; an older one may do
        if found.calibration.sha256 == calibration:
            return found
    return None


def load(path: Path) -> Measurement:
    """Read a record. Raises RecordError where there is none, or it is damaged or of another schema."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(
            f"record {path} cannot be read: {error}. Records lie in results/runs/<model>/; "
            f"`delta-suite measure NAME` writes one."
        ) from None
    return Measurement.from_json(text, path)
