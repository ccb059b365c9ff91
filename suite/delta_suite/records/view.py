"""A record under a phase map: everything that is computed from a record and its arrays. It changes neither."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from delta_suite.errors import RecordError
from delta_suite.metrics import drift, nulls
from delta_suite.metrics.boundaries import boundaries_under
from delta_suite.metrics.causal import cause_estimates, damage_estimates
from delta_suite.metrics.direction_gram import DirectionGram
from delta_suite.metrics.directions import PRODUCTS_NEEDED
from delta_suite.metrics.drift import EdgeContrast, SmoothDrifts
from delta_suite.metrics.estimate import Estimate, absent
from delta_suite.metrics.estimators import one_thread, phase_metric
from delta_suite.metrics.law import CEILING_FROM, closure_ceiling
from delta_suite.metrics.registry import METRICS, OF_WRITES
from delta_suite.metrics.state import OF_VARIANT
from delta_suite.models.phases import PhaseMap
from delta_suite.models.spec import MEMORY, RANDOM_WEIGHTS, control_source
from delta_suite.records import assemble
from delta_suite.records.arrays import KINDS, ArrayFile, Arrays, full_gram, stored_gram
from delta_suite.records.losses_part import stored_causes, stored_damage
from delta_suite.records.record import BoundaryRecord, LayerRecord, ModelRecord, Record
from delta_suite.reduction.variants import VARIANTS, WRITE_VARIANTS

_OLDER = "the record is older than the metric {}"


OF_DAMAGE = frozenset(name for name, metric in METRICS.items() if metric.takes == "damage")
"""Metrics of single layers that stand apart from the others in a record."""


class RecordView:
    """Answers for any layers, phases and variants of a record, with replicates where its arrays are at hand.

    record: the data. arrays: what lies beside it; None where it is gone. directions: what the cache has of its
    directions, for figures of subspaces over layers that are no phase of the record.
    """

    def __init__(self, record: Record, arrays: ArrayFile | None = None, directions: ArrayFile | None = None) -> None:
        self.record, self.arrays, self.directions = record, arrays, directions
        self._grams: dict[str, DirectionGram] = {}
        self._full_grams: dict[str, DirectionGram] = {}
        self._drifts: dict[tuple[str, str, int, int], SmoothDrifts | str] = {}
        self._boundaries: dict[str, BoundaryRecord] = dict(record.boundaries)
        if record.resampling.groups > 1 and arrays is not None and arrays.available:
            # Recorded before boundaries had replicates: these are formed anew, and with them the intervals.
            self._boundaries = {name: each for name, each in record.boundaries.items() if each.replicates is not None}
        self._formed: dict[tuple[str, str, int, int], Estimate] = {}
        self._formed_causes: dict[str, dict[str, Estimate]] | None = None
        self._formed_damage: list[dict[str, Estimate]] | None = None

    @property
    def model(self) -> ModelRecord:
        """Which model was measured."""
        return self.record.model

    @property
    def phases(self) -> PhaseMap:
        """The phase map, name -> first and last layer, both included."""
        return self.record.phases

    @property
    def layers(self) -> Sequence[LayerRecord]:
        """The layers as recorded."""
        return self.record.layers

    @cached_property
    def variants(self) -> tuple[str, ...]:
        """The variants of whole blocks that mean what they mean today; an older record may hold others."""
        return tuple(
            name for name in self.record.variants if name not in WRITE_VARIANTS and self.variant_problem(name) is None
        )

    def variant_problem(self, variant: str) -> str | None:
        """Return why the record has no figures for this variant, or None if it has."""
        if variant not in self.record.variants:
            if "." not in variant:
                return f"variant {variant} was not measured"
            if variant not in WRITE_VARIANTS:
                return f"what attention and MLP write is measured without sinks: in {', '.join(WRITE_VARIANTS)}"
            if self.record.not_apart is not None:
                return f"attention and MLP are not measured apart: {self.record.not_apart}"
            return f"what attention and MLP write was not measured: {self.measure_again('writes')}"
        version = self.record.variants[variant]
        if variant in VARIANTS and VARIANTS[variant].version == version:
            return None
        return f"variant {variant} was measured in version {version}, and means something else today: measure it again"

    def under(self, phases: PhaseMap, **model: str | None) -> RecordView:
        """Return a view of the same measurement under another phase map, and with other `model` fields.

        model: `name`, `source`, `revision`. Raises RecordError where the phases need arrays that are gone.
        """
        record = self.record
        if model:
            record = record.model_copy(update={"model": record.model.model_copy(update=model)})
        if dict(phases) == dict(record.phases):
            return RecordView(record, self.arrays, self.directions)
        with one_thread():
            record, scope_arrays = assemble.under(record, self.best_gram, phases)
        arrays = self.arrays
        if arrays is not None:
            kept = {
                name: array
                for name, array in arrays.content.items()
                if ".scope_" not in name and ".random." not in name
            }
            arrays = ArrayFile(arrays.path, content=kept | scope_arrays)
        return RecordView(record.model_copy(update={"arrays": None}), arrays, self.directions)

    def measure_again(self, part: str = "") -> str:
        """Return the command that measures the model again, with a part where one is named.

        A model in a folder is named by its path, as its name alone would not find it; but not by a whole one, which is
        of one machine, and would be published with the reason that it stands in.
        """
        model = self.model
        kind, _, place = model.source.removeprefix(control_source("")).partition(":")
        if kind == MEMORY:
            return f"measure(model, tokenizer=tokenizer{f', parts={part!r}' if part else ''})"
        name = model.name
        if kind == "directory" and not Path(place).is_absolute():
            name = place if model.source.startswith(kind) else f"{place}@{RANDOM_WEIGHTS}"
        return shlex.join(["delta-suite", "measure", name, *(["--parts", part] if part else [])])

    # --- arrays

    def content(self) -> Arrays:
        """Return the arrays beside the record. Raises RecordError, which names the file, where they are gone."""
        if self.arrays is None:
            reference = self.record.arrays
            missing = "its arrays" if reference is None else f"its arrays, {reference.file}"
            raise RecordError(
                f"{missing}, are not beside the record of {self.model.name}: copy them there, "
                f"or measure it again: {self.measure_again()}"
            )
        return self.arrays.content

    def _array(self, name: str) -> np.ndarray | None:
        """Return an array beside the record, or None where it has none of that name."""
        return self._content_or_none().get(name)

    def gram(self, variant: str) -> DirectionGram:
        """Return the cosines and overlaps between layers. Raises RecordError where the arrays are gone."""
        if variant not in self._grams:
            gram = stored_gram(self.content(), variant, self.model.layers, self.model.hidden)
            if gram is None:
                raise RecordError(
                    f"the record of {self.model.name} holds no cosines of {variant}: "
                    f"measure it again: {self.measure_again()}"
                )
            self._grams[variant] = gram
        return self._grams[variant]

    def full_gram(self, variant: str) -> DirectionGram:
        """Return the gram with inner products of all directions. Raises RecordError where the cache has lost them."""
        if variant not in self._full_grams:
            if self.directions is None or not self.directions.available:
                raise RecordError(
                    f"the directions of {self.model.name} are not in the cache any more, so only the phases in its "
                    f"record can be judged. Measure it again: {self.measure_again()}"
                )
            self._full_grams[variant] = full_gram(self.directions.content, variant)
        return self._full_grams[variant]

    def best_gram(self, variant: str) -> DirectionGram:
        """Return the gram with inner products of all directions where the cache has them, else without."""
        try:
            return self.full_gram(variant)
        except RecordError:
            return self.gram(variant)

    # --- figures

    def layer(self, layer: int, metric: str, variant: str, *, replicates: bool = True) -> Estimate:
        """Return a layer or pair metric of one layer, with its replicates.

        replicates: false where value and interval are enough, which saves most of the time.
        """
        if metric in OF_DAMAGE:
            return self._damage(layer, metric)
        if problem := self.variant_problem(variant):
            return absent(problem)
        if VARIANTS[variant].write != "block" and METRICS[metric].takes not in OF_WRITES:
            return absent(f"{metric} is not measured of what attention and MLP write")
        stored = self._stored_variant(metric, variant)
        estimate = self.layers[layer].metrics[stored].get(metric)
        if estimate is None and METRICS[metric].part not in self.record.parts:
            return absent(f"the states of the stream were not measured: {self.measure_again(METRICS[metric].part)}")
        if estimate is None:
            return absent(_OLDER.format(metric))
        if not replicates:
            return estimate
        by_kind = {kind: self._array(f"{stored}.{kind}.{metric}") for kind in KINDS}
        return _with_replicates(estimate, {kind: rows[:, layer] for kind, rows in by_kind.items() if rows is not None})

    def over(self, layers: Sequence[int], metric: str, variant: str, *, replicates: bool = True) -> Estimate:
        """Return a pair, phase, model or law metric over a contiguous set of layers, with its replicates.

        replicates: false where value and interval are enough, which saves most of the time.
        """
        definition, ends = METRICS[metric], (layers[0], layers[-1])
        if definition.takes == "law":
            return self._law(ends, metric)
        if definition.takes == "causes":
            return self._causes(ends, metric)
        if problem := self.variant_problem(variant):
            return absent(problem)
        if VARIANTS[variant].write != "block" and definition.takes not in OF_WRITES:
            return absent(f"{metric} is not measured of what attention and MLP write")
        if definition.takes == "boundaries":
            return self._boundary_metric(metric, variant)
        for index, scope in enumerate(self.record.scopes.values()):
            if scope.layers == ends and metric in scope.metrics.get(variant, {}):
                estimate = scope.metrics[variant][metric]
                return self._scope_estimate(estimate, index, layers, metric, variant) if replicates else estimate
        return self._computed(layers, metric, variant)

    def _stored_variant(self, metric: str, variant: str) -> str:
        """Return the variant under which a metric is recorded: averages over tokens depend on the rows alone.

        Of the states, some figures are about sinks or about the rows without them, whichever variant is asked for.
        """
        takes = METRICS[metric].takes if metric in METRICS else ""  # a baseline may have one that is gone
        if takes == "stream" and metric not in OF_VARIANT[variant]:
            return "sink_free" if metric in OF_VARIANT["sink_free"] else "raw"
        centred = VARIANTS[variant].centre and takes == "tokens"
        return "sink_free" if centred and metric not in self.layers[0].metrics[variant] else variant

    def _scope_estimate(
        self, estimate: Estimate, index: int, layers: Sequence[int], metric: str, variant: str
    ) -> Estimate:
        """Return a recorded figure of a phase with its replicates, stored or formed from the stored cosines."""
        if estimate.interval is None:
            return estimate
        by_kind = {kind: self._array(f"{variant}.scope_{kind}.{metric}") for kind in KINDS}
        if by_kind["units"] is not None:
            return _with_replicates(estimate, {kind: rows[index] for kind, rows in by_kind.items() if rows is not None})
        computed = self._computed(layers, metric, variant)
        replicates = {name: getattr(computed, name) for name in ("replicates", "replicates_documents")}
        return estimate.model_copy(update=replicates)

    def _computed(self, layers: Sequence[int], metric: str, variant: str) -> Estimate:
        """Return a figure formed from the arrays, or the reason why they do not suffice; once, as many claims ask."""
        key = (metric, variant, layers[0], layers[-1])
        if key not in self._formed:
            self._formed[key] = self._form(layers, metric, variant)
        return self._formed[key]

    def _form(self, layers: Sequence[int], metric: str, variant: str) -> Estimate:
        try:
            with one_thread():
                estimate = phase_metric(self.gram(variant), layers, METRICS[metric])
                if estimate.value is None and self.directions is not None and self.directions.available:
                    estimate = phase_metric(self.full_gram(variant), layers, METRICS[metric])
        except RecordError as error:
            return absent(str(error))
        if estimate.reason == PRODUCTS_NEEDED:
            return absent(
                f"{PRODUCTS_NEEDED}: these layers are no phase of the record, and the cache entry is gone. "
                f"Measure it again: {self.measure_again()}"
            )
        return estimate

    def _law(self, ends: tuple[int, int], metric: str) -> Estimate:
        """Return a metric of the law over these layers, where they are a phase that it was fitted over."""
        command = self.measure_again("law")
        if self.record.law is None:
            return absent(f"the update law was not measured: {command}")
        rows = list(self.record.law.phases.values())
        for scope in self.record.scopes.values():
            estimate = scope.metrics.get(assemble.LAW_VARIANT, {}).get(metric)
            if scope.layers == ends and ends in rows and estimate is not None:
                units = self._array(f"law.units.{metric}")
                return estimate if units is None else _with_replicates(estimate, {"units": units[rows.index(ends)]})
        return absent(f"the update law was fitted under another phase map, not over these layers: {command}")

    def _causes(self, ends: tuple[int, int], metric: str) -> Estimate:
        """Return a metric of causes over these layers, where they are a phase that it was measured in."""
        command, causes = self.measure_again("causal"), self.record.causes
        if causes is None:
            return absent(f"the causes of the loss were not measured: {command}")
        if causes.reason is not None and not causes.phases:
            return absent(f"causes were not measured: {causes.reason}")
        phase = next((name for name, layers in causes.phases.items() if layers == ends), None)
        if phase is None:
            listed = ", ".join(f"{name} ({first} to {last})" for name, (first, last) in causes.phases.items())
            return absent(f"causes were measured in the phases {listed} alone: {command}")
        if METRICS[metric].name not in causes.metrics[phase]:
            return absent(_OLDER.format(metric))
        if self._formed_causes is None:
            stored = stored_causes(self.record, self._content_or_none())
            formed = {} if stored is None else {name: cause_estimates(stored, name) for name in stored.phases}
            self._formed_causes = formed
        return _as_recorded(causes.metrics[phase][metric], self._formed_causes.get(phase, {}).get(metric))

    def _damage(self, layer: int, metric: str) -> Estimate:
        """Return a metric of the damage from a block's absence."""
        damage = self.record.damage
        if damage is None:
            return absent(f"the damage from leaving blocks out was not measured: {self.measure_again('damage')}")
        if metric not in damage.layers[layer]:
            return absent(_OLDER.format(metric))
        if self._formed_damage is None:
            stored = stored_damage(self.record, self._content_or_none())
            self._formed_damage = [] if stored is None else damage_estimates(stored, self.model.layers)
        formed = self._formed_damage[layer].get(metric) if self._formed_damage else None
        return _as_recorded(damage.layers[layer][metric], formed)

    def _content_or_none(self) -> Arrays:
        """Return the arrays beside the record, none where they are gone."""
        try:
            return self.content()
        except RecordError:
            return {}

    def closure_ceiling(self, ends: tuple[int, int] | None) -> float | None:
        """Return the most that one direction, with any function f, could close over these layers: see metrics/law."""
        for scope in self.record.scopes.values():
            metrics = scope.metrics.get(assemble.LAW_VARIANT, {})
            if scope.layers == ends and all(name in metrics for name in CEILING_FROM):
                return closure_ceiling(*(metrics[name] for name in CEILING_FROM))
        return None

    def _boundary_metric(self, metric: str, variant: str) -> Estimate:
        """Return a metric of the boundaries with its replicates."""
        boundaries = self.boundaries(variant)
        estimate = boundaries.metrics.get(metric)
        if estimate is None:
            return absent(_OLDER.format(metric))
        without = (boundaries.replicates or {}).get(metric)
        return estimate if without is None else estimate.model_copy(update={"replicates": without})

    def boundaries(self, variant: str) -> BoundaryRecord:
        """Return the boundaries as recorded, or formed from the arrays; their metrics say why where neither is."""
        if variant not in self._boundaries:
            try:
                with one_thread():
                    boundaries = boundaries_under(self.gram(variant), self.phases)
            except RecordError as error:
                if variant in self.record.boundaries:  # of schema 2, which kept no cosines to form them anew
                    return self.record.boundaries[variant]
                boundaries = str(error)
            self._boundaries[variant] = assemble.boundary_record(boundaries)
        return self._boundaries[variant]

    def lag_matched(self, layers: range, metric: str, variant: str) -> Estimate:
        """Return the metric over pairs outside these layers, at their distances: see `nulls.lag_matched`."""
        key = (f"{metric}, lag-matched", variant, layers[0], layers[-1])
        if key not in self._formed:
            try:
                self._formed[key] = nulls.lag_matched(self.gram(variant), metric, layers)
            except RecordError as error:
                self._formed[key] = absent(str(error))
        return self._formed[key]

    def edge_contrast(self, layers: range, metric: str, variant: str, quantile: float) -> EdgeContrast | str:
        """Return a phase beside smooth drifts fitted to the other layers, or why there are none: see metrics/drift."""
        try:
            gram = self.gram(variant)
        except RecordError as error:
            return str(error)
        key = (metric, variant, layers[0], layers[-1])
        if key not in self._drifts:
            with one_thread():
                self._drifts[key] = drift.against_drifts(gram, metric, layers)
        drifts = self._drifts[key]
        return drifts if isinstance(drifts, str) else drift.edge_bounds(gram, metric, layers, drifts, quantile)

    def random_directions(self, layers: range, metric: str, variant: str) -> Sequence[float] | str:
        """Return the metric with v_L drawn at random, or why there is none: see `nulls.random_directions`."""
        drawn = self._array(f"{variant}.random.{metric}")
        spans = [scope.layers for scope in self.record.scopes.values()]
        if drawn is not None and (layers[0], layers[-1]) in spans:
            values = drawn[spans.index((layers[0], layers[-1]))]
            if not np.isnan(values).any():
                return [float(value) for value in values]
        try:
            return nulls.random_directions(self.best_gram(variant), metric, layers)
        except RecordError as error:
            return str(error)

    # --- for plots

    def cosines(self, variant: str) -> np.ndarray | None:
        """Return |v_L . v_M|, (layers, layers), NaN for a layer without a direction; None without arrays."""
        try:
            gram = self.gram(variant)
        except RecordError:
            return None
        cosines = np.minimum(np.abs(gram.cosines), 1.0)
        missing = gram.without_direction(range(gram.layers))
        cosines[missing, :] = cosines[:, missing] = np.nan
        return np.asarray(cosines)

    def energies(self, variant: str) -> np.ndarray | None:
        """Return p_i = sigma_i^2 / sum sigma^2 of every layer, (layers, rank); None without arrays."""
        eigenvalues = self._array(f"{variant}.eigenvalues")
        if eigenvalues is None:
            return None
        values = eigenvalues.astype(np.float64)
        totals = values.sum(axis=1, keepdims=True)
        return np.asarray(values / np.where(totals > 0, totals, 1.0))

    def transfer(self) -> np.ndarray | None:
        """Return R^2 on layer L (row) of layer M's map, NaN where a layer does not vary; None where not measured."""
        return self._array("law.transfer")


def _as_recorded(estimate: Estimate, formed: Estimate | None) -> Estimate:
    """Return a recorded estimate with the replicates of the same one formed from the arrays, where these are there."""
    names = ("replicates", "replicates_documents")
    if formed is None:
        return estimate
    return estimate.model_copy(update={name: getattr(formed, name) for name in names})


def _with_replicates(estimate: Estimate, by_kind: Arrays) -> Estimate:
    """Return the estimate with its replicates of each kind, if all of them exist."""
    update = {
        "replicates" if kind == "units" else "replicates_documents": tuple(float(value) for value in rows)
        for kind, rows in by_kind.items()
        if estimate.value is not None and not np.isnan(rows).any()
    }
    return estimate.model_copy(update=update)
