"""Pages that are generated: from the package, and from files that are kept outside docs/.

A page holds a line `{{ name }}` where the text of a function of GENERATED belongs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

COPIED = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "reports/architectures.md": "tests/conformance/TABLE.md",
    "reports/crash.md": "tests/crash/TABLE.md",
    "reports/benchmarks.md": "results/benchmarks.md",
    "reports/datasheet.md": "suite/delta_suite/capture/data/DATASHEET.md",
    "reports/selftest.md": "results/selftest.md",
}
"""Pages whose text is that of another file."""

COPIED_FILES = {"leaderboard.png": "results/leaderboard.png"}

SCOPES = {
    "layer": "Of one layer",
    "pair": "Of two layers",
    "phase": "Of a phase",
    "model": "Of the whole model",
}
"""Headings of the metrics page, by scope."""

TAKES = {
    "tokens": "averages over tokens",
    "spectrum": "the singular values of a layer",
    "directions": "the leading directions of layers",
    "law": "the fitted update law (part `law`)",
    "boundaries": "the search for boundaries (part `boundaries`)",
}
"""How a metric's source is called, by `Metric.takes`."""

EXTERNAL = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//", re.IGNORECASE)
"""An element that makes a browser ask another server."""


def _bound(bound: float) -> str:
    return f"{bound:g}" if abs(bound) != float("inf") else "unbounded"


def metrics() -> str:
    """Return every metric with its formula, by scope."""
    from delta_suite.metrics.registry import METRICS

    sections = []
    for scope, heading in SCOPES.items():
        sections.append(f"## {heading}")
        for metric in METRICS.values():
            if metric.scope != scope:
                continue
            low, high = (
                f"{bound:g}" if abs(bound) != float("inf") else "unbounded" for bound in (metric.low, metric.high)
            )
            formula = " ".join(metric.formula.split())
            sections.append(f"### {metric.name}\n\n```text\n{formula}\n```")
            facts = {
                "Unit": metric.unit,
                "Range": f"{low} to {high}",
                "Computed from": TAKES[metric.takes],
                "Source": " ".join(metric.source.split()),
                "Version": str(metric.version),
            }
            sections.append("\n".join(f"- {name}: {fact}" for name, fact in facts.items() if fact))
    return "\n\n".join(sections)


def variants() -> str:
    """Return the table of variants."""
    from delta_suite.reduction.variants import VARIANTS

    rows = "\n".join(
        f"| `{variant.name}` | {variant.description} | {variant.version} |" for variant in VARIANTS.values()
    )
    return f"| variant | rows | version |\n| --- | --- | --- |\n{rows}"


def commands() -> str:
    """Return what `--help` shows for each command."""
    from delta_suite.cli import app
    from typer.testing import CliRunner

    sections = []
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        shown = CliRunner().invoke(app, [name, "--help"], prog_name="delta-suite", env={"COLUMNS": "100"})
        if shown.exit_code:
            raise PluginError(f"delta-suite {name} --help: {shown.output}")
        sections.append(f"### delta-suite {name}\n\n```text\n{shown.output.strip()}\n```")
    return "\n\n".join(sections)


def exit_codes() -> str:
    """Return the table of exit codes, of the commands and of pytest."""
    from delta_suite.command_line import EXIT_CODES, ExitCode

    of_pytest = {ExitCode.USAGE: "4", ExitCode.INTERRUPTED: "2"}
    rows = [f"| {code} | {of_pytest.get(code, str(int(code)))} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    rows.append("| - | 5 | no claim was selected |")
    return "| `delta-suite` | pytest | meaning |\n| --- | --- | --- |\n" + "\n".join(rows)


def pytest_options() -> str:
    """Return the table of options that the plugin adds to pytest."""
    from delta_suite.pytest_plugin.options import OPTIONS

    rows = []
    for name, settings in OPTIONS.items():
        value = settings.get("metavar") or "|".join(settings.get("choices", ()))
        shown = f"{name}={value}" if value and settings.get("nargs") != "?" else f"{name}[={value}]" if value else name
        meaning = re.sub(r"([\[\]|])", r"\\\1", str(settings["help"]))  # neither links nor cells
        rows.append(f"| `{shown.replace('|', chr(92) + '|')}` | {meaning} |")
    return "| option | meaning |\n| --- | --- |\n" + "\n".join(rows)


def python_api() -> str:
    """Return a directive of mkdocstrings for each public name of the package."""
    import delta_suite

    names = [name for name in delta_suite.__all__ if not name.startswith("__")]
    names.sort(key=lambda name: (name.endswith("Error"), name[0].isupper()))  # functions, classes, errors
    homes = {name: getattr(delta_suite, name).__module__ for name in names}
    return "\n\n".join(f"::: {homes[name]}.{name}" for name in names)


def checkpoint_workflow() -> str:
    """Return the workflow for checkpoints as a block of code."""
    from delta_suite.sharing.starting import WORKFLOW, starter_files

    return f"```yaml\n{starter_files()[WORKFLOW].decode()}```"


GENERATED: Mapping[str, Callable[[], str]] = {
    function.__name__: function
    for function in (metrics, variants, commands, exit_codes, pytest_options, python_api, checkpoint_workflow)
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that are kept elsewhere."""
    for page, source in COPIED.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for name, source in COPIED_FILES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put generated text in the place of `{{ name }}`. Raises KeyError for a name that nothing generates."""
    return re.sub(r"^\{\{ (\w+) \}\}$", lambda match: GENERATED[match[1]](), markdown, flags=re.MULTILINE)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would ask another server for anything."""
    if match := EXTERNAL.search(output):
        raise PluginError(f"{page.file.src_uri} asks another server: {match[0]}")
    return output
