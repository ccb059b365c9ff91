"""Controls of architectures whose initialisers differ: each parameter is distributed as the class itself draws it."""

from __future__ import annotations

import pytest
import torch
import transformers
from delta_suite.models.control import initialise
from scipy.stats import ks_2samp

from tests.conformance.build import tiny_config
from tests.conformance.test_families import architecture

VARIED = [
    "gemma3_text",  # norms around zero
    "gpt2",  # its own scale for what writes into the stream
    "gpt_oss",  # experts in one tensor
    "falcon_h1",  # state spaces
    "rwkv",  # orthogonal matrices, which are read
    "roberta",  # pads a bias that was drawn
    "t5:AutoModelForSeq2SeqLM",  # tied weights of two stacks
    "minicpmv4_7:AutoModelForImageTextToText",
]


@pytest.mark.parametrize("name", VARIED)
def test_a_control_is_distributed_as_its_class_draws(name: str) -> None:
    kind = architecture(name)
    auto_class = getattr(transformers, kind.mapping)
    torch.manual_seed(0)
    plain = auto_class.from_config(tiny_config(kind))
    control = initialise(auto_class, tiny_config(kind), device="cpu", dtype=torch.float32, offload_folder=None)
    expected, found = (dict(model.named_parameters()) for model in (plain, control))  # tied ones once
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert found[key].shape == tensor.shape
        before, now = (parameters[key].detach().flatten() for parameters in (expected, found))
        if before.numel() > 1 and before.std() > 0:
            assert ks_2samp(before.numpy(), now.numpy()).pvalue > 1e-5, key
            assert abs(int((before == 0).sum() - (now == 0).sum())) <= 0.02 * len(now), key
        elif before.numel() > 1:
            assert torch.equal(before, now), key
        assert now.isfinite().all(), key
    buffers = dict(control.named_buffers())
    for key, tensor in plain.named_buffers():
        assert torch.equal(tensor, buffers[key]), key
