"""Scheduling under pytest-xdist: the items of one model go to one worker."""

from __future__ import annotations

from typing import Any

import pytest

from delta_suite.pytest_plugin.session import SESSION, STARTED, WIDTH


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker when the run started, for --fresh, and how wide its terminal is."""
    session = node.config.stash[SESSION]
    node.workerinput |= {STARTED: session.started, WIDTH: session.width}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return a scheduler that keeps the items of a model together, unless the user chose one with --dist."""
    names = sorted((spec.name for spec in config.stash[SESSION].specs), key=len, reverse=True)
    if not names or config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByModel(LoadScopeScheduling):  # type: ignore[misc]
        """Scheduler with one scope per model; `--dist loadgroup` stops grouping on pytest 9.2."""

        def _split_scope(self, nodeid: str) -> str:
            bracket = nodeid.rpartition("::")[2].partition("[")[2]  # a folder's name may have one, too
            return next((name for name in names if name in bracket), nodeid.split("::", maxsplit=1)[0])

    return ByModel(config, log)
