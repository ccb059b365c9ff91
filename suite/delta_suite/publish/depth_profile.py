"""A model's profile over depth, small enough to stand beside its name, and large enough to be compared with another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from delta_suite.capture.writes import SUBLAYERS
from delta_suite.models.phases import PhaseMap
from delta_suite.publish.model_tables import phase_values
from delta_suite.publish.plots import BLUE, GREEN, VERMILION
from delta_suite.publish.svg import Axis, Drawing
from delta_suite.records.view import RecordView
from delta_suite.reduction.variants import of_write

VARIANT = "sink_free"
"""The variant of a profile: sinks would give every layer one direction."""

RANK, COSINE, ENERGY = SHOWN = ("effective_rank", "adjacent_cosine", "frobenius")
"""The metrics of a profile: of each layer, of it and the next, and of what attention and the MLP write in it."""

Line = tuple[float | None, ...]
"""One value a layer; None where there is none."""


@dataclass(frozen=True)
class Profile:
    """The figures of a profile, which can be held when the record that they are from is not."""

    phases: PhaseMap
    ranks: Line
    """Effective rank."""
    cosines: Line
    """|cos| to the next layer; one value less than there are layers."""
    attention: Line
    """Share of attention in what attention and MLP write, of energies; empty where they were not measured apart."""
    by_phase: dict[str, tuple[float | None, ...]]
    """The metrics of the table of phases for each phase, in its order."""

    @classmethod
    def of(cls, view: RecordView) -> Profile:
        """Take a profile from a record."""
        layers = range(view.model.layers)
        attention, mlp = (_line(view, layers, ENERGY, of_write(VARIANT, write)) for write in SUBLAYERS)
        shares = tuple(_share_of_attention(one, other) for one, other in zip(attention, mlp, strict=True))
        by_phase = {name: phase_values(view, *layers, VARIANT) for name, layers in view.phases.items()}
        return cls(
            view.phases,
            _line(view, layers, RANK, VARIANT),
            _line(view, layers[:-1], COSINE, VARIANT),
            shares if any(share is not None for share in shares) else (),
            by_phase,
        )

    @property
    def described(self) -> str:
        """The profile in words, for those who do not see it."""
        parts = [f"Effective rank over {len(self.ranks)} layers: {_ends(self.ranks, '.3g')}"]
        parts.append(f"|cos| to the next layer: {_ends(self.cosines, '.2f')}")
        if self.attention:
            parts.append(f"share of attention in what is written: {_ends(self.attention, '.0%')}")
        return "; ".join(parts)


def _line(view: RecordView, layers: Iterable[int], metric: str, variant: str) -> Line:
    return tuple(view.layer(layer, metric, variant, replicates=False).value for layer in layers)


def _share_of_attention(attention: float | None, mlp: float | None) -> float | None:
    """Return the share of attention in the energy, which is the square of the Frobenius norm."""
    if attention is None or mlp is None or attention + mlp == 0:
        return None
    return attention**2 / (attention**2 + mlp**2)


def _ends(line: Line, form: str) -> str:
    known = [value for value in line if value is not None]
    return f"{min(known):{form}} to {max(known):{form}}" if known else "not measured"


# --- drawings --------------------------------------------------------------------------------------------------

WIDTH, LANE = 132.0, 15.0
"""Size of the small drawing: its width, and the height of each of its lanes."""


def sparkline(profile: Profile) -> str:
    """Return the small drawing: effective rank above |cos| to the next layer, above the share of attention."""
    lanes = [LANE * 1.6, LANE, *([LANE] if profile.attention else [])]
    drawing = Drawing(WIDTH, sum(lanes) + 4.0 * (len(lanes) - 1), "", profile.described)
    _lanes(drawing, profile, (1.0, WIDTH - 1.0), 0.0, lanes, 4.0)
    return drawing.inline("spark", hidden=True)


def highest(profiles: Iterable[Profile]) -> float:
    """Return the highest effective rank of several profiles, for the scale that their drawings share."""
    return max((rank for profile in profiles for rank in profile.ranks if rank is not None), default=10.0)


def comparison(profile: Profile, most: float) -> str:
    """Return the large drawing, with titles and scales, over the layers of one model.

    most: the effective rank at which the scale ends, the same for all that are compared.
    """
    lanes = [110.0, 70.0, *([50.0] if profile.attention else [])]
    drawing = Drawing(560, sum(lanes) + 28.0 * len(lanes) + 46, "", profile.described)
    x = Axis(-0.5, len(profile.ranks) - 0.5, 40, 550, whole=True)
    bottom = _lanes(drawing, profile, (x.start, x.end), 40.0, lanes, 28.0, most)
    for value in x.ticks():
        drawing.text(x.at(value), bottom + 16, f"{value:g}", size=11)
    drawing.text((x.start + x.end) / 2, bottom + 32, "layer", size=11)
    for name, (first, last) in profile.phases.items():
        drawing.text(x.at((first + last) / 2), 13, name, size=11)
    return drawing.inline("profile")


def _lanes(
    drawing: Drawing,
    profile: Profile,
    ends: tuple[float, float],
    top: float,
    heights: Sequence[float],
    gap: float,
    most: float | None = None,
) -> float:
    """Draw each lane below the other, over every second phase as a shade, and return the lower end of the last.

    most: the end of the scale of ranks, where titles and scales are drawn; without it each drawing has its own.
    """
    x = Axis(-0.5, len(profile.ranks) - 0.5, *ends)
    bottom = top + sum(heights) + gap * (len(heights) - 1)
    for first, last in sorted(profile.phases.values())[::2]:
        start, end = x.at(first - 0.5), x.at(last + 0.5)
        drawing.add("rect", x=start, y=top, width=end - start, height=bottom - top, css="plot-phase")
    ranks = [value for value in profile.ranks if value is not None and value > 0]
    low, high = (min(ranks) / 1.05, max(ranks) * 1.05) if ranks else (1.0, 10.0)
    if most is not None:
        low, high = 1.0, max(most, 2.0) * 1.05
    lanes: list[tuple[str, Line, str, Callable[[float, float], Axis]]] = [
        ("effective rank", profile.ranks, BLUE, lambda start, end: Axis(low, high, start, end, log=True)),
        ("|cos| to the next layer", profile.cosines, VERMILION, lambda start, end: Axis(0, 1, start, end)),
        ("share of attention", profile.attention, GREEN, lambda start, end: Axis(0, 1, start, end)),
    ]
    for (title, line, colour, axis), height in zip(lanes, heights, strict=False):
        y = axis(top + height - 1, top + 1)
        if most is not None:
            for value in y.ticks()[:: max(1, len(y.ticks()) // 3)]:
                drawing.text(x.start - 5, y.at(value) + 4, f"{value:g}", anchor="end", size=11)
            drawing.text(x.start, top - 5, title, anchor="start", size=12)
        drawing.add("line", x1=x.start, y1=top + height, x2=x.end, y2=top + height, css="plot-axis", opacity=0.4)
        shift = 0.5 if line is profile.cosines else 0.0  # of a pair: between its two layers
        points = [
            None if value is None or (y.log and value <= 0) else (x.at(index + shift), y.at(value))
            for index, value in enumerate(line)
        ]
        drawing.path(points, colour, width=2.0 if most is not None else 1.4)
        top += height + gap
    return top - gap
