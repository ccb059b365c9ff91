"""A model that accelerate splits over devices and disk gives the same stream as the model in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from delta_suite.capture.calibration import load_calibration
from delta_suite.capture.residual import Capture
from delta_suite.capture.tokens import tokenize
from delta_suite.models.blocks import find_decoder

CPU = torch.device("cpu")


def states(model: Any, directory: Path, device: torch.device = CPU) -> list[torch.Tensor]:
    from transformers import AutoTokenizer

    sequences = tokenize(load_calibration("seed"), AutoTokenizer.from_pretrained(directory), 400, None)
    ((stream, certificate),) = Capture(model, find_decoder(model), sequences, device=device).shards()
    assert certificate.final_norm == ("norm",)
    return [state.float().cpu() for state in stream.states]


def load(directory: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


def assert_equal(one: list[torch.Tensor], two: list[torch.Tensor], tolerance: float = 0.0) -> None:
    for a, b in zip(one, two, strict=True):
        assert (a - b).abs().max() <= tolerance * a.abs().max()


def test_weights_read_from_disk_layer_by_layer(tiny: Path, tmp_path: Path) -> None:
    from accelerate import disk_offload

    offloaded = load(tiny)
    disk_offload(offloaded, str(tmp_path), execution_device=CPU)
    assert next(offloaded.model.layers[3].parameters()).is_meta
    assert_equal(states(load(tiny), tiny), states(offloaded, tiny))


def test_some_layers_on_disk(tiny: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "disk" if layer in (4, 5, 11) else "cpu" for layer in range(12)}
    split = load(tiny, device_map=places, offload_folder=str(tmp_path))
    assert next(split.model.layers[5].parameters()).is_meta
    assert_equal(states(load(tiny), tiny), states(split, tiny))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_split_between_a_gpu_and_the_host(tiny: Path) -> None:
    places: dict[str, Any] = {"model.embed_tokens": 0, "model.norm": "cpu", "model.rotary_emb": 0, "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": 0 if layer < 6 else "cpu" for layer in range(12)}
    gpu = torch.device("cuda:0")
    assert_equal(states(load(tiny).to(gpu), tiny, gpu), states(load(tiny, device_map=places), tiny, gpu), 1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_split_over_two_gpus(tiny: Path) -> None:
    places: dict[str, Any] = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    places |= {f"model.layers.{layer}": 0 if layer < 6 else 1 for layer in range(12)}
    gpu = torch.device("cuda:0")
    assert_equal(states(load(tiny).to(gpu), tiny, gpu), states(load(tiny, device_map=places), tiny, gpu), 1e-6)
