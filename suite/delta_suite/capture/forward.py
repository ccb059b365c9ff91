"""One forward pass of a decoder on token ids alone, without the language-model head."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from delta_suite.errors import CaptureError, SuiteError
from delta_suite.models.blocks import Decoder

PREFIX_TOKENS = 32
"""Most tokens that are run alone; a forward pass of so few costs about as much as one of one token."""


class ForwardError(CaptureError):
    """The model does not run on what it was given: token ids alone, or several padded sequences of them."""


@dataclass(frozen=True)
class Prefix:
    """The first tokens of a sequence, and what the decoder made of them when run with all the rest."""

    ids: Int64[Tensor, "1 length"]
    expected: Float[Tensor, "tokens hidden"]

    @classmethod
    def of(cls, ids: Int64[Tensor, "sequences length"], length: int, last: Tensor) -> Prefix:
        """The first half of the last sequence of a batch, of `length` tokens."""
        tokens = min(PREFIX_TOKENS, max(1, length // 2))
        return cls(ids[-1:, :length], last[-1, :tokens].to(torch.float32, copy=True))

    def error_alone(self, decoder: Decoder, beside: torch.cuda.Stream | None = None) -> Float[Tensor, ""]:
        """Run them alone, without what follows and without padding: the median token's relative change of state.

        Nothing here waits for the whole batch, so that a GPU still busy with it runs this at the same time: on the CUDA
        stream `beside`, as transformers reads the mask on the host, and on the batch's own stream that would wait. The
        median, as in half precision a token of a mixture of experts may go to another expert on rounding alone.
        """
        # Bound by the host, which has an eighth less to do where nothing prepares for a gradient.
        with torch.inference_mode():
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
    """CUDA streams beside the default one, the same ones in each call of a process, as the libraries keep memory for
    each stream that was ever used. They come first: short work beside a batch would wait for it otherwise."""
    return tuple(torch.cuda.Stream(device, priority=-1) for _ in range(count))  # type: ignore[no-untyped-call]


def last_hidden_state(
    decoder: Decoder,
    ids: Int64[Tensor, "sequences length"],
    mask: Int64[Tensor, "sequences length"],
    tokens: int | None = None,
) -> Float[Tensor, "sequences decoded hidden"]:
    """What the decoder makes of a batch padded on the right; of the first `tokens` positions alone, where given.

    The head is left out: its logits would be the largest tensor. A multimodal model reads text alone. In an
    encoder-decoder the document goes through the encoder, and the decoder reads it as it was trained to: the same
    document, moved by one behind the start token (what transformers does for BART where no decoder input is given).
    Row i of a sequence is then the state from which its token i is predicted.

    Raises ForwardError where the model does not run on token ids alone.
    """
    knows = inspect.signature(decoder.module.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids[:, :tokens], "attention_mask": mask[:, :tokens]}
    if "is_decoder" in knows:  # BLIP's text stack takes its kind from the call, and is an encoder by default
        inputs["is_decoder"] = True
    try:
        # Code that torch.compile made before ignores hooks that came later.
        with torch.compiler.set_stance("force_eager"):
            if decoder.encoder is not None:
                start = torch.full_like(ids[:, :1], decoder.encoder.start)
                decoded = torch.cat([start, ids[:, :-1]], dim=1)[:, :tokens]
                if "decoder_input_ids" in knows:  # runs the encoder itself
                    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoded}
                else:
                    read = _call(decoder.encoder.module, input_ids=ids, attention_mask=mask, return_dict=True)
                    inputs |= {"input_ids": decoded, "encoder_hidden_states": read[0], "encoder_attention_mask": mask}
            output = _call(decoder.module, use_cache=False, return_dict=True, **inputs)
    except (SuiteError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever another library's model raises: its text says what it misses
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ForwardError(
            f"the decoder ({type(decoder.module).__name__}) does not run on token ids alone: "
            f"{type(error).__name__}: {first[:300]}"
        ) from error
    last: Tensor | None = getattr(output, "last_hidden_state", None)
    return output[0] if last is None else last


def _call(module: Any, **inputs: Any) -> Any:
    """Call with those inputs that the module knows."""
    accepted = inspect.signature(module.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    return module(**{name: value for name, value in inputs.items() if takes_any or name in accepted})
