"""Entry point of the plugin: it joins runs that are about hypotheses, and adds nothing to any other."""

from __future__ import annotations

import argparse
import inspect
import re
import shlex
from collections.abc import Generator
from pathlib import Path

import pytest

from delta_suite.pytest_plugin.options import OPTIONS, add_options
from delta_suite.pytest_plugin.scope import (
    INI_OPTION,
    about_hypotheses,
    collected_paths,
    holds_hypotheses,
    split_options,
    without_hypotheses,
)

MODULES = ("guarded_output", "session", "collection", "fixture", "failures", "reports", "scheduling")
"""Modules whose hooks and fixtures are registered in a run that is about hypotheses."""

_DECLARED_TWICE = ("already added", "already used", "conflicting option string")
"""Phrases with which pytest and argparse report an option that is declared twice, in one release or another."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Generator[None, None, None]:
    """Add options and hooks before conftests are loaded, and explain afterwards what does not fit together."""
    active = about_hypotheses(early_config, parser, args)
    try:
        if active:
            _refuse_processes()
            add_options(parser)
            for name in MODULES:
                early_config.pluginmanager.import_plugin(f"delta_suite.pytest_plugin.{name}")
        yield
        if active:
            parser.parse_known_args(args)  # pytest 8 sees only here that an option is declared twice
    except (ValueError, argparse.ArgumentError) as error:
        if active and (conflict := _conflict(str(error), early_config.pluginmanager)):
            raise pytest.UsageError(conflict) from None
        raise
    if not active:
        _refuse_options(early_config, parser, args)


def _refuse_processes() -> None:
    """Raise UsageError where torchrun started several processes, in each of which every claim would be judged."""
    from delta_suite.errors import OptionError
    from delta_suite.process_group import refuse_processes, wait_for_first
    from delta_suite.pytest_plugin.printing import usage_error

    try:
        refuse_processes("pytest")
    except OptionError as error:
        wait_for_first()
        raise usage_error(error) from None


def _conflict(error: str, plugins: pytest.PytestPluginManager) -> str | None:
    """Return the message for an option of delta-suite that a conftest or another plugin declares as well."""
    option = next((name for name in re.findall(r"--[a-z-]+", error) if name in OPTIONS), None)
    if option is None or not any(phrase in error for phrase in _DECLARED_TWICE):
        return None
    declaration = re.compile(rf"['\"]{option}['\"]")
    files = sorted(
        str(plugin.__file__)
        for plugin in plugins.get_plugins()
        if inspect.ismodule(plugin) and hasattr(plugin, "pytest_addoption") and declaration.search(_source(plugin))
    )
    return (
        f"{option} is an option of delta-suite, and of {files[0] if files else 'another plugin'}: rename that one, "
        "or name no hypothesis files in the runs that need it"
    )


def _source(module: object) -> str:
    try:
        return inspect.getsource(module)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return ""


def _refuse_options(config: pytest.Config, parser: pytest.Parser, words: list[str]) -> None:
    """Raise UsageError with the cure if the command line has options of delta-suite that nothing else declares."""
    options, _ = split_options(words)
    if not options:
        return
    unknown = {word.partition("=")[0] for word in parser.parse_known_and_unknown_args(words)[1]}
    options = [option for option in options if option[0].partition("=")[0] in unknown]
    if not options:
        return
    names = list(dict.fromkeys(option[0].partition("=")[0] for option in options))
    folder = "." if holds_hypotheses(Path()) else "hypotheses/"
    example = shlex.join(["pytest", folder, *(word for option in options for word in option)])
    reasons = [without_hypotheses(path) for path in collected_paths(config, parser, words)]
    from delta_suite.pytest_plugin.printing import usage_error

    raise usage_error(
        f"{', '.join(names)} {'is an option' if len(names) == 1 else 'are options'} of delta-suite, which runs where "
        f"hypothesis files are named: {example}; or set {INI_OPTION} = true in the pytest settings"
        f"{f' ({reasons[0]})' if reasons else ''}"
    )
