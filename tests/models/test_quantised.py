"""Checkpoints of bitsandbytes, where it is installed: measured, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from delta_suite.errors import CertificateError
from delta_suite.models.models_file import load_registry
from delta_suite.pipeline import Settings, measure
from delta_suite.records.cache import Cache
from delta_suite.records.view import RecordView

from tests.tiny import make_tiny

pytest.importorskip("bitsandbytes")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measured(folder: Path, **quantisation: Any) -> RecordView:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    tiny = make_tiny(folder / "tiny", layers=4, hidden=128)  # 4 bits come in blocks of 64
    model = AutoModelForCausalLM.from_pretrained(
        tiny, quantization_config=BitsAndBytesConfig(**quantisation), device_map=DEVICE
    )
    model.save_pretrained(folder / "quantised")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder / "quantised")
    settings = Settings(documents=8, device=DEVICE, results=folder, cache=Cache(folder / "cache"))
    return measure(load_registry().resolve(str(folder / "quantised")), settings).view


@pytest.mark.parametrize(
    "quantisation",
    [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True, "llm_int8_threshold": 0.0}],
    ids=["nf4", "int8"],
)
def test_measured(tmp_path: Path, quantisation: dict[str, Any]) -> None:
    measurement = measured(tmp_path, **quantisation)
    assert measurement.record.provenance.device == DEVICE
    assert measurement.layers[3].metrics["raw"]["effective_rank"].value > 1


def test_a_token_that_depends_on_its_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match=r"llm_int8_threshold is 0"):
        measured(tmp_path, load_in_8bit=True)
