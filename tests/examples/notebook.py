"""Runs the notebook of examples/ as Jupyter does, and keeps its outputs small.

`python -m tests.examples.notebook` runs it and writes its outputs into the file: make notebook.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tour.ipynb"
PLOTLY = "application/vnd.plotly.v1+json"


def run(folder: Path) -> Any:
    """Return the notebook with new outputs, run in a folder. Raises CellExecutionError where a cell fails."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    for cell in notebook.cells:
        cell.metadata.clear()  # times of the run
        cell.outputs = [kept(output) for output in cell.get("outputs", []) if output.get("name") != "stderr"]
        if cell.cell_type != "code":
            del cell["outputs"]
    return notebook


def kept(output: Any) -> Any:
    """Return an output without plotly's library, which has some megabytes; Jupyter draws the figure from its data."""
    if PLOTLY in output.get("data", {}):
        output.data = {PLOTLY: output.data[PLOTLY]}
    return output


if __name__ == "__main__":
    nbformat.write(run(NOTEBOOK.parent), NOTEBOOK)
    sys.exit(0)
