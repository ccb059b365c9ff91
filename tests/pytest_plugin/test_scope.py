"""The plugin is there for runs about hypotheses, and leaves every other run as it was."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.pytest_plugin.conftest import CLAIMS

OPTIONS = ("--model=tiny", "--device=cpu", "--no-control", "-p", "no:cacheprovider")

OWN_OPTIONS = """
def pytest_addoption(parser):
    for name in ("--model", "--device", "--dtype"):
        parser.addoption(name, default="none")
"""

OWN_TEST = """
from suite import helper

def test_own(request):
    assert request.config.getoption("model") == "theirs"
    assert helper.ANSWER == 42
"""


@pytest.fixture
def stranger(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project with a folder `suite`, and options of its own with our names."""
    (pytester.path / "suite").mkdir()
    (pytester.path / "suite" / "__init__.py").write_text("")
    (pytester.path / "suite" / "helper.py").write_text("ANSWER = 42\n")
    pytester.makeconftest(OWN_OPTIONS)
    pytester.makepyfile(test_own=OWN_TEST)
    return pytester


def test_a_project_with_a_folder_suite_and_the_same_options_runs_untouched(stranger: pytest.Pytester) -> None:
    result = stranger.runpytest_subprocess("--model=theirs", "--device=gpu", "--dtype", "half")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("delta-suite *:*")
    result.stdout.no_fnmatch_line("calibration: *")


def test_workers_of_such_a_project_run_untouched(stranger: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    stranger.runpytest_subprocess("--model=theirs", "-n", "2").assert_outcomes(passed=1)


def test_help_is_as_it_was(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(): pass")
    result = pytester.runpytest_subprocess("--help")
    assert result.ret == 0
    for word in ("--baseline-update", "--calibration", "delta_suite (bool)", "depth structure"):
        assert word not in result.stdout.str()


def test_help_of_a_run_about_hypotheses_has_the_options(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("hypotheses/", "--help")
    result.stdout.fnmatch_lines(["depth structure of language models:", "*--model=NAME *"])


def test_the_measurement_fixture_is_not_there_otherwise(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(measurement): pass")
    result = pytester.runpytest_subprocess()
    result.stdout.fnmatch_lines(["*fixture 'measurement' not found*"])


def test_an_option_without_hypotheses_names_the_cure_in_one_line(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(): pass")
    for words in (["--model=tiny"], ["--model", "tiny"]):
        result = pytester.runpytest_subprocess(*words)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        lines = [line for line in result.errlines if line.strip()]
        assert len(lines) == 1
        assert "pytest hypotheses/ --model=..." in lines[0]


def test_a_conftest_with_the_same_option_is_named(project: pytest.Pytester) -> None:
    project.makeconftest(OWN_OPTIONS)
    result = project.runpytest_subprocess("hypotheses/", *OPTIONS)
    assert result.ret != 0
    lines = [line for line in result.errlines if line.strip()]
    assert len(lines) == 1
    assert "--model is an option of delta-suite and of " in lines[0]
    assert str(project.path / "conftest.py") in lines[0]


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_a_folder_of_any_name_is_collected(project: pytest.Pytester, workers: tuple[str, ...]) -> None:
    if workers:
        pytest.importorskip("xdist")
    (project.path / "hypotheses").rename(project.path / "claims")
    result = project.runpytest_subprocess("claims/", *OPTIONS, *workers)
    assert result.parseoutcomes() == {"passed": 1, "failed": 1, "not": 1}  # measured: two words


def test_a_subfolder_is_collected_when_it_is_named(project: pytest.Pytester) -> None:
    below = project.path / "hypotheses" / "more"
    below.mkdir()
    (below / "claims.toml").write_text(CLAIMS.replace('id = "claims"', 'id = "below"'))
    top = project.runpytest_subprocess("hypotheses/", *OPTIONS, "--collect-only", "-q")
    assert "below/" not in top.stdout.str()
    both = project.runpytest_subprocess("hypotheses/", "hypotheses/more", *OPTIONS, "--collect-only", "-q")
    both.stdout.fnmatch_lines(["*6 tests collected*"])


def test_testpaths_count_where_no_path_is_given(project: pytest.Pytester) -> None:
    project.makeini("[pytest]\ntestpaths = hypotheses\n")
    result = project.runpytest_subprocess(*OPTIONS)
    assert result.parseoutcomes() == {"passed": 1, "failed": 1, "not": 1}  # measured: two words


def test_the_ini_option_turns_the_plugin_on(project: pytest.Pytester) -> None:
    project.makeini("[pytest]\ndelta_suite = true\n")
    project.makepyfile("def test_it(measurement): assert measurement.value('gamma') > 0")
    result = project.runpytest_subprocess("test_the_ini_option_turns_the_plugin_on.py", *OPTIONS, "-W", "error")
    result.assert_outcomes(passed=1)


def test_the_claims_that_ship_run_by_the_name_of_the_package(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("--pyargs", "delta_suite.hypotheses", *OPTIONS, "--collect-only", "-q")
    result.stdout.fnmatch_lines(["*phase-c/shared-direction[[]tiny[]]"])


@pytest.mark.parametrize("kind", ["dangling", "fifo", "folder"])
def test_a_file_that_is_none_is_an_error_that_names_it(project: pytest.Pytester, kind: str) -> None:
    path = project.path / "hypotheses" / "odd.toml"
    if kind == "dangling":
        path.symlink_to("nowhere.toml")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    result = project.runpytest_subprocess("hypotheses/", *OPTIONS, timeout=60)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *odd.toml: cannot be read: *"])


def test_judge_names_it_as_well(project: pytest.Pytester, measured: Path) -> None:
    os.mkfifo(project.path / "hypotheses" / "odd.toml")
    record = next((measured / "results" / "runs" / "tiny").glob("*.json"))
    result = project.run(sys.executable, "-m", "delta_suite", "judge", str(record), timeout=60)
    assert result.ret == 1
    assert "odd.toml" in result.stderr.str()
