"""pytest-benchmark's JSON -> one page of Markdown: what was measured, its floor, its target, and whether it is met.

python -m tests.benchmarks.page FILE.json [FILE.json ...]
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.benchmarks.measuring import Spent

INTRODUCTION = """\
# Benchmarks

Made by `make bench` or `make bench-gpu`, and `python -m tests.benchmarks.page FILE.json ... > results/benchmarks.md`.
No figure in seconds can fail a run, but equal results are asserted wherever two ways compute the same figure.

- All ratios are between figures of one run. Measured seconds are wall time, with the device synchronised. *CPU time* is
  that of all threads: it says more where the machine was shared.
- *Peak memory*: beyond what was held before, so without the weights; of whole commands, all that they held.
- *Floor*: the time that the machine needs at the least, from rates measured in the same run: operations over the rate
  of a large matrix product in that precision, or bytes over the rate of a large copy. An eigenproblem of size n counts
  as 10/3 n^3 operations, half of which run far below that rate.
- *Grows by the power*: the slope of the line through the logarithms of size and cost, by least squares.
"""

OPERATORS = {">=": operator.ge, "<=": operator.le}

COLUMNS = ("measured", "CPU time", "peak memory", "floor", "target")
"""Those that some figure of a table has."""

PREFIXES = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}


@dataclass(frozen=True)
class Figure:
    """One measured number and its unit: "s", "x", "B", "B/s", "FLOP/s" or none."""

    what: str
    value: float
    unit: str = ""
    floor: float | None = None
    """The least that the machine needs, in the same unit."""
    target: str = ""
    """Such as ">= 100"; empty where there is none."""
    cpu: float | None = None
    """Seconds of CPU of all threads, which tell also where other programs share the machine."""
    bound: str = ""
    """What bounds it, said where the target is not met."""
    by_cpu: bool = False
    """True if the target is held against the seconds of CPU: those of a command that runs on one thread."""
    peak: float | None = None
    """Bytes that were held at once beyond what was held before."""

    @property
    def met(self) -> str:
        if not self.target:
            return ""
        sign, bound = self.target.split()
        value = self.cpu if self.by_cpu and self.cpu is not None else self.value
        return "met" if OPERATORS[sign](value, float(bound)) else "**not met**"

    @property
    def shown(self) -> str:
        return _shown(self.value, self.unit)

    @property
    def cells(self) -> dict[str, str]:
        """By column; empty where there is nothing to say."""
        over = f" ({self.value / self.floor:.3g}x)" if self.floor else ""
        unit = "" if self.unit in {"x", ""} else f" {self.unit}"
        return {
            "measured": self.shown,
            "CPU time": _shown(self.cpu, "s"),
            "peak memory": _shown(self.peak, "B"),
            "floor": f"{_shown(self.floor, self.unit)}{over}",
            "target": f"{self.target}{unit}: {self.met}" if self.target else "",
        }


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if not math.isfinite(value):
        return "-"
    if unit == "s":
        return _scaled(value, {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9})
    if unit in {"B", "B/s", "FLOP/s"}:
        return _scaled(value, {prefix + unit: size for prefix, size in PREFIXES.items()})
    if unit == "x":
        return f"{value:.3g}x" if value < 100 else f"{value:.0f}x"
    return f"{value:.3g} {unit}".rstrip()


def _scaled(value: float, units: dict[str, float]) -> str:
    unit, size = next(((u, s) for u, s in units.items() if abs(value) >= s), list(units.items())[-1])
    scaled = value / size
    return f"{scaled:.0f} {unit}" if scaled >= 999.5 else f"{scaled:.3g} {unit}"


class Record:
    """What one benchmark says, kept in its extra_info."""

    def __init__(self, extra_info: dict[str, Any], subject: str, rehearsal: bool = False, on_cpu: bool = True) -> None:
        self._extra, self._on_cpu = extra_info, on_cpu
        extra_info |= {"subject": subject, "rehearsal": rehearsal, "figures": [], "notes": []}

    def add(self, what: str, value: float, unit: str = "", **more: Any) -> None:
        """Add a figure; `more` are its other fields."""
        self._extra["figures"].append(asdict(Figure(what, float(value), unit, **more)))

    def spent(self, what: str, spent: Spent, peak: float | None = None, **more: Any) -> None:
        """Add wall seconds, with those of CPU where the work is done by it."""
        self.add(what, spent.wall, "s", cpu=spent.cpu if self._on_cpu else None, peak=peak, **more)

    def grows(self, what: str, points: Sequence[tuple[float, float]], unit: str = "", **more: Any) -> None:
        """Add the power of a size that costs grow by, from pairs of both: least squares over their logarithms."""
        self.add(f"{what} grows by the power", exponent(points), unit, **more)

    def note(self, text: str) -> None:
        self._extra["notes"].append(text)


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the line through the logarithms of sizes and costs, by least squares."""
    sizes, costs = ([math.log(max(pair[side], 1e-12)) for pair in points] for side in (0, 1))
    return statistics.linear_regression(sizes, costs).slope if len(points) > 1 else math.nan


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
            cells = figure.cells
            more = "".join(f"  {name} {cell}" for name, cell in cells.items() if cell and name != "measured")
            lines.append(f"  {figure.what}: {cells['measured']}{more.replace('*', '')}")
    return "\n".join(lines)


def page(reports: Iterable[dict[str, Any]]) -> str:
    """Markdown from loaded JSON files; those of one machine share a section, which names the day and code of each."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        info = report["machine_info"]
        sections.setdefault(info["gpu"] or info["cpu"], []).append(report)
    return "\n".join([INTRODUCTION, *(_section(machine, own) for machine, own in sections.items())])


def _origin(report: dict[str, Any]) -> str:
    info = report["machine_info"]
    day = datetime.fromisoformat(report["datetime"]).date().isoformat()
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    commit = report.get("commit_info") or {}
    revision = str(commit.get("id", ""))[:12]
    known = bool(revision) and set(revision) <= set("0123456789abcdef")
    revision = f", commit {revision}{' with changes' if commit.get('dirty') else ''}" if known else ""
    return f"{info['cpu']}; {day}{revision}; {versions}."


def _section(machine: str, reports: list[dict[str, Any]]) -> str:
    lines = [f"## {machine}", "", *dict.fromkeys(f"- {_origin(report)}" for report in reports), ""]
    groups: dict[str, list[dict[str, Any]]] = {}
    for own in (own for report in reports for own in report["benchmarks"]):
        if not own["extra_info"].get("rehearsal"):
            groups.setdefault(own["group"] or own["name"], []).append(own["extra_info"])
    for group in sorted(groups, key=_number):
        rows = [(extra["subject"], figure) for extra in groups[group] for figure in figures(extra)]
        columns = [name for name in COLUMNS if any(figure.cells[name] for _, figure in rows)]
        lines += [f"### {group}", "", f"| case | figure | {' | '.join(columns)} |", "|" + " --- |" * (2 + len(columns))]
        last = None
        for subject, figure in rows:
            cells = [figure.cells[name] for name in columns]
            lines.append("| " + " | ".join(("" if subject == last else subject, figure.what, *cells)) + " |")
            last = subject
        notes = dict.fromkeys(note for extra in groups[group] for note in extra.get("notes", ()))
        missed = [(subject, each) for subject, each in rows if each.bound and "not" in each.met]
        notes |= dict.fromkeys(f"Not met, {subject}, *{each.what}*: {each.bound}" for subject, each in missed)
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
