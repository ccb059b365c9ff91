"""The options that the plugin adds to runs that are about hypotheses."""

from __future__ import annotations

from typing import Any

import pytest

from delta_suite.command_line import DEFAULT_CALIBRATION, DEFAULT_DEVICE, DEFAULT_RESULTS, DTYPES, HELP

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
    "--chat-template": {"action": "store_true", "help": HELP["chat-template"]},
    "--device": {"default": DEFAULT_DEVICE, "help": f"{HELP['device']} (default: {DEFAULT_DEVICE})"},
    "--dtype": {"choices": list(DTYPES), "help": HELP["dtype"]},
    "--results-dir": {
        "default": DEFAULT_RESULTS,
        "metavar": "PATH",
        "help": f"{HELP['results-dir']} (default: {DEFAULT_RESULTS})",
    },
    "--variant": {
        "metavar": "NAME",
        "help": "judge every claim under this variant, and show it (default: as each claim says; tables show raw)",
    },
    "--no-control": {
        "action": "store_true",
        "help": "do not measure the same architecture with random weights (then no claim is marked vacuous)",
    },
    "--fresh": {"action": "store_true", "help": HELP["fresh"]},
    "--shard": {"metavar": "I/N", "help": f"{HELP['shard']}; controls are items of the list"},
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
"""Every option with its settings for argparse."""

NOT_EMPTY = ("--model", "--models-file", "--calibration", "--device", "--results-dir", "--shard", "--baseline")
"""Options that take any word, but no empty one."""


def takes_value(name: str) -> bool:
    """Return True if an option needs a value, which may be the next word of the command line.

    Example:
        >>> takes_value("--model"), takes_value("--fresh"), takes_value("--baseline")
        (True, False, False)
    """
    settings = OPTIONS[name]
    return settings.get("action") != "store_true" and settings.get("nargs") != "?"


def add_options(parser: pytest.Parser) -> None:
    """Add every option to pytest's command line.

    Raises:
        ValueError: an option is taken already (before pytest 9, the parser raises argparse.ArgumentError later).
    """
    group = parser.getgroup("delta-suite", "depth structure of language models")
    for name, settings in OPTIONS.items():
        group.addoption(name, **settings)
