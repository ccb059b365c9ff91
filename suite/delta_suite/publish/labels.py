"""Labels for models of one name: source, revision and fingerprint say which models are the same."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from delta_suite.records.record import Identity, ModelRecord


def labels_of(models: Iterable[ModelRecord]) -> dict[tuple[str, Identity], str]:
    """Return what each model is called: its name, and in brackets what tells it from others of that name."""
    by_name: dict[str, dict[Identity, None]] = {}
    for model in models:
        by_name.setdefault(model.name, {})[model.identity] = None
    labels = {}
    for name, identities in by_name.items():
        shown = [(shown_source(source), revision[:12], weights[:8]) for source, revision, weights in identities]
        if len(set(shown)) < len(shown):
            shown = list(identities)
        differing = [column for column in range(3) if len({parts[column] for parts in shown}) > 1]
        for identity, parts in zip(identities, shown, strict=True):
            told = ", ".join(parts[column] for column in differing if parts[column])
            labels[name, identity] = f"{name} ({told})" if told else name
    return labels


def shown_source(source: str) -> str:
    """Return the origin of the weights; of a directory only its name, as its path exists on one machine alone.

    Example:
        >>> shown_source("directory:/scratch/run/step-5"), shown_source("hub:org/name")
        ('directory:step-5', 'hub:org/name')
    """
    kind, _, place = source.partition(":")
    return f"{kind}:{Path(place).name}" if Path(place).is_absolute() else source
