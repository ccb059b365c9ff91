"""Interventions and the loss under them: against plain hooks in float64, what is left alone, and what has no loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from delta_suite.capture.calibration import load_calibration
from delta_suite.capture.tokens import TokenSequences, tokenize
from delta_suite.capture.units import Units
from delta_suite.models.blocks import find_decoder
from delta_suite.provenance import Clock
from delta_suite.reduction.losses import CONDITIONS, UNDISTURBED, Causes, Damage, chosen_documents
from delta_suite.reduction.passes import Captured, Passes
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.reference import causal_losses
from tests.training import passages, train, write_documents

DOCUMENTS = 20
PHASES = {"A": (0, 0), "C": (1, 3), "E": (4, 5)}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Trained:
    folder: Path
    sequences: TokenSequences
    units: Units

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype, attn_implementation="eager")
        return model.eval().requires_grad_(False)

    def passes(self, model: Any, **options: Any) -> Captured:
        passes = Passes(model, find_decoder(model), self.sequences, [CPU], Clock())
        return passes.run(options.pop("phases", PHASES), units=self.units, with_spectra=False, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("causes")
    texts = passages()
    (checkpoint,) = train(folder, steps=[30], texts=texts[:200])
    calibration = load_calibration(str(write_documents(folder / "texts.jsonl", texts[-DOCUMENTS:])))
    sequences = tokenize(calibration, AutoTokenizer.from_pretrained(checkpoint), 512, None)
    return Trained(checkpoint, sequences, Units.of(DOCUMENTS))


@pytest.fixture(scope="module")
def captured(trained: Trained) -> Captured:
    return trained.passes(trained.model(), causes=PHASES, damage=True)


def test_the_losses_are_those_of_plain_hooks(trained: Trained, captured: Captured) -> None:
    texts = [None] * DOCUMENTS
    for ids, document in zip(trained.sequences.ids, trained.sequences.documents, strict=True):
        texts[document] = ids
    half = [group % 2 for group in trained.units.groups]
    assert isinstance(captured.causes, Causes)
    assert isinstance(captured.damage, Damage)
    assert captured.law.reason is None
    phases = {name: PHASES[name] for name in ("C", "E")}
    expected = causal_losses(trained.model(torch.float64), texts, phases, half, captured.law.ridge)
    causes, damage = captured.causes.losses, captured.damage.losses
    assert set(causes.conditions) == {UNDISTURBED, *(f"{phase}.{each}" for phase in phases for each in CONDITIONS)}
    member = np.equal.outer(np.array(trained.units.groups), np.arange(trained.units.group_count))
    for losses in (causes, damage):
        ran = chosen_documents(trained.units, DOCUMENTS if losses is causes else 16)
        for row, condition in enumerate(losses.conditions):
            each = np.array(expected[condition])
            each[[document for document in range(DOCUMENTS) if document not in ran]] = 0.0
            np.testing.assert_allclose(losses.nats[row], each @ member, rtol=1e-6, err_msg=condition)
    assert captured.causes.passes < len(causes.conditions)
