"""The whole pipeline on a tiny checkpoint against the states of transformers and the plainly written reference."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from delta_suite.capture.calibration import load_calibration
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Settings, measure
from delta_suite.records.cache import Cache
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.reference import layer_figures, phase_figures


def reference_states(directory: Path) -> list[np.ndarray]:
    """Return h_0 .. h_N as the reference takes them; the last one is raw, because the final norm is removed."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    model.model.norm = torch.nn.Identity()
    encoded = tokenizer(load_calibration("seed").documents[0], return_tensors="pt", truncation=True, max_length=2048)
    with torch.no_grad():
        states = model(**encoded, output_hidden_states=True, use_cache=False).hidden_states
    return [state[0, 1:].numpy() for state in states]


def test_every_figure_of_the_reference_on_a_tiny_model(tiny: Path, tmp_path: Path) -> None:
    states = reference_states(tiny)
    settings = Settings(calibration="seed", results=tmp_path, device="cpu", cache=Cache(tmp_path / "cache"))
    measured = measure(ModelSpec(name="tiny", path=tiny), settings).view
    assert measured.record.calibration.tokens == len(states[0])
    figures = [layer_figures(before, after) for before, after in pairwise(states)]
    for layer, expected in enumerate(figures):
        for name, estimate in measured.layers[layer].metrics["raw"].items():
            if name in expected:
                assert estimate.value == pytest.approx(expected[name], rel=1e-4, abs=1e-6), (layer, name)
    directions = [layer["directions"] for layer in figures]
    assert set(measured.record.scopes) == {"A", "C", "D", "E"}
    for phase, scope in measured.record.scopes.items():
        expected = phase_figures(directions, list(range(scope.layers[0], scope.layers[1] + 1)))
        for name, value in expected.items():
            estimate = scope.metrics["raw"][name]
            if estimate.value is not None:
                assert estimate.value == pytest.approx(value, rel=1e-3, abs=1e-4), (phase, name)
