"""Claims in words, and the JSON Schema of hypothesis files."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from delta_suite.claims.json_schema import json_schema
from delta_suite.claims.loader import load_hypothesis
from delta_suite.claims.null_kinds import NULLS
from delta_suite.claims.schema import Expectation, Than
from delta_suite.metrics.registry import METRICS
from delta_suite.models.phases import declared_problems
from delta_suite.reduction.variants import BLOCK_VARIANTS
from jsonschema import Draft4Validator

from tests.claims.hypothesis_texts import ALSO_GOOD, GOOD, SLIPS, Slip, errors_of, slipped
from tests.test_toml_lines import places

HYPOTHESES = Path(__file__).parents[2] / "hypotheses"


@pytest.mark.parametrize(
    ("keys", "claim"),
    [
        ({"metric": "intra_cosine", "threshold": 0.5}, "intra_cosine over C >= 0.5"),
        ({"metric": "intra_cosine", "over": "min", "threshold": 0.5}, "min intra_cosine over C >= 0.5"),
        ({"metric": "capture_fraction", "threshold": 0.7}, "capture_fraction over C >= 0.7"),
        ({"metric": "shared_fraction", "threshold": 1}, "shared_fraction over C >= 1"),
        ({"metric": "gamma", "scope": "layer:3", "threshold": 1e-12}, "gamma over layer:3 >= 1e-12"),
        (
            {"metric": "gamma", "scope": "layers:3-5", "threshold": 0.1234567891},
            "mean gamma over layers:3-5 >= 0.1234567891",
        ),
        ({"metric": "adjacent_cosine", "scope": "model", "threshold": -2}, "mean adjacent_cosine over model >= -2"),
        ({"metric": "gamma", "over": "each", "threshold": 12}, "gamma of each layer of C >= 12"),
        (
            {"metric": "gamma", "over": "each", "mostly": 0.55, "threshold": 12},
            "gamma of at least 55% of the layers of C >= 12",
        ),
        (
            {"metric": "intra_cosine", "than": Than(scope="E", times=2)},
            "intra_cosine over C >= 2 x intra_cosine over E",
        ),
        (
            {"metric": "effective_rank", "than": Than(scope="E")},
            "mean effective_rank over C >= mean effective_rank over E",
        ),
        (
            {"metric": "gamma", "over": "each", "than": Than(scope="C", times=0.5)},
            "gamma of each layer of C >= 0.5 x mean gamma over C",
        ),
        (
            {"metric": "intra_cosine", "than": Than(scope="C", metric="cross_cosine", times=1.5)},
            "intra_cosine over C >= 1.5 x cross_cosine over C",
        ),
        (
            {"metric": "sharing_index", "than": Than(scope="E", times=2, plus=-0.2)},
            "median sharing_index over C >= 2 x median sharing_index over E - 0.2",
        ),
        (
            {"metric": "gamma", "than": Than(scope="E", plus=3)},
            "mean gamma over C >= mean gamma over E + 3",
        ),
        (
            {"metric": "intra_cosine", "than": Than(null="window", quantile=0.9)},
            "intra_cosine over C >= 90% of windows of as many layers",
        ),
        (
            {"metric": "intra_cosine", "than": Than(null="lag", times=2, plus=0.1)},
            "intra_cosine over C >= 2 x pairs outside at the same distances + 0.1",
        ),
        (
            {"metric": "gamma", "over": "max", "than": Than(null="random-weights", scope="E", times=2)},
            "max gamma over C >= 2 x max gamma over E with random weights",
        ),
        (
            {"metric": "gamma", "variant": "centred", "write": "mlp", "over": "each", "threshold": 12},
            "gamma of the MLP of each layer of C >= 12 (centred)",
        ),
        (
            {
                "metric": "intra_cosine",
                "variant": "sink_free",
                "write": "mlp",
                "than": Than(scope="C", write="attention", times=2),
            },
            "intra_cosine of the MLP over C >= 2 x intra_cosine of attention over C (sink_free)",
        ),
    ],
)
def test_a_claim_in_one_line(keys: dict[str, Any], claim: str) -> None:
    assert Expectation.model_validate({"id": "x", "scope": "C", "op": ">=", "origin": "x"} | keys).claim() == claim


def test_a_claim_names_its_variant() -> None:
    claim = Expectation(id="x", metric="gamma", scope="C", variant="sink_free", op=">", threshold=1, origin="x").claim()
    assert claim == "mean gamma over C > 1 (sink_free)"


@pytest.mark.parametrize("phase", ["C", "early-mid", "late_2"])
def test_a_scope_names_every_phase_that_a_model_can_have(phase: str, file: Callable[[str], Path]) -> None:
    assert declared_problems({phase: (0, 1)}) == []
    path = file(GOOD.replace('scope = "C"', f'scope = "{phase}"', 1))
    assert load_hypothesis(path).expect[0].scope == phase


# --- JSON Schema ------------------------------------------------------------


def test_the_schema_is_draft_4() -> None:
    Draft4Validator.check_schema(json_schema())
    later = {"$defs", "const", "prefixItems", "if", "examples", "unevaluatedProperties", "dependentRequired"}
    assert not later & {key for loc in places(json_schema()) for key in loc}


@pytest.mark.parametrize(("old", "new"), ALSO_GOOD)
def test_schema_and_loader_accept(old: str, new: str, file: Callable[[str], Path]) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    assert errors_of(file(text)) == []
    Draft4Validator(json_schema()).validate(tomllib.loads(text))


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip.says)
def test_the_schema_refuses_wrong_keys_types_and_words_and_leaves_the_rest_to_the_loader(slip: Slip) -> None:
    assert Draft4Validator(json_schema()).is_valid(tomllib.loads(slipped(slip))) == (not slip.expressible)


def test_the_schema_lists_every_metric_variant_and_null_with_its_description() -> None:
    claim, than = (json_schema()["definitions"][table]["properties"] for table in ("Expectation", "Than"))
    assert claim["metric"]["enum"] == than["metric"]["enum"] == list(METRICS)
    assert claim["variant"]["enum"] == list(BLOCK_VARIANTS)
    assert than["null"]["enum"] == list(NULLS)
    assert all(f"{null.name}, {null.description}" in than["null"]["description"] for null in NULLS.values())


def test_the_schema_file_is_up_to_date() -> None:
    written = (HYPOTHESES / "hypothesis.schema.json").read_text(encoding="utf-8")
    assert written == json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n", (
        "run: delta-suite schema > hypotheses/hypothesis.schema.json"
    )
