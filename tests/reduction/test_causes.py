"""Interventions and the loss under them: against plain hooks in float64, what is left alone, and what has no loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from delta_suite.capture import intervene
from delta_suite.capture.calibration import load_calibration
from delta_suite.capture.intervene import Intervening, Intervention
from delta_suite.capture.residual import Capture
from delta_suite.capture.stream import Memory
from delta_suite.capture.tokens import TokenSequences, tokenize
from delta_suite.capture.units import Units
from delta_suite.metrics import causal
from delta_suite.metrics.causal import cause_estimates, damage_estimates
from delta_suite.models.blocks import find_decoder
from delta_suite.provenance import Clock
from delta_suite.reduction.losses import CONDITIONS, ONE_HALF, UNDISTURBED, Causes, Damage, chosen_documents
from delta_suite.reduction.passes import Captured, Passes
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.reference import causal_losses
from tests.training import passages, write_documents

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
def trained(trained_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("causes")
    checkpoint = trained_checkpoints / "checkpoint-30"
    calibration = load_calibration(str(write_documents(folder / "texts.jsonl", passages()[-DOCUMENTS:])))
    sequences = tokenize(calibration, AutoTokenizer.from_pretrained(checkpoint), 512, None)
    return Trained(checkpoint, sequences, Units.of(DOCUMENTS))


@pytest.fixture(scope="module")
def captured(trained: Trained) -> Captured:
    return trained.passes(trained.model(), causes=PHASES, damage=True)


@pytest.fixture(scope="module")
def expected(trained: Trained, captured: Captured) -> dict[str, np.ndarray]:
    """Return the losses of plain hooks in float64 by condition, of each document, with the ridge of the law."""
    texts = [None] * DOCUMENTS
    for ids, document in zip(trained.sequences.ids, trained.sequences.documents, strict=True):
        texts[document] = ids
    half = [group % 2 for group in trained.units.groups]
    assert captured.law.reason is None
    phases = {name: PHASES[name] for name in ("C", "E")}
    losses = causal_losses(trained.model(torch.float64), texts, phases, half, captured.law.ridge)
    return {condition: np.array(documents) for condition, documents in losses.items()}


def test_the_losses_are_those_of_plain_hooks(
    trained: Trained, captured: Captured, expected: dict[str, np.ndarray]
) -> None:
    assert isinstance(captured.causes, Causes)
    assert isinstance(captured.damage, Damage)
    causes, damage = captured.causes.losses, captured.damage.losses
    assert set(causes.conditions) == {UNDISTURBED, *(f"{phase}.{each}" for phase in "CE" for each in CONDITIONS)}
    member = np.equal.outer(np.array(trained.units.groups), np.arange(trained.units.group_count))
    for losses in (causes, damage):
        ran = chosen_documents(trained.units, DOCUMENTS if losses is causes else 16)
        for row, condition in enumerate(losses.conditions):
            if condition not in expected:
                assert losses is damage
                continue
            each = np.where(np.isin(np.arange(DOCUMENTS), ran), expected[condition], 0.0)
            np.testing.assert_allclose(losses.nats[row], each @ member, rtol=1e-6, err_msg=condition)
    assert captured.causes.passes < len(causes.conditions)


def test_the_metrics_are_those_of_plain_hooks_in_float64(
    trained: Trained, expected: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in float64, as a difference of losses keeps fewer digits than a loss.

    So small a model needs none of its directions, and shares of an effect of 0.01 nats are formed all the same.
    """
    monkeypatch.setattr(causal, "_above_zero", lambda figure: True)
    found = trained.passes(trained.model(torch.float64), causes=PHASES, damage=True)
    lengths = np.zeros(DOCUMENTS)
    for ids, document in zip(trained.sequences.ids, trained.sequences.documents, strict=True):
        lengths[document] += len(ids) - 1

    def rise(condition: str, documents: Sequence[int] = range(DOCUMENTS)) -> float:
        """Return the loss under a condition less the undisturbed loss, in nats per token."""
        chosen = list(documents)
        return float((expected[condition] - expected[UNDISTURBED])[chosen].sum() / lengths[chosen].sum())

    for phase in "CE":
        zero, kept, shared, matched, random, mean, law = (rise(f"{phase}.{condition}") for condition in CONDITIONS)
        wanted = {
            "causal_effect": zero,
            "causal_effect_matched": matched,
            "causal_effect_random": random,
            "causal_sharing": shared / zero,
            "causal_constant": 1 - kept / zero,
            "law_recovered": (mean - law) / mean,
        }
        figures = cause_estimates(found.causes, phase)
        assert figures.keys() == wanted.keys()
        for name, value in wanted.items():
            assert figures[name].value == pytest.approx(value, abs=1e-6), (phase, name)
    ran = chosen_documents(trained.units, 16)
    damage = damage_estimates(found.damage, 6)
    assert damage[3]["layer_damage"].value == pytest.approx(rise("skip.3", ran), rel=1e-6)
    assert damage[0]["exchange_damage"].value == pytest.approx(rise("swap.0", ran), rel=1e-6)


def run(trained: Trained, model: Any, *interventions: Intervention, device: torch.device = CPU) -> np.ndarray:
    """Return the losses of the first six documents, undisturbed and under each intervention."""
    intervening = Intervening(
        model,
        find_decoder(model),
        trained.sequences,
        interventions,
        documents=range(6),
        halves=[group % 2 for group in trained.units.groups],
        entering=torch.ones(trained.sequences.tokens, dtype=torch.bool),
        device=device,
        tokens_per_batch=300,
    )
    return intervening.losses().nats[:, :6]


def half(h: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return delta / 2


def unchanged(h: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return delta


SOME = (
    Intervention("half", {3: (half, half), 4: (half, unchanged)}),
    Intervention("skip", runs={4: None}),
    Intervention("swap", runs={2: 3, 3: 2}),
)


def test_updates_put_back_change_no_bit_and_halves_only_their_own_documents(trained: Trained) -> None:
    model = trained.model()
    put_back = Intervention("same", dict.fromkeys(range(6), (unchanged, unchanged)))
    of_b = Intervention("b", {2: (unchanged, half)})
    same, changed, alone = run(trained, model, put_back, of_b)
    assert (same == changed).all()
    assert [bool(a == b) for a, b in zip(same, alone, strict=True)] == [True, False] * 3
    assert all("forward" not in block.__dict__ and not block._forward_hooks for block in model.model.layers)


def test_blocks_that_do_not_run_again_change_no_loss(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    reused = run(trained, trained.model(), *SOME)
    monkeypatch.setattr(intervene, "SAME_LOSS", -1.0)  # no pass has the same loss, so that all blocks run in each
    np.testing.assert_allclose(run(trained, trained.model(), *SOME), reused, rtol=1e-7)


def test_an_offloaded_model_has_the_same_losses(trained: Trained, tmp_path: Path) -> None:
    from accelerate import disk_offload

    offloaded = trained.model()
    disk_offload(offloaded, str(tmp_path), execution_device=CPU)
    assert next(offloaded.model.layers[3].parameters()).is_meta
    np.testing.assert_allclose(run(trained, offloaded, *SOME), run(trained, trained.model(), *SOME), rtol=1e-6)


def test_a_stream_in_shards_has_the_same_causes(trained: Trained, captured: Captured) -> None:
    model = trained.model()
    passes = Passes(model, find_decoder(model), trained.sequences, [CPU], Clock())
    passes.capture = Capture(model, find_decoder(model), trained.sequences, device=CPU, memory=Memory(device=1 << 21))
    assert not passes.capture.whole
    causes = passes.run(None, units=trained.units, with_spectra=False, causes=PHASES).causes
    np.testing.assert_allclose(causes.losses.nats, captured.causes.losses.nats, rtol=1e-5)


def test_a_model_without_a_head_has_no_losses_and_says_so(trained: Trained) -> None:
    model = trained.model().model
    found = trained.passes(model, phases=None, causes=PHASES, damage=True)
    for part in (found.causes, found.damage):
        assert part.losses is None
        assert part.reason == "LlamaModel has no language-model head: it returns no logits"
    figures = [*cause_estimates(found.causes, "C").values(), *damage_estimates(found.damage, 6)[2].values()]
    assert all(figure.value is None and "no language-model head" in figure.reason for figure in figures)


def test_one_document_and_other_phases_have_no_causes(trained: Trained) -> None:
    model = trained.model()
    assert "phase C or E" in trained.passes(model, phases=None, causes={"A": (0, 5)}).causes.reason
    first = TokenSequences(trained.sequences.ids[:1], (0,), (True,), drop_first_token=False)
    passes = Passes(model, find_decoder(model), first, [CPU], Clock())
    one = passes.run(None, units=Units.of(1), with_spectra=False, causes=PHASES, damage=True)
    assert one.causes.reason == ONE_HALF
    figure = damage_estimates(one.damage, 6)[0]["layer_damage"]
    assert figure.value is not None
    assert figure.interval is None
