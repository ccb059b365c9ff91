"""Measure a model while it is trained: figures, verdicts and what changed against a baseline, every so many steps.

    monitor = ds.DeltaMonitor(tokenizer=tokenizer, every=500, baseline="results/baselines/run.json")
    for step, batch in enumerate(batches, 1):
        ...
        optimizer.step()
        if reading := monitor(model, step):
            writer.add_scalars(reading.scalars, step)

Training goes on as it would have without it: weights, gradients, hooks, train mode and random states are as before.
`callback.DeltaCallback` is the same for the Trainer of transformers.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from delta_suite import api
from delta_suite.capture.calibration import calibration_of, load_calibration
from delta_suite.claims.judge import judge_all, parts_of_claims
from delta_suite.claims.verdict import Verdict
from delta_suite.command_line import DEFAULT_CALIBRATION
from delta_suite.errors import BaselineError, OptionError, explain
from delta_suite.escaping import terminal, terminal_lines
from delta_suite.metrics.registry import METRICS, parts_of
from delta_suite.models.memory import module_in_memory
from delta_suite.models.phases import PhaseMap
from delta_suite.models.undisturbed import random_states_kept
from delta_suite.paths import cache_root, relative_to
from delta_suite.pipeline import Settings, measure_view
from delta_suite.records.cache import NoCache
from delta_suite.records.store import RUNS
from delta_suite.records.view import RecordView
from delta_suite.reduction.variants import BLOCK_VARIANTS
from delta_suite.regression.baseline import DECISIVE, BaselineFile, VerdictEntry, load_baseline, unknown_keys
from delta_suite.regression.comparison import Status, by_item, obstacle
from delta_suite.regression.turns import direction_figures
from delta_suite.regression.update import names, update_baseline
from delta_suite.writing import require_writable, require_writable_file

SAVE = "save"
"""The value of `every` for a measurement at each save of the Trainer."""

DOCUMENTS = 56
"""Number of documents of the calibration that are measured if none is given: half of those of `core`. Of fewer than
`gates.MIN_DOCUMENTS`, no claim is decided."""

LOGGED = ("effective_rank", "intra_cosine", "cross_cosine", "block_effective_rank", "capture_fraction")
"""Metrics whose values over each phase are logged if none are named."""

STEPS_TIMED = 50
"""Number of training steps whose median length is the length of a step."""

_CODES = {Verdict.SUPPORTED: 1.0, Verdict.INCONCLUSIVE: 0.0, Verdict.REFUTED: -1.0}
"""Numbers by which verdicts are plotted; a claim that is not measured has none."""

T = TypeVar("T")

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Reading:
    """One measurement during training: what was judged, what changed, what to log, and what it cost."""

    step: int
    measurement: api.Measurement
    verdicts: api.Verdicts
    flips: tuple[str, ...]
    """Claims whose verdict is another one than the baseline's, such as `phase-c/few-ranks: PASS -> FAIL`; without a
    baseline, claims that were decided one way by the measurement before and are now decided the other way."""
    drifted: tuple[str, ...]
    """Names of the baseline's items that are beyond their tolerance, such as `layers/effective_rank`."""
    stops: bool
    """True if training is to end: a verdict flipped, and `on_flip` is "stop"."""
    seconds: float
    """Time that measuring, judging and comparing took."""
    steps: float | None
    """Number of training steps that take as long; None before two steps were seen."""
    scalars: Mapping[str, float]
    """Numbers to log, by name: `delta/C/intra_cosine`, `delta/verdict/phase-c/few-ranks` and so on."""


class DeltaMonitor:
    """Measures a model in memory every so many steps of a training loop, judges claims, and tells of flips.

    Example:
        >>> DeltaMonitor(every=500).every
        500
        >>> DeltaMonitor(every=0)
        Traceback (most recent call last):
        delta_suite.errors.OptionError: every=0: give a number of steps from 1, or "save".
    """

    def __init__(
        self,
        *,
        every: int | str = 500,
        tokenizer: Any = None,
        hypotheses: Paths | None = None,
        baseline: str | Path | None = None,
        baseline_update: bool = False,
        on_flip: str = "warn",
        on_error: str = "warn",
        calibration: str | os.PathLike[str] = DEFAULT_CALIBRATION,
        documents: int | None = DOCUMENTS,
        texts: Sequence[str] | None = None,
        metrics: Sequence[str] = LOGGED,
        variant: str = "raw",
        phases: PhaseMap | None = None,
        layers_path: str | None = None,
        name: str | None = None,
        results: str | Path | None = None,
    ) -> None:
        """Check the options, and read claims and baseline.

        Args:
            every: Number of steps from one measurement to the next, or "save": at each save of the Trainer; in another
                loop, whenever `measure` is called.
            tokenizer: Tokenizer of the model. DeltaCallback takes the Trainer's `processing_class` where none is given.
            hypotheses: Hypothesis files or folders to judge; None for those that ship with delta-suite, () for none.
            baseline: Baseline file to compare with: figures, directions and verdicts. It is of the same calibration.
            baseline_update: True to write the baseline with the first measurement where there is none.
            on_flip: "warn", or "stop" to end training when a verdict is another one than the baseline's.
            on_error: "warn" to go on training when a measurement fails, or "raise".
            calibration: Calibration set, as `measure` takes it.
            documents: Number of its documents; None for all.
            texts: Texts to measure on instead of a calibration set.
            metrics: Metrics whose values over each phase are logged.
            variant: Variant of the logged metrics.
            phases: Phase map, name -> first and last layer, both included; None divides by depth.
            layers_path: Dotted path of the decoder blocks, where they are not found by structure.
            name: Name of the run: the measurement at step 500 is called `name@step500`. None names each by its weights.
            results: Folder in which each record is saved; None to save none.

        Raises:
            OptionError: an option has a value that does not exist, or options do not go together.
            HypothesisFileError, BaselineError, CalibrationError: a file is missing or wrong.
            RecordError: the results folder, or the baseline that is to be made, cannot be written.
        """
        _check_options(every, on_flip, on_error, metrics, variant, baseline, baseline_update)
        api.check_labels(name, phases)
        calibration = os.fspath(calibration)
        if texts is not None and calibration != DEFAULT_CALIBRATION:
            raise OptionError("texts and calibration are given, and only one can be measured on. Leave one out.")
        self.every, self.tokenizer, self.on_flip, self.on_error = every, tokenizer, on_flip, on_error
        self.metrics, self.variant = tuple(metrics), variant
        self.phases, self.layers_path = phases, layers_path
        self.name, self.results = name, results
        self.hypotheses = api.hypotheses_of(hypotheses)
        self.baseline = None if baseline is None else Path(baseline)
        self._file = _baseline(self.baseline, baseline_update)
        if self.baseline is not None and baseline_update:
            require_writable_file(self.baseline)
        if results is not None:
            require_writable(Path(results) / RUNS)
        claims = [claim for hypothesis in self.hypotheses for claim in hypothesis.expect]
        # Its directions, 19 MB for 24 layers of width 64, would fill the user's cache, and no model comes twice.
        self._settings = Settings(
            calibration=calibration,
            documents=documents,
            parts=parts_of_claims(claims) | parts_of(self.metrics),
            cache=NoCache(cache_root()),
        )
        self._texts = load_calibration(calibration, documents) if texts is None else calibration_of(texts)
        self._decided: dict[str, str] = {}
        self._lengths: deque[float] = deque(maxlen=STEPS_TIMED)
        self._last: float | None = None
        self._checked = False

    def __call__(self, model: Any, step: int) -> Reading | None:
        """Measure if this step is due; call it once after each training step.

        Returns the reading, or None where the step is not due, or the measurement failed and `on_error` is "warn".
        Raises as `require_measurable`, at the first call already.
        """
        if not self._checked:
            self.require_measurable(model)  # now, and not only after many steps
        self.step_done()
        due = isinstance(self.every, int) and step > 0 and step % self.every == 0
        return self.measure(model, step) if due else None

    def forget(self) -> None:
        """Forget how long steps took, and what was decided: another training begins."""
        self._decided.clear()
        self._lengths.clear()
        self._last = None

    def step_done(self) -> None:
        """Note that a training step ended: the time since the last one, without measurements, is its length."""
        now = time.perf_counter()
        if self._last is not None:
            self._lengths.append(now - self._last)
        self._last = now

    def measure(self, model: Any, step: int) -> Reading | None:
        """Measure now, whichever step this is, and print a line with the verdicts and the cost.

        model: a module of transformers, also inside DDP or torch.compile. In a training of several processes one of
        them measures; the others may go on.

        The first call raises as `require_measurable`. Any other error is a warning, and None is returned, where
        `on_error` is "warn".
        """
        if not self._checked:
            self.require_measurable(model)
        with random_states_kept():  # also by judging and comparing
            reading = self._tried(step, "measuring", self._reading, model, step, time.perf_counter())
        if self._last is not None:
            self._last = time.perf_counter()  # what measuring took is no part of a training step
        if reading is None:
            return None
        _print(self._line(reading))
        if reading.flips:
            _warn(step, f"{names(reading.flips)}.")
        return reading

    def require_measurable(self, model: Any) -> None:
        """Raise OptionError without a tokenizer, ModelUnavailableError for a model that is sharded or unknown."""
        if self.tokenizer is None:
            raise OptionError(
                f"{type(self).__name__} has no tokenizer: pass tokenizer=..., or processing_class=... to the Trainer."
            )
        subject = module_in_memory(model, self.tokenizer, phases=self.phases, layers_path=self.layers_path)
        assert subject.devices  # finds the blocks, and looks at every tensor
        self._checked = True

    def _reading(self, model: Any, step: int, started: float) -> Reading:
        """Measure, judge and compare."""
        measurement = self._measurement(model, step)
        view = measurement.view
        verdicts = api.Verdicts(judge_all(self.hypotheses, [(view, None)]))
        entries = {
            f"{each.judgement.hypothesis.id}/{each.judgement.expectation.id}": VerdictEntry.of(
                each.judgement, relative_to(Path(), each.judgement.hypothesis.path).as_posix()
            )
            for each in verdicts
        }
        if self.results is not None:
            self._tried(step, "saving the record", measurement.save, self.results)
        changes = None
        if self.baseline is not None:
            changes = self._tried(step, "comparing with the baseline", self._changes, self.baseline, view, entries)
        flips, drifted = changes or (self._flips_since_last(entries), ())
        seconds = time.perf_counter() - started
        steps = seconds / statistics.median(self._lengths) if self._lengths else None
        scalars = self._scalars(measurement, verdicts) | {
            "delta/flips": float(len(flips)),
            "delta/seconds": seconds,
        }
        if changes is not None:
            scalars["delta/drifted"] = float(len(drifted))
        if steps is not None:
            scalars["delta/training_steps"] = steps
        stops = bool(flips) and self.on_flip == "stop"
        return Reading(step, measurement, verdicts, flips, drifted, stops, seconds, steps, scalars)

    def _measurement(self, model: Any, step: int) -> api.Measurement:
        """Return the measurement of the model as it is now."""
        subject = module_in_memory(
            model,
            self.tokenizer,
            name=None if self.name is None else f"{self.name}@step{step}",
            phases=self.phases,
            layers_path=self.layers_path,
        )
        measured = measure_view(subject, self._settings, calibration=self._texts)
        for note in measured.notes:
            warnings.warn(note, stacklevel=2)
        return api.Measurement(measured.view)

    def _changes(
        self, path: Path, view: RecordView, entries: Mapping[str, VerdictEntry]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the verdicts that flipped against the baseline, and the names of the items that drifted.

        A baseline that is not there yet is written first. Raises BaselineError where nothing can be compared.
        """
        if self._file is None:
            _print(update_baseline(path, view, entries))
            self._file = load_baseline(path)
        file = self._file
        if why := obstacle(file.view, view, other_documents=file.content.other_documents):
            raise BaselineError(f"{path} cannot be compared with: {why}.")
        verdicts = [file.compare_verdict(name, entry, view) for name, entry in entries.items()]
        items = by_item(file.compare(view, direction_figures(view)))
        drifted = [
            name
            for name, compared in items.items()
            if any(each.status is Status.DRIFT and each.fails for each in compared)
        ]
        flips = [each for each in verdicts if each.status is Status.FLIP and file.expected_failure(each.item) is None]
        return tuple(f"{each.metric}: {each.reason}" for each in flips), tuple(drifted)

    def _tried(self, step: int, doing: str, act: Callable[..., T], *args: Any) -> T | None:
        """Return what a function returns; where it fails, warn and return None, or raise if `on_error` says so."""
        try:
            return act(*args)
        except Exception as error:  # whatever it is, training is worth more
            if self.on_error == "raise":
                raise
            _warn(step, f"{explain(error, doing)}\n  Training goes on.")
            return None

    def _flips_since_last(self, entries: Mapping[str, VerdictEntry]) -> tuple[str, ...]:
        """Return the claims that are decided otherwise than when they were last decided."""
        decided = {name: entry.verdict for name, entry in entries.items() if entry.verdict in DECISIVE}
        flips = tuple(
            f"{name}: {self._decided[name]} -> {verdict}"
            for name, verdict in decided.items()
            if self._decided.get(name, verdict) != verdict
        )
        self._decided |= decided
        return flips

    def _scalars(self, measurement: api.Measurement, verdicts: api.Verdicts) -> dict[str, float]:
        """Return the figures of phases, and the verdicts with their margins, as numbers to log."""
        numbers: dict[str, float | None] = {
            f"delta/{phase}/{metric}": measurement.observe(metric, phase, variant=self.variant).value
            for phase in measurement.view.phases
            for metric in self.metrics
        }
        for judged in verdicts:
            name = f"{judged.judgement.hypothesis.id}/{judged.judgement.expectation.id}"
            numbers[f"delta/verdict/{name}"] = _CODES.get(judged.judgement.verdict)
            numbers[f"delta/margin/{name}"] = judged.judgement.margin
        return {name: float(number) for name, number in numbers.items() if number is not None and math.isfinite(number)}

    def _line(self, reading: Reading) -> str:
        """Return verdicts, changes and cost in one line."""
        counts = Counter(judged.judgement.verdict.value for judged in reading.verdicts)
        told = ", ".join(f"{counts[verdict.value]} {verdict.value}" for verdict in Verdict if counts[verdict.value])
        parts = [told or "no claims"]
        if self.baseline is not None:
            parts.append(f"against {self.baseline}: {len(reading.flips)} flips, {len(reading.drifted)} items drifted")
        cost = f"{reading.seconds:.1f} s"
        if reading.steps is not None:
            cost += f", as long as {reading.steps:.1f} training steps"
            if isinstance(self.every, int):
                cost += f" ({reading.steps / self.every:.1%} at every={self.every})"
        return f"delta-suite at step {reading.step}: {'; '.join(parts)}. Measuring took {cost}."


def _check_options(
    every: int | str,
    on_flip: str,
    on_error: str,
    metrics: Sequence[str],
    variant: str,
    baseline: str | Path | None,
    baseline_update: bool,
) -> None:
    """Raise OptionError for a value that does not exist, or for options that do not go together."""
    if every != SAVE and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise OptionError(f'every={every!r}: give a number of steps from 1, or "{SAVE}".')
    for name, value, values in (("on_flip", on_flip, ("warn", "stop")), ("on_error", on_error, ("warn", "raise"))):
        if value not in values:
            raise OptionError(f"{name}={value!r}: use {' or '.join(map(repr, values))}.")
    if baseline is None and (on_flip == "stop" or baseline_update):
        option = "baseline_update=True" if baseline_update else 'on_flip="stop"'
        raise OptionError(f"{option} needs a baseline: baseline=FILE.")
    for metric in metrics:
        if metric not in METRICS:
            raise OptionError(f"metrics: {metric!r} is unknown: `delta-suite metrics` lists them.")
    if variant not in BLOCK_VARIANTS:
        raise OptionError(f"variant {variant!r} is unknown: use one of {', '.join(BLOCK_VARIANTS)}.")


def _baseline(path: Path | None, may_be_missing: bool) -> BaselineFile | None:
    """Return the baseline, or None where there is none yet. Raises BaselineError."""
    if path is None or (may_be_missing and not path.exists()):
        return None
    if not path.exists():
        raise BaselineError(
            f"no baseline {path}. Write it from a checkpoint: pytest hypotheses/ --model=CHECKPOINT "
            f"--calibration={DEFAULT_CALIBRATION} --documents={DOCUMENTS} --baseline={path} --baseline-update; "
            f"or let the first measurement write it: baseline_update=True."
        )
    file = load_baseline(path)
    if wrong := unknown_keys(file):
        raise BaselineError(f"{path}: tolerances for what does not exist: {names(wrong)}")
    return file


def _print(line: str) -> None:
    """Print a line to stderr, above the bars that show there."""
    from tqdm import tqdm

    tqdm.write(terminal(line), file=sys.stderr)


def _warn(step: int, text: str) -> None:
    """Warn of what happened at a step, without ending training."""
    warnings.warn(f"delta-suite at step {step}: {terminal_lines(text)}", stacklevel=4)
