"""Pages that are generated: from the package, and from files that are kept outside docs/.

A page holds a line `{{ name }}` where the text of a function of GENERATED belongs.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from delta_suite.api import Measurement

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
    "stream": "the states of the stream (part `stream`)",
    "law": "the fitted update law (part `law`)",
    "boundaries": "the search for boundaries (part `boundaries`)",
    "causes": "losses with the updates of a phase changed (part `causal`)",
    "damage": "losses with blocks left out or exchanged (part `damage`)",
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
            low, high = _bound(metric.low), _bound(metric.high)
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
    from delta_suite.reduction.variants import BLOCK_VARIANTS

    rows = "\n".join(
        f"| `{variant.name}` | {variant.description} | {variant.version} |" for variant in BLOCK_VARIANTS.values()
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


def _example() -> Measurement:
    """Return the newest published measurement of the embedded model on `core`, of which the pages show tables."""
    from delta_suite.api import load

    records = sorted((ROOT / "results/runs/smollm2-135m-q4").glob("*.json"), reverse=True)
    measurements = (load(record) for record in records)
    for measurement in measurements:
        if measurement.view.record.calibration.name == "core":
            return measurement
    raise PluginError("results/runs has no record of smollm2-135m-q4 on core, of which docs/verdicts.md shows tables")


def example_phases() -> str:
    """Return the table of phases of the embedded model, below the line about it, which is broken at semicolons."""
    line, table = repr(_example()).split("\n", 1)
    return "```text\n" + line.replace("; ", ";\n  ") + f"\n{table}\n```"


def example_verdicts() -> str:
    """Return the verdicts of the embedded model on the claims about phase E."""
    return f"```text\n{_example().judge(ROOT / 'hypotheses/phase_e.toml')!r}\n```"


def example_failure() -> str:
    """Return the explanation of a refuted claim, or of the first claim where none is refuted."""
    from delta_suite.claims.verdict import Verdict
    from delta_suite.publish.explanation import explanation

    measurement = _example()
    judged = measurement.judge(ROOT / "hypotheses/phase_e.toml")
    shown = next((one for one in judged if one.judgement.verdict is Verdict.REFUTED), judged[0])
    place = shown.where.replace(f"{ROOT}/", "")
    return f"```text\n{explanation(shown, place, 'pytest hypotheses/phase_e.toml --model=smollm2-135m-q4')}\n```"


def notebook() -> str:
    """Return the notebook: its texts, its code, and what the code shows as text or picture."""
    cells = json.loads((ROOT / "examples/tour.ipynb").read_text("utf-8"))["cells"]
    sections = []
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            sections.append(re.sub(r"^# .*\n+", "", text))
            continue
        sections.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            shown = "".join(output.get("text") or output["data"].get("text/plain", "(an interactive plot)"))
            sections.append(f"```text\n{shown.rstrip()}\n```")
    return "\n\n".join(sections)


def scripts() -> str:
    """Return the scripts of examples/, each under its name, with what its docstring says."""
    sections = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text("utf-8")
        about, code = ast.get_docstring(ast.parse(source)) or "", source.split('"""', 2)[2].strip()
        title = path.stem.replace("_", " ").capitalize().replace("lora", "LoRA")
        sections.append(f"## {title}\n\n`examples/{path.name}`\n\n{about}")
        sections.append(f'??? note "The script"\n    ```python\n{indent(code, "    ")}\n    ```')
    return "\n\n".join(sections)


def cluster_files() -> str:
    """Return the files of examples/clusters/, each under its path."""
    sections = []
    for name, language in (
        ("slurm_array.sh", "bash"),
        ("kubernetes_job.yaml", "yaml"),
        ("submitit_sweep.py", "python"),
    ):
        source = (ROOT / "examples" / "clusters" / name).read_text("utf-8")
        sections.append(f"`examples/clusters/{name}`:\n\n```{language}\n{source}```")
    return "\n\n".join(sections)


GENERATED: Mapping[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        metrics,
        variants,
        commands,
        exit_codes,
        pytest_options,
        python_api,
        checkpoint_workflow,
        notebook,
        scripts,
        cluster_files,
        example_phases,
        example_verdicts,
        example_failure,
    )
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
