"""Fit of the update law: does one map of the stream, shared by the layers of a phase, predict their updates?

    h_{L+1} = h_L + T_shared(h_L) + gamma_L v_L f(...)

For a layer, x is h_L / rms(h_L) (or h_L) and delta its update. Both are taken less their mean over the training
documents, so each layer has a separate offset on every rung, and the ladder begins at the training mean. How much of
that mean the layers share is asked below it, where R^2 is over an update of zero. Rows are those of `sink_free`, as
massive rows would decide every least-squares fit. Half a of the units (capture/units.py) trains and
half b tests, then the other way round.

A = sum x x^T, B = sum delta x^T, D = sum delta delta^T over n training tokens; mu is in multiples of the mean
eigenvalue of A.

    own mean        mu_L, the mean of delta itself
    shared mean     c m^(-L), m^(-L) = sum mu_M / e_M over the phase's other layers, e_M^2 the mean of ||delta_M||^2;
                    with the c that brings it nearest to mu_L
    own map         T_L = (B/n) (A/n + mu I)^-1, fitted on layer L alone
    shared map      T^(-L) = (sum B_M/(n g_M)) (sum A_M/n + mu I)^-1 over the phase's other layers M, g_M^2 = tr D_M/n
    gain            c_L = tr(T B_L^T) / tr(T A_L T^T) with T = T^(-L); for the rung c_L h with T = I
    residual        R_L = D - c (T B^T + B T^T) + c^2 T A T^T; v_L is its top eigenvector
    rank one        c_L T^(-L) + v_L w^T, w = (A/n + mu I)^-1 (B/n - c T A/n)^T v_L: f(...) as far as it is linear in x
    held-out error  SSE(T) = tr D - 2 tr(T B^T) + tr(T A T^T) over the test tokens; R^2 = 1 - SSE(T) / SSE(their mean
                    in training)

Intervals come from deleting a group of units from both training and test and fitting the maps and v_L again, with
the same basis and mu. So they cover what these maps would reach with unlimited text and the same mu. That differs a
little from mu = 0: a shared map is no optimum of the layer on which it is scored, so its R^2 changes with mu to first
order, and the ratios show it where R^2(own) - R^2(shared) is small.

Least squares in d dimensions wants 10 d tokens in the training fold. With fewer, x is projected on the first k = n/10
principal components of its training fold, and delta on k of its own; the energy of delta outside counts as unexplained
on every rung but c_L h.

Memory. For L layers in k dimensions the sums of 10 groups of units and 2 folds are 36 L matrices of k x k in
float64, and the maps of one fit 6 L: 42 * 8 * L * k^2 bytes, once for each basis (two where k < d, one fold after the
other where memory is short). They lie on the device, else in host memory, else in memory-mapped files. Where none of
these holds them, the layers of one phase at a time are summed and fitted, and pairs of parts of the model for the
transfer between phases, each with a pass over the stream. Beside them the device holds WORKSPACE_MATRICES k x k
matrices for each layer of a portion (at most WORKSPACE_BYTES, or one layer), the rows of one block of tokens of one
layer, and while a basis is sought 12 matrices of d x d. GiB of one basis:

    L x d     k = 859 (`core`)     k = d
    30 x 576  (k = d)              3.1
    24 x 896  5.5                  6.0
    64 x 5120 14.8                 525
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from delta_suite.capture.sinks import Sinks, find_sinks
from delta_suite.capture.stream import Memory, ResidualStream
from delta_suite.capture.units import Units
from delta_suite.models.phases import PhaseMap
from delta_suite.progress import no_progress
from delta_suite.reduction.gram import algebra_device, signed
from delta_suite.reduction.law_maps import RIDGE_LAYERS, Fit, Scores, choose_ridge
from delta_suite.reduction.law_memory import Plan, Portion, law_bytes, plan_law
from delta_suite.reduction.law_scores import CONSTANTS, RUNGS, Law
from delta_suite.reduction.law_sums import (
    FOLDS,
    GROUPS,
    ORDER,
    Basis,
    Home,
    Maps,
    Streams,
    Sums,
    Walk,
    fold_bases,
    sum_groups,
    walk_rows,
)

TOKENS_PER_DIMENSION = 10
"""Training tokens per dimension of x that least squares needs: its held-out error is then 1.1 times the noise."""

FEWEST_COMPONENTS = 16
"""Fewest principal components to fit in: with tokens for fewer, the maps say nothing about the stream."""


FITS_OF_FOLD = 1 + GROUPS // 2
"""Fits of a fold: with all of its groups, and without each."""


LawProgress = Callable[[int], AbstractContextManager[Any]]
"""Function that shows how many of so many fits are done: what it returns is told with `update(n)`."""


Collect = Callable[[int, int, Tensor, Tensor | None], object]
"""Function that is given a layer, a fold, and factors A and B of c_L T^(-L) + v_L w^T = A B^T, (hidden, k) each, in
float64 on the device of the fit; B is None where k is the width."""


def silent(fits: int) -> AbstractContextManager[Any]:
    """Show nothing."""
    return no_progress("", fits, "fit")


def components(tokens: int, hidden: int) -> int:
    """Return how many dimensions a fold of this many tokens can be fitted in.

    Example:
        >>> components(8_000, 576), components(8_000, 2_048)
        (576, 800)
    """
    return hidden if tokens >= TOKENS_PER_DIMENSION * hidden else tokens // TOKENS_PER_DIMENSION


def expected_law_bytes(layers: int, hidden: int, tokens: int, units: int) -> int | None:
    """Return the bytes of the law's sums and algebra, or None where there are too few units or tokens for a law.

    Two folds of half the tokens each are assumed, and no sinks.
    """
    k = components(tokens // 2, hidden)
    if units < GROUPS or k < min(FEWEST_COMPONENTS, hidden):
        return None
    return sum(law_bytes(layers, k, 1 if k == hidden else 2))


def measure_law(
    stream: ResidualStream,
    phases: PhaseMap,
    devices: Sequence[torch.device] = (),
    *,
    units: Units | None = None,
    sinks: Sinks | None = None,
    memory: Memory | None = None,
    progress: LawProgress = silent,
    collect: Collect | None = None,
) -> Law:
    """Return the law over every phase of one stream that holds all documents; see `measure_law_again`.

    Documents are the units by default. Pass `sinks` where they are known, so that they are not sought again.
    """
    sinks = find_sinks(stream) if sinks is None else sinks
    return measure_law_again(
        lambda layers: [stream],
        (stream.kept & ~sinks.dropped).cpu(),
        stream.document.cpu(),
        phases,
        devices or [stream.states[0].device],
        units=units or Units.of(int(stream.document.max()) + 1),
        layers=stream.layers,
        hidden=stream.hidden,
        memory=memory,
        progress=progress,
        collect=collect,
    )


def measure_law_again(
    streams: Streams,
    entering: Bool[Tensor, " tokens"],
    document: Int64[Tensor, " tokens"],
    phases: PhaseMap,
    devices: Sequence[torch.device],
    *,
    units: Units,
    layers: int,
    hidden: int,
    memory: Memory | None = None,
    progress: LawProgress = silent,
    collect: Collect | None = None,
    scored: bool = True,
) -> Law:
    """Return the law over every phase of a stream that can be had repeatedly, in shards.

    entering, document: which of all tokens enter, and the document of each, in the order of the stream. units: they are
    dealt into GROUPS groups, each within one half.

    The sums of layer L are formed on device L modulo their number, and the maps are fitted on the first device. Nothing
    depends on `memory` (by default a share of what is free) but the time. A law that cannot be fitted, as there are too
    few documents or tokens, is returned without numbers and with the reason. Raises DeviceError where the sums of no
    phase fit memory. progress: shows how many fits are done. collect: is given the maps that are fitted with all groups
    of a fold. scored: False to fit these alone, and return a law without numbers.
    """
    device = algebra_device(devices[0])
    groups = torch.tensor(units.at_most(GROUPS).groups)
    group = groups[document[entering]]
    tokens = Tokens(
        tuple(int((group == number).sum()) for number in range(GROUPS)), len(set(document[entering].tolist()))
    )

    def source(plan: Plan) -> SumSource:
        return _Rows(walk_rows(streams, entering, groups, devices, plan.rows), layers, hidden)

    return fit_law(
        source,
        tokens,
        phases,
        device,
        units=units,
        layers=layers,
        hidden=hidden,
        memory=memory,
        progress=progress,
        collect=collect,
        scored=scored,
    )


@dataclass(frozen=True)
class Tokens:
    """Numbers of tokens that enter the law, by group of units, and of documents of which one does."""

    by_group: tuple[int, ...]
    documents: int


@runtime_checkable
class SumSource(Protocol):
    """Sums from which the law is fitted, and that can be had again."""

    def bases(self, k: int, plan: Plan, device: torch.device) -> list[Basis]:
        """Return for each fold the span of the first k principal components of x and of delta."""

    def sums(self, layers: Sequence[int], bases: Sequence[Basis], home: Home) -> list[Sums]:
        """Return for each basis the sums of these layers, over every group of documents and every fold."""


@dataclass(frozen=True)
class _Rows:
    """Sums of rows, which are walked over each time."""

    walk: Walk
    layers: int
    hidden: int

    def bases(self, k: int, plan: Plan, device: torch.device) -> list[Basis]:
        return fold_bases(self.walk, self.layers, self.hidden, k, device, plan.basis_layers)

    def sums(self, layers: Sequence[int], bases: Sequence[Basis], home: Home) -> list[Sums]:
        return sum_groups(self.walk, layers, self.hidden, bases, home)


def fit_law(
    source_of: Callable[[Plan], SumSource],
    entering: Tokens,
    phases: PhaseMap,
    device: torch.device,
    *,
    units: Units,
    layers: int,
    hidden: int,
    memory: Memory | None = None,
    progress: LawProgress = silent,
    collect: Collect | None = None,
    scored: bool = True,
) -> Law:
    """Return the law over every phase, from sums. The maps are fitted on `device`; the rest as in `measure_law_again`.

    source_of: is given the plan, once it is known that there is a law to be fitted.
    """
    counts, rows = [entering.by_group[number] for number in ORDER], sum(entering.by_group)
    tokens = min(sum(counts[fold]) for fold in FOLDS)
    documents = entering.documents
    k = components(tokens, hidden)

    def unmeasured(reason: str) -> Law:
        return Law.absent(reason, phases, tokens=rows, documents=documents, hidden=hidden)

    if min(counts) == 0:
        return unmeasured(
            f"the law needs {GROUPS} groups of {units.unit}s, and these {units.count} {units.unit}s leave "
            f"{counts.count(0)} of them without a token"
        )
    if k < FEWEST_COMPONENTS and k < hidden:
        return unmeasured(
            f"least squares needs {TOKENS_PER_DIMENSION} tokens per dimension: a fold of n = {tokens} tokens allows "
            f"k = {k} of d = {hidden}, and fewer than {FEWEST_COMPONENTS} say nothing about the stream"
        )
    chosen = sorted({round(i * (layers - 1) / (RIDGE_LAYERS - 1)) for i in range(RIDGE_LAYERS)})
    plan = plan_law(layers, hidden, k, rows, phases, device, memory)
    source = source_of(plan)
    bases = source.bases(k, plan, device)
    ridges = [float("nan")] * len(FOLDS)
    folds = [_Fold.empty(layers, hidden) for _ in FOLDS]
    with progress(_fits(plan, chosen)) as bar:
        for together in plan.folds:
            shared = [bases[fold] for fold in together] if k < hidden else bases[:1]
            for portion in plan.portions(chosen):
                by_basis = source.sums(portion.layers, shared, plan.home)
                maps = Maps(plan.home, len(portion.layers), k)
                for number, fold in enumerate(together):
                    sums = by_basis[number if k < hidden else 0]
                    if portion.chooses_ridge:
                        places = [portion.layers.index(layer) for layer in chosen]
                        ridges[fold] = choose_ridge(sums, places, FOLDS[fold], device)
                    if portion.fits:
                        options = (fold, portion.inside, ridges[fold], plan, device)
                        if scored:
                            fit = partial(Fit, sums, maps, *options)
                            folds[fold].take(portion, fit, fold, bases[fold], collect)
                            del fit  # it holds the sums
                        elif collect is not None:
                            _collect(collect, Fit(sums, maps, *options), portion, fold, bases[fold])
                        bar.update(FITS_OF_FOLD)
                del by_basis, sums, maps  # before those of the next portion are formed
    if not scored:
        return unmeasured("its maps alone were asked for")
    return _assemble(folds, phases, rows, documents, hidden, k, (ridges[0], ridges[1]))


def _collect(collect: Collect, fit: Fit, portion: Portion, fold: int, basis: Basis) -> None:
    """Hand over the maps of a fit, as factors in all dimensions."""
    for place, matrix in fit.law_maps():
        onto = matrix if basis.y is None else basis.y.to(matrix.device) @ matrix
        collect(portion.layers[place], fold, onto, basis.x)


def _fits(plan: Plan, chosen: Sequence[int]) -> int:
    """Return how many fits a plan has."""
    fitting = sum(len(together) * portion.fits for together in plan.folds for portion in plan.portions(chosen))
    return fitting * FITS_OF_FOLD


# --- all fits --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fold:
    """All scores of the maps that are trained on one fold."""

    whole: Scores
    """Trained on all groups of the fold, scored on each group of the other one."""
    without: Sequence[Scores]
    """Trained without each group in turn, scored on all of the other fold."""
    directions: Float64[np.ndarray, "layers hidden"]
    """v_L."""

    @classmethod
    def empty(cls, layers: int, hidden: int) -> _Fold:
        """Return scores that are all NaN, and directions of zero."""
        half = GROUPS // 2
        without = [Scores.empty(1, layers) for _ in range(half)]
        return cls(Scores.empty(half, layers), without, np.zeros((layers, hidden)))

    def take(self, portion: Portion, fit: Callable[..., Fit], fold: int, basis: Basis, collect: Collect | None) -> None:
        """Fit a portion of the model with all groups and without each, and take over its scores."""
        whole = fit()
        if collect is not None:
            _collect(collect, whole, portion, fold, basis)
        self.whole.take(whole.scores(range(*FOLDS[1 - fold].indices(GROUPS))), portion.layers)
        leading = whole.leading
        del whole  # its maps, before the next fit forms its own
        for scores, deleted in zip(self.without, range(*FOLDS[fold].indices(GROUPS)), strict=True):
            fewer = fit(deleted=deleted, start=leading)
            scores.take(fewer.scores([GROUPS + 1 - fold]), portion.layers)
            del fewer
        lifted = signed(basis.lifted(leading[..., 0])).cpu().numpy()
        for place, layer in enumerate(portion.layers):
            if any(first <= layer <= last for first, last in portion.phases.values()):
                self.directions[layer] = lifted[place]


def _assemble(
    folds: Sequence[_Fold],
    phases: PhaseMap,
    tokens: int,
    documents: int,
    hidden: int,
    k: int,
    ridges: tuple[float, float],
) -> Law:
    """Return the law: averages over the two folds, for all units and without each group of them in turn."""
    whole, without = [fold.whole for fold in folds], [fold.without for fold in folds]
    cases: list[list[Scores]] = [[scores.total() for scores in whole]] + [[]] * GROUPS
    for position, group in enumerate(ORDER):
        fold, index = divmod(position, GROUPS // 2)
        # A group is deleted from the training of one fold and from the test of the maps of the other.
        remaining = [other != index for other in range(GROUPS // 2)]
        cases[1 + group] = [without[fold][index], whole[1 - fold].total(remaining)]

    def averaged(figure: Iterable[Sequence[np.ndarray]]) -> np.ndarray:
        return np.stack([np.mean(np.concatenate(folds), axis=0) for folds in figure])

    def over(energy: np.ndarray, fold: Scores) -> np.ndarray:
        """Return an energy to divide by; NaN where it is zero, or where a layer's update does not vary in a fold."""
        return np.where((energy > 0) & (fold.mean > 0), energy, np.nan)

    def r2(error: np.ndarray, fold: Scores) -> np.ndarray:
        mean = over(fold.mean, fold)
        return np.asarray(1 - error / (mean if error.ndim == 2 else mean[..., None]))

    def over_zero(error: np.ndarray, fold: Scores) -> np.ndarray:
        return np.asarray(1 - error / np.where(fold.zero > 0, fold.zero, np.nan))

    rungs = {name: averaged([r2(fold.rungs[name], fold) for fold in case] for case in cases) for name in RUNGS}
    rungs |= {
        name: averaged([over_zero(fold.rungs[name], fold) for fold in case] for case in cases) for name in CONSTANTS
    }
    transfer = averaged([r2(fold.transfer, fold) for fold in case] for case in cases)
    share = averaged([fold.along / over(fold.rungs["shared"], fold) for fold in case] for case in cases)
    captured = averaged([fold.inside / over(fold.mean, fold) for fold in case] for case in cases[:1])[0]
    gains = np.mean([scores.gains for scores in whole], axis=0)
    directions = np.stack([fold.directions for fold in folds])
    return Law(dict(phases), tokens, documents, hidden, k, ridges, rungs, share, transfer, gains, captured, directions)
