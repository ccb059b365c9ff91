"""Calibration texts that users bring: files, tables, folders, datasets, and the one error of each bad input."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from delta_suite.capture.calibration import load_calibration
from delta_suite.capture.texts import HUB_DOCUMENTS
from delta_suite.errors import CalibrationError


def _parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


def _jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_parquet_gives_its_column_text(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "texts.parquet", {"id": [1, 2, 3], "text": ["one", "  ", "drei\u00e4"]})
    assert load_calibration(str(path)).documents == ("one", "drei\u00e4")


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_only_the_first_documents_are_read(tmp_path: Path, ending: str) -> None:
    """A bad row after the last document that is wanted is never reached, and neither is the rest of a large file."""
    texts: list[object] = [f"document {number}" for number in range(5000)]
    path = tmp_path / f"many.{ending}"
    if ending == "jsonl":
        _jsonl(path, [*({"text": text} for text in texts), "no document"])
        with pytest.raises(CalibrationError, match=r"many.jsonl:5001"):
            load_calibration(str(path))
    else:
        _parquet(path, {"text": texts})
    loaded = load_calibration(str(path), documents=3)
    assert loaded.documents == ("document 0", "document 1", "document 2")
    assert loaded.first == 3


def test_bundled_sets_and_folders_obey_the_number_too(tmp_path: Path) -> None:
    core = load_calibration("core")
    assert load_calibration("core", documents=5).documents == core.documents[:5]
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    assert load_calibration(str(tmp_path), documents=2).documents == ("a", "b")
    with pytest.raises(CalibrationError, match="--documents is out of bounds: a calibration has 1 to"):
        load_calibration("core", documents=0)


@pytest.fixture(params=["parquet", "jsonl"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a dataset in a folder, as a hub repository has it: files named by split, without any script."""
    pytest.importorskip("datasets")
    folder = tmp_path / "stories"
    folder.mkdir()
    for split, count in {"train": HUB_DOCUMENTS + 10, "validation": 2}.items():
        columns: dict[str, list[object]] = {
            "text": [f"{split} {number}" for number in range(count)],
            "content": [f"content of {split} {number}" for number in range(count)],
            "stars": list(range(count)),
        }
        if request.param == "parquet":
            _parquet(folder / f"{split}.parquet", columns)
        else:
            rows: list[object] = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            _jsonl(folder / f"{split}.jsonl", rows)
    return folder


def test_a_dataset_by_split_and_column(dataset: Path) -> None:
    default = load_calibration(f"hf:{dataset}")
    assert default.documents == tuple(f"train {number}" for number in range(HUB_DOCUMENTS))
    assert default.first == HUB_DOCUMENTS  # recorded: it was not all of the dataset
    assert load_calibration(f"hf:{dataset}:validation").documents == ("validation 0", "validation 1")
    named = load_calibration(f"hf:{dataset}:validation:content", documents=1)
    assert named.documents == ("content of validation 0",)


@pytest.mark.parametrize(
    ("suffix", "telling"),
    [
        (":train:body", "no column `body` .its columns: text, content, stars"),
        (":train:stars", "row 1: not a document: `stars` is int"),
        (":test", "cannot be loaded .*split"),
        (":train:text:more", "names no dataset"),
    ],
)
def test_a_dataset_that_does_not_fit_is_one_error(dataset: Path, suffix: str, telling: str) -> None:
    with pytest.raises(CalibrationError, match=telling):
        load_calibration(f"hf:{dataset}{suffix}")


def test_offline_is_one_error_with_the_way_out() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(CalibrationError, match=r"hub cannot be reached.*hf download --repo-type dataset org/corpus"):
        load_calibration("hf:org/corpus/en:train")


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("texts.parquet", "pyarrow", "parquet"), ("hf:org/corpus", "datasets", "datasets")]
)
def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str
) -> None:
    (tmp_path / "texts.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    there: Callable[[str], object] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == package else there(asked))
    with pytest.raises(CalibrationError, match=rf"{package}, which is not installed.*delta-suite\[{extra}\]"):
        load_calibration(name)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfword")
    assert load_calibration(str(tmp_path / "a.txt")).documents == ("word",)


@pytest.mark.parametrize(
    ("name", "content", "telling"),
    [
        (
            "latin.txt",
            "caf\u00e9 cr\u00e8me".encode("latin-1"),
            "latin.txt:1: byte 0xe9 is not UTF-8.*takes a text file",
        ),
        ("wide.txt", "word".encode("utf-16"), "wide.txt.* is UTF-16.*iconv -f UTF-16"),
        ("binary.txt", b"PK\x03\x04\x00\x00\x08\xff\x00", "binary.txt.* it is binary data.*UTF-8.$"),
        ("nul.txt", b"text\x00text", "nul.txt.* is binary data"),
        ("empty.txt", b"", "empty.txt holds no text"),
        ("empty.jsonl", b"\n\n", "empty.jsonl holds no text"),
        ("content.jsonl", b'{"content": "x", "id": 1}\n', r"content.jsonl:1: .*no key `text` .its keys: content, id"),
        ("number.jsonl", b'{"text": "x"}\n{"text": 4}\n', "number.jsonl:2: .*`text` is int"),
        ("null.jsonl", b'{"text": null}\n', "null.jsonl:1: .*`text` is null, not text"),
        (
            "mixed.jsonl",
            b'{"text": "x"}\n{"text": "caf\xe9"}\n',
            "mixed.jsonl:2: .*byte 0xe9 is not UTF-8",
        ),
        ("list.jsonl", b'["text"]\n', "list.jsonl:1: not a document"),
        ("deep.jsonl", b"[" * 200_000, "deep.jsonl:1: not a document"),
        ("half.jsonl", b'{"text": "x"}\n{"text": "a \\ud800 b"}\n', r"half.jsonl:2: not a doc.* character 2 .*ud800"),
        ("cut.parquet", b"PAR1 and no more", "cut.parquet cannot be read as parquet"),
        ("rows.json", b'[{"text": "x"}]', "rows.json is a .json file, whose marks would be measured as text"),
        ("ROWS.JSONL", b'["text"]\n', "ROWS.JSONL:1: not a document"),
    ],
)
def test_each_bad_file_is_one_clear_error(tmp_path: Path, name: str, content: bytes, telling: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=telling) as caught:
        load_calibration(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gone.txt", "No such file or directory"),
        ("x" * 5000, "File name too long"),
        ("x/" * 3000, "File name too long"),
        ("loop", "Too many levels of symbolic links"),
        ("~nobody-here/a.txt", "No such file or directory"),
    ],
    ids=["gone", "long", "deep", "loop", "tilde"],
)
def test_a_path_that_leads_nowhere_is_one_error_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(CalibrationError, match=rf"^no calibration '{name[:100]}.*{why}.*--calibration takes") as caught:
        load_calibration(name)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("a text")
    assert load_calibration(".").documents == ("a text",)
    with pytest.raises(CalibrationError, match=r"^--calibration is empty"):
        load_calibration("")


def test_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    latin = pyarrow.array([b"caf\xe9"], type=pyarrow.binary())
    _, offsets, data = latin.buffers()
    path = _parquet(tmp_path / "latin.parquet", {"text": pyarrow.StringArray.from_buffers(1, offsets, data)})
    with pytest.raises(CalibrationError, match=r"latin.parquet cannot be read as parquet: UnicodeDecodeError"):
        load_calibration(str(path))


def test_bad_parquet_columns(tmp_path: Path) -> None:
    other = _parquet(tmp_path / "other.parquet", {"body": ["x"], "id": [1]})
    with pytest.raises(CalibrationError, match=r"no column `text` .its columns: body, id.*hf:FOLDER:train:COLUMN"):
        load_calibration(str(other))
    numbers = _parquet(tmp_path / "numbers.parquet", {"text": [1, 2]})
    with pytest.raises(CalibrationError, match="row 1: not a document: `text` is int"):
        load_calibration(str(numbers))


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"holds no .txt or .md file"):
        load_calibration(str(tmp_path))
    _jsonl(tmp_path / "data.jsonl", [{"text": "x"}])
    with pytest.raises(CalibrationError, match=rf"data.jsonl. write hf:{tmp_path}"):
        load_calibration(str(tmp_path))
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CalibrationError, match=r"latin.txt:1: byte 0xe9"):
        load_calibration(str(tmp_path))


def test_texts_that_repeat_others_are_left_out_and_counted(tmp_path: Path) -> None:
    """The first stays as it is; case, punctuation and order make another text."""
    texts = ["one two", "three", " one\n\ttwo ", "One two", "one\u00a0two", "two one", "three", "onetwo"]
    path = _jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    calibration = load_calibration(str(path))
    assert calibration.documents == ("one two", "three", "One two", "two one", "onetwo")
    assert calibration.duplicates == 3
    alone = _jsonl(tmp_path / "alone.jsonl", [{"text": text} for text in calibration.documents])
    assert load_calibration(str(alone)).sha256 == calibration.sha256
    assert load_calibration(str(alone)).duplicates == 0


def test_the_first_documents_are_so_many_different_ones(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in ("a", "a", "b", "a", "c", "a")])
    first = load_calibration(str(path), documents=2)
    assert (first.documents, first.duplicates) == (("a", "b"), 1)
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text("the same" if name != "c" else "another")
    folder = load_calibration(str(tmp_path))
    assert (folder.documents, folder.duplicates) == (("the same", "another"), 1)


def test_core_and_seed_repeat_nothing() -> None:
    core = load_calibration("core")
    assert len({" ".join(text.split()) for text in core.documents}) == len(core.documents)
    assert (core.duplicates, load_calibration("seed").duplicates) == (0, 0)


@pytest.mark.parametrize("name", ["pipe", "pipe.jsonl", "pipe.parquet", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    pipe = path
    if name == "folder":
        path.mkdir()
        (path / "a.txt").write_text("a text")
        (path / "notes.md").mkdir()  # no document, and no hindrance
        pipe = path / "b.txt"
    os.mkfifo(pipe)
    with pytest.raises(CalibrationError, match=rf"^calibration file {pipe} cannot be read: not a regular file\."):
        load_calibration(str(path))


@pytest.mark.parametrize(("target", "why"), [("a.txt", "Too many levels of symbolic links"), ("gone", "No such file")])
def test_a_link_in_a_folder_that_leads_nowhere_is_named(tmp_path: Path, target: str, why: str) -> None:
    (tmp_path / "a.txt").symlink_to(target)
    with pytest.raises(CalibrationError, match=f"a.txt cannot be read: {why}"):
        load_calibration(str(tmp_path))


@pytest.mark.parametrize("name", ["long.jsonl", "long.txt"])
def test_a_document_of_more_bytes_than_the_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("delta_suite.capture.texts.DOCUMENT_LIMIT", 100)
    path = tmp_path / name
    path.write_text(json.dumps({"text": "short"}) + "\n" + json.dumps({"text": "long " * 100}) + "\n")
    with pytest.raises(CalibrationError, match=r"long.jsonl:2: .*more than 100 bytes|long.txt .*at most 100 are read"):
        load_calibration(str(path))


@pytest.mark.parametrize(
    ("line", "telling"),
    [
        ('{"text": "a", "text": "b"}', "the key `text` stands twice"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "limit .* digits"),
        ('{"text": "a"', "Expecting ',' delimiter"),
        ('{"text": "a", "x": ' + "[" * 200_000, "nested too deeply"),
        ("\ufeff[]", "each line must be a JSON object"),
        ('{"text": "a\0b"}', "it is binary data"),
        ('{"' + "k" * 100_000 + '": 1}', "its keys: k+[.]{3} .100000 characters"),
    ],
    ids=["twice", "digits", "cut", "deep", "list", "nul", "keys"],
)
def test_each_bad_line_is_one_clear_error(tmp_path: Path, line: str, telling: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine", "score": NaN}\n' + line + "\n", "utf-8")
    with pytest.raises(CalibrationError, match=f"bad.jsonl:2: not a document: .*{telling}") as caught:
        load_calibration(str(tmp_path / "bad.jsonl"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """A record can hold no such name; within a folder it does not matter."""
    odd = tmp_path / os.fsdecode(b"caf\xe9.txt")
    try:
        odd.write_text("a text")
    except OSError:
        pytest.skip("this file system has UTF-8 names alone")
    assert load_calibration(str(tmp_path)).documents == ("a text",)
    with pytest.raises(CalibrationError, match=r"caf.udce9.txt': the name is not UTF-8. Rename it"):
        load_calibration(str(odd))


@pytest.mark.parametrize("documents", [0, -1, 10**30])
@pytest.mark.parametrize("name", ["core", "seed", "hf:org/name", "texts.jsonl"])
def test_an_absurd_number_of_documents_is_refused_before_anything_is_read(name: str, documents: int) -> None:
    with pytest.raises(CalibrationError, match=r"^--documents is out of bounds: a calibration has 1 to 1,000,000,000"):
        load_calibration(name, documents)


def test_the_look_for_tables_does_not_walk_a_whole_disk(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    _jsonl(deep / "too-deep.jsonl", [{"text": "x"}])
    with pytest.raises(CalibrationError, match=r"holds no .txt or .md file") as caught:
        load_calibration(str(tmp_path))
    assert "too-deep" not in str(caught.value)
