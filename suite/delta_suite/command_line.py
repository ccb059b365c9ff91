"""Option texts, defaults, checks and exit codes that both front doors, `delta-suite` and pytest, share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from enum import IntEnum
from itertools import pairwise
from typing import Literal, get_args

from delta_suite.errors import OptionError
from delta_suite.paths import shorten


class ExitCode(IntEnum):
    """How a command of `delta-suite` ended. 0, 1 and 3 mean the same of pytest, which exits with 4 for USAGE."""

    OK = 0
    FAILED = 1
    USAGE = 2
    INTERNAL = 3
    INTERRUPTED = 130


EXIT_CODES = {
    ExitCode.OK: "all that was asked for is done, and no claim is refuted",
    ExitCode.FAILED: "a claim is refuted, a file is stale, or something cannot be measured, read or written",
    ExitCode.USAGE: "no such command, option, or value of an option",
    ExitCode.INTERNAL: "the command ended by an internal error, which to report",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C",
}
"""The meaning of each exit code, in words."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Dtype of the weights; "auto" is the checkpoint's."""

DTYPES: tuple[str, ...] = get_args(Dtype)
"""The values of `Dtype`."""

DEFAULT_PARTS = ("spectra", "boundaries", "law")
"""The parts that are measured where none is named."""

PARTS = (*DEFAULT_PARTS, "writes", "stream", "causal", "damage")
"""The parts that a measurement may have. `writes` is attention and MLP apart; spectra then take 2.3 times as long.
`stream` is the states themselves: one more eigenproblem for each layer and variant, and three least squares fits.
`causal` and `damage` run the model again with its updates changed; on a CPU each takes several times the capture."""

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
    "calibration": "calibration set: core, core-english, seed (the reference's one stream, without intervals), a text "
    "file, .jsonl, .parquet, a folder of texts, or hf:org/name[/config][:split[:column]]",
    "documents": "only the first so many documents of the calibration (default: all; of a hub dataset 128)",
    "chat-template": "put each document, as a user's message, into the model's own chat template (default: add the "
    "special tokens that its tokenizer adds)",
    "device": "auto, cpu, cuda, cuda:1, mps, or sharded over all GPUs of this machine; fsdp or tp under torchrun",
    "dtype": f"dtype of the weights: {', '.join(DTYPES)} (default: the model's)",
    "results-dir": "where records are written",
    "fresh": "measure again, whatever the cache holds",
    "shard": "i/n, with i from 0 to n - 1: measure only the items k of the list with k mod n = i, as one of n jobs "
    "that know nothing of each other",
}
"""Help texts of the options that both front doors have."""

DOCUMENTS_OUT_OF_BOUNDS = (
    f"--documents is out of bounds: a calibration has 1 to {MOST_DOCUMENTS:,} documents. Without the option all of "
    "them run."
)
"""The message about a number of documents that cannot be."""

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,4})?|sharded|fsdp|tp")

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


def check_settings(device: str, dtype: str | None, documents: int | None) -> None:
    """Refuse a device, a dtype and a number of documents that no machine and no calibration has.

    Raises:
        OptionError: the first of them that does not exist, with those that do.
    """
    if not (isinstance(device, str) and _DEVICE.fullmatch(device)):
        known = "auto, cpu, mps, cuda, cuda:1 and so on, sharded, fsdp or tp"
        raise OptionError(f"--device {shorten(repr(device))} is unknown: use {known}.")
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"--dtype {shorten(repr(dtype))} is unknown: use {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")
    if documents is not None and not (isinstance(documents, int) and 1 <= documents <= MOST_DOCUMENTS):
        raise OptionError(DOCUMENTS_OUT_OF_BOUNDS)
