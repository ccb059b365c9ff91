"""The model that a record was measured of, found again from the source that the record names."""

from __future__ import annotations

from pathlib import Path

from delta_suite.errors import UnknownModelError
from delta_suite.models.models_file import Registry
from delta_suite.models.sources.gguf import SUFFIX
from delta_suite.models.sources.hub import HUB_ID
from delta_suite.models.spec import MEMORY, RANDOM_WEIGHTS, ModelSpec, control_source
from delta_suite.paths import path_error, shorten

NAME_IT = "name the model or the place of its files with --model"
"""The way out where a source names nothing that is here."""


def recorded_model(registry: Registry, source: str, revision: str | None) -> ModelSpec:
    """Return the model at a source as records write it: an entry of the models file, or what the source itself names.

    Raises UnknownModelError for a module in memory, a directory that is not on this machine, a control of an
    earlier version, and what is no source.

    Example:
        >>> from types import MappingProxyType
        >>> recorded_model(Registry(specs=MappingProxyType({}), path=None), "hub:acme/tiny", "step8").revision
        'step8'
    """
    kind, _, place = source.removeprefix(control_source("")).partition(":")
    source_of_weights = f"{kind}:{place}"
    entry = next((spec for spec in registry.specs.values() if spec.source == source_of_weights), None)
    spec = entry or _named(registry, kind, place, source_of_weights)
    if spec.hub is not None and revision is not None:
        spec = spec.model_copy(update={"revision": revision})
    return spec.control() if source != source_of_weights else spec


def _named(registry: Registry, kind: str, place: str, source: str) -> ModelSpec:
    owner, _, rest = place.partition("/")
    if kind == "directory" and path_error(Path(place)) is None:
        return registry.resolve(place)
    if kind == "hub":
        name, _, file = rest.partition("/") if place.endswith(SUFFIX) else (rest, "", "")
        if HUB_ID.fullmatch(f"{owner}/{name}"):
            return ModelSpec(name=f"{owner}--{name}", hub=f"{owner}/{name}", gguf=file or None)
    if kind == "package" and owner.replace("_", "a").isalnum() and rest.endswith(SUFFIX) and Path(rest).name == rest:
        return ModelSpec(name=owner, package=owner, gguf=rest)
    if kind.startswith(RANDOM_WEIGHTS):
        raise UnknownModelError("an earlier version drew its random weights in another way: measure its control anew.")
    why = {
        MEMORY: "it was a module in memory",
        "directory": f"its directory {shorten(place)} is not on this machine",
    }.get(kind, f"its source {shorten(ascii(source))} is none that can be found")
    raise UnknownModelError(f"{why}: {NAME_IT}.")
