"""One number of a record: its value, its interval, or the reason why there is none."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_serializer

ONE_DOCUMENT = "needs two halves of documents; the calibration is one document"
"""The reason of every held-out figure where there is one document."""


class Estimate(BaseModel):
    """One number of a record. `value` is null only with a `reason`; NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="forbid")

    value: float | None
    sd: float | None = None
    """Standard deviation over tokens (divisor n), where the value is a mean over tokens."""
    reason: str | None = None
    """The reason why there is no value."""
    corrected: float | None = None
    """The value less its estimated bias: the centre of the interval."""
    interval: tuple[float, float] | None = None
    """The interval at `intervals.CONFIDENCE`; absent where the calibration is one document."""
    interval_documents: tuple[float, float] | None = None
    """The interval with documents as the unit, where the unit of `interval` is the domain: the narrower question, on
    other documents of these domains."""
    replicates: tuple[float, ...] | None = Field(default=None, exclude=True)
    """The values without each group of units in turn, from which intervals are computed.

    They are kept in the arrays beside a record, not in its JSON.
    """
    replicates_documents: tuple[float, ...] | None = Field(default=None, exclude=True)
    """The values without each group of documents in turn, where the unit is another."""
    per_layer: dict[int, float | None] | None = None
    """The number that each layer of a phase contributes to the phase's value."""
    detail: dict[str, Any] | None = None
    """Figures that the value is read against, such as a noise edge."""

    @property
    def best(self) -> float | None:
        """The value without its bias where that is known, on which claims are judged.

        Example:
            >>> Estimate(value=2.0, corrected=1.9).best
            1.9
        """
        return self.value if self.corrected is None else self.corrected

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: Any) -> dict[str, Any]:
        return {key: item for key, item in handler(self).items() if item is not None or key == "value"}


class ValueAlone(NamedTuple):
    """A value that stands for an estimate among many replicates, of which nothing else is asked."""

    value: float | None


def absent(reason: str) -> Estimate:
    """Return an estimate without a value, with the reason.

    Example:
        >>> absent("one layer has no pairs").reason
        'one layer has no pairs'
    """
    return Estimate(value=None, reason=reason)
