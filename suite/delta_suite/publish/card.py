"""A model's card for the Hugging Face hub: `model-index` metadata, a section with the verdicts, and two plots."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_suite.errors import RecordError
from delta_suite.publish.board import Board, Entry, Group
from delta_suite.publish.plots import BLUE, GREEN, ORANGE, VERMILION, estimates, found_edges, full_matrix, phase_edges
from delta_suite.publish.tables import NONE, margin_text, number
from delta_suite.publish.wording import LEGEND, SYMBOLS, memory_text, tally_text, verdict_word
from delta_suite.records.record import Measurement, write_atomically

if TYPE_CHECKING:
    from huggingface_hub import EvalResult
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

START, END = "<!-- delta-suite: start -->", "<!-- delta-suite: end -->"
"""What stands between them is the suite's, and is replaced; the rest of a card is its author's, and stays."""

DATASET = "delta-suite-"
"""Before the calibration's name, as the type of the data set in `model-index`: how the suite knows its own results."""

VARIANT = "raw"
"""Of the plots."""


def newest(board: Board, model: str) -> tuple[Group, Entry]:
    """The newest record that counts of this model. Raises RecordError where there is none."""
    found = board.models.get(model)
    if not found:
        known = ", ".join(board.models) or "none"
        raise RecordError(
            f"{board.results / 'runs'} has no record of {model!r}; it has records of: {known}. "
            f"`delta-suite measure {model}` writes one."
        )
    return max(found, key=lambda item: (item[1].measurement.provenance.created, item[1].record))


def write_card(folder: Path, board: Board, group: Group, entry: Entry) -> list[Path]:
    """README.md and the plots, in this folder. In a card that is there already, only the suite's parts are replaced.

    Raises RecordError where the folder cannot be written, or its README.md has metadata that cannot be read.
    """
    readme = folder / "README.md"
    drawn = figures(entry.measurement)
    try:
        old = readme.read_text("utf-8") if readme.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{readme} cannot be read: {error}. Mend it, or name another folder with --out.") from None
    content = {"README.md": card_text(board, group, entry, list(drawn), old, str(readme)), **drawn}
    for name, text in content.items():
        write_atomically(folder / name, text)
    return [folder / name for name in content]


def card_text(board: Board, group: Group, entry: Entry, images: list[str], old: str | None, where: str) -> str:
    """The whole card. `old` is the card that was there; `where` names it in an error."""
    from huggingface_hub import ModelCard, ModelCardData

    data: Any
    if old is None:
        data, body = ModelCardData(model_name=entry.model), f"\n# {entry.model}\n"
    else:
        try:
            card = ModelCard(old)
        except ValueError as error:
            raise RecordError(f"the metadata of {where} cannot be read: {error}. Mend it, or choose --out.") from None
        data, body = card.data, card.text
    others = [own for own in data.eval_results or [] if not own.dataset_type.startswith(DATASET)]
    data.eval_results = [*others, *eval_results(group, entry)] or None
    data.model_name = data.model_name or entry.model
    data.tags = list(dict.fromkeys([*(data.tags or []), "delta-suite"]))
    section = f"{START}\n{section_text(board, group, entry, images)}\n{END}"
    before, start, rest = body.partition(START)
    _, end, after = rest.partition(END)
    if bool(start) != bool(end):
        raise RecordError(f"{where} has {START} without {END} after it. Remove the one that is left.")
    body = f"{before}{section}{after}" if start else f"{body.rstrip()}\n\n{section}\n"
    return f"---\n{data.to_yaml().rstrip()}\n---\n{body}"


def eval_results(group: Group, entry: Entry) -> list[EvalResult]:
    """One result a claim whose number exists. The verdict and what was required stand in the metric's `args`."""
    from huggingface_hub import EvalResult

    results = []
    for row in entry.rows:
        if row.observed is None:
            continue
        arguments: dict[str, Any] = {"verdict": verdict_word(row), "required": row.required, "margin": row.margin}
        if row.interval is not None:
            arguments["interval_95"] = list(row.interval)
        if row.vacuous:
            arguments["vacuous"] = True
        if row.gates:
            arguments["gates"] = list(row.gates)
        results.append(
            EvalResult(
                task_type="other",
                task_name="Depth structure",
                dataset_type=f"{DATASET}{group.calibration.name}",
                dataset_name=f"delta-suite calibration {group.calibration.name}",
                dataset_revision=group.calibration.sha256,
                metric_type=f"{row.hypothesis}/{row.expectation}",
                metric_name=row.claim,
                metric_value=row.observed,
                metric_config=f"metric set {group.metrics}",
                metric_args=arguments,
            )
        )
    return results


def section_text(board: Board, group: Group, entry: Entry, images: list[str]) -> str:
    """The Markdown section: what was measured, the verdicts, the plots."""
    measurement = entry.measurement
    provenance = measurement.provenance
    lines = ["| claim | stated | verdict | observed | 95% interval | required | margin |", "| --- " * 7 + "|"]
    for row in entry.rows:
        word = verdict_word(row)
        low, high = map(number, row.interval) if row.interval else (NONE, NONE)
        name = f"{row.hypothesis}/{row.expectation}"
        link = board.claim_link(row.where, "") if board.repository else None
        marks = (" °" if row.vacuous else "") + (" \\*" if row.flips else "")
        cells = [
            f"[{name}]({link})" if link else name,
            f"`{row.claim}`",
            f"{SYMBOLS[word]} {word}{marks}",
            number(row.observed),
            f"{low} to {high}" if row.interval else NONE,
            number(row.required),
            margin_text(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    published = board.repository is not None and entry.record.startswith("runs/")
    record = f"[{entry.record}]({board.record_link(entry.record, '')})" if published else f"`{entry.record}`"
    hypotheses = "\n".join(f"- {tally.hypothesis}: {tally_text(tally)}" for tally in entry.tallies)
    return "\n\n".join(
        [
            "## Depth structure, measured by delta-suite",
            f"{measurement.model.layers} layers, hidden size {measurement.model.hidden}; {group.title} "
            f"({measurement.calibration.tokens} tokens: {group.described.rstrip('.')}); {provenance.dtype} on "
            f"{provenance.device}, {entry.seconds:.1f} s, {memory_text(entry)}; measured {provenance.created}; weights "
            f"SHA-256 `{measurement.model.fingerprint[:12]}`; record {record}.",
            hypotheses,
            "\n".join(lines),
            LEGEND.replace("`*`", "\\*").replace("`°`", "°"),
            *(f"![{_alternative(name)}]({name})" for name in images),
        ]
    )


def _alternative(image: str) -> str:
    return {
        "delta-suite-cosines.svg": "Heatmap of |cos| between the top directions of all pairs of layers",
        "delta-suite-ranks.svg": "Effective rank, participation ratio and stable rank of each layer's update",
    }[image]


# --- plots -----------------------------------------------------------------------------------------------------


def figures(measurement: Measurement) -> dict[str, str]:
    """SVG by file name: the heatmap where the record has it, and the ranks. The same record gives the same bytes."""
    drawn = {}
    triangle = (measurement.cosines or {}).get(VARIANT)
    if triangle is not None:
        drawn["delta-suite-cosines.svg"] = _svg(lambda figure: _draw_cosines(figure, measurement, triangle), (6.0, 5.2))
    drawn["delta-suite-ranks.svg"] = _svg(lambda figure: _draw_ranks(figure, measurement), (7.0, 3.8))
    return drawn


def _svg(draw: Any, size: tuple[float, float]) -> str:
    """Drawn by matplotlib, which needs no browser. Ids come from the content and no date is written."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "delta-suite", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        draw(figure)
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})  # type: ignore[no-untyped-call]
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _draw_cosines(figure: Figure, measurement: Measurement, triangle: Any) -> None:
    axes = figure.add_subplot()
    matrix = [[float("nan") if x is None else x for x in row] for row in full_matrix(triangle)]
    axes.set_facecolor("#bbbbbb")  # a layer without a direction
    image = axes.imshow(matrix, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="|cos| of the top directions")
    for edge in phase_edges(measurement):
        for line in (axes.axhline, axes.axvline):
            line(edge, color="black", linewidth=2)
            line(edge, color="white", linewidth=0.8)
    for edge in found_edges(measurement):
        for line in (axes.axhline, axes.axvline):
            line(edge, color=VERMILION, linewidth=1.5, linestyle="--")
    axes.set(xlabel="layer", ylabel="layer")
    _name_phases(axes, measurement)


def _draw_ranks(figure: Figure, measurement: Measurement) -> None:
    axes = figure.add_subplot()
    series = (("effective_rank", BLUE, "o-"), ("participation_ratio", ORANGE, "s--"), ("stable_rank", GREEN, "D:"))
    for metric, colour, style in series:
        own = estimates(measurement, VARIANT, metric)
        nan = float("nan")
        values = [nan if e.value is None else e.value for e in own]
        axes.plot(values, style, color=colour, markersize=4, label=metric.replace("_", " "))
        if any(e.interval for e in own):
            low, high = ([e.interval[end] if e.interval else nan for e in own] for end in (0, 1))
            axes.fill_between(range(len(own)), low, high, color=colour, alpha=0.25, linewidth=0)
    for index, (first, last) in enumerate(sorted(measurement.phases.values())):
        if index % 2 == 0:
            axes.axvspan(first - 0.5, last + 0.5, color="#808080", alpha=0.15, linewidth=0)
    for edge in found_edges(measurement):
        axes.axvline(edge, color=VERMILION, linewidth=1.5, linestyle="--")
    axes.set(xlabel="layer", ylabel="directions", yscale="log")
    _name_phases(axes, measurement)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)


def _name_phases(axes: Axes, measurement: Measurement) -> None:
    for name, (first, last) in measurement.phases.items():
        axes.text((first + last) / 2, 1.01, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom")
