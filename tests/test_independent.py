"""What verdicts rest on, recomputed from a trained model's weights by plain hooks and full SVDs, all in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from delta_suite.capture.calibration import load_calibration
from delta_suite.capture.tokens import tokenize
from delta_suite.capture.units import Units
from delta_suite.metrics.direction_gram import DirectionGram
from delta_suite.metrics.drift import FEWEST_LAYERS, FITTED, SmoothDrifts, against_drifts
from delta_suite.metrics.estimators import layer_metrics, phase_metrics
from delta_suite.metrics.segmentation import DRAWS, SEED
from delta_suite.models.blocks import find_decoder
from delta_suite.provenance import Clock
from delta_suite.reduction.passes import Captured, Passes
from delta_suite.reduction.replicates import LayerSpectra
from delta_suite.reduction.variants import WRITE_VARIANTS
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.reference import (
    domain_jackknife,
    drift_p,
    edge_contrast,
    phase_figures,
    sublayer_rows,
    write_figures,
)
from tests.training import passages, train, write_documents

DOCUMENTS, DOMAINS = 12, 6
PHASES = {"C": range(4, 10), "E": range(13, 17)}


@dataclass(frozen=True)
class Trained:
    """A trained model of as few layers as drifts are held against: the suite's passes over it, and plain rows."""

    captured: Captured
    units: Units
    rows: dict[str, list[list[np.ndarray]]]
    document: np.ndarray
    """The document of each row."""

    @property
    def updates(self) -> list[np.ndarray]:
        states = [np.concatenate(documents) for documents in self.rows["h"]]
        return [after - before for before, after in pairwise(states)]

    @property
    def spectra(self) -> list[LayerSpectra]:
        return self.captured.spectra["raw"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("independent")
    texts = passages(80)
    (checkpoint,) = train(folder, steps=[5], texts=texts[:200], layers=FEWEST_LAYERS)
    calibration = load_calibration(str(write_documents(folder / "texts.jsonl", texts[-DOCUMENTS:])))
    sequences = tokenize(calibration, AutoTokenizer.from_pretrained(checkpoint), 512, None)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, attn_implementation="eager").eval()
    units = Units.of(DOCUMENTS, [str(document % DOMAINS) for document in range(DOCUMENTS)])
    passes = Passes(model, find_decoder(model), sequences, [torch.device("cpu")], Clock(), writes=True)
    rows = sublayer_rows(model, list(sequences.ids))
    document = np.repeat(sequences.documents, [len(ids) for ids in sequences.ids])
    return Trained(passes.run(None, units=units), units, rows, document)


def gram_of(layers: list[LayerSpectra]) -> DirectionGram:
    """Return the inner products of directions as they are reduced; records round those without a domain to float16."""
    whole, a, b = (
        np.stack([each.numpy() for each in part])
        for part in zip(*((layer.directions, *(layer.half_directions or ())) for layer in layers), strict=True)
    )
    without = [layer.replicates.directions.numpy() for layer in layers if layer.replicates is not None]
    replicates = tuple(DirectionGram.of(np.stack(group)) for group in zip(*without, strict=True))
    return replace(DirectionGram.of(whole, (a, b)), replicates=replicates)


def test_the_jackknife_over_domains(trained: Trained) -> None:
    domain, phase = trained.document % DOMAINS, list(PHASES["C"])
    assert trained.units.groups == tuple(document % DOMAINS for document in range(DOCUMENTS))
    expected = domain_jackknife(trained.updates, domain, phase)
    of_layer = trained.spectra[phase[0]]
    found = layer_metrics(of_layer.statistics, *of_layer.resamples)
    found |= phase_metrics(gram_of(trained.spectra), phase)
    reach = stats.t.ppf(0.975, DOMAINS - 1)
    for name, (value, without) in expected.items():
        estimate = found[name]
        assert estimate.value == pytest.approx(value, rel=1e-6), name
        assert estimate.replicates == pytest.approx(without, rel=1e-6), name
        error = np.sqrt((DOMAINS - 1) / DOMAINS * ((without - without.mean()) ** 2).sum())
        assert estimate.interval is not None
        low, high = estimate.interval
        assert (high - low) / 2 == pytest.approx(reach * error, rel=1e-4, abs=1e-6), name


def test_equal_cosines_of_phases(trained: Trained) -> None:
    directions = [np.linalg.svd(update, full_matrices=False)[2][:8] for update in trained.updates]
    gram = gram_of(trained.spectra)
    for phase in PHASES.values():
        expected, found = phase_figures(directions, list(phase)), phase_metrics(gram, list(phase))
        for name in ("equal_cosine", "block_effective_rank", "intra_cosine", "subspace_overlap"):
            assert found[name].value == pytest.approx(expected[name], abs=1e-6), name


def test_what_attention_and_mlp_write(trained: Trained) -> None:
    assert isinstance(trained.captured.writes, dict)
    expected = write_figures(trained.rows)
    assert expected.keys() == WRITE_VARIANTS.keys() == trained.captured.writes.keys()
    for variant, layers in trained.captured.writes.items():
        for layer, spectra in enumerate(layers):
            found = layer_metrics(spectra.statistics)
            for name in ("gamma", "effective_rank", "top3_energy"):
                assert found[name].value == pytest.approx(expected[variant][layer][name], rel=1e-6), (variant, layer)
        gram = gram_of(layers)
        for phase in PHASES.values():
            wanted = phase_figures([values["directions"] for values in expected[variant]], list(phase))
            found = phase_metrics(gram, list(phase))
            for name in ("intra_cosine", "equal_cosine"):
                assert found[name].value == pytest.approx(wanted[name], abs=1e-6), (variant, name)


@pytest.mark.parametrize(("metric", "phase"), list(zip(FITTED, PHASES.values(), strict=True)))
def test_smooth_drifts(trained: Trained, metric: str, phase: range) -> None:
    half = np.array(trained.units.groups)[trained.document] % 2
    a, b, whole = (
        np.stack([np.linalg.svd(update[rows], full_matrices=False)[2][0] for update in trained.updates])
        for rows in (half == 0, half == 1, half >= 0)
    )
    cosines = np.abs(whole @ whole.T)
    if metric == "intra_cosine_cross_fitted":
        cosines = (np.abs(a @ b.T) + np.abs(b @ a.T)) / 2
    found = against_drifts(gram_of(trained.spectra), metric, phase)
    assert isinstance(found, SmoothDrifts)
    assert found.statistic == pytest.approx(edge_contrast(cosines, phase), abs=1e-6)
    assert found.p == pytest.approx(drift_p(cosines, phase, SEED, DRAWS), abs=1e-12)
