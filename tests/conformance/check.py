"""One architecture through the real capture and its certificate, against the hidden states of transformers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from delta_suite.capture.certificate import Certificate
from delta_suite.capture.residual import Capture
from delta_suite.capture.stream import Memory, ResidualStream
from delta_suite.capture.tokens import TokenSequences
from delta_suite.errors import SuiteError
from delta_suite.models.blocks import Decoder, find_decoder
from torch import Tensor

from tests.conformance.build import FIRST_SPECIAL, Architecture, build

LENGTHS = (19, 12, 7)
"""Tokens per document: longer than the sliding windows of the tiny configs, longest first as the suite runs them."""

TOLERANCE = 1e-5
"""Largest difference between two float32 results of the same function, relative to the largest entry."""

REFERENCE: dict[str, dict[str, Any]] = {"rwkv": {"rescale_every": 0}}
"""Config changes under which the hidden states of transformers are in the units of h_0."""


@dataclass(frozen=True)
class Verdict:
    """Outcome for one architecture. `wrong` must not occur: the captured states are not those of the model."""

    architecture: Architecture
    outcome: str
    """supported, refused, wrong, or not built."""
    reason: str
    norm: str = ""
    """Modules after the last block, from the certificate."""
    writes: str = ""
    """How attention and MLP write, one after the other or in parallel; or why they are not measured apart."""


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, FIRST_SPECIAL, (length,), generator=generator) for length in LENGTHS]


def sequences(texts: list[Tensor]) -> TokenSequences:
    return TokenSequences(tuple(texts), tuple(range(len(texts))), (True,) * len(texts), drop_first_token=False)


def captured(model: Any, decoder: Decoder | None = None, **options: Any) -> tuple[ResidualStream, Certificate]:
    """Return the stream of all documents in one shard, on the CPU unless the options of `capture` say otherwise."""
    options = {"memory": Memory(1 << 30), "device": torch.device("cpu")} | options
    runs = Capture(model, decoder or find_decoder(model), sequences(documents()), **options)
    ((stream, certificate),) = runs.shards()
    return stream, certificate


def captured_apart(model: Any, decoder: Decoder, **options: Any) -> tuple[ResidualStream, Certificate, str]:
    """Return the stream with the states between the sublayers, the certificate, and why there are none."""
    options = {"memory": Memory(1 << 30), "device": torch.device("cpu"), "writes": True} | options
    runs = Capture(model, decoder, sequences(documents()), **options)
    ((stream, certificate),) = runs.shards()
    return stream, certificate, runs.sublayers if isinstance(runs.sublayers, str) else ""


def writes(stream: ResidualStream, why_not: str) -> str:
    """Return how attention and MLP of the blocks write, in a word."""
    if not stream.middles:
        return why_not
    return " and ".join(sorted({"parallel" if parallel else "in turn" for parallel in stream.parallel}))


def examine(architecture: Architecture) -> Verdict:
    """Build, capture, certify, compare. Any exception but a SuiteError is a defect, and is not caught."""
    try:
        model = build(architecture)
    except Exception as error:
        return Verdict(architecture, "not built", _brief(error))
    try:
        decoder = find_decoder(model)
        padded, certificate, why_not = captured_apart(model, decoder)
    except SuiteError as error:
        return Verdict(architecture, "refused", str(error))
    norm = " -> ".join(certificate.final_norm) or "none"

    alone, _, _ = captured_apart(model, decoder, tokens_per_batch=1)
    how = writes(padded, why_not)
    if (error := difference(padded.states, alone.states)) > TOLERANCE:
        return Verdict(architecture, "wrong", f"padding changes the stream by {error:.2g}", norm, how)
    if (error := difference(padded.middles, alone.middles)) > TOLERANCE:
        return Verdict(architecture, "wrong", f"padding changes what attention writes by {error:.2g}", norm, how)
    if architecture.model_type in REFERENCE:
        model = build(architecture, **REFERENCE[architecture.model_type])
    right, reason = _as_transformers_says(model, decoder, list(padded.states))
    return Verdict(architecture, "supported" if right else "wrong", reason, norm, how)


def _as_transformers_says(model: Any, decoder: Decoder, states: list[Tensor]) -> tuple[bool, str]:
    """Compare h_0 .. h_{N-1} with `output_hidden_states`, whose last entry has the final norm applied."""
    try:
        reference, whose = library_hidden_states(model, decoder), ""
    except Exception as error:  # such as BLIP-2, whose forward method demands an image
        reference, whose = library_hidden_states(decoder.module, decoder), f" of the decoder ({_brief(error)})"
    if len(reference) != len(states):
        return False, f"{len(states)} states captured, transformers has {len(reference)}"
    if (error := difference(states[:-1], reference[:-1])) <= TOLERANCE:
        return True, f"equals hidden_states{whose}"
    if difference(states[1:-1], reference[:-2]) <= TOLERANCE:
        return True, f"equals hidden_states{whose}, which omit h_0"
    return False, f"differs from hidden_states{whose} by {error:.2g}"


def library_hidden_states(model: Any, decoder: Decoder) -> list[Tensor]:
    """Return the hidden states of transformers as (tokens, hidden), one document at a time so that none is padded."""
    runs = []
    for text in documents():
        inputs: dict[str, Any] = {"input_ids": text[None], "output_hidden_states": True, "use_cache": False}
        if decoder.encoder is not None:
            inputs["decoder_input_ids"] = torch.cat([torch.tensor([decoder.encoder.start]), text[:-1]])[None]
        if "is_decoder" in inspect.signature(model.forward).parameters:
            inputs["is_decoder"] = True
        with torch.no_grad():
            output = model(**inputs, return_dict=True)
        runs.append(output.get("decoder_hidden_states") or output["hidden_states"])
    return [torch.cat([state[0] for state in layer]) for layer in zip(*runs, strict=True)]


def difference(states: Any, others: Any) -> float:
    """Return the largest difference over all layers, relative to the largest entry; infinity for unequal shapes."""
    worst = 0.0
    for one, other in zip(states, others, strict=True):
        if one.shape != other.shape:
            return float("inf")
        worst = max(worst, float((one - other).abs().max() / other.abs().max()))
    return worst


def _brief(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The validation of configs puts the reason on its second line.
    telling = lines[1] if len(lines) > 1 and "validator" in lines[0] else lines[0] if lines else ""
    return f"{type(error).__name__}: {telling}"
