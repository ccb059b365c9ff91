"""Messages and the page of a run of GitHub Actions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from delta_suite.publish.github_actions import (
    SUMMARY,
    add_to_summary,
    baseline_command,
    error_command,
    step_summary,
    verdict_command,
)

from tests.publish.test_baseline_tables import comparisons, rows
from tests.publish.test_table import HELD, REFUTED, WARNS
from tests.regression.planted import planted


def test_a_verdict_is_a_message_beside_its_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    hostile = replace(REFUTED, model="a::b,c\n::error::x", reason="100% of it\r\n::warning::y")
    line = verdict_command(hostile, tmp_path / "sub")
    place, _, message = line.removeprefix("::error ").partition("::")
    assert place == (
        r"file=sub/hypotheses/phase_c.toml,line=14,title=phase-c/few%3A FAIL for a%3A%3Ab%2Cc\n%3A%3Aerror%3A%3Ax"
    )
    assert message == r"intra_cosine over C > 0.5; observed 0.3100; 100%25 of it\r\n::warning::y"
    assert verdict_command(WARNS, tmp_path).startswith("::warning file=hypotheses/phase_c.toml,line=14,")
    assert error_command("a model\n  is gone") == "::error title=not measured::a model is gone"


def test_an_item_of_a_baseline_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_WORKSPACE", raising=False)
    (drifted,) = (row for row in rows(comparisons(tmp_path / "m.json", planted(shift=1.0))) if row.fails)
    title = "layers/stream_norm%3A drift for m"
    assert baseline_command(drifted) == f"::error file=m.json,title={title}::10.00 before, 11.00 now"


def test_the_page_has_the_grid_with_models_that_have_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = step_summary([HELD, REFUTED], [], ["gone cannot be measured:\n  why"], ["a", "gone"])
    assert "| hypothesis | claim | a | gone |" in page
    assert r"✗ FAIL 0.310 \* | - |" in page
    assert r"\* another variant gives another verdict" in page
    assert page.endswith("gone cannot be measured: why\n")
    monkeypatch.setenv(SUMMARY, str(tmp_path / "page.md"))
    assert add_to_summary(page) is add_to_summary(page) is None
    assert (tmp_path / "page.md").read_text() == page * 2
    monkeypatch.setenv(SUMMARY, str(tmp_path))
    assert "cannot be written: Is a directory" in str(add_to_summary(page))
    monkeypatch.delenv(SUMMARY)
    assert add_to_summary(page) is None
