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
from delta_suite.records.record import ArrayReference, ModelRecord
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
    load_outdated,
)
from delta_suite.regression.comparison import figures, obstacle
from delta_suite.regression.merging import merged, missing_figures
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

    New are figures, phases and verdicts that the file lacks; where it does not exist all are. The user's keys stay.

    Raises BaselineError where the file is damaged or is about a model of another shape, where the new figures could not
    stand beside the old ones (another calibration or dtype), or where a reason is missing; RecordError where the
    record's arrays are gone or a file cannot be written.
    """
    change = Change(
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        action="created",
        reason=reason.strip(),
        source=f"{view.model.name} {view.model.fingerprint[:12]}",
    )
    if not path.exists():
        change = change.model_copy(update={"reason": change.reason or "first baseline"})
        return _replace(path, UserKeys(), change, view, verdicts)
    if not overwrite:
        file = load_baseline(path)
        _refuse_another_shape(path, file.content.model, view.model)
        return _add(file, view, verdicts, change.model_copy(update={"action": "added"}))
    before = load_outdated(path) or load_baseline(path).content
    _refuse_another_shape(path, before.model, view.model)
    if not change.reason:
        raise BaselineError(f'{path} is overwritten only with a reason: --baseline-reason "why it is void"')
    change = change.model_copy(update={"action": "overwritten", "before": before.model.fingerprint})
    return _replace(path, before, change, view, verdicts)


def _refuse_another_shape(path: Path, old: ModelRecord, new: ModelRecord) -> None:
    shapes = [(model.architecture, model.layers, model.hidden) for model in (old, new)]
    if shapes[0] != shapes[1]:
        raise BaselineError(
            f"{path} is about another model, {old.name} ({_shape(old)}), and {new.name} "
            f"is {_shape(new)}: it is left as it was. Give {new.name} a file of its own with --baseline=PATH."
        )


def _replace(path: Path, keys: UserKeys, change: Change, view: RecordView, verdicts: Mapping[str, VerdictEntry]) -> str:
    """Write the whole baseline anew, with the user's keys and the history."""
    content = Baseline(
        tolerances=keys.tolerances,
        xfail=keys.xfail,
        other_documents=keys.other_documents,
        history=(*keys.history, change),
        verdicts=dict(verdicts),
        record=view.record,
    )
    _write(path, content, view.content(), direction_figures(view))
    size = len(figures(view))
    return f"{path}: {change.action} from {change.source}, {size} figures and {len(verdicts)} verdicts"


def _add(file: BaselineFile, view: RecordView, verdicts: Mapping[str, VerdictEntry], change: Change) -> str:
    """Add figures, phases, verdicts and directions that the baseline lacks."""
    missing = missing_figures(file.view, view)
    new_verdicts = {name: entry for name, entry in verdicts.items() if name not in file.content.verdicts}
    new_directions = None if file.directions else direction_figures(view) or None
    if not missing and not new_verdicts and not new_directions:
        return f"{file.path}: nothing new, left as it was"
    if refusal := obstacle(file.view, view):
        raise BaselineError(
            f"{file.path}: what is new cannot stand beside the old figures: {refusal}.\n"
            f'  Overwrite the whole file: --baseline-update=all --baseline-reason "..."'
        )
    before = file.content.record.model.fingerprint
    if (missing or new_directions) and view.model.fingerprint != before:
        change = change.model_copy(update={"before": before})
    entries = sorted({f"{scope}/{metric}" for _, scope, metric in missing}) + sorted(new_verdicts)
    entries += ["directions"] if new_directions else []
    change = change.model_copy(update={"entries": tuple(entries), "reason": change.reason or "what was new"})
    record, arrays = merged(file.view, view, missing)
    content = file.content.model_copy(
        update={
            "history": (*file.content.history, change),
            "verdicts": file.content.verdicts | new_verdicts,
            "record": record,
        }
    )
    _write(file.path, content, arrays, new_directions)
    return f"{file.path}: added {names(entries)}"


def _shape(model: ModelRecord) -> str:
    return f"{model.architecture}, {model.layers} layers x {model.hidden}"


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
