"""Settings, standard deviations and boundaries that cannot be, and replicates that hide an interval from its check."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from delta_suite.records import verify
from delta_suite.records.arrays import Arrays
from delta_suite.records.format import from_json, to_json

from tests.records.random_streams import ordinary_record

Content = dict[str, Any]


@pytest.fixture(scope="module")
def measured() -> tuple[str, Arrays]:
    record, arrays = ordinary_record()
    return to_json(record), arrays


def set_in(*path: str | int, **values: object) -> Callable[[Content], None]:
    """Return a change of some keys of what lies at a path of a record."""

    def change(content: Any) -> None:
        for key in path:
            content = content[key]
        content.update(values)

    return change


RAW = ("layers", 3, "metrics", "raw")
BOUNDARIES = ("boundaries", "raw", "metrics")


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        (
            set_in(*RAW, "relative_step", sd=1e300),
            "relative_step: the sd is 1e+300",
        ),
        (set_in(*RAW, "stream_norm", sd=1e300), "layer 3, raw, stream_norm: the sd is 1e+300"),
        (set_in(*BOUNDARIES, boundary_cost_rank={"value": 0.5}), "and 20 are the fewest"),
        (set_in(*BOUNDARIES, "boundary_p", reason="few"), "boundary_p: it has the value"),
        (set_in(*BOUNDARIES, "boundary_p", "detail", drift_dimensions=-3.0), "its drifts have -3 dimensions"),
        (set_in("provenance", dtype="float33"), "provenance.dtype: 'float33' is none of float64"),
        (set_in("provenance", "settings", threads=-2), "provenance.settings.threads: -2 is outside"),
        (set_in("provenance", "settings", max_tokens=1e300), "provenance.settings.max_tokens: 1e+300 is outside"),
        (set_in("provenance", "settings", drop_first_token=True), "and first tokens were kept"),
        (set_in("calibration", dropped=1), "by the settings none was dropped"),
        (set_in("calibration", chat_template=True), "it is True, and False among the settings"),
    ],
)
def test_what_cannot_be_is_named(measured: tuple[str, Arrays], change: Callable[[Content], None], telling: str) -> None:
    content = json.loads(measured[0])
    content["provenance"]["settings"].update(drop_first_token=False, chat_template=False)
    content["calibration"]["chat_template"] = False
    record, _ = from_json(json.dumps(content), "a record")
    assert verify.problems(record, measured[1]) == []
    change(content)
    record, _ = from_json(json.dumps(content), "a record")
    found = [str(problem) for problem in verify.problems(record, measured[1])]
    assert any(telling in problem for problem in found), found[:5]


def test_an_interval_is_not_hidden_by_a_replicate_that_is_no_number(measured: tuple[str, Arrays]) -> None:
    record, _ = from_json(measured[0], "a record")
    replicates = measured[1]["raw.units.gamma"].copy()
    replicates[0, 0] = np.nan
    found = [str(problem) for problem in verify.problems(record, {**measured[1], "raw.units.gamma": replicates})]
    assert any(problem.startswith("layer 0, raw, gamma: ") and "gives absent" in problem for problem in found), found
