"""A model whose stream comes in shards has the sinks, spectra and law of one whose stream is whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from delta_suite.capture.calibration import Calibration
from delta_suite.capture.plan import REFERENCE_DOCUMENTS
from delta_suite.capture.residual import Capture
from delta_suite.capture.sinks import SINK_RATIO, find_sinks
from delta_suite.capture.stream import Memory
from delta_suite.capture.tokens import TokenSequences, tokenize
from delta_suite.capture.units import Units
from delta_suite.errors import DeviceError
from delta_suite.models.blocks import find_decoder
from delta_suite.provenance import Clock
from delta_suite.reduction.law_scores import Law
from delta_suite.reduction.passes import Captured, Passes

from tests.reduction.test_law_memory import assert_same
from tests.tiny import make_tiny

CPU = torch.device("cpu")
DOCUMENTS = 80
LAYERS = 6
PHASES = {"C": (1, 2), "E": (3, 5)}
MOMENTS = 2 * 10 * 48**2 * 8
"""Bytes of the moments of one layer: with and without sinks, ten groups."""
LAW = Memory(1 << 21, disk=1 << 22)
"""Little, so that the law takes many passes."""
ROOMY = Memory(1 << 40)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TokenSequences]:
    """A tiny model, with tokens around six times the median norm, of which later documents have more."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny = make_tiny(tmp_path_factory.mktemp("passes"), layers=LAYERS)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    texts = [
        f"{'fox ' * (i % 7)}document {i}: the quick brown {i * i} {chr(97 + i % 26)} jumps" for i in range(DOCUMENTS)
    ]
    sequences = tokenize(Calibration("test", tuple(texts)), AutoTokenizer.from_pretrained(tiny), 400, None)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[100:] *= torch.linspace(1, 80, len(weight) - 100)[:, None]
    return model, sequences


def measured(
    loaded: tuple[Any, TokenSequences],
    monkeypatch: pytest.MonkeyPatch,
    stream: Memory,
    moments: int = LAYERS,
    **options: Any,
) -> tuple[Captured, Passes]:
    """Measure where the stream may take `stream`, and the moments of shards that of some layers."""
    model, sequences = loaded
    rooms = {0.5: stream, 0.25: Memory(moments * MOMENTS), 0.75: options.pop("law", LAW)}
    monkeypatch.setattr(Memory, "free", classmethod(lambda cls, device, share=0.5: rooms[share]))
    passes = Passes(model, find_decoder(model), sequences, [CPU], Clock())
    return passes.run(PHASES, units=Units.of(DOCUMENTS), **options), passes


@pytest.fixture(scope="module")
def at_once(loaded: tuple[Any, TokenSequences]) -> tuple[Captured, Passes]:
    """What is measured where the stream is whole."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return measured(loaded, monkeypatch, ROOMY)


@pytest.mark.parametrize(
    ("room", "options", "released"),
    [(ROOMY, {}, 1), (ROOMY, {"damage": True}, 0), (ROOMY, {"causes": PHASES}, 0), (None, {}, 0)],
    ids=["at-once", "damage", "causes", "shards"],
)
def test_weights_are_released_before_the_algebra_unless_a_pass_is_to_come(
    loaded: tuple[Any, TokenSequences],
    monkeypatch: pytest.MonkeyPatch,
    room: Memory | None,
    options: dict[str, Any],
    released: int,
) -> None:
    order: list[str] = []
    size = (LAYERS + 1) * 48 * 4 * loaded[1].tokens
    options |= {"with_spectra": False, "law": ROOMY, "release": lambda: order.append("released")}
    measured(loaded, monkeypatch, room or Memory(size // 3), **options)
    assert order == ["released"] * released


@pytest.mark.parametrize(
    ("parts", "moments", "law"),
    [(3, 2, LAW), pytest.param(30, LAYERS, ROOMY, marks=pytest.mark.long)],
    ids=["few", "many"],
)
def test_shards_change_no_figure(
    loaded: tuple[Any, TokenSequences],
    at_once: tuple[Captured, Passes],
    monkeypatch: pytest.MonkeyPatch,
    parts: int,
    moments: int,
    law: Memory,
) -> None:
    size = (LAYERS + 1) * 48 * 4 * loaded[1].tokens
    whole, alone = at_once
    apart, several = measured(loaded, monkeypatch, Memory(size // parts), moments, law=law)
    assert len(whole.storage) == 1
    assert len(apart.storage) >= parts
    (sinks,) = whole.sinks
    assert sinks.large > 20
    assert torch.equal(sinks.dropped, torch.cat([shard.dropped for shard in apart.sinks]))
    assert (sinks.first, sinks.large) == (sum(s.first for s in apart.sinks), sum(s.large for s in apart.sinks))
    for variant, layers in whole.spectra.items():
        for one, other in zip(layers, apart.spectra[variant], strict=True):
            largest = one.statistics.eigenvalues[0]
            assert np.abs(one.statistics.eigenvalues - other.statistics.eigenvalues).max() <= 1e-10 * largest
            assert abs(float(one.directions[0] @ other.directions[0])) > 1 - 1e-10
            assert len(one.resamples[1]) == len(other.resamples[1]) == 10
            for a, b in zip(one.resamples[1], other.resamples[1], strict=True):
                assert a.eigenvalues == pytest.approx(b.eigenvalues, rel=1e-9, abs=1e-10 * largest)
            assert one.statistics.averages.keys() == other.statistics.averages.keys()
            for name, values in one.statistics.averages.items():
                assert values == pytest.approx(other.statistics.averages[name], rel=1e-10, abs=1e-12)
    assert isinstance(whole.law, Law)
    assert isinstance(apart.law, Law)
    assert_same(whole.law, apart.law)
    assert several.clock.seconds.keys() == alone.clock.seconds.keys() == {"capture", "analysis", "law"}


def test_the_law_alone_needs_no_spectra(loaded: tuple[Any, TokenSequences], monkeypatch: pytest.MonkeyPatch) -> None:
    size = (LAYERS + 1) * 48 * 4 * loaded[1].tokens
    whole, _ = measured(loaded, monkeypatch, ROOMY, with_spectra=False, law=ROOMY)
    apart, _ = measured(loaded, monkeypatch, Memory(size // 4), with_spectra=False, law=ROOMY)
    assert whole.spectra == apart.spectra == {}
    assert isinstance(whole.law, Law)
    assert isinstance(apart.law, Law)
    assert_same(whole.law, apart.law)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_law_without_memory_keeps_the_spectra(
    loaded: tuple[Any, TokenSequences], monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    size = (LAYERS + 1) * 48 * 4 * loaded[1].tokens
    captured, _ = measured(loaded, monkeypatch, Memory(-(-size // parts)), law=Memory(1000))
    assert isinstance(captured.law, DeviceError)
    assert "GiB" in str(captured.law)
    assert len(captured.spectra["raw"]) == LAYERS


def test_the_median_is_that_of_the_first_documents(loaded: tuple[Any, TokenSequences]) -> None:
    model, sequences = loaded
    passes = Capture(model, find_decoder(model), sequences, device=CPU, memory=ROOMY)
    ((stream, _),) = passes.shards()
    first = (stream.position > 0) & (stream.document < REFERENCE_DOCUMENTS)
    again = passes.reference_norms()
    assert all(torch.equal(norms, state.norm(dim=1)[first]) for norms, state in zip(again, stream.states, strict=True))
    assert torch.equal(find_sinks(stream, again).dropped, find_sinks(stream).dropped)


def test_later_documents_do_not_move_the_median(loaded: tuple[Any, TokenSequences]) -> None:
    model, sequences = loaded
    ((stream, _),) = Capture(model, find_decoder(model), sequences, device=CPU, memory=ROOMY).shards()
    first = stream.document < REFERENCE_DOCUMENTS
    states = [torch.where(first[:, None], state, 20 * state) for state in stream.states]
    loud = replace(stream, states=states, norms=())
    assert torch.equal(find_sinks(loud).dropped[first], find_sinks(stream).dropped[first])
    assert find_sinks(loud).dropped[~first].float().mean() > 0.9


def test_few_documents_are_all_of_the_reference() -> None:
    """So that figures of at most 64 documents are those that the rule of earlier versions gave."""
    from tests.reduction.test_variants import MANY, with_sinks

    stream = with_sinks(*MANY)
    norms = torch.stack([state.norm(dim=1) for state in stream.states])
    ordinary = stream.position > 0
    large = ordinary & (norms > SINK_RATIO * norms[:, ordinary].median(dim=1, keepdim=True).values).any(dim=0)
    assert torch.equal(find_sinks(stream).dropped, large | (stream.position == 0))
