"""The plugin joins runs that are about hypotheses, and leaves every other run as it was."""

from __future__ import annotations

import os
import sys
from functools import partial

import pytest

from tests.tiny import DOCUMENTS
from tests.tiny_claims import CLAIMS

OPTIONS = ("--model=tiny", f"--documents={DOCUMENTS}", "--device=cpu", "--no-control", "-p", "no:cacheprovider")
COLLECT = ("--collect-only", "-q", "-p", "no:cacheprovider")

CONFTEST = """
def pytest_addoption(parser):
    for name in ("--model", "--device", "--dtype"):
        parser.addoption(name, default="none")
"""

TEST = """
import sys
from suite import helper

def test_it(request):
    assert request.config.getoption("model") == "theirs"
    assert helper.ANSWER == 42
    assert "delta_suite.pytest_plugin.session" not in sys.modules
"""


@pytest.fixture
def stranger(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project with a folder `suite`, and options with the names of ours."""
    (pytester.path / "suite").mkdir()
    (pytester.path / "suite" / "__init__.py").write_text("")
    (pytester.path / "suite" / "helper.py").write_text("ANSWER = 42\n")
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_it=TEST)
    return pytester


def usage_error(result: pytest.RunResult) -> str:
    """Return the only line on stderr of a run that ended with a usage error."""
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line.strip()]
    return line


# --- runs of other projects


def test_a_project_with_a_folder_suite_and_the_same_options_runs_untouched(stranger: pytest.Pytester) -> None:
    result = stranger.runpytest_subprocess("--model=theirs", "--device=gpu", "--dtype", "half")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("delta-suite *:*")
    result.stdout.no_fnmatch_line("calibration: *")


def test_such_a_project_runs_with_warnings_as_errors(stranger: pytest.Pytester) -> None:
    words = ("-W", "error", "-m", "pytest", "--model=theirs", "--strict-config", "-p", "no:benchmark")
    result = stranger.run(sys.executable, *words)
    result.stdout.fnmatch_lines(["*= 1 passed in *"])
    assert result.ret == 0


def test_workers_of_such_a_project_run_untouched(stranger: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    stranger.runpytest_subprocess("--model=theirs", "-n", "1").assert_outcomes(passed=1)


def test_values_of_options_are_no_paths_of_the_run(stranger: pytest.Pytester) -> None:
    (stranger.path / "claims").mkdir()
    (stranger.path / "claims" / "claims.toml").write_text(CLAIMS)
    result = stranger.runpytest_subprocess("--model=theirs", "--ignore", "claims", "test_it.py")
    result.assert_outcomes(passed=1)


def test_other_toml_files_in_a_folder_hypotheses_are_left_alone(stranger: pytest.Pytester) -> None:
    folder = stranger.path / "hypotheses"
    folder.mkdir()
    (folder / "settings.toml").write_text('schema = "public"\n')
    (stranger.path / "test_it.py").rename(folder / "test_it.py")
    stranger.makeini("[pytest]\npythonpath = .\n")
    stranger.runpytest_subprocess("hypotheses/", "--model=theirs").assert_outcomes(passed=1)


def test_the_entry_point_imports_nothing_heavy(pytester: pytest.Pytester) -> None:
    """In a process without other plugins of pytest, as those import what they need."""
    heavy = ("torch", "transformers", "numpy", "scipy", "pydantic", "delta_suite.pytest_plugin.session")
    code = f"import sys, delta_suite.pytest_plugin.plugin; print([name for name in {heavy} if name in sys.modules])"
    pytester.run(sys.executable, "-c", code).stdout.fnmatch_lines(["[[][]]"])


def test_help_is_as_it_was(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(): pass")
    result = pytester.runpytest("--help")
    assert result.ret == 0
    for word in ("--baseline-update", "--calibration", "delta_suite (bool)", "depth structure"):
        assert word not in result.stdout.str()


def test_the_measurement_fixture_is_not_there_otherwise(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(measurement): pass")
    result = pytester.runpytest()
    result.stdout.fnmatch_lines(["*fixture 'measurement' not found*"])


def test_the_ini_option_that_says_no_is_no_unknown_option(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\ndelta_suite = false\n")
    pytester.makepyfile("def test_it(): pass")
    pytester.runpytest("--strict-config").assert_outcomes(passed=1)


# --- options that do not fit the run


@pytest.mark.parametrize("words", [("--model=tiny",), ("--model", "tiny")])
def test_an_option_without_hypotheses_names_the_cure_in_one_line(
    pytester: pytest.Pytester, words: tuple[str, ...]
) -> None:
    pytester.makepyfile("def test_it(): pass")
    assert usage_error(pytester.runpytest(*words)) == (
        "ERROR: --model is an option of delta-suite, which runs where hypothesis files are named: "
        f"pytest hypotheses/ {' '.join(words)}; or set delta_suite = true in the pytest settings"
    )


def test_the_cure_says_why_the_named_path_is_not_enough(project: pytest.Pytester) -> None:
    line = usage_error(project.runpytest("hypotheses/clams.toml", "--fresh", "--model=tiny"))
    assert line.startswith("ERROR: --fresh, --model are options of delta-suite, ")
    assert line.endswith("(hypotheses/clams.toml: No such file or directory)")
    (project.path / "hypotheses" / "claims.toml").write_text("[[expct]]\n")
    line = usage_error(project.runpytest("hypotheses/", "--model=tiny"))
    assert line.endswith("(hypotheses: no [[expect]] there)")


@pytest.mark.parametrize(
    ("kind", "why"), [("dangling", "No such file or directory"), ("fifo", "cannot be read: not a regular file")]
)
def test_the_cure_names_a_file_that_cannot_be_read(project: pytest.Pytester, kind: str, why: str) -> None:
    path = project.path / "hypotheses" / "claims.toml"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere.toml")
    # In a process of its own where it could wait for ever.
    run = partial(project.runpytest_subprocess, timeout=60) if kind == "fifo" else project.runpytest
    assert usage_error(run("hypotheses/", "--model=tiny")).endswith(f"(hypotheses/claims.toml: {why})")


def test_the_cure_names_the_current_folder_if_it_holds_hypotheses(project: pytest.Pytester) -> None:
    (project.path / "hypotheses" / "claims.toml").rename(project.path / "claims.toml")
    assert "pytest . --model=tiny;" in usage_error(project.runpytest("--model=tiny"))


def test_a_conftest_with_the_same_option_is_named(project: pytest.Pytester) -> None:
    project.makeconftest(CONFTEST)
    line = usage_error(project.runpytest("hypotheses/", *OPTIONS))
    assert line.startswith(f"ERROR: --model is an option of delta-suite, and of {project.path / 'conftest.py'}: ")


def test_a_plugin_with_the_same_option_is_named(project: pytest.Pytester) -> None:
    project.makepyfile(theirs=CONFTEST)
    line = usage_error(project.runpytest_subprocess("-p", "theirs", "hypotheses/", *OPTIONS))
    assert line.startswith(f"ERROR: --model is an option of delta-suite, and of {project.path / 'theirs.py'}: ")


def test_an_error_of_a_conftest_that_is_no_conflict_stays(project: pytest.Pytester) -> None:
    project.makeconftest("def pytest_addoption(parser): raise ValueError('--model')")
    result = project.runpytest("hypotheses/", *OPTIONS)
    result.stderr.fnmatch_lines(["*ValueError: --model"])


def test_an_ini_option_that_is_no_truth_value_is_one_line(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\ndelta_suite = maybe\n")
    assert "the ini option delta_suite is true or false" in usage_error(pytester.runpytest())


# --- runs about hypotheses


def test_help_of_a_run_about_hypotheses_has_the_options(project: pytest.Pytester) -> None:
    result = project.runpytest("hypotheses/", "--help")
    result.stdout.fnmatch_lines(["depth structure of language models:", "*--model=NAME *", "*delta_suite (bool)*"])


@pytest.mark.parametrize(("name", "workers"), [("claims", ()), ("claims", ("-n", "1")), ("build", ()), (".mine", ())])
def test_a_folder_of_any_name_is_collected(project: pytest.Pytester, name: str, workers: tuple[str, ...]) -> None:
    """Also one of a name that pytest passes over when it is not named, such as build."""
    if workers:
        pytest.importorskip("xdist")
    (project.path / "hypotheses").rename(project.path / name)
    run = project.runpytest_subprocess if workers else project.runpytest
    result = run(f"{name}/", *OPTIONS, *workers)
    assert result.parseoutcomes() == {"passed": 1, "failed": 1, "not": 1}  # measured: two words


def test_a_subfolder_is_collected_when_it_is_named(project: pytest.Pytester) -> None:
    below = project.path / "hypotheses" / "more"
    below.mkdir()
    (below / "claims.toml").write_text(CLAIMS.replace('id = "claims"', 'id = "below"'))
    top = project.runpytest("hypotheses/", *OPTIONS, "--collect-only", "-q")
    assert "below/" not in top.stdout.str()
    both = project.runpytest("hypotheses/", "hypotheses/more/../more", *OPTIONS, "--collect-only", "-q")
    both.stdout.fnmatch_lines(["*6 tests collected*"])


@pytest.mark.parametrize("testpaths", ["hypotheses", "hypo*"])
def test_testpaths_count_where_no_path_is_given(project: pytest.Pytester, testpaths: str) -> None:
    """The value of --model is a folder, too, and no path that is given."""
    (project.path / "elsewhere").mkdir()
    project.makeini(f"[pytest]\ntestpaths = {testpaths}\n")
    result = project.runpytest("--model", "tiny", "--results-dir", "elsewhere", *COLLECT)
    result.stdout.fnmatch_lines(["*3 tests collected*"])


def test_testpaths_do_not_count_in_a_subfolder_where_pytest_ignores_them(project: pytest.Pytester) -> None:
    project.makeini("[pytest]\ntestpaths = hypotheses\n")
    (project.path / "code").mkdir()
    os.chdir(project.path / "code")
    assert "is an option of delta-suite" in usage_error(project.runpytest("--model=tiny"))


def test_workers_take_testpaths_and_options_from_the_settings(project: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    project.makeini(f"[pytest]\ntestpaths = hypotheses\naddopts = --model=tiny --documents={DOCUMENTS} -n 1\n")
    result = project.runpytest_subprocess("--device=cpu", "--no-control")
    assert result.parseoutcomes() == {"passed": 1, "failed": 1, "not": 1}  # measured: two words


@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_the_ini_option_turns_the_plugin_on(project: pytest.Pytester, workers: tuple[str, ...]) -> None:
    if workers:
        pytest.importorskip("xdist")
    project.makeini("[pytest]\ndelta_suite = true\n")
    project.makepyfile(test_it="def test_it(measurement): assert measurement.value('gamma') > 0")
    result = project.runpytest_subprocess("test_it.py", *OPTIONS, *workers, "-W", "error")
    result.assert_outcomes(passed=1)


def test_the_ini_option_may_stand_on_the_command_line(project: pytest.Pytester) -> None:
    project.makepyfile(test_it="def test_it(measurement): pass")
    result = project.runpytest("test_it.py", "-o", "delta_suite=true", "--model=tiny", *COLLECT)
    result.stdout.fnmatch_lines(["test_it.py::test_it[[]tiny[]]"])


def test_a_plain_test_beside_hypothesis_files_runs_alone(project: pytest.Pytester) -> None:
    (project.path / "hypotheses" / "test_it.py").write_text("def test_it(measurement): pass\n")
    result = project.runpytest("hypotheses/test_it.py::test_it", "--model=tiny", *COLLECT)
    result.stdout.fnmatch_lines(["hypotheses/test_it.py::test_it[[]tiny[]]", "*1 test collected*"])


def test_the_claims_that_ship_run_by_the_name_of_the_package(project: pytest.Pytester) -> None:
    result = project.runpytest("--pyargs", "delta_suite.hypotheses", "--model=tiny", *COLLECT)
    result.stdout.fnmatch_lines(["*phase-c/shared-direction[[]tiny[]]"])


def test_settings_and_models_beside_hypothesis_files_are_none(project: pytest.Pytester) -> None:
    (project.path / "hypotheses" / "claims.toml").rename(project.path / "claims.toml")
    (project.path / "pyproject.toml").write_text("[tool.other]\n")
    result = project.runpytest(".", "--model=tiny", *COLLECT)
    result.stdout.fnmatch_lines(["*3 tests collected*"])


@pytest.mark.parametrize("text", [b"[[expct]]\n", b"", CLAIMS.encode("utf-16")])
def test_a_damaged_file_beside_a_good_one_is_an_error_that_names_it(project: pytest.Pytester, text: bytes) -> None:
    (project.path / "hypotheses").rename(project.path / "claims")
    (project.path / "claims" / "damaged.toml").write_bytes(text)
    result = project.runpytest("claims/", *OPTIONS)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["ERROR claims/damaged.toml", "*1 error*"])


@pytest.mark.parametrize("kind", ["dangling", "fifo", "folder", "endless"])
def test_a_file_that_cannot_be_read_is_an_error_that_names_it(project: pytest.Pytester, kind: str) -> None:
    path = project.path / "hypotheses" / "a.toml"  # the first that is looked at
    if kind == "dangling":
        path.symlink_to("nowhere.toml")
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    waits = kind in {"fifo", "endless"}
    run = partial(project.runpytest_subprocess, timeout=60) if waits else project.runpytest
    assert "a.toml: cannot be read: " in usage_error(run("hypotheses/", *OPTIONS))


def test_judge_names_it_as_well(project: pytest.Pytester, outcome: tuple[Outcome, Settings]) -> None:
    os.mkfifo(project.path / "hypotheses" / "odd.toml")
    record = outcome[0].path
    result = project.run(sys.executable, "-m", "delta_suite", "judge", str(record), timeout=60)
    assert result.ret == 1
    assert "odd.toml" in result.stderr.str()


PARTS_CONFTEST = """
import pytest
from delta_suite.pytest_plugin.session import SESSION

@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session):
    print("parts:", *sorted(session.config.stash[SESSION].parts))
"""

LAW = '\n[[expect]]\nid = "law"\nmetric = "sharing_index"\nscope = "C"\nop = ">="\nthreshold = 0.5\norigin = "o"\n'


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("hypotheses/",), "law spectra"),
        (("hypotheses/", "-k", "holds"), "spectra"),
        (("hypotheses/claims.toml::claims/fails[tiny]",), "spectra"),
        (("hypotheses/test_it.py",), "boundaries law spectra"),
    ],
)
def test_a_run_measures_the_parts_that_its_items_need(
    project: pytest.Pytester, words: tuple[str, ...], parts: str
) -> None:
    """A plain test may ask for any metric."""
    (project.path / "hypotheses" / "claims.toml").write_text(CLAIMS + LAW)
    (project.path / "hypotheses" / "test_it.py").write_text("def test_it(measurement): pass\n")
    project.makeconftest(PARTS_CONFTEST)
    if words[0].endswith("/") and "-k" not in words:
        words = (*words, "--ignore=hypotheses/test_it.py")
    result = project.runpytest(*words, "--model=tiny", *COLLECT)
    result.stdout.fnmatch_lines([f"parts: {parts}"])
