"""Commands that tell what there is: models, hypotheses, metrics, schema, doctor."""

from __future__ import annotations

import json
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

import delta_suite
from delta_suite.cli.common import ModelsFile, app, default_hypotheses, fail
from delta_suite.cli.output import show
from delta_suite.errors import SuiteError, explain
from delta_suite.escaping import terminal


@app.command(epilog="Example: delta-suite models")
def models(models_file: ModelsFile = None) -> None:
    """List the models that are known, which of them are on this machine, and why the others are not."""
    from delta_suite.models.models_file import load_registry
    from delta_suite.models.sources import availability
    from delta_suite.publish.screen import columns, prose
    from delta_suite.publish.table import Table

    registry = load_registry(models_file)
    lines = []
    for name, spec in registry.specs.items():
        here, why = availability(spec)
        lines.append([name, "yes" if here else "no", spec.source, spec.licence or "", spec.dtype, why])
    show(Table.of(["model", "here", "source", "licence", "dtype", "note"], lines, drop={"dtype": 8}))
    where = f"{len(lines)} models in {registry.path}." if registry.path else "There is no models file."
    show()
    show(prose(f"{where} A directory or a hub id (org/name) can be given to --model, too.", columns()))
    show(prose("What is not downloaded is when it is measured, or before by `hf download ORG/NAME`.", columns()))


@app.command(epilog="Example: delta-suite hypotheses claims/ --check")
def hypotheses(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATHS]...", help="Files or folders (default: ./hypotheses, else those of delta-suite)."
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only validate; show one line.")] = False,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME", help="Also say which claims the depth of this model cannot decide."),
    ] = None,
    models_file: ModelsFile = None,
) -> None:
    """List claims with their thresholds and where these come from, without a model. Exits with 1 where a file is wrong.

    Every error of every file is shown with its line. A phase that no model of models.toml has is an error, too.
    """
    from delta_suite.claims.loader import load_hypotheses, require_known_phases
    from delta_suite.models.models_file import load_registry
    from delta_suite.publish.claim_list import claim_list

    claims = load_hypotheses(paths or [default_hypotheses()])
    registry = load_registry(models_file)
    require_known_phases(claims, registry.phases)
    if not check:
        show(f"{claim_list(claims)}\n")
    counts = ((sum(len(hypothesis.expect) for hypothesis in claims), "claim"), (len(claims), "hypothesis file"))
    told = (f"{count} {what}{'' if count == 1 else 's'}" for count, what in counts)
    show(f"{' in '.join(told)}, without an error")
    if model:
        from delta_suite.claims.null_kinds import undecidable_lines

        named = [(f"{each.id}/{claim.id}", claim) for each in claims for claim in each.expect]
        for spec in (spec for argument in model for spec in registry.resolve_all(argument)):
            for line in undecidable_lines(spec, named):
                show(line)


@app.command(epilog="Example: delta-suite metrics")
def metrics(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """Show the reference table: every metric with formula, unit, range, scope, version and source."""
    from delta_suite.metrics.registry import METRICS
    from delta_suite.publish.model_tables import metric_table

    if not as_json:
        show(metric_table())
        return
    keys = ("name", "scope", "takes", "formula", "unit", "low", "high", "version", "source")
    listed = [{key: getattr(metric, key) for key in keys} for metric in METRICS.values()]
    for row in listed:
        row |= {key: None for key in ("low", "high") if abs(row[key]) == float("inf")}
    show(json.dumps(listed, indent=1, ensure_ascii=False, allow_nan=False))


@app.command(epilog="Example: delta-suite schema > hypotheses/hypothesis.schema.json")
def schema() -> None:
    """Show the JSON Schema of hypothesis files, for editors (`#:schema ./hypothesis.schema.json` in a file's head)."""
    from delta_suite.claims.json_schema import json_schema

    show(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@app.command(epilog="Example: delta-suite doctor")
def doctor(models_file: ModelsFile = None) -> None:
    """Show versions, devices, the Ray cluster that is here, cache, models, and what is missing."""
    from delta_suite.engine.ray_cluster import describe_cluster
    from delta_suite.models.device import describe_devices
    from delta_suite.models.models_file import load_registry
    from delta_suite.models.sources import availability
    from delta_suite.paths import cache_root
    from delta_suite.provenance import LIBRARIES, library_version
    from delta_suite.records.cache import RECORD

    lines = [("delta-suite", delta_suite.__version__), ("python", platform.python_version())]
    lines += [(name, library_version(name)) for name in (*LIBRARIES, "pytest", "pytest-xdist")]
    lines.append(("devices", describe_devices()))
    if find_spec("ray") is None:
        lines.append(("ray", "not installed"))
    else:
        lines.append(("ray", f"{library_version('ray')}: {describe_cluster()}"))
    try:
        root = cache_root()
        entries = list((root / "measurements").glob(f"*/{RECORD}"))
        size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) if root.exists() else 0
        lines.append(("cache", f"{root}: {len(entries)} measurements, {size / 1e6:.1f} MB"))
    except (OSError, SuiteError) as error:
        lines.append(("cache", f"cannot be used: {explain(error, 'looking at the cache')}"))
    try:
        registry = load_registry(models_file)
        here = [name for name, spec in registry.specs.items() if availability(spec)[0]]
        listed = f"{len(here)} of {len(registry.specs)} on this machine: {', '.join(here) or 'none'}"
        lines.append(("models", listed if registry.path else "there is no models file"))
    except SuiteError as error:
        lines.append(("models", f"no models file can be used: {error}"))
    for name, value in lines:
        show(f"{name:<18} {terminal(value)}")
    optional = {"pytest-xdist", "gguf", "ray"}
    missing = [name for name, value in lines if value == "not installed" and name not in optional]
    if missing:
        fail(f"not installed: {', '.join(missing)}. pip install {' '.join(missing)}")
