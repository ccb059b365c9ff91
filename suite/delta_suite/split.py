"""Measure one calibration on several workers: each captures units of work, and their sums are added in a fixed order.

A measurement takes three kinds of tasks. The first one loads the model, cuts the calibration into units of work and
finds the median norms by which sinks are told. Then each unit is captured by whichever worker is free; what comes back
are sums, which the cache keeps until all are there. In the end the sums of each layer are added in the order of the
units, and its eigenproblems are solved. Nothing depends on which worker did what: the units follow from the
calibration, the batches of each from the lengths of its documents, and the order of every addition from both.

A unit is batched by itself, so that its states differ in the seventh digit from those of a measurement in one piece,
where documents of other units are in the batch. The law is fitted here from the same sums and two more. What attention
and MLP write, the states and causes are not measured in this way.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from delta_suite.capture.calibration import Calibration, load_calibrations
from delta_suite.capture.work_units import WorkUnit, work_units
from delta_suite.engine import dispatch, local
from delta_suite.errors import DeviceError
from delta_suite.models.phases import PhaseMap, phase_map
from delta_suite.pipeline import (
    ALONE,
    Measured,
    Outcome,
    Settings,
    entry_with_boundaries,
    held_entry,
    keep_entry,
    labelled,
    view_of,
    written,
)
from delta_suite.progress import Progress, no_progress
from delta_suite.provenance import Clock, shared_versions
from delta_suite.records.arrays import unpack
from delta_suite.records.assemble import Assembled, assemble, with_law
from delta_suite.records.captured import certificate_of_all, provenance_of_all, sinks_of_all
from delta_suite.records.partial_sums import Facts, SumsCache, law_file, moments_file
from delta_suite.records.parts import missing_parts
from delta_suite.remote import Terms, absolute, fix_threads
from delta_suite.split_tasks import LayerTask, Plan, Survey, UnitTask, solve_layer, sum_unit, survey

if TYPE_CHECKING:
    from delta_suite.engine.work import Item
    from delta_suite.models.spec import ModelSpec
    from delta_suite.reduction.law_scores import Law
    from delta_suite.reduction.law_units import LayerSums
    from delta_suite.reduction.replicates import LayerSpectra

NOT_FROM_SUMS = ALONE - {"law"}
"""Parts that need the states of all texts, and are not measured where a calibration is split."""


def measure_split(
    workers: dispatch.Workers, work: Iterable[Item], settings: Settings, progress: Progress = no_progress
) -> Iterator[tuple[Item, Outcome | Exception]]:
    """Measure one item after the other, each on all workers; yield it with its outcome, or the error that hindered it.

    Its record is written by then. Raises CalibrationError and EngineError before anything is measured.
    """
    items = list(work)
    calibrations = load_calibrations((item.calibration for item in items), settings.documents)

    def measure_item(item: Item) -> Outcome:
        return _Measurement(workers, item, calibrations[item.calibration], settings, progress).outcome()

    with workers:
        yield from local.run(items, measure_item)


@dataclass
class _Measurement:
    """The measurement of one item on all workers."""

    workers: dispatch.Workers
    item: Item
    calibration: Calibration
    settings: Settings
    progress: Progress
    lost: int = 0
    """The number of workers that were lost."""

    @cached_property
    def units(self) -> list[WorkUnit]:
        """The units of work."""
        return work_units(self.calibration.units)

    def outcome(self) -> Outcome:
        """Measure what the cache does not hold, keep it, and write the record."""
        cache, spec = self.settings.cache, absolute(self.item.spec)
        surveyed = self._survey(spec, cache.keys(self.settings.fresh_since))
        notes = [*surveyed.notes]
        with cache.lock(surveyed.key):
            entry = held_entry(self.settings, surveyed.key, spec.name, notes)
            missing = missing_parts(spec.phases, None if entry is None else entry.record, self.settings.parts)
            cached, kept, failed = not missing, True, None
            if entry is None or "law" in missing:
                plan = surveyed.plan or self._survey(spec, frozenset()).plan
                assert plan is not None
                held = frozenset() if entry is None else frozenset(entry.record.parts)
                missing = held | self.settings.parts
                entry, failed = self._measured(spec, surveyed.key, plan, missing)
            if "boundaries" in missing:
                entry = entry_with_boundaries(cache, surveyed.key, entry)
            if not cached:
                entry, kept = keep_entry(cache, surveyed.key, entry, spec.name, notes)
                if kept and failed is None:
                    SumsCache(cache.root, surveyed.key).clear()
        if failed is not None:
            raise failed
        if self.lost:
            notes.append(dispatch.after_losses(self.lost, spec.name))
        view = view_of(cache, surveyed.key, entry)
        item = self.item.spec
        view = labelled(view, item.phases, item.name, item.source, surveyed.revision)
        return written(Measured(view, cached, tuple(notes), kept), self.settings)

    def _survey(self, spec: ModelSpec, held: frozenset[str]) -> Survey:
        terms = self._terms({self.item.calibration: self.calibration})
        ((_, surveyed),) = self._results([0], lambda _: (survey, (terms, pickle.dumps(spec), held)))
        assert isinstance(surveyed, Survey)
        return surveyed

    def _terms(self, calibrations: dict[str, Calibration]) -> Any:
        """Return what tasks share. The texts go to the first task alone."""
        terms = Terms(self.settings, calibrations, self.workers.threads, shared_versions())
        return self.workers.share(pickle.dumps(terms))

    def _results(self, numbers: Iterable[int], make_task: Callable[[int], dispatch.Task]) -> Iterator[tuple[int, Any]]:
        """Yield the answers to numbered tasks as they come.

        After an error no more are started, and once those under way have ended, it is raised: it is told once.
        """
        errors: list[Exception] = []

        def finish(_: int, content: bytes, losses: int) -> Any:
            self.lost += losses
            answer, error = pickle.loads(content)
            if error is not None:
                raise error
            return answer

        wanted = (number for number in numbers if not errors)
        for number, answer in dispatch.run(wanted, self.workers, make_task, finish):
            if isinstance(answer, Exception):
                errors.append(answer)
            else:
                yield number, answer
        if errors:
            raise errors[0]

    def _measured(
        self, spec: ModelSpec, key: str, plan: Plan, parts: frozenset[str]
    ) -> tuple[Assembled, DeviceError | None]:
        """Capture, add up and assemble; return the entry, and why it has no law where memory for that is not there."""
        sums, clock, law = SumsCache(self.settings.cache.root, key), Clock(), None
        facts = self._captured(spec, plan, sums, law="law" in parts)
        phases = phase_map(plan.model.layers, spec.phases)
        with clock("analysis"):
            spectra = self._solved(plan, sums, facts)
        if "law" in parts:
            with clock("law"):
                law = self._law(plan, sums, facts, phases)
        entry = assemble(
            {variant: [by_variant[variant] for by_variant in spectra] for variant in spectra[0]},
            phases,
            model=plan.model,
            calibration=plan.calibration,
            sinks=sinks_of_all([each.sinks for each in facts]),
            certificate=certificate_of_all([each.certificate for each in facts]),
            provenance=provenance_of_all([each.provenance for each in facts], clock.seconds),
            units=self.calibration.units,
        )
        if law is None or isinstance(law, DeviceError):
            return entry, law
        return with_law(entry, law), None

    def _captured(self, spec: ModelSpec, plan: Plan, sums: SumsCache, *, law: bool) -> list[Facts]:
        """Capture the units of work whose sums the cache does not hold; return the facts of all, in order."""
        known = [sums.facts(unit.number, self.settings.fresh_since) for unit in self.units]
        facts = {unit: each for unit, each in enumerate(known) if each is not None and (each.law or not law)}
        terms = self._terms({})

        def task(unit: int) -> dispatch.Task:
            content = UnitTask(
                spec=spec,
                fingerprint=plan.model.fingerprint,
                key=sums.key,
                choices=plan.choices,
                medians=plan.medians,
                groups=self.calibration.units,
                group=self.units[unit].group,
                law=law,
                sequences=plan.units[unit],
            )
            return sum_unit, (terms, pickle.dumps(content))

        with self.progress(f"{spec.name}: units of work", len(known), "unit") as bar:
            bar.update(len(facts))
            for unit, answer in self._results([unit for unit in range(len(known)) if unit not in facts], task):
                sums.put(unit, answer)
                facts[unit] = answer.facts
                bar.update(1)
        return [facts[unit] for unit in range(len(known))]

    def _solved(self, plan: Plan, sums: SumsCache, facts: Sequence[Facts]) -> list[dict[str, LayerSpectra]]:
        """Return the spectra of every layer by variant."""
        terms = self._terms({})

        def task(layer: int) -> dispatch.Task:
            content = LayerTask(
                layer=layer,
                hidden=plan.model.hidden,
                tokens=plan.calibration.tokens,
                epsilon=facts[0].epsilon,
                groups=self.calibration.units,
                device=_kind(plan),
                sums=tuple(sums.read(unit, moments_file(layer), each) for unit, each in enumerate(facts)),
            )
            return solve_layer, (terms, pickle.dumps(content))

        solved: dict[int, dict[str, LayerSpectra]] = {}
        with self.progress(f"{plan.model.name}: layers", plan.model.layers, "layer") as bar:
            for layer, spectra in self._results(range(plan.model.layers), task):
                solved[layer] = spectra
                bar.update(1)
        return [solved[layer] for layer in range(plan.model.layers)]

    def _law(self, plan: Plan, sums: SumsCache, facts: Sequence[Facts], phases: PhaseMap) -> Law | DeviceError:
        """Fit the law here, where the sums of all layers are; or return why memory does not allow it."""
        import torch

        from delta_suite.reduction.gram import algebra_device
        from delta_suite.reduction.law_fit import Tokens, fit_law
        from delta_suite.reduction.law_sums import GROUPS
        from delta_suite.reduction.law_units import SummedUnits, layer_sums
        from delta_suite.reduction.packed import added

        fix_threads(self.workers.threads)  # as workers do: they decide the last bits
        there = torch.cuda.is_available() or _kind(plan) != "cuda"
        device = algebra_device(torch.device(_kind(plan) if there else "cpu"))
        groups = self.calibration.units.at_most(GROUPS).groups
        group_of = {unit.group: groups[unit.documents[0]] for unit in self.units}
        by_group = [0] * GROUPS
        for unit, each in zip(self.units, facts, strict=True):
            by_group[group_of[unit.group]] += each.law.tokens if each.law else 0
        documents = sum(each.law.documents for each in facts if each.law)

        def read(layer: int) -> LayerSums:
            moments, products = (
                added(unpack(sums.read(unit, name, each), sums.entry(unit) / name) for unit, each in enumerate(facts))
                for name in (moments_file(layer), law_file(layer))
            )
            return layer_sums(moments, products, group_of, plan.model.hidden, device)

        layers, hidden = plan.model.layers, plan.model.hidden
        with torch.no_grad():
            try:
                return fit_law(
                    lambda _: SummedUnits(read, layers, hidden),
                    Tokens(tuple(by_group), documents),
                    phases,
                    device,
                    units=self.calibration.units,
                    layers=layers,
                    hidden=hidden,
                    progress=partial(self.progress, f"{plan.model.name}: law", unit="fit"),
                )
            except DeviceError as error:
                return error


def _kind(plan: Plan) -> str:
    """Return the kind of device that the algebra of a layer runs on."""
    return str(plan.choices["device"]).replace("sharded", "cuda")
