"""A first few inputs of every fuzz target; `make fuzz` tries thousands."""

import pytest

from tests.fuzz.run import run
from tests.fuzz.targets import TARGETS

INPUTS = {"gguf": 15, "parquet": 200, "jsonl": 500, "text": 500, "models-toml": 250, "model-argument": 250}


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_unforeseen(target):
    """A changed input is read, or refused with a message."""
    result = run(target, INPUTS.get(target, 20), seed="1", keep=False)
    assert result.unforeseen == []
    assert result.read + result.refused == result.inputs
