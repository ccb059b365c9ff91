"""Hypothesis files: what is read from them, what is refused and in which words, and on which line."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from delta_suite.claims.loader import load_hypotheses, load_hypothesis
from delta_suite.claims.schema import Expectation, Than, Xfail, json_schema
from delta_suite.errors import HypothesisFileError
from delta_suite.metrics.registry import METRICS
from delta_suite.models.phases import declared_problems
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft4Validator

from tests.test_toml_lines import Writer, places

HYPOTHESES = Path(__file__).parents[2] / "hypotheses"

# The line numbers of the tests below are those of this text.
GOOD = '''\
schema = 1
id = "phase-c"
title = "Phase C"
version = 3
rationale = """
[[expect]]
id = "not a table"
"""
tags = ["phase-c", "deep"]

[[expect]]
id = "direction"
metric = "intra_cosine"
scope = "C"
op = ">="
threshold = 0.5
origin = "made up"

[[expect.xfail]]
models = ["gemma3-*", "gpt2"]
reason = "sinks"

[[expect]]
id = "rank"
metric = "effective_rank"
scope = "layers:8-15"
over = "each"
mostly = 0.8
op = "<"
than = { scope = "model", times = 2 }
severity = "warn"
rationale = "why not"
origin = "made up"
'''


def complaint(path: Path) -> str:
    """The loader's message, with the folder left out."""
    with pytest.raises(HypothesisFileError) as caught:
        load_hypotheses([path])
    return str(caught.value).replace(f"{path.parent if path.suffix else path}/", "")


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "x.toml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


# --- what is read ----------------------------------------------------------------------------------------------


def test_a_whole_file(file: Callable[[str], Path]) -> None:
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


@pytest.mark.parametrize(
    ("keys", "claim"),
    [
        ({"metric": "intra_cosine", "threshold": 0.5}, "intra_cosine over C >= 0.5"),
        ({"metric": "intra_cosine", "over": "min", "threshold": 0.5}, "min intra_cosine over C >= 0.5"),
        ({"metric": "capture_fraction", "threshold": 0.7}, "capture_fraction over C >= 0.7"),
        ({"metric": "shared_fraction", "threshold": 1}, "shared_fraction over C >= 1"),
        ({"metric": "gamma", "scope": "layer:3", "threshold": 1e-12}, "gamma over layer:3 >= 1e-12"),
        (
            {"metric": "gamma", "scope": "layers:3-5", "threshold": 0.1234567891},
            "mean gamma over layers:3-5 >= 0.1234567891",
        ),
        ({"metric": "adjacent_cosine", "scope": "model", "threshold": -2}, "mean adjacent_cosine over model >= -2"),
        ({"metric": "gamma", "over": "each", "threshold": 12}, "gamma of each layer of C >= 12"),
        (
            {"metric": "gamma", "over": "each", "mostly": 0.55, "threshold": 12},
            "gamma of at least 55% of the layers of C >= 12",
        ),
        (
            {"metric": "intra_cosine", "than": Than(scope="E", times=2)},
            "intra_cosine over C >= 2 x intra_cosine over E",
        ),
        (
            {"metric": "effective_rank", "than": Than(scope="E")},
            "mean effective_rank over C >= mean effective_rank over E",
        ),
        (
            {"metric": "gamma", "over": "each", "than": Than(scope="C", times=0.5)},
            "gamma of each layer of C >= 0.5 x mean gamma over C",
        ),
        (
            {"metric": "intra_cosine", "than": Than(scope="C", metric="cross_cosine", times=1.5)},
            "intra_cosine over C >= 1.5 x cross_cosine over C",
        ),
        (
            {"metric": "sharing_index", "than": Than(scope="E", times=2, plus=-0.2)},
            "median sharing_index over C >= 2 x median sharing_index over E - 0.2",
        ),
        (
            {"metric": "gamma", "than": Than(scope="E", plus=3)},
            "mean gamma over C >= mean gamma over E + 3",
        ),
    ],
)
def test_a_claim_in_one_line(keys: dict[str, Any], claim: str) -> None:
    assert Expectation.model_validate({"id": "x", "scope": "C", "op": ">=", "origin": "x"} | keys).claim() == claim


def test_a_claim_names_its_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delta_suite.claims.schema.VARIANTS", ("raw", "sink_free"))
    claim = Expectation(id="x", metric="gamma", scope="C", variant="sink_free", op=">", threshold=1, origin="x").claim()
    assert claim == "mean gamma over C > 1 (sink_free)"


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


# --- what is refused -------------------------------------------------------------------------------------------


class Slip(NamedTuple):
    """An edit of GOOD, and what the loader says of it."""

    old: str
    new: str
    says: str
    expressible: bool = True
    """Whether the JSON Schema can refuse it too."""


CLAIMS = GOOD[GOOD.index('\n[[expect]]\nid = "direction') :]
SCOPES = "name a phase (C), one layer (layer:3), a range of layers (layers:8-15) or all of them (model)"
HEAD_KEYS = "schema, id, title, version, rationale, tags, expect"
CLAIM_KEYS = "id, metric, scope, variant, over, mostly, op, threshold, than, severity, rationale, origin, xfail"
ID_RULE = "write it in small letters, digits and hyphens, beginning with a letter or digit"
MARKER_RULE = "a pytest marker has letters, digits, hyphens and underscores, and begins with a letter"
TAKEN = "already means something to pytest or its plugins: choose another word"
ORIGIN = "where the threshold or the comparison comes from"
SEVERAL = "is one: name a phase, model, or a range of layers"
NO_LIMIT = "which nothing can be compared with: write a finite number"
BOTH = "threshold and than are both given, and a claim compares with one: remove the other"

# fmt: off
SLIPS = [
    # keys
    Slip("threshold", "treshold", "16: unknown key 'treshold': did you mean 'threshold'?"),
    Slip("title", "Title", "3: unknown key 'Title': did you mean 'title'?"),
    Slip("version = 3", "version = 3\n\nzzz = 1", f"6: unknown key 'zzz': use one of {HEAD_KEYS}"),
    Slip('scope = "model",', 'scop = "model",', "30: unknown key 'scop': did you mean 'scope'?"),
    Slip("reason", "raison", "21: unknown key 'raison': did you mean 'reason'?"),
    Slip("schema = 1", "line = 1\nschema = 1", f"1: unknown key 'line': use one of {HEAD_KEYS}"),
    Slip('"direction"', '"direction"\nline = 3', f"13: unknown key 'line': use one of {CLAIM_KEYS}"),
    Slip("severity", "tags = []\nseverity",
         "31: 'tags' is a key of the head of the file, not of [[expect]]: move it there"),
    Slip("reason", 'severity = "warn"\nreason',
         "21: 'severity' is a key of [[expect]], not of [[expect.xfail]]: move it there"),
    Slip("schema = 1", 'op = ">"\nschema = 1',
         "1: 'op' is a key of [[expect]], not of the head of the file: move it there"),
    Slip("severity", "times = 2\nseverity", "31: 'times' is a key of than, not of [[expect]]: move it there"),
    Slip('origin = "made up"\n\n', "\n", f"11: missing key 'origin' in [[expect]]: add it ({ORIGIN})"),
    Slip("schema = 1\n", "",
         "1: missing key 'schema' in the head of the file: add it (the version of the file format, 1)"),
    Slip('reason = "sinks"', "",
         "19: missing key 'reason' in [[expect.xfail]]: add it (why the claim is expected to fail there)"),
    Slip('scope = "model", ', 'null = "windows", ', "30: unknown null 'windows': did you mean 'window'?"),
    Slip('scope = "model", ', "",
         '30: than names no other side: add scope = "E", or null = "window"'),
    Slip(CLAIMS, "",
         "1: missing key 'expect' in the head of the file: add it (at least one [[expect]] table, each a claim)"),
    Slip(CLAIMS, "\nexpect = []", "11: expect is empty: give at least one"),
    # words
    Slip("intra_cosine", "intra_cosin", "13: unknown metric 'intra_cosin': did you mean 'intra_cosine'?"),
    Slip("intra_cosine", "qqq", f"13: unknown metric 'qqq': use one of {', '.join(METRICS)}"),
    Slip("severity", 'variant = "row"\nseverity', "31: unknown variant 'row': did you mean 'raw'?"),
    Slip('">="', '"=>"', "15: unknown op '=>': did you mean '>='?"),
    Slip('">="', '"=="', "15: unknown op '==': use one of >=, <=, >, <"),
    Slip('">="', "1", "15: op must be one of >=, <=, >, <, not 1"),
    Slip('"each"', '"every"', "27: unknown over 'every': use one of mean, median, min, max, each"),
    Slip('"warn"', '"warning"', "31: unknown severity 'warning': did you mean 'warn'?"),
    Slip("times = 2 }", 'metric = "gama" }', "30: unknown metric 'gama': did you mean 'gamma'?"),
    Slip('"C"', '"layers:8..15"', f'14: scope is "layers:8..15": {SCOPES}'),
    Slip('"C"', '"layer:03"', f'14: scope is "layer:03": {SCOPES}'),
    Slip('"C"', '"layers:15-8"', "14: scope 'layers:15-8' runs backwards: write 'layers:8-15'", False),
    Slip('"direction"', '"Phase C"', f'12: id is "Phase C": {ID_RULE}'),
    Slip('"phase-c"\n', '"-c"\n', f'2: id is "-c": {ID_RULE}'),
    Slip('"deep"', '\n"not so deep"', f'10: item 2 of tags is "not so deep": {MARKER_RULE}'),
    Slip('"deep"', '"hypothesis"', f"9: tag 'hypothesis' {TAKEN}"),
    Slip('"deep"', '"skip"', f"9: tag 'skip' {TAKEN}"),
    Slip('"made up"\n\n', '" "\n\n', '17: origin is " ": write at least a word'),
    Slip('"sinks"', '""', '21: reason is "": write at least a word'),
    # types and numbers
    Slip("schema = 1", "schema = 2",
         "1: schema = 2 cannot be read here, only schema = 1: a higher one needs a newer delta-suite"),
    Slip("schema = 1", "schema = true", "1: schema must be a whole number, not true"),
    Slip("version = 3", "version = 3.0", "4: version must be a whole number, not 3.0"),
    Slip("version = 3", "version = 0", "4: version is 0, and must be greater than or equal to 1"),
    Slip("0.5", '"0.5"', '16: threshold must be a number, not "0.5"'),
    Slip("0.5", "false", "16: threshold must be a number, not false"),
    Slip("0.5", "nan", f"16: threshold is nan, {NO_LIMIT}", False),
    Slip("0.5", "-inf", f"16: threshold is -inf, {NO_LIMIT}", False),
    Slip("times = 2", "times = inf", f"30: times is inf, {NO_LIMIT}", False),
    Slip("times = 2", "times = 0", "30: times is 0, and must be greater than 0"),
    Slip("times = 2", 'plus = "2"', '30: plus must be a number, not "2"'),
    Slip("times = 2", "plus = inf", f"30: plus is inf, {NO_LIMIT}", False),
    Slip("mostly = 0.8", "mostly = 80", "28: mostly is 80, and must be less than or equal to 1"),
    Slip("mostly = 0.8", "mostly = 0.0", "28: mostly is 0.0, and must be greater than 0"),
    Slip('"Phase C"', "1979-05-27 07:32:00", '3: title must be a string, "...", not a date or time'),
    Slip('["gemma3-*", "gpt2"]', '"gpt2"', '20: models must be an array, [...], not "gpt2"'),
    Slip('["gemma3-*", "gpt2"]', "[]", "20: models is empty: give at least one"),
    Slip('"gpt2"]', "2]", '20: item 2 of models must be a string, "...", not 2'),
    Slip('["phase-c", "deep"]', "{ a = 1 }", "9: tags must be an array, [...], not a table"),
    Slip("[[expect.xfail]]", "[expect.xfail]",
         "19: xfail is one table, and must be an array of them: write its header as [[expect.xfail]]"),
    Slip('than = { scope = "model", times = 2 }', 'than = "model"', '30: than must be a table, not "model"'),
    Slip(CLAIMS, "\nexpect = [\n1]", "12: item 1 of expect must be a table, not 1"),
    # between keys
    Slip("threshold = 0.5\n", "",
         '11: nothing to compare with: add threshold = <number>, or than = { scope = "E" }'),
    Slip("severity", "threshold = 1\nseverity", f"30: {BOTH}"),
    Slip("severity", "threshold = nan\nseverity", f"30: {BOTH}\n31: threshold is nan, {NO_LIMIT}"),
    Slip('"C"', '"layer:3"', f"14: intra_cosine is taken over several layers, and 'layer:3' {SEVERAL}"),
    Slip('"C"', '"layers:3-3"', f"14: intra_cosine is taken over several layers, and 'layers:3-3' {SEVERAL}", False),
    Slip("threshold = 0.5", 'than.scope = "layer:3"',
         f"16: intra_cosine is taken over several layers, and 'layer:3' {SEVERAL}"),
    Slip('scope = "model", times = 2', 'scope = "layer:1", metric = "shared_fraction"',
         f"30: shared_fraction is taken over several layers, and 'layer:1' {SEVERAL}"),
    Slip('"intra_cosine"', '"block_effective_rank"\nover = "median"',
         '14: block_effective_rank is one number for a phase, with none per layer: remove over = "median"'),
    Slip("threshold = 0.5", 'over = "max"\nthan.scope = "E"\nthan.metric = "shared_fraction"',
         '18: shared_fraction is one number for a phase, with none per layer: remove over = "max"'),
    Slip('"intra_cosine"', '"boundary_p"',
         '14: boundary_p is one number for the whole model under its phase map: write scope = "model"'),
    Slip("threshold = 0.5", 'than = { scope = "E", metric = "boundary_p" }',
         '16: boundary_p is one number for the whole model under its phase map: write scope = "model"'),
    Slip('"intra_cosine"\nscope = "C"', '"boundary_p"\nscope = "model"\nover = "max"',
         '15: boundary_p is one number for a model, with none per layer: remove over = "max"'),
    Slip('over = "each"\n', "",
         '27: mostly is the share of layers that must hold: add over = "each", or remove mostly'),
    Slip("threshold = 0.5", 'than = { times = 2, scope = "C" }',
         "16: intra_cosine over C is compared with itself: name another scope or metric", False),
    Slip('"rank"', '"direction"', "24: id 'direction' is that of the claim in line 12 too: rename one of them", False),
]
# fmt: on


def slipped(slip: Slip) -> str:
    assert slip.old in GOOD
    return GOOD.replace(slip.old, slip.new, 1)


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip.says)
def test_each_slip_is_told_with_its_line(slip: Slip, file: Callable[[str], Path]) -> None:
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
def test_what_is_no_toml(content: bytes, says: str, file: Callable[[bytes], Path]) -> None:
    assert complaint(file(content)) == f"x.toml:{says}"


def test_what_cannot_be_opened(tmp_path: Path) -> None:
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
    """It reads the file, or says what is wrong with it; it never raises anything else."""
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


@given(st.data())
def test_the_loader_tells_the_line_of_each_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
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


def errors_of(path: Path) -> list[str]:
    """The loader's lines, without the path."""
    try:
        load_hypothesis(path)
    except HypothesisFileError as error:
        return [line.removeprefix(f"{path}:") for line in str(error).splitlines()]
    return []


# --- JSON Schema -----------------------------------------------------------------------------------------------

ALSO_GOOD = [
    ("", ""),
    ("0.5", "1"),
    ("threshold = 0.5", 'than.scope = "E"'),
    ("threshold = 0.5", 'than = { scope = "C", metric = "cross_cosine" }'),
    ('"intra_cosine"\nscope = "C"', '"gamma"\nscope = "layer:3"'),
    ('"intra_cosine"\nscope = "C"', '"adjacent_cosine"\nscope = "layer:3"'),
    ('"intra_cosine"\nscope = "C"', '"boundary_p"\nscope = "model"'),
    ('"C"', '"layers:3-9"'),
    ('"C"', '"some_Phase1"'),
    ('"intra_cosine"', '"capture_fraction"\nover = "median"'),
    ('"intra_cosine"', '"block_effective_rank"\nover = "mean"'),
    ('tags = ["phase-c", "deep"]', "tags = []"),
    ("mostly = 0.8\n", ""),
    ('over = "each"\nmostly = 0.8', "mostly = 1"),
    ('scope = "model", times = 2', 'scope = "layers:8-15"'),
    ('scope = "model", times = 2', 'scope = "C", plus = -0.2'),
    ('scope = "model", times = 2', 'scope = "C", metric = "shared_fraction"'),
]


def test_the_schema_is_draft_4() -> None:
    Draft4Validator.check_schema(json_schema())
    later = {"$defs", "const", "prefixItems", "if", "examples", "unevaluatedProperties", "dependentRequired"}
    assert not later & {key for loc in places(json_schema()) for key in loc}


@pytest.mark.parametrize(("old", "new"), ALSO_GOOD)
def test_schema_and_loader_accept(old: str, new: str, file: Callable[[str], Path]) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    assert errors_of(file(text)) == []
    Draft4Validator(json_schema()).validate(tomllib.loads(text))


BETWEEN_KEYS = (
    *("a claim compares with one", "names no other side", "is taken over several layers", "mostly is the share"),
    *("is one number for", "nothing to compare with"),
)
"""Words of what the loader says of rules between keys, which the schema leaves to it."""


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip.says)
def test_the_loader_refuses_all_that_the_schema_refuses(slip: Slip, file: Callable[[str], Path]) -> None:
    """The schema knows keys, types and words; rules between keys and values are the loader's alone."""
    text = slipped(slip)
    assert errors_of(file(text))
    if slip.expressible and not any(words in slip.says for words in BETWEEN_KEYS):
        assert not Draft4Validator(json_schema()).is_valid(tomllib.loads(text))


# --- what the suite ships --------------------------------------------------------------------------------------


def test_the_two_predictions() -> None:
    claims = {
        f"{hypothesis.id}/{claim.id}": (claim.claim(), claim.severity)
        for hypothesis in load_hypotheses([HYPOTHESES / "phase_c.toml", HYPOTHESES / "phase_e.toml"])
        for claim in hypothesis.expect
    }
    assert claims == {
        "phase-c/shared-direction": ("intra_cosine over C >= 0.5 (sink_free)", "fail"),
        "phase-c/few-ranks": ("block_effective_rank_fraction over C <= 0.35 (sink_free)", "fail"),
        "phase-c/shared-subspace": ("capture_fraction_held_out over C >= 0.7 (sink_free)", "fail"),
        "phase-c/closer-than-at-the-same-distance": (
            "intra_cosine_cross_fitted over C > pairs outside at the same distances (sink_free)",
            "fail",
        ),
        "phase-c/most-shared-window": (
            "intra_cosine_cross_fitted over C > 95% of windows of as many layers (sink_free)",
            "fail",
        ),
        "phase-c/more-shared-than-e": ("intra_cosine over C >= 2 x intra_cosine over E (sink_free)", "fail"),
        "phase-c/more-ranks-per-layer-than-e": (
            "mean effective_rank over C >= mean effective_rank over E (sink_free)",
            "warn",
        ),
        "phase-e/has-directions": ("reliability of at least 80% of the layers of E >= 0.9 (sink_free)", "fail"),
        "phase-e/own-direction": ("intra_cosine over E <= 0.2 (sink_free)", "fail"),
        "phase-e/full-rank": ("block_effective_rank_fraction over E >= 0.8 (sink_free)", "fail"),
        "phase-e/least-shared-window": (
            "intra_cosine_cross_fitted over E < 95% of windows of as many layers (sink_free)",
            "fail",
        ),
    }


@pytest.mark.parametrize("path", sorted(HYPOTHESES.glob("*.toml")), ids=lambda path: path.name)
def test_editors_find_the_schema(path: Path) -> None:
    assert path.read_text(encoding="utf-8").splitlines()[0] == "#:schema ./hypothesis.schema.json"


def test_the_schema_file_is_up_to_date() -> None:
    written = (HYPOTHESES / "hypothesis.schema.json").read_text(encoding="utf-8")
    assert written == json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n", (
        "run: delta-suite schema > hypotheses/hypothesis.schema.json"
    )


def test_hypotheses_are_read_without_torch() -> None:
    """Collecting tests stays quick."""
    code = "import sys, delta_suite.claims.loader; print({'torch', 'transformers', 'pytest'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("phase", ["C", "early-mid", "late_2"])
def test_a_scope_names_every_phase_that_a_model_can_have(phase: str, tmp_path: Path) -> None:
    assert declared_problems({phase: (0, 1)}) == []
    path = tmp_path / "h.toml"
    path.write_text(GOOD.replace('scope = "C"', f'scope = "{phase}"', 1))
    assert load_hypothesis(path).expect[0].scope == phase
