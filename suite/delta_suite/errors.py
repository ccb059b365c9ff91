"""The errors a user can cause or must act on. Each message says what was wrong, where, and what to do next."""


class SuiteError(Exception):
    """Base of every error whose message is meant for the user: shown without a traceback."""


class UnknownModelError(SuiteError):
    """No model of this name in the models file, on the disk, or shaped like a hub id."""


class ModelUnavailableError(SuiteError):
    """The model is known, but its weights cannot be had here: missing package, file, access or network."""


class DeviceError(SuiteError):
    """The device asked for, or the one the model requires, is not on this machine."""


class ModelsFileError(SuiteError):
    """models.toml does not parse or holds unknown or wrong entries."""


class CalibrationError(SuiteError):
    """A calibration set is unknown, empty, unreadable, or too short for this model."""


class CaptureError(SuiteError):
    """The residual stream cannot be captured: blocks not found, or of a shape that is not (batch, time, hidden)."""


class CertificateError(SuiteError):
    """An identity that proves the tap right does not hold; the message names the identity and the layer."""


class HypothesisFileError(SuiteError):
    """A hypothesis file is wrong; the message lists every error with file and line."""


class RecordError(SuiteError):
    """A stored record or cache entry cannot be read or written."""


class BaselineError(SuiteError):
    """A baseline is missing, damaged, of another model, or would be overwritten without a reason."""


class UnavailableError(ModelUnavailableError):
    """`what` is wrong with `model`, in a few words for lists of models; `do` is the way out.

    The message leaves the name to who shows it, next to the other models.
    """

    def __init__(self, model: str, what: str, do: str) -> None:
        # All three go to the base class, so that the error survives pickling between processes.
        super().__init__(model, what, do)
        self.model, self.what, self.do = model, what, do

    def __str__(self) -> str:
        """The message a user sees: what is wrong, and what to do on a line of its own."""
        return f"{self.what}.\n  {self.do}"


class IncompleteError(UnavailableError):
    """A file is not there, which a download may mend (a damaged file it would not)."""
