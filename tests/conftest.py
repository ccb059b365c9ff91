"""What all tests share: a checkpoint, its measurement, and shapes that are checked at run time.

jaxtyping and beartype check every annotated function of the core at each call, in the tests of the rooms that state
shapes and in those that measure each part from start to end. The other tests leave the checks out: a measurement of a
tiny model takes twice as long with them.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING

import pytest
from delta_suite import pytest_plugin
from filelock import FileLock

from tests import shapes
from tests.tiny import DOCUMENTS, make_tiny

if TYPE_CHECKING:
    from delta_suite.pipeline import Outcome, Settings
    from delta_suite.records.cache import Cache

CHECKED = (
    *("capture", "metrics", "reduction", "test_parity.py"),
    *(f"records/test_{name}.py" for name in ("causal_parts", "stream_part", "writes")),
)
"""Folders and files in which shapes are checked."""

shapes.install()
# As a run about hypotheses does, which warns of those that were imported before it.
pytest.register_assert_rewrite(
    *(
        module.name
        for module in iter_modules(pytest_plugin.__path__, f"{pytest_plugin.__name__}.")
        if module.name not in sys.modules
    )
)
pytest_plugins = ["pytester"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest file first, and leave out tests marked `long`, unless markers or single tests are named."""
    # At the end one worker would wait for the other, or take a test of it and make again what its tests share.
    items.sort(key=lambda item: item.path.name != "test_workflow.py")
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache, asks a hub, or tells a CI of the failures that it makes."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DELTA_SUITE_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return cache


@pytest.fixture
def pytester(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """As pytest has it, but its runs are without the plugin of hypothesis, as ours are: see pyproject.toml."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest")
    return pytester


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of a run share."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session")
def embedded_cache(shared: Path) -> Path:
    """The cache of the embedded model: what one worker measures, the others read."""
    return shared / "embedded-cache"


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Called with a size: a longer file cannot be written to its end, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def tiny(shared: Path) -> Path:
    """A checkpoint directory: 12 layers, hidden 48."""
    directory = shared / "tiny"
    with FileLock(shared / "tiny.lock"):
        return directory if (directory / "model.safetensors").exists() else make_tiny(directory)


@pytest.fixture(scope="session")
def small(shared: Path) -> Path:
    """A checkpoint directory for tests that measure anew and in which any model will do: 4 layers, hidden 32."""
    directory = shared / "small"
    with FileLock(shared / "small.lock"):
        if not (directory / "model.safetensors").exists():
            make_tiny(directory, layers=4, hidden=32)
    return directory


@pytest.fixture(scope="session")
def trained_checkpoints(shared: Path) -> Path:
    """A folder with checkpoint-20 and checkpoint-30: six layers that were trained on a little text, a few steps."""
    from tests.training import passages, train

    folder = shared / "trained"
    with FileLock(shared / "trained.lock"):
        if not (folder / "checkpoint-30" / "loss.json").exists():
            train(folder, steps=[20, 30], texts=passages()[:200])
    return folder


@pytest.fixture(scope="session")
def outcome(tiny: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Settings]:
    """The tiny model's measurement, which one worker makes and the others read, and its settings.

    A test that changes the cache works on a copy.
    """
    from delta_suite.models.spec import ModelSpec
    from delta_suite.pipeline import Settings, measure
    from delta_suite.records.cache import Cache

    results = tmp_path_factory.mktemp("measured") / "results"
    settings = Settings(documents=DOCUMENTS, results=results, device="cpu", cache=Cache(shared / "measured"))
    return measure(ModelSpec(name="tiny", path=tiny), settings), settings


@pytest.fixture
def copied_cache(outcome: tuple[Outcome, Settings], tmp_path: Path) -> Cache:
    """A cache that holds the tiny model's measurement alone, and that a test may change."""
    from delta_suite.records.cache import Cache

    key, cache = outcome[0].view.record.provenance.cache_key, Cache(tmp_path / "copied-cache")
    entry = outcome[1].cache.get(key)
    assert entry is not None
    cache.put(key, entry)
    return cache


def pytest_configure() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    """Check shapes in the tests that CHECKED names, but for those that do the same some hundred times."""
    tests = Path(__file__).parent
    checked = any(item.path.is_relative_to(tests / name) for name in CHECKED) and not item.get_closest_marker("repeats")
    shapes.switch(on=checked)
