"""The lines of keys in TOML documents, against a writer that notes them while it writes."""

from __future__ import annotations

import tomllib
from typing import Any

from delta_suite.toml_lines import key_lines, line_of
from hypothesis import given, settings
from hypothesis import strategies as st

VALUES = [
    "1",
    "-2.5e3",
    "true",
    "1979-05-27 07:32:00",
    '"[[expect]] # no comment"',
    r'"a \" = b \\"',
    "'[a] = \"'",
    "'\\'",
    '""',
    '""""""',
    '"""\n[[expect]]\nid = 1 \\""" \\\n  """',
    '"""two quotes end here"""""',
    "'''\n[expect]\n# \\ it's\n'''",
    "'''two quotes end here'''''",
]
NOISE = ["", "", "  ", '# [[expect]] = """', "\t# '''"]
NAMES = ["id", "expect", "than", "a-b", "3", "x_y", "two words", "dot.ted", "#", "[[a]]", 'quo"te', "é", ""]


class Writer:
    """A writer of random TOML documents, which notes the line of everything that it writes."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.text = ""
        self.lines: dict[tuple[str | int, ...], int] = {}

    def pick(self, options: list[Any]) -> Any:
        return self.data.draw(st.sampled_from(options))

    def put(self, text: str) -> None:
        self.text += text

    def line(self) -> int:
        return self.text.count("\n") + 1

    def note(self, *loc: str | int) -> None:
        self.lines.setdefault(loc, self.line())

    def blank(self) -> None:
        self.put(self.pick(["", " ", "\t"]))

    def gap(self) -> None:
        """Write what may stand between the items of an array, line ends and comments included."""
        self.put(self.pick(["", " ", "\n", ' # ], [ "\n ', "\n\n\t"]))

    def end_line(self) -> None:
        self.put(self.pick(["", " ", '  # it\'s "done"']) + "\n")
        for noise in self.data.draw(st.lists(st.sampled_from(NOISE), max_size=2)):
            self.put(noise + "\n")

    def key(self, *names: str) -> None:
        for index, name in enumerate(names):
            if index:
                self.blank()
                self.put(".")
                self.blank()
            forms = ['"' + "".join(f"\\u{ord(letter):04x}" for letter in name) + '"', f"'{name}'"]
            if name.replace("-", "").replace("_", "").isalnum() and name.isascii():
                forms += [name, name]
            self.put(self.pick(forms))
        self.blank()

    def value(self, *loc: str | int, depth: int = 0) -> None:
        kind = self.pick(["plain", "plain", "array", "inline table"] if depth < 2 else ["plain"])
        if kind == "plain":
            self.put(self.pick(VALUES))
        elif kind == "array":
            count = self.pick([0, 1, 2, 3])
            self.put("[")
            self.gap()
            for index in range(count):
                self.note(*loc, index)
                self.value(*loc, index, depth=depth + 1)
                self.gap()
                self.put("," if index < count - 1 else self.pick(["", ","]))
                self.gap()
            self.put("]")
        else:
            self.put("{")
            for index, name in enumerate(self.names()):
                self.put("," if index else "")
                self.blank()
                self.pair(*loc, name=name, depth=depth + 1)
                self.blank()
            self.put("}")

    def pair(self, *loc: str | int, name: str, depth: int = 0) -> None:
        names = (name, *self.pick([(), (), ("in",), ("in", "in")]))
        for end in range(1, len(names) + 1):
            self.note(*loc, *names[:end])
        self.key(*names)
        self.put("=")
        self.blank()
        self.value(*loc, *names, depth=depth)

    def names(self) -> list[str]:
        names: list[str] = self.data.draw(st.lists(st.sampled_from(NAMES), max_size=3, unique=True))
        return names

    def pairs(self, *loc: str | int) -> None:
        for name in self.names():
            self.blank()
            self.pair(*loc, name=name)
            self.end_line()

    def header(self, opening: str, *names: str) -> None:
        self.blank()
        self.put(opening)
        self.blank()
        self.key(*names)
        self.put(opening.replace("[", "]"))
        self.end_line()

    def document(self) -> str:
        self.pairs()
        for top in self.data.draw(st.lists(st.sampled_from(["t1", "t2", "t 3"]), max_size=2, unique=True)):
            self.note(top)
            if self.pick([True, False]):
                self.table("[", (top,), (top,))
                continue
            for index in range(self.pick([1, 2, 3])):
                self.table("[[", (top,), (top, index))
        return self.text

    def table(self, opening: str, names: tuple[str, ...], loc: tuple[str | int, ...]) -> None:
        """Write a table, and below it a table and an array of tables."""
        self.note(*loc)
        self.header(opening, *names)
        self.pairs(*loc)
        if self.pick([True, False]):
            self.note(*loc, "implied")
            self.note(*loc, "implied", "sub")
            self.header("[", *names, "implied", "sub")
            self.pairs(*loc, "implied", "sub")
        for index in range(self.pick([0, 1, 2])):
            self.note(*loc, "items")
            self.note(*loc, "items", index)
            self.header("[[", *names, "items")
            self.pairs(*loc, "items", index)


def places(value: Any, loc: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    """Return the place of everything in a parsed document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {loc}.union(*(places(item, (*loc, key)) for key, item in inside))


@settings(deadline=None)
@given(st.data())
def test_the_line_of_everything_in_a_document(data: st.DataObject) -> None:
    writer = Writer(data)
    text = writer.document()
    assert places(tomllib.loads(text)) - {()} == set(writer.lines)
    assert key_lines(text) == writer.lines
    assert key_lines(text.replace("\n", "\r\n")) == writer.lines


def test_a_header_after_a_table_that_implied_it() -> None:
    assert key_lines("[a.b]\n\n[a]\n") == {("a", "b"): 1, ("a",): 3}


def test_a_missing_key_has_the_line_of_the_table_around_it() -> None:
    lines = key_lines("\n[a]\nb = 1\n\n[[c]]\nd = 1\n[[c]]\ne = 1\n")
    assert line_of(lines, ("a", "b")) == 3
    assert line_of(lines, ("a", "missing", 0)) == 2
    assert line_of(lines, ("c", 1, "missing")) == 7
    assert line_of(lines, ("missing",)) == 1
