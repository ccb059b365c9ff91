"""The rules of the house that no linter knows: plain English, short files and functions, no two modules of one name."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import delta_suite
import pytest

PACKAGE = Path(delta_suite.__file__).parent

FORBIDDEN = {"own", "found", "left", "made", "some"}
"""Identifiers that leave out the noun: write layer_rows, matches, remaining_documents, written_files."""

REQUIRED_BY_PYTEST = {("pytest_assertrepr_compare", "left")}
"""Parameters whose names pytest prescribes, with their functions."""

RIDDLE = re.compile(r"(Of|What|Where|Whether|Those|The same)\b")
"""Openings of docstrings that are no sentences: begin with a verb, or with the thing itself."""

LONGEST_FILE = 450
LONGEST_FUNCTION = 80

Function = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    path: Path
    lines: int
    tree: ast.Module

    def at(self, line: int, says: str) -> str:
        """Return a finding as file:line."""
        return f"{self.path.relative_to(PACKAGE.parent)}:{line}: {says}"


@cache
def modules() -> tuple[Module, ...]:
    """Return every file of the package."""
    texts = {path: path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    return tuple(Module(path, len(text.splitlines()), ast.parse(text)) for path, text in texts.items())


def identifiers(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield every name that a file defines, with its line."""
    prescribed = {
        argument
        for node in ast.walk(tree)
        if isinstance(node, Function)
        for argument in node.args.args
        if (node.name, argument.arg) in REQUIRED_BY_PYTEST
    }
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno
            case ast.arg(arg=name) if node not in prescribed:
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node.lineno
            case ast.alias(asname=str(name)) | ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
                yield name, node.lineno
            case ast.MatchStar(name=str(name)):
                yield name, node.lineno


def definitions(body: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the public classes, functions and methods of a module or class; not what functions hold."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body)
        elif isinstance(node, ast.If | ast.Try):
            yield from definitions(node.body)


def is_metric(node: ast.AST) -> bool:
    """Return True for a function whose decorator `metric` states its formula, unit and source."""
    return any(
        isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "metric"
        for decorator in getattr(node, "decorator_list", ())
    )


def docstrings(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the docstrings of a module, its public definitions, and the attributes of modules and public classes."""
    scopes = [tree, *(node for node in definitions(tree.body) if isinstance(node, ast.ClassDef))]
    for node in (tree, *definitions(tree.body)):
        if text := ast.get_docstring(node):
            yield text, node.body[0].lineno
    for scope in scopes:
        for before, node in zip(scope.body, scope.body[1:], strict=False):
            if isinstance(before, ast.Assign | ast.AnnAssign) and isinstance(node, ast.Expr):
                match node.value:
                    case ast.Constant(value=str(text)):
                        yield text, node.lineno


def test_identifiers_name_a_noun() -> None:
    findings = [
        module.at(line, name) for module in modules() for name, line in identifiers(module.tree) if name in FORBIDDEN
    ]
    assert not findings, listed(findings)


def test_no_public_docstring_is_a_fragment() -> None:
    findings = [
        module.at(line, text.splitlines()[0])
        for module in modules()
        for text, line in docstrings(module.tree)
        if RIDDLE.match(text)
    ]
    assert not findings, listed(findings)


def test_everything_public_has_a_docstring() -> None:
    findings = [
        module.at(getattr(node, "lineno", 1), getattr(node, "name", "the module"))
        for module in modules()
        for node in (module.tree, *definitions(module.tree.body))
        if module.tree.body and not ast.get_docstring(node) and not is_metric(node)
    ]
    assert not findings, listed(findings)


def test_files_are_short() -> None:
    findings = [module.at(1, f"{module.lines} lines") for module in modules() if module.lines > LONGEST_FILE]
    assert not findings, listed(findings)


def test_functions_are_short() -> None:
    findings = [
        module.at(node.lineno, f"{node.name}: {length} lines")
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, Function) and (length := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION
    ]
    assert not findings, listed(findings)


def test_no_two_modules_share_a_name() -> None:
    names = Counter(module.path.stem for module in modules() if not module.path.stem.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("own = 1", ["own"]),
        ("def f(found): left.made = 1", ["f", "found", "made"]),
        ("for some in rows: pass", ["some"]),
        ("def pytest_assertrepr_compare(left): pass", ["pytest_assertrepr_compare"]),
        ("import numpy as made", ["made"]),
    ],
)
def test_the_rule_sees_every_kind_of_name(source: str, names: list[str]) -> None:
    assert sorted(name for name, _ in identifiers(ast.parse(source))) == sorted(names)


def listed(findings: list[str]) -> str:
    """Return findings as a message."""
    return f"{len(findings)} findings\n" + "\n".join(findings)
