"""The rows of the leaderboard: one record that counts, its verdicts, and their tally for each hypothesis."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from delta_suite.claims.verdict import Verdict, combine_verdicts
from delta_suite.publish.depth_profile import Profile
from delta_suite.publish.drawn import Drawn
from delta_suite.publish.labels import shown_source
from delta_suite.publish.rows import Row, changed_files, stamps_of
from delta_suite.publish.trajectory import PhaseFigures
from delta_suite.records.record import Record
from delta_suite.records.store import JudgedBy
from delta_suite.records.view import RecordView

_COMMON = re.compile(r"(For\w+|LMHeadModel|Model)$")

SIZES = {"under 0.3 B": 3e8, "0.3 to 1 B": 1e9, "1 to 4 B": 4e9, "4 to 12 B": 1.2e10}
"""Classes of size by name, and the number of parameters that each ends before."""

LARGEST = "12 B and more"
"""The class of size beyond all others."""


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
    profile: Profile | None = None
    """Its figures over depth; None for an entry that stands on no board."""
    recomputed_by: tuple[str, ...] = ()
    """The handles of others whose records find the same figures: see `publish.recomputed`."""
    drawing: Callable[[], Drawn] | None = None
    """Function that returns its plots and tables; None where they are drawn from the whole record."""
    measuring: Callable[[], PhaseFigures] | None = None
    """Function that returns the figures of its phases; None where they are formed from the whole record."""

    @property
    def recomputed(self) -> bool:
        """True if somebody else has measured the same and found the same."""
        return bool(self.recomputed_by)

    @property
    def view(self) -> RecordView:
        """Read the whole record."""
        return self.read()

    @property
    def drawn(self) -> Drawn:
        """Its plots and tables."""
        return Drawn.of(self.read()) if self.drawing is None else self.drawing()

    @property
    def phase_figures(self) -> PhaseFigures:
        """The figures of its phases, for the page of a training run."""
        return PhaseFigures(self.read()) if self.measuring is None else self.measuring()

    @property
    def changed(self) -> dict[str, str]:
        """For each hypothesis how its file has changed since a run last judged this record by it."""
        return changed_files(self.judged_by, stamps_of(self.rows))

    @property
    def model(self) -> str:
        """The model's name, or what it is told apart by."""
        return self.label or self.head.model.name

    @property
    def dtype(self) -> str:
        """The dtype that the model was run in."""
        return self.head.provenance.dtype

    @property
    def seconds(self) -> float:
        """The seconds of all steps together."""
        return sum(self.head.provenance.seconds.values())

    @property
    def host_bytes(self) -> int:
        """The peak memory of the process."""
        return self.head.provenance.peak_memory_bytes.get("host", 0)

    @property
    def gpu_bytes(self) -> int:
        """The peak memory of all GPUs that were used."""
        peaks = self.head.provenance.peak_memory_bytes
        return sum(size for name, size in peaks.items() if name != "host")

    @property
    def source(self) -> str:
        """The origin of the weights; of a directory only its name, as its path exists on one machine alone."""
        return shown_source(self.head.model.source)

    @cached_property
    def tallies(self) -> tuple[Tally, ...]:
        """One tally for each hypothesis."""
        hypotheses = dict.fromkeys(row.hypothesis for row in self.rows)
        return tuple(Tally.of(name, [row for row in self.rows if row.hypothesis == name]) for name in hypotheses)

    @property
    def worst(self) -> Row | None:
        """The refuted claim that is furthest outside, by its margin in standard errors; None without one.

        Margins of other claims are of other units, and how far a claim is supported says nothing about the worst.
        """
        refuted = [row for row in self.rows if row.verdict == Verdict.REFUTED.value and row.standard_errors is not None]
        return min(refuted, key=lambda row: row.standard_errors or 0.0, default=None)

    @property
    def family(self) -> str:
        """The architecture without what all have in common, such as Llama of LlamaForCausalLM."""
        return _COMMON.sub("", self.head.model.architecture) or self.head.model.architecture

    @property
    def size(self) -> str:
        """The class of size, by the parameters that the blocks of a usual transformer of this shape have."""
        parameters = 12 * self.head.model.layers * self.head.model.hidden**2
        return next((name for name, most in SIZES.items() if parameters < most), LARGEST)

    @property
    def vacuous(self) -> int:
        """The number of supported claims that are vacuous."""
        return sum(tally.vacuous for tally in self.tallies)
