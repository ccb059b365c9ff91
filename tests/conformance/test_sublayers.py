"""What attention and MLP write in blocks of every shape, against plain hooks on the modules that are known to do so."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from delta_suite.capture.residual import Capture, NotApartError
from delta_suite.capture.stream import Memory
from delta_suite.errors import CertificateError
from delta_suite.models.blocks import find_decoder
from torch import Tensor, nn

from tests.conformance.build import build
from tests.conformance.check import captured, captured_apart, difference, documents, sequences
from tests.conformance.test_families import architecture

ROOM = Memory(1 << 30)

MODULES: dict[str, tuple[str, str, float]] = {
    "llama": ("self_attn", "mlp", 1.0),
    "gpt_neox": ("attention", "mlp", 1.0),  # in parallel
    "gptj": ("attn", "mlp", 1.0),  # in parallel, behind one norm
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm", 1.0),  # norms behind both
    "granite": ("self_attn", "mlp", 0.25),  # both scaled before they are added
    "qwen2_moe": ("self_attn", "mlp", 1.0),  # experts and a shared one
}
"""The modules whose outputs, times a factor, attention and MLP write, by type."""


def plain_writes(model: Any, modules: tuple[str, str, float]) -> dict[str, list[Tensor]]:
    """Return what attention and MLP write in each block, by hooks on the modules, one document at a time."""
    *names, scale = modules
    writes: dict[str, list[list[Tensor]]] = {"attention": [], "mlp": []}
    blocks = find_decoder(model).blocks
    handles = []
    for key, name in zip(writes, names, strict=True):
        for block in blocks:
            kept: list[Tensor] = []
            writes[key].append(kept)

            def keep(module: Any, args: Any, output: Any, kept: list[Tensor] = kept) -> None:
                kept.append((output[0] if isinstance(output, tuple) else output).reshape(-1, 64) * scale)

            handles.append(block.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        for text in documents():
            model(input_ids=text[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {key: [torch.cat(kept) for kept in layers] for key, layers in writes.items()}


@pytest.mark.parametrize("name", MODULES)
def test_writes_are_those_of_the_modules(name: str) -> None:
    model = build(architecture(name), **({"residual_multiplier": 0.25} if name == "granite" else {}))
    stream, _, why_not = captured_apart(model, find_decoder(model))
    assert why_not == ""
    assert set(stream.parallel) == {name in {"gpt_neox", "gptj"}}
    expected = plain_writes(model, MODULES[name])
    whole = [stream.step(layer)[1] for layer in range(4)]
    for write in ("attention", "mlp"):
        view = stream.of_write(write)
        assert difference([view.step(layer)[1] for layer in range(4)], expected[write]) < 2e-6, write
    parts = [sum(stream.of_write(write).step(layer)[1] for write in ("attention", "mlp")) for layer in range(4)]
    assert difference(parts, whole) < 2e-6


def test_the_states_are_the_same_with_the_writes() -> None:
    model = build(architecture("llama"))
    (alone, certificate), (apart, also, _) = captured(model), captured_apart(model, find_decoder(model))
    assert all(torch.equal(one, other) for one, other in zip(alone.states, apart.states, strict=True))
    assert certificate == also


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "block 0 (MambaBlock) has one sublayer, mixer"),
        ("xlm", "a block of XLMModel is made of several modules"),
    ],
)
def test_a_block_without_two_sublayers_says_so(name: str, reason: str) -> None:
    model = build(architecture(name))
    stream, _, why_not = captured_apart(model, find_decoder(model))
    assert (why_not, stream.middles) == (reason, ())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another module": ({"mlp": "input_layernorm"}, "what block 2 adds behind the state between its sublayers differs"),
    "never runs": ({"place": "idle"}, "block 2: idle did not run"),
    "another width": ({"place": "mlp.gate_proj", "side": "output"}, "block 2: block 2 (LlamaDecoderLayer): its state"),
}
"""What the probe might have said of block 2, and the reason why the run finds it wrong."""


@pytest.mark.parametrize("case", WRONG)
def test_where_the_run_is_not_what_the_probe_saw_the_blocks_are_measured_alone(case: str) -> None:
    model = build(architecture("llama"))
    decoder = find_decoder(model)
    decoder.blocks[2].add_module("idle", nn.Identity())
    runs = Capture(model, decoder, sequences(documents()), device=torch.device("cpu"), memory=ROOM, writes=True)
    assert isinstance(runs.sublayers, tuple)
    change, reason = WRONG[case]
    wrong = [replace(parts, **change) if layer == 2 else parts for layer, parts in enumerate(runs.sublayers)]
    runs.sublayers = tuple(wrong)
    ((stream, _),) = runs.shards()
    assert stream.middles == ()
    assert reason in str(runs.sublayers)
    assert difference(stream.states, captured(model)[0].states) == 0.0
    runs.sublayers = tuple(wrong)
    with pytest.raises(NotApartError, match=re.escape(reason)):
        next(runs.updates(range(4), writes=True))


def test_a_model_that_is_refused_is_refused_for_its_own_reason() -> None:
    """CPM-Ant's sublayers cannot be told apart either, and that is not what its user needs to hear."""
    model = build(architecture("cpmant"))
    with pytest.raises(CertificateError, match="causality fails"):
        captured_apart(model, find_decoder(model))


def test_several_shards_hold_the_same_writes() -> None:
    model = build(architecture("gpt_neox"))
    decoder = find_decoder(model)
    whole, _, _ = captured_apart(model, decoder)
    states, layer = 4 * 64 * 5, 4 * 64 * 3  # bytes of a token: of all states, and around one block with its middle
    size = states * sum(len(text) for text in documents())
    runs = Capture(model, decoder, sequences(documents()), device=torch.device("cpu"), memory=Memory(size), writes=True)
    assert runs.whole
    assert not runs.keeps_middles  # there is room for the states alone
    ((alone, _),) = runs.shards()
    assert alone.middles == ()
    runs.memory = Memory(layer * 24)
    shards = list(runs.updates([1], writes=True))
    assert len(shards) > 1
    for write in ("attention", "mlp"):
        together = torch.cat([shard.of_write(write).step(1)[1] for shard in shards])
        assert torch.equal(together, whole.of_write(write).step(1)[1])
