"""Every metric of the suite by name. Each kind has a file of its own; a new metric is one function in one of them.

No torch here: metrics read numpy arrays that the reduction has computed, so that a stored record can be judged again,
under any phase map, without a model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from importlib import import_module

from delta_suite.command_line import PARTS
from delta_suite.errors import OptionError
from delta_suite.metrics.definition import DEFINED, Metric

KINDS = ("layer", "directions", "state", "law", "boundaries", "causal")
"""The modules that define metrics, in the order of the reference table."""

for _kind in KINDS:
    import_module(f"delta_suite.metrics.{_kind}")

METRICS: Mapping[str, Metric] = DEFINED
"""Every metric by name."""

OF_LOSSES = frozenset({"causes", "damage"})
"""Sources of the metrics that are differences of the loss. They stand apart in a record."""

WITHOUT_VARIANTS = OF_LOSSES | {"law"}
"""Sources of the metrics that are the same whatever variant is asked for."""

OF_WRITES = frozenset({"spectrum", "directions"})
"""Sources of the metrics that exist of attention and MLP apart."""


def metric_versions() -> dict[str, int]:
    """Return the version of every metric: what a cache entry or a baseline must agree on to be comparable."""
    return {name: metric.version for name, metric in METRICS.items()}


def parts_of(metrics: Collection[str]) -> frozenset[str]:
    """Return the parts of a measurement that these metrics need; spectra are always measured.

    Example:
        >>> sorted(parts_of(["intra_cosine", "sharing_index"]))
        ['law', 'spectra']
    """
    return frozenset({"spectra", *(METRICS[name].part for name in metrics)})


def chosen_parts(given: str | Iterable[str]) -> frozenset[str]:
    """Return the parts that are named, one by one or in a text with commas; spectra are always measured.

    Raises OptionError for a part that does not exist.

    Example:
        >>> sorted(chosen_parts("law")), chosen_parts("all") == chosen_parts(PARTS)
        (['law', 'spectra'], True)
    """
    if not isinstance(given, Iterable):
        raise OptionError(f"--parts: {given!r} names no parts; use one or more of {', '.join(PARTS)}, or all")
    names = [name.strip() for name in given.split(",")] if isinstance(given, str) else list(given)
    if names == ["all"]:
        return frozenset(PARTS)
    for name in names:
        if name not in PARTS:
            raise OptionError(f"--parts: there is no part {name!r}; use one or more of {', '.join(PARTS)}, or all")
    return frozenset({"spectra", *names})
