"""Words as a user writes them: any can be a path, also where the system can make nothing of it."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

LONGEST_QUOTED = 200
"""Characters of a user's word that a message repeats: whoever passes a text where its path belongs passes thousands."""


def expanded(written: str | Path) -> Path:
    """With the home folder in place of `~`; `~name` of no user of this machine is left as it is."""
    path = Path(written)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def unseen(path: Path) -> str | None:
    """Why nothing is to be had at a path, in the system's words; None where something is.

    `Path.exists` tells no reason, and before Python 3.14 raises for some: too long a name, a folder without permission.
    """
    try:
        path.stat()
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # such as "embedded null byte"
        return str(error)
    return None


def is_folder(path: Path) -> bool:
    """Whether a folder is to be had there."""
    return unseen(path) is None and path.is_dir()


def quoted(word: str | Path) -> str:
    """A user's word in a message, cut where it is long."""
    text = str(word)
    return text if len(text) <= LONGEST_QUOTED else f"{text[:LONGEST_QUOTED]}... ({len(text)} characters)"


def left_empty(words: Iterable[str]) -> Iterator[str]:
    """The options of a command line whose value is an empty word, "" for an argument that is one.

    A shell makes them of a variable that is not set; as a path an empty word would be the current folder.
    """
    for before, word in pairwise(["", *words]):
        if word.startswith("--") and word.endswith("="):
            yield word.removesuffix("=")
        elif not word:
            yield before if before.startswith("--") else ""


EMPTY = "is empty: is a shell variable not set? Give it a value, or leave it out."
"""What the front doors say of an option or argument that is left empty."""
