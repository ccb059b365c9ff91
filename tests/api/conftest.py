"""Fixtures of the Python interface."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import make_tiny


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory: 6 layers, hidden 16."""
    return make_tiny(tmp_path_factory.mktemp("models") / "small", layers=6, hidden=16)
