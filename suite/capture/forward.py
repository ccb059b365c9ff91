"""One forward pass of a decoder on token ids alone, without the language-model head."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from suite.errors import CaptureError, SuiteError
from suite.models.blocks import Decoder

PREFIX_TOKENS = 32
"""Most tokens that are run alone; a forward pass of so few costs about as much as one of one token."""


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

    def error_alone(self, decoder: Decoder) -> Float[Tensor, ""]:
        """Run them alone, without what follows and without padding: the median token's relative change of state.

        Nothing here waits for the device, so that a GPU still busy with the whole batch runs this behind it. The
        median, as in half precision a token of a mixture of experts may go to another expert on rounding alone.
        """
        with torch.no_grad():
            mask = torch.ones_like(self.ids)
            alone = last_hidden_state(decoder, self.ids, mask, len(self.expected))[0].float()
        norm = self.expected.norm(dim=1).clamp_min(1e-30)
        error: Tensor = ((alone - self.expected).norm(dim=1) / norm).median()
        return error


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

    Raises CaptureError where the model does not run on token ids alone.
    """
    inputs = {"input_ids": ids[:, :tokens], "attention_mask": mask[:, :tokens]}
    try:
        # Code that torch.compile made before ignores hooks that came later.
        with torch.compiler.set_stance("force_eager"):
            if decoder.encoder is not None:
                read = _call(decoder.encoder.module, input_ids=ids, attention_mask=mask, return_dict=True)
                start = torch.full_like(ids[:, :1], decoder.encoder.start)
                inputs["input_ids"] = torch.cat([start, ids[:, :-1]], dim=1)[:, :tokens]
                inputs |= {"encoder_hidden_states": read[0], "encoder_attention_mask": mask}
            output = _call(decoder.module, use_cache=False, return_dict=True, **inputs)
    except (SuiteError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever another library's model raises: its text says what it misses
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise CaptureError(
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
