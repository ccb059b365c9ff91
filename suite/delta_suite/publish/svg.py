"""Small static plots as SVG: the model card's, and any page's that must do without a script.

The same values give the same bytes. Text is drawn in the reader's sans-serif font; every plot has a title and a
description for those who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

GREY, INK, PAPER = "#808080", "#222222", "#ffffff"

CIVIDIS = (
    *((0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 93, 109), (112, 113, 115), (138, 134, 120)),
    *((165, 156, 116), (195, 179, 105), (225, 204, 85), (254, 232, 56)),
)
"""Ten steps of the colour scale, even in lightness for every kind of sight (Nuñez et al. 2018)."""

MISSING = "#bbbbbb"
"""The colour of a value that does not exist."""


@dataclass
class Axis:
    """A range of values laid out over a range of pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values to label: powers of ten with 2 and 5 between them, or about six even steps."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            values = [step * 10.0**power for power in powers for step in ((1, 2, 5) if len(powers) <= 4 else (1,))]
        else:
            step = 10.0 ** math.floor(math.log10((self.high - self.low) / 2 or 1.0))
            step = next(step * factor for factor in (0.5, 1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= 8)
            values = [step * index for index in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [value for value in values if self.low <= value <= self.high]


@dataclass
class Drawing:
    """An SVG that is drawn from back to front."""

    width: float
    height: float
    title: str
    description: str
    parts: list[str] = field(default_factory=list)

    def add(self, name: str, text: str = "", **attributes: object) -> None:
        """Add an element; underscores in attribute names stand for hyphens, and numbers get two decimals."""
        shown = " ".join(f'{key.replace("_", "-")}="{escape(_text(value))}"' for key, value in attributes.items())
        self.parts.append(f"<{name} {shown}>{escape(text)}</{name}>" if text else f"<{name} {shown}/>")

    def text(
        self, x: float, y: float, words: str, *, anchor: str = "middle", size: int = 12, turn: bool = False
    ) -> None:
        """Add words at a place, turned upwards where asked."""
        turned = {"transform": f"rotate(-90 {_text(x)} {_text(y)})"} if turn else {}
        self.add("text", words, x=x, y=y, text_anchor=anchor, font_size=size, fill=INK, **turned)

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1.0, dash: str = "") -> None:
        """Add a straight line."""
        dashed = {"stroke_dasharray": dash} if dash else {}
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=colour, stroke_width=width, **dashed)

    def path(self, points: Sequence[tuple[float, float] | None], colour: str, dash: str = "") -> None:
        """Add a line through points, interrupted at None."""
        commands, pen_up = [], True
        for point in points:
            if point is not None:
                commands.append(f"{'M' if pen_up else 'L'}{point[0]:.2f} {point[1]:.2f}")
            pen_up = point is None
        dashed = {"stroke_dasharray": dash} if dash else {}
        self.add("path", d=" ".join(commands), fill="none", stroke=colour, stroke_width=2, **dashed)

    def band(self, upper: Sequence[tuple[float, float]], lower: Sequence[tuple[float, float]], colour: str) -> None:
        """Fill the area between two lines of equal length."""
        points = " ".join(f"{x:.2f},{y:.2f}" for x, y in [*upper, *reversed(lower)])
        self.add("polygon", points=points, fill=colour, fill_opacity=0.25)

    def marker(self, x: float, y: float, shape: str, colour: str) -> None:
        """Add a circle, a square or a diamond."""
        if shape == "circle":
            self.add("circle", cx=x, cy=y, r=3, fill=colour)
        else:
            turn = {"transform": f"rotate(45 {_text(x)} {_text(y)})"} if shape == "diamond" else {}
            self.add("rect", x=x - 2.8, y=y - 2.8, width=5.6, height=5.6, fill=colour, **turn)

    def axes(self, x: Axis, y: Axis, x_title: str, y_title: str) -> None:
        """Add both axes with ticks, labels and titles; x runs along the bottom, y along the left."""
        for value in x.ticks():
            self.line(x.at(value), y.start, x.at(value), y.start + 5, INK)
            self.text(x.at(value), y.start + 18, f"{value:g}")
        for value in y.ticks():
            self.line(x.start - 5, y.at(value), x.start, y.at(value), INK)
            self.text(x.start - 8, y.at(value) + 4, f"{value:g}", anchor="end")
        self.line(x.start, y.start, x.end, y.start, INK)
        self.line(x.start, y.start, x.start, y.end, INK)
        self.text((x.start + x.end) / 2, y.start + 36, x_title, size=13)
        self.text(x.start - 42, (y.start + y.end) / 2, y_title, size=13, turn=True)

    def heat_map(self, matrix: np.ndarray, x: Axis, y: Axis) -> None:
        """Add a matrix of values from 0 to 1 as squares of colour; NaN is grey."""
        rows, columns = matrix.shape
        for row in range(rows):
            for column in range(columns):
                start, end = x.at(column - 0.5), x.at(column + 0.5)
                top, bottom = sorted((y.at(row - 0.5), y.at(row + 0.5)))
                colour = colour_of(float(matrix[row, column]))
                self.add("rect", x=start, y=top, width=end - start + 0.3, height=bottom - top + 0.3, fill=colour)

    def colour_bar(self, x: float, top: float, bottom: float, title: str) -> None:
        """Add the scale of a heat map, 0 at the bottom and 1 at the top."""
        steps = 50
        for step in range(steps):
            height = (bottom - top) / steps
            y = bottom - (step + 1) * height
            self.add("rect", x=x, y=y, width=14, height=height + 0.3, fill=colour_of((step + 0.5) / steps))
        for value in (0.0, 0.5, 1.0):
            self.text(x + 20, bottom - value * (bottom - top) + 4, f"{value:g}", anchor="start")
        self.text(x + 52, (top + bottom) / 2, title, size=13, turn=True)

    def svg(self) -> str:
        """Return the file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_text(self.width)} {_text(self.height)}" '
            f'role="img" font-family="system-ui, Helvetica, Arial, sans-serif">'
        )
        words = f"<title>{escape(self.title)}</title>\n<desc>{escape(self.description)}</desc>"
        paper = f'<rect width="100%" height="100%" fill="{PAPER}"/>'
        return "\n".join([head, words, paper, *self.parts, "</svg>"]) + "\n"


def colour_of(value: float) -> str:
    """Return the colour of a value from 0 to 1, grey for NaN.

    Example:
        >>> colour_of(0.0), colour_of(float("nan"))
        ('#00224e', '#bbbbbb')
    """
    if math.isnan(value):
        return MISSING
    place = min(max(value, 0.0), 1.0) * (len(CIVIDIS) - 1)
    index = min(int(place), len(CIVIDIS) - 2)
    low, high, share = CIVIDIS[index], CIVIDIS[index + 1], place - index
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
