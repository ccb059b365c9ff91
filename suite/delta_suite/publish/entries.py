"""The rows of the leaderboard: one record that counts, its verdicts, and their tally for each hypothesis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from delta_suite.claims.verdict import Verdict, combine_verdicts
from delta_suite.publish.labels import shown_source
from delta_suite.publish.rows import Row, changed_files, relative_margin, stamps_of
from delta_suite.records.record import Record
from delta_suite.records.store import JudgedBy
from delta_suite.records.view import RecordView


@dataclass(frozen=True)
class Tally:
    """One hypothesis for one model. Claims that only warn are counted, but do not decide the verdict."""

    hypothesis: str
    verdict: str | None
    """None where every claim only warns."""
    supported: int
    refuted: int
    inconclusive: int
    not_measured: int
    vacuous: int
    """How many of the supported ones also hold where there is nothing to find."""

    @classmethod
    def of(cls, hypothesis: str, rows: Sequence[Row]) -> Tally:
        """Return the tally of one hypothesis from the rows of its claims."""
        deciding = [Verdict(row.verdict) for row in rows if row.severity == "fail"]
        words = [row.verdict for row in rows]
        return cls(
            hypothesis,
            combine_verdicts(deciding).value if deciding else None,
            words.count(Verdict.SUPPORTED.value),
            words.count(Verdict.REFUTED.value),
            words.count(Verdict.INCONCLUSIVE.value),
            words.count(Verdict.NOT_MEASURED.value),
            sum(row.vacuous and row.verdict == Verdict.SUPPORTED.value for row in rows),
        )


@dataclass(frozen=True)
class Entry:
    """One record that counts, and its verdicts. Its figures are read when they are asked for, and not held."""

    head: Record
    """The record without its figures."""
    record: str
    """Path relative to the results folder."""
    rows: tuple[Row, ...]
    read: Callable[[], RecordView]
    """Function that reads the whole record."""
    judged_by: Mapping[str, JudgedBy] = field(default_factory=dict)
    """The hypothesis files that a run last judged this record by."""
    label: str = ""
    """The model's name with what tells it from another model of that name; empty where there is none."""
    recomputed_by: tuple[str, ...] = ()
    """The handles of others whose records find the same figures: see `publish.recomputed`."""

    @property
    def recomputed(self) -> bool:
        """Return True if somebody else has measured the same and found the same."""
        return bool(self.recomputed_by)

    @property
    def view(self) -> RecordView:
        """Read the whole record."""
        return self.read()

    @property
    def changed(self) -> dict[str, str]:
        """Return for each hypothesis how its file has changed since a run last judged this record by it."""
        return changed_files(self.judged_by, stamps_of(self.rows))

    @property
    def model(self) -> str:
        """Return the model's name, or what it is told apart by."""
        return self.label or self.head.model.name

    @property
    def dtype(self) -> str:
        """Return the dtype that the model was run in."""
        return self.head.provenance.dtype

    @property
    def seconds(self) -> float:
        """Return the seconds of all steps together."""
        return sum(self.head.provenance.seconds.values())

    @property
    def host_bytes(self) -> int:
        """Return the peak memory of the process."""
        return self.head.provenance.peak_memory_bytes.get("host", 0)

    @property
    def gpu_bytes(self) -> int:
        """Return the peak memory of all GPUs that were used."""
        peaks = self.head.provenance.peak_memory_bytes
        return sum(size for name, size in peaks.items() if name != "host")

    @property
    def source(self) -> str:
        """Return the origin of the weights; of a directory only its name, as its path exists on one machine alone."""
        return shown_source(self.head.model.source)

    @cached_property
    def tallies(self) -> tuple[Tally, ...]:
        """Return one tally for each hypothesis."""
        hypotheses = dict.fromkeys(row.hypothesis for row in self.rows)
        return tuple(Tally.of(name, [row for row in self.rows if row.hypothesis == name]) for name in hypotheses)

    @property
    def worst(self) -> Row | None:
        """Return the claim furthest outside, or else nearest to its bound, by margin relative to what was required."""
        measured = [row for row in self.rows if row.margin is not None]
        return min(measured, key=relative_margin, default=None)

    @property
    def vacuous(self) -> int:
        """Return the number of supported claims that are vacuous."""
        return sum(tally.vacuous for tally in self.tallies)
