"""Hypothesis files in a temporary folder, and a record whose truth is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from delta_suite.records.view import RecordView

from tests.planted_records import PHASES, planted_view, without_arrays


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """Return a function that writes x.toml and returns its path."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "x.toml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture(scope="session")
def view() -> RecordView:
    """Return a record with its arrays: C shares a direction, the layers of A and E have one each. A is as long as C."""
    phases = {"A": (0, 4), **PHASES}
    return planted_view(phases=phases, variants=("raw", "sink_free"), parts=("spectra", "boundaries"))


@pytest.fixture(scope="session")
def bare(view: RecordView) -> RecordView:
    """Return the same record as its JSON alone gives it."""
    return without_arrays(view)
