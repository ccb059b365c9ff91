"""pytest-benchmark's JSON -> one page of Markdown: what was measured, its floor, its target, and whether it is met.

python -m tests.benchmarks.page FILE.json [FILE.json ...]
"""

from __future__ import annotations

import argparse
import json
import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

INTRODUCTION = """\
# Benchmarks

Made by `make bench` (on a machine with a GPU it takes the GPU) and
`python -m tests.benchmarks.page bench.json > results/benchmarks.md`; several JSON files, from several machines, may be
given. Nothing here is a test: no figure in seconds can fail a run, but equal results are asserted wherever two ways
compute the same figure.

- All ratios are between figures of one run. Seconds are medians of wall time, with the device synchronised.
- *Floor*: the time that the machine needs at the least, from rates measured in the same run: operations over the rate
  of a large matrix product in that precision, or bytes over the rate of a large copy, whichever is longer. An
  eigenproblem of size n counts as 10/3 n^3 operations; half of its reduction to tridiagonal form is products with a
  vector, which run far below that rate, so libraries stay a multiple above. Launches, latencies and everything small
  count as nothing.
- *Peak memory*: beyond what was held before, so without the weights.
- *Target*: what the project set out to reach on one data-centre GPU; a figure without one is there to be known.
"""

OPERATORS = {">=": operator.ge, "<=": operator.le}

PREFIXES = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}


@dataclass(frozen=True)
class Figure:
    """One measured number, its unit ("s", "x", "B", "B/s", "FLOP/s" or none), its floor in that unit, its target."""

    what: str
    value: float
    unit: str = ""
    floor: float | None = None
    target: str = ""
    """Such as ">= 100"; empty where there is none."""

    @property
    def met(self) -> str:
        if not self.target:
            return ""
        sign, bound = self.target.split()
        return "met" if OPERATORS[sign](self.value, float(bound)) else "**not met**"

    def shown(self, value: float | None) -> str:
        if value is None:
            return ""
        if not math.isfinite(value):
            return "-"
        if self.unit == "s":
            return _scaled(value, {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9})
        if self.unit in {"B", "B/s", "FLOP/s"}:
            return _scaled(value, {prefix + self.unit: size for prefix, size in PREFIXES.items()})
        if self.unit == "x":
            return f"{value:.3g}x" if value < 100 else f"{value:.0f}x"
        return f"{value:.3g} {self.unit}".rstrip()

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """Measured, floor, their ratio, target, verdict."""
        over = f"{self.value / self.floor:.3g}" if self.floor else ""
        unit = "" if self.unit in {"x", ""} else f" {self.unit}"
        target = f"{self.target}{unit}" if self.target else ""
        return self.shown(self.value), self.shown(self.floor), over, target, self.met


def _scaled(value: float, units: dict[str, float]) -> str:
    unit, size = next(((u, s) for u, s in units.items() if abs(value) >= s), list(units.items())[-1])
    scaled = value / size
    return f"{scaled:.0f} {unit}" if scaled >= 999.5 else f"{scaled:.3g} {unit}"


class Record:
    """What one benchmark says, kept in its extra_info."""

    def __init__(self, extra_info: dict[str, Any], subject: str, rehearsal: bool = False) -> None:
        self._extra = extra_info
        extra_info |= {"subject": subject, "rehearsal": rehearsal, "figures": [], "notes": []}

    def add(self, what: str, value: float, unit: str = "", *, floor: float | None = None, target: str = "") -> None:
        self._extra["figures"].append(asdict(Figure(what, float(value), unit, floor, target)))

    def note(self, text: str) -> None:
        self._extra["notes"].append(text)


def figures(extra_info: dict[str, Any]) -> Iterator[Figure]:
    for own in extra_info.get("figures", ()):
        yield Figure(**own)


def summary(records: Iterable[tuple[str, dict[str, Any]]]) -> str:
    """Short lines for the end of a run, from (group, extra_info) of each benchmark."""
    lines = []
    last = ("", "")
    for group, extra in records:
        subject = extra.get("subject", "")
        if (group, subject) != last:
            lines.append(f"{group} | {subject}")
            last = (group, subject)
        for figure in figures(extra):
            value, floor, over, target, met = figure.cells
            against = f"  floor {floor} ({over}x)" if floor else ""
            wanted = f"  {target}: {met.strip('*')}" if target else ""
            lines.append(f"  {figure.what}: {value}{against}{wanted}")
    return "\n".join(lines)


def page(reports: Iterable[dict[str, Any]]) -> str:
    """Markdown from loaded JSON files; those of one machine and day share a section."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        sections.setdefault(_machine(report), []).extend(report["benchmarks"])
    return "\n".join([INTRODUCTION, *(_section(heading, own) for heading, own in sections.items())])


def _machine(report: dict[str, Any]) -> str:
    info = report["machine_info"]
    day = datetime.fromisoformat(report["datetime"]).date().isoformat()
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    commit = report.get("commit_info") or {}
    revision = str(commit.get("id", ""))[:12]
    known = bool(revision) and set(revision) <= set("0123456789abcdef")
    revision = f", commit {revision}{' with changes' if commit.get('dirty') else ''}" if known else ""
    heading = info["gpu"] or info["cpu"]
    beside = f"{info['gpu']}, with {info['cpu']}" if info["gpu"] else info["cpu"]
    return f"## {heading}\n\n{beside}; {day}{revision}; {versions}.\n"


def _section(heading: str, benchmarks: list[dict[str, Any]]) -> str:
    lines = [heading]
    groups: dict[str, list[dict[str, Any]]] = {}
    for own in benchmarks:
        if not own["extra_info"].get("rehearsal"):
            groups.setdefault(own["group"] or own["name"], []).append(own["extra_info"])
    for group in sorted(groups, key=_number):
        lines += [
            f"### {group}",
            "",
            "| case | figure | measured | floor | over floor | target | |",
            "|" + " --- |" * 7,
        ]
        notes: dict[str, None] = {}
        last = None
        for extra in groups[group]:
            for figure in figures(extra):
                case = extra["subject"] if extra["subject"] != last else ""
                last = extra["subject"]
                lines.append("| " + " | ".join((case, figure.what, *figure.cells)) + " |")
            notes |= dict.fromkeys(extra.get("notes", ()))
        lines += ["", *(f"- {note}" for note in notes), *([""] if notes else [])]
    return "\n".join(lines)


def _number(group: str) -> tuple[int, str]:
    head = group.split(".", maxsplit=1)[0]
    return (int(head) if head.isdigit() else 99, group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    print(page(json.loads(path.read_text("utf-8")) for path in parser.parse_args().files), end="")


if __name__ == "__main__":
    main()
