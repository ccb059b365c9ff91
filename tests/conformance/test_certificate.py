"""The certificate fails when it should, and its error names the place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from delta_suite.capture.batches import batch_of
from delta_suite.capture.stream import StreamWriter
from delta_suite.capture.tap import Tap
from delta_suite.errors import CaptureError, CertificateError
from delta_suite.models.blocks import find_decoder
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conformance.check import captured, difference, documents, sequences
from tests.conformance.toy import (
    Block,
    DemandingBlock,
    InPlaceBlock,
    ListBlock,
    NoisyNorm,
    OverflowingNorm,
    Toy,
    UnseenBlock,
    WideningBlock,
)


def plain_states(model: Toy) -> list[Tensor]:
    """Return h_0 .. h_4 of all documents, computed without hooks and without writing in place."""
    states = [model.embed(torch.cat(documents()))]
    for block in model.layers:
        states.append(states[-1] + torch.tanh(block.update(states[-1])))
    return states


@pytest.mark.parametrize("blocks", [Block, InPlaceBlock, ListBlock])
def test_blocks_may_write_into_their_input_or_return_a_list(blocks: type[Block]) -> None:
    model = Toy(blocks=blocks)
    stream, certificate = captured(model)
    with torch.no_grad():
        assert difference(stream.states, plain_states(model)) < 1e-6
    assert certificate.final_norm == ("norm",)


def fails(model: Toy, *texts: str) -> None:
    with pytest.raises(CertificateError) as caught:
        captured(model)
    for text in texts:
        assert text in str(caught.value)


def touch(x: Tensor, block: int) -> Tensor:
    if block == 2:
        x = x.clone()
        x[:, 1, 5] += 1e-3
    return x


def touch_in_place(x: Tensor, block: int) -> Tensor:
    if block == 2:
        x[:, 1, 5] += 1e-3
    return x


@pytest.mark.parametrize("between", [touch, touch_in_place])
def test_something_between_the_blocks(between: Any) -> None:
    fails(Toy(between=between), "continuity fails at layer 2", "differs from the output of block 1 by up to 0.00")


def test_the_same_values_in_another_tensor_are_the_same_state() -> None:
    captured(Toy(between=lambda x, block: x.clone()))


def test_a_factor_is_divided_out_only_where_it_is_exact() -> None:
    _, certificate = captured(Toy(between=lambda x, block: x / 2 if block == 3 else x))
    assert certificate.identities[2].says.endswith("times an exact factor that is divided out (0.5 before block 3)")
    fails(Toy(between=lambda x, block: x / 3 if block == 3 else x), "continuity fails at layer 3")


def test_a_hook_of_someone_else_between_the_blocks() -> None:
    model = Toy()
    model.layers[1].register_forward_pre_hook(lambda block, args: (args[0] + 0.25,))
    fails(model, "continuity fails at layer 1", "by up to 0.25")


@pytest.mark.parametrize(
    ("order", "text"),
    [
        ((0, 2, 3), "fire count fails at block 1 (Block): it is passed over, and block 2 (Block) runs in its place"),
        ((0, 1, 2), "fire count fails at block 3: its hook fired 0 times in 1 forward passes"),
        ((0, 1, 1, 2, 3), "fire count fails at block 1 (Block): it runs again after block 1, in one forward pass"),
        ((0, 1, 2, 3, 0), "fire count fails at block 0 (Block): it runs again after block 3, in one forward pass"),
        ((), "fire count fails at block 0"),
    ],
)
def test_blocks_left_out_or_run_twice(order: tuple[int, ...], text: str) -> None:
    fails(Toy(order=order), text)


def test_a_block_that_is_listed_twice() -> None:
    model = Toy()
    model.layers[3] = model.layers[1]
    with pytest.raises(CaptureError, match=r"blocks 1 and 3 of Toy \(layers\) are one and the same module"):
        find_decoder(model)


def test_a_block_that_was_not_counted_but_runs() -> None:
    model = Toy()
    model.layers[2] = DemandingBlock()
    with pytest.raises(CaptureError) as caught:
        captured(model)
    assert "block 2 of layers (DemandingBlock) runs on text, but was not counted as a layer" in str(caught.value)
    assert 'set layers_path = "layers" in models.toml' in str(caught.value)
    assert captured(model, find_decoder(model, "layers"))[1].blocks == 4


def test_hooks_that_do_not_fire() -> None:
    model = Toy()
    model.layers[2] = UnseenBlock()
    fails(model, "fire count fails at block 2 (UnseenBlock): it is passed over, and block 3 (Block) runs in its place")
    fails(
        Toy(blocks=UnseenBlock), "fire count fails at block 0: its hook fired 0 times in 1 forward passes", "compiled"
    )


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_run_eagerly(in_place: bool) -> None:
    """Compiled code would ignore the hooks, because they are added later."""
    model, plain = Toy(), Toy()
    compiled: Any = model if in_place else torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
    fired = []
    with torch.no_grad():
        compiled(documents()[0][None])
        with model.layers[0].register_forward_hook(lambda *_: fired.append(True)):
            compiled(documents()[0][None])
    assert not fired
    assert difference(captured(compiled)[0].states, captured(plain)[0].states) == 0


class OtherLayout(Toy):
    """Passes on the stream in the layout `inner`, and returns `outer` of the output of the last block."""

    def __init__(self, inner: Any, outer: Any, **options: Any) -> None:
        super().__init__(**options)
        self.inner, self.outer = inner, outer

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        x = self.inner(self.embed(input_ids))
        for block in self.layers:
            x = block(x)
        return (self.outer(x, input_ids.shape[1]),)


def prompted(x: Tensor) -> Tensor:
    return torch.cat([torch.ones(len(x), 5, x.shape[2]), x], dim=1)


def followed(x: Tensor) -> Tensor:
    return torch.cat([x, -x, 2 * x], dim=1)


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        (lambda x: x.transpose(0, 1), lambda x, time: x.transpose(0, 1)),
        (prompted, lambda x, time: x[:, 5:]),
        (followed, lambda x, time: x[:, :time]),
    ],
    ids=["time first", "behind a prompt", "before more streams"],
)
@pytest.mark.parametrize("blocks", [Block, InPlaceBlock])
@pytest.mark.parametrize("tokens_per_batch", [2048, 1])
def test_other_layouts_are_found(inner: Any, outer: Any, blocks: type[Block], tokens_per_batch: int) -> None:
    model = OtherLayout(inner, outer, blocks=blocks)
    stream, certificate = captured(model, tokens_per_batch=tokens_per_batch)
    with torch.no_grad():
        assert difference(stream.states, plain_states(model)) < 1e-6
    assert certificate.final_norm == ()


def test_a_longer_stream_of_which_neither_end_is_given_back() -> None:
    model = OtherLayout(prompted, lambda x, time: x[:, 2 : 2 + time])
    with pytest.raises(CaptureError, match=r"its input has shape \(3, 24, 16\), where a residual stream is"):
        captured(model)


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_a_damaged_stored_state(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = StreamWriter.finish

    def damage(writer: StreamWriter) -> None:
        writer.states[layer][20] += 0.01  # the second document's token 1
        finish(writer)

    monkeypatch.setattr(StreamWriter, "finish", damage)
    fails(Toy(), f"telescoping sum fails at h_{max(layer, 1)}", "(document 1, token 1)", "What was stored is not what")


def test_a_state_that_is_stored_wrong_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write = StreamWriter.write
    monkeypatch.setattr(
        StreamWriter, "write", lambda self, layer, rows, real: write(self, layer, rows * (1 + (layer == 4)), real)
    )
    with pytest.raises(CertificateError, match="telescoping sum fails at h_4"):
        captured(Toy())


def test_a_final_norm_that_does_not_reproduce() -> None:
    fails(Toy(after=NoisyNorm()), "final norm fails at h_4: the last stored state, sent through norm, differs")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_final_norm_of_damaged_weights(value: float) -> None:
    model = Toy()
    with torch.no_grad():
        model.norm.weight[3] = value
    fails(model, "final norm fails at h_4: the last state is finite", "norm.weight holds NaN or infinity: copy or")


def test_a_final_norm_that_overflows_in_one_batch_alone() -> None:
    """The error is raised although other batches follow."""
    model = Toy(after=OverflowingNorm(len(documents()[0])))
    with pytest.raises(CertificateError, match=r"what norm makes of it is not\. It may overflow in torch\.float32"):
        captured(model, tokens_per_batch=1)


def test_a_model_that_does_not_end_with_its_stream() -> None:
    fails(Toy(after=torch.tanh), "final norm fails at h_4: no module leads from the output of block 3")


def test_nothing_after_the_last_block() -> None:
    _, certificate = captured(Toy(after=lambda x: x))
    assert certificate.final_norm == ()
    _, certificate = captured(Toy(after=nn.Dropout()).eval())
    assert certificate.final_norm == ()


def test_of_nested_modules_the_outermost_is_the_final_norm() -> None:
    _, certificate = captured(Toy(after=nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8))))
    assert certificate.final_norm == ("norm",)


def test_nan_in_one_layer_and_token_is_named() -> None:
    model = Toy()

    def plant(block: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        if len(output) > 1:  # the causality check runs a sequence by itself
            output[1, 5] = float("nan")
        return output

    model.layers[2].register_forward_hook(plant)
    with pytest.raises(CaptureError, match=r"first at h_3 \(the output of block 2\), document 1, token 5") as caught:
        captured(model)
    assert "The weights may be damaged" in str(caught.value)


def test_nan_in_the_padding_alone_is_no_harm() -> None:
    model = Toy()

    def plant(block: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[1:, 12:] = float("nan")  # the second document has 12 tokens, the third 7
        return output

    model.layers[2].register_forward_hook(plant)
    captured(model)


@pytest.mark.parametrize("says_hidden", [True, False])
def test_a_stream_that_changes_width(says_hidden: bool) -> None:
    model = Toy(says_hidden=says_hidden, after=lambda x: x)
    model.layers[3] = WideningBlock()
    with pytest.raises(CaptureError) as caught:
        captured(model)
    assert "block 3 (WideningBlock): its output has shape (3, 19, 20), where" in str(caught.value)
    assert "(batch, time, hidden) = (3, 19, 16)" in str(caught.value)


def test_the_hooks_are_gone_afterwards() -> None:
    model = Toy(order=(0, 2, 3))
    with pytest.raises(CertificateError):
        captured(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Launches(TorchDispatchMode):
    """Counts the operations that are not just a view: on a GPU each is a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (
            func.is_view or func in (torch.ops.aten._unsafe_view.default, torch.ops.aten.empty.memory_format)
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [True, False])
def test_the_tap_adds_two_kernels_a_block(padded: bool) -> None:
    """One copies the state and one takes the witnesses; a model on a GPU would wait for more."""
    model = Toy()
    texts = documents()[: 3 if padded else 1]
    chosen = range(len(texts))
    batch = batch_of(sequences(texts), chosen, chosen, 0, torch.device("cpu"))
    writer = StreamWriter(batch.tokens, "device")
    writer.range = (0, batch.tokens)
    counts = []
    with torch.no_grad(), Tap(find_decoder(model), writer.write, writer.read) as tap:
        for _ in range(2):
            tap.begin(batch, torch.arange(3))
            with Launches() as launches:
                model(batch.ids)
            counts.append(launches.count)
    with torch.no_grad(), Launches() as bare:
        model(batch.ids)
    states = len(model.layers) + 1
    assert [count - bare.count for count in counts] == [2 * states, 2 * states]
