"""Tell whether a pytest run is about hypotheses: only then does the plugin add options, hooks and a fixture to it.

Decided from the command line before any conftest is loaded, and without importing anything heavy, as the entry point is
imported in every pytest run of the environment.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from delta_suite.paths import bundled, path_error

INI_OPTION = "delta_suite"
"""`delta_suite = true` in the project's pytest settings turns the plugin on for every run."""

PACKAGE_ARGUMENT = "delta_suite.hypotheses"
"""The name that `pytest --pyargs` has for the claims that ship with delta-suite."""

FOLDER = "hypotheses"
"""Any .toml file in a folder of this name is taken for a hypothesis file, even one that is damaged."""

LONGEST_LOOK = 1 << 16
"""Bytes of a file that are read to see whether it is a hypothesis file."""

_MARKS = {
    ".toml": re.compile(rb"^\s*\[\[\s*expect\s*\]\]", re.MULTILINE),
    ".json": re.compile(rb"\"tolerances\"\s*:.*\"history\"\s*:", re.DOTALL),
}
"""Patterns that tell a hypothesis file and a baseline near their beginning, by suffix."""


def about_hypotheses(config: Any, arguments: list[str]) -> bool:
    """Return True if a run with these arguments is about hypotheses.

    `delta_suite.hypotheses` among the arguments is replaced by its path, in place.
    """
    for index, argument in enumerate(arguments):
        if argument == PACKAGE_ARGUMENT:
            arguments[index] = str(bundled("hypotheses"))
    if _turned_on(config.inicfg.get(INI_OPTION)):
        return True
    named = [Path(argument.split("::")[0]) for argument in arguments if not argument.startswith("-")]
    paths = [path for path in named if path_error(path) is None]
    if not paths:  # pytest then takes the testpaths of its settings
        paths = [config.rootpath / path for path in config.getini("testpaths")]
    return any(holds_hypotheses(path) for path in paths)


def _turned_on(setting: Any) -> bool:
    value = getattr(setting, "value", setting)
    return str(value).strip().lower() in {"true", "1", "yes", "on"}


def holds_hypotheses(path: Path) -> bool:
    """Return True for a hypothesis file or a baseline, and for a folder that holds a hypothesis file directly."""
    if path_error(path) is not None:
        return False
    return any(is_hypothesis_file(file) for file in sorted(path.glob("*.toml"))) if path.is_dir() else _looks_like(path)


def is_hypothesis_file(path: Path) -> bool:
    """Return True if a .toml file makes claims, or lies in a folder called hypotheses."""
    return path.suffix == ".toml" and (path.parent.name == FOLDER or _looks_like(path))


def _looks_like(path: Path) -> bool:
    """Return True if a regular file is a hypothesis file or a baseline by what stands near its beginning."""
    if path.suffix not in _MARKS:
        return False
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            return _MARKS[path.suffix].search(file.read(LONGEST_LOOK)) is not None
    except OSError:
        return False


def unknown_options(unknown: Iterable[str], options: Sequence[str]) -> list[str]:
    """Return the options of the plugin among the arguments that no plugin or conftest knows.

    Example:
        >>> unknown_options(["--model=x", "--other"], ["--model"])
        ['--model']
    """
    names = (argument.partition("=")[0] for argument in unknown if argument.startswith("--"))
    return list(dict.fromkeys(name for name in names if name in options))
