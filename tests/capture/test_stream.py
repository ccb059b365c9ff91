"""Storage, shards, batches and padding change no number."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_suite.capture.calibration import Calibration
from delta_suite.capture.residual import capture
from delta_suite.capture.stream import Memory, plan_shards
from delta_suite.capture.tokens import TokenSequences, tokenize
from delta_suite.models.blocks import find_decoder
from delta_suite.reduction.reduce import reduce_stream
from delta_suite.reduction.replicates import LayerSpectra

CPU = torch.device("cpu")
ROOMY = Memory(device=1 << 40)


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[Any, TokenSequences]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    texts = tuple(f"document {i}: " + "the quick brown fox " * (i % 5 + 1) + str(i) for i in range(24))
    return model, tokenize(Calibration("test", texts), AutoTokenizer.from_pretrained(tiny), 400, None)


def reduced(loaded: tuple[Any, TokenSequences], **options: Any) -> tuple[list[LayerSpectra], list[str]]:
    model, sequences = loaded
    places = []

    def streams() -> Any:
        for stream, certificate in capture(model, find_decoder(model), sequences, device=CPU, **options):
            assert certificate.blocks == 12
            places.append(stream.storage)
            yield stream

    layers = reduce_stream(streams(), layers=12, tokens=sequences.tokens, documents=24)["raw"]
    return layers, places


def assert_same(one: list[LayerSpectra], two: list[LayerSpectra], tolerance: float = 1e-5) -> None:
    for a, b in zip(one, two, strict=True):
        first, second = torch.tensor(a.statistics.eigenvalues), torch.tensor(b.statistics.eigenvalues)
        assert (first - second).abs().max() <= tolerance * first[0]
        for name, (mean, sd) in a.statistics.averages.items():
            assert b.statistics.averages[name] == pytest.approx((mean, sd), rel=tolerance, abs=tolerance)
        assert abs(float(a.directions[0] @ b.directions[0])) > 1 - tolerance


@pytest.mark.parametrize("tokens_per_batch", [1, 64, 300, 100_000])
def test_batch_size_changes_nothing(loaded: tuple[Any, TokenSequences], tokens_per_batch: int) -> None:
    alone, _ = reduced(loaded, tokens_per_batch=1, memory=ROOMY)
    batched, _ = reduced(loaded, tokens_per_batch=tokens_per_batch, memory=ROOMY)
    assert_same(alone, batched)


@pytest.mark.parametrize(
    ("memory", "place"),
    [(Memory(0, host=1 << 40), "host"), (Memory(0, disk=1 << 40), "disk"), (Memory(40_000), "device")],
)
def test_storage_and_shards_change_nothing(loaded: tuple[Any, TokenSequences], memory: Memory, place: str) -> None:
    whole, _ = reduced(loaded, memory=ROOMY)
    other, places = reduced(loaded, memory=memory)
    assert set(places) == {place}
    assert (len(places) > 5) == (place == "device")
    assert_same(whole, other, 1e-12 if place != "device" else 1e-5)


@pytest.mark.parametrize("memory", [ROOMY, Memory(40_000)], ids=["one shard", "several"])
def test_several_devices_reduce_the_same(loaded: tuple[Any, TokenSequences], memory: Memory) -> None:
    model, sequences = loaded
    # Not a generator expression: its variable would hold a shard while the next one is filled.
    streams = map(itemgetter(0), capture(model, find_decoder(model), sequences, device=CPU, memory=memory))
    spread = reduce_stream(streams, layers=12, tokens=sequences.tokens, documents=24, devices=[CPU, CPU, CPU])["raw"]
    assert_same(reduced(loaded, memory=memory)[0], spread, 1e-12)


def test_out_of_memory_halves_the_batch_and_loses_nothing(
    loaded: tuple[Any, TokenSequences], monkeypatch: pytest.MonkeyPatch
) -> None:
    from delta_suite.capture import residual

    sizes, forward = [], residual._forward

    def limited(decoder: Any, batch: Any) -> torch.Tensor:
        sizes.append(batch.ids.numel())
        if batch.ids.numel() > 300:
            raise torch.OutOfMemoryError("not enough")
        return forward(decoder, batch)

    whole, _ = reduced(loaded, memory=ROOMY)
    monkeypatch.setattr(residual, "_forward", limited)
    halved, _ = reduced(loaded, memory=ROOMY)
    assert sizes[0] > 300
    assert sizes[0] > sizes[1]
    assert_same(whole, halved)


@pytest.mark.parametrize(("free", "want"), [(1 << 40, 2048), (6 * 96 * 4 * 100, 100), (0, 1)])
def test_the_size_of_the_first_batch_follows_from_free_memory(
    loaded: tuple[Any, TokenSequences], monkeypatch: pytest.MonkeyPatch, free: int, want: int
) -> None:
    """The widest matrix of the tiny model's blocks has 96 outputs of 4 bytes."""
    from delta_suite.capture import residual

    model, sequences = loaded
    shares: list[float] = []

    def free_memory(device: torch.device, share: float) -> Memory:
        shares.append(share)
        return Memory(free)

    monkeypatch.setattr(Memory, "free", free_memory)
    assert residual.tokens_that_fit(model, find_decoder(model), CPU) == want
    sizes, forward = [], residual._forward

    def seen(decoder: Any, batch: Any) -> torch.Tensor:
        sizes.append(batch.ids.numel())
        return forward(decoder, batch)

    monkeypatch.setattr(residual, "_forward", seen)
    reduced(loaded, memory=ROOMY)
    longest = max(len(ids) for ids in sequences.ids)
    assert max(sizes) <= max(want, longest)
    assert set(shares) == {0.5}  # the other half is the stream's


@pytest.mark.parametrize(("memory", "first"), [(ROOMY, 24), (Memory(120_000), 2)], ids=["one shard", "several"])
def test_a_model_that_takes_no_padded_batch_is_given_one_sequence_at_a_time(
    loaded: tuple[Any, TokenSequences], memory: Memory, first: int
) -> None:
    whole, _ = reduced(loaded, memory=memory)
    asked = []

    def alone(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        asked.append(len(inputs["input_ids"]))
        if asked[-1] > 1:
            raise ValueError("the batch size is not 1")

    handle = find_decoder(loaded[0]).module.register_forward_pre_hook(alone, with_kwargs=True)
    try:
        single, _ = reduced(loaded, memory=memory)
    finally:
        handle.remove()
    assert [count for count in asked if count > 1] == [first]  # refused once, and never asked again
    assert_same(whole, single)


def test_plan_shards() -> None:
    lengths = [50, 30, 20, 20, 5]
    assert list(plan_shards(lengths, 10, CPU, Memory(1250))) == [([0, 1, 2, 3, 4], "device")]
    assert list(plan_shards(lengths, 10, CPU, Memory(100, host=1250))) == [([0, 1, 2, 3, 4], "host")]
    assert list(plan_shards(lengths, 10, CPU, Memory(500))) == [([0], "device"), ([1, 2], "device"), ([3, 4], "device")]
    assert list(plan_shards(lengths, 10, CPU, Memory(1))) == [([i], "device") for i in range(5)]


@pytest.mark.parametrize(
    ("fraction", "want"),
    [(1.0, 50 + 10), (0.6, 30 + 10), (0.2, 10)],
    ids=["all of it", "the rest of what is allowed", "what is held and not used"],
)
def test_no_more_of_a_gpu_than_torch_may_take(fraction: float, want: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 100 bytes: 30 held by torch, 20 of them in use; 50 free, the rest another process has."""
    for name, value in [
        ("mem_get_info", (50, 100)),
        (
            "memory_stats_as_nested_dict",
            {"reserved_bytes": {"all": {"current": 30}}, "allocated_bytes": {"all": {"current": 20}}},
        ),
        ("get_per_process_memory_fraction", fraction),
    ]:
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert Memory.free(torch.device("cuda"), share=1.0).device == want
