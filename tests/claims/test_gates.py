"""Gates: what a measurement must be before a verdict may be drawn from it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from delta_suite.capture.stream import ResidualStream
from delta_suite.claims.gates import failed_gates
from delta_suite.claims.observe import observe
from delta_suite.claims.schema import Expectation
from delta_suite.records.view import RecordView
from delta_suite.reduction.variants import VARIANTS
from delta_suite.selftest.documents import DOCUMENTS
from delta_suite.selftest.proof import measured

LAYERS, LENGTH, HIDDEN = 4, 8, 24


@pytest.fixture(scope="module")
def constant() -> RecordView:
    """Every update is one vector on all tokens, so that what is left of it without its mean is rounding of the sums."""
    draw = torch.Generator().manual_seed(0)
    document = torch.arange(DOCUMENTS * LENGTH) // LENGTH
    states = [torch.randn(len(document), HIDDEN, generator=draw)]
    for _ in range(LAYERS):
        states.append(states[-1] + torch.randn(HIDDEN, generator=draw))
    position = torch.arange(len(document)) % LENGTH + 1
    stream = ResidualStream(states, document, position, torch.ones(len(document), dtype=torch.bool), "device")
    world = SimpleNamespace(variants=VARIANTS, scopes={"C": (0, LAYERS - 1)}, of_law=False)
    return measured(stream, world)  # type: ignore[arg-type]


@pytest.mark.parametrize(("variant", "shut"), [("raw", False), ("sink_free", False), ("centred", True)])
@pytest.mark.parametrize("metric", ["effective_rank", "intra_cosine"])
def test_rounding_decides_nothing(constant: RecordView, metric: str, variant: str, shut: bool) -> None:
    claim = Expectation.model_validate(
        {
            "id": "few",
            "metric": metric,
            "variant": variant,
            "scope": "C",
            "op": ">=",
            "threshold": 0.5,
            "origin": "made up",
        }
    )
    gates = failed_gates(claim, observe(constant, metric, "C", variant), None, constant)
    said = {gate.name: gate.says for gate in gates}
    assert ("rounding" in said) == shut
    if shut:
        assert f"of {LAYERS} layers half of the update's energy or more is rounding" in said["rounding"]
