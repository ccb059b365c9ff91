"""Passes of a model over its calibration: from the stream to sinks, spectra and the law, and to losses.

There is one pass where memory holds the whole stream. Otherwise there are more, in the same batches: one over the first
documents for the norms by which sinks are told, one for the spectra of as many layers as moments fit for, and those of
the law. The figures are the same, but for rounding in float64. What attention and MLP write is reduced from the first
pass where memory holds their states beside the whole stream, and otherwise in passes of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from delta_suite.capture.certificate import Certificate, Identity
from delta_suite.capture.residual import Capture, NotApartError
from delta_suite.capture.sinks import Sinks, find_sinks, reference_norms
from delta_suite.capture.stream import MEMORY_SHARE, Memory, ResidualStream, Storage
from delta_suite.capture.tokens import TokenSequences
from delta_suite.capture.units import Units
from delta_suite.capture.writes import SUBLAYERS, Write
from delta_suite.errors import DeviceError
from delta_suite.models.phases import PhaseMap
from delta_suite.process_group import TP, current
from delta_suite.provenance import Clock
from delta_suite.reduction.causal_passes import CausalFit, Runnable, measure_causes, measure_damage
from delta_suite.reduction.lanes import layers_at_once
from delta_suite.reduction.law_fit import LawProgress, measure_law_again, silent
from delta_suite.reduction.law_scores import Law
from delta_suite.reduction.law_sums import Streams
from delta_suite.reduction.losses import Causes, Damage
from delta_suite.reduction.reduce import reduce_stream
from delta_suite.reduction.replicates import LayerSpectra
from delta_suite.reduction.state_statistics import StateLayer
from delta_suite.reduction.states import state_layers, state_streams
from delta_suite.reduction.variants import BLOCK_VARIANTS, WRITE_VARIANTS, Variant

T = TypeVar("T")

LAW, WRITES = "the law was fitted", "the writes of attention and MLP were reduced"
STREAM = "the states were reduced"
CAUSES, DAMAGE = "causes were fitted and the loss was measured", "the loss was measured with blocks left out"
STEPS = {
    LAW: "the law",
    WRITES: "attention and MLP apart",
    STREAM: "the states",
    CAUSES: "causes",
    DAMAGE: "damage",
}
"""Steps whose memory may run out without loss of the others, in words, and what claims are then to be left out."""

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
    writes: dict[str, list[LayerSpectra]] | str | DeviceError | None = None
    """The spectra of what attention and MLP write, by variant; the reason why a model has none; or why they could not
    be measured, although the rest was."""
    states: dict[str, list[StateLayer]] | DeviceError | None = None
    """Figures of the states h_L, by variant; or why they could not be measured, although the rest was."""
    causes: Causes | DeviceError | None = None
    """The losses with updates of phases replaced; or why they could not be measured, although the rest was."""
    damage: Damage | DeviceError | None = None
    """The losses with blocks left out and exchanged; or why they could not be measured."""
    apart: Identity | None = None
    """The identity that attention and MLP are told apart."""

    @property
    def error(self) -> DeviceError | None:
        """Return why a part could not be measured, although the rest was; None where all were."""
        parts = (self.law, self.writes, self.states, self.causes, self.damage)
        return next((part for part in parts if isinstance(part, DeviceError)), None)


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
        *,
        writes: bool = False,
        states: bool = False,
    ) -> None:
        """Plan the batches and shards; `advance` is called with the tokens of the first pass that is whole.

        writes: measure what attention and MLP write, too. states: measure the states themselves, too. Where several
        processes measure together, they can measure neither of these nor the law.
        """
        self.team = current()
        options: dict[str, Any] = {"device": devices[0], "advance": advance, "writes": writes, "team": self.team}
        self.capture = Capture(model, decoder, sequences, **options)
        self._writes, self._states = writes, states
        self.devices, self.clock = list(devices), clock
        dropped = sequences.dropped
        planned = self.capture.planned_tokens
        self.captured = Captured(len(decoder.blocks), sequences.tokens - dropped, dropped, planned, planned)
        self._documents: list[Tensor] = []
        self._entering: list[Bool[Tensor, " tokens"]] = []
        self._norms: Sequence[Tensor] | None = None
        self._law_progress: LawProgress = silent
        self._causal: CausalFit | None = None

    def run(
        self,
        phases: PhaseMap | None,
        *,
        units: Units,
        with_spectra: bool = True,
        causes: PhaseMap | None = None,
        damage: bool = False,
        advance: Advance = lambda tokens: None,
        law_progress: LawProgress = silent,
        release: Callable[[], None] | None = None,
    ) -> Captured:
        """Measure the spectra over these units, if wanted, and the law over these phases, if any.

        causes: the phases in whose blocks the causes of the loss are measured, if they are. damage: measure the loss
        with blocks left out and exchanged. `advance` is called with the tokens of each layer that has been reduced.
        law_progress: shows the fits. release: is called once no forward pass is to come, to make room for the algebra:
        beside the weights of 32B the law took 102 s on an H100, without them 39.
        """
        self._law_progress = law_progress
        self._causal = None if causes is None else CausalFit.of(causes, self.capture.model.dtype)
        captured, clock = self.captured, self.clock
        with torch.no_grad(), clock("analysis"):
            if not self.capture.whole:
                with clock("capture"):
                    self._norms = self._of_all(self.capture.reference_norms())
            streams = self._first(phases, units, None if damage or causes is not None else release)
            if with_spectra:
                self._reduce(streams, units, advance)
            else:
                for stream in streams:
                    self._sinks(stream)
        for inner in {"capture", "law", "writes", "stream", "causal"} & clock.seconds.keys():
            clock.subtract("analysis", inner)
        if self._writes and captured.writes is None:
            with torch.no_grad(), clock("writes"):
                captured.writes = self._or_error(WRITES, self._writes_again, units)
        if not self.capture.whole:
            self._reduce_states(self.capture.updates, units)
            self._fit_law(self.capture.updates, phases, units)
            self._fit_causes(self.capture.updates, units)
        self._losses(units, damage=damage)
        captured.apart = self.capture.apart
        captured.batch_tokens = self.capture.batch_tokens
        self._gather()
        return captured

    def _of_all(self, norms: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the norms of all processes, by state."""
        return [torch.cat(parts) for parts in zip(*self.team.shared(list(norms)), strict=True)]

    def _gather(self) -> None:
        """Take certificates, sinks and places of all processes into the first: of the places, those of the fullest."""
        captured = self.captured
        sinks = [replace(each, dropped=each.dropped[:0]) for each in captured.sinks]
        others = self.team.gathered((captured.certificates, sinks, captured.storage))[1:]
        for certificates, their_sinks, storage in others:
            same_passes = self.team.mode == TP
            captured.certificates += [replace(each, forward_passes=0) if same_passes else each for each in certificates]
            captured.sinks += their_sinks
            captured.storage = max(captured.storage, storage, key=len)

    def _first(
        self, phases: PhaseMap | None, units: Units, release: Callable[[], None] | None
    ) -> Iterator[ResidualStream]:
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
            if release is not None and self.capture.whole and not self._writes_to_come(stream):
                release()
            yield stream  # its sinks are found, and its layers reduced, before the next one is asked for
            if stream.middles:
                with self.clock("writes"):
                    self.captured.writes = self._or_error(WRITES, self._reduced_writes, stream, units)
            if self.capture.whole:
                self._reduce_states(partial(_again, stream), units)
                self._fit_law(partial(_again, stream), phases, units)
                self._fit_causes(partial(_again, stream), units)
            del item, stream  # a shard is large, and the next one is filled now

    def _writes_to_come(self, stream: ResidualStream) -> bool:
        """Return True if what attention and MLP write is measured in passes of its own."""
        return self._writes and not stream.middles and not isinstance(self.capture.sublayers, str)

    def _reduce_states(self, streams: Streams, units: Units) -> None:
        """Measure the states themselves, where they are asked for."""
        if self._states:
            with torch.no_grad(), self.clock("stream"):
                self.captured.states = self._or_error(STREAM, self._reduced_states, streams, units)

    def _fit_law(self, streams: Streams, phases: PhaseMap | None, units: Units) -> None:
        """Fit the law over these phases, if any; and its maps alone where only causes ask for them."""
        causal = self._causal
        if phases is None and (causal is None or not causal.phases):
            return
        with torch.no_grad(), self.clock("law" if phases is not None else "causal"):
            law = self._or_error(
                LAW if phases is not None else CAUSES,
                measure_law_again,
                streams,
                torch.cat(self._entering),
                torch.cat(self._documents),
                phases if phases is not None or causal is None else causal.phases,
                self.devices,
                units=units,
                layers=self.captured.blocks,
                hidden=self.capture.hidden,
                progress=self._law_progress,
                collect=None if causal is None else causal.collect,
                scored=phases is not None,
            )
        if phases is not None:
            self.captured.law = law
        if causal is not None:
            causal.no_law = str(law) if isinstance(law, DeviceError) else law.reason or ""

    def _fit_causes(self, streams: Streams, units: Units) -> None:
        """Fit what stands in place of updates, where causes are measured."""
        if self._causal is None or units.group_count < 2:
            return
        entering, document = torch.cat(self._entering), torch.cat(self._documents)
        with torch.no_grad(), self.clock("causal"):
            failed = self._or_error(CAUSES, self._causal.fit, streams, entering, document, units, self.devices)
        if failed is not None:
            self.captured.causes = failed

    def _losses(self, units: Units, *, damage: bool) -> None:
        """Measure the loss under the interventions that are asked for."""
        captured = self.captured
        if self._causal is not None and captured.causes is None:
            with self.clock("causal"):
                captured.causes = self._or_error(
                    CAUSES, measure_causes, Runnable.of(self.capture), self._causal, units, torch.cat(self._entering)
                )
        if damage:
            with self.clock("damage"):
                captured.damage = self._or_error(DAMAGE, measure_damage, Runnable.of(self.capture), units)

    def _sinks(self, stream: ResidualStream) -> Sinks:
        if self._norms is None and self.team.size > 1:
            self._norms = self._of_all(reference_norms(stream))
        sinks = find_sinks(stream, self._norms)
        self.captured.sinks.append(sinks)
        self._documents.append(stream.document.cpu())
        self._entering.append((stream.kept & ~sinks.dropped).cpu())
        return sinks

    def _reduce(self, streams: Iterator[ResidualStream], units: Units, advance: Advance) -> None:
        """Reduce the layers, in further passes where the moments of several shards do not fit memory."""
        captured, variants = self.captured, list(BLOCK_VARIANTS.values())
        for chosen, memory in self._portions(variants, units, whole=self.capture.whole):
            start = chosen[0]
            spectra = reduce_stream(
                self.capture.updates(chosen) if start else streams,
                layers=captured.blocks,
                tokens=captured.tokens,
                units=units,
                variants=variants,
                devices=self.devices,
                advance=advance,
                sinks=self._known() if start else self._sinks,
                chosen=chosen,
                keep=memory,
                team=self.team,
                tokens_here=self.capture.kept_tokens if self.team.size > 1 else None,
            )
            for name, layers in spectra.items():
                captured.spectra.setdefault(name, []).extend(layers)

    def _portions(
        self, variants: Sequence[Variant], units: Units, *, whole: bool
    ) -> Iterator[tuple[range, Memory | None]]:
        """Yield the layers that are reduced in each pass, and what their moments may take."""
        at_once, memory = self.captured.blocks, None
        if not whole:
            # The stream takes its share first.
            memory = Memory.free(self.devices[0], MEMORY_SHARE * (1 - MEMORY_SHARE))
            memory = Memory.least(self.team.shared(memory))
            at_once = min(at_once, layers_at_once(self.capture.hidden, variants, units, memory))
        for start in range(0, self.captured.blocks, at_once):
            yield range(start, min(start + at_once, self.captured.blocks)), memory

    def _reduced_writes(self, stream: ResidualStream, units: Units) -> dict[str, list[LayerSpectra]]:
        """Return the spectra of what attention and MLP write, from a stream that is whole."""
        spectra: dict[str, list[LayerSpectra]] = {}
        for write in SUBLAYERS:
            spectra |= self._reduced_write([stream.of_write(write)], write, units, range(stream.layers))
        return spectra

    def _writes_again(self, units: Units) -> dict[str, list[LayerSpectra]] | str:
        """Return the same from passes over the batches; or why attention and MLP are not told apart."""
        if isinstance(self.capture.sublayers, str):
            return self.capture.sublayers
        spectra: dict[str, list[LayerSpectra]] = {}
        for write in SUBLAYERS:
            for chosen, memory in self._portions(_variants_of(write), units, whole=False):
                updates = self.capture.updates(chosen, writes=True)
                try:
                    reduced = self._reduced_write(_of_write(updates, write), write, units, chosen, memory)
                except NotApartError as error:
                    return str(error)
                for name, layers in reduced.items():
                    spectra.setdefault(name, []).extend(layers)
        return spectra

    def _reduced_write(
        self,
        streams: Iterable[ResidualStream],
        write: Write,
        units: Units,
        chosen: range,
        memory: Memory | None = None,
    ) -> dict[str, list[LayerSpectra]]:
        """Return the spectra of one write in these layers, under the sinks of the first pass."""
        return reduce_stream(
            streams,
            layers=self.captured.blocks,
            tokens=self.captured.tokens,
            units=units,
            variants=_variants_of(write),
            devices=self.devices,
            sinks=self._known(),
            chosen=chosen,
            keep=memory,
        )

    def _reduced_states(self, streams: Streams, units: Units) -> dict[str, list[StateLayer]]:
        """Return the figures of the states, from a stream that can be had again; layers together where it is read."""
        variants, dropped = list(BLOCK_VARIANTS.values()), torch.cat([shard.dropped for shard in self.captured.sinks])
        states: dict[str, list[StateLayer]] = {}
        for chosen, memory in self._portions(variants, units, whole=self.capture.whole):
            spectra = reduce_stream(
                state_streams(streams(chosen)),
                layers=self.captured.blocks,
                tokens=self.captured.tokens,
                units=units,
                variants=variants,
                devices=self.devices,
                sinks=self._known(),
                chosen=chosen,
                keep=memory,
                directions=False,
            )
            figures = state_layers(
                streams,
                dropped,
                spectra,
                units=units,
                chosen=chosen,
                at_once=1 if self.capture.whole else len(chosen),
                devices=self.devices,
            )
            for name, layers in figures.items():
                states.setdefault(name, []).extend(layers)
        return states

    def _known(self) -> Callable[[ResidualStream], Sinks]:
        """Return a function that gives the sinks of the shards of a pass, one after the other."""
        dropped = torch.cat([shard.dropped for shard in self.captured.sinks])
        start = 0

        def sinks(stream: ResidualStream) -> Sinks:
            nonlocal start
            start += len(stream.document)
            part = dropped[start - len(stream.document) : start]
            return Sinks(part, 0, int(part.sum()), ())

        return sinks

    def _or_error(self, step: str, measure: Callable[..., T], *args: Any, **options: Any) -> T | DeviceError:
        """Return what is measured, or the error that memory for it is not there: the rest is not lost."""
        try:
            return measure(*args, **options)
        except torch.OutOfMemoryError as error:
            return DeviceError(
                f"memory ran out on {self.devices[0]} while {step} ({error}). Use a device with more memory, or leave "
                f"out the claims about {STEPS[step]}."
            )
        except DeviceError as error:
            return error


def _again(stream: ResidualStream, layers: Sequence[int]) -> Iterable[ResidualStream]:
    """Return a stream that is whole, whatever layers are asked for."""
    return [stream]


def _of_write(streams: Iterator[ResidualStream], write: Write) -> Iterator[ResidualStream]:
    """Yield the streams as views of one write, and hold none of them while the next one is filled."""
    for stream in streams:
        yield stream.of_write(write)
        del stream


def _variants_of(write: Write) -> list[Variant]:
    return [variant for variant in WRITE_VARIANTS.values() if variant.write == write]
