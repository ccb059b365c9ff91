"""A user's project; the tests work from the cache of the measured tiny model unless they say otherwise."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest
from delta_suite.pipeline import Outcome, Settings
from delta_suite.publish.screen import Screen, draw
from delta_suite.publish.table import Table

from tests import apart
from tests.tiny_claims import CLAIMS


@pytest.fixture(scope="session")
def measured(outcome: tuple[Outcome, Settings]) -> Path:
    """A cache that holds the tiny model's measurement."""
    return outcome[1].cache.root


@pytest.fixture(scope="session")
def loaded() -> None:
    """The modules that runs load: a run in this process forgets those that it loads itself, and the next pays again."""
    names = [*apart.IMPORTED, "delta_suite.dry_run", "delta_suite.models.models_file"]
    for name in ("claims", "pytest_plugin", "publish", "regression"):
        folder = import_module(f"delta_suite.{name}").__path__
        names += [module.name for module in iter_modules(folder, f"delta_suite.{name}.")]
    for name in names:
        import_module(name)
    draw(Table.of(["table"], [["drawn"]]), Screen())


@pytest.fixture
def project(
    pytester: pytest.Pytester, tiny: Path, measured: Path, loaded: None, monkeypatch: pytest.MonkeyPatch
) -> pytest.Pytester:
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
