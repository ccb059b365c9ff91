"""Errors that a user can cause or must act on. Each message says what is wrong, where, and what to do next."""

from __future__ import annotations

import os
import traceback
from pathlib import Path


class SuiteError(Exception):
    """Base class of every error whose message is meant for the user, who sees it without a traceback."""


class OptionError(SuiteError):
    """Error for a value that an option does not have, such as `--device gpu`."""


class UnknownNameError(OptionError, ValueError):
    """Error for a metric, variant or aggregate that does not exist."""


class MissingPackageError(SuiteError, ImportError):
    """Error for a package that is not installed, and that only some of delta-suite needs."""


class OutputError(SuiteError):
    """Error for an output that takes no more: a full disk behind `>`, a pipe whose reader has gone."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"the output cannot be written: {error.strerror}. Files that were written before it are kept.")


class UnknownModelError(SuiteError):
    """Error for a `--model` argument that is no entry of the models file, no path on the disk and no hub id."""


class ModelUnavailableError(SuiteError):
    """Error for a known model that cannot be loaded here: a package, file, permission or the network is missing."""


class DeviceError(SuiteError):
    """Error for a device that this machine lacks, or that is too small for the model."""


class ModelsFileError(SuiteError):
    """Error for a models.toml that is missing, is not TOML, or has unknown or wrong entries."""


class CalibrationError(SuiteError):
    """Error for a calibration set that is unknown, empty, unreadable, or too short for the model."""


class CaptureError(SuiteError):
    """Error for a model whose residual stream cannot be captured.

    Its blocks are not found, or their output is not of shape (batch, time, hidden).
    """


class CertificateError(SuiteError):
    """Error for a capture that breaks an identity of the certificate; the message names identity and layer."""


class HypothesisFileError(SuiteError):
    """Error for wrong hypothesis files; the message lists every error with file and line."""


class RecordError(SuiteError):
    """Error for a stored record or cache entry that cannot be read or written."""


class BaselineError(SuiteError):
    """Error for a baseline that is missing, damaged, of another model, or replaced without a reason."""


class EngineError(SuiteError):
    """Error for workers that cannot be reached, do not fit together, or are lost again and again."""


class WorkerError(SuiteError):
    """Error that a worker has explained already, as its traceback stays there."""


class UnavailableError(ModelUnavailableError):
    """Error that keeps the problem with a model and its cure apart, so that lists of models can show them in columns.

    The message does not name the model: the caller shows the name next to it.

    Example:
        >>> print(UnavailableError("tiny", "no directory tiny", "Correct `path`."))
        no directory tiny.
          Correct `path`.
    """

    def __init__(self, model: str, what: str, do: str) -> None:
        """Make the error from the model's name, the problem in a few words, and the cure as a sentence."""
        # All three go to the base class, so that the error survives pickling between processes.
        super().__init__(model, what, do)
        self.model, self.what, self.do = model, what, do

    def __str__(self) -> str:
        """Return the problem, and the cure on a line below it."""
        return f"{self.what}.\n  {self.do}"


class IncompleteError(UnavailableError):
    """Error for a model of which a file is missing, so that a download may help; for a damaged file it would not."""


def first_line(error: BaseException) -> str:
    """Return the first line of the message of another library's error, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300].removesuffix(".") if lines else type(error).__name__


def brief(error: BaseException) -> str:
    """Return the type and the first line of another library's error, and the second line if the first announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {text[:300].removesuffix('.')}"


def is_foreseen(error: BaseException) -> bool:
    """Return True for an error that explains itself: its message is enough, and its traceback tells no user more."""
    return isinstance(error, SuiteError | MemoryError) or (isinstance(error, OSError) and error.errno is not None)


def explain(error: BaseException, while_doing: str) -> str:
    """Return the message for an error that ended something.

    A SuiteError brings its own. Errors of the operating system and a lack of memory are named as such. Anything else is
    a defect of delta-suite: an internal error, with its place in the code. Where the environment sets
    DELTA_SUITE_TRACEBACK, its whole traceback comes first.

    Example:
        >>> explain(FileExistsError(17, "File exists", "results"), "measuring tiny")
        'results: File exists.'
        >>> explain(ZeroDivisionError("division by zero"), "measuring tiny").splitlines()[0]
        'Internal error while measuring tiny: ZeroDivisionError: division by zero; please report it.'
    """
    if isinstance(error, SuiteError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
        return f"{place}{error.strerror or error}."
    if isinstance(error, MemoryError):
        return f"not enough memory while {while_doing}."
    what = " ".join("".join(traceback.format_exception_only(error)).split())
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    message = f"Internal error while {while_doing}: {what}{place}; please report it."
    if os.environ.get("DELTA_SUITE_TRACEBACK"):
        return f"{''.join(traceback.format_exception(error))}{message}"
    return f"{message}\n  DELTA_SUITE_TRACEBACK=1 shows the whole traceback, and `delta-suite doctor` the versions."


def why_not_measured(model: str, error: BaseException) -> str:
    """Return the message for an error that kept a model from being measured."""
    told = explain(error, f"measuring {model}")
    return f"{model} cannot be measured: {told}" if is_foreseen(error) else told
