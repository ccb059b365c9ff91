"""Interventions in the forward pass, and the loss of the language-model head that is measured with them.

An intervention replaces the updates of some blocks, or runs other blocks in their places. The loss is that of the next
token, -log p(x_{t+1} | x_1 .. x_t), in nats, summed over each document; a document's first token is not predicted.

Every intervention runs in the batches of the undisturbed pass. Blocks below the first one that it touches give what
they gave in that pass, and do not run again: before any loss is taken so, it is checked that a pass whose first blocks
are left out and whose others are left alone has the loss of the whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from delta_suite.capture.forward import ForwardError, logits
from delta_suite.capture.plan import plan_batches
from delta_suite.capture.tokens import TokenSequences
from delta_suite.errors import CaptureError, DeviceError
from delta_suite.models.blocks import Decoder, state_given, state_of

LOGIT_BYTES = 1 << 30
"""Most memory that the logits of a batch are planned to take, in float32."""

SAME_LOSS = 1e-5
"""Relative difference up to which a pass without its first blocks has the loss of the whole one. The arithmetic is the
same, so it is 0 but for kernels that add in any order."""

Update = Callable[[Float[Tensor, "rows hidden"], Float[Tensor, "rows hidden"]], Float[Tensor, "rows hidden"]]
"""Function of the states before a block and of its updates that returns what is written in place of the updates. Both
come in float32, or in float64 where the model computes in it."""


class NoLossError(CaptureError):
    """Error of a model whose loss cannot be measured; its text is the reason."""


@dataclass(frozen=True)
class Intervention:
    """A change of some blocks in one forward pass; the others are left alone."""

    name: str
    updates: Mapping[int, tuple[Update, Update]] = field(default_factory=dict)
    """The update that is written in place of a block's, in documents of half a and of half b. It is applied to the
    tokens that enter alone."""
    runs: Mapping[int, int | None] = field(default_factory=dict)
    """The block that runs in the place of a block; None to run none, so that the state passes unchanged."""

    @property
    def first(self) -> int:
        """The first block that is touched."""
        return min((*self.updates, *self.runs))


@dataclass(frozen=True)
class DocumentLosses:
    """The loss of each document under each intervention."""

    nats: Float64[np.ndarray, "conditions documents"]
    """Sums over the predicted tokens of each document: undisturbed, then under each intervention; NaN throughout where
    the model does not run with it."""
    tokens: Float64[np.ndarray, " documents"]
    """The number of predicted tokens of each document; 0 for a document that did not run."""
    blocks: float
    """Passes through blocks, in units of all blocks on all tokens of these documents: 1 for the undisturbed pass."""
    failed: Mapping[str, str]
    """The reasons why the model does not run with some of the interventions."""


class Intervening:
    """Forward passes of a model with its head over some documents, undisturbed and under interventions."""

    def __init__(
        self,
        model: Any,
        decoder: Decoder,
        sequences: TokenSequences,
        interventions: Sequence[Intervention],
        *,
        documents: Sequence[int],
        halves: Sequence[int],
        entering: Bool[Tensor, " tokens"],
        device: torch.device,
        tokens_per_batch: int,
    ) -> None:
        """Plan the passes.

        documents: those that run. halves: 0 or 1 for each document of the calibration, its half. entering: the tokens
        whose updates are replaced, of all tokens of the stream in its order. Raises NoLossError where the loss of this
        kind of model is not measured.
        """
        if decoder.encoder is not None:
            raise NoLossError("it is an encoder-decoder, and interventions are made in decoders that stand alone")
        if decoder.last_parts and any(each.runs for each in interventions):
            raise NoLossError(
                "its blocks are made of several modules each, so that no block can be run in another's place"
            )
        self.model, self.decoder, self.sequences = model, decoder, sequences
        self.interventions, self.device = tuple(interventions), device
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._limit = max(1, min(tokens_per_batch, LOGIT_BYTES // (4 * vocabulary)))
        chosen = set(documents)
        self._pieces = [i for i, document in enumerate(sequences.documents) if document in chosen]
        self._halves, self._entering = halves, entering
        lengths = [len(ids) for ids in sequences.ids]
        self._starts = [sum(lengths[:i]) for i in range(len(lengths))]
        self._reuses: bool | None = False if decoder.last_parts else None
        self._failed: dict[str, str] = {}
        self._blocks, self._tokens = 0, 0

    def losses(self) -> DocumentLosses:
        """Run all passes. Raises NoLossError where the model has no head, and DeviceError where memory runs out."""
        count = len(self._halves)
        nats, tokens = np.zeros((1 + len(self.interventions), count)), np.zeros(count)
        lengths = [len(self.sequences.ids[i]) for i in self._pieces]
        with torch.no_grad():
            for batch in plan_batches(lengths, self._limit):
                self._add([self._pieces[place] for place in batch], nats, tokens)
        for row, intervention in enumerate(self.interventions, start=1):
            if intervention.name in self._failed:
                nats[row] = np.nan
        whole = len(self.decoder.blocks) * max(1, self._tokens)
        return DocumentLosses(nats, tokens, self._blocks / whole, self._failed)

    def _add(self, pieces: Sequence[int], nats: np.ndarray, tokens: np.ndarray) -> None:
        """Add the losses of some pieces; where memory runs out, or they do not run together, of each half of them."""
        try:
            rows, count = self._together(pieces)
        except (ForwardError, torch.OutOfMemoryError) as error:
            if len(pieces) > 1:
                middle = len(pieces) // 2
                self._add(pieces[:middle], nats, tokens)
                self._add(pieces[middle:], nats, tokens)
                return
            if isinstance(error, ForwardError):
                raise NoLossError(str(error)) from None
            raise DeviceError(
                f"out of memory on {self.device} with a single sequence of {len(self.sequences.ids[pieces[0]])} tokens "
                f"and its logits. Use a larger device, or leave out the claims about causes."
            ) from None
        for place, piece in enumerate(pieces):
            document = self.sequences.documents[piece]
            nats[:, document] += rows[:, place]
            tokens[document] += count[place]

    def _together(self, pieces: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        """Return the losses of pieces that run in one batch, (conditions, pieces), and their predicted tokens."""
        batch = _Batch.of(self, pieces)
        firsts = {intervention.first for intervention in self.interventions}
        wanted = {first - 1 for first in firsts if first} | {
            layer for each in self.interventions for layer, other in each.runs.items() if other is None
        }
        with _outputs(self.decoder, set() if self._reuses is False else wanted) as gave:
            rows = [self._loss(batch, 0)]
        if self._reuses is None:
            ends = [first for first in (min(firsts, default=0), max(firsts, default=0)) if first]
            self._reuses = all(self._same_without(batch, first, gave, rows[0]) for first in ends)
        for intervention in self.interventions:
            first = intervention.first if self._reuses and intervention.first - 1 in gave else 0
            rows.append(np.full(len(pieces), np.nan))
            if intervention.name in self._failed:
                continue
            try:
                with _left_out(self.decoder, first, gave), self._made(intervention, batch, gave):
                    rows[-1] = self._loss(batch, first)
            except ForwardError as error:
                if len(pieces) > 1:
                    raise
                self._failed[intervention.name] = str(error)
        self._tokens += batch.tokens
        return np.stack(rows), [len(self.sequences.ids[piece]) - 1 for piece in pieces]

    def _same_without(self, batch: _Batch, first: int, gave: Mapping[int, Any], whole: np.ndarray) -> bool:
        """Return True if a pass whose first blocks are left out has the same loss as a whole one."""
        try:
            with _left_out(self.decoder, first, gave):
                again = self._loss(batch, first)
        except ForwardError:
            return False
        return bool(np.all(np.abs(again - whole) <= SAME_LOSS * np.abs(whole)))

    def _loss(self, batch: _Batch, first: int) -> Float64[np.ndarray, " pieces"]:
        """Return the loss of each piece of a batch, summed over its tokens, in a pass of the blocks from `first` on."""
        scores = logits(self.model, batch.ids, batch.mask)
        if scores is None:
            raise NoLossError(f"{type(self.model).__name__} has no language-model head: it returns no logits")
        self._blocks += (len(self.decoder.blocks) - first) * batch.tokens
        out: list[Tensor] = []
        for row, length in zip(scores, batch.lengths, strict=True):  # one at a time: a copy in float32 is large
            wide = row[: length - 1].to(torch.promote_types(row.dtype, torch.float32))
            target = batch.ids[len(out), 1:length].to(wide.device)
            out.append(nn.functional.cross_entropy(wide, target, reduction="sum").double())
        return np.array([float(total) for total in out])

    @contextmanager
    def _made(self, intervention: Intervention, batch: _Batch, gave: Mapping[int, Any]) -> Iterator[None]:
        """Make an intervention in every forward pass inside."""
        blocks, ends = self.decoder.blocks, self.decoder.ends
        with ExitStack() as stack:
            forwards = {layer: blocks[layer].forward for layer in intervention.runs}
            for layer, other in intervention.runs.items():
                forward = partial(_pass_on, gave.get(layer)) if other is None else forwards[other]
                stack.enter_context(_replaced(blocks[layer], forward))
            for layer, updates in intervention.updates.items():
                given: list[Tensor] = []
                before = blocks[layer].register_forward_pre_hook(partial(_keep, given), with_kwargs=True)
                after = ends[layer].register_forward_hook(partial(self._rewrite, layer, updates, batch, given))
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield

    def _rewrite(
        self,
        layer: int,
        updates: tuple[Update, Update],
        batch: _Batch,
        given: list[Tensor],
        block: nn.Module,
        args: tuple[Any, ...],
        output: Any,
    ) -> Any:
        """Return the output of a block whose update is another in the rows that enter."""
        gave, state = state_of(output), given.pop()
        if not isinstance(gave, Tensor) or gave.shape[:2] != batch.ids.shape or gave.shape != state.shape:
            raise NoLossError(f"the states of block {layer} are not (batch, time, hidden)")
        wide = torch.promote_types(gave.dtype, torch.float32)
        flat, before = gave.reshape(-1, gave.shape[-1]).clone(), state.to(gave.device).reshape(-1, gave.shape[-1])
        for update, rows in zip(updates, batch.entering, strict=True):
            if len(rows):
                chosen = rows.to(flat.device)
                h, after = before[chosen].to(wide), flat[chosen].to(wide)
                # Less what changes, and not h plus the new update: where nothing changes, the output keeps every bit.
                flat[chosen] = (after - ((after - h) - update(h, after - h))).to(flat.dtype)
        return _with_state(output, flat.view_as(gave))


@dataclass(frozen=True)
class _Batch:
    """Pieces of documents that run together, padded on the right."""

    ids: Int64[Tensor, "pieces length"]
    mask: Int64[Tensor, "pieces length"]
    lengths: Sequence[int]
    entering: tuple[Int64[Tensor, " a"], Int64[Tensor, " b"]]
    """The places of the tokens whose updates are replaced, in documents of half a and of half b."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @classmethod
    def of(cls, run: Intervening, pieces: Sequence[int]) -> _Batch:
        rows = [run.sequences.ids[piece] for piece in pieces]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = [len(row) for row in rows]
        mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
        enters = torch.zeros_like(mask)
        for place, piece in enumerate(pieces):
            start = run._starts[piece]
            enters[place, : lengths[place]] = run._entering[start : start + lengths[place]]
        half = torch.tensor([run._halves[run.sequences.documents[piece]] for piece in pieces])[:, None]
        a, b = ((enters & (half == side)).flatten().nonzero().flatten() for side in (0, 1))
        return cls(ids.to(run.device), mask.long().to(run.device), lengths, (a, b))


# --- blocks ----------------------------------------------------------------------------------------------------


@contextmanager
def _outputs(decoder: Decoder, layers: set[int]) -> Iterator[dict[int, Any]]:
    """Keep the outputs of these blocks in the forward pass inside."""
    gave: dict[int, Any] = {}

    def keep(layer: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        gave[layer] = _copied(output)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(decoder.ends[layer].register_forward_hook(partial(keep, layer)).remove)
        yield gave


@contextmanager
def _left_out(decoder: Decoder, first: int, gave: Mapping[int, Any]) -> Iterator[None]:
    """Give what block `first` - 1 gave in place of running it and those before it."""
    with ExitStack() as stack:
        for block in decoder.blocks[:first]:
            stack.enter_context(_replaced(block, lambda *args, **kwargs: _copied(gave[first - 1])))
        yield


@contextmanager
def _replaced(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Run another function as the forward method of a module."""
    before = block.__dict__.get("forward")  # accelerate puts one there
    block.forward = forward
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before


def _pass_on(like: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the state that a block is given, in the form of its output."""
    state = state_given(args, kwargs)
    return state if like is None or isinstance(like, Tensor) else _with_state(like, state)


def _keep(given: list[Tensor], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep a copy of the state that a block is given, which it may overwrite."""
    given.append(state_given(args, kwargs).clone())


def _with_state(output: Any, state: Tensor) -> Any:
    """Return an output of a block with another state."""
    if isinstance(output, tuple | list):
        rest = [state, *output[1:]]
        return rest if isinstance(output, list) else tuple(rest)
    return state


def _copied(output: Any) -> Any:
    """Return an output of a block whose state can be overwritten."""
    state = state_of(output)
    return _with_state(output, state.clone()) if isinstance(state, Tensor) else output
