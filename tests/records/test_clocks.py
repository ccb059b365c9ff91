"""The clocks of a record add up to the time that measuring took."""

from __future__ import annotations

import pytest
from delta_suite.pipeline import Outcome, Settings
from delta_suite.records.assemble import Assembled, measured_later, with_rest


def test_every_second_is_in_a_clock(outcome: tuple[Outcome, Settings]) -> None:
    record = outcome[0].view.record
    assert record.provenance.seconds["other"] > 0
    first = with_rest(Assembled(record, {}, {}), None, 1000.0)
    assert sum(first.record.provenance.seconds.values()) == pytest.approx(1000.0)
    later = record.provenance.model_copy(update={"seconds": {"law": 2.0}})
    completed = with_rest(measured_later(first, later), first, 2.5)  # half a second in no clock of the second run
    assert sum(completed.record.provenance.seconds.values()) == pytest.approx(1002.5)
