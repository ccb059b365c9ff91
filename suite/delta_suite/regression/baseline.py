"""Baselines: the committed record and verdicts that later checkpoints are compared with.

`results/baselines/<model>.json`, one file per model (or line of checkpoints of one training run): a record with the
user's tolerances, expected failures, a history, and verdicts. Beside it `<model>.arrays.safetensors`, the record's
arrays, and `<model>.safetensors`: for each compared variant V the top-8 directions in float16 (`V.directions`; layers,
8, hidden) and the degrees between those of the two document halves (`V.halves.METRIC`; layers). The JSON names both by
their SHA-256. The keys above `history` are the user's to edit.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from delta_suite.claims.verdict import Judgement
from delta_suite.claims.words import nearest
from delta_suite.errors import BaselineError, RecordError
from delta_suite.metrics.registry import METRICS
from delta_suite.paths import is_directory, shorten
from delta_suite.reading import UnreadableFileError, parse_json, read_text
from delta_suite.records.arrays import ArrayFile, Arrays
from delta_suite.records.format import from_json, to_json
from delta_suite.records.record import ModelRecord, Record
from delta_suite.records.store import folder_name
from delta_suite.records.verify import problems, require_consistent
from delta_suite.records.view import RecordView
from delta_suite.reduction.statistics import TOP_K
from delta_suite.regression.comparison import LAYERS, MODEL, Comparison, Status, compare_figures, obstacle
from delta_suite.regression.turns import TURNS, compare_turns

SCHEMA = 2
"""Version of the file's shape. Files of schema 1 held figures of their own in place of a record; they are not compared,
and --baseline-update=all renews them."""

FOLDER = "baselines"
"""The folder of baselines inside the results folder."""

HALF_ROUNDING = 2.0**-9
"""How far lengths and degrees of directions that are kept in float16 may be off: some roundings of 2^-11."""

VERDICT = "verdict"
"""The scope of a comparison of verdicts."""

NOTHING = "-"

DECISIVE = ("PASS", "FAIL")
"""Verdicts that decide the claim. The others say that the documents do not decide it, or cannot."""


class VerdictEntry(BaseModel):
    """The verdict on one expectation, and the claim it was given on."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    verdict: str
    observed: float | None
    claim: str
    file: str
    """The file that states the expectation, counted from pytest's root."""

    @classmethod
    def of(cls, judgement: Judgement, file: str) -> VerdictEntry:
        """Return the entry of a judgement; `file` states the expectation."""
        expectation = judgement.expectation
        claim = f"{expectation.claim()}, {expectation.variant}"
        return cls(verdict=judgement.verdict.value, observed=judgement.observed, claim=claim, file=file)


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
    """The names of what was added; empty where all was created or overwritten."""


class UserKeys(BaseModel):
    """The keys of the file that survive every update."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    tolerances: dict[str, Annotated[float, Field(ge=0)]] = {}
    """By `metric`, `phase/metric` or `layers/metric`: the difference that is allowed, in the metric's unit; the turning
    of directions in degrees. Where none is stated the interval of the difference decides."""
    xfail: dict[str, str] = {}
    """Pattern of item names (`C/intra_cosine`, `layers/*`) -> why a failure is expected."""
    other_documents: bool = False
    """True if another calibration is a sample of the same source, and is compared unpaired."""
    history: tuple[Change, ...] = ()


class Baseline(UserKeys):
    """The content of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)

    schema_version: Annotated[Literal[2], Field(alias="schema")] = 2
    history: tuple[Change, ...]
    verdicts: dict[str, VerdictEntry]
    """`hypothesis/expectation` -> verdict"""
    directions_sha256: str | None = None
    """SHA-256 of the file of directions; absent where there is none."""
    record: Record

    @property
    def model(self) -> ModelRecord:
        """The model that the baseline is about."""
        return self.record.model

    def to_json(self) -> str:
        """Return the JSON: the head by key, then the record with one line per layer and variant."""
        content = self.model_dump(mode="json", by_alias=True, exclude={"record"})
        head = {"schema": content.pop("schema"), **content}
        text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
        return f'{text},\n "record": {to_json(self.record)}}}\n'


class OutdatedFigures(BaseModel):
    """The figures of a baseline of schema 1, of which only the model is read."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: ModelRecord


class OutdatedBaseline(UserKeys):
    """A baseline of schema 1: what survives its renewal, and what tells how it is renewed."""

    schema_version: Annotated[Literal[1], Field(alias="schema")]
    verdicts: dict[str, VerdictEntry]
    figures: OutdatedFigures

    @property
    def model(self) -> ModelRecord:
        """The model that the baseline is about."""
        return self.figures.model

    def renewal(self, path: Path) -> str:
        """Return the command that renews the baseline, without the options that the run needed besides."""
        folders = sorted({str(Path(entry.file).parent) for entry in self.verdicts.values()}) or ["hypotheses"]
        words = ["pytest", *folders, f"--model={self.model.name}", f"--baseline={path}", "--baseline-update=all"]
        return f'{shlex.join(words)} --baseline-reason="schema {SCHEMA}"'


@dataclass(frozen=True)
class BaselineFile:
    """A baseline, where it lies, and its directions."""

    path: Path
    content: Baseline
    view: RecordView
    directions: Arrays
    """Empty where there is no file of directions."""

    def compare(self, now: RecordView, directions: Arrays, *, other_documents: bool = False) -> list[Comparison]:
        """Compare every figure of the baseline with the same one now, and the turning of directions.

        directions: those of `turns.direction_figures`.
        """
        options: dict[str, Any] = {
            "tolerances": self.content.tolerances,
            "other_documents": self.content.other_documents or other_documents,
        }
        figures = compare_figures(self.view, now, **options)
        return figures + compare_turns(self.view, now, (self.directions, directions), **options)

    def compare_verdict(
        self, name: str, verdict: VerdictEntry | None, now: RecordView, *, other_documents: bool = False
    ) -> Comparison:
        """Compare the verdict on one expectation with what it was; None where the expectation is gone.

        On the same documents every other verdict is a flip. On other documents a verdict may come to say that they do
        not decide, and back; a flip is then from one decided verdict to the other.
        """
        before = self.content.verdicts.get(name)
        status, reason = self._verdict_status(before, verdict, now, other_documents)
        old, new = (entry.observed if entry else None for entry in (before, verdict))
        return Comparison(VERDICT, name, "", status, old, new, reason=reason)

    def _verdict_status(
        self, before: VerdictEntry | None, after: VerdictEntry | None, now: RecordView, other_documents: bool
    ) -> tuple[Status, str]:
        if before is None:
            return Status.NEW, f"not in the baseline; now {after.verdict if after else NOTHING}"
        if after is None:
            return Status.GONE, f"{before.file} does not state it any more; it was {before.verdict}"
        other = self.content.other_documents or other_documents
        if refusal := obstacle(self.view, now, other_documents=other):
            return Status.NOT_COMPARABLE, refusal
        if before.claim != after.claim:
            return Status.NOT_COMPARABLE, f"the claim was `{before.claim}` and is `{after.claim}`"
        change = f"{before.verdict} -> {after.verdict}"
        if before.verdict == after.verdict:
            return Status.SAME, after.verdict
        paired = self.content.record.calibration.sha256 == now.record.calibration.sha256
        if paired or {before.verdict, after.verdict} <= set(DECISIVE):
            return Status.FLIP, change
        return Status.SAME, f"{change}, which other documents may do"

    def expected_failure(self, item: str) -> str | None:
        """Return the reason of the first `xfail` pattern that an item's name matches."""
        return next((why for pattern, why in self.content.xfail.items() if fnmatchcase(item, pattern)), None)

    def idle_patterns(self, items: Collection[str]) -> list[str]:
        """Return a line for each `xfail` pattern that matches none of these items: a misspelt one does nothing."""
        idle = [pattern for pattern in self.content.xfail if not any(fnmatchcase(item, pattern) for item in items)]
        by_lower = {item.lower(): item for item in items}  # as phases have capitals, and the nearest word is of none
        near = {pattern: by_lower.get(nearest(pattern, by_lower) or "") for pattern in idle}
        return [
            f"{self.path}: xfail '{pattern}' matches no item"
            + (f": did you mean '{near[pattern]}'?" if near[pattern] else ".")
            for pattern in idle
        ]


# --- reading ---------------------------------------------------------------------------------------------------


def baseline_path(given: Path | None, results: Path, model: str) -> Path:
    """Return a `.json` file as given; a folder's `<model>.json`; without either `<results>/baselines/<model>.json`.

    Example:
        >>> baseline_path(None, Path("results"), "org/model").as_posix()
        'results/baselines/org--model.json'
    """
    if given is not None and given.suffix == ".json":
        return given
    return (results / FOLDER if given is None else given) / f"{folder_name(model)}.json"


def directions_path(path: Path) -> Path:
    """Return the file of directions beside a baseline."""
    return path.with_suffix(".safetensors")


def arrays_path(path: Path) -> Path:
    """Return the file of arrays beside a baseline."""
    return path.with_suffix(".arrays.safetensors")


def read_baseline_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a baseline of any schema.

    Raises BaselineError where there is none, with those that are there, or where it cannot be read.
    """
    if not os.path.lexists(path):
        others = sorted(other.name for other in path.parent.glob("*.json")) if is_directory(path.parent) else []
        folder = "the current folder" if path.parent == Path() else path.parent
        there = f"{folder} holds {', '.join(others) or 'no baseline'}"
        raise BaselineError(
            f"no baseline {shorten(path)}: {there}.\n"
            f"  Name another with --baseline=PATH (a .json file or a folder), or write this one with --baseline-update."
        )
    try:
        text = read_text(path)
    except UnreadableFileError as error:
        raise BaselineError(f"baseline {error}") from None
    try:
        content = parse_json(text, path)
    except UnreadableFileError as error:
        raise _not_a_baseline(path, f"\n  at the whole file: {error.why}") from None
    if not isinstance(content, dict):
        raise _not_a_baseline(path, "\n  at the whole file: not a JSON object")
    if not {"history", "verdicts"} & content.keys():  # every schema has both: this was never a baseline
        kind = "a measurement record" if {"layers", "provenance"} <= content.keys() else "another JSON file"
        raise BaselineError(
            f"{shorten(path)} is {kind}, not a baseline: it has neither `history` nor `verdicts`.\n"
            f"  Name the baseline with --baseline=PATH; `pytest hypotheses/ --model=NAME --baseline=PATH "
            f"--baseline-update` writes one where there is none."
        )
    return content


def load_outdated(path: Path) -> OutdatedBaseline | None:
    """Return what a baseline of schema 1 leaves to its renewal, or None for a baseline of another schema.

    Raises BaselineError where there is no baseline, or where it is damaged.
    """
    return _outdated(path, read_baseline_json(path))


def _outdated(path: Path, content: Mapping[str, Any]) -> OutdatedBaseline | None:
    if content.get("schema") != 1:
        return None
    try:
        return OutdatedBaseline.model_validate(content)
    except ValidationError as error:
        raise _not_a_baseline(path, _listed(error), schema=1) from None


def load_baseline(path: Path) -> BaselineFile:
    """Return the baseline in a file, with its arrays and directions.

    Raises BaselineError where there is none, where it or a file beside it is damaged, or where it is of schema 1.
    """
    content = read_baseline_json(path)
    while True:
        try:
            return _whole_baseline(path, content)
        except BaselineError:
            before, content = content, read_baseline_json(path)
            if content == before:  # else another run has written it meanwhile, and the files beside it are the new ones
                raise


def _whole_baseline(path: Path, content: Mapping[str, Any]) -> BaselineFile:
    if (outdated := _outdated(path, content)) is not None:
        raise BaselineError(
            f"{path} is a baseline of schema 1, whose figures cannot be compared with those of today.\n"
            f"  Renew it from the checkpoint that it is about, {outdated.model.name}, with the options of your other "
            f"runs; its tolerances, xfails, other_documents and history stay:\n"
            f"  {outdated.renewal(path)}"
        )
    try:
        record, inline = from_json(json.dumps(content.get("record")), path)
        if inline is not None:
            raise RecordError(f"it is of schema {record.schema_version}, whose arrays are no baseline's")
        baseline = Baseline.model_validate({**content, "record": record})
    except RecordError as error:
        raise _not_a_baseline(path, f"\n  at record: {error}") from None
    except ValidationError as error:
        raise _not_a_baseline(path, _listed(error)) from None
    beside = arrays_path(path)
    try:
        arrays = ArrayFile(beside, record.arrays.sha256 if record.arrays else None)
        require_consistent(path, problems(record, arrays.content, merged=_of_two_records(baseline.history)))
    except RecordError as error:
        raise BaselineError(
            f"{str(error).removesuffix('.')}.\n"
            f"  Take it from version control again, together with {path}, or remove both, and write them anew: "
            f'--baseline-update --baseline-reason "..."'
        ) from None
    return BaselineFile(path, baseline, RecordView(record, arrays), _directions(path, baseline))


def _of_two_records(history: Sequence[Change]) -> bool:
    """Return True if a part of the file was ever written alone, so that it may be of another checkpoint."""
    return any(change.entries or change.action == "added" for change in history)


def _listed(error: ValidationError) -> str:
    """Return a line for each of the first errors, with the key that it is about."""
    return "".join(
        f"\n  at {'.'.join(str(part) for part in detail['loc']) or 'the whole file'}: {detail['msg']}"
        for detail in error.errors()[:5]
    )


def _not_a_baseline(path: Path, listed: str, *, schema: int = SCHEMA) -> BaselineError:
    return BaselineError(
        f"{path} is not a baseline of schema {schema}:{listed}\n"
        f"  Correct it, take it from version control again, or remove it, with its history, tolerances and xfails, "
        f'and write it anew: --baseline-update --baseline-reason "..."'
    )


def _directions(path: Path, content: Baseline) -> Arrays:
    """Return the directions beside a baseline; empty where there is no such file. Raises BaselineError."""
    beside = directions_path(path)
    file = ArrayFile(beside, content.directions_sha256)
    if not os.path.lexists(beside) and not file.available:
        return {}
    model = content.model
    try:
        arrays = file.content
        for name, array in arrays.items():
            directions = name.endswith(".directions")
            expected = (model.layers, TOP_K, model.hidden) if directions else (model.layers,)
            if array.shape != expected:
                raise ValueError(f"{name} is {array.shape}, of a model of {model.layers} layers x {model.hidden}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} holds a number that is not finite")
            if directions:
                # In float16 an entry is off by 2^-11 of its size at most, and so is a length; missing directions are 0.
                lengths = np.linalg.norm(array.astype(np.float64), axis=2)
                if not ((np.abs(lengths - 1) <= HALF_ROUNDING) | (lengths == 0)).all():
                    raise ValueError(f"{name} are not unit vectors")
            elif not ((array >= 0) & (array <= 90 + HALF_ROUNDING)).all():
                raise ValueError(f"{name} are not degrees from 0 to 90")
    except (ValueError, RecordError) as error:
        why = str(error).removeprefix(f"{beside} ").removesuffix(".")
        raise BaselineError(
            f"{beside} is not what was written with {path}: {why}.\n"
            f"  Take both from version control again, or remove {beside}: the turning of directions is then not "
            f"measured until --baseline-update writes it anew."
        ) from None
    return arrays


def unknown_keys(file: BaselineFile) -> list[str]:
    """Return stated tolerances that nothing has: a misspelt one would silently do nothing."""
    metrics = METRICS.keys() | TURNS.keys()
    scopes = {LAYERS, MODEL, *file.view.phases}
    return [
        key
        for key in file.content.tolerances
        if key.rpartition("/")[2] not in metrics or ("/" in key and key.rpartition("/")[0] not in scopes)
    ]


def refuse_shared(paths: Mapping[str, Path]) -> None:
    """Raise BaselineError where two models of a run would write one file."""
    taken: dict[Path, str] = {}
    for model, path in paths.items():
        other = taken.setdefault(path.resolve(), model)
        if other != model:
            raise BaselineError(
                f"{other} and {model} would both be written to {path}. Update with one --model, or give --baseline "
                f"a folder, where each has a file of its own."
            )
