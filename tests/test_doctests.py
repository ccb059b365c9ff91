"""The examples in the docstrings of the package run, and show what they say."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import delta_suite
import pytest

PACKAGE = Path(delta_suite.__file__).parent

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text("utf-8")
)
"""Modules with examples."""


@pytest.mark.parametrize("name", MODULES)
def test_examples_show_what_they_say(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    failed, attempted = doctest.testmod(import_module(name))
    assert attempted
    assert not failed, capsys.readouterr().out
