"""Hold what the self-test counted: coverage, rates of verdicts, the bounds they break, and the page of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from delta_suite.claims.verdict import Verdict
from delta_suite.metrics.intervals import CONFIDENCE
from delta_suite.selftest.documents import DOCUMENTS
from delta_suite.selftest.law_worlds import LAW_TOKENS
from delta_suite.selftest.planted import TOKENS
from delta_suite.selftest.worlds import WORLDS, Claim

COVERAGE = (0.92, 0.98)
"""The shares of repeats that a 95% interval may cover."""

FALSE_POSITIVES = 0.07
"""The largest rate of false positives that is allowed."""


def wilson(hits: int, of: int) -> tuple[float, float]:
    """Return the 95% range of a rate that was seen `hits` times in `of` (Wilson 1927)."""
    z = 1.959964
    rate, spread = hits / of, z**2 / of
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / of + spread / of / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Coverage:
    """How often the interval of one figure held its true value."""

    world: str
    metric: str
    scope: str
    truth: float
    covered: int
    below: int
    """Intervals that lie wholly below the truth: errors of a claim `<=` whose threshold is the truth."""
    above: int
    without: int = 0
    """Repeats in which the figure had no interval."""
    bounded: bool = True
    note: str = ""

    @property
    def repeats(self) -> int:
        """Return the number of repeats that had an interval."""
        return self.covered + self.below + self.above

    @property
    def name(self) -> str:
        """Return the figure, such as `gamma over C`."""
        return f"{self.metric} over {self.scope}"

    @property
    def violation(self) -> str | None:
        """Return how the bound is broken, or None where it holds."""
        if not self.bounded:
            return None
        if self.repeats == 0:
            return f"{self.world}: {self.name} never had an interval"
        low, high = wilson(self.covered, self.repeats)
        if high >= COVERAGE[0] and low <= COVERAGE[1]:
            return None
        return (
            f"{self.world}: the {CONFIDENCE:.0%} interval of {self.name} holds the truth in "
            f"{self.covered / self.repeats:.3f} of {self.repeats} repeats (binomial range {low:.3f} to {high:.3f}), "
            f"outside {COVERAGE[0]} to {COVERAGE[1]}"
        )


@dataclass(frozen=True)
class Rate:
    """How often one claim was supported, rightly (power) or wrongly (false positives)."""

    world: str
    claim: Claim
    verdicts: Mapping[Verdict, int]

    @property
    def repeats(self) -> int:
        """Return the number of repeats that were judged."""
        return sum(self.verdicts.values())

    @property
    def supported(self) -> int:
        """Return the number of repeats in which the claim was supported."""
        return self.verdicts.get(Verdict.SUPPORTED, 0)

    @property
    def violation(self) -> str | None:
        """Return how the bound is broken, or None where it holds."""
        if self.claim.kind == "power" or not self.claim.bounded:
            return None
        low, _ = wilson(self.supported, self.repeats)
        if low <= FALSE_POSITIVES:
            return None
        return (
            f"{self.world}: {self.claim.expectation.claim()} is supported in {self.supported / self.repeats:.3f} of "
            f"{self.repeats} repeats, and more than {FALSE_POSITIVES} are false positives"
        )


@dataclass(frozen=True)
class Proof:
    """Everything that was counted, and how."""

    repeats: int
    coverage: Sequence[Coverage]
    rates: Sequence[Rate]
    worlds: Sequence[str]
    seconds: float
    processes: int
    origin: Mapping[str, str] = field(default_factory=dict)
    """Command, date, versions, hardware."""

    @cached_property
    def violations(self) -> list[str]:
        """One line for each bound that does not hold."""
        rows: Iterable[Coverage | Rate] = [*self.coverage, *self.rates]
        return [line for row in rows if (line := row.violation) is not None]

    def tables(self, style: str = "simple") -> dict[str, str]:
        """Return the tables by heading, in a style of tabulate."""
        from tabulate import tabulate

        def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
            return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True)

        out = {}
        if self.coverage:
            out[f"Coverage of {CONFIDENCE:.0%} intervals"] = table(
                ["planted", "figure", "true value", "coverage", "binomial 95%", "below", "above", "none", "bound"],
                [_coverage_row(row) for row in self.coverage],
            )
        for kind in ("false positives", "power"):
            chosen = [row for row in self.rates if row.claim.kind == kind]
            if chosen:
                headers = ["planted", "claim", "supported", "binomial 95%", "refuted", "inconclusive", "bound"]
                out[kind.capitalize()] = table(headers, [_rate_row(row) for row in chosen])
        return out

    def markdown(self) -> str:
        """Return the page that is kept in the repository."""
        lines = [
            "# The suite proves itself",
            "",
            f"Made by `{self.origin['command']}` on {self.origin['date']}, in {self.seconds:.0f} seconds.",
            "",
            *(f"- {name}: {value}" for name, value in self.origin.items() if name not in ("command", "date")),
            "",
            f"{self.repeats} repeats. Each draws {DOCUMENTS} documents of {TOKENS} tokens, {LAW_TOKENS} where the law "
            "is planted, from every population, reduces them, takes every interval and judges every claim, by the code "
            "that a model's residual stream goes through. True values of the law are those of maps with the ridge that "
            "was chosen; where it differs between repeats, the table has the mean.",
            "",
            *(f"- {name}: {WORLDS[name].says}" for name in self.worlds),
            "",
            RULE,
            "",
        ]
        for heading, table in self.tables("github").items():
            lines += [f"## {heading}", "", table, ""]
        notes = dict.fromkeys(row.note for row in self.coverage if row.note)
        notes |= dict.fromkeys(row.claim.note for row in self.rates if row.claim.note)
        lines += [f"- shown, not bounded: {note}" for note in notes]
        lines += ["", "## Bounds that do not hold" if self.violations else "Every bound holds.", ""]
        lines += [f"- {line}" for line in self.violations]
        return "\n".join(lines).rstrip() + "\n"


RULE = (
    f"A bound is violated where the binomial 95% range (Wilson) of a coverage does not meet [{COVERAGE[0]}, "
    f"{COVERAGE[1]}], or that of a rate of false positives lies above {FALSE_POSITIVES}. `below` and `above` are "
    f"intervals wholly below and above the truth, the errors of a claim whose threshold is the truth; `none` are "
    f"repeats in which the figure had no interval, which coverage leaves out. A claim that is not measured counts as "
    f"inconclusive."
)


def _share(count: int, of: int) -> str:
    return f"{count / of:.3f}" if of else "-"


def _range(count: int, of: int) -> str:
    return "{:.3f} - {:.3f}".format(*wilson(count, of)) if of else "-"


def _bound(row: Coverage | Rate, bounded: bool) -> str:
    return "shown" if not bounded else "VIOLATED" if row.violation else "holds"


def _coverage_row(row: Coverage) -> list[str]:
    return [
        row.world,
        row.name,
        f"{row.truth:.4g}",
        _share(row.covered, row.repeats),
        _range(row.covered, row.repeats),
        _share(row.below, row.repeats),
        _share(row.above, row.repeats),
        str(row.without) if row.without else "",
        _bound(row, row.bounded),
    ]


def _rate_row(row: Rate) -> list[str]:
    refuted = row.verdicts.get(Verdict.REFUTED, 0)
    return [
        row.world,
        row.claim.expectation.claim(),
        _share(row.supported, row.repeats),
        _range(row.supported, row.repeats),
        _share(refuted, row.repeats),
        _share(row.repeats - row.supported - refuted, row.repeats),
        _bound(row, row.claim.bounded and row.claim.kind != "power"),
    ]
