"""Forward passes on token ids alone: of a decoder without the language-model head, and of a model with it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from delta_suite.errors import CaptureError, SuiteError
from delta_suite.models.blocks import Decoder

PREFIX_TOKENS = 32
"""Largest number of tokens in the causality check; a forward pass of so few costs about as much as one of one token."""


class ForwardError(CaptureError):
    """Error of a model that does not run on token ids alone, or not on several padded sequences of them."""


@dataclass(frozen=True)
class Prefix:
    """The first tokens of a sequence, and their last hidden states when they ran with all the rest."""

    ids: Int64[Tensor, "1 length"]
    """The whole sequence."""
    expected: Float[Tensor, "tokens hidden"]
    """The states of its first tokens."""

    @classmethod
    def of(cls, ids: Int64[Tensor, "sequences length"], length: int, last: Tensor) -> Prefix:
        """Return the first half, at most PREFIX_TOKENS, of the last sequence of a batch, which has `length` tokens."""
        tokens = min(PREFIX_TOKENS, max(1, length // 2))
        return cls(ids[-1:, :length], last[-1, :tokens].to(torch.float32, copy=True))

    def error_alone(
        self, decoder: Decoder, beside: torch.cuda.Stream | None = None, *, keeps_weights: bool = True
    ) -> Float[Tensor, ""]:
        """Return how far the state of the median token changes, relative to its norm, when the first tokens run alone.

        They run without the tokens that follow and without padding. The median is used because in half precision
        rounding alone may send a token of a mixture of experts to another expert.

        Nothing here waits for the whole batch, so a GPU that is still busy with it runs this at the same time, on the
        CUDA stream `beside`. On the stream of the batch it would wait, because transformers reads the mask on the host.

        keeps_weights: False where a forward pass brings weights that later passes use, too.
        """
        # Bound by the host, which has an eighth less to do in inference mode. Weights that come in it stay of its kind.
        with torch.inference_mode(keeps_weights), torch.no_grad():
            with nullcontext() if beside is None else torch.cuda.stream(beside):
                mask = torch.ones_like(self.ids)
                alone = last_hidden_state(decoder, self.ids, mask, len(self.expected))[0].float()
            if beside is not None:
                here = torch.cuda.current_stream(beside.device)
                here.wait_stream(beside)
                alone.record_stream(here)
        norm = self.expected.norm(dim=1).clamp_min(1e-30)
        error: Tensor = ((alone - self.expected).norm(dim=1) / norm).median()
        return error


@lru_cache
def side_streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    """Return CUDA streams beside the default one, the same ones in each call of a process.

    They are reused because the libraries keep memory for each stream that was ever used. They have priority, because
    short work beside a batch would otherwise wait for it.
    """
    return tuple(torch.cuda.Stream(device, priority=-1) for _ in range(count))  # type: ignore[no-untyped-call]


def last_hidden_state(
    decoder: Decoder,
    ids: Int64[Tensor, "sequences length"],
    mask: Int64[Tensor, "sequences length"],
    tokens: int | None = None,
) -> Float[Tensor, "sequences decoded hidden"]:
    """Return the last hidden state of a batch padded on the right, of its first `tokens` positions where given.

    The language-model head does not run: its logits would be the largest tensor. A multimodal model reads text alone.
    In an encoder-decoder the document goes through the encoder, and the decoder reads it as it was trained to: the same
    document, shifted by one behind the start token (as transformers does for BART where no decoder input is given). Row
    i of a sequence is then the state from which its token i is predicted.

    Raises ForwardError where the model does not run on token ids alone.
    """
    accepted = inspect.signature(decoder.module.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids[:, :tokens], "attention_mask": mask[:, :tokens]}
    if "is_decoder" in accepted:  # BLIP's text stack takes its kind from the call, and is an encoder by default
        inputs["is_decoder"] = True
    with _running("decoder", decoder.module):
        if decoder.encoder is not None:
            start = torch.full_like(ids[:, :1], decoder.encoder.start)
            decoded = torch.cat([start, ids[:, :-1]], dim=1)[:, :tokens]
            if "decoder_input_ids" in accepted:  # runs the encoder itself
                inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoded}
            else:
                read = _call(decoder.encoder.module, input_ids=ids, attention_mask=mask, return_dict=True)
                inputs |= {"input_ids": decoded, "encoder_hidden_states": read[0], "encoder_attention_mask": mask}
        output = _call(decoder.module, use_cache=False, return_dict=True, **inputs)
    last: Tensor | None = getattr(output, "last_hidden_state", None)
    return output[0] if last is None else last


def logits(
    model: Any, ids: Int64[Tensor, "sequences length"], mask: Int64[Tensor, "sequences length"]
) -> Float[Tensor, "sequences length vocabulary"] | None:
    """Return the logits of a batch padded on the right, or None where the model has no language-model head.

    Raises ForwardError where the model does not run on token ids alone.
    """
    with _running("model", model):
        output = _call(model, input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True)
    scores: Tensor | None = getattr(output, "logits", None)
    return scores if scores is not None and scores.dim() == 3 and scores.shape[:2] == ids.shape else None


@contextmanager
def _running(what: str, module: Any) -> Iterator[None]:
    """Run a module without code that torch.compile produced; what it raises becomes a ForwardError that names it."""
    try:
        # Code that torch.compile produced earlier ignores hooks that were added since.
        with torch.compiler.set_stance("force_eager"):
            yield
    except (SuiteError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model of another library may raise anything; its text says what is missing
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # of the host, by torch's allocator
            raise torch.OutOfMemoryError(str(error)) from error
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ForwardError(
            f"the {what} ({type(module).__name__}) does not run on token ids alone: "
            f"{type(error).__name__}: {first[:300]}"
        ) from error


def _call(module: Any, **inputs: Any) -> Any:
    """Call a module with those of the inputs that its forward method accepts."""
    accepted = inspect.signature(module.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    return module(**{name: value for name, value in inputs.items() if takes_any or name in accepted})
