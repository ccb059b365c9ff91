"""Metrics of causes and damage from sums of losses: formulas, intervals, and figures that do not exist."""

from __future__ import annotations

import numpy as np
import pytest
from delta_suite.capture.units import Units
from delta_suite.metrics.causal import cause_estimates, damage_estimates
from delta_suite.metrics.intervals import critical_t
from delta_suite.reduction.losses import CONDITIONS, UNDISTURBED, Causes, Damage, Losses, chosen_documents

RISES = {"zero": 1.0, "kept": 0.25, "shared": 0.8, "matched": 0.1, "random": 0.0, "mean": 2.0, "law": 0.5}
"""The loss under each condition less the undisturbed loss, in nats per token, but for noise."""


def causes(units: Units, noise: float = 0.01, **rises: float) -> tuple[Causes, np.ndarray, np.ndarray]:
    """Return causes with these rises in a phase C of three layers, and the losses and tokens of each document."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(50, 100, len(units.groups)).astype(np.float64)
    base = 3.0 + 0.3 * draw.standard_normal(len(tokens))
    each = {**RISES, **rises}
    rows = [base, *(base + each[name] + noise * draw.standard_normal(len(tokens)) for name in CONDITIONS)]
    nats = np.array(rows) * tokens
    names = [UNDISTURBED, *(f"C.{name}" for name in CONDITIONS)]
    losses = Losses.of_documents(names, nats, tokens, units)
    return Causes({"C": (1, 3)}, losses, len(tokens), 15.0, {"C": 1.0}), nats, tokens


def test_figures_are_their_formulas_over_all_tokens() -> None:
    measured, nats, tokens = causes(Units.of(40))
    loss = dict(zip(["", *CONDITIONS], nats.sum(axis=1) / tokens.sum(), strict=True))
    effect = loss["zero"] - loss[""]
    expected = {
        "causal_effect": effect,
        "causal_effect_matched": loss["matched"] - loss[""],
        "causal_effect_random": loss["random"] - loss[""],
        "causal_sharing": (loss["shared"] - loss[""]) / effect,
        "causal_constant": 1 - (loss["kept"] - loss[""]) / effect,
        "law_recovered": (loss["mean"] - loss["law"]) / (loss["mean"] - loss[""]),
    }
    figures = cause_estimates(measured, "C")
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        assert figures[name].value == pytest.approx(value), name
        low, high = figures[name].interval
        assert low < value < high
        assert high - low < 0.1
    assert figures["causal_effect_matched"].detail["matched"] == 1.0


def test_intervals_delete_a_group_at_a_time_and_domains_are_the_wider_question() -> None:
    domains = [str(document // 4) for document in range(40)]
    units = Units.of(40, domains)
    measured, nats, tokens = causes(units, noise=0.2)
    figure = cause_estimates(measured, "C")["causal_effect"]
    without = []
    for group in range(10):
        rest = np.array(units.groups) != group
        without.append(((nats[1] - nats[0])[rest]).sum() / tokens[rest].sum())
    assert figure.replicates == pytest.approx(without)
    half = critical_t(10) * np.sqrt(0.9 * ((np.array(without) - np.mean(without)) ** 2).sum())
    assert figure.interval == pytest.approx((figure.value - half, figure.value + half))
    assert len(figure.replicates_documents) == units.document_group_count
    assert figure.interval_documents != figure.interval


def test_shares_of_no_effect_do_not_exist() -> None:
    measured, *_ = causes(Units.of(40), noise=0.3, zero=0.01, mean=0.5)
    figures = cause_estimates(measured, "C")
    for name in ("causal_sharing", "causal_constant"):
        assert figures[name].value is None
        assert "not clearly above 0" in figures[name].reason
    assert figures["causal_effect"].value is not None
    assert figures["law_recovered"].value == pytest.approx(0.0, abs=0.5)


def test_documents_are_dealt_from_all_groups_in_turn() -> None:
    units = Units.of(40, [str(document // 4) for document in range(40)])
    chosen = chosen_documents(units, 20)
    assert [document // 4 for document in chosen] == [domain for domain in range(10) for _ in range(2)]
    assert {units.groups[document] % 2 for document in chosen} == {0, 1}
    assert chosen_documents(units, 100) == list(range(40))


def test_damage_is_of_the_block_and_exchanges_of_its_neighbours() -> None:
    names = (UNDISTURBED, "skip.0", "skip.1", "skip.2", "swap.0", "swap.1")
    rises = np.array([0.0, 5.0, 1.0, -0.1, 2.0, 4.0])
    nats = (3.0 + rises)[:, None] * np.ones(12) * 10.0
    losses = Losses.of_documents(names, nats, np.full(12, 10.0), Units.of(12))
    layers = damage_estimates(Damage(losses, 12, 6.0), 3)
    assert [each["layer_damage"].value for each in layers] == pytest.approx([5.0, 1.0, -0.1])
    assert [each["exchange_damage"].value for each in layers] == pytest.approx([2.0, 3.0, 4.0])
    failed = damage_estimates(Damage(losses, 12, 6.0, {"swap.1": "it does not run"}), 3)
    assert [each["exchange_damage"].reason for each in failed] == [None, "it does not run", "it does not run"]
    (one,) = damage_estimates(Damage(Losses(names[:2], nats[:2, :4], np.full(4, 10.0))), 1)
    assert one["layer_damage"].value == pytest.approx(5.0)
    assert one["exchange_damage"].reason == "the model has one block, which has no neighbour"
