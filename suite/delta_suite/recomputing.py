"""Measure the model of a record again, here, and compare figure by figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from delta_suite.capture.calibration import BUNDLED, Calibration, load_calibration
from delta_suite.capture.texts import HUB
from delta_suite.command_line import DTYPES, PARTS
from delta_suite.errors import CalibrationError, OptionError, RecordError, explain
from delta_suite.escaping import terminal
from delta_suite.metrics.registry import METRICS
from delta_suite.models.models_file import Registry
from delta_suite.models.phases import phase_map
from delta_suite.models.recorded import recorded_model
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Settings, measure_view, prepare
from delta_suite.progress import Progress, no_progress
from delta_suite.publish.table import Cell, Table
from delta_suite.records.record import SCHEMA, Record
from delta_suite.records.store import Verified, load, verified_total
from delta_suite.records.view import RecordView
from delta_suite.regression.agreement import Agreement, agreement, of_other_groups, other_subject, same_arithmetic

SHOWN = 50
"""Most differences of a record in the table; of a model measured otherwise, every figure differs."""


@dataclass(frozen=True)
class Recomputed:
    """A record, and how a second measurement compares with it."""

    path: Path
    record: Record
    again: Record
    agreement: Agreement

    @property
    def confirmed(self) -> bool:
        """True if the second measurement finds the figures of the record."""
        return self.agreement.agrees

    @property
    def line(self) -> str:
        """The outcome in one line."""
        result, there, here = self.agreement, self.record.provenance, self.again.provenance
        rule = "within 1e-5" if result.same_arithmetic else "within their intervals"
        counts = [f"{result.agreeing} figures agree {rule}", f"{len(result.differences)} differ"]
        if result.undecided:
            counts.append(f"{result.undecided} cannot be compared")
        told = "" if result.agrees or result.differences else "; too few to say that it is confirmed"
        return (
            f"{self.path}: measured again on {here.device} in {here.dtype} "
            f"(the record: {there.device}, {there.dtype}): {', '.join(counts)}{told}"
        )


@dataclass(frozen=True)
class NotRecomputed:
    """A record whose model could not be measured again."""

    path: Path
    why: str

    @property
    def confirmed(self) -> bool:
        """False: nothing was compared."""
        return False

    @property
    def line(self) -> str:
        """The outcome in one line."""
        return f"{self.path} is not confirmed: {self.why}"


@dataclass(frozen=True)
class Choices:
    """The user's choices about measuring again; the rest is as in the record."""

    registry: Registry
    settings: Settings
    """The device, the cache, and the moment before which nothing in that counts."""
    model: str | None = None
    """The model or the place of its files, where the record's source is not here."""
    calibration: str | None = None
    """The file of the texts, where the record's calibration is neither bundled nor of the hub."""


def announced(path: Path, record: RecordView) -> str:
    """Return what is measured now, and how long it took where the record was made: it may take as long here."""
    stored = record.record
    seconds = sum(stored.provenance.seconds.values())
    return (
        f"measuring the model of {path} again, and nothing else: {', '.join(stored.parts)} over "
        f"{stored.calibration.tokens} tokens, which took {seconds:.0f} s on {stored.provenance.hardware}."
    )


def recompute_all(
    paths: Iterable[Path], choices: Choices, progress: Progress = no_progress, tell: Callable[[str], None] | None = None
) -> Iterator[Recomputed | NotRecomputed]:
    """Measure the models of records again, one after the other, and compare each. An error of one stops no other.

    `tell` is called with a line before each measurement, which may take long.
    """
    for path in paths:
        try:
            record = load(path)
            if tell is not None:
                tell(announced(path, record))
            yield recompute(path, record, choices, progress)
        except Exception as error:  # one model must not hinder the next, as when they are measured
            yield NotRecomputed(path, explain(error, f"measuring the model of {path} again"))


def recompute(path: Path, record: RecordView, choices: Choices, progress: Progress = no_progress) -> Recomputed:
    """Measure the model of a record again, as the record says that it was measured, and compare.

    Nothing is written but the cache. Raises RecordError where the files or the texts here are others than the record's,
    and a SuiteError as `pipeline.measure` does where they are not here or cannot be measured.
    """
    stored = record.record
    if stored.schema_version != SCHEMA:
        raise RecordError(f"its schema is {stored.schema_version}: its metrics are of versions that nothing measures.")
    spec, settings = _subject(stored, choices), _settings(stored, choices)
    calibration = _calibration(stored, choices)
    here = prepare(spec, settings, calibration, progress).subject.fingerprint
    if here != stored.model.fingerprint:
        raise RecordError(
            f"the files here are others: their fingerprint is {here[:12]}, and the record's "
            f"{stored.model.fingerprint[:12]}. Where the right ones are elsewhere, name the place with --model."
        )
    view = measure_view(spec, settings, progress, calibration).view.under(stored.phases)
    again = view.record
    if why := other_subject(stored, again):
        raise RecordError(f"measured again, {why}.")
    alike = record.arrays is not None and same_arithmetic(stored.provenance, again.provenance)
    if alike and (moved := of_other_groups(record.content(), view.content())):
        raise RecordError(
            f"measured again, the replicates of {', '.join(moved[:3])}{' and more' * (len(moved) > 3)} are of other "
            "groups than those here, or in another order: differences from other records would get wrong intervals."
        )
    return Recomputed(path, stored, again, agreement(stored, again))


def _subject(stored: Record, choices: Choices) -> ModelSpec:
    model = stored.model
    if choices.model is not None:
        spec = choices.registry.resolve(choices.model)
    else:
        spec = recorded_model(choices.registry, model.source, model.revision)
    settings = stored.provenance.settings
    declared = stored.law.phases if stored.law is not None else stored.phases
    phases = None if dict(declared) == phase_map(model.layers, None) else dict(declared)
    layers_path = settings.get("layers_path") if isinstance(settings.get("layers_path"), str) else None
    return spec.model_copy(update={"name": model.name, "phases": phases, "layers_path": layers_path})


def _settings(stored: Record, choices: Choices) -> Settings:
    asked = stored.provenance.settings.get("dtype")
    known = [dtype for dtype in (asked, stored.provenance.dtype) if dtype in DTYPES]
    return replace(
        choices.settings,
        dtype=known[0] if known else None,
        chat_template=bool(stored.calibration.chat_template),
        parts=frozenset(part for part in stored.parts if part in PARTS),
    )


def _calibration(stored: Record, choices: Choices) -> Calibration:
    texts = stored.calibration
    name = choices.calibration or texts.name
    if choices.calibration is None and name not in BUNDLED and not name.startswith(HUB):
        raise CalibrationError(f"its calibration is a file, {name!a}: name it with --calibration.")
    loaded = load_calibration(name, texts.first)
    if loaded.sha256 != texts.sha256:
        raise CalibrationError(
            f"the texts of {name} here are others: their SHA-256 is {loaded.sha256[:12]}, and the record's "
            f"{texts.sha256[:12]}. Name the right ones with --calibration, or take the delta-suite that measured it "
            f"({stored.provenance.suite})."
        )
    return loaded


def difference_table(results: Sequence[Recomputed]) -> Table:
    """Return the figures that differ, record by record, those that differ most first; at most `SHOWN` of each."""
    rows: list[list[str | Cell]] = []
    for result in results:
        differences = result.agreement.differences
        for item in differences[:SHOWN]:
            rows.append(
                [
                    result.record.model.name,
                    item.scope,
                    item.metric if item.metric in METRICS else ascii(item.metric),
                    item.variant,
                    item.number,
                    _number(item.stated),
                    _number(item.again),
                    item.allowed,
                ]
            )
        if (more := len(differences) - SHOWN) > 0:
            rows.append([result.record.model.name, f"and {more} more", *[""] * 6])
    head = ["model", "where", "metric", "variant", "number", "in the record", "here", "it had to be"]
    return Table.of(head, rows, align="lllllrrl")


def _number(value: float | None) -> str:
    return "absent" if value is None else f"{value:.9g}"


def require_one(records: Sequence[Path], model: str | None, calibration: str | None) -> None:
    """Raise OptionError where a model or a file of texts is named for several records."""
    for option, given in (("--model", model), ("--calibration", calibration)):
        if given is not None and len(records) != 1:
            raise OptionError(f"{option} is of one record, and {len(records)} are given. Recompute one at a time.")


class Verification(list[Verified]):
    """The outcomes of checking stored records, shown as `delta-suite verify` shows them."""

    def __init__(self, records: Iterable[Verified], recomputed: Iterable[Recomputed | NotRecomputed] = ()) -> None:
        super().__init__(records)
        self.recomputed = tuple(recomputed)
        """What measuring again found; empty where nothing was measured."""

    @property
    def consistent(self) -> bool:
        """True where no record contradicts itself, and all can be read."""
        return all(record.consistent for record in self)

    @property
    def confirmed(self) -> bool:
        """True where every record was measured again, and its figures were found."""
        return len(self.recomputed) == len(self) and all(result.confirmed for result in self.recomputed)

    def __repr__(self) -> str:
        """Return what was found for each record, how many are consistent, and what measuring again found."""
        lines = [line for record in self for line in record.lines()]
        lines += [verified_total(self), *(result.line for result in self.recomputed)]
        compared = [result for result in self.recomputed if isinstance(result, Recomputed)]
        tables = [difference_table(compared).text()] if any(each.agreement.differences for each in compared) else []
        return "\n".join([*map(terminal, lines), *tables])
