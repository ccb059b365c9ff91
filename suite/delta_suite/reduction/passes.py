"""Passes of a model over its calibration: from the stream to sinks, spectra and the law.

There is one pass where memory holds the whole stream. Otherwise there are more, in the same batches: one over the first
documents for the norms by which sinks are told, one for the spectra of as many layers as moments fit for, and those of
the law. The figures are the same, but for rounding in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from delta_suite.capture.certificate import Certificate
from delta_suite.capture.residual import Capture
from delta_suite.capture.sinks import Sinks, find_sinks
from delta_suite.capture.stream import MEMORY_SHARE, Memory, ResidualStream, Storage
from delta_suite.capture.tokens import TokenSequences
from delta_suite.capture.units import Units
from delta_suite.errors import DeviceError
from delta_suite.models.phases import PhaseMap
from delta_suite.provenance import Clock
from delta_suite.reduction.lanes import layers_at_once
from delta_suite.reduction.law_fit import LawProgress, measure_law, measure_law_again, silent
from delta_suite.reduction.law_scores import Law
from delta_suite.reduction.reduce import reduce_stream
from delta_suite.reduction.replicates import LayerSpectra
from delta_suite.reduction.variants import VARIANTS

Advance = Callable[[int], object]
"""Function that is called with a number of tokens that are done."""


@dataclass
class Captured:
    """Results of the passes over a calibration."""

    blocks: int
    tokens: int
    dropped: int
    planned_tokens: int
    """Largest number of padded tokens of a batch, as planned."""
    batch_tokens: int
    """Largest number of them as run: less where memory ran out."""
    certificates: list[Certificate] = field(default_factory=list)
    storage: list[tuple[Storage, int]] = field(default_factory=list)
    """Place of each shard, and its bytes."""
    sinks: list[Sinks] = field(default_factory=list)
    spectra: dict[str, list[LayerSpectra]] = field(default_factory=dict)
    law: Law | DeviceError | None = None
    """The law; or why it could not be measured, although the rest was."""


class Passes:
    """The passes of one model over one calibration."""

    def __init__(
        self,
        model: Any,
        decoder: Any,
        sequences: TokenSequences,
        devices: Sequence[torch.device],
        clock: Clock,
        advance: Advance = lambda tokens: None,
    ) -> None:
        """Plan the batches and shards; `advance` is called with the tokens of the first pass that is whole."""
        self.capture = Capture(model, decoder, sequences, device=devices[0], advance=advance)
        self.devices, self.clock = list(devices), clock
        dropped = sum(first and sequences.drop_first_token for first in sequences.starts_document)
        planned = self.capture.planned_tokens
        self.captured = Captured(len(decoder.blocks), sequences.tokens - dropped, dropped, planned, planned)
        self._documents: list[Tensor] = []
        self._entering: list[Bool[Tensor, " tokens"]] = []
        self._norms: Sequence[Tensor] | None = None
        self._law_progress: LawProgress = silent

    def run(
        self,
        phases: PhaseMap | None,
        *,
        units: Units,
        with_spectra: bool = True,
        advance: Advance = lambda tokens: None,
        law_progress: LawProgress = silent,
    ) -> Captured:
        """Measure the spectra over these units, if wanted, and the law over these phases, if any.

        `advance` is called with the tokens of each layer that has been reduced. law_progress: shows the fits.
        """
        self._law_progress = law_progress
        captured, clock = self.captured, self.clock
        with torch.no_grad(), clock("analysis"):
            if not self.capture.whole:
                with clock("capture"):
                    self._norms = self.capture.reference_norms()
            streams = self._first(phases, units)
            if with_spectra:
                self._reduce(streams, units, advance)
            else:
                for stream in streams:
                    self._sinks(stream)
        clock.subtract("analysis", "capture")
        if "law" in clock.seconds:
            clock.subtract("analysis", "law")
        if phases is not None and not self.capture.whole:
            with torch.no_grad(), clock("law"):
                captured.law = self._law(
                    measure_law_again,
                    self.capture.updates,
                    torch.cat(self._entering),
                    torch.cat(self._documents),
                    phases,
                    self.devices,
                    units=units,
                    layers=captured.blocks,
                    hidden=self.capture.hidden,
                )
        captured.batch_tokens = self.capture.batch_tokens
        return captured

    def _first(self, phases: PhaseMap | None, units: Units) -> Iterator[ResidualStream]:
        """Yield the shards of the first pass; the law is fitted on a whole stream once its layers are reduced."""
        shards = self.capture.shards()
        while True:
            with self.clock("capture"):
                item = next(shards, None)
            if item is None:
                return
            stream, certificate = item
            self.captured.certificates.append(certificate)
            self.captured.storage.append((stream.storage, stream.nbytes))
            yield stream  # its sinks are found, and its layers reduced, before the next one is asked for
            if phases is not None and self.capture.whole:
                with self.clock("law"):
                    sinks = self.captured.sinks[-1]
                    self.captured.law = self._law(measure_law, stream, phases, self.devices, units=units, sinks=sinks)
            del item, stream  # a shard is large, and the next one is filled now

    def _sinks(self, stream: ResidualStream) -> Sinks:
        sinks = find_sinks(stream, self._norms)
        self.captured.sinks.append(sinks)
        self._documents.append(stream.document.cpu())
        self._entering.append((stream.kept & ~sinks.dropped).cpu())
        return sinks

    def _reduce(self, streams: Iterator[ResidualStream], units: Units, advance: Advance) -> None:
        """Reduce the layers, in further passes where the moments of several shards do not fit memory."""
        captured, variants, device = self.captured, list(VARIANTS.values()), self.devices[0]
        at_once, memory = captured.blocks, None
        if not self.capture.whole:
            memory = Memory.free(device, MEMORY_SHARE * (1 - MEMORY_SHARE))  # the stream takes its share first
            at_once = min(at_once, layers_at_once(self.capture.hidden, variants, units, memory))
        for start in range(0, captured.blocks, at_once):
            chosen = range(start, min(start + at_once, captured.blocks))
            spectra = reduce_stream(
                self.capture.updates(chosen) if start else streams,
                layers=captured.blocks,
                tokens=captured.tokens,
                units=units,
                variants=variants,
                devices=self.devices,
                advance=advance,
                sinks=_known(torch.cat([shard.dropped for shard in captured.sinks])) if start else self._sinks,
                chosen=chosen,
                keep=memory,
            )
            for name, layers in spectra.items():
                captured.spectra.setdefault(name, []).extend(layers)

    def _law(self, measure: Callable[..., Law], *args: Any, **options: Any) -> Law | DeviceError:
        """Return the law, or the error that memory for it is not there: what was measured before is not lost."""
        try:
            return measure(*args, **options, progress=self._law_progress)
        except torch.OutOfMemoryError as error:
            return DeviceError(
                f"memory ran out on {self.devices[0]} while the law was fitted ({error}). Use a device with more "
                f"memory, or leave out the claims about the law."
            )
        except DeviceError as error:
            return error


def _known(dropped: Bool[Tensor, " tokens"]) -> Callable[[ResidualStream], Sinks]:
    """Return a function that gives the sinks of the shards of a pass, one after the other."""
    start = 0

    def sinks(stream: ResidualStream) -> Sinks:
        nonlocal start
        start += len(stream.document)
        part = dropped[start - len(stream.document) : start]
        return Sinks(part, 0, int(part.sum()), ())

    return sinks
