"""Weights that are zero: they are measured, and the user is told of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from delta_suite.models.spec import ModelSpec
from delta_suite.models.zeros import zero_weights
from delta_suite.pipeline import Settings, measure
from delta_suite.records.cache import Cache
from torch import nn

from tests.models.test_gguf import model_of, write
from tests.models.test_loading import loaded
from tests.tiny import QUICK


def settings(folder: Path) -> Settings:
    return Settings(**QUICK, results=folder / "results", cache=Cache(folder / "cache"))


def zero_filled(path: Path, share: float) -> None:
    """Leave the first part of a file as it is, and zeros in place of the rest, as a broken download does."""
    size = path.stat().st_size
    os.truncate(path, int(size * share))
    os.truncate(path, size)


def test_a_zero_filled_file_is_told_of_when_it_is_measured_and_again_from_the_cache(
    llama: Path, tmp_path: Path
) -> None:
    zero_filled(llama / "model.safetensors", 0.6)
    spec = ModelSpec(name="tiny", path=llama)
    first, again = measure(spec, settings(tmp_path)), measure(spec, settings(tmp_path))
    assert [first.cached, again.cached] == [False, True]
    zero = first.view.record.provenance.zero_weights or ()
    assert "model.layers.9.mlp.down_proj.weight" in zero  # the last ones in the file
    assert "model.layers.0.mlp.down_proj.weight" not in zero
    told = f"tiny: {len(zero)} weight matrices are zero, in whole or in at least one of 8 rows: {zero[0]}, "
    for outcome in (first, again):
        (note,) = outcome.notes
        assert note.startswith(told)
        assert note.endswith("If they are not meant, copy or download the weights again.")


def test_a_whole_file_and_a_control_are_told_nothing_of(llama: Path) -> None:
    assert loaded(llama).zero_weights == ()
    assert loaded(llama, spec={"random_weights": True}).zero_weights == ()


def test_a_zero_filled_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delta_suite.models.loading.load_tokenizer", lambda spec, files: None)
    write(tmp_path / "m.gguf", model_of())
    assert loaded(tmp_path).zero_weights == ()
    zero_filled(tmp_path / "m.gguf", 0.7)
    assert "model.layers.1.mlp.down_proj.weight" in loaded(tmp_path).zero_weights


@pytest.mark.parametrize(
    ("rows", "zero", "named"),
    [(64, range(64), True), (64, range(56, 64), True), (64, range(57, 64), False), (64, range(0, 64, 8), True)],
    ids=["all", "an eighth at the end", "less", "an eighth here and there"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_which_zeros_are_named(rows: int, zero: range, named: bool, dtype: torch.dtype) -> None:
    weight = torch.ones(rows, 3)
    weight[list(zero)] = 0.0
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(weight.to(dtype), requires_grad=False))
    assert zero_weights(module) == (("weight",) if named else ())


def test_vectors_and_parameters_that_are_not_here_are_passed_over() -> None:
    module = nn.LayerNorm(16)
    nn.init.zeros_(module.weight)
    assert zero_weights(module) == ()
    assert zero_weights(nn.Linear(16, 16, device="meta")) == ()
