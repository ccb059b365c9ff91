"""Writing baselines: what is new is added, and overwriting needs a reason, which is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from delta_suite.errors import BaselineError
from delta_suite.paths import cache_root
from delta_suite.provenance import utc_now
from delta_suite.records.arrays import ArrayFile, Arrays, pack
from delta_suite.records.cache import Cache
from delta_suite.records.record import ArrayReference, ModelRecord
from delta_suite.records.store import exclusive
from delta_suite.records.view import RecordView
from delta_suite.regression.baseline import (
    VERDICT,
    Baseline,
    BaselineFile,
    Change,
    OutdatedBaseline,
    UserKeys,
    VerdictEntry,
    arrays_path,
    directions_path,
    load_baseline,
    load_outdated,
)
from delta_suite.regression.comparison import MODEL, Place, by_item, figures, item_of, obstacle
from delta_suite.regression.items import RECORD, TURN_ITEMS
from delta_suite.regression.merging import merged, missing_figures
from delta_suite.regression.turns import direction_figures
from delta_suite.writing import settle_parts, write_with_parts


def update_baseline(
    path: Path,
    view: RecordView,
    verdicts: Mapping[str, VerdictEntry],
    *,
    overwrite: bool = False,
    reason: str = "",
    selected: Collection[str] | None = None,
) -> str:
    """Write what is new of a record, or all of it with a reason that is kept; return a line that says what was written.

    New are figures, phases and verdicts that the file lacks; where it does not exist all are. The user's keys stay.

    selected: names of the items that may be written (`item_names`); None for all. Of a file that does not exist these
        are the verdicts, as its figures belong together.

    Raises BaselineError where the file is damaged or is about a model of another shape, where the new figures could not
    stand beside the old ones (another calibration or dtype), or where a reason is missing; RecordError where the
    record's arrays are gone or a file cannot be written.
    """
    with exclusive(path, Cache(cache_root())):
        return _update(path, view, verdicts, overwrite=overwrite, reason=reason, selected=selected)


def _update(
    path: Path,
    view: RecordView,
    verdicts: Mapping[str, VerdictEntry],
    *,
    overwrite: bool,
    reason: str,
    selected: Collection[str] | None,
) -> str:
    change = Change(
        date=utc_now(),
        action="created",
        reason=reason.strip(),
        source=f"{view.model.name} {view.model.fingerprint[:12]}",
    )
    if not path.exists():
        change = change.model_copy(update={"reason": change.reason or "first baseline"})
        return _replace(path, UserKeys(), change, view, verdicts)
    before: OutdatedBaseline | Baseline | None = load_outdated(path) if overwrite else None
    if before is None:
        file = load_baseline(path)
        settle_parts(_hashes(file))
        before = file.content
    elif selected is not None:
        raise BaselineError(f"{path} is of schema 1, and is renewed as a whole: run without a selection.")
    _refuse_another_shape(path, before.model, view.model)
    if not overwrite:
        return _add(file, view, verdicts, change.model_copy(update={"action": "added"}), selected)
    if not change.reason:
        raise BaselineError(f'{path} is overwritten only with a reason: --baseline-reason "why it is void"')
    change = change.model_copy(update={"action": "overwritten"})
    if selected is not None:
        return _overwrite(file, view, verdicts, change, selected)
    return _replace(path, before, change.model_copy(update={"before": before.model.fingerprint}), view, verdicts)


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


def _add(
    file: BaselineFile,
    view: RecordView,
    verdicts: Mapping[str, VerdictEntry],
    change: Change,
    selected: Collection[str] | None,
) -> str:
    """Add figures, phases, verdicts and directions that the baseline lacks, or those of them that were selected."""
    missing = [place for place in missing_figures(file.view, view) if selected is None or item_of(place) in selected]
    new_verdicts = {name: entry for name, entry in verdicts.items() if name not in file.content.verdicts}
    turning = not file.directions and (selected is None or not set(TURN_ITEMS).isdisjoint(selected))
    new_directions = direction_figures(view) or None if turning else None
    if not missing and not new_verdicts and not new_directions:
        return f"{file.path}: nothing new, left as it was"
    change = change.model_copy(update={"reason": change.reason or "what was new"})
    entries = [*sorted({item_of(place) for place in missing}), *sorted(new_verdicts)]
    changed = _merged(file, view, missing, file.content.verdicts | new_verdicts, new_directions, change, entries)
    _write(file.path, changed.content, changed.view.content(), new_directions)
    return f"{file.path}: added {names(changed.content.history[-1].entries)}"


def _overwrite(
    file: BaselineFile,
    view: RecordView,
    verdicts: Mapping[str, VerdictEntry],
    change: Change,
    selected: Collection[str],
) -> str:
    """Overwrite the figures, verdicts and directions that were selected, and leave the others as they were.

    Raises BaselineError where one of them would not be the same afterwards, as it follows from others that were not
    selected.
    """
    places = [
        (variant, scope, metric)
        for variant, scope, metric in figures(view)
        if item_of((variant, scope, metric)) in selected
        and scope != MODEL
        and file.view.phases.get(scope) in (None, view.phases.get(scope))
    ]
    others = {name: entry for name, entry in file.content.verdicts.items() if f"{VERDICT}/{name}" not in selected}
    directions = direction_figures(view)
    new_directions = directions or None if set(TURN_ITEMS) <= set(selected) else None
    entries = [
        *sorted({item_of(place) for place in places}),
        *sorted({*file.content.verdicts, *verdicts} - set(others)),
    ]
    changed = _merged(file, view, places, others | dict(verdicts), new_directions, change, entries)
    compared = by_item(changed.compare(view, directions))
    apart = [name for name in sorted(selected) if any(each.fails for each in compared.get(name, ()))]
    if RECORD in selected and changed.view.phases != view.phases:
        apart.append(RECORD)
    if apart:
        raise BaselineError(
            f"{file.path}: {names(apart)} cannot be overwritten alone, as the whole record decides it: it is left as "
            f"it was. Run without a selection to overwrite all, or select {' and '.join(TURN_ITEMS)} together."
        )
    _write(file.path, changed.content, changed.view.content(), new_directions)
    return f"{file.path}: overwritten from {change.source}: {names(changed.content.history[-1].entries) or 'nothing'}"


def _merged(
    file: BaselineFile,
    view: RecordView,
    places: Sequence[Place],
    verdicts: dict[str, VerdictEntry],
    directions: Arrays | None,
    change: Change,
    entries: list[str],
) -> BaselineFile:
    """Return the baseline with a later record's figures at some places, with these verdicts, and a new change."""
    if refusal := obstacle(file.view, view):
        raise BaselineError(
            f"{file.path}: what is new cannot stand beside the old figures: {refusal}.\n"
            f'  Overwrite the whole file: --baseline-update=all --baseline-reason "..."'
        )
    before = file.content.record.model.fingerprint
    if (places or directions) and view.model.fingerprint != before:
        change = change.model_copy(update={"before": before})
    change = change.model_copy(update={"entries": (*entries, *(["directions"] if directions else []))})
    record, arrays = merged(file.view, view, places)
    content = file.content.model_copy(
        update={"history": (*file.content.history, change), "verdicts": verdicts, "record": record}
    )
    merged_view = RecordView(record, ArrayFile(arrays_path(file.path), content=arrays))
    return BaselineFile(file.path, content, merged_view, file.directions if directions is None else directions)


def _shape(model: ModelRecord) -> str:
    return f"{model.architecture}, {model.layers} layers x {model.hidden}"


def _write(path: Path, content: Baseline, arrays: Arrays, directions: Arrays | None) -> None:
    """Write all files or none; without directions (None) those that are there stay."""
    packed = pack(arrays)
    beside = arrays_path(path)
    reference = ArrayReference(file=beside.name, sha256=hashlib.sha256(packed).hexdigest())
    update: dict[str, Any] = {"record": content.record.model_copy(update={"arrays": reference})}
    parts = {beside: packed}
    if directions is not None:
        halved = {
            name: array.astype(np.float16 if name.endswith(".directions") else np.float32)
            for name, array in directions.items()
        }
        parts[directions_path(path)] = pack(halved)
        update["directions_sha256"] = hashlib.sha256(parts[directions_path(path)]).hexdigest()
    write_with_parts(path, content.model_copy(update=update).to_json().encode(), parts)


def _hashes(file: BaselineFile) -> dict[Path, str]:
    """Return the SHA-256 of each file that the baseline names."""
    hashes = {directions_path(file.path): file.content.directions_sha256}
    if file.content.record.arrays is not None:
        hashes[arrays_path(file.path)] = file.content.record.arrays.sha256
    return {part: sha256 for part, sha256 in hashes.items() if sha256 is not None}


def names(sequence: Sequence[str], limit: int = 6) -> str:
    """Return the first few names, and how many more there are.

    Example:
        >>> names(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    return ", ".join(sequence[:limit]) + (f" and {len(sequence) - limit} more" if len(sequence) > limit else "")
