"""The part of a model's page that follows from its record alone, and takes longest to form: plots and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from delta_suite.escaping import script_json
from delta_suite.publish.model_tables import layer_table, phase_table
from delta_suite.publish.plots import plots
from delta_suite.publish.table import Cell, Table
from delta_suite.publish.wording import number
from delta_suite.records.view import RecordView


@dataclass(frozen=True)
class Figure:
    """The words of a page around one plot."""

    name: str
    title: str
    caption: str
    square: bool
    drawn: bool
    reason: str | None
    """The reason why it is not drawn, where it is not."""


@dataclass(frozen=True)
class Drawn:
    """Plots and tables of one record, as plain values, so that they can be kept as JSON."""

    variants: tuple[str, ...]
    figures: tuple[Figure, ...]
    """The plots of the variant raw."""
    plots: str
    """JSON for a script element: variant -> plot -> data and layout."""
    boundaries: str | None
    """A sentence or two about the boundaries that were detected."""
    phases: Table
    layers: Table

    @classmethod
    def of(cls, view: RecordView) -> Drawn:
        """Draw a record."""
        by_variant = {variant: plots(view, variant) for variant in view.variants}
        figures = tuple(
            Figure(plot.name, plot.title, plot.caption, plot.square, bool(plot.figure), plot.reason)
            for plot in by_variant["raw"]
        )
        data = {
            variant: {plot.name: plot.figure for plot in drawn if plot.figure} for variant, drawn in by_variant.items()
        }
        text = script_json(data)
        return cls(view.variants, figures, text, _boundaries(view), phase_table(view), layer_table(view))

    def as_json(self) -> dict[str, Any]:
        """Return plain values, from which `from_json` makes the same again."""
        tables = {name: _plain(getattr(self, name)) for name in ("phases", "layers")}
        figures = [asdict(figure) for figure in self.figures]
        return {
            "variants": self.variants,
            "figures": figures,
            "plots": self.plots,
            "boundaries": self.boundaries,
            **tables,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Drawn:
        """Return what `as_json` was made of."""
        figures = tuple(Figure(**figure) for figure in content["figures"])
        phases, layers = (_table(**content[name]) for name in ("phases", "layers"))
        return cls(tuple(content["variants"]), figures, content["plots"], content["boundaries"], phases, layers)


def _plain(table: Table) -> dict[str, Any]:
    """Return a table whose cells have a text and a value alone."""
    rows = [[(cell.text, cell.value) for cell in line.cells] for line in table.lines]
    return {"head": table.head, "rows": rows, "align": table.align, "drop": dict(table.drop)}


def _table(head: list[str], rows: list[list[tuple[str, Any]]], align: str, drop: dict[str, int]) -> Table:
    return Table.of(head, ([Cell(*cell) for cell in row] for row in rows), align=align, drop=drop)


def _boundaries(view: RecordView) -> str | None:
    boundaries = view.record.boundaries.get("raw")
    if boundaries is None:
        return None
    parts = [f"Detected (variant raw): before layers {', '.join(map(str, boundaries.detected)) or 'none'}."]
    if boundaries.declared:
        parts.append(f"Declared: before layers {', '.join(map(str, boundaries.declared))}.")
    if boundaries.recurrence:
        recurrence = ", ".join(f"{share:.0%}" for share in boundaries.recurrence)
        parts.append(f"Share of resampled documents in which each is detected again: {recurrence}.")
    p = boundaries.metrics["boundary_p"].value
    if p is not None:
        parts.append(f"p = {number(p, 3)} of the detected structure under smooth drift over depth.")
    return " ".join(parts)
