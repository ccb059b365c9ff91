"""Files within bounds: what is no regular file, too large or not text gives one reason, and never hangs."""

import os
import socket
from pathlib import Path

import pytest
from delta_suite import reading
from delta_suite.reading import UnreadableFileError, parse_toml, read_bytes, read_json, read_text


def refused(path: Path, read=read_text) -> str:
    with pytest.raises(UnreadableFileError) as error:
        read(path)
    assert str(path)[:50] in str(error.value)
    return error.value.why


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    assert refused(pipe) == refused(link) == refused(Path("/dev/zero")) == "not a regular file"
    assert refused(tmp_path) == "a folder, not a file"
    assert refused(tmp_path / "missing") == "No such file or directory"
    assert "null" in refused(Path("a\0b"))
    assert refused(tmp_path / ("x" * 300)) == "File name too long"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert refused(tmp_path / "socket") == "not a regular file"


def test_a_file_of_more_than_the_limit_is_refused_before_it_is_read(tmp_path):
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    assert "1,099,511,627,776 bytes" in refused(large)
    large.write_bytes(b"12345")
    assert read_bytes(large, limit=5) == b"12345"
    assert "5 bytes, and at most 4" in refused(large, lambda path: read_bytes(path, 4))


def test_a_file_that_takes_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "SECONDS", -1.0)
    (tmp_path / "slow").write_text("x")
    assert "took more than" in refused(tmp_path / "slow")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("Größe".encode("utf-16"), "UTF-16"),
        ("a\nGröße".encode("latin-1"), "byte 0xf6 is not UTF-8"),
        (b"\x00\xff", "binary"),
        (b"a\x00b", "binary"),
    ],
)
def test_only_utf_8_is_text(tmp_path, content, why):
    path = tmp_path / "text"
    path.write_bytes(content)
    assert why in refused(path)
    path.write_bytes(b"\xef\xbb\xbfGr\xc3\xb6\xc3\x9fe")
    assert read_text(path) == "Größe"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested too deeply"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e400}', "1e400 is out of bounds"),
        ('{"a": 1' + "0" * 5000 + "}", "5001 digits"),
        ("{", "not JSON"),
    ],
)
def test_json_that_no_reader_can_use_is_refused(tmp_path, text, why):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert why in refused(path, read_json)


@pytest.mark.parametrize(
    ("text", "why"),
    [("a = " + "[" * 100_000, "nested too deeply"), ("a = 1" + "0" * 5000, "not TOML"), ("a =", "not TOML")],
)
def test_toml_that_no_reader_can_use_is_refused(tmp_path, text, why):
    path = tmp_path / "x.toml"
    assert why in refused(path, lambda path: parse_toml(text, path))
