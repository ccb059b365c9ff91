"""Option texts, defaults and checks that both front doors, `delta-suite` and pytest, share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Literal, get_args

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Dtype of the weights; "auto" is the checkpoint's."""

DTYPES: tuple[str, ...] = get_args(Dtype)
"""The values of `Dtype`."""

DEFAULT_CALIBRATION = "core"
"""Calibration set of a measurement that names none."""

DEFAULT_DEVICE = "auto"
"""Device of a measurement that names none: "auto" chooses the best one of the machine."""

DEFAULT_RESULTS = "results"
"""Folder of records if none is named."""

MOST_DOCUMENTS = 10**9
"""Largest number that `--documents` takes."""

HELP = {
    "model": "a name from models.toml, name@revision, a directory, a .gguf file, or a hub id; with @random-weights "
    "behind it, its architecture with freshly initialised weights",
    "models-file": "models.toml to use (default: ./models.toml, else the one that ships with delta-suite)",
    "calibration": "calibration set: core, seed (the reference's one stream, without intervals), a text file, .jsonl, "
    ".parquet, a folder of texts, or hf:org/name[/config][:split[:column]]",
    "documents": "only the first so many documents of the calibration (default: all; of a hub dataset 128)",
    "chat-template": "put each document, as a user's message, into the model's own chat template (default: add the "
    "special tokens that its tokenizer adds)",
    "device": "auto, cpu, cuda, cuda:1, mps, or sharded over all GPUs",
    "dtype": f"dtype of the weights: {', '.join(DTYPES)} (default: the model's)",
    "results-dir": "where records are written",
    "fresh": "measure again, whatever the cache holds",
}
"""Help texts of the options that both front doors have."""

DOCUMENTS_OUT_OF_BOUNDS = (
    f"--documents is out of bounds: a calibration has 1 to {MOST_DOCUMENTS:,} documents. Without the option all of "
    "them run."
)
"""The message about a number of documents that cannot be."""

EMPTY_VALUE = "is empty: is a shell variable not set? Give it a value, or leave it out."
"""The end of the message about an option or argument without a value."""


def empty_options(words: Iterable[str]) -> Iterator[str]:
    """Yield the options of a command line whose value is empty, and "" for an empty argument.

    A shell produces them from a variable that is not set; as a path an empty word would be the current folder.

    Example:
        >>> list(empty_options(["--model=", "--device", "", "a"]))
        ['--model', '--device']
    """
    for before, word in pairwise(["", *words]):
        if word.startswith("--") and word.endswith("="):
            yield word.removesuffix("=")
        elif not word:
            yield before if before.startswith("--") else ""
