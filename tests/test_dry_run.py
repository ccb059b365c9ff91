"""`measure --dry-run`: it tells what the measurement then does, loads no weights and writes nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from delta_suite import dry_run
from delta_suite.claims.loader import load_hypotheses
from delta_suite.claims.null_kinds import undecidable_lines
from delta_suite.cli import app
from delta_suite.dry_run import forecast
from delta_suite.errors import CaptureError, DeviceError, ModelUnavailableError
from delta_suite.models import loading
from delta_suite.models.depth import stated_depth
from delta_suite.models.spec import ModelSpec, Requires
from delta_suite.pipeline import Settings, measure
from delta_suite.reduction.law_fit import components
from delta_suite.reduction.law_memory import law_bytes
from typer.testing import CliRunner, Result

DOCUMENTS = 12

HYPOTHESES = Path(__file__).parent.parent / "hypotheses"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(documents=DOCUMENTS, device="cpu", results=tmp_path / "results")


@pytest.fixture
def spectra(settings: Settings) -> Settings:
    """The settings of a measurement without law and boundaries."""
    return replace(settings, parts=frozenset({"spectra"}))


@pytest.fixture
def spec(tiny: Path) -> ModelSpec:
    return ModelSpec(name="tiny", path=tiny)


@pytest.fixture
def small_spec(small: Path) -> ModelSpec:
    return ModelSpec(name="small", path=small)


def shown(*words: object) -> Result:
    return CliRunner().invoke(app, ["measure", "--dry-run", "--device", "cpu", *map(str, words)])


def test_it_says_what_the_measurement_then_comes_to(tiny: Path, spec: ModelSpec, settings: Settings) -> None:
    before = forecast(spec, settings)
    assert before.missing == ("spectra", "boundaries", "law")
    assert before.size is not None
    assert before.like is None
    view = measure(spec, settings).view
    record = view.record
    tokens = record.calibration.tokens
    assert record.provenance.stream is not None
    assert before.size.stream == record.provenance.stream.largest_bytes
    assert before.size.described == (
        f"LlamaForCausalLM, 12 layers x 48; calibration core, {DOCUMENTS} documents, {tokens} tokens"
    )
    file = (tiny / "model.safetensors").stat().st_size  # a header, and 4 bytes for each parameter
    assert before.size.parameters * 4 <= before.size.weights <= file <= before.size.parameters * 4 + 20_000
    assert before.size.law == sum(law_bytes(12, components(tokens // 2, 48), 1))
    after = forecast(spec, settings)
    assert (after.missing, after.size) == ((), None)
    assert forecast(spec.model_copy(update={"phases": {"X": (2, 9)}}), settings).missing == ("law",)
    again = forecast(spec, Settings(documents=DOCUMENTS, device="cpu", results=settings.results, fresh_since=4e9))
    assert again.like is not None
    assert again.like.seconds == record.provenance.seconds
    assert again.like.peak == record.provenance.peak_memory_bytes


def test_it_loads_and_writes_nothing(
    tiny: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load", None)
    result = shown(tiny, "--results-dir", tmp_path / "r")
    assert result.exit_code == 0, result.output
    assert "  would run  spectra, boundaries, law (nothing of it is in the cache)\n" in result.output
    assert "  memory     weights 1.2 MB (288,432 parameters), residual stream 0.1 GB, update law" in result.output
    assert "  time       unknown: no record of this architecture" in result.output
    assert not (tmp_path / "r").exists()
    assert not (own_cache / "measurements").exists()


def test_it_says_which_parts_are_cached(
    small: Path, small_spec: ModelSpec, spectra: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--documents", DOCUMENTS, "--results-dir", spectra.results)
    measure(small_spec, spectra)
    assert "  would run  boundaries, law (the rest is in the cache)\n" in shown(small, *options).output
    monkeypatch.setattr(dry_run, "_sized", None)  # nothing of torch is needed for the rest
    boundaries = shown(small, *options, "--parts", "boundaries")
    assert "  would run  boundaries (the rest is in the cache)\n  time       seconds, " in boundaries.output
    whole = shown(small, *options, "--parts", "spectra")
    assert whole.output.endswith("  would run  nothing: every part is in the cache\n")


def test_a_damaged_entry_is_told_and_stays(small_spec: ModelSpec, spectra: Settings, own_cache: Path) -> None:
    measure(small_spec, spectra)
    (arrays,) = own_cache.glob("measurements/*/arrays.safetensors")
    arrays.write_bytes(b"damaged")
    told = forecast(small_spec, spectra)
    assert told.note == f"the cache entry {arrays.parent} was damaged, and would be measured again"
    assert told.missing == ("spectra",)
    assert arrays.read_bytes() == b"damaged"


def test_time_is_that_of_a_record_of_the_same_kind_alone(
    small_spec: ModelSpec, spectra: Settings, own_cache: Path
) -> None:
    path = measure(small_spec, spectra).path
    shutil.rmtree(own_cache / "measurements")
    seen = forecast(small_spec, spectra).like
    assert seen is not None
    assert seen.path == path
    whole = path.read_text()
    others = {"architecture": "GPT2LMHeadModel", "dtype": "bfloat16", "hardware": "an abacus", "tokens": 9}
    for key, value in others.items():
        record = json.loads(whole)
        next(record[part] for part in ("model", "provenance", "calibration") if key in record[part])[key] = value
        path.write_text(json.dumps(record))
        assert forecast(small_spec, spectra).like is None, key
    path.write_text("{")
    assert forecast(small_spec, spectra).like is None


def test_what_cannot_be_measured_is_refused_with_the_reason(tiny: Path, spec: ModelSpec, settings: Settings) -> None:
    with pytest.raises(CaptureError, match=r"layers_path = 'model\.nowhere'"):
        forecast(spec.model_copy(update={"layers_path": "model.nowhere"}), settings)
    with pytest.raises(DeviceError, match=r"requires 1e\+06 GB"):
        forecast(spec.model_copy(update={"requires": Requires(gpu_memory_gb=1e6)}), settings)


def test_an_encoder_is_refused_and_the_others_are_shown(tiny: Path, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    shutil.copytree(tiny, encoder)
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(config | {"model_type": "bert", "architectures": ["BertModel"]}))
    result = shown(encoder, tiny)
    assert result.exit_code == 1
    assert "cannot be measured: " in result.stderr
    assert "an encoder" in result.stderr
    assert "  would run  spectra, boundaries, law" in result.stdout


def test_a_hub_model_that_is_not_here_would_be_downloaded() -> None:
    result = shown("org/nowhere-to-be-seen")
    assert result.exit_code == 0, result.output
    assert "  would run  a download, then the measurement. " in result.output
    assert "`hf download org/nowhere-to-be-seen`" in result.output


def test_a_control_is_forecast_without_weights(spec: ModelSpec, settings: Settings) -> None:
    control, model = forecast(spec.control(), settings), forecast(spec, settings)
    assert control.size == model.size


def test_an_architecture_that_needs_its_weights_to_be_built_has_no_memory(
    spec: ModelSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    def refusing(self: LlamaForCausalLM, config: object) -> None:
        raise NotImplementedError("no meta tensors, please")

    monkeypatch.setattr(LlamaForCausalLM, "__init__", refusing)
    told = forecast(spec, settings)
    assert told.size is None
    assert "no meta tensors, please" in str(told.note)
    assert told.missing == ("spectra", "boundaries", "law")


def test_a_model_without_a_file_is_refused_as_by_the_measurement(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "empty").mkdir()
    broken = ModelSpec(name="empty", path=tmp_path / "empty")
    with pytest.raises(ModelUnavailableError) as told:
        forecast(broken, settings)
    with pytest.raises(ModelUnavailableError) as refused:
        measure(broken, settings)
    assert str(told.value) == str(refused.value)


# --- claims that a depth cannot decide -------------------------------------------------------------------------


def test_what_a_depth_cannot_decide_is_said_before_anything_is_measured(tiny: Path, spec: ModelSpec) -> None:
    line = (
        "tiny: phase-c/edges-that-no-drift-has would not be measured: this depth cannot decide: 12 layers, and a "
        "comparison with smooth drifts needs 20 layers"
    )
    claims = [
        (f"{hypothesis.id}/{claim.id}", claim)
        for hypothesis in load_hypotheses([HYPOTHESES / "phase_c.toml", HYPOTHESES / "boundaries.toml"])
        for claim in hypothesis.expect
    ]
    assert undecidable_lines(spec, claims) == [line]
    assert undecidable_lines(ModelSpec(name="x", path=tiny, phases={"X": (0, 11)}), claims) == []  # it has no phase C
    assert undecidable_lines(ModelSpec(name="gone", path=tiny / "gone"), claims) == []
    result = CliRunner().invoke(app, ["hypotheses", str(HYPOTHESES), "--check", "--model", str(tiny)])
    assert result.exit_code == 0
    assert "would not be measured: this depth cannot decide: 12 layers have 10 windows of 3" in result.stdout
    assert "a comparison with smooth drifts needs 20 layers" in result.stdout


@pytest.mark.parametrize(
    ("config", "depth"),
    [
        ({"num_hidden_layers": 7}, 7),
        ({"n_layer": 7}, 7),
        ({"text_config": {"num_hidden_layers": 7}}, 7),
        ({"num_hidden_layers": "7"}, None),
        ({"num_hidden_layers": -7}, None),
        ({}, None),
    ],
)
def test_a_depth_is_that_of_the_config(
    tiny: Path, tmp_path: Path, config: dict[str, object], depth: int | None
) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    content = json.loads((copy / "config.json").read_text())
    del content["num_hidden_layers"]
    (copy / "config.json").write_text(json.dumps(content | config))
    assert stated_depth(ModelSpec(name="copy", path=copy)) == depth
