"""Storage, shards, batches and padding change no number."""

from __future__ import annotations

from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_suite.capture import residual
from delta_suite.capture.calibration import Calibration
from delta_suite.capture.plan import plan_batches, planned_tokens
from delta_suite.capture.residual import Capture
from delta_suite.capture.stream import Memory, ResidualStream, Storage, StreamWriter, plan_shards
from delta_suite.capture.tokens import TokenSequences, tokenize
from delta_suite.capture.units import Units
from delta_suite.errors import CaptureError, DeviceError
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
        for stream, certificate in Capture(model, find_decoder(model), sequences, device=CPU, **options).shards():
            assert certificate.blocks == 12
            places.append(stream.storage)
            yield stream

    layers = reduce_stream(streams(), layers=12, tokens=sequences.tokens, units=Units.of(24))["raw"]
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
    streams = map(itemgetter(0), Capture(model, find_decoder(model), sequences, device=CPU, memory=memory).shards())
    spread = reduce_stream(streams, layers=12, tokens=sequences.tokens, units=Units.of(24), devices=[CPU, CPU, CPU])[
        "raw"
    ]
    assert_same(reduced(loaded, memory=memory)[0], spread, 1e-12)


def test_out_of_memory_halves_the_batch_and_loses_nothing(
    loaded: tuple[Any, TokenSequences], monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_the_record_of_a_halved_batch(loaded: tuple[Any, TokenSequences], monkeypatch: pytest.MonkeyPatch) -> None:
    model, sequences = loaded
    forward, failed = residual._forward, []

    def once(decoder: Any, batch: Any) -> torch.Tensor:
        if not failed:
            failed.append(batch.ids.numel())
            raise torch.OutOfMemoryError("not enough")
        return forward(decoder, batch)

    monkeypatch.setattr(residual, "_forward", once)
    passes = Capture(model, find_decoder(model), sequences, device=CPU, memory=ROOMY)
    ran = batches_of(monkeypatch)
    ((one, _),) = passes.shards()
    assert (passes.planned_tokens, passes.batch_tokens) == (2048, failed[0] // 2)
    halved = ran[1:]
    ran.clear()
    ((two, _),) = passes.shards()  # another pass runs the same batches, so that it gives the same states
    assert ran == halved
    assert all(torch.equal(a, b) for a, b in zip(one.states, two.states, strict=True))


def test_a_sequence_that_does_not_fit_is_an_error_of_the_device(
    loaded: tuple[Any, TokenSequences], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(decoder: Any, batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("not enough")

    monkeypatch.setattr(residual, "_forward", never)
    with pytest.raises(DeviceError, match=r"out of memory on cpu with a single sequence of .* tokens\. Use a larger"):
        reduced(loaded, memory=ROOMY)


@pytest.mark.parametrize("room", [3, 7, 40])
def test_the_states_do_not_depend_on_the_shards(loaded: tuple[Any, TokenSequences], room: int) -> None:
    """Bit for bit: shards keep parts of the same batches."""
    model, sequences = loaded
    size = 13 * 48 * 4 * sequences.tokens
    ((whole, _),) = Capture(model, find_decoder(model), sequences, device=CPU, memory=ROOMY).shards()
    runs = Capture(model, find_decoder(model), sequences, device=CPU, memory=Memory(size // room))
    shards = [stream for stream, _ in runs.shards()]
    assert len(shards) >= min(room, 20)
    for layer, state in enumerate(whole.states):
        assert torch.equal(state, torch.cat([shard.states[layer] for shard in shards]))
    for name in ("document", "position", "kept"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(shard, name) for shard in shards]))


def test_the_states_around_some_blocks_come_again(loaded: tuple[Any, TokenSequences]) -> None:
    model, sequences = loaded
    size = 13 * 48 * 4 * sequences.tokens
    passes = Capture(model, find_decoder(model), sequences, device=CPU, memory=Memory(size // 3))
    assert len(list(passes.shards())) >= 3
    ((whole, _),) = Capture(model, find_decoder(model), sequences, device=CPU, memory=ROOMY).shards()
    (part,) = passes.updates([3, 11])  # four states of 13 fit at once
    assert part.nbytes <= size // 3
    for layer in (3, 11):
        for one, two in zip(part.step(layer), whole.step(layer), strict=True):
            assert torch.equal(one, two)
    assert [len(state) > 0 for state in part.states] == [layer in (3, 4, 11, 12) for layer in range(13)]


@pytest.mark.parametrize("free", [0, 1 << 20, 1 << 40])
def test_the_batches_do_not_follow_from_free_memory(
    loaded: tuple[Any, TokenSequences], monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    model, sequences = loaded
    monkeypatch.setattr(Memory, "free", lambda device, share=0.5: Memory(free))
    assert residual.planned_batch(model, find_decoder(model), CPU) == 2048
    ran = batches_of(monkeypatch)
    for _ in Capture(model, find_decoder(model), sequences, device=CPU).shards():
        pass
    assert set(ran) == set(plan_batches([len(ids) for ids in sequences.ids], 2048))


def batches_of(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """Return a list that receives the sequences of each batch that runs."""
    ran: list[range] = []
    batch = residual.batch_of

    def seen(sequences: TokenSequences, together: range, *rest: Any) -> Any:
        ran.append(together)
        return batch(sequences, together, *rest)

    monkeypatch.setattr(residual, "batch_of", seen)
    return ran


def test_a_wide_model_has_smaller_batches() -> None:
    """The figures that CHANGELOG and records rely on: no batch of a usual model is smaller for it."""
    assert planned_tokens("cuda", 2 * 28672) == 16384  # Llama-70B
    assert planned_tokens("cuda", 2 * 10 * 28672) == 1872
    assert planned_tokens("cpu", 4 * 1536) == 2048


@pytest.mark.parametrize("memory", [ROOMY, Memory(120_000)], ids=["one shard", "several"])
def test_a_model_that_takes_no_padded_batch_is_given_one_sequence_at_a_time(
    loaded: tuple[Any, TokenSequences], memory: Memory
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
    assert [count for count in asked if count > 1] == [24]  # refused once, and never asked again
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


@pytest.mark.parametrize("storage", ["device", "disk"])
def test_norms_taken_as_states_come_are_those_of_the_stored_states(storage: Storage) -> None:
    states = [torch.randn(7, 16, dtype=torch.bfloat16) for _ in range(3)]
    writer = StreamWriter(5, storage, norms=True)
    for rows in (torch.tensor([0, 2, 6]), torch.tensor([1, 5])):
        writer.range = (writer.filled, writer.filled + len(rows))
        for layer, state in enumerate(states):
            writer.write(layer, state, rows)
        writer.filled += len(rows)
    writer.finish()
    document = torch.zeros(5, dtype=torch.int64)
    stream = ResidualStream(writer.states, document, document, document == 0, storage, norms=writer.norms or ())
    for layer, state in enumerate(states):
        expected = state[[0, 2, 6, 1, 5]].double().norm(dim=1)
        torch.testing.assert_close(stream.row_norms(layer).double(), expected, rtol=1e-6, atol=0.0)
        assert torch.equal(stream.row_norms(layer), replace(stream, norms=()).row_norms(layer))
    stream.require_finite()
    writer.range = (2, 3)
    writer.write(1, torch.full((1, 16), torch.inf, dtype=torch.bfloat16))
    broken = replace(stream, norms=writer.norms or ())
    with pytest.raises(CaptureError, match="first at h_1"):
        broken.require_finite()
    writer.write(1, torch.full((1, 16), 1e30, dtype=torch.bfloat16))
    with pytest.raises(CaptureError, match=r"too large: at h_1 .* reaches 1e\+30"):
        replace(stream, norms=writer.norms or ()).require_finite()
