"""Hypothesis files as the loader reads and refuses them, each error on its line."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from delta_suite.claims.loader import load_hypotheses, load_hypothesis
from delta_suite.claims.schema import Expectation, Than, Xfail
from delta_suite.errors import HypothesisFileError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.claims.hypothesis_texts import GOOD, SCOPES, SLIPS, Slip, errors_of, slipped
from tests.test_toml_lines import Writer

HYPOTHESES = Path(__file__).parents[2] / "hypotheses"


def complaint(path: Path) -> str:
    """Return the loader's message without the folder."""
    with pytest.raises(HypothesisFileError) as caught:
        load_hypotheses([path])
    return str(caught.value).replace(f"{path.parent if path.suffix else path}/", "")


# --- files that are read -------------------------------------------------------------------------------------------


def test_every_key_of_a_file_is_read(file: Callable[[str], Path]) -> None:
    path = file(GOOD)
    hypothesis = load_hypothesis(path)
    direction, rank = hypothesis.expect

    assert (hypothesis.schema_version, hypothesis.id, hypothesis.title, hypothesis.version) == (
        1,
        "phase-c",
        "Phase C",
        3,
    )
    assert hypothesis.rationale == '[[expect]]\nid = "not a table"\n'
    assert hypothesis.tags == ("phase-c", "deep")
    assert hypothesis.path == path
    assert hypothesis.sha256 == hashlib.sha256(GOOD.encode()).hexdigest()
    assert direction == Expectation(
        id="direction",
        metric="intra_cosine",
        scope="C",
        variant="raw",
        over="mean",
        mostly=1.0,
        op=">=",
        threshold=0.5,
        than=None,
        severity="fail",
        rationale="",
        origin="made up",
        xfail=(Xfail(models=("gemma3-*", "gpt2"), reason="sinks"),),
        line=11,
    )
    assert (rank.line, rank.than, rank.mostly, rank.xfail) == (23, Than(scope="model", times=2.0), 0.8, ())


def test_a_hypothesis_cannot_be_changed(file: Callable[[str], Path]) -> None:
    hypothesis = load_hypothesis(file(GOOD))
    with pytest.raises(ValueError, match="frozen"):
        hypothesis.expect[0].threshold = 0.1  # type: ignore[misc]


def test_folders_are_read_in_order_and_not_below(tmp_path: Path) -> None:
    for name in ("b", "a", "deep/c"):
        path = tmp_path / f"{name}.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(GOOD.replace("phase-c", path.stem))
    (tmp_path / "notes.txt").write_text("not a hypothesis")
    assert [h.id for h in load_hypotheses([tmp_path])] == ["a", "b"]
    assert [h.id for h in load_hypotheses([tmp_path, tmp_path / "deep"])] == ["a", "b", "c"]
    assert [h.id for h in load_hypotheses([tmp_path / "b.toml", tmp_path])] == ["b", "a"]


def test_a_byte_order_mark_and_crlf_are_read(file: Callable[[bytes], Path]) -> None:
    hypothesis = load_hypothesis(file(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()))
    assert [claim.line for claim in hypothesis.expect] == [11, 23]


# --- files that are refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip.says)
def test_each_slip_is_reported_with_its_line(slip: Slip, file: Callable[[str], Path]) -> None:
    assert complaint(file(slipped(slip))) == "x.toml:" + slip.says.replace("\n", "\nx.toml:")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", '1: is empty: begin with schema = 1 and id = "...", and make a claim in an [[expect]] table'),
        (b"\n \n", '1: is empty: begin with schema = 1 and id = "...", and make a claim in an [[expect]] table'),
        (
            b"schema = 1\nid = = 2",
            "2: not TOML, column 6: Invalid value; correct this first, the rest of the file was not checked",
        ),
        (
            b"schema = 1\nid = [1,\n\n",
            "2: not TOML: Invalid value; correct this first, the rest of the file was not checked",
        ),
        (b"schema = 1\nid = '\xff'", "2: byte 0xff is not UTF-8: save the file in that encoding"),
    ],
)
def test_a_file_that_is_not_toml_is_refused(content: bytes, says: str, file: Callable[[bytes], Path]) -> None:
    assert complaint(file(content)) == f"x.toml:{says}"


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    assert complaint(tmp_path / "no.toml") == "no.toml: cannot be read: No such file or directory"
    with pytest.raises(HypothesisFileError, match=r"x\.\.\. .*: cannot be read: File name too long$"):
        load_hypotheses([tmp_path / ("x" * 5000)])
    with pytest.raises(HypothesisFileError, match=r": cannot be read: a folder, not a file$"):
        load_hypothesis(tmp_path)


def test_an_error_is_one_line_whatever_it_quotes(file: Callable[[str], Path]) -> None:
    text = GOOD.replace('"intra_cosine"', r'"gamma\n\u001b[2J"').replace('op = ">="', r'"o\np" = 1')
    says = complaint(file(text)).splitlines()
    assert says == [
        r"x.toml:13: unknown metric 'gamma\n\x1b[2J': did you mean 'gamma'?",
        r"x.toml:15: unknown key 'o\np': did you mean 'op'?",
    ]


def test_a_folder_without_files(tmp_path: Path) -> None:
    with pytest.raises(HypothesisFileError) as caught:
        load_hypotheses([tmp_path])
    says = "no hypothesis files (*.toml) in this folder: name another folder, or a file"
    assert str(caught.value) == f"{tmp_path}: {says}"


def test_all_errors_of_all_files_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(GOOD.replace('">="', '"=>"').replace("origin", "orgin").replace('"C"', '"C:"'))
    (tmp_path / "b.toml").write_text("schema = ")
    (tmp_path / "c.toml").write_text(GOOD.replace("tags", "tag"))
    (tmp_path / "d.toml").write_text(GOOD)
    assert (
        complaint(tmp_path)
        == f"""\
a.toml:14: scope is "C:": {SCOPES}
a.toml:15: unknown op '=>': did you mean '>='?
a.toml:17: unknown key 'orgin': did you mean 'origin'?
a.toml:33: unknown key 'orgin': did you mean 'origin'?
b.toml:1: not TOML: Invalid value; correct this first, the rest of the file was not checked
c.toml:2: hypothesis id 'phase-c' is that of a.toml:2 too: rename one of them
c.toml:9: unknown key 'tag': did you mean 'tags'?
d.toml:2: hypothesis id 'phase-c' is that of a.toml:2 too: rename one of them"""
    )


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_edit_of_a_file_breaks_the_loader(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """The loader reads the file, or says what is wrong with it; it raises nothing else."""
    text = GOOD
    tokens = st.sampled_from(["", "[", "]", "[[expect]]\n", "\n", "=", '"', '"""', "{", "}", ",", "1", ".", "#", "\\"])
    for _ in range(data.draw(st.integers(1, 3), label="edits")):
        at = data.draw(st.integers(0, len(text)), label="at")
        gone = data.draw(st.integers(0, 12), label="characters taken out")
        text = text[:at] + data.draw(tokens, label="put in") + text[at + gone :]
    path = tmp_path_factory.getbasetemp() / "edited.toml"
    path.write_text(text, encoding="utf-8")
    try:
        load_hypothesis(path)
    except HypothesisFileError as error:
        for line in str(error).splitlines():
            number = int(line.removeprefix(f"{path}:").partition(":")[0])
            assert 1 <= number <= text.count("\n") + 1


# --- lines -----------------------------------------------------------------------------------------------------

RIGHT = {"metric": "'gamma'", "scope": "'C'", "op": "'>'", "threshold": "1", "origin": "'x'"}
WRONG = {
    "id": "'Not An Id {}'",
    "metric": "'gama'",
    "scope": "'layers:9-1'",
    "op": "'=>'",
    "threshold": "'high'",
    "severity": "1",
    "origin": "''",
    "xfail": "true",
    "zzz": "0",
}


@settings(deadline=None)
@given(st.data())
def test_the_loader_reports_the_line_of_each_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    writer = Writer(data)
    writer.put("schema = 1\nversion = 1\nid = 'x'\ntitle = 'x'\nrationale = '''\n[[expect]]\n'''")
    writer.end_line()
    expected = []
    for index in range(data.draw(st.integers(1, 3), label="claims")):
        wrong = data.draw(st.sets(st.sampled_from(list(WRONG)), max_size=3), label="wrong")
        missing = data.draw(st.sets(st.sampled_from(list(RIGHT)), max_size=1), label="missing") - wrong
        claim = {"id": f"'claim-{index}'"} | RIGHT | {key: WRONG[key].format(index) for key in wrong}
        expected += [writer.line()] * len(missing)
        writer.header("[[", "expect")
        for key in data.draw(st.permutations(sorted(claim.keys() - missing))):
            if key in wrong:
                expected.append(writer.line())
            writer.key(key)
            writer.put(f"= {claim[key]}")
            writer.end_line()
    path = tmp_path_factory.getbasetemp() / "written.toml"
    path.write_text(writer.text, encoding="utf-8")
    told = [int(line.split(":")[0]) for line in errors_of(path)]
    assert told == sorted(expected)


# --- files of the suite --------------------------------------------------------------------------------------


def test_the_two_predictions() -> None:
    claims = {
        f"{hypothesis.id}/{claim.id}": (claim.claim(), claim.severity)
        for hypothesis in load_hypotheses([HYPOTHESES / "phase_c.toml", HYPOTHESES / "phase_e.toml"])
        for claim in hypothesis.expect
    }
    assert claims == {
        "phase-c/shared-direction": ("intra_cosine over C >= 0.5 (sink_free)", "fail"),
        "phase-c/few-ranks": ("equal_cosine over C >= 0.53 (sink_free)", "fail"),
        "phase-c/shared-subspace": ("capture_fraction_held_out over C >= 0.7 (sink_free)", "fail"),
        "phase-c/closer-than-at-the-same-distance": (
            "intra_cosine_cross_fitted over C > pairs outside at the same distances (sink_free)",
            "fail",
        ),
        "phase-c/edges-that-no-drift-has": (
            "intra_cosine_cross_fitted over C > 95% of smooth drifts (sink_free)",
            "fail",
        ),
        "phase-c/more-shared-than-e": ("intra_cosine over C >= 2 x intra_cosine over E (sink_free)", "fail"),
        "phase-c/more-ranks-per-layer-than-e": (
            "mean effective_rank over C >= mean effective_rank over E (sink_free)",
            "warn",
        ),
        "phase-e/has-directions": ("reliability of at least 80% of the layers of E >= 0.9 (sink_free)", "fail"),
        "phase-e/own-direction": ("intra_cosine over E <= 0.2 (sink_free)", "fail"),
        "phase-e/full-rank": ("equal_cosine over E <= 0.26 (sink_free)", "fail"),
        "phase-e/least-shared-window": (
            "intra_cosine_cross_fitted over E < 95% of windows of as many layers (sink_free)",
            "fail",
        ),
    }


@pytest.mark.parametrize("path", sorted(HYPOTHESES.glob("*.toml")), ids=lambda path: path.name)
def test_editors_find_the_schema(path: Path) -> None:
    assert path.read_text(encoding="utf-8").splitlines()[0] == "#:schema ./hypothesis.schema.json"


def test_the_literature_is_cited_and_its_thresholds_have_an_owner() -> None:
    """One file a paper; each claim says whether its number is the paper's or ours."""
    papers = load_hypotheses([HYPOTHESES / "literature"])
    assert len(papers) >= 7
    cited = [re.findall(r"arXiv (\d{4}\.\d{5})", " ".join(paper.rationale.split())) for paper in papers]
    assert len({paper for (paper,) in cited}) == len(papers)
    for paper in papers:
        assert paper.path.read_text(encoding="utf-8").startswith("#:schema ../hypothesis.schema.json")
        assert paper.tags == ("literature",)
        for claim in paper.expect:
            assert re.search(r"\bours?\b|the paper's|its own|we take", " ".join(claim.origin.split())), claim.id


def test_hypotheses_are_read_without_torch() -> None:
    """Collecting tests stays quick."""
    code = "import sys, delta_suite.claims.loader; print({'torch', 'transformers', 'pytest'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# --- what is no text, or too much of it ----------------------------------------------------------------------------


def test_what_is_no_hypothesis_file_is_named_and_the_rest_is_checked(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.toml")
    (tmp_path / "b.toml").symlink_to(tmp_path / "nowhere")
    (tmp_path / "c.toml").symlink_to(tmp_path / "c.toml")
    (tmp_path / "d.toml").symlink_to("/dev/zero")
    (tmp_path / "e.toml").mkdir()
    (tmp_path / "f.toml").write_bytes(GOOD.encode("utf-16"))
    (tmp_path / "g.toml").write_bytes(b"schema = 1\0")
    (tmp_path / "h.toml").write_bytes(GOOD.encode() + b"#" * (1 << 20))
    (tmp_path / "i.toml").write_text("schema = 2")
    lines = complaint(tmp_path).splitlines()
    assert lines[:4] == [
        "a.toml: cannot be read: not a regular file",
        "b.toml: cannot be read: No such file or directory",
        "c.toml: cannot be read: Too many levels of symbolic links",
        "d.toml: cannot be read: not a regular file",
    ]
    assert lines[4] == "e.toml: cannot be read: a folder, not a file"
    assert lines[5].startswith("f.toml: cannot be read: it is UTF-16")
    assert lines[6] == "g.toml: cannot be read: it is binary data, not text"
    assert re.fullmatch(r"h.toml: cannot be read: it has [\d,]+ bytes, and at most 1,048,576 are read", lines[7])
    assert lines[8].startswith("i.toml:1: ")


def test_settings_beside_hypotheses_are_none(tmp_path: Path) -> None:
    """pytest and `judge` read the same files of a folder."""
    (tmp_path / "x.toml").write_text(GOOD)
    for name in ("pyproject.toml", "models.toml", "pytest.toml", ".pytest.toml"):
        (tmp_path / name).write_text("[tool]")
    assert [hypothesis.id for hypothesis in load_hypotheses([tmp_path])] == ["phase-c"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("threshold = 0.5", "threshold = 1e308", "threshold is 1e+308, and must be less than or equal to 10"),
        ("threshold = 0.5", "threshold = -1e16", "threshold is -1e+16, and must be greater than or equal to -10"),
        ("threshold = 0.5", "threshold = inf", "threshold is inf, which nothing can be compared with"),
        ("threshold = 0.5", "threshold = nan", "threshold is nan, which nothing can be compared with"),
        ("threshold = 0.5", f"threshold = 1{'0' * 400}", "not TOML: the number of `expect.0.threshold` is out of"),
        ("threshold = 0.5", f"threshold = 0x{'f' * 5000}", "not TOML: the number of `expect.0.threshold` is out of"),
        ("threshold = 0.5", f"threshold = 1{'0' * 5000}", "not TOML: the number 10000000000000000000... is out of"),
        ("threshold = 0.5", 'than = { scope = "E", times = 1e308 }', "times is 1e+308, and must be less than"),
        ("threshold = 0.5", 'than = { scope = "E", plus = -1e308 }', "plus is -1e+308, and must be greater than"),
        ("version = 3", "version = 9223372036854775807", "version is 9223372036854775807, and must be less than"),
        ("version = 3", "version = 9223372036854775808", "not TOML: the number of `version` is out of bounds"),
        ('scope = "C"', f'scope = "layer:{"9" * 5000}"', 'scope is "layer:99999'),
        ('scope = "C"', 'scope = "layers:0-9223372036854775808"', 'scope is "layers:0-9223372036854775808": name'),
    ],
)
def test_numbers_out_of_bounds_are_refused_on_their_line(
    file: Callable[[str], Path], old: str, new: str, says: str
) -> None:
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    told = complaint(file(text))
    line = GOOD[: GOOD.index(old)].count("\n") + 1
    assert f"x.toml:{line}: {says}" in told


def test_few_bytes_do_not_ask_for_endless_time(file: Callable[[str], Path]) -> None:
    assert "a key has more than 64 parts" in complaint(file(f"{'a.' * 100_000}a = 1"))
    assert "a key has more than 64 parts" in complaint(file("schema = 1\n[" + '"a" . ' * 100_000 + "a]"))
    assert "nested too deeply" in complaint(file(f"a = {'[' * 100_000}"))
    assert "nested too deeply" in complaint(file(f"a = {'{a=' * 100_000}"))
    long = complaint(file(GOOD.replace("metric =", f"{'m' * 100_000} =", 1)))
    assert len(long) < 2000
