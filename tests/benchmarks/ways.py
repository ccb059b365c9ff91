"""The ways to the same figures: the core, the reference script, and what a user would pick instead."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from delta_suite.capture.residual import Capture, planned_batch
from delta_suite.capture.stream import Memory
from delta_suite.capture.tokens import TokenSequences
from delta_suite.capture.units import Units
from delta_suite.metrics.estimators import direction_metrics, layer_metrics, phase_metrics
from delta_suite.metrics.layer import spectral_entropy_rank
from delta_suite.models.phases import phase_map
from delta_suite.records.arrays import direction_arrays, full_gram
from delta_suite.reduction.reduce import reduce_stream
from delta_suite.reduction.replicates import LayerSpectra
from delta_suite.reduction.statistics import TOP_K, LayerStatistics
from delta_suite.reduction.variants import BLOCK_VARIANTS, Variant
from torch import Tensor

from tests.benchmarks.subjects import Subject

# --- the core ----------------------------------------------------------------------------------------------------


EVERY_VARIANT = tuple(BLOCK_VARIANTS.values())

RAW = (BLOCK_VARIANTS["raw"],)
"""The variant that the reference and everyone else computes; a run of the suite computes all of BLOCK_VARIANTS."""


def core(
    subject: Subject,
    sequences: TokenSequences,
    memory: Memory | None = None,
    variants: Sequence[Variant] = RAW,
) -> list[LayerStatistics]:
    """Capture, reduction and every metric, as `delta_suite.pipeline` does it once the model is loaded; returns `raw`.

    memory: for the stream, by default found from what is free.
    """
    spectra = reduced(subject, sequences, memory, variants)
    for variant, layers in spectra.items():
        gram = full_gram(direction_arrays(variant, layers), variant)
        for index, layer in enumerate(layers):
            layer_metrics(layer.statistics, *layer.resamples)
            direction_metrics(gram, index)
        for first, last in phase_map(subject.layers).values():
            phase_metrics(gram, range(first, last + 1))
    return [own.statistics for own in spectra["raw"]]


def reduced(
    subject: Subject,
    sequences: TokenSequences,
    memory: Memory | None = None,
    variants: Sequence[Variant] = RAW,
) -> dict[str, list[LayerSpectra]]:
    """Capture and reduction."""
    shards = Capture(subject.model, subject.decoder, sequences, device=subject.device, memory=memory).shards()
    dropped = sum(first and sequences.drop_first_token for first in sequences.starts_document)
    with torch.no_grad():
        # Not a generator expression: its variable would hold a shard while the next one is filled.
        streams = map(itemgetter(0), shards)
        return reduce_stream(
            streams,
            layers=subject.layers,
            tokens=sequences.tokens - dropped,
            units=Units.of(max(sequences.documents) + 1),
            variants=variants,
            devices=[subject.device],
        )


def capture_alone(subject: Subject, sequences: TokenSequences) -> None:
    """The stream and its certificate, then dropped."""
    for _ in Capture(subject.model, subject.decoder, sequences, device=subject.device).shards():
        pass


@torch.no_grad()
def bare_forward(subject: Subject, sequences: TokenSequences) -> None:
    """The decoder without hooks and without the language-model head, in the batches that the capture makes."""
    for ids in _batches(subject, sequences):
        subject.decoder.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def _batches(subject: Subject, sequences: TokenSequences) -> Iterator[Tensor]:
    limit = planned_batch(subject.model, subject.decoder, subject.device)
    together = max(1, limit // len(sequences.ids[0]))
    for start in range(0, len(sequences.ids), together):
        yield torch.stack(sequences.ids[start : start + together]).to(subject.device)


# --- the reference script ----------------------------------------------------------------------------------------


@torch.no_grad()
def reference_states(subject: Subject, sequences: TokenSequences) -> list[np.ndarray]:
    """All hidden states to the host as float32; the last is normed, an error of the reference that costs no time."""
    ids = sequences.ids[0][None].to(subject.device)
    out = subject.model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False)
    return [h[0].float().cpu().numpy() for h in out.hidden_states]


def reference_layer(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """The reference's arithmetic of one layer, line by line, in its float32."""
    delta = (after - before)[1:]
    h_in = before[1:]
    token_norms = np.linalg.norm(delta, axis=1)
    h_norms = np.linalg.norm(h_in, axis=1)
    rel_step = token_norms / np.maximum(h_norms, 1e-8)
    dot = np.einsum("nd,nd->n", delta, h_in)
    cos_delta_h = dot / np.maximum(token_norms * h_norms, 1e-8)
    _, S, Vt = np.linalg.svd(delta, full_matrices=False)
    p = S**2 / (S**2).sum()
    p_nz = p[p > 1e-12]
    return {
        "frob": float(np.linalg.norm(delta)),
        "token_norm_mean": float(token_norms.mean()),
        "h_norm_mean": float(h_norms.mean()),
        "rel_step_mean": float(rel_step.mean()),
        "parallel_frac": float(np.abs(cos_delta_h).mean()),
        "cos_delta_h_mean": float(cos_delta_h.mean()),
        "top_singvals": S[:TOP_K].tolist(),
        "top_dirs": Vt[:TOP_K].astype(np.float32).tolist(),
        "eff_rank": float(np.exp(-(p_nz * np.log(p_nz)).sum())),
        "top10_frac": float(p[:10].sum()),
    }


def exact_singular_values(before: np.ndarray, after: np.ndarray, device: torch.device) -> np.ndarray:
    """A float64 SVD of the same float32 updates, by a driver that forms no Gram matrix."""
    delta = torch.from_numpy((after - before)[1:]).to(device).double()
    return torch.linalg.svdvals(delta, driver="gesvd" if device.type == "cuda" else None).cpu().numpy()


# --- what a user would pick instead ------------------------------------------------------------------------------

Way = Callable[[], list[float]]
"""A function that returns the effective rank of each layer, and forms the leading directions as well."""


NUMPY_UP_TO = 1024
"""Largest hidden size at which numpy's SVD is timed: of wider layers it takes minutes, and is never the fastest."""


def other_ways(
    subject: Subject, sequences: TokenSequences, folder: Path, *, large: bool = False
) -> tuple[dict[str, Way], dict[str, str]]:
    """Return the ways by name, and by name why others cannot run here. The sequences have one length.

    Each runs on the same weights; those that rebuild the model have a copy of its modules. folder: an empty one.
    large: leave out what would take minutes, or memory for more than the weights.
    """
    ids = torch.stack(sequences.ids).to(subject.device)
    ways: dict[str, Way] = {
        "output_hidden_states + torch.linalg.svd": lambda: _svds(_hidden_states(subject, ids), torch_svd),
    }
    missing: dict[str, str] = {}
    if large:
        return ways, missing
    if subject.hidden <= NUMPY_UP_TO:
        ways["output_hidden_states + numpy.linalg.svd"] = lambda: _svds(_hidden_states(subject, ids), numpy_svd)
    for name, states_of in (("TransformerLens run_with_cache", transformer_lens), ("nnsight trace", nnsight_trace)):
        try:
            states = states_of(subject, ids, folder)
        except ImportError as error:
            missing[name] = str(error)
        else:
            ways[f"{name} + torch.linalg.svd"] = lambda states=states: _svds(states(), torch_svd)  # type: ignore[misc]
    return ways, missing


@torch.no_grad()
def _hidden_states(subject: Subject, ids: Tensor) -> Sequence[Tensor]:
    """Return the states without the language-model head, which a user may not know to leave out."""
    run = subject.decoder.module(input_ids=ids, output_hidden_states=True, use_cache=False)
    states: Sequence[Tensor] = run.hidden_states
    return states


def transformer_lens(subject: Subject, ids: Tensor, folder: Path) -> Callable[[], Sequence[Tensor]]:
    """Return a function that runs `run_with_cache`, which is asked for the stream alone. Its attention is eager.

    It wants a tokenizer, whichever.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    from tests.tiny import make_tiny

    model = _copy(subject.model)
    model.config.architectures = [type(model).__name__]
    bridge = TransformerBridge.boot_transformers(
        "gpt2",
        hf_model=model,
        tokenizer=AutoTokenizer.from_pretrained(make_tiny(folder / "tiny", layers=1)),
        device=str(subject.device),
        dtype=subject.model.dtype,
    )
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(subject.layers))]

    @torch.no_grad()
    def states() -> Sequence[Tensor]:
        _, cache = bridge.run_with_cache(ids, return_type=None, names_filter=lambda name: name in names)
        return [cache[name] for name in names]

    return states


def nnsight_trace(subject: Subject, ids: Tensor, folder: Path) -> Callable[[], Sequence[Tensor]]:
    """Return a function that saves the input of the first block and the output of each in a trace."""
    from nnsight import NNsight

    wrapped = NNsight(_copy(subject.decoder.module))
    blocks = wrapped.get(subject.decoder.path.rpartition(".")[2])

    @torch.no_grad()
    def states() -> Sequence[Tensor]:
        saved: list[Tensor] = []
        with wrapped.trace(input_ids=ids, use_cache=False):
            saved.append(blocks[0].input.save())
            for block in blocks:
                saved.append(block.output.save())
        return saved

    return states


def _copy(model: Any) -> Any:
    """Return a copy of the modules of a model, which hold the same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def numpy_svd(delta: Tensor) -> tuple[np.ndarray, Any]:
    """Return singular values, and as many leading directions as the core keeps."""
    _, sigma, directions = np.linalg.svd(delta.cpu().numpy(), full_matrices=False)
    return sigma, directions[:TOP_K].copy()


def torch_svd(delta: Tensor) -> tuple[np.ndarray, Any]:
    """Return the same from torch, on the device of the updates."""
    _, sigma, directions = torch.linalg.svd(delta, full_matrices=False)
    return sigma.cpu().numpy(), directions[:TOP_K].clone()


def _svds(states: Sequence[Tensor], svd: Callable[[Tensor], tuple[np.ndarray, Any]]) -> list[float]:
    ranks, kept = [], []
    for before, after in pairwise(states):
        sigma, directions = svd((after.float() - before.float()).flatten(0, 1))
        ranks.append(spectral_entropy_rank(sigma.astype(np.float64) ** 2))
        kept.append(directions)
    return ranks
