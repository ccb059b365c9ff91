"""Small static plots as SVG: the model card's, and any page's that must do without a script.

The same values give the same bytes. Text is drawn in the reader's sans-serif font; every plot has a title and a
description for those who do not see it, and follows the reader's light or dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from delta_suite.escaping import xml

CIVIDIS = (
    *((0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 93, 109), (112, 113, 115), (138, 134, 120)),
    *((165, 156, 116), (195, 179, 105), (225, 204, 85), (254, 232, 56)),
)
"""Ten steps of the colour scale, even in lightness for every kind of sight (Nuñez et al. 2018)."""

LEVELS = 64
"""Colours of a heat map: more cannot be told apart, and cells of one colour share a path."""

STYLE = (
    ".plot-paper{fill:#fff}.plot-ink{fill:#1a1a1a}.plot-axis{stroke:#1a1a1a}"
    "@media(prefers-color-scheme:dark){"
    ".plot-paper{fill:#15171a}.plot-ink{fill:#e9eaec}.plot-axis{stroke:#e9eaec}}"
)
"""Ground, text and axes, in the colours of the site."""


@dataclass(frozen=True)
class Axis:
    """A range of values laid out over a range of pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False
    """True where only whole numbers are labelled, as of layers."""

    def at(self, value: float) -> float:
        """Return the pixel of a value.

        Example:
            >>> Axis(1, 100, 0, 300, log=True).at(10)
            150.0
        """
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values to label: powers of ten, with 2 and 5 between few of them, or four to eight even steps.

        Example:
            >>> Axis(-0.5, 29.5, 0, 300, whole=True).ticks()
            [0.0, 5.0, 10.0, 15.0, 20.0, 25.0]
        """
        values: list[float] = []
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            values = [factor * 10.0**power for power in powers for factor in ((1, 2, 5) if len(powers) <= 4 else (1,))]
            values = [value for value in values if self.low <= value <= self.high]
        if len(values) < 2:
            power = 10.0 ** math.floor(math.log10((self.high - self.low) / 2 or 1.0))
            step = next(power * factor for factor in (0.5, 1, 2, 5, 10) if (self.high - self.low) <= 8 * power * factor)
            step = max(step, 1.0) if self.whole else step
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
        """Add an element; `_` in attribute names stands for `-`, `css` for `class`, and numbers get two decimals."""
        names = {key: "class" if key == "css" else key.replace("_", "-") for key in attributes}
        shown = " ".join(f'{names[key]}="{xml(_text(value))}"' for key, value in attributes.items())
        self.parts.append(f"<{name} {shown}>{xml(text)}</{name}>" if text else f"<{name} {shown}/>")

    def text(
        self, x: float, y: float, words: str, *, anchor: str = "middle", size: int = 12, turn: bool = False
    ) -> None:
        """Add words at a place, turned upwards where asked."""
        turned = {"transform": f"rotate(-90 {_text(x)} {_text(y)})"} if turn else {}
        self.add("text", words, x=x, y=y, text_anchor=anchor, font_size=size, css="plot-ink", **turned)

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1.0, dash: str = "") -> None:
        """Add a straight line."""
        dashed = {"stroke_dasharray": dash} if dash else {}
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=colour, stroke_width=width, **dashed)

    def path(
        self, points: Sequence[tuple[float, float] | None], colour: str, dash: str = "", width: float = 2.0
    ) -> None:
        """Add a line through points, interrupted at None."""
        commands, pen_up = [], True
        for point in points:
            if point is not None:
                commands.append(f"{'M' if pen_up else 'L'}{_text(point[0])} {_text(point[1])}")
            pen_up = point is None
        dashed = {"stroke_dasharray": dash} if dash else {}
        self.add("path", d=" ".join(commands), fill="none", stroke=colour, stroke_width=width, **dashed)

    def band(self, upper: Sequence[tuple[float, float]], lower: Sequence[tuple[float, float]], colour: str) -> None:
        """Fill the area between two lines of equal length."""
        points = " ".join(f"{_text(x)},{_text(y)}" for x, y in [*upper, *reversed(lower)])
        self.add("polygon", points=points, fill=colour, fill_opacity=0.3)

    def marker(self, x: float, y: float, shape: str, colour: str) -> None:
        """Add a circle, a square or a diamond."""
        if shape == "circle":
            self.add("circle", cx=x, cy=y, r=3, fill=colour)
        else:
            turn = {"transform": f"rotate(45 {_text(x)} {_text(y)})"} if shape == "diamond" else {}
            self.add("rect", x=x - 2.8, y=y - 2.8, width=5.6, height=5.6, fill=colour, **turn)

    def axes(self, x: Axis, y: Axis, x_title: str, y_title: str) -> None:
        """Add both axes with ticks, labels and titles: x at the lower end of y, y at the left end of x."""
        bottom = max(y.start, y.end)
        for value in x.ticks():
            self.add("line", x1=x.at(value), y1=bottom, x2=x.at(value), y2=bottom + 5, css="plot-axis")
            self.text(x.at(value), bottom + 18, f"{value:g}")
        for value in y.ticks():
            self.add("line", x1=x.start - 5, y1=y.at(value), x2=x.start, y2=y.at(value), css="plot-axis")
            self.text(x.start - 8, y.at(value) + 4, f"{value:g}", anchor="end")
        self.add("line", x1=x.start, y1=bottom, x2=x.end, y2=bottom, css="plot-axis")
        self.add("line", x1=x.start, y1=min(y.start, y.end), x2=x.start, y2=bottom, css="plot-axis")
        self.text((x.start + x.end) / 2, bottom + 36, x_title, size=13)
        self.text(x.start - 42, (y.start + y.end) / 2, y_title, size=13, turn=True)

    def heat_map(self, matrix: np.ndarray, x: Axis, y: Axis) -> None:
        """Add a matrix of values from 0 to 1 as squares of colour, row 0 at -0.5 to 0.5 of y; NaN stays blank."""
        cells: dict[int, list[str]] = {}
        for row, column in np.ndindex(matrix.shape):
            value = float(matrix[row, column])
            if not math.isnan(value):
                level = round(min(max(value, 0.0), 1.0) * (LEVELS - 1))
                cells.setdefault(level, []).append(f"M{column} {row}h1v1h-1z")
        width, height = x.at(1) - x.at(0), y.at(1) - y.at(0)
        place = f"translate({_text(x.at(-0.5))} {_text(y.at(-0.5))}) scale({width:.4f} {height:.4f})"
        self.parts.append(f'<g transform="{place}" shape-rendering="crispEdges">')
        for level, squares in sorted(cells.items()):
            self.add("path", d="".join(squares), fill=colour_of(level / (LEVELS - 1)))
        self.parts.append("</g>")

    def colour_bar(self, x: float, top: float, bottom: float, title: str) -> None:
        """Add the scale of a heat map, 0 at the bottom and 1 at the top."""
        levels = np.linspace(0, 1, LEVELS)[:, None]
        self.heat_map(levels, Axis(-0.5, 0.5, x, x + 14), Axis(-0.5, LEVELS - 0.5, bottom, top))
        for value in (0.0, 0.5, 1.0):
            self.text(x + 20, bottom - value * (bottom - top) + 4, f"{value:g}", anchor="start")
        self.text(x + 56, (top + bottom) / 2, title, size=13, turn=True)

    def inline(self, css: str, *, hidden: bool = False) -> str:
        """Return the element that stands in a page, which gives ground, text and axes their colours.

        hidden: True where the same is said in words elsewhere, and a reader who does not see it is spared the drawing.
        """
        size = f'viewBox="0 0 {_text(self.width)} {_text(self.height)}"'
        role = 'aria-hidden="true"' if hidden else f'role="img" aria-label="{xml(self.description)}"'
        return f'<svg {size} class="{css}" {role}>{"".join(self.parts)}</svg>'

    def svg(self) -> str:
        """Return the file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_text(self.width)} {_text(self.height)}" '
            f'role="img" font-family="system-ui, Helvetica, Arial, sans-serif">'
        )
        words = f"<title>{xml(self.title)}</title>\n<desc>{xml(self.description)}</desc>"
        paper = '<rect width="100%" height="100%" class="plot-paper"/>'
        return "\n".join([head, words, f"<style>{STYLE}</style>", paper, *self.parts, "</svg>"]) + "\n"


def colour_of(value: float) -> str:
    """Return the colour of a value from 0 to 1.

    Example:
        >>> colour_of(0.0), colour_of(1.0)
        ('#00224e', '#fee838')
    """
    place = value * (len(CIVIDIS) - 1)
    index = min(int(place), len(CIVIDIS) - 2)
    low, high, share = CIVIDIS[index], CIVIDIS[index + 1], place - index
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
