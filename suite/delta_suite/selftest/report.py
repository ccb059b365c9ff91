"""Report the self-test: coverage of intervals, rates of verdicts, the bounds that they violate, and the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from delta_suite.claims.verdict import Verdict
from delta_suite.metrics.intervals import CONFIDENCE, PERCENT
from delta_suite.selftest.causal_worlds import CAUSE_TOKENS
from delta_suite.selftest.documents import DOCUMENTS
from delta_suite.selftest.law_worlds import LAW_TOKENS
from delta_suite.selftest.planted import TOKENS
from delta_suite.selftest.world import Claim
from delta_suite.selftest.worlds import WORLDS

if TYPE_CHECKING:
    from delta_suite.publish.table import Cell, Table

COVERAGE = (0.92, 0.98)
"""The smallest and the largest coverage that an interval at CONFIDENCE may have."""

FALSE_POSITIVES = 0.07
"""The largest rate of false positives that is allowed."""

POWER = 0.8
"""The smallest rate at which what is planted, at the size claimed, must be found."""


def wilson(hits: int, of: int) -> tuple[float, float]:
    """Return the interval at CONFIDENCE of a rate of which `hits` in `of` were seen (the score interval, Wilson 1927).

    Example:
        >>> low, high = wilson(19, 20)
        >>> round(low, 3), round(high, 3)
        (0.764, 0.991)
    """
    from scipy.special import ndtri

    z = float(ndtri((1 + CONFIDENCE) / 2))
    rate, spread = hits / of, z**2 / of
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / of + spread / of / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Coverage:
    """Coverage of one figure: how many repeats have an interval that holds the true value."""

    world: str
    metric: str
    scope: str
    truth: float
    covered: int
    """Number of intervals that hold the truth."""
    below: int
    """Number of intervals wholly below the truth: errors of a claim `<=` whose threshold is the truth."""
    above: int
    """Number of intervals wholly above the truth: errors of a claim `>=` whose threshold is the truth."""
    without: int = 0
    """Number of repeats in which the figure had no interval."""
    bounded: bool = True
    """True where coverage outside COVERAGE fails the self-test."""
    note: str = ""
    """The reason why the coverage is not bounded."""

    @property
    def repeats(self) -> int:
        """The number of repeats that had an interval."""
        return self.covered + self.below + self.above

    @property
    def name(self) -> str:
        """The figure, such as `gamma over C`."""
        return f"{self.metric} over {self.scope}"

    @property
    def violation(self) -> str | None:
        """How the bound is broken, or None where it holds."""
        if not self.bounded:
            return None
        if self.repeats == 0:
            return f"{self.world}: {self.name} never had an interval"
        low, high = wilson(self.covered, self.repeats)
        if high >= COVERAGE[0] and low <= COVERAGE[1]:
            return None
        return (
            f"{self.world}: the {PERCENT} interval of {self.name} holds the truth in "
            f"{self.covered / self.repeats:.3f} of {self.repeats} repeats (binomial range {low:.3f} to {high:.3f}), "
            f"outside {COVERAGE[0]} to {COVERAGE[1]}"
        )


@dataclass(frozen=True)
class Rate:
    """Rate at which one claim was supported, correctly (power) or wrongly (false positives)."""

    world: str
    claim: Claim
    verdicts: Mapping[Verdict, int]
    where: bool | None = None
    """True where the rate is over the draws in which the claim is true alone, False where it is over the others."""

    @property
    def repeats(self) -> int:
        """The number of repeats that were judged."""
        return sum(self.verdicts.values())

    @property
    def planted(self) -> str:
        """Return the population, and which of its draws are counted where some are not."""
        if self.where is None:
            return self.world
        return f"{self.world}, draws where it is {'true' if self.where else 'false'}: {self.repeats}"

    @property
    def supported(self) -> int:
        """The number of repeats in which the claim was supported."""
        return self.verdicts.get(Verdict.SUPPORTED, 0)

    @property
    def violation(self) -> str | None:
        """How the bound is broken, or None where it holds."""
        if not self.claim.bounded:
            return None
        low, high = wilson(self.supported, self.repeats)
        seen = (
            f"{self.planted}: {self.claim.expectation.claim()} is supported in {self.supported / self.repeats:.3f} of "
            f"{self.repeats} repeats"
        )
        if self.claim.kind == "power":
            return None if high >= POWER else f"{seen}, and what is planted must be found in {POWER}"
        return None if low <= FALSE_POSITIVES else f"{seen}, and more than {FALSE_POSITIVES} are false positives"


@dataclass(frozen=True)
class Proof:
    """Result of the self-test."""

    repeats: int
    coverage: Sequence[Coverage]
    rates: Sequence[Rate]
    worlds: Sequence[str]
    seconds: float
    processes: int
    origin: Mapping[str, str] = field(default_factory=dict)
    """Command, date, versions, seed and hardware, by name; `markdown` needs the first two."""
    unfinished: Sequence[str] = ()
    """Populations whose repeats have not ended."""

    @cached_property
    def violations(self) -> list[str]:
        """One line for each bound that is violated."""
        rows: Iterable[Coverage | Rate] = [*self.coverage, *self.rates]
        return [line for row in rows if (line := row.violation) is not None]

    def _stopped(self) -> list[str]:
        """Return the lines that say which populations are missing, where some are."""
        if not self.unfinished:
            return []
        return [
            f"**Not whole.** Stopped, or still running, without these populations: {', '.join(self.unfinished)}.",
            "",
        ]

    def _fewer(self, name: str) -> str:
        """Return the number of repeats of a population that ran fewer than the others, in words."""
        ran = WORLDS[name].repeats(self.repeats)
        return f" ({ran} repeats)" if ran < self.repeats else ""

    def tables(self) -> dict[str, Table]:
        """Return the tables by heading."""
        from delta_suite.publish.table import Table

        out = {}
        if self.coverage:
            out[f"Coverage of {PERCENT} intervals"] = Table.of(
                ["planted", "figure", "true value", "coverage", _BINOMIAL, "below", "above", "none", "bound"],
                [_coverage_row(row) for row in self.coverage],
                drop={"below": 5, "above": 5, "none": 4},
                keys=2,
            )
        for kind in ("false positives", "power"):
            chosen = [row for row in self.rates if row.claim.kind == kind]
            if chosen:
                headers = ["planted", "claim", "supported", _BINOMIAL, "refuted", "inconclusive", "bound"]
                out[kind.capitalize()] = Table.of(headers, [_rate_row(row) for row in chosen], keys=2)
        return out

    def markdown(self) -> str:
        """Return the page that is kept in the repository."""
        lines = [
            "# The suite proves itself",
            "",
            f"Made by `{self.origin['command']}` on {self.origin['date']}, in {self.seconds:.0f} seconds: "
            f"{self.seconds * self.processes / 3600:.1f} core-hours.",
            "",
            *self._stopped(),
            *(f"- {name}: {value}" for name, value in self.origin.items() if name not in ("command", "date")),
            "",
            f"{self.repeats} repeats, or as many as stand beside a population: fewer decide a rate than a coverage. "
            f"Each draws {DOCUMENTS} documents of {TOKENS} tokens ({LAW_TOKENS} where the law is planted, "
            f"{CAUSE_TOKENS} where causes are), reduces them, computes every interval and judges every claim, with the "
            "code that measures a model. True values of the law are those of maps with the ridge that a repeat chose; "
            "where ridges differ between repeats, the table shows the mean.",
            "",
            *(f"- {name}{self._fewer(name)}: {WORLDS[name].description}" for name in self.worlds),
            "",
            RULE,
            "",
        ]
        for heading, table in self.tables().items():
            lines += [f"## {heading}", "", table.markdown(), ""]
        notes = dict.fromkeys(row.note for row in self.coverage if row.note)
        notes |= dict.fromkeys(row.claim.note for row in self.rates if row.claim.note)
        lines += [f"- shown, not bounded: {note}" for note in notes]
        lines += ["", "## Bounds that do not hold" if self.violations else "Every bound holds.", ""]
        lines += [f"- {line}" for line in self.violations]
        return "\n".join(lines).rstrip() + "\n"


RULE = (
    f"A bound is violated if the binomial {PERCENT} interval (Wilson) of a coverage lies wholly outside "
    f"[{COVERAGE[0]}, {COVERAGE[1]}], that of a rate of false positives wholly above {FALSE_POSITIVES}, or that of a "
    f"power wholly below {POWER}. "
    f"`below` and `above` are the shares of intervals wholly below and above the truth, the errors of a claim whose "
    f"threshold is the truth; `none` is the number of repeats in which the figure had no interval, which coverage "
    f"leaves out. A claim that is not measured counts as inconclusive. Where draws differ in whether a claim is "
    f"true of them, it counts towards power in those where it is, and as a false positive in the others."
)
"""The rule of the table, in words."""

_BINOMIAL = f"binomial {PERCENT}"
"""Heading of the columns of Wilson's intervals."""


def _share(count: int, of: int) -> str:
    """Return count / of as a cell of the table."""
    return f"{count / of:.3f}" if of else "-"


def _range(count: int, of: int) -> str:
    """Return the Wilson interval of count / of as a cell of the table."""
    return "{:.3f} - {:.3f}".format(*wilson(count, of)) if of else "-"


def _bound(row: Coverage | Rate, bounded: bool) -> str:
    """Return the state of a row's bound as a cell of the table."""
    return "shown" if not bounded else "VIOLATED" if row.violation else "holds"


def _coverage_row(row: Coverage) -> list[str | Cell]:
    """Return the cells of one row of the table of coverage."""
    from delta_suite.publish.table import Cell

    return [
        row.world,
        Cell(row.name, code=True),
        f"{row.truth:.4g}",
        _share(row.covered, row.repeats),
        _range(row.covered, row.repeats),
        _share(row.below, row.repeats),
        _share(row.above, row.repeats),
        str(row.without) if row.without else "",
        _bound(row, row.bounded),
    ]


def _rate_row(row: Rate) -> list[str | Cell]:
    """Return the cells of one row of a table of claims."""
    from delta_suite.publish.table import Cell

    refuted = row.verdicts.get(Verdict.REFUTED, 0)
    return [
        row.planted,
        Cell(row.claim.expectation.claim(), code=True),
        _share(row.supported, row.repeats),
        _range(row.supported, row.repeats),
        _share(refuted, row.repeats),
        _share(row.repeats - row.supported - refuted, row.repeats),
        _bound(row, row.claim.bounded),
    ]
