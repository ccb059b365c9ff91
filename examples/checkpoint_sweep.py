"""Measure the checkpoints of a training run, and plot a metric of each phase against the step.

    python examples/checkpoint_sweep.py 'runs/big/checkpoint-*' --metric intra_cosine --out sweep.html

`delta-suite trajectory` does more of this by itself. This is how to begin with a plot of your own.
"""

from __future__ import annotations

import argparse
import glob
import re
from collections.abc import Sequence
from pathlib import Path

import delta_suite as ds
import plotly.graph_objects as graph


def step_of(folder: str) -> int:
    """Return the last number in the name of a folder.

    >>> step_of("runs/big/checkpoint-400")
    400
    """
    numbers = re.findall(r"\d+", Path(folder).name)
    if not numbers:
        raise SystemExit(f"{folder}: no step in the name")
    return int(numbers[-1])


def figure(measured: dict[int, ds.Measurement], metric: str, variant: str) -> graph.Figure:
    """Return a line for each phase, with the intervals where there are some."""
    plot = graph.Figure()
    phases = [row["phase"] for row in next(iter(measured.values())).phases()]
    for phase in phases:
        found = {step: measurement.value(metric, phase, variant=variant) for step, measurement in measured.items()}
        points = {step: value for step, value in found.items() if value.value is not None}
        if not points:
            continue
        ends = [value.interval or (value.value, value.value) for value in points.values()]
        plot.add_scatter(
            name=phase,
            x=list(points),
            y=[value.value for value in points.values()],
            error_y={
                "type": "data",
                "array": [high - value.value for (_, high), value in zip(ends, points.values(), strict=True)],
                "arrayminus": [value.value - low for (low, _), value in zip(ends, points.values(), strict=True)],
            },
        )
    return plot.update_layout(title=f"{metric} ({variant})", xaxis_title="step", legend_title="phase")


def main(words: Sequence[str] | None = None) -> None:
    """Measure every checkpoint that the pattern names, and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", help="a pattern of folders, in quotes")
    parser.add_argument("--metric", default="intra_cosine", help="`delta-suite metrics` lists them")
    parser.add_argument("--variant", default="sink_free", help="raw, sink_free or centred")
    parser.add_argument("--calibration", default="core", help="as in delta-suite")
    parser.add_argument("--out", type=Path, default=Path("sweep.html"), help="the page to write")
    given = parser.parse_args(words)
    folders = sorted(glob.glob(given.pattern), key=step_of)  # noqa: PTH207 - the pattern may be an absolute path
    if not folders:
        parser.error(f"{given.pattern} names no folder")

    measured = {}
    for folder in folders:  # what was measured before comes from the cache
        measured[step_of(folder)] = ds.measure(folder, calibration=given.calibration, parts="spectra")
        print(f"step {step_of(folder)}: {folder}")
    figure(measured, given.metric, given.variant).write_html(given.out, include_plotlyjs=True)
    print(f"written: {given.out}")


if __name__ == "__main__":
    main()
