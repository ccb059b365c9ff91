"""The cut of a calibration into units of work."""

from __future__ import annotations

import torch
from delta_suite.capture.stream import Memory, fixed_shards
from delta_suite.capture.tokens import TokenSequences
from delta_suite.capture.units import ADDED_GROUPS, Units
from delta_suite.capture.work_units import work_units


def test_every_document_is_in_one_unit_and_every_domain_in_one_group() -> None:
    domains = [f"domain {document % 37}" for document in range(500)]
    units = Units.of(len(domains), domains)
    groups = units.at_most(ADDED_GROUPS).groups
    cut = work_units(units, documents_each=7)
    assert sorted(document for unit in cut for document in unit.documents) == list(range(500))
    assert [unit.number for unit in cut] == list(range(len(cut)))
    for unit in cut:
        assert len(unit.documents) <= 7
        assert len({groups[document] for document in unit.documents}) == 1
        assert list(unit.documents) == sorted(unit.documents)
    assert len({groups[unit.documents[0]] for unit in work_units(units)}) == len(work_units(units)) == ADDED_GROUPS


def test_one_document_is_one_unit() -> None:
    assert [list(unit.documents) for unit in work_units(Units.of(1))] == [[0]]


def test_a_unit_keeps_the_numbers_of_its_documents_and_their_order() -> None:
    ids = tuple(torch.arange(length) for length in (5, 4, 3, 2))
    sequences = TokenSequences(ids, (2, 0, 2, 1), (True, True, False, True), drop_first_token=True)
    assert (sequences.tokens, sequences.dropped) == (14, 3)
    part = sequences.of({2, 1})
    assert part.documents == (2, 2, 1)
    assert [len(piece) for piece in part.ids] == [5, 3, 2]
    assert (part.tokens, part.dropped) == (10, 2)


def test_shards_of_fixed_size_do_not_depend_on_memory() -> None:
    lengths, batches = [40, 30, 20, 10, 5], [range(1), range(1, 3), range(3, 5)]
    roomy, narrow = (list(fixed_shards(lengths, batches, 70, 8, Memory(device=room, disk=1))) for room in (10**6, 10))
    assert [shard for shard, _ in roomy] == [shard for shard, _ in narrow] == [[0], [1, 2, 3, 4]]
