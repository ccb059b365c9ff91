"""One model over two GPUs of one host: the same figures as on one, and what the second GPU does for the analysis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from delta_suite.capture.residual import Capture
from delta_suite.capture.stream import ResidualStream
from delta_suite.capture.units import Units
from delta_suite.models.blocks import find_decoder
from delta_suite.reduction.reduce import reduce_stream
from delta_suite.reduction.replicates import LayerSpectra

from tests.benchmarks.measuring import seconds
from tests.benchmarks.page import Record
from tests.benchmarks.subjects import LARGE, Subject

pytestmark = [
    pytest.mark.benchmark(group="11. Two GPUs"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

TOKENS = 2048
DOCUMENTS = 64


@pytest.mark.parametrize("subject", [LARGE], indirect=True)
def test_large_model_over_two_gpus(benchmark: Any, subject: Subject, record: Callable[..., Record]) -> None:
    sequences = subject.sequences(TOKENS, TOKENS // DOCUMENTS, documents=True)
    gpus = [torch.device("cuda", index) for index in range(2)]

    def captured(model: Any) -> ResidualStream:
        decoder = find_decoder(model)
        # A certificate that fails raises.
        ((stream, certificate),) = Capture(model, decoder, sequences, device=gpus[0]).shards()
        assert set(certificate.identities)
        return stream

    def reduced(stream: ResidualStream, devices: list[torch.device]) -> list[LayerSpectra]:
        with torch.no_grad():
            return reduce_stream(
                iter([stream]), layers=subject.layers, tokens=TOKENS, units=Units.of(DOCUMENTS), devices=devices
            )["raw"]

    stream = captured(subject.model)
    one = reduced(stream, gpus[:1])
    alone = seconds(lambda: reduced(stream, gpus[:1]), gpus[0], 3)
    del stream

    model = split(subject.model, gpus)
    places = {str(next(block.parameters()).device) for block in find_decoder(model).blocks}
    assert places == {"cuda:0", "cuda:1"}
    stream = captured(model)
    assert {str(state.device) for state in stream.states} == places
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    held = [torch.cuda.memory_allocated(gpu) for gpu in gpus]
    two = reduced(stream, gpus)
    peaks = [torch.cuda.max_memory_allocated(gpu) - before for gpu, before in zip(gpus, held, strict=True)]
    spread = seconds(lambda: reduced(stream, gpus), gpus[0], 3)
    benchmark.pedantic(lambda: captured(model), rounds=1)
    joined(model, gpus[0])

    report = record(f"{subject.name}, {TOKENS:,} tokens in {DOCUMENTS} documents, over two GPUs")
    apart = _apart(one, two)
    report.add("spectra and token figures: off by, relative", apart[0], target="<= 1e-5")
    report.add("directions: largest 1 - abs(cos)", apart[1], target="<= 1e-5")
    report.add("analysis on one GPU, variant raw, with intervals", alone, "s")
    report.add("analysis on two GPUs", spread, "s")
    report.add("two over one", spread / alone, "x", target="<= 0.6")
    for gpu, weights, peak in zip(gpus, held, peaks, strict=True):
        report.add(f"{gpu}: weights and stream", weights, "B")
        report.add(f"{gpu}: peak memory of the analysis beyond them", peak, "B")
    report.note(
        "The model is split by accelerate, with blocks on both GPUs; the certificate "
        "holds across the boundary. Analysis is everything after the capture: spectra of the whole, the halves and "
        "without each group of documents."
    )
    assert max(apart) <= 1e-5


def split(model: Any, gpus: list[torch.device]) -> Any:
    """Half of a model that is on one GPU to the other, as `device_map="auto"` would have loaded it."""
    from accelerate import dispatch_model, infer_auto_device_map

    whole = sum(own.numel() * own.element_size() for own in model.parameters())
    memory = {gpu.index: int(0.55 * whole) for gpu in gpus}
    places = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=list(model._no_split_modules))
    return dispatch_model(model, places)


def joined(model: Any, gpu: torch.device) -> None:
    """Back onto one GPU, for the benchmarks that follow."""
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    del model.hf_device_map
    for name in ("to", "cuda"):  # which accelerate has overridden on the instance
        vars(model).pop(name, None)
    model.to(gpu)


def _apart(one: list[LayerSpectra], two: list[LayerSpectra]) -> tuple[float, float]:
    """Largest relative difference of eigenvalues (to the first) and token averages, and 1 - |cos| of well-separated
    first directions."""
    figures, turned = 0.0, 0.0
    for a, b in zip(one, two, strict=True):
        x, y = a.statistics.eigenvalues, b.statistics.eigenvalues
        figures = max(figures, float(np.abs(x - y).max() / x[0]))
        for name, (mean, _) in a.statistics.averages.items():
            scale = max(abs(mean), 1e-3 * abs(a.statistics.averages["update_norm"][0]))
            figures = max(figures, abs(mean - b.statistics.averages[name][0]) / scale)
        if x[0] > 1.01 * x[1]:
            turned = max(turned, 1.0 - abs(float(a.directions[0].double() @ b.directions[0].double())))
    return figures, turned
