"""Writing baselines: what is new is added, and overwriting needs a reason, which is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from delta_suite.errors import BaselineError
from delta_suite.records.arrays import Arrays, pack
from delta_suite.records.record import ArrayReference, LayerRecord, Record, ScopeRecord
from delta_suite.records.view import RecordView
from delta_suite.records.writing import write_together
from delta_suite.regression.baseline import (
    Baseline,
    BaselineFile,
    Change,
    UserKeys,
    VerdictEntry,
    arrays_path,
    directions_path,
    load_baseline,
    read_baseline_json,
)
from delta_suite.regression.comparison import COMPARED_VARIANTS, obstacle
from delta_suite.regression.turns import direction_figures


def update_baseline(
    path: Path,
    view: RecordView,
    verdicts: Mapping[str, VerdictEntry],
    *,
    overwrite: bool = False,
    reason: str = "",
) -> str:
    """Write what is new of a record, or all of it with a reason that is kept; return a line that says what was written.

    New are figures and verdicts that the file lacks; where it does not exist all are. The user's keys stay.

    Raises BaselineError where the file is about a model of another shape, where the new figures could not stand beside
    the old ones (another calibration or dtype), or where a reason is missing.
    """
    source = f"{view.model.name} {view.model.fingerprint[:12]}"
    today = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    directions = direction_figures(view)
    if not path.exists():
        change = Change(date=today, action="created", reason=reason or "first baseline", source=source)
        content = Baseline(history=(change,), verdicts=dict(verdicts), record=view.record)
        _write(path, content, view.content(), directions)
        return f"{path}: created from {source}, {_size(view.record)} figures and {len(verdicts)} verdicts"
    if overwrite:
        return _overwrite(path, view, verdicts, directions, reason.strip(), source, today)
    file = load_baseline(path)
    _refuse_another_shape(path, file.content.record, view.record)
    return _add(file, view, verdicts, directions, Change(date=today, action="added", reason=reason, source=source))


def _overwrite(
    path: Path,
    view: RecordView,
    verdicts: Mapping[str, VerdictEntry],
    directions: Arrays,
    reason: str,
    source: str,
    today: str,
) -> str:
    """Replace the record and the verdicts of a baseline of any schema; the user's keys and the history stay."""
    written = read_baseline_json(path)
    if written.get("schema") == 1:
        kept = UserKeys.model_validate(written)
        before = str(written.get("figures", {}).get("model", {}).get("fingerprint", "")) or None
    else:
        file = load_baseline(path)
        _refuse_another_shape(path, file.content.record, view.record)
        kept, before = file.content, file.content.record.model.fingerprint
    if not reason:
        raise BaselineError(f'{path} is overwritten only with a reason: --baseline-reason "why it is void"')
    change = Change(date=today, action="overwritten", reason=reason, source=source, before=before)
    content = Baseline(
        tolerances=kept.tolerances,
        xfail=kept.xfail,
        other_documents=kept.other_documents,
        history=(*kept.history, change),
        verdicts=dict(verdicts),
        record=view.record,
    )
    _write(path, content, view.content(), directions)
    return f"{path}: overwritten from {source}, {_size(view.record)} figures and {len(verdicts)} verdicts"


def _refuse_another_shape(path: Path, old: Record, new: Record) -> None:
    shapes = [(record.model.architecture, record.model.layers, record.model.hidden) for record in (old, new)]
    if shapes[0] != shapes[1]:
        raise BaselineError(
            f"{path} is about another model, {old.model.name} ({_shape(old)}), and {new.model.name} "
            f"is {_shape(new)}: it is left as it was. Give {new.model.name} a file of its own with --baseline=PATH."
        )


def _add(
    file: BaselineFile,
    view: RecordView,
    verdicts: Mapping[str, VerdictEntry],
    directions: Arrays,
    change: Change,
) -> str:
    """Add figures and verdicts that the baseline lacks."""
    old, new = file.content.record, view.record
    arrays = dict(file.view.content())
    merged, added = _merged(old, new, arrays, view.content())
    new_verdicts = {name: entry for name, entry in verdicts.items() if name not in file.content.verdicts}
    new_directions = None if file.directions else directions or None
    if not added and not new_verdicts and not new_directions:
        return f"{file.path}: nothing new, left as it was"
    if refusal := obstacle(file.view, view):
        raise BaselineError(
            f"{file.path}: what is new cannot stand beside the old figures: {refusal}.\n"
            f'  Overwrite the whole file: --baseline-update=all --baseline-reason "..."'
        )
    before = old.model.fingerprint
    if (added or new_directions) and new.model.fingerprint != before:
        change = change.model_copy(update={"before": before})
    entries = sorted({name.partition("/")[2] for name in added}) + sorted(new_verdicts)
    entries += ["directions"] if new_directions else []
    change = change.model_copy(update={"entries": tuple(entries), "reason": change.reason or "what was new"})
    content = file.content.model_copy(
        update={
            "history": (*file.content.history, change),
            "verdicts": file.content.verdicts | new_verdicts,
            "record": merged,
        }
    )
    _write(file.path, content, arrays, new_directions)
    return f"{file.path}: added {names(entries)}"


def _merged(old: Record, new: Record, arrays: dict[str, np.ndarray], fresh: Arrays) -> tuple[Record, list[str]]:
    """Return the old record with the figures that it lacks, and their names; their arrays are put into `arrays`."""
    added: list[str] = []

    def lacking(variant: str, scope: str, metrics: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
        missing = {
            name: estimate
            for name, estimate in others.items()
            if name not in metrics or (metrics[name].value is None and estimate.value is not None)
        }
        added.extend(f"{variant}/{scope}/{name}" for name in missing)
        return {**metrics, **missing}

    layers: list[LayerRecord] = []
    for before, after in zip(old.layers, new.layers, strict=True):
        metrics = {
            variant: lacking(variant, f"layer:{before.layer}", before.metrics.get(variant, {}), after.metrics[variant])
            for variant in after.metrics
            if variant in COMPARED_VARIANTS or variant not in before.metrics
        }
        layers.append(before.model_copy(update={"metrics": {**before.metrics, **metrics}}))
    scopes: dict[str, ScopeRecord] = dict(old.scopes)
    for name, scope in new.scopes.items():
        held = scopes.get(name)
        if held is None or held.layers != scope.layers:
            continue  # a phase of the same name over other layers is not new but not comparable
        metrics = {
            variant: lacking(variant, name, held.metrics.get(variant, {}), scope.metrics[variant])
            for variant in scope.metrics
        }
        scopes[name] = held.model_copy(update={"metrics": {**held.metrics, **metrics}})
    update: dict[str, Any] = {"layers": tuple(layers), "scopes": scopes}
    for part in new.parts:
        if part not in old.parts:
            added.append(f"-/{part}")
            update["parts"] = (*update.get("parts", old.parts), part)
            update |= {"law": new.law} if part == "law" else {}
            update |= {"boundaries": new.boundaries} if part == "boundaries" else {}
    for name, array in fresh.items():
        arrays.setdefault(name, array)
    provenance = old.provenance.model_copy(
        update={"metric_versions": new.provenance.metric_versions | old.provenance.metric_versions}
    )
    return old.model_copy(update=update | {"provenance": provenance}), added


def _shape(record: Record) -> str:
    return f"{record.model.architecture}, {record.model.layers} layers x {record.model.hidden}"


def _size(record: Record) -> int:
    """Return the number of figures of a record."""
    held = [*(layer.metrics for layer in record.layers), *(scope.metrics for scope in record.scopes.values())]
    return sum(len(metrics) for variants in held for metrics in variants.values())


def _write(path: Path, content: Baseline, arrays: Arrays, directions: Arrays | None) -> None:
    """Write all files or none, the JSON last; without directions (None) those that are there stay.

    Where a run is killed between two, the SHA-256 tells that they do not belong together.
    """
    packed = pack(arrays)
    beside = arrays_path(path)
    reference = ArrayReference(file=beside.name, sha256=hashlib.sha256(packed).hexdigest())
    update: dict[str, Any] = {"record": content.record.model_copy(update={"arrays": reference})}
    files = {beside: packed}
    if directions is not None:
        halved = {
            name: array.astype(np.float16 if name.endswith(".directions") else np.float32)
            for name, array in directions.items()
        }
        files[directions_path(path)] = pack(halved)
        update["directions_sha256"] = hashlib.sha256(files[directions_path(path)]).hexdigest()
    write_together(files | {path: content.model_copy(update=update).to_json().encode()})


def names(sequence: Sequence[str], limit: int = 6) -> str:
    """Return the first few names, and how many more there are.

    Example:
        >>> names(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    return ", ".join(sequence[:limit]) + (f" and {len(sequence) - limit} more" if len(sequence) > limit else "")
