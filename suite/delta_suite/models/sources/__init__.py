"""The places that model weights come from: one file of this folder for each source, behind the table `SOURCES`.

A new source is one new file with a subclass of `Source` and one entry in `SOURCES`; if models.toml gets a new key for
it, that key is also a field of `ModelSpec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from delta_suite.models.files import ModelFiles
from delta_suite.models.sources.base import Source
from delta_suite.models.sources.directory import Directory
from delta_suite.models.sources.gguf import GgufFile
from delta_suite.models.sources.hub import Hub
from delta_suite.models.sources.package import Package

if TYPE_CHECKING:
    from delta_suite.models.spec import ModelSpec

SOURCES: tuple[Source, ...] = (Hub(), Directory(), GgufFile(), Package())
"""Every source."""

_KEYS = tuple(dict.fromkeys(source.key for source in SOURCES))


def source_of(spec: ModelSpec) -> Source:
    """Return the source that the weights of `spec` come from."""
    (source,) = (source for source in SOURCES if source.provides(spec))
    return source


def locate(spec: ModelSpec, *, download: bool = True) -> ModelFiles:
    """Return the files of a model: in its package, its directory, or the Hugging Face cache.

    download: fetch files of a hub model that the cache lacks.

    Raises:
        ModelUnavailableError: files are missing or damaged; the message names which, and the cure.
    """
    return source_of(spec).locate(spec, download=download)


def availability(spec: ModelSpec) -> tuple[bool, str]:
    """Return whether the model can be loaded here without a network, and where it is, or the problem and its cure."""
    return source_of(spec).availability(spec)


def entry_problems(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what is wrong with the place that an entry of models.toml names, each with the key it is about.

    The key is "" for a problem of the entry as a whole.

    Example:
        >>> entry_problems({"dtype": "auto"})
        [('', 'names no source: a model has exactly one of hub, path and package')]
    """
    named = [key for key in _KEYS if entry.get(key) is not None]
    problems = []
    if len(named) != 1:
        names = f"names {' and '.join(named)}" if named else "names no source"
        *first, last = _KEYS
        problems.append(("", f"{names}: a model has exactly one of {', '.join(first)} and {last}"))
    sources = [source for source in SOURCES if source.key in named]
    problems += [problem for source in sources for problem in source.entry_problems(entry)]
    if entry.get("parts") is not None and Package.key not in named:
        problems.append(("parts", "`parts` is for models in Python packages, and this one is not"))
    if sources and not any(source.has_revisions for source in sources):
        problems += [
            (key, f"`{key}` is for models of the hub, and this one is not")
            for key in ("revision", "checkpoints")
            if entry.get(key)
        ]
    return problems
