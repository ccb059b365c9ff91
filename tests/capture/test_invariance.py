"""Numbers do not depend on the attention kernel, the padding side of the tokenizer, or the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from delta_suite.capture.calibration import Calibration
from delta_suite.capture.residual import Capture
from delta_suite.capture.tokens import tokenize
from delta_suite.capture.units import Units
from delta_suite.models.blocks import find_decoder
from delta_suite.reduction.reduce import reduce_stream
from delta_suite.reduction.replicates import LayerSpectra

from tests.capture.test_stream import assert_same

TEXTS = tuple(f"document {i}: " + "the quick brown fox " * (i % 5 + 1) + str(i) for i in range(24))


def reduced(directory: Path, device: str = "cpu", side: str = "right", **options: Any) -> list[LayerSpectra]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, **({"dtype": torch.float32} | options)).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side=side)
    sequences = tokenize(Calibration("test", TEXTS), tokenizer, 400, None)
    runs = Capture(model, find_decoder(model), sequences, device=torch.device(device))
    streams = (stream for stream, _ in runs.shards())
    on = [torch.device(device)]
    return reduce_stream(streams, layers=12, tokens=sequences.tokens, units=Units.of(len(TEXTS)), devices=on)["raw"]


def test_attention_kernel(tiny: Path) -> None:
    assert_same(reduced(tiny, attn_implementation="eager"), reduced(tiny, attn_implementation="sdpa"))


def test_padding_side_of_the_tokenizer(tiny: Path) -> None:
    assert_same(reduced(tiny, side="right"), reduced(tiny, side="left"), 1e-6)


def test_bfloat16_is_near_float32_and_says_how_near(tiny: Path) -> None:
    from delta_suite.metrics.estimators import layer_metrics

    full, half = reduced(tiny), reduced(tiny, dtype=torch.bfloat16)
    for one, two in zip(full, half, strict=True):
        exact, rounded = layer_metrics(one.statistics), layer_metrics(two.statistics)
        assert rounded["effective_rank"].value == pytest.approx(exact["effective_rank"].value, rel=0.05)
        share = rounded["rounding_share"].value
        assert share is not None
        assert 1e-9 < share < 1e-3
        assert exact["rounding_share"].value == pytest.approx(share * 2.0**-32, rel=0.1)  # eps 2^-23 against 2^-7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda(tiny: Path) -> None:
    assert_same(reduced(tiny), reduced(tiny, "cuda"))
