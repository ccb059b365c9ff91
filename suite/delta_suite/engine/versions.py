"""The versions that must be the same wherever the models of a sweep are measured."""

from __future__ import annotations

import platform
from collections.abc import Mapping

from delta_suite.provenance import keyed_versions
from delta_suite.version import __version__


def versions() -> dict[str, str]:
    """Return the versions that must be the same wherever the models of a sweep are measured."""
    return {"delta-suite": __version__, "python": ".".join(platform.python_version_tuple()[:2])} | keyed_versions()


def version_problem(here: Mapping[str, str], there: Mapping[str, str]) -> str | None:
    """Return how versions differ from those here, or None.

    Example:
        >>> version_problem({"torch": "2.13.0"}, {"torch": "2.11.0"})
        'torch 2.11.0 (here 2.13.0)'
    """
    unequal = [f"{name} {there[name]} (here {version})" for name, version in here.items() if there[name] != version]
    return ", ".join(unequal) or None
