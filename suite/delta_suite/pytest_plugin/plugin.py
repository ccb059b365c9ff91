"""The entry point of pytest: it decides whether a run is about hypotheses, and is silent where it is not."""

from __future__ import annotations

import re
from collections.abc import Generator
from types import TracebackType

import pytest

from delta_suite.pytest_plugin.options import OPTIONS, add_options
from delta_suite.pytest_plugin.scope import INI_OPTION, about_hypotheses, unknown_options

_TAKEN = ("already added", "already used", "conflicting option string")
"""The message of pytest and argparse about an option that is there twice, release by release."""

HOOKS = ("session", "collection", "fixture", "reports", "scheduling")
"""The modules whose hooks and fixtures are registered in a run that is about hypotheses."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Generator[None, None, None]:
    """Add options and hooks before conftests are loaded, and explain what does not fit together afterwards."""
    active = about_hypotheses(early_config, args)
    if active:
        parser.addini(INI_OPTION, "run the plugin of delta-suite in every run", type="bool", default=False)
        add_options(parser)
        for name in HOOKS:
            early_config.pluginmanager.import_plugin(f"delta_suite.pytest_plugin.{name}")
    try:
        yield
    except Exception as error:
        if active and (taken := _taken_option(error)) is not None:
            option, place = taken
            raise pytest.UsageError(
                f"{option} is an option of delta-suite and of {place}, too: rename that one, "
                f"or run its tests without hypothesis files"
            ) from None
        raise
    if not active:
        unknown = parser.parse_known_and_unknown_args(args)[1]
        if names := unknown_options(unknown, list(OPTIONS)):
            raise pytest.UsageError(
                f"{', '.join(names)}: an option of delta-suite, which runs where hypothesis files are named, such as "
                f"pytest hypotheses/ {names[0]}=...; or set {INI_OPTION} = true in the pytest settings"
            )


def _taken_option(error: BaseException) -> tuple[str, str] | None:
    """Return the option of ours that a conftest adds as well, and the conftest's path."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = getattr(current, "cause", None) or current.__cause__ or current.__context__
    for link in chain:
        text, place = str(link), _conftest(link.__traceback__)
        if place is not None and any(words in text for words in _TAKEN):
            option = next((name for name in re.findall(r"--[a-z-]+", text) if name in OPTIONS), None)
            if option is not None:
                return option, place
    return None


def _conftest(trace: TracebackType | None) -> str | None:
    """Return the innermost conftest.py of a traceback."""
    path = None
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        path = name if name.endswith("conftest.py") else path
        trace = trace.tb_next
    return path
