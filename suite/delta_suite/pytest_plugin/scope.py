"""Decide from the command line if a pytest run is about hypotheses. To every other run the plugin adds nothing.

The decision falls before any conftest is loaded. The module imports nothing heavy, as the entry point is imported in
every pytest run of the environment.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pytest

from delta_suite.paths import bundled, hypothesis_files, is_directory, not_a_file, path_error, shorten
from delta_suite.pytest_plugin.options import OPTIONS, takes_value
from delta_suite.reading import TEXT_LIMIT, UnreadableFileError, open_regular

INI_OPTION = "delta_suite"
"""Name of the ini option: `delta_suite = true` turns the plugin on for every run of a project."""

PACKAGE_ARGUMENT = "delta_suite.hypotheses"
"""Name under which `pytest --pyargs` runs the claims that ship with delta-suite."""

LONGEST_LOOK = 1 << 16
"""Bytes of a file that are read to see if it is a hypothesis file."""

_SIGNS = {
    ".toml": (re.compile(rb"^\s*\[\[\s*expect\s*\]\]", re.MULTILINE),),
    ".json": (re.compile(rb'"tolerances"\s*:'), re.compile(rb'"history"\s*:')),
}
"""Patterns near the beginning of every hypothesis file (.toml) and every baseline (.json)."""

_INI_LINE = re.compile(rf"^\s*{INI_OPTION}\s*=".encode(), re.MULTILINE)


def about_hypotheses(config: pytest.Config, parser: pytest.Parser, words: list[str]) -> bool:
    """Return True if the run with this command line is about hypotheses.

    After `--pyargs`, the argument `delta_suite.hypotheses` is replaced in place by the path of the claims that ship.
    The ini option is declared if it is mentioned or the run is about hypotheses: pytest warns of an option that is
    mentioned and not declared, and lists every declared one in its help.
    """
    if parser.parse_known_args(words).pyargs:
        words[:] = [str(bundled("hypotheses")) if word == PACKAGE_ARGUMENT else word for word in words]
    by_path = any(holds_hypotheses(path) for path in collected_paths(config, parser, words))
    mentioned = _mentions_ini_option(config.inipath, words)
    if by_path or mentioned:
        parser.addini(INI_OPTION, "run the plugin of delta-suite in every run", type="bool", default=False)
    return by_path or (mentioned and _ini_option(config))


def _mentions_ini_option(settings: Path | None, words: Iterable[str]) -> bool:
    """Return True if the settings file or the command line, as in `-o delta_suite=true`, gives the ini option."""
    if any(f"{INI_OPTION}=" in word for word in words):
        return True
    return settings is not None and bool(_INI_LINE.search(_beginning(settings, TEXT_LIMIT)))


def _ini_option(config: pytest.Config) -> bool:
    try:
        return bool(config.getini(INI_OPTION))
    except (TypeError, ValueError, pytest.UsageError) as error:
        raise pytest.UsageError(f"the ini option {INI_OPTION} is true or false: {error}") from None


def split_options(words: Iterable[str]) -> tuple[list[list[str]], list[str]]:
    """Return the plugin's options of a command line, each with its value, and all other words.

    A word after `--baseline` or `--baseline-update`, which work without a value, stays among the others: it may be a
    path.

    Example:
        >>> split_options(["claims/", "--model", "a", "--model=b", "-v"])
        ([['--model', 'a'], ['--model=b']], ['claims/', '-v'])
    """
    options, others = [], []
    remaining = iter(words)
    for word in remaining:
        name, equals, _ = word.partition("=")
        if name not in OPTIONS:
            others.append(word)
        elif equals or not takes_value(name):
            options.append([word])
        else:
            options.append([word, *islice(remaining, 1)])
    return options, others


def collected_paths(config: pytest.Config, parser: pytest.Parser, words: Iterable[str]) -> list[Path]:
    """Return the paths that a command line names, else those of `testpaths`, found as pytest finds them.

    A run without any collects from the current folder, which does not count: hypothesis files in the top folder of a
    project run when they are named.
    """
    options, others = split_options(words)
    named = [word.split("::")[0] for word in parser.parse_known_args(others).file_or_dir]
    named += [option[0].partition("=")[2] for option in options if option[0].startswith("--baseline=")]
    if not named and config.invocation_params.dir == config.rootpath:
        for pattern in config.getini("testpaths"):
            named += sorted(glob.iglob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
    return [Path(path) for path in named]


def holds_hypotheses(path: Path) -> bool:
    """Return True for a hypothesis file, a folder that holds one directly, a test file beside one, and a baseline."""
    if is_directory(path):
        return any(_has_signs(file) for file in hypothesis_files(path))
    if path.suffix == ".py" and path_error(path) is None:
        return holds_hypotheses(path.parent)
    return _has_signs(path)


def _has_signs(path: Path) -> bool:
    """Return True if a regular file is a hypothesis file or a baseline by what stands near its beginning."""
    signs = _SIGNS.get(path.suffix, ())
    beginning = _beginning(path, LONGEST_LOOK) if signs else b""
    return bool(signs) and all(sign.search(beginning) for sign in signs)


def _beginning(path: Path, size: int) -> bytes:
    """Return the first bytes of a file, and none of one that cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(size)
    except UnreadableFileError:
        return b""


def without_hypotheses(path: Path) -> str:
    """Return why a path makes no run about hypotheses.

    Example:
        >>> without_hypotheses(Path("no/such/file.toml"))
        'no/such/file.toml: No such file or directory'
    """
    files = hypothesis_files(path) if is_directory(path) else [path]
    problems = (f"{shorten(file)}: {path_error(file) or problem}" for file in files if (problem := not_a_file(file)))
    return next(problems, f"{shorten(path)}: no [[expect]] there")
