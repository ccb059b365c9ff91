"""Gather the text of `deep_training_run.py`: what installed Python packages and Debian packages carry.

    mkdir debs && (cd debs && apt-get download python3.11-doc perl-doc manpages ...)
    python examples/deep_training_text.py --out text.jsonl.xz --debs debs --datasheet examples/deep_training_text.md

Each line of the file is a document: its package, its file, and its text. Of Python packages that is documentation and
source, of Debian packages HTML, manual pages, dictionaries and plain text, without their markup. The datasheet names
every package with its version, its licence and how much of it was taken.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import random
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path

MEGABYTE = 10**6
SHORTEST = 200
"""Characters of a document that is worth taking."""
PARAGRAPH = 100
"""Characters from which a paragraph that was there before is left out, such as the head of a licence."""
LONGEST = 2 * MEGABYTE
"""Bytes of a file; longer ones are tables of data."""
CAP = 3 * MEGABYTE // 2
"""Characters taken of one package, so that no package is most of the text."""
OWN = "delta-suite"
"""Left out: its calibration is what the model is measured on."""
PROSE = {".rst", ".md", ".txt", ".pod", ".html", ".htm", ".xhtml", ".dz"}
CODE = {".py", ".pyi"}
SECTION = re.compile(r"\.[1-9]\w*$")
"""End of the name of a manual page."""


@dataclass
class Package:
    """A package: where its files are, and what of it was taken."""

    name: str
    version: str
    licence: str
    kind: str
    files: list[Path]
    root: Path
    documents: int = 0
    characters: int = 0


class _Words(HTMLParser):
    """The text of an HTML page, without scripts, styles and navigation."""

    LEFT_OUT = frozenset({"script", "style", "nav", "head", "header", "footer"})
    ENDS_LINE = frozenset({"p", "div", "li", "tr", "pre", "h1", "h2", "h3", "h4", "dt", "dd", "table", "br", "section"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Count what is left out, and end a line before a block."""
        self.hidden += tag in self.LEFT_OUT
        if tag in self.ENDS_LINE:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """Count what was left out, and end a line behind a block."""
        self.hidden = max(0, self.hidden - (tag in self.LEFT_OUT))
        if tag in self.ENDS_LINE:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        """Keep text that is shown."""
        if not self.hidden:
            self.parts.append(data)


def html_text(page: str) -> str:
    """Return what a page shows.

    >>> html_text("<head><title>T</title></head><p>One <b>word</b>.</p><script>x()</script>")
    'One word.'
    """
    parser = _Words()
    parser.feed(page)
    parser.close()
    return "".join(parser.parts).strip()


def man_text(page: str) -> str:
    r"""Return a manual page without the commands of roff.

    >>> man_text('.\\" comment\n.SH NAME\nls \\- list\n.B ls\n[\\fIfile\\fP]')
    'NAME\nls - list\nls\n[file]'
    """
    lines = []
    for written in page.splitlines():
        line = written
        if written.startswith((".", "'")):
            command, _, rest = written[1:].partition(" ")
            if command[:2] not in {"SH", "SS", "B", "I", "BR", "IR", "RB", "RI", "BI", "IB", "TP", "IP", "Nm", "Fl"}:
                continue
            line = rest.replace('"', "")
        plain = re.sub(r"\\f(?:\[\w*\]|\(\w\w|\w)", "", line)
        plain = re.sub(r"\\[-&|^/,]", lambda match: "-" if match[0] == r"\-" else "", plain)
        lines.append(plain.replace(r"\e", "\\").replace(r"\(aq", "'").replace(r"\(cq", "'").replace(r"\ ", " "))
    return "\n".join(lines).strip()


def read(path: Path) -> str | None:
    """Return the text of a file, unpacked and without markup; None where it is none."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix in {".gz", ".dz"} else path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError, EOFError):
        return None
    if path.suffix != ".dz" and len(content) > LONGEST:
        return None
    name = path.name.removesuffix(".gz")
    if name.endswith((".html", ".htm", ".xhtml")):
        return html_text(text)
    if SECTION.search(name) and "man" in path.parts[-3:-1][-1]:
        return man_text(text)
    return text


def python_packages() -> list[Package]:
    """Return the standard library and what is installed beside it, documentation before source."""
    library = Path(sysconfig.get_paths()["stdlib"])
    own = [path for path in library.rglob("*.py") if not {"site-packages", "test", "tests"} & set(path.parts)]
    version = sysconfig.get_python_version()
    packages = [Package("python (standard library)", version, "PSF-2.0", "Python", sorted(own), library)]
    for one in metadata.distributions():
        if one.metadata["Name"] == OWN:
            continue
        root = Path(str(one.locate_file("")))
        found = [Path(str(file.locate())) for file in one.files or ()]
        texts = [path for path in found if path.suffix in PROSE | CODE and path.is_file()]
        ordered = sorted(set(texts), key=lambda path: (path.suffix in CODE, str(path)))
        packages.append(Package(one.metadata["Name"], one.version, licence_of(one), "Python", ordered, root))
    return sorted(packages, key=lambda package: package.name.lower())


def licence_of(one: metadata.Distribution) -> str:
    """Return the licence that a distribution names."""
    about = one.metadata
    if expression := about.get("License-Expression"):
        return str(expression)
    kinds = [text.rpartition(" :: ")[2] for text in about.get_all("Classifier") or () if text.startswith("License")]
    return ", ".join(kinds) or (about.get("License") or "not named").splitlines()[0][:60]


def debian_packages(folder: Path, unpacked: Path) -> Iterator[Package]:
    """Unpack the .deb files of a folder, and yield each with its texts."""
    for deb in sorted(folder.glob("*.deb")):
        name, version = subprocess.run(
            ["dpkg-deb", "--show", "--showformat=${Package} ${Version}", deb],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        root = unpacked / name
        subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
        files = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink() and _wanted(path)]
        yield Package(
            name, version, _debian_licence(root / "usr/share/doc" / name / "copyright"), "Debian", files, root
        )


def _wanted(path: Path) -> bool:
    name = path.name.removesuffix(".gz")
    return Path(name).suffix in PROSE or bool(SECTION.search(name))


def _debian_licence(copyright: Path) -> str:
    """Return the short names in the copyright file of a Debian package."""
    if not copyright.is_file():
        return "that of its source package"
    names = re.findall(r"^License: *(\S.*)$", copyright.read_text("utf-8", "replace"), re.MULTILINE)
    return ", ".join(dict.fromkeys(names)) or "in its copyright file, in prose"


@dataclass
class Gathered:
    """The documents so far, and what was seen before."""

    seen: set[bytes] = field(default_factory=set)
    documents: list[dict[str, str]] = field(default_factory=list)

    def take(self, package: Package, cap: int = CAP) -> None:
        """Take a package's files until it has its share. Paragraphs that were there before are left out."""
        files = package.files
        if package.kind == "Debian":
            files = random.Random(package.name).sample(files, len(files))
        for path in files:
            if package.characters >= cap:
                return
            text = self._new(read(path) or "")[: cap - package.characters]
            if len(text) < SHORTEST:
                continue
            name = str(path.relative_to(package.root)) if path.is_relative_to(package.root) else path.name
            self.documents.append({"package": package.name, "file": name, "text": text})
            package.documents += 1
            package.characters += len(text)

    def _new(self, text: str) -> str:
        """Return the text without the long paragraphs that were there before."""
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            if len(paragraph) >= PARAGRAPH:
                key = hashlib.blake2b(" ".join(paragraph.split()).encode("utf-8", "replace"), digest_size=12).digest()
                if key in self.seen:
                    continue
                self.seen.add(key)
            if paragraph.strip():
                kept.append(paragraph.rstrip())
        return "\n\n".join(kept)


def write(path: Path, documents: Sequence[dict[str, str]]) -> str:
    """Write the documents in a fixed random order, and return the SHA-256 of the file."""
    order = random.Random(0).sample(documents, len(documents))
    with lzma.open(path, "wt", encoding="utf-8", preset=1) as file:
        for document in order:
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def datasheet(packages: Sequence[Package], documents: Sequence[dict[str, str]], path: Path, sha256: str) -> str:
    """Return the page that names every package, its version, its licence, and how much of it was taken."""
    size = sum(len(document["text"].encode()) for document in documents)
    rows = [
        f"| {package.name} | {package.version} | {package.licence.replace('|', '/')} | {package.documents} "
        f"| {package.characters:,} |"
        for package in packages
        if package.documents
    ]
    return "\n".join(
        [
            "# The text of the deep training run",
            "",
            "Gathered by `examples/deep_training_text.py` from packages that anyone can install, and not committed. It",
            "trains a model that is measured, and is for nothing else. Each package is under its own licence.",
            "Paragraphs that another file already had are left out; of a package at most",
            f"{CAP:,} characters are taken.",
            "",
            f"{len(documents):,} documents of {len(rows)} packages, {size:,} bytes of text; the file has "
            f"{path.stat().st_size:,} bytes, sha256 `{sha256}`.",
            "",
            "Other versions of the packages give another text. The run trains its own tokenizer on it, and its",
            "`run.json` says how many tokens that makes.",
            "",
            "| package | version | licence | documents | characters |",
            "| --- | --- | --- | ---: | ---: |",
            *rows,
            "",
        ]
    )


def main(words: Sequence[str] | None = None) -> None:
    """Gather, write, and say how much it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the file to write, .jsonl.xz")
    parser.add_argument("--debs", type=Path, help="a folder of .deb files; only Python packages where none is named")
    parser.add_argument("--datasheet", type=Path, help="the page to write, .md")
    parser.add_argument("--cap", type=int, default=CAP, help="characters of one package, at most")
    parser.add_argument("--debian-only", action="store_true", help="leave out what is installed for Python")
    chosen = parser.parse_args(words)
    gathered, packages = Gathered(), [] if chosen.debian_only else python_packages()
    with tempfile.TemporaryDirectory() as unpacked:
        for package in packages:
            gathered.take(package, chosen.cap)
        if chosen.debs is not None:
            for package in debian_packages(chosen.debs, Path(unpacked)):
                gathered.take(package, chosen.cap)
                packages.append(package)
                print(f"{package.name}: {package.documents} documents, {package.characters:,} characters", flush=True)
    sha256 = write(chosen.out, gathered.documents)
    if chosen.datasheet is not None:
        chosen.datasheet.write_text(datasheet(packages, gathered.documents, chosen.out, sha256), "utf-8")
    print(f"{chosen.out}: {len(gathered.documents):,} documents, {chosen.out.stat().st_size:,} bytes, sha256 {sha256}")


if __name__ == "__main__":
    main()
