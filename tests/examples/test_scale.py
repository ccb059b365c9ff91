"""The simulator of examples/scale.py reproduces what was measured on one GPU, and breaks where the designs do."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

SCALE: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "scale.py"))
LARGE, RATES = SCALE["MODELS"]["32b"], SCALE["Rates"]()

EIGH_H200 = 0.195
"""Seconds of one eigenproblem of 5,120 on an H200 (results/benchmarks.md)."""


@pytest.mark.parametrize(("tokens", "seconds"), [(16_384, 13.6), (32_768, 16.3), (65_536, 21.7), (131_072, 32.6)])
def test_runs_of_a_32b_shape_on_one_h200(tokens: int, seconds: float) -> None:
    assert SCALE["one_gpu"](LARGE, tokens, RATES, eigh=EIGH_H200) == pytest.approx(seconds, rel=0.2)


def test_each_further_token() -> None:
    longer, shorter = (SCALE["one_gpu"](LARGE, tokens, RATES) for tokens in (131_072, 65_536))
    assert (longer - shorter) / 65_536 == pytest.approx(166e-6, rel=0.2)


def test_the_bare_forward_pass() -> None:
    assert SCALE["predict"](LARGE, 65_536, 1, RATES, memory=1e12).forward == pytest.approx(8.25, rel=0.2)


def test_every_process_more_lets_the_forward_pass_take_less() -> None:
    seconds = [SCALE["predict"](LARGE, 1e8, gpus, RATES).forward for gpus in (8, 64, 512)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] == pytest.approx(64 * seconds[2])


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    SCALE["main"](["--model", "405b", "--gpus", "8", "--design", "held"])
    assert "the weights do not fit" in capsys.readouterr().out


def test_owners_need_fewer_passes_and_move_more() -> None:
    held, owners = (SCALE["predict"](LARGE, 1e8, 64, RATES, design=design) for design in ("held", "owners"))
    assert owners.passes < held.passes
    assert owners.merged_bytes > held.merged_bytes
    assert owners.efficiency > held.efficiency
