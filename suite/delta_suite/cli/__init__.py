"""The shell's front door: `delta-suite`."""

from __future__ import annotations

from importlib import import_module

from delta_suite.cli.common import app

__all__ = ["app"]

for _module in ("measuring", "judging", "verifying", "publishing", "joining", "information", "sharing", "proving"):
    import_module(f"delta_suite.cli.{_module}")
