"""Every figure of a record as a row of plain values, for data frames and other programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from delta_suite.metrics.estimate import Estimate
from delta_suite.records.view import RecordView
from delta_suite.reduction.variants import VARIANTS, WRITE_VARIANTS

NO_VARIANT = ""
"""Stands for the variant of the metrics that are differences of losses: they have none."""

Figure = dict[str, str | int | float | None]
"""One row: a value for each of COLUMNS, None where there is none."""

COLUMNS: dict[str, type] = {
    "record": str,
    "measured": str,
    "model": str,
    "source": str,
    "revision": str,
    "calibration": str,
    "scope": str,
    "layer": int,
    "phase": str,
    "metric": str,
    "variant": str,
    "write": str,
    "value": float,
    "corrected": float,
    "low": float,
    "high": float,
    "reason": str,
}
"""The columns of the rows, in order, with the types of their values.

`record` is the file, `measured` its time (UTC). `scope` is what `Measurement.value` takes: `layer:3`, a phase or
`model`. `layer` is absent for figures of phases and of the model, `phase` for those of the model. `write` is
`attention` or `mlp` where one of them was measured, absent for the whole update of a block. `low` and `high` bound the
interval, whose centre is `corrected`, the value less its estimated bias. `reason` says why there is no value.
"""


def figures(view: RecordView, path: Path | None = None) -> Iterator[Figure]:
    """Yield a row for each figure of a record: layer by layer, then phase by phase, then of the whole model.

    Rows are as the record holds them: metrics of the law stand once, under `sink_free`, and so do the averages over
    tokens of `centred`. A variant that means something else today than when it was measured has no values, and the
    reason.

    path: the file of the record.
    """
    record = view.record
    origin: Figure = dict.fromkeys(COLUMNS) | {
        "record": None if path is None else path.as_posix().encode("utf-8", "backslashreplace").decode(),
        "measured": record.provenance.created,
        "model": record.model.name,
        "source": record.model.source,
        "revision": record.model.revision,
        "calibration": record.calibration.name,
    }
    places: list[tuple[Figure, Mapping[str, Mapping[str, Estimate]]]] = [
        ({"scope": f"layer:{layer.layer}", "layer": layer.layer, "phase": layer.phase}, layer.metrics)
        for layer in record.layers
    ]
    places += [({"scope": name, "phase": name}, scope.metrics) for name, scope in record.scopes.items()]
    places += [({"scope": "model"}, {variant: boundary.metrics}) for variant, boundary in record.boundaries.items()]
    if record.damage is not None:
        phases = [layer.phase for layer in record.layers]
        places += [
            ({"scope": f"layer:{layer}", "layer": layer, "phase": phases[layer]}, {NO_VARIANT: metrics})
            for layer, metrics in enumerate(record.damage.layers)
        ]
    if record.causes is not None:
        places += [({"scope": name, "phase": name}, {NO_VARIANT: each}) for name, each in record.causes.metrics.items()]
    problems = {variant: view.variant_problem(variant) for variant in record.variants} | {NO_VARIANT: None}
    for place, by_variant in places:
        for variant, metrics in by_variant.items():
            for metric, estimate in metrics.items():
                row = origin | place | {"metric": metric, "variant": variant or None}
                if variant in WRITE_VARIANTS:
                    row |= {"variant": VARIANTS[variant].rows, "write": VARIANTS[variant].write}
                if problem := problems[variant]:
                    yield row | {"reason": problem}
                    continue
                low, high = estimate.interval or (None, None)
                yield row | {
                    "value": estimate.value,
                    "corrected": estimate.corrected,
                    "low": low,
                    "high": high,
                    "reason": estimate.reason,
                }
