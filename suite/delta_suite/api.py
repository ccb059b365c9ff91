"""Measure a model, ask for its figures, judge it, plot it and save it: the Python interface.

import delta_suite as ds

m = ds.measure("smollm2-135m-q4", calibration="seed")
m.value("intra_cosine", "C", variant="sink_free")
m.judge("hypotheses/")
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_suite.capture.calibration import calibration_of
from delta_suite.claims.judge import Judged, judge_all
from delta_suite.claims.loader import load_hypotheses
from delta_suite.claims.observe import Observation, Quantity, observe, require_names
from delta_suite.command_line import DEFAULT_PARTS
from delta_suite.errors import MissingPackageError, OptionError, UnknownNameError
from delta_suite.escaping import xml
from delta_suite.metrics.registry import METRICS
from delta_suite.models.memory import module_in_memory
from delta_suite.models.models_file import load_registry
from delta_suite.models.phases import PhaseMap, declared_problems, phase_map
from delta_suite.models.spec import ModelSpec
from delta_suite.models.subject import Subject
from delta_suite.models.undisturbed import random_states_kept
from delta_suite.paths import bundled, cache_root
from delta_suite.pipeline import chosen_settings, measure_view
from delta_suite.recomputing import Choices, Verification, recompute_all, require_one
from delta_suite.records import store
from delta_suite.records.cache import Cache
from delta_suite.records.figures import COLUMNS, figures
from delta_suite.records.record import Record
from delta_suite.records.view import RecordView

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase

    from delta_suite.claims.schema import Hypothesis
    from delta_suite.publish.rows import Row
    from delta_suite.publish.table import Table


def measure(
    model: str | os.PathLike[str] | Module,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    texts: Iterable[str] | None = None,
    calibration: str | os.PathLike[str] | None = None,
    documents: int | None = None,
    chat_template: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    parts: str | Iterable[str] = DEFAULT_PARTS,
    name: str | None = None,
    phases: PhaseMap | None = None,
    layers_path: str | None = None,
    fresh: bool = False,
) -> Measurement:
    """Measure a model, or take it from the cache, with the names and defaults of the command line.

    model: a name of models.toml, `name@revision`, a directory, a .gguf file, or a hub id; with `@random-weights` behind
        it, its architecture with freshly initialised weights. Or a torch module in memory: a transformers model, also
        one wrapped by PEFT (measured with its adapter), torch.compile or DistributedDataParallel.
    tokenizer: that of a module in memory, which has none with it.
    texts: what to measure on, instead of a calibration: each text is one document.
    calibration: core (the default), seed, a file, a folder, or a dataset of the hub.
    documents: only the first so many of them.
    chat_template: put each document, as a user's message, into the model's own chat template.
    device, dtype: "auto", "cuda:1", "bfloat16" and so on. A module in memory is neither moved nor cast.
    parts: spectra, boundaries, law; and what is not measured by default: writes (attention and MLP apart), stream (the
        states themselves), causal (the loss with updates of phases changed), damage (the loss without each block); or
        "all". In one text with commas, or one by one.
    name: what the model is called; of a module in memory, by default its class and 8 hex digits of its tensors.
    phases: name -> first and last layer, both included; by default those of models.toml, or by depth.
    layers_path: dotted path of the decoder blocks, where they are not found by structure.
    fresh: measure again, whatever the cache holds.

    A module in memory is left exactly as it was: weights, hooks, mode, gradients; so are random states. Nothing is
    written but the cache: `Measurement.save` writes a record. Raises a SuiteError whose message says what to do.
    """
    if texts is not None and calibration is not None:
        raise OptionError("texts and calibration are given, and only one of them can be measured on. Leave one out.")
    if not isinstance(calibration, str | os.PathLike | None):
        raise OptionError(f"calibration is {type(calibration).__name__}: write a name or a path, or texts=[...].")
    with random_states_kept():
        settings = chosen_settings(
            calibration=None if calibration is None else os.fspath(calibration),
            documents=documents,
            chat_template=chat_template,
            device=device,
            dtype=dtype,
            parts=parts,
            fresh=fresh,
        )
        check_labels(name, phases)
        labels = {"name": name, "phases": phases, "layers_path": layers_path}
        if isinstance(model, str | os.PathLike):
            if tokenizer is not None:
                raise OptionError("tokenizer is for a module in memory; a named model brings its own. Leave it out.")
            spec = load_registry().resolve(os.fspath(model))
            given = {key: value for key, value in labels.items() if value is not None}
            subject: ModelSpec | Subject = spec.model_copy(update=given)
        else:
            subject = module_in_memory(
                *(model, tokenizer), device=device, dtype=dtype, name=name, phases=phases, layers_path=layers_path
            )
        chosen_texts = None if texts is None else calibration_of(texts, documents)
        measured = measure_view(subject, settings, calibration=chosen_texts)
    for note in measured.told:
        warnings.warn(note, stacklevel=2)
    return Measurement(measured.view)


def check_labels(name: str | None, phases: PhaseMap | None) -> None:
    """Raise OptionError for a name or phases that no model can have."""
    if name is not None and not (isinstance(name, str) and name.strip() and name.isprintable()):
        raise OptionError(f"name={name!a} cannot be the name of a model: write letters, digits and signs, on one line.")
    if phases is not None and not isinstance(phases, Mapping):
        raise OptionError(f"phases={phases!r} is no mapping: write {{'C': (10, 31), 'E': (47, 58)}}.")
    if phases and (problems := declared_problems(phases)):
        raise OptionError(f"phases: {'; '.join(problems)}.")


def load(path: str | Path) -> Measurement:
    """Return the measurement of a stored record. Raises RecordError where there is none, or it is damaged."""
    return Measurement(store.load(Path(path), Cache(cache_root())), Path(path))


def load_results(folder: str | Path = store.RESULTS) -> Results:
    """Return the measurements of all records of a results folder, the oldest of a model first.

    Raises RecordError where it holds no records, and for a record that is damaged.
    """
    return Results(load(path) for path in store.record_paths(Path(folder)))


def verify(
    records: str | Path | Sequence[str | Path] = "results",
    *,
    recompute: bool = False,
    model: str | None = None,
    calibration: str | None = None,
    device: str | None = None,
) -> Verification:
    """Check that the numbers of records, or of all in results folders, follow from each other, as `delta-suite verify`.

    recompute: measure the model of each consistent record again, too, and compare figure by figure.
    model, calibration: with `recompute`, the model or the texts of one record, where they are elsewhere than it says.
    device: with `recompute`, where it is measured.

    Raises RecordError where there is no record, and OptionError for options that do not go together.

    Example:
        >>> checked = verify("nowhere.json")
        >>> checked.consistent, checked[0].unreadable[:34]
        (False, 'record nowhere.json cannot be read')
    """
    if not recompute and (model, calibration, device) != (None, None, None):
        raise OptionError("model, calibration and device are for recompute=True: without it nothing is measured.")
    checked = list(store.verify(_paths("records", records)))
    if not recompute:
        return Verification(checked)
    require_one([record.path for record in checked], model, calibration)
    choices = Choices(load_registry(), chosen_settings(device=device, fresh=True), model, calibration)
    with random_states_kept():
        again = list(recompute_all((record.path for record in checked if record.consistent), choices))
    return Verification(checked, again)


def _paths(argument: str, given: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return one path or several as a list. Raises OptionError for what is none."""
    paths = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    for path in paths:
        if not isinstance(path, str | os.PathLike):
            raise OptionError(f"{argument}: {type(path).__name__} is no path. Name files or folders.")
    return [Path(path) for path in paths]


def hypotheses_of(given: str | Path | Sequence[str | Path] | None) -> list[Hypothesis]:
    """Return the hypotheses of files or folders, or those that ship with delta-suite. Raises HypothesisFileError."""
    return load_hypotheses([bundled("hypotheses")] if given is None else _paths("hypotheses", given))


class Measurement:
    """One measured model: its record under a phase map, and everything that is computed from it."""

    def __init__(self, view: RecordView, path: Path | None = None) -> None:
        self.view, self.path = view, path

    @property
    def record(self) -> Record:
        """The record: data alone."""
        return self.view.record

    @property
    def name(self) -> str:
        """The model's name."""
        return self.view.model.name

    def value(
        self,
        metric: str,
        scope: str = "model",
        *,
        variant: str = "raw",
        over: str = "mean",
        with_metric: str | None = None,
    ) -> Quantity:
        """Return one number: a metric over a phase, `layers:8-15`, `layer:3`, `depth:0.5-1` or `model`.

        over: how layers become one number (mean, median, min, max), or a figure of the profile over depth (trend, peak,
        valley, or the correlation with `with_metric`).

        It is a float with `value`, `interval` and `reason`. Where the number does not exist, computing with it raises
        NotMeasuredError; in a test, that makes the test not measured, with the reason.

        Raises UnknownNameError for a metric, a variant or an aggregate that does not exist.
        """
        return Quantity(self.observe(metric, scope, variant=variant, over=over, with_metric=with_metric))

    def observe(
        self,
        metric: str,
        scope: str = "model",
        *,
        variant: str = "raw",
        over: str = "mean",
        with_metric: str | None = None,
    ) -> Observation:
        """Return the same number with the values of each layer, and the reason where there is none."""
        return observe(self.view, metric, scope, variant, over, with_metric)

    def layers(self, *metrics: str, variant: str = "raw") -> Rows:
        """Return one row a layer with the metrics named, or with all metrics of layers."""
        names = metrics or self._of_scope("layer")
        for name in names:
            _require_of_layers(name, variant)
        return Rows(
            {"layer": layer.layer, "phase": layer.phase}
            | {name: self.view.layer(layer.layer, name, variant).value for name in names}
            for layer in self.view.layers
        )

    def phases(self, *metrics: str, variant: str = "raw") -> Rows:
        """Return one row a phase with the metrics named, or with all metrics of phases."""
        names = metrics or self._of_scope("phase")
        return Rows(
            {"phase": phase, "first": first, "last": last}
            | {name: self.observe(name, phase, variant=variant).value for name in names}
            for phase, (first, last) in self.view.phases.items()
        )

    def _of_scope(self, scope: str) -> list[str]:
        """Return the metrics of a scope whose part was measured."""
        return [name for name, each in METRICS.items() if each.scope == scope and each.part in self.record.parts]

    def under(self, phases: PhaseMap) -> Measurement:
        """Return the same measurement under another phase map: name -> first and last layer, both included.

        Raises OptionError for what is no phase map, and ModelsFileError for layers that the model does not have.
        """
        check_labels(None, phases)
        return Measurement(self.view.under(phase_map(self.view.model.layers, phases)))

    def judge(
        self, hypotheses: str | Path | Sequence[str | Path] | None = None, *, control: Measurement | None = None
    ) -> Verdicts:
        """Judge the claims of hypothesis files or folders, or of those that ship with delta-suite.

        control: the same architecture with random weights, which some claims need; by default its newest record in the
            folder that this one was loaded from or saved to.

        Raises HypothesisFileError where a file is wrong.
        """
        control_view = None if control is None else _view_of(control, "control")
        if control is None and self.path is not None:
            control_view = store.control_beside(self.path, self.view)
        return Verdicts(judge_all(hypotheses_of(hypotheses), [(self.view, control_view)]))

    def compare(self, other: Measurement, variant: str = "raw") -> Comparison:
        """Return a table of this measurement, as the one before, beside another, with intervals of the differences.

        Raises UnknownVariantError for a variant that is not compared.
        """
        from delta_suite.publish.baseline_tables import side_by_side

        parts = side_by_side(self.view, _view_of(other, "other"), variant)
        return Comparison("\n\n".join(part if isinstance(part, str) else part.text() for part in parts))

    def plot(self, metric: str = "effective_rank", variant: str = "raw") -> Figure:
        """Return a plotly Figure of a layer metric over depth, with intervals and phases.

        Raises UnknownNameError for a metric or variant that does not exist, or a metric that is not of layers.
        """
        _require_of_layers(metric, variant)
        import plotly.graph_objects as graph

        from delta_suite.publish.plots import layer_figure

        return graph.Figure(layer_figure(self.view, variant, metric))

    def save(self, results: str | Path = store.RESULTS) -> Path:
        """Write the record and its arrays into a results folder, and return the record's path."""
        self.path, self.view = store.save(Path(results), self.view, Cache(cache_root()))
        return self.path

    def to_frame(self) -> Any:
        """Return all figures as a pandas DataFrame, one row each. Raises MissingPackageError without pandas."""
        return Results([self]).to_frame()

    def __repr__(self) -> str:
        """Return what was measured, and the table of phases."""
        from delta_suite.publish.model_tables import model_line, phase_table

        return f"{model_line(self.view)}\n\n{phase_table(self.view).text()}"

    def _repr_html_(self) -> str:
        from delta_suite.publish.model_tables import model_line, phase_table

        return f"<p>{xml(model_line(self.view))}</p>{phase_table(self.view).html()}"


def _view_of(given: object, argument: str) -> RecordView:
    """Return the view of a measurement. Raises OptionError for what is none, such as a path."""
    if not isinstance(given, Measurement):
        raise OptionError(f"{argument}={given!r} is no measurement: ds.load(path) returns that of a stored record.")
    return given.view


def _pandas() -> Any:
    try:
        return import_module("pandas")
    except ModuleNotFoundError:
        raise MissingPackageError("to_frame() needs pandas, which is not installed: pip install pandas.") from None


def _require_of_layers(metric: str, variant: str) -> None:
    """Raise UnknownNameError for what no layer has."""
    require_names(metric, variant)
    if (scope := METRICS[metric].scope) not in {"layer", "pair"}:
        raise UnknownNameError(f"{metric} is a metric of a {scope}, not of layers: value({metric!r}, ...) returns it")


class Comparison(str):
    """The text of a comparison, shown as it is."""

    def __repr__(self) -> str:
        """Return the text itself."""
        return str(self)

    def _repr_html_(self) -> str:
        return f"<pre>{xml(self)}</pre>"


class Rows(list[dict[str, Any]]):
    """Rows of plain values, shown as a table."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        super().__init__(dict(row) for row in rows)

    def to_frame(self) -> Any:
        """Return the rows as a pandas DataFrame. Raises MissingPackageError where pandas is not installed."""
        return _pandas().DataFrame(list(self))

    def _table(self) -> Table:
        from delta_suite.publish.table import Table
        from delta_suite.publish.wording import number

        texts = (
            [number(value) if isinstance(value, float) or value is None else str(value) for value in row.values()]
            for row in self
        )
        return Table.of(list(self[0]) if self else (), texts)

    def __repr__(self) -> str:
        """Return the rows as a table of text."""
        return self._table().text() if self else "no rows"

    def _repr_html_(self) -> str:
        return self._table().html()


class Verdicts(list[Judged]):
    """Judged claims, shown as the grid of verdicts."""

    def _rows(self) -> list[Row]:
        from delta_suite.publish.rows import Row

        return [Row.of(judged, None) for judged in self]

    def __repr__(self) -> str:
        """Return the grid of verdicts."""
        from delta_suite.publish.verdict_tables import verdict_grid

        return verdict_grid(self._rows()).text()

    def _repr_html_(self) -> str:
        return self.to_rows()._repr_html_()

    def to_rows(self) -> Rows:
        """Return one row a claim, with its texts, model, verdict, observed and required figures, margin and reason."""
        keys = ("hypothesis", "expectation", "claim", "model", "verdict", "observed", "required", "margin", "reason")
        return Rows({key: getattr(row, key) for key in keys} for row in self._rows())

    def to_frame(self) -> Any:
        """Return the verdicts as a pandas DataFrame. Raises MissingPackageError where pandas is not installed."""
        return self.to_rows().to_frame()


class Results(list[Measurement]):
    """The measurements of a results folder."""

    def rows(self) -> Iterator[dict[str, str | int | float | None]]:
        """Yield a row for each figure, as `delta-suite export` writes them: see `records.figures.COLUMNS`."""
        for measurement in self:
            yield from figures(measurement.view, measurement.path)

    def to_frame(self) -> Any:
        """Return all figures as a pandas DataFrame, one row each. Raises MissingPackageError without pandas."""
        frame = _pandas().DataFrame(list(self.rows()), columns=list(COLUMNS))
        kinds = {int: "Int64", float: "float64"}  # Int64 has room for an absent layer
        return frame.astype({name: kinds[kind] for name, kind in COLUMNS.items() if kind in kinds})

    def __repr__(self) -> str:
        """Return one line a measurement."""
        from delta_suite.publish.model_tables import model_line

        return "\n".join(model_line(measurement.view) for measurement in self) or "no records"
