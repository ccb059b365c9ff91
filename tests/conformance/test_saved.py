"""Families of models saved and loaded whole, and damaged; the whole list is `python -m tests.conformance.saved`."""

from __future__ import annotations

from pathlib import Path

import pytest
from delta_suite.models import loading

from tests.conformance.build import architectures
from tests.conformance.saved import examine

FAMILIES = ("llama", "gpt2", "gpt_neox", "mixtral", "deepseek_v3", "gemma3", "t5", "llava", "mamba")


@pytest.mark.parametrize("family", FAMILIES)
def test_accepted_whole_and_refused_damaged(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_tokenizer", lambda spec, files: None)
    architecture = next(architecture for architecture in architectures() if architecture.model_type == family)
    trials = examine(architecture, tmp_path)
    assert [wrong for _, wrong in trials] == [""] * len(trials)
    assert {"whole", "one more"} <= {trial for trial, _ in trials}
