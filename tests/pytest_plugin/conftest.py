"""A tiny model measured once; the plugin's tests then work from the cache unless they say otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Settings, measure
from delta_suite.records.cache import Cache

from tests.tiny import DOCUMENTS

CLAIMS = """
schema = 1
id = "claims"
title = "Claims on a tiny model"
version = 1
rationale = "exercises every outcome"
tags = ["tiny-claims"]

[[expect]]
id = "holds"
metric = "top1_energy"
scope = "C"
op = ">="
threshold = 0.0
origin = "always true"

[[expect]]
id = "fails"
metric = "top1_energy"
scope = "C"
op = "<="
threshold = 0.001
origin = "never true"

[[expect]]
id = "no-such-phase"
metric = "intra_cosine"
scope = "B"
op = ">="
threshold = 0.5
origin = "a phase that 12 layers are too few for"
"""


@pytest.fixture(scope="session")
def measured(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the tiny model's measurement."""
    root = tmp_path_factory.mktemp("measured")
    spec = ModelSpec(name="tiny", path=tiny)
    measure(spec, Settings(documents=DOCUMENTS, results=root / "results", device="cpu", cache=Cache(root)))
    return root


@pytest.fixture
def project(pytester: pytest.Pytester, tiny: Path, measured: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A user's project: hypotheses/claims.toml, and models.toml that names the tiny model twice."""
    monkeypatch.setenv("DELTA_SUITE_CACHE", str(measured))
    monkeypatch.setenv("COLUMNS", "250")  # so that what a test looks for stands on one line
    (pytester.path / "hypotheses").mkdir()
    (pytester.path / "hypotheses" / "claims.toml").write_text(CLAIMS)
    (pytester.path / "models.toml").write_text(
        f"[models.tiny]\npath = {str(tiny)!r}\n[models.twin]\npath = {str(tiny)!r}\n"
    )
    return pytester


@pytest.fixture
def hypothesis_file(project: pytest.Pytester) -> Callable[[str], None]:
    """Replace the project's hypothesis file."""
    return lambda text: (project.path / "hypotheses" / "claims.toml").write_text(text) and None
