"""Measure one calibration on several workers: each captures units of work, and their sums are added in a fixed order.

A measurement takes three kinds of tasks. The first one loads the model, cuts the calibration into units of work and
finds the median norms by which sinks are told. Then each unit is captured by whichever worker is free; what comes back
are sums, which the cache keeps until all are there. In the end the sums of each layer are added in the order of the
units, and its eigenproblems are solved. Nothing depends on which worker did what: the units follow from the
calibration, the batches of each from the lengths of its documents, and the order of every addition from both.

A unit is batched by itself, so that its states differ in the seventh digit from those of a measurement in one piece,
where documents of other units are in the batch. What attention and MLP write, the states, causes and the law are not
measured in this way.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from delta_suite.capture.calibration import Calibration, load_calibration
from delta_suite.engine import dispatch, local
from delta_suite.engine.versions import versions
from delta_suite.errors import RecordError
from delta_suite.models.phases import phase_map
from delta_suite.pipeline import Measured, Outcome, Settings, labelled, view_of, written
from delta_suite.progress import Progress, no_progress
from delta_suite.records.assemble import Assembled, assemble, with_boundaries
from delta_suite.records.captured import certificate_of_all, provenance_of_all, sinks_of_all
from delta_suite.records.format import from_json, to_json
from delta_suite.records.partial_sums import SumsCache
from delta_suite.records.parts import missing_parts
from delta_suite.remote import Terms, absolute
from delta_suite.split_tasks import LayerTask, Plan, Survey, UnitTask, solve_layer, sum_unit, survey

if TYPE_CHECKING:
    from delta_suite.engine.work import Item
    from delta_suite.models.spec import ModelSpec
    from delta_suite.reduction.replicates import LayerSpectra


def measure_split(
    workers: dispatch.Workers, work: Iterable[Item], settings: Settings, progress: Progress = no_progress
) -> Iterator[tuple[Item, Outcome | Exception]]:
    """Measure one item after the other, each on all workers; yield it with its outcome, or the error that hindered it.

    Its record is written by then. Raises CalibrationError and EngineError before anything is measured.
    """
    items = list(work)
    names = dict.fromkeys(item.calibration for item in items)
    calibrations = {name: load_calibration(name, settings.documents) for name in names}
    with workers:
        for item in items:
            result: Outcome | Exception
            try:
                result = _Measurement(workers, item, calibrations[item.calibration], settings, progress).outcome()
            except Exception as error:  # whatever hinders one item must not hinder the next
                local.forget_locals(error)
                result = error
            yield item, result


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

    def outcome(self) -> Outcome:
        """Measure what the cache does not hold, keep it, and write the record."""
        cache, spec = self.settings.cache, absolute(self.item.spec)
        surveyed = self._survey(spec, cache.keys(self.settings.fresh_since))
        notes = [*surveyed.notes]
        with cache.lock(surveyed.key):
            try:
                entry = cache.get(surveyed.key, self.settings.fresh_since)
            except RecordError as error:
                entry = None
                notes.append(f"{error}; {spec.name} was measured again")
            missing = missing_parts(spec.phases, None if entry is None else entry.record, self.settings.parts)
            cached, kept = not missing, True
            if entry is None:
                plan = surveyed.plan or self._survey(spec, frozenset()).plan
                assert plan is not None
                entry = self._measured(spec, surveyed.key, plan)
            if "boundaries" in missing:
                record = with_boundaries(entry.record, view_of(cache, surveyed.key, entry).gram)
                entry = Assembled(record, entry.arrays, entry.directions)
            if not cached:
                record, _ = from_json(to_json(entry.record), spec.name)  # as the cache will give it back
                entry = Assembled(record, entry.arrays, entry.directions)
                try:
                    cache.put(surveyed.key, entry)
                    SumsCache(cache.root, surveyed.key).clear()
                except RecordError as error:  # what was measured is not lost: its record is written
                    kept = False
                    notes.append(f"{error} {spec.name} is measured, and only the cache does not keep it.")
        if self.lost:
            notes.append(f"{spec.name}: measured after {self.lost} worker{'s were' if self.lost > 1 else ' was'} lost")
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
        return self.workers.share(pickle.dumps(Terms(self.settings, calibrations, self.workers.threads, versions())))

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

    def _measured(self, spec: ModelSpec, key: str, plan: Plan) -> Assembled:
        """Capture the units of work that the cache has no sums of, add them up, and assemble the record."""
        sums, terms, units = SumsCache(self.settings.cache.root, key), self._terms({}), self.calibration.units
        known = {unit: sums.facts(unit, self.settings.fresh_since) for unit in range(len(plan.units))}
        facts = {unit: each for unit, each in known.items() if each is not None}

        def unit_task(unit: int) -> dispatch.Task:
            task = UnitTask(spec, plan.model.fingerprint, key, plan.choices, plan.medians, units, plan.units[unit])
            return sum_unit, (terms, pickle.dumps(task))

        remaining = [unit for unit in known if unit not in facts]
        with self.progress(f"{spec.name}: units of work", len(known), "unit") as bar:
            bar.update(len(facts))
            for unit, answer in self._results(remaining, unit_task):
                sums.put(unit, answer)
                facts[unit] = answer.facts
                bar.update(1)
        in_order = [facts[unit] for unit in known]

        def layer_task(layer: int) -> dispatch.Task:
            content = tuple(sums.layer(unit, layer, facts[unit]) for unit in known)
            device = str(plan.choices["device"]).replace("sharded", "cuda")
            task = LayerTask(
                layer, plan.model.hidden, plan.calibration.tokens, in_order[0].epsilon, units, device, content
            )
            return solve_layer, (terms, pickle.dumps(task))

        started = time.perf_counter()
        solved: dict[int, dict[str, LayerSpectra]] = {}
        with self.progress(f"{spec.name}: layers", plan.model.layers, "layer") as bar:
            for layer, spectra in self._results(range(plan.model.layers), layer_task):
                solved[layer] = spectra
                bar.update(1)
        return assemble(
            {variant: [solved[layer][variant] for layer in range(plan.model.layers)] for variant in solved[0]},
            phase_map(plan.model.layers, spec.phases),
            model=plan.model,
            calibration=plan.calibration,
            sinks=sinks_of_all([each.sinks for each in in_order]),
            certificate=certificate_of_all([each.certificate for each in in_order]),
            provenance=provenance_of_all(
                [each.provenance for each in in_order], analysis=round(time.perf_counter() - started, 3)
            ),
            units=units,
        )
