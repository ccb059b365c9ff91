"""The options that the plugin adds to runs that are about hypotheses."""

from __future__ import annotations

from typing import Any

import pytest

from delta_suite.command_line import DTYPES, HELP

DEFAULT_CALIBRATION = "core"

OPTIONS: dict[str, dict[str, Any]] = {
    "--model": {
        "action": "append",
        "default": [],
        "metavar": "NAME",
        "help": f"model to measure: {HELP['model']} (repeatable)",
    },
    "--all-models": {"action": "store_true", "help": "every model of models.toml whose weights are on this machine"},
    "--models-file": {"metavar": "PATH", "help": HELP["models-file"]},
    "--calibration": {
        "default": DEFAULT_CALIBRATION,
        "metavar": "NAME|PATH",
        "help": f"{HELP['calibration']} (default: {DEFAULT_CALIBRATION})",
    },
    "--documents": {"type": int, "metavar": "N", "help": HELP["documents"]},
    "--device": {"default": "auto", "help": f"{HELP['device']} (default: auto)"},
    "--dtype": {"choices": list(DTYPES), "help": HELP["dtype"]},
    "--results-dir": {"default": "results", "metavar": "PATH", "help": f"{HELP['results-dir']} (default: results)"},
    "--variant": {
        "metavar": "NAME",
        "help": "judge every claim under this variant, and show it (default: as each claim says; tables show raw)",
    },
    "--no-control": {
        "action": "store_true",
        "help": "do not measure the same architecture with random weights (then no claim is marked vacuous)",
    },
    "--fresh": {"action": "store_true", "help": HELP["fresh"]},
    "--strict-verdicts": {"action": "store_true", "help": "inconclusive and not measured fail, too"},
    "--baseline": {
        "nargs": "?",
        "const": "",
        "metavar": "PATH",
        "help": "compare with a baseline: a .json file, or the folder with <model>.json (default: <results>/baselines)",
    },
    "--baseline-update": {
        "nargs": "?",
        "const": "new",
        "choices": ["new", "all"],
        "help": "write what the baseline lacks; =all overwrites it, and needs --baseline-reason",
    },
    "--baseline-reason": {"default": "", "metavar": "TEXT", "help": "why a baseline is overwritten; kept in it"},
    "--baseline-other-documents": {
        "action": "store_true",
        "help": "the baseline's calibration is another sample of the same source: compare unpaired",
    },
}
"""Every option with what argparse needs of it."""

WORDS = ("--model", "--models-file", "--calibration", "--device", "--results-dir", "--baseline")
"""Options that take any word, but no empty one."""


def add_options(parser: pytest.Parser) -> None:
    """Add every option to pytest's command line. Raises ValueError where one is taken already."""
    group = parser.getgroup("delta-suite", "depth structure of language models")
    for name, settings in OPTIONS.items():
        group.addoption(name, **settings)
