"""What `import delta_suite` offers: tables, figures, verdicts and errors of measurements."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import delta_suite as ds
import pytest
from delta_suite import errors

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text("utf-8")


@pytest.fixture(scope="module")
def measured(small: Path, tmp_path_factory: pytest.TempPathFactory) -> ds.Measurement:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTA_SUITE_CACHE", str(tmp_path_factory.mktemp("measured")))
        return ds.measure(small, documents=8, device="cpu", name="small", parts="spectra")


def test_importing_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, delta_suite; print({'torch', 'numpy', 'transformers', 'pydantic'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "set()"


def test_stored_records_need_no_torch() -> None:
    code = "import sys, delta_suite; delta_suite.load; print({'torch', 'transformers'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "set()"


def test_every_public_name_is_there_and_documented() -> None:
    assert set(ds.__all__) <= set(dir(ds))
    for name in ds.__all__:
        assert getattr(ds, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ds.nothing  # noqa: B018


def test_a_measurement_shows_in_a_few_lines(measured: ds.Measurement) -> None:
    lines = repr(measured).splitlines()
    assert lines[0].startswith("small: LlamaForCausalLM, 6 layers x 16; calibration core, 8 documents")
    assert len(lines) < 12
    assert "<table" in measured._repr_html_()


def test_layers_and_phases_are_rows(measured: ds.Measurement) -> None:
    rows = measured.layers("effective_rank")
    assert [row["layer"] for row in rows] == [*range(6)]
    assert rows[3]["effective_rank"] == measured.value("effective_rank", "layer:3")
    phases = measured.phases("intra_cosine", variant="sink_free")
    assert phases[1] == {"phase": "C", "first": 1, "last": 2, "intra_cosine": phases[1]["intra_cosine"]}
    assert phases[1]["intra_cosine"] == measured.value("intra_cosine", "C", variant="sink_free").value
    assert "effective_rank" in repr(rows)
    assert "<table" in rows._repr_html_()


def test_judging_takes_files_and_a_control(measured: ds.Measurement, small: Path, tmp_path: Path) -> None:
    claim = tmp_path / "mine.toml"
    claim.write_text(
        'schema = 1\nid = "mine"\nversion = 1\ntitle = "Mine"\nrationale = "It is."\n'
        '[[expect]]\nid = "above-control"\norigin = "here"\nmetric = "effective_rank"\nscope = "model"\nop = ">="\n'
        'than = { null = "random-weights" }\n'
    )
    control = ds.measure(f"{small}@random-weights", documents=8, device="cpu", parts="spectra")
    assert "NOT MEASURED" in repr(measured.judge(claim))
    assert "NOT MEASURED" not in repr(measured.judge([claim], control=control))
    assert measured.judge().to_rows()[0]["model"] == "small"
    assert re.fullmatch(r"<\S+ on small: [A-Z ]+(, observed \S+)?>", repr(measured.judge(claim)[0]))


def test_a_comparison_is_its_text(measured: ds.Measurement) -> None:
    compared = measured.compare(measured)
    assert repr(compared) == str(compared)
    assert "intra_cosine" in compared
    assert compared._repr_html_().startswith("<pre>")


def test_a_plot_is_a_figure_of_plotly(measured: ds.Measurement) -> None:
    from plotly.graph_objects import Figure

    figure = measured.plot("gamma", variant="sink_free")
    assert isinstance(figure, Figure)
    assert len(figure.data[-1].y) == 6


def test_verify_shows_what_the_command_shows(measured: ds.Measurement, tmp_path: Path) -> None:
    path = measured.save(tmp_path)
    assert repr(ds.verify(tmp_path)) == f"{path}: ok\nrecords: 1, consistent: 1, not: 0"
    path.write_text(path.read_text("utf-8").replace('"documents":8', '"documents":9'), "utf-8")
    checked = ds.verify([path])
    assert not checked.consistent
    assert checked[0].problems
    path.write_text("{", "utf-8")
    assert ds.verify(path)[0].unreadable


def test_verify_measures_again_as_the_command_does(measured: ds.Measurement, small: Path, tmp_path: Path) -> None:
    path = measured.save(tmp_path)
    checked = ds.verify(path, recompute=True, model=str(small), device="cpu")
    assert checked.confirmed, checked
    assert "figures agree within 1e-5, 0 differ" in repr(checked)
    assert not ds.verify(path).confirmed  # nothing was measured
    refused = ds.verify(path, recompute=True, model="nosuch")
    assert refused.consistent
    assert not refused.confirmed
    assert "is not confirmed: " in refused.recomputed[0].line
    with pytest.raises(ds.SuiteError, match="recompute=True"):
        ds.verify(path, device="cpu")


def test_a_calibration_may_be_a_path(small: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("A text of more than a few words, of which a spectrum can be formed.", "utf-8")
    assert ds.measure(small, calibration=tmp_path / "texts.txt", parts="spectra").record.calibration.documents == 1


def test_a_missing_pandas_is_told(measured: ds.Measurement, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    for error in (ds.SuiteError, ImportError):
        with pytest.raises(error, match="pip install pandas"):
            measured.to_frame()


def test_every_error_of_the_suite_has_one_base() -> None:
    classes = [each for _, each in inspect.getmembers(errors, inspect.isclass) if each.__module__ == errors.__name__]
    assert all(issubclass(each, ds.SuiteError) for each in classes)
    assert issubclass(ds.NotMeasuredError, ds.SuiteError)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: m.value("nothing"), "no metric 'nothing'"),
        (lambda m: m.value("gamma", variant="cooked"), "no variant 'cooked'"),
        (lambda m: m.value("gamma", variant=["raw"]), "no variant ['raw']"),
        (lambda m: m.value("gamma", ["C"]), "no scope ['C']"),
        (lambda m: m.value("gamma", over="sum"), "no aggregate 'sum'"),
        (lambda m: m.layers("nothing"), "no metric 'nothing'"),
        (lambda m: m.layers("capture_fraction"), "not of layers"),
        (lambda m: m.plot("capture_fraction"), "not of layers"),
        (lambda m: m.plot("gamma", "cooked"), "no variant 'cooked'"),
        (lambda m: m.compare(m, "centred"), "centred"),
        (lambda m: m.judge("nowhere.toml"), "nowhere.toml"),
        (lambda m: m.value("gamma", "Z") + 1, "has no phase Z"),
        (lambda m: ds.load("nowhere.json"), "nowhere.json"),
        (lambda m: ds.measure("nowhere"), "nowhere"),
        (lambda m: ds.measure("nowhere", name="a\nb"), "cannot be the name"),
        (lambda m: ds.measure("nowhere", phases={"A": (0, 6), "B": (5, 9)}), "overlap"),
        (lambda m: ds.measure("nowhere", phases={"A": "0-6"}), "no pair of layers"),
        (lambda m: ds.measure("nowhere", phases=[1]), "no mapping"),
        (lambda m: ds.measure("nowhere", name=5), "cannot be the name"),
        (lambda m: ds.measure("nowhere", documents=2.5), "--documents is out of bounds"),
        (lambda m: ds.measure("nowhere", device=0), "--device 0 is unknown"),
        (lambda m: ds.measure("nowhere", parts=None), "--parts: None names no parts"),
        (
            lambda m: ds.measure("nowhere", calibration=["a text"]),
            "calibration is list: write a name or a path",
        ),
        (lambda m: m.judge(m), "hypotheses: Measurement is no path"),
        (lambda m: m.judge([m]), "hypotheses: Measurement is no path"),
        (lambda m: ds.verify([m]), "records: Measurement is no path"),
        (lambda m: m.under({"C": (0, 99)}), "reaches past the last layer, 5 of 6"),
        (lambda m: m.compare("nowhere.json"), "other='nowhere.json' is no measurement: ds.load(path)"),
        (lambda m: m.judge(control="nowhere.json"), "control='nowhere.json' is no measurement"),
    ],
)
def test_errors_are_of_the_suite(measured: ds.Measurement, call: object, told: str) -> None:
    with pytest.raises(ds.SuiteError, match=re.escape(told)):
        call(measured)  # type: ignore[operator]


def test_the_examples_of_the_page_run(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, but for the model: the tiny one has its name."""
    pytest.importorskip("pandas")
    (tmp_path / "checkpoint").symlink_to(small)
    (tmp_path / "models.toml").write_text('[models."smollm2-135m-q4"]\npath = "checkpoint"\n')
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert (tmp_path / "results" / "runs").is_dir()
