"""Shapes are checked at run time in the tests: every annotated function of the core, by jaxtyping and beartype."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook(
    [
        "delta_suite.reduction",
        "delta_suite.metrics",
        *(f"delta_suite.capture.{name}" for name in ("residual", "stream", "sinks", "tap", "forward", "intervene")),
    ],
    "beartype.beartype",
)
pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache, asks a hub, or tells a CI of the failures that it makes."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DELTA_SUITE_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return cache


@pytest.fixture(scope="session")
def embedded_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the embedded model, which all workers of a run share: what one measures, the others read."""
    root = tmp_path_factory.getbasetemp()
    return (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "embedded-cache"


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Called with a size: a longer file cannot be written to its end, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory: 12 layers, hidden 48."""
    from tests.tiny import make_tiny

    return make_tiny(tmp_path_factory.mktemp("models") / "tiny")


def pytest_configure() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
