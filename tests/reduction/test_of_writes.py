"""Spectra of what attention and MLP write: of planted streams with known parts, and of one that comes in shards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from delta_suite.capture.sinks import find_sinks
from delta_suite.capture.stream import Memory, ResidualStream
from delta_suite.capture.tokens import TokenSequences
from delta_suite.capture.units import Units
from delta_suite.errors import DeviceError
from delta_suite.models.blocks import find_decoder
from delta_suite.provenance import Clock
from delta_suite.reduction.passes import Captured, Passes
from delta_suite.reduction.reduce import reduce_stream
from delta_suite.reduction.variants import VARIANTS, WRITE_VARIANTS

from tests.reduction.test_passes import CPU, DOCUMENTS, MOMENTS, loaded
from tests.reduction.test_passes import LAYERS as BLOCKS

__all__ = ["loaded"]  # the fixture of that module, used here

LAYERS, HIDDEN, TOKENS = 3, 16, 40 * 12
BYTES = {"states": (BLOCKS + 1) * 48 * 4, "middles": BLOCKS * 48 * 4}
"""Bytes of a token of the tiny model."""


@pytest.mark.parametrize("parallel", [False, True])
def test_planted_parts_are_found_apart(parallel: bool) -> None:
    """The MLPs share one direction, and attention has one in each layer that hides it in the sum."""
    draw = np.random.default_rng(0)
    axes = np.linalg.qr(draw.standard_normal((HIDDEN, HIDDEN)))[0].T
    states = [torch.tensor(draw.standard_normal((TOKENS, HIDDEN)), dtype=torch.float32)]
    planted: dict[str, list[np.ndarray]] = {"attention": [], "mlp": []}
    middles = []
    for layer in range(LAYERS):
        for write, axis, size in (("attention", axes[1 + layer], 8.0), ("mlp", axes[0], 3.0)):
            wrote = size * draw.standard_normal((TOKENS, 1)) * axis + 0.3 * draw.standard_normal((TOKENS, HIDDEN))
            planted[write].append(wrote.astype(np.float32).astype(np.float64))
        a, m = (torch.tensor(planted[write][layer], dtype=torch.float32) for write in planted)
        middles.append(m if parallel else states[-1] + a)
        states.append(states[-1] + a + m)
    document = torch.arange(TOKENS) // 12
    kept = torch.ones(TOKENS, dtype=torch.bool)
    stream = ResidualStream(states, document, torch.arange(TOKENS) % 12, kept, "device", middles, (parallel,) * LAYERS)
    sinks = find_sinks(stream)
    for write, layers in planted.items():
        variants = [VARIANTS[f"sink_free.{write}"], VARIANTS[f"centred.{write}"]]
        spectra = reduce_stream(
            [stream.of_write(write)],  # type: ignore[arg-type]
            layers=LAYERS,
            tokens=TOKENS,
            units=Units.of(40),
            variants=variants,
            sinks=lambda _: sinks,
        )
        for layer, wrote in enumerate(layers):
            rows = wrote[~sinks.dropped.numpy()]
            for variant, taken in zip(variants, (rows, rows - rows.mean(axis=0)), strict=True):
                _, values, directions = np.linalg.svd(taken, full_matrices=False)
                found = spectra[variant.name][layer]
                assert found.statistics.eigenvalues == pytest.approx(values**2, rel=2e-5)
                assert abs(found.directions[0].numpy() @ directions[0]) > 1 - 1e-9
                axis = axes[0] if write == "mlp" else axes[1 + layer]
                assert abs(found.directions[0].numpy() @ axis) > 0.99
        whole = reduce_stream([stream], layers=LAYERS, tokens=TOKENS, units=Units.of(40))["raw"]
        assert all(abs(found.directions[0].numpy() @ axes[0]) < 0.5 for found in whole)


def measured(
    loaded: tuple[Any, TokenSequences], monkeypatch: pytest.MonkeyPatch, stream: int, moments: int = BLOCKS
) -> tuple[Captured, Passes]:
    """Measure blocks and writes where the stream may take this many bytes a token."""
    model, sequences = loaded
    rooms = {0.5: Memory(stream * sequences.tokens), 0.25: Memory(moments * MOMENTS), 0.75: Memory(1 << 23)}
    monkeypatch.setattr(Memory, "free", classmethod(lambda cls, device, share=0.5: rooms[share]))
    passes = Passes(model, find_decoder(model), sequences, [CPU], Clock(), writes=True)
    return passes.run(None, units=Units.of(DOCUMENTS)), passes


def test_shards_change_no_figure_of_a_write(
    loaded: tuple[Any, TokenSequences], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = BYTES["states"] + BYTES["middles"]
    whole, once = measured(loaded, monkeypatch, both)
    again, twice = measured(loaded, monkeypatch, BYTES["states"])
    apart, several = measured(loaded, monkeypatch, BYTES["states"] // 3, moments=2)
    assert (once.capture.keeps_middles, twice.capture.keeps_middles, several.capture.keeps_middles) == (1, 0, 0)
    assert [len(captured.storage) > 1 for captured in (whole, again, apart)] == [False, False, True]
    # Room for the writes changes nothing of the blocks: the stream is whole with and without them.
    for variant, layers in whole.spectra.items():
        for one, other in zip(layers, again.spectra[variant], strict=True):
            assert np.array_equal(one.statistics.eigenvalues, other.statistics.eigenvalues)
    assert isinstance(whole.writes, dict)
    assert whole.writes.keys() == WRITE_VARIANTS.keys()
    for captured in (again, apart):
        assert isinstance(captured.writes, dict)
        assert captured.apart is not None
        for variant, layers in whole.writes.items():
            for one, other in zip(layers, captured.writes[variant], strict=True):
                largest = one.statistics.eigenvalues[0]
                assert np.abs(one.statistics.eigenvalues - other.statistics.eigenvalues).max() <= 1e-10 * largest
                assert abs(float(one.directions[0] @ other.directions[0])) > 1 - 1e-10
    assert once.clock.seconds.keys() == several.clock.seconds.keys() == {"capture", "analysis", "writes"}


def test_writes_without_memory_keep_the_spectra(
    loaded: tuple[Any, TokenSequences], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(Passes, "_reduced_write", out_of_memory)
    captured, _ = measured(loaded, monkeypatch, BYTES["states"] + BYTES["middles"])
    assert isinstance(captured.writes, DeviceError)
    assert "leave out the claims about attention and MLP apart" in str(captured.writes)
    assert len(captured.spectra["raw"]) == BLOCKS
