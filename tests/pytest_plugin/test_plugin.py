"""The plugin from the user's side: each test is a run of pytest in a project of its own."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from delta_suite.errors import CaptureError
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Settings, measure
from delta_suite.records.cache import Cache

from tests.tiny import DOCUMENTS, QUICK, make_tiny
from tests.tiny_claims import CLAIMS

RUN = ("hypotheses/", f"--documents={DOCUMENTS}", "--device=cpu", "--no-control", "-p", "no:cacheprovider")


def test_one_item_per_expectation_and_model(project: pytest.Pytester) -> None:
    result = project.runpytest(*RUN, "--model=tiny", "--model=twin", "--collect-only", "-q")
    result.stdout.fnmatch_lines(
        [
            "hypotheses/claims.toml::claims/holds[[]tiny[]]",
            "hypotheses/claims.toml::claims/fails[[]tiny[]]",
            "hypotheses/claims.toml::claims/no-such-phase[[]tiny[]]",
            "hypotheses/claims.toml::claims/holds[[]twin[]]",
        ]
    )
    assert result.ret == 0


def test_verdicts_are_outcomes_and_tables(project: pytest.Pytester) -> None:
    result = project.runpytest(*RUN, "--model=tiny", "-v")
    assert result.ret == 1
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "delta-suite *: tiny",
            "*claims/holds[[]tiny[]] PASSED*",
            "*claims/fails[[]tiny[]] FAILED*",
            "*claims/no-such-phase[[]tiny[]] NOT MEASURED*",
            "*- failures -*",
            "claims/fails is refuted for tiny",
            "  claim      mean top1_energy over C <= 0.001",
            "  observed   *, required <= 0.001 (margin -*)",
            "  threshold  never true",
            "  stated at  hypotheses/claims.toml:17",
            "  reproduce  pytest 'hypotheses/claims.toml::claims/fails[[]tiny[]]' --model=tiny "
            f"--documents={DOCUMENTS} --device=cpu",
            "phase *layers* N* intra * cross * block rank * capture",
            "C *2-5* 4 *",
            "*layer *phase*||h||*",
            "hypothesis *claim *tiny",
            "claims * FAIL",
            ". holds * PASS *",
            ". no-such-phase * NOT MEASURED",
            "*1 failed, 1 passed*1 not measured*",
        ]
    )


def test_the_reproduce_command_works(project: pytest.Pytester) -> None:
    result = project.runpytest(
        "hypotheses/claims.toml::claims/fails[tiny]",
        "--model=tiny",
        f"--documents={DOCUMENTS}",
        "--device=cpu",
        "--no-control",
    )
    result.assert_outcomes(failed=1)


def test_a_directory_is_measured_and_named_in_the_command(project: pytest.Pytester, tiny: Path) -> None:
    result = project.runpytest(*RUN, f"--model={tiny}", "-k", "fails")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([f"  reproduce  pytest *--model={tiny} --documents={DOCUMENTS} --device=cpu"])


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "workers"])
def test_two_models_of_one_derived_name_are_both_measured(
    project: pytest.Pytester, tiny: Path, tmp_path: Path, workers: tuple[str, ...]
) -> None:
    """Also in the tables and the JUnit report; the command that reproduces a failure names the model as it is alone."""
    if workers:
        pytest.importorskip("xdist")
    models = [tmp_path / letter / "run" / "step-5" for letter in "ab"]
    for seed, folder in enumerate(models):
        make_tiny(folder, layers=6, seed=seed) if seed else shutil.copytree(tiny, folder)
    arguments = [f"--model={folder}" for folder in models]
    run = project.runpytest_subprocess if workers else project.runpytest
    result = run(*RUN, *arguments, "--no-control", "--junit-xml=junit.xml", *workers)
    names = ["a--run--step-5", "b--run--step-5"]
    result.stdout.fnmatch_lines(["hypothesis *claim *a--run--step-5 *b--run--step-5"])
    cases = [case.get("name") for case in ET.parse(project.path / "junit.xml").iter("testcase")]
    assert {f"claims/holds[{name}]" for name in names} <= set(cases)
    records = [json.loads(path.read_text())["model"] for path in (project.path / "results").glob("runs/*/*.json")]
    assert sorted(record["name"] for record in records) == names
    assert len({record["fingerprint"] for record in records}) == 2
    (line, *_) = (line for line in result.outlines if "reproduce" in line and "/b/run" in line)
    words = shlex.split(line.split("reproduce", 1)[1])[1:]
    assert words[0].endswith("claims/fails[run--step-5]")
    project.runpytest(*words).assert_outcomes(failed=1)


def test_strict_verdicts_fail_what_is_not_measured(project: pytest.Pytester) -> None:
    result = project.runpytest(*RUN, "--model=tiny", "--strict-verdicts", "-k", "no-such-phase")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*is not measured for tiny*", "*reason*has no phase B*"])


@pytest.mark.parametrize(("option", "passed"), [(("-k", "holds"), 1), (("-m", "tiny-claims", "-k", "holds"), 1)])
def test_selection(project: pytest.Pytester, option: tuple[str, ...], passed: int) -> None:
    project.runpytest(*RUN, "--model=tiny", "--strict-markers", *option).assert_outcomes(passed=passed, deselected=2)


@pytest.mark.parametrize(
    "option", ["--model", "--models-file", "--calibration", "--device", "--results-dir", "--baseline"]
)
def test_an_option_that_a_shell_left_empty_is_a_usage_error(project: pytest.Pytester, option: str) -> None:
    for words in ([option, ""], [f"{option}="]):
        result = project.runpytest(*RUN, "--model=tiny", *words)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines([f"ERROR: {option} is empty: is a shell variable not set*"])


@pytest.mark.parametrize(
    ("before", "after", "telling"),
    [
        ('scope = "B"', 'scope = "Q"', "no-such-phase: unknown phase 'Q': use one of A, B, C, D, E, tail, early. *"),
        ('scope = "B"', 'scope = "earyl"', "no-such-phase: unknown phase 'earyl': did you mean 'early'[?]. *"),
        ("threshold = 0.001", 'than = { scope = "Z" }', "fails: unknown phase 'Z': *under `phases` of *models.toml."),
    ],
)
def test_a_phase_that_no_model_has_is_an_error(
    project: pytest.Pytester, hypothesis_file: Callable[[str], None], before: str, after: str, telling: str
) -> None:
    models = project.path / "models.toml"
    models.write_text(models.read_text() + "phases = { early = [0, 5] }\n")
    hypothesis_file(CLAIMS.replace(before, after))
    result = project.runpytest(*RUN, "--model=tiny")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines([f"*claims.toml:*: [[][[]expect[]][]] {telling}", "*1 error*"])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_a_phase_that_another_model_has_is_not_measured(
    project: pytest.Pytester, hypothesis_file: Callable[[str], None]
) -> None:
    models = project.path / "models.toml"
    models.write_text(models.read_text() + "phases = { early = [0, 5] }\n")
    hypothesis_file(
        CLAIMS.split("[[expect]]")[0] + "[[expect]]" + CLAIMS.split("[[expect]]")[1].replace('"C"', '"early"')
    )
    for arguments, passed in (("--model=tiny",), 0), (("--model=tiny", "--model=twin"), 1):
        result = project.runpytest(*RUN, *arguments)
        assert result.ret == 0
        result.assert_outcomes(passed=passed)
        result.stdout.fnmatch_lines(["*1 not measured*"])


def test_xfail_by_model(project: pytest.Pytester, hypothesis_file: Callable[[str], None]) -> None:
    hypothesis_file(
        CLAIMS.replace(
            'origin = "never true"', 'origin = "never true"\n[[expect.xfail]]\nmodels = ["ti*"]\nreason = "known"'
        )
    )
    result = project.runpytest(*RUN, "--model=tiny", "--model=twin", "-k", "fails")
    result.assert_outcomes(xfailed=1, failed=1)
    assert result.ret == 1


def test_warnings_do_not_fail(project: pytest.Pytester, hypothesis_file: Callable[[str], None]) -> None:
    hypothesis_file(CLAIMS.replace('origin = "never true"', 'origin = "never true"\nseverity = "warn"'))
    result = project.runpytest(*RUN, "--model=tiny", "-v", "-k", "fails")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*claims/fails*WARN*", "*1 warned*"])


def test_junit_properties(project: pytest.Pytester) -> None:
    project.runpytest(*RUN, "--model=tiny", "--junit-xml=report.xml")
    cases = {case.get("name"): case for case in ET.parse(project.path / "report.xml").iter("testcase")}
    case = cases["claims/fails[tiny]"]
    properties = {item.get("name"): item.get("value") for item in case.iter("property")}
    assert properties["verdict"] == "FAIL"
    assert properties["threshold"] == "0.001"
    observed, margin = float(properties["observed"] or "nan"), float(properties["margin"] or "nan")
    assert margin == pytest.approx(0.001 - observed)
    assert case.find("failure") is not None
    skipped = cases["claims/no-such-phase[tiny]"].find("skipped")
    assert skipped is not None
    assert "no phase B" in str(skipped.get("message"))


def test_a_claim_can_be_judged_under_another_variant(
    project: pytest.Pytester, hypothesis_file: Callable[[str], None]
) -> None:
    """The centred rows have no mean, so the claim that their mean has no energy holds of them alone."""
    hypothesis_file(
        CLAIMS.split("[[expect]]")[0]
        + '[[expect]]\nid="energy"\nmetric="mean_energy"\nscope="C"\nop=">"\nthreshold=1e-6\norigin="o"\n'
    )
    result = project.runpytest(*RUN, "--model=tiny", "-v")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "expectation *raw *sink_free *centred*",
            "claims/energy *PASS * FAIL 0* [*]",
            "[*] another variant gives another verdict",
        ]
    )
    result = project.runpytest(*RUN, "--model=tiny", "--variant=centred")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*--variant=centred"])
    unknown = project.runpytest(*RUN, "--model=tiny", "--variant=rawish")
    assert unknown.ret == pytest.ExitCode.USAGE_ERROR
    unknown.stderr.fnmatch_lines(["ERROR: --variant rawish: no such variant; use one of raw, sink_free, centred"])


def test_a_claim_that_random_weights_support_is_vacuous(project: pytest.Pytester) -> None:
    """The tiny model's weights are random themselves, so whatever it supports its control does."""
    result = project.runpytest("hypotheses/", f"--documents={DOCUMENTS}", "--device=cpu", "--model=tiny", "-v")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines([". holds *PASS * °", "° vacuous: random weights of the same architecture*"])
    assert (project.path / "results" / "runs" / "tiny@random-weights").is_dir()


def test_records_are_written_once_per_measurement(project: pytest.Pytester) -> None:
    for _ in range(2):
        project.runpytest(*RUN, "--model=tiny")
    records = list((project.path / "results" / "runs" / "tiny").glob("*.json"))
    assert len(records) == 1
    assert records[0].with_suffix(".safetensors").is_file()
    record = json.loads(records[0].read_text())
    assert record["schema"] == 3
    assert record["scopes"]["C"]["layers"] == [2, 5]
    assert record["layers"][3]["metrics"]["raw"]["effective_rank"]["value"] > 1
    assert "NaN" not in records[0].read_text()


def test_a_run_measures_the_parts_that_its_claims_need(
    project: pytest.Pytester, hypothesis_file: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTA_SUITE_CACHE", str(tmp_path / "empty"))

    def parts() -> list[str]:
        newest = max((project.path / "results" / "runs" / "tiny").glob("*.json"), key=lambda path: path.stat().st_mtime)
        record: dict[str, Any] = json.loads(newest.read_text())
        return list(record["parts"])

    words = (*RUN, "--documents=12", "--model=tiny")
    project.runpytest(*words)
    assert parts() == ["spectra"]
    law = '\n[[expect]]\nid = "law"\nmetric = "sharing_index"\nscope = "C"\nop = ">="\nthreshold = 0.5\norigin = "o"\n'
    hypothesis_file(CLAIMS + law)
    result = project.runpytest(*words)
    assert sorted(parts()) == ["law", "spectra"]
    result.stdout.no_fnmatch_line("*law is not measured*")


def test_a_record_keeps_what_judged_it_and_a_changed_file_shows(
    project: pytest.Pytester, hypothesis_file: Callable[[str], None]
) -> None:
    def record() -> Path:
        (path,) = (project.path / "results" / "runs" / "tiny").glob("*.json")
        return path

    def judged_by() -> dict[str, int | str]:
        path = project.path / "results" / "judged" / "tiny" / record().name
        stamp: dict[str, int | str] = json.loads(path.read_text())["claims"]
        return stamp

    changed = "*claims has changed since this record was last judged: version 1, SHA-256 * then, version * now"
    first = project.runpytest(*RUN, "--model=tiny")
    first.stdout.no_fnmatch_line(changed)
    before, bytes_before = judged_by(), record().read_bytes()
    assert before == {"version": 1, "sha256": sha256(CLAIMS.encode()).hexdigest()}
    project.runpytest(*RUN, "--model=tiny").stdout.no_fnmatch_line(changed)
    hypothesis_file(CLAIMS.replace("threshold = 0.001", "threshold = 0.002").replace("version = 1", "version = 2"))
    project.runpytest(*RUN, "--model=tiny").stdout.fnmatch_lines([changed])
    assert judged_by()["version"] == 2
    assert judged_by()["sha256"] != before["sha256"]
    assert record().read_bytes() == bytes_before  # no command rewrites a record
    project.runpytest(*RUN, "--model=tiny").stdout.no_fnmatch_line(changed)


def test_workers_judge_and_one_process_stamps(project: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    result = project.runpytest_subprocess(*RUN, "--model=tiny", "--model=twin", "-n", "2", "-q")
    result.assert_outcomes(passed=2, failed=2)
    judged = list((project.path / "results" / "judged").rglob("*.json"))
    assert len(judged) == 2
    for path in judged:
        assert set(json.loads(path.read_text())) == {"claims"}


@pytest.mark.parametrize(
    ("harm", "telling"),
    [("path.unlink()", "cannot be read: *delta-suite measure*"), ("path.write_text('{')", "is not a measurement*")],
)
def test_a_record_that_is_gone_at_the_end_is_one_line_and_a_failed_run(
    project: pytest.Pytester, harm: str, telling: str
) -> None:
    project.makepyfile(
        test_harm=f"""
        from pathlib import Path

        def test_harm():
            for path in Path("results/runs/tiny").glob("*.json"):
                {harm}
        """
    )
    project.makepyfile(test_held="def test_held(measurement): assert measurement.value('gamma') > 0")
    project.makeconftest(
        "import pytest\n"
        "@pytest.hookimpl(trylast=True, wrapper=False)\n"
        "def pytest_collection_modifyitems(items): items.sort(key=lambda item: 'harm' in item.name)\n"
    )
    project.makeini("[pytest]\ndelta_suite = true\n")
    result = project.runpytest(
        "test_held.py", "test_harm.py", "--model=tiny", f"--documents={DOCUMENTS}", "--device=cpu", "-v"
    )
    result.assert_outcomes(passed=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [f"ERROR: *results/runs/tiny/*.json {telling}", "*- verdicts -*", "*test_held.py*", "*2 passed*"]
    )
    text = result.stdout.str() + result.stderr.str()
    assert "Traceback" not in text
    assert "INTERNALERROR" not in text


def test_no_model_is_a_usage_error_that_lists_them(project: pytest.Pytester) -> None:
    result = project.runpytest(*RUN)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*no model given*tiny, twin*"])


def test_unknown_model_is_a_usage_error_with_the_nearest_name(project: pytest.Pytester) -> None:
    result = project.runpytest(*RUN, "--model=tinny")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: no model 'tinny'*", "*Nearest names: tiny*"])


def test_a_model_that_cannot_be_measured_is_an_error_and_the_others_are_measured(project: pytest.Pytester) -> None:
    with (project.path / "models.toml").open("a") as file:
        file.write('[models.gone]\npackage = "no_such_package"\ngguf = "x.gguf"\n')
    result = project.runpytest(*RUN, "--model=gone", "--model=tiny")
    result.assert_outcomes(errors=3, passed=1, failed=1)
    result.stdout.fnmatch_lines(["gone cannot be measured: *no_such_package*"])
    assert result.ret == 1


def test_errors_of_a_hypothesis_file_are_shown_at_once(
    project: pytest.Pytester, hypothesis_file: Callable[[str], None]
) -> None:
    hypothesis_file(CLAIMS.replace("threshold = 0.001", "treshold = 0.001").replace('"top1_energy"', '"top1_energ"', 1))
    result = project.runpytest(*RUN, "--model=tiny")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*claims.toml:11*top1_energ*did you mean*", "*claims.toml:22*treshold*did you mean*"])
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("delta-suite: interrupted*")  # nobody pressed Ctrl-C


def test_other_toml_files_are_left_alone(project: pytest.Pytester) -> None:
    (project.path / "pyproject.toml").write_text("[tool.other]\n")
    project.makepyfile("def test_it(): pass")
    project.runpytest("--ignore=hypotheses").assert_outcomes(passed=1)


def test_a_file_elsewhere_is_read_when_named(project: pytest.Pytester) -> None:
    (project.path / "claims.toml").write_text(CLAIMS.replace('id = "claims"', 'id = "elsewhere"'))
    result = project.runpytest(
        "claims.toml", "--model=tiny", f"--documents={DOCUMENTS}", "--device=cpu", "--no-control", "-k", "holds"
    )
    result.assert_outcomes(passed=1, deselected=2)


def test_the_fixture_explains_a_failed_assert(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_plain="""
        def test_high(measurement):
            assert measurement.value("intra_cosine", "C") >= 2

        def test_missing(measurement):
            assert measurement.value("intra_cosine", "B") >= 2
        """
    )
    project.makeini("[pytest]\ndelta_suite = true\n")
    result = project.runpytest("test_plain.py", "--model=tiny", f"--documents={DOCUMENTS}", "--device=cpu", "-v")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*test_missing[[]tiny[]] NOT MEASURED*",
            "*intra_cosine over C (layers 2-5) of tiny, variant raw*",
            "*per layer*2: *<- worst*",
            "test_plain.py *FAIL*",
        ]
    )


def test_one_load_per_model_however_items_are_ordered(
    project: pytest.Pytester, own_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DELTA_SUITE_CACHE", str(tmp_path / "empty"))
    project.makepyfile(
        test_plain="""
        def test_a(measurement): pass
        def test_b(measurement): pass
        """
    )
    log = count_loads(project)
    words = ("test_plain.py", *RUN, "--documents=8", "--model=tiny", "--model=twin")
    project.runpytest(*words)
    # twin has the same weights as tiny, so the cache answers for it
    assert log.read_text().split() == ["tiny"]
    project.runpytest(*words, "--fresh")
    assert log.read_text().split() == ["tiny", "tiny"]


def count_loads(project: pytest.Pytester) -> Path:
    """Write a conftest that notes each load of weights in a file."""
    log = project.path / "loads.txt"
    log.touch()
    project.makeconftest(
        f"""
        import delta_suite.models.loading as loading
        original = getattr(loading.load, "original", loading.load)

        def load(spec, *args, **kwargs):
            with open({str(log)!r}, "a") as file:
                file.write(spec.name + "\\n")
            return original(spec, *args, **kwargs)

        load.original = original
        loading.load = load
        """
    )
    return log


@pytest.mark.long
def test_workers_load_each_model_once(
    project: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xdist")
    other = make_tiny(tmp_path / "other", layers=6, hidden=16, seed=1)
    monkeypatch.setenv("DELTA_SUITE_CACHE", str(tmp_path / "empty"))
    with (project.path / "models.toml").open("a") as file:
        file.write(f"[models.other]\npath = {str(other)!r}\n")
    log = count_loads(project)
    result = project.runpytest_subprocess(*RUN, "--model=tiny", "--model=other", "-n", "2", "-q")
    result.assert_outcomes(passed=2, failed=2)
    assert sorted(log.read_text().split()) == ["other", "tiny"]
    result.stdout.fnmatch_lines(["hypothesis *claim *tiny *other", "claims * FAIL * FAIL"])


@pytest.mark.parametrize("workers", [(), pytest.param(("-n", "2"), marks=pytest.mark.long)])
def test_a_damaged_cache_entry_is_one_line(
    project: pytest.Pytester, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: tuple[str, ...]
) -> None:
    if workers:
        pytest.importorskip("xdist")
    cache = Cache(tmp_path / "cache")
    measure(ModelSpec(name="tiny", path=tiny), Settings(**QUICK, results=tmp_path, cache=cache))
    monkeypatch.setenv("DELTA_SUITE_CACHE", str(cache.root))
    (arrays,) = cache.root.glob("measurements/*/arrays.safetensors")
    arrays.write_bytes(b"")
    run = project.runpytest_subprocess if workers else project.runpytest
    result = run(*RUN, f"--documents={QUICK['documents']}", "--model=tiny", "-q", *workers)
    told = [line for line in result.outlines + result.errlines if "damaged" in line]
    assert len(told) == 1
    assert told[0].startswith(f"delta-suite: the cache entry {cache.root}/measurements/")
    assert told[0].endswith(" was damaged, and is removed; tiny was measured again")
    assert "warnings" not in result.parseoutcomes()


def test_a_failed_measurement_is_tried_once(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    import delta_suite.pipeline

    tries = []

    def broken(spec: object, *others: object) -> None:
        tries.append(spec)
        raise CaptureError("the residual stream is not finite: first at h_3")

    monkeypatch.setattr(delta_suite.pipeline, "measure", broken)
    result = project.runpytest(*RUN, "--model=tiny")
    result.assert_outcomes(errors=3)
    assert len(tries) == 1


def test_collecting_imports_no_torch_and_is_quick(project: pytest.Pytester) -> None:
    code = (
        "import sys, pytest; "
        "status = pytest.main(['hypotheses/', '--model=tiny', '--collect-only', '-q']); "
        "print('heavy:', [m for m in ('torch', 'transformers', 'pandas') if m in sys.modules]); sys.exit(status)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=project.path, capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    assert "3 tests collected" in done.stdout
    assert time.perf_counter() - started < 30  # a hang, not a benchmark: tests/benchmarks measures the time


def test_a_cached_run_imports_no_torch(project: pytest.Pytester) -> None:
    code = (
        "import sys, pytest; "
        "words = ['hypotheses/', '--model=tiny', '--device=cpu', '--no-control', '-q']; "
        f"status = pytest.main([*words, '--documents={DOCUMENTS}']); "
        "print('heavy:', [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=project.path, capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    assert "1 failed, 1 passed, 1 not measured" in done.stdout
