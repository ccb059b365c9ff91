"""The ways to the same figures: the core, the reference script, and what a user would write instead.

`python -m tests.benchmarks.ways WAY SUBJECT TOKENS DEVICE PEAK` runs one of them alone in a process, and prints its
seconds and peak memory as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from delta_suite.capture.residual import capture, planned_batch
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

from tests.benchmarks.measuring import Peak, seconds
from tests.benchmarks.subjects import Subject, build

# --- the core ----------------------------------------------------------------------------------------------------


EVERY_VARIANT = tuple(BLOCK_VARIANTS.values())

RAW = (BLOCK_VARIANTS["raw"],)
"""The variant that the reference and everyone else computes; a run of the suite computes all of BLOCK_VARIANTS."""


def core(
    subject: Subject,
    sequences: TokenSequences,
    memory: Memory | None = None,
    variants: Sequence[Variant] = RAW,
    room: int | None = None,
) -> list[LayerStatistics]:
    """Capture, reduction and every metric, as `delta_suite.pipeline` does it once the model is loaded; returns `raw`.

    memory: for the stream; room: bytes for the reduction; both found from what is free by default.
    """
    spectra = reduced(subject, sequences, memory, variants, room)
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
    room: int | None = None,
) -> dict[str, list[LayerSpectra]]:
    """Capture and reduction."""
    shards = capture(subject.model, subject.decoder, sequences, device=subject.device, memory=memory)
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
            memory=None if room is None else Memory(device=room),
        )


def core_ranks(subject: Subject, sequences: TokenSequences, room: int | None = None) -> list[float]:
    """Of all that the core gives, the effective ranks."""
    return [spectral_entropy_rank(own.eigenvalues) for own in core(subject, sequences, room=room)]


def room_beside(subject: Subject, tokens: int, peak_bytes: int) -> int:
    """Bytes that the reduction may take where the stream and it together must fit peak_bytes."""
    return max(0, peak_bytes - subject.stream_bytes * tokens)


def capture_alone(subject: Subject, sequences: TokenSequences) -> None:
    """The stream and its certificate, then dropped."""
    for _ in capture(subject.model, subject.decoder, sequences, device=subject.device):
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


# --- what a user would write instead -----------------------------------------------------------------------------


@torch.no_grad()
def hidden_states_and_svd(subject: Subject, sequences: TokenSequences, layers: int | None = None) -> list[float]:
    """`output_hidden_states=True`, kept on the device, and `torch.linalg.svd` of each layer's updates."""
    ids = sequences.ids[0][None].to(subject.device)
    states = subject.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    return _svds([state[0] for state in states], layers)


@torch.no_grad()
def transformer_lens(bridge: Any, ids: Tensor, everything: bool) -> list[float]:
    """`run_with_cache` and the same SVDs; of the activations only the stream is asked for, unless `everything` is."""
    wanted = None if everything else lambda name: name.endswith("resid_post") or name == "blocks.0.hook_resid_pre"
    _, cache = bridge.run_with_cache(ids, return_type=None, names_filter=wanted)
    layers = bridge.cfg.n_layers
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(layers))]
    return _svds([cache[name][0] for name in names], None)


def _svds(states: Sequence[Tensor], layers: int | None) -> list[float]:
    ranks, kept = [], []
    for before, after in list(pairwise(states))[:layers]:
        delta = (after.float() - before.float())[1:]
        _, sigma, directions = torch.linalg.svd(delta, full_matrices=False)
        p = sigma.double() ** 2 / (sigma.double() ** 2).sum()
        p = p[p > 1e-12]
        ranks.append(float(torch.exp(-(p * p.log()).sum())))
        kept.append(directions[:TOP_K].clone())
    return ranks


# --- one way alone in a process ----------------------------------------------------------------------------------


def _bridge(subject: Subject, folder: Path) -> Any:
    """TransformerLens around the same model. It wants a tokenizer, whichever, and reads it from its folder again."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    from tests.tiny import make_tiny

    tokenizer = AutoTokenizer.from_pretrained(make_tiny(folder / "tiny", layers=1))
    return TransformerBridge.boot_transformers(
        "gpt2", hf_model=subject.model, tokenizer=tokenizer, device=str(subject.device), dtype=torch.float32
    )


def alone(way: str, which: str, tokens: int, device: str, peak_bytes: int, folder: Path) -> dict[str, Any]:
    """Seconds, peak bytes and effective ranks of one way; of the core where the stream and all else must fit peak_bytes
    (0: what is free)."""
    subject = build(which, torch.device(device))
    sequences = subject.sequences(tokens, drop=True)
    run: Callable[[], list[float]]
    if way.startswith("transformer_lens"):
        run = partial(
            transformer_lens,
            _bridge(subject, folder),
            sequences.ids[0][None].to(subject.device),
            everything=way.endswith("everything"),
        )
    elif way == "core":
        run = partial(core_ranks, subject, sequences, room_beside(subject, tokens, peak_bytes) if peak_bytes else None)
    else:
        run = partial(hidden_states_and_svd, subject, sequences)
    with Peak(subject.device) as peak:
        ranks = run()
    return {
        "seconds": seconds(run, subject.device, 3),
        "device": peak.device,
        "host": peak.host,
        "ranks": ranks,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        own_way, own_subject, own_tokens, own_device, own_peak = sys.argv[1:]
        print(json.dumps(alone(own_way, own_subject, int(own_tokens), own_device, int(own_peak), Path(folder))))
