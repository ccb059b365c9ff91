"""The law from sums of units of work is the law from the rows that they are over."""

from __future__ import annotations

import pytest
import torch
from delta_suite.capture.sinks import Sinks
from delta_suite.capture.stream import Memory, ResidualStream
from delta_suite.capture.units import Units
from delta_suite.capture.work_units import work_units
from delta_suite.errors import DeviceError
from delta_suite.reduction.law_fit import Tokens, fit_law, measure_law
from delta_suite.reduction.law_sums import GROUPS
from delta_suite.reduction.law_units import LawUnit, SummedUnits, layer_sums, place_of_products
from delta_suite.reduction.packed import added, packed
from delta_suite.reduction.reduce import add_up

from tests.reduction.test_law_memory import FEWER, LAYERS, PHASES, assert_same, stream

CPU = torch.device("cpu")


def sinks_of(part: ResidualStream) -> Sinks:
    """Return every seventh token of each document as a sink."""
    return Sinks(part.position % 7 == 3, 0, int((part.position % 7 == 3).sum()), ())


def test_the_law_from_sums_is_the_law_from_rows() -> None:
    """In principal components; tests/engines/test_split.py compares it where the maps act in all dimensions."""
    whole, size = stream(FEWER), FEWER
    units = Units.of(size[0], [f"domain {document % 30}" for document in range(size[0])])  # more than 20 groups
    moments, products, by_group, documents = [], [], [0] * GROUPS, 0
    law_groups = units.at_most(GROUPS).groups
    group_of = {}
    for unit in work_units(units, documents_each=2):
        part = whole.take(torch.isin(whole.document, torch.tensor(unit.documents)).nonzero().flatten())
        law = LawUnit(LAYERS, part.hidden, [CPU])
        half = len(part.document) // 2
        shards = [part.take(torch.arange(half)), part.take(torch.arange(half, len(part.document)))]
        for shard in shards:
            law.add(shard, sinks_of(shard).dropped)
        of_layers = add_up(shards, layers=LAYERS, units=units, devices=[CPU], sinks=sinks_of)
        moments.append([packed(layer) for layer in of_layers])
        products.append([layer.packed(unit.group) for layer in law.products])
        group_of[unit.group] = law_groups[unit.documents[0]]
        by_group[group_of[unit.group]] += law.tokens
        documents += len(law.documents)
    source = SummedUnits(
        lambda layer: layer_sums(
            added(unit[layer] for unit in moments),
            added(unit[layer] for unit in products),
            group_of,
            whole.hidden,
            CPU,
        ),
        LAYERS,
        whole.hidden,
    )
    from_sums = fit_law(
        lambda _: source,
        Tokens(tuple(by_group), documents),
        PHASES,
        CPU,
        units=units,
        layers=LAYERS,
        hidden=whole.hidden,
    )
    from_rows = measure_law(whole, PHASES, [CPU], units=units, sinks=sinks_of(whole))
    assert from_rows.components == 24
    assert_same(from_sums, from_rows, 1e-7)


def test_products_that_no_place_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Memory, "free", classmethod(lambda cls, device, share=0.5: Memory(1000)))
    with pytest.raises(DeviceError, match=r"the law's sums of 4 layers, over one unit of work, take .*--parts"):
        place_of_products(CPU, 4, 64)
