"""Baselines: the committed figures and verdicts that later checkpoints are compared with.

`results/baselines/<model>.json`, one file per model (or line of checkpoints of one training run), and beside it
`<model>.safetensors` with the top-8 directions in float16, which it names by their SHA-256. The keys above `history`
are the user's to edit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from delta_suite.errors import BaselineError
from delta_suite.metrics.registry import METRICS
from delta_suite.records.record import Measurement, arrays_bytes, write_together
from delta_suite.records.store import folder_name
from delta_suite.regression.comparison import (
    TURNS,
    Comparison,
    Snapshot,
    Status,
    compare,
    directions_of,
    obstacle,
    snapshot,
)

SCHEMA = 1
"""Version of the file's shape; readers refuse others."""

FOLDER = "baselines"
"""Inside the results folder."""

VERDICT = "verdict"
"""The scope of a comparison of verdicts."""

NOTHING = "-"

DECISIVE = ("PASS", "FAIL")
"""Verdicts that say something of the claim. The others say that the documents do not decide it, or cannot."""


class VerdictEntry(BaseModel):
    """The verdict on one expectation, and the claim it was given on."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    verdict: str
    observed: float | None
    claim: str
    file: str
    """Where the expectation is stated, counted from pytest's root."""


class Change(BaseModel):
    """One time that the file was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    date: str
    """UTC, ISO 8601."""
    action: Literal["created", "added", "overwritten"]
    reason: str
    source: str
    """The checkpoint that the figures come from, and its weights' fingerprint (12 digits)."""
    before: str | None = None
    """Fingerprint of the weights that the file was about before."""
    entries: tuple[str, ...] = ()
    """What was added; all, where it was created or overwritten."""


class Baseline(BaseModel):
    """What the file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Annotated[Literal[1], Field(alias="schema")] = 1
    tolerances: dict[str, Annotated[float, Field(ge=0)]] = {}
    """By `metric`, `phase/metric` or `layers/metric`: the difference that is allowed, in the metric's unit; the turning
    of directions in degrees. Where none is stated the interval of the difference decides."""
    xfail: dict[str, str] = {}
    """Pattern of item names (`C/intra_cosine`, `layers/*`) -> why a failure is expected."""
    other_documents: bool = False
    """Whether another calibration is a sample of the same source, and is compared unpaired."""
    history: tuple[Change, ...]
    verdicts: dict[str, VerdictEntry]
    """`hypothesis/expectation` -> verdict"""
    directions_sha256: str | None = None
    """Of the file beside; null in baselines older than this field."""
    figures: Snapshot

    def to_json(self) -> str:
        """One line per scope, so that a diff of the file shows what changed."""
        content = self.model_dump(mode="json", by_alias=True)
        figures = content.pop("figures")
        estimates = figures.pop("estimates")
        head = json.dumps(content, indent=1, ensure_ascii=False).removesuffix("\n}")
        about = json.dumps(figures, ensure_ascii=False).removesuffix("}")
        variants = []
        for variant, scopes in estimates.items():
            lines = [f"{json.dumps(scope)}: {json.dumps(metrics)}" for scope, metrics in scopes.items()]
            variants.append(f"{json.dumps(variant)}: {{\n" + ",\n".join(lines) + "\n}")
        return f'{head},\n "figures": {about},\n"estimates": {{\n' + ",\n".join(variants) + "\n}}\n}\n"


@dataclass(frozen=True)
class BaselineFile:
    """A baseline, where it lies, and its directions."""

    path: Path
    content: Baseline
    directions: Mapping[str, np.ndarray]
    """Empty where there is no file beside."""

    def compare(
        self, now: Snapshot, directions: Mapping[str, np.ndarray], *, other_documents: bool = False
    ) -> list[Comparison]:
        """Every figure of the baseline with the same one now; `directions` are those of `directions_of`."""
        return compare(
            self.content.figures,
            now,
            directions=(self.directions, directions),
            tolerances=self.content.tolerances,
            other_documents=self.content.other_documents or other_documents,
        )

    def compare_verdict(
        self, name: str, verdict: VerdictEntry | None, now: Snapshot, *, other_documents: bool = False
    ) -> Comparison:
        """The verdict on one expectation with what it was; `verdict` is None where the expectation is gone.

        On the same documents every other verdict is a flip. On other documents a verdict may come to say that they do
        not decide, and back; a flip is then from one decided verdict to the other.
        """
        before = self.content.verdicts.get(name)
        status, reason = self._verdict_status(name, before, verdict, now, other_documents)
        old, new = (own.observed if own else None for own in (before, verdict))
        return Comparison(VERDICT, name, "", status, old, new, reason=reason)

    def _verdict_status(
        self, name: str, before: VerdictEntry | None, after: VerdictEntry | None, now: Snapshot, other_documents: bool
    ) -> tuple[Status, str]:
        if before is None:
            return Status.NEW, f"not in the baseline; now {after.verdict if after else NOTHING}"
        if after is None:
            return Status.GONE, f"{before.file} does not state it any more; it was {before.verdict}"
        other = self.content.other_documents or other_documents
        if refusal := obstacle(self.content.figures, now, other_documents=other):
            return Status.NOT_COMPARABLE, refusal
        if before.claim != after.claim:
            return Status.NOT_COMPARABLE, f"the claim was `{before.claim}` and is `{after.claim}`"
        change = f"{before.verdict} -> {after.verdict}"
        if before.verdict == after.verdict:
            return Status.SAME, after.verdict
        paired = self.content.figures.calibration.sha256 == now.calibration.sha256
        if paired or {before.verdict, after.verdict} <= set(DECISIVE):
            return Status.FLIP, change
        return Status.SAME, f"{change}, which other documents may do"

    def expected_failure(self, item: str) -> str | None:
        """The reason of the first `xfail` pattern that an item's name matches."""
        return next((why for pattern, why in self.content.xfail.items() if fnmatchcase(item, pattern)), None)


# --- where -----------------------------------------------------------------------------------------------------


def baseline_path(given: Path | None, results: Path, model: str) -> Path:
    """A `.json` file as given; a folder's `<model>.json`; without either `<results>/baselines/<model>.json`."""
    if given is not None and given.suffix == ".json":
        return given
    return (results / FOLDER if given is None else given) / f"{folder_name(model)}.json"


def directions_path(path: Path) -> Path:
    return path.with_suffix(".safetensors")


def load_baseline(path: Path) -> BaselineFile:
    """Raises BaselineError where there is none, with those that are there; where it or its directions are damaged."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        others = sorted(other.name for other in path.parent.glob("*.json")) if path.parent.is_dir() else []
        there = f"{path.parent} holds {', '.join(others)}" if others else f"{path.parent} holds no baseline"
        raise BaselineError(
            f"no baseline {path}: {there}.\n"
            f"  Name another with --baseline=PATH (a .json file or a folder), or write this one with --baseline-update."
        ) from None
    except OSError as error:
        raise BaselineError(f"baseline {path} cannot be read: {error}.") from None
    try:
        content = Baseline.model_validate_json(text)
    except ValidationError as error:
        listed = "".join(
            f"\n  at {'.'.join(str(part) for part in own['loc']) or 'the whole file'}: {own['msg']}"
            for own in error.errors()[:5]
        )
        raise BaselineError(
            f"{path} is not a baseline of schema {SCHEMA}:{listed}\n"
            f"  Correct it, take it from version control again, or remove it, with its history, tolerances and xfails, "
            f'and write it anew: --baseline-update --baseline-reason "..."'
        ) from None
    beside = directions_path(path)
    try:
        directions = _read_directions(beside, content) if beside.exists() else {}
    except (OSError, ValueError) as error:
        raise BaselineError(
            f"{beside} is not what was written with {path}: {error}.\n"
            f"  Take both from version control again, or remove {beside}: the turning of directions is then not "
            f"measured until --baseline-update writes it anew."
        ) from None
    return BaselineFile(path, content, directions)


def _read_directions(path: Path, content: Baseline) -> dict[str, np.ndarray]:
    """Raises ValueError where they are not those of the figures, as far as can be told, or OSError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    packed = path.read_bytes()
    if content.directions_sha256 not in {None, hashlib.sha256(packed).hexdigest()}:
        raise ValueError("its SHA-256 is another")
    try:
        found: dict[str, np.ndarray] = load(packed)
    except SafetensorError as error:
        raise ValueError(error) from None
    model = content.figures.model
    for name, array in found.items():
        if array.ndim != 3 or (array.shape[0], array.shape[2]) != (model.layers, model.hidden):
            raise ValueError(f"{name} is {array.shape}, of a model of {model.layers} layers x {model.hidden}")
    return found


def unknown_keys(file: BaselineFile) -> list[str]:
    """Stated tolerances that nothing has: a misspelt one would silently do nothing."""
    content = file.content
    metrics = METRICS.keys() | TURNS.keys()
    scopes = {"layers", "model", *content.figures.phases}
    return [
        key
        for key in content.tolerances
        if key.rpartition("/")[2] not in metrics or ("/" in key and key.rpartition("/")[0] not in scopes)
    ]


# --- writing ---------------------------------------------------------------------------------------------------


def update_baseline(
    path: Path,
    measurement: Measurement,
    verdicts: Mapping[str, VerdictEntry],
    *,
    overwrite: bool = False,
    reason: str = "",
) -> str:
    """Write what is new of a measurement, or all of it with a reason that is kept; a line that says what was written.

    New are figures and verdicts that the file lacks; where it does not exist all are. The user's own keys stay.

    Raises BaselineError where the file is about a model of another shape, where the new figures could not stand beside
    the old ones (another calibration or dtype), or where a reason is missing.
    """
    fresh = snapshot(measurement)
    source = f"{fresh.model.name} {fresh.model.fingerprint[:12]}"
    today = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    arrays = directions_of(measurement)
    if not path.exists():
        change = Change(date=today, action="created", reason=reason or "first baseline", source=source)
        _write(path, Baseline(history=(change,), verdicts=dict(verdicts), figures=fresh), arrays)
        return f"{path}: created from {source}, {_size(fresh)} figures and {len(verdicts)} verdicts"
    file = load_baseline(path)
    old = file.content
    shapes = [(own.model.architecture, own.model.layers, own.model.hidden) for own in (old.figures, fresh)]
    if shapes[0] != shapes[1]:
        raise BaselineError(
            f"{path} is about another model, {old.figures.model.name} ({_shape(old.figures)}), and {fresh.model.name} "
            f"is {_shape(fresh)}: it is left as it was. Give {fresh.model.name} a file of its own with --baseline=PATH."
        )
    if overwrite:
        if not reason.strip():
            raise BaselineError(f'{path} is overwritten only with a reason: --baseline-reason "why it is void"')
        change = Change(
            date=today,
            action="overwritten",
            reason=reason.strip(),
            source=source,
            before=old.figures.model.fingerprint,
        )
        update = {"history": (*old.history, change), "verdicts": dict(verdicts), "figures": fresh}
        _write(path, old.model_copy(update=update), arrays)
        return f"{path}: overwritten from {source}, {_size(fresh)} figures and {len(verdicts)} verdicts"
    return _add(file, fresh, verdicts, arrays, Change(date=today, action="added", reason=reason, source=source))


def _add(
    file: BaselineFile,
    fresh: Snapshot,
    verdicts: Mapping[str, VerdictEntry],
    arrays: Mapping[str, np.ndarray],
    change: Change,
) -> str:
    path, old = file.path, file.content
    estimates = {
        variant: {scope: dict(metrics) for scope, metrics in scopes.items()}
        for variant, scopes in old.figures.estimates.items()
    }
    added: list[str] = []
    for variant, scopes in fresh.estimates.items():
        for scope, metrics in scopes.items():
            if old.figures.phases.get(scope, fresh.phases.get(scope)) != fresh.phases.get(scope):
                continue  # a phase of the same name over other layers: not new but not comparable
            own = estimates.setdefault(variant, {}).setdefault(scope, {})
            new = {
                name: estimate
                for name, estimate in metrics.items()
                if name not in own or (own[name].value is None and estimate.value is not None)
            }
            own |= new
            added += [f"{variant}/{scope}/{name}" for name in new]
    new_verdicts = {name: entry for name, entry in verdicts.items() if name not in old.verdicts}
    directions = None if file.directions else arrays or None
    if not added and not new_verdicts and not directions:
        return f"{path}: nothing new, left as it was"
    if refusal := obstacle(old.figures, fresh):
        raise BaselineError(
            f"{path}: what is new cannot stand beside the old figures: {refusal}.\n"
            f'  Overwrite the whole file: --baseline-update=all --baseline-reason "..."'
        )
    if (added or directions) and fresh.model.fingerprint != old.figures.model.fingerprint:
        change = change.model_copy(update={"before": old.figures.model.fingerprint})
    entries = sorted({name.partition("/")[2] for name in added}) + sorted(new_verdicts)
    entries += ["directions"] if directions else []
    figures = old.figures.model_copy(
        update={
            "estimates": estimates,
            "metric_versions": fresh.metric_versions | old.figures.metric_versions,
            "phases": fresh.phases | old.figures.phases,
            "halves_turn": old.figures.halves_turn or fresh.halves_turn,
        }
    )
    change = change.model_copy(update={"entries": tuple(entries), "reason": change.reason or "what was new"})
    update = {"history": (*old.history, change), "verdicts": old.verdicts | new_verdicts, "figures": figures}
    _write(path, old.model_copy(update=update), directions)
    return f"{path}: added {names(entries)}"


def _shape(figures: Snapshot) -> str:
    return f"{figures.model.architecture}, {figures.model.layers} layers x {figures.model.hidden}"


def _size(figures: Snapshot) -> int:
    return sum(len(metrics) for scopes in figures.estimates.values() for metrics in scopes.values())


def _write(path: Path, content: Baseline, arrays: Mapping[str, np.ndarray] | None) -> None:
    """Both files or neither; without arrays (None) the directions that are there stay.

    Where a run is killed between the two, the SHA-256 tells that they do not belong together.
    """
    files = {}
    if arrays is not None:
        packed = arrays_bytes({name: array.astype(np.float16) for name, array in arrays.items()})
        content = content.model_copy(update={"directions_sha256": hashlib.sha256(packed).hexdigest()})
        files[directions_path(path)] = packed
    write_together(files | {path: content.to_json().encode()})


def refuse_shared(paths: Mapping[str, Path]) -> None:
    """Raises BaselineError where two models of a run would write one file."""
    taken: dict[Path, str] = {}
    for model, path in paths.items():
        other = taken.setdefault(path.resolve(), model)
        if other != model:
            raise BaselineError(
                f"{other} and {model} would both be written to {path}. Update with one --model, or give --baseline "
                f"a folder, where each has a file of its own."
            )


def names(sequence: Sequence[str], limit: int = 6) -> str:
    """The first few of them, and how many more."""
    return ", ".join(sequence[:limit]) + (f" and {len(sequence) - limit} more" if len(sequence) > limit else "")
