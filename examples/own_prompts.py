"""Measure a model on your own prompts, and compare two kinds of them.

    python examples/own_prompts.py                                   # those of this file
    python examples/own_prompts.py --model ./checkpoint a.txt b.txt  # one prompt a line

A handful of prompts gives figures, and nothing to conclude from them. With 50 or more of a kind, each figure has its
95% interval beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import delta_suite as ds

PROMPTS = {
    "prose": [
        "She opened the old wooden box and found a letter that nobody had read for fifty years.",
        "The harbour was quiet in the morning, and the fishing boats came back one after the other.",
        "My grandmother used to say that a long journey begins with a good breakfast.",
    ],
    "code": [
        "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
        "SELECT name, age FROM users WHERE age > 30 ORDER BY name",
        "for (int i = 0; i < n; i++) { sum += values[i] * weights[i]; }",
    ],
}

METRICS = ("effective_rank", "intra_cosine")
ENOUGH = 50  # documents; the suite decides no claim on fewer


def shown(measured: ds.Measurement, metric: str, phase: str) -> str:
    """Return a number with its interval, where it has one, and `-` where there is no number."""
    number = measured.value(metric, phase, variant="sink_free")
    if number.value is None:
        return "-"
    if number.interval is None or measured.record.calibration.documents < ENOUGH:
        return f"{number.value:.3f}"
    low, high = number.interval
    return f"{number.value:.3f} [{low:.3f}, {high:.3f}]"


def main(words: Sequence[str] | None = None) -> None:
    """Print the mean effective rank and the shared direction of each phase, for each kind of prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="a file for each kind, with one prompt a line")
    parser.add_argument("--model", default="smollm2-135m-q4", help="a name, a folder or a hub id")
    given = parser.parse_args(words)
    kinds = {file.stem: file.read_text("utf-8").splitlines() for file in given.files} or PROMPTS

    for kind, prompts in kinds.items():
        # Each prompt is a document. Equal ones count once, and empty ones do not count.
        measured = ds.measure(given.model, texts=prompts, parts="spectra")
        print(f"\n{kind}: {len(prompts)} prompts")
        print(f"{'phase':8}{'effective rank':28}{'intra cosine':28}")
        for row in measured.phases():
            cells = [shown(measured, metric, row["phase"]) for metric in METRICS]
            print(f"{row['phase']:8}" + "".join(f"{cell:28}" for cell in cells).rstrip())


if __name__ == "__main__":
    main()
