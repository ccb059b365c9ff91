"""What a run prints: how much with -q, -v and --tb, how wide, and what GitHub Actions is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pytest_plugin.test_plugin import RUN

CLAIM = "mean top1_energy over C <= 0.001"


def run(project: pytest.Pytester, *options: str) -> list[str]:
    return list(project.runpytest(*RUN, "--model=tiny", *options).outlines)


def count(lines: list[str], text: str) -> int:
    return sum(text in line for line in lines)


def test_a_failure_is_told_once_and_longer_with_v(project: pytest.Pytester) -> None:
    lines = run(project)
    assert count(lines, "claims/fails is refuted for tiny") == count(lines, f"  claim      {CLAIM}") == 1
    assert count(lines, "claims/fails") == 2  # and in the command that shows it again
    assert not count(lines, "short test summary")
    assert not count(lines, "per layer")
    assert not count(lines, "phase  layers")
    longer = run(project, "-v")
    for text in (
        "  per layer  2: ",
        "  variants   raw ",
        "phase  layers",
        "layer  phase",
        "verdicts under every variant",
    ):
        assert count(longer, text) == 1, text
    assert count(run(project, "-v", "--tb=short"), "per layer") == 0


def test_q_prints_the_grid_alone(project: pytest.Pytester) -> None:
    lines = run(project, "-q")
    start = next(index for index, line in enumerate(lines) if line.startswith("hypothesis"))
    assert [line.split()[0] for line in lines[:start]] == [".F–"]
    assert [line.split()[:2] for line in lines[start + 2 : -1]] == [
        ["claims", "✗"],
        [".", "holds"],
        [".", "fails"],
        [".", "no-such-phase"],
        ["1", "of"],  # how many claims chance alone would support
    ]
    assert count(run(project, "-q", "--tb=short"), "claims/fails is refuted") == 1


def test_tb_line_and_tb_no(project: pytest.Pytester) -> None:
    (line,) = (line for line in run(project, "--tb=line") if "is refuted" in line)
    assert line.startswith(f"hypotheses/claims.toml:17: claims/fails[tiny] is refuted: {CLAIM}, observed 0.")
    assert not count(run(project, "--tb=no"), "refuted")


def test_the_short_summary_comes_where_it_is_asked_for(project: pytest.Pytester) -> None:
    lines = run(project, "-rA", "--tb=no")
    assert count(lines, "short test summary") == count(lines, "FAILED hypotheses/claims.toml::claims/fails[tiny]") == 1
    assert lines[-1].strip("= ").startswith("1 failed, 1 passed, 1 not measured")


def test_failures_of_plain_tests_stay_those_of_pytest(project: pytest.Pytester) -> None:
    project.makepyfile(test_plain="def test_it(): assert 1 == 2")
    lines = run(project, "test_plain.py")
    assert count(lines, "assert 1 == 2") >= 1
    assert count(lines, "FAILED test_plain.py::test_it") == 1
    assert not count(lines, "FAILED hypotheses")


@pytest.mark.parametrize("width", [80, 100, 120])
def test_no_line_is_wider_than_the_terminal(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """But for single words that somebody may copy, such as a path, and for what other plugins say of themselves."""
    monkeypatch.setenv("COLUMNS", str(width))
    lines = run(project, "--model=twin", "-v")
    start = next(index for index, line in enumerate(lines) if line.startswith("collecting"))
    wide = [line for line in lines[start:] if len(line) > width and len(line.removesuffix(" \\").split()) > 1]
    assert [line for line in wide if not line.startswith(("record: ", "  stated at", "hypotheses/"))] == []


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_github_is_told_of_failures_and_given_the_grid(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: tuple[str, ...]
) -> None:
    if workers:
        pytest.importorskip("xdist")
    page = tmp_path / "page.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    monkeypatch.setenv("GITHUB_WORKSPACE", str(project.path))
    with (project.path / "models.toml").open("a") as file:
        file.write('[models.gone]\npackage = "no_such_package"\ngguf = "x.gguf"\n')
    result = project.runpytest_subprocess(*RUN, "--model=tiny", "--model=gone", "-q", *workers)
    told = [line for line in result.outlines if line.startswith("::")]
    assert len(told) == 2
    assert told[0].startswith("::error file=hypotheses/claims.toml,line=17,title=claims/fails%3A FAIL for tiny::")
    assert told[1].startswith("::error title=not measured::gone cannot be measured")
    assert count(result.outlines, "gone cannot be measured") == 2
    text = page.read_text()
    assert text.count("### delta-suite") == 1
    assert "| hypothesis | claim | tiny | gone |" in text
