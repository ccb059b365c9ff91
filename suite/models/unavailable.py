"""The error of a known model whose weights cannot be had here: what is wrong, and what to do."""

from suite.errors import ModelUnavailableError


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
