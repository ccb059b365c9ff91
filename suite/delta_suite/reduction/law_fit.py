"""The update law, tested directly: does one map of the stream, shared by a phase's layers, predict their updates?

    h_{L+1} = h_L + T_shared(h_L) + gamma_L v_L f(...)

For a layer, x is h_L / rms(h_L) (or h_L), delta its update; both less their mean over the training documents, so every
layer has an offset of its own on every rung, and the ladder begins at the training mean. Rows are those of `sink_free`,
as massive rows would decide every least-squares fit. Even documents train and odd ones test, then the other way round.

A = sum x x^T, B = sum delta x^T, D = sum delta delta^T over n training tokens; mu is relative to A's mean eigenvalue.

    own map         T_L = (B/n) (A/n + mu I)^-1
    shared map      T^(-L) = (sum B_M/(n g_M)) (sum A_M/n + mu I)^-1 over the phase's other layers M, g_M^2 = tr D_M/n
    its gain        c_L = tr(T B_L^T) / tr(T A_L T^T), T = T^(-L); and of h itself, with T = I
    residual        R_L = D - c (T B^T + B T^T) + c^2 T A T^T; v_L is its top eigenvector
    rank one        c_L T^(-L) + v_L w^T, w = (A/n + mu I)^-1 (B/n - c T A/n)^T v_L: f(...) as far as it is linear in x
    held-out error  SSE(T) = tr D - 2 tr(T B^T) + tr(T A T^T) over the test tokens; R^2 = 1 - SSE(T) / SSE(their mean
                    in training)

Intervals come from deleting a group of documents from training and test alike and fitting the maps and v_L anew, with
the basis and mu kept. So they cover what these maps would reach with unlimited text and the same mu. That is not quite
mu = 0: a shared map is no optimum of the layer it is judged on, and changes its R^2 with mu to first order, which the
ratios show where R^2(own) - R^2(shared) is small.

Least squares in d dimensions wants 10 d tokens in the training fold. With fewer, x is projected on the first k = n/10
principal components of its training fold, and delta on k of its own; the energy of delta outside counts as unexplained
on every rung but c_L h.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from delta_suite.capture.sinks import Sinks, find_sinks
from delta_suite.capture.stream import ResidualStream
from delta_suite.models.phases import PhaseMap
from delta_suite.reduction.gram import algebra_device
from delta_suite.reduction.law_scores import RUNGS, Law
from delta_suite.reduction.law_sums import (
    FOLDS,
    GROUPS,
    ORDER,
    Form,
    Sums,
    fold_bases,
    place_for,
    sum_groups,
    walk_rows,
)

TOKENS_PER_DIMENSION = 10
"""Training tokens per dimension of x that least squares wants: its held-out error is then 1.1 times the noise."""

FEWEST_COMPONENTS = 16
"""With tokens for fewer dimensions the maps say nothing of the stream."""

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""The ridges tried, relative to the mean eigenvalue of A."""

RIDGE_LAYERS = 4
"""Layers, evenly spaced, on which the ridge is chosen."""

BLOCK, TOLERANCE, MOST_STEPS = 8, 1e-5, 500
"""Subspace iteration for v_L: directions iterated, and the residual ||Rv - r v|| / r at which it ends. What v_L takes
of held-out energy is right to its first power: at 1e-3 shares were off by 1e-4, now by 1e-6."""


def measure_law(
    stream: ResidualStream,
    phases: PhaseMap,
    devices: Sequence[torch.device] = (),
    *,
    form: Form = "normalised",
    sinks: Sinks | None = None,
) -> Law:
    """The law over every phase of one stream that holds all documents.

    The sums are formed on the devices, layer L on number L modulo theirs, and the maps are fitted on the first; without
    devices, where the first state lies. A law that cannot be fitted (too few documents or tokens, too little memory)
    comes back with the reason in its place. `sinks` saves finding them a second time.
    """
    device = algebra_device(devices[0] if devices else stream.states[0].device)
    sinks = find_sinks(stream) if sinks is None else sinks
    entering = (stream.kept & ~sinks.dropped).cpu()
    group = (stream.document.cpu() % GROUPS)[entering]
    rows = entering.nonzero().flatten()
    counts = [int((group == own).sum()) for own in ORDER]
    ends = np.cumsum([0, *counts])
    slices = [slice(int(a), int(b)) for a, b in pairwise(ends)]
    folds = [slice(slices[fold][0].start, slices[fold][-1].stop) for fold in FOLDS]
    tokens = min(fold.stop - fold.start for fold in folds)
    documents = len(set(stream.document.cpu()[entering].tolist()))
    hidden = stream.hidden
    k = hidden if tokens >= TOKENS_PER_DIMENSION * hidden else tokens // TOKENS_PER_DIMENSION

    def unmeasured(reason: str) -> Law:
        return Law.absent(reason, phases, form=form, tokens=len(rows), documents=documents, hidden=hidden)

    if min(counts) == 0:
        return unmeasured(
            f"the law needs {GROUPS} groups of documents (document i is in group i % {GROUPS}), and these "
            f"{documents} documents leave {counts.count(0)} of them without a token"
        )
    if k < FEWEST_COMPONENTS and k < hidden:
        return unmeasured(
            f"least squares wants {TOKENS_PER_DIMENSION} tokens a dimension: a fold of n = {tokens} tokens allows "
            f"k = {k} of d = {hidden}, and fewer than {FEWEST_COMPONENTS} say nothing of the stream"
        )
    home, reason = place_for(stream.layers, k, 1 if k == hidden else 2, device)
    if reason is not None:
        return unmeasured(reason)

    order = torch.cat([rows[group == own] for own in ORDER])
    walk = walk_rows(stream, order, form, devices)
    bases = fold_bases(walk, folds, hidden, k, device)
    sums = sum_groups(walk, slices, stream.layers, hidden, bases, home)

    whole: list[_Scores] = []
    without: list[list[_Scores]] = []
    ridges, directions = [], []
    for fold, own in enumerate(FOLDS):
        train, other = sums[fold].total(own, device), sums[fold].sets(FOLDS[1 - fold], device)
        ridges.append(_choose_ridge(sums[fold], own, device))
        scores, leading = _evaluate(train, other, phases, ridges[-1])
        whole.append(scores)
        directions.append(bases[fold].lifted(leading[..., 0]).cpu().numpy())
        everything = sums[fold].total(FOLDS[1 - fold], device)
        replicates = []
        for left_out in range(own.start, own.stop):
            fewer = train - sums[fold].sets(slice(left_out, left_out + 1), device)
            replicates.append(_evaluate(fewer, everything, phases, ridges[-1], leading)[0])
        without.append(replicates)
    return _assemble(
        whole, without, phases, form, len(rows), documents, hidden, k, (ridges[0], ridges[1]), np.stack(directions)
    )


# --- one fit ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scores:
    """What maps fitted on one set of documents leave of others, for each test set: additive over them."""

    mean: Float64[np.ndarray, "sets layers"]
    """SSE of the training mean."""
    inside: Float64[np.ndarray, "sets layers"]
    """The part of it inside the basis."""
    rungs: Mapping[str, Float64[np.ndarray, "sets layers"]]
    """SSE of each rung; NaN where a phase has one layer, and so no shared map."""
    along: Float64[np.ndarray, "sets layers"]
    """Energy of the residual after the shared map along v_L."""
    transfer: Float64[np.ndarray, "sets layers layers"]
    """SSE of layer M's map, with its best gain, on layer L."""
    gains: Float64[np.ndarray, " layers"]

    def total(self, chosen: Sequence[bool] | None = None) -> _Scores:
        """Over all test sets, or some."""

        def over(own: np.ndarray) -> np.ndarray:
            return np.asarray((own if chosen is None else own[np.array(chosen)]).sum(axis=0, keepdims=True))

        rungs = {name: over(own) for name, own in self.rungs.items()}
        return _Scores(over(self.mean), over(self.inside), rungs, over(self.along), over(self.transfer), self.gains)


def _evaluate(
    train: Sums, tests: Sums, phases: PhaseMap, ridge: float, start: Tensor | None = None
) -> tuple[_Scores, Float64[Tensor, "layers k b"]]:
    """Fit every map, and v_L, on one set, and score them on the others.

    Comes with the leading directions of the residuals, v_L first: a `start` for sets with most documents in common.
    """
    tests, fit = tests.about(train), train.about(train)
    A, B, D = fit.A[0], fit.B[0], fit.D[0]
    layers, k = A.shape[:2]
    sets = len(tests.n)

    own, factor = _least_squares(A, B, ridge)
    squared = own.mT @ own
    fitted, test = _products(own, squared, fit), _products(own, squared, tests)
    gain = fitted[0][0] / fitted[1][0].clamp_min(torch.finfo(torch.float64).tiny)
    gain.fill_diagonal_(1.0)  # a layer's own map is the least-squares one as it is
    transfer = tests.yy[:, :, None] - 2 * gain * test[0] + gain.square() * test[1]
    scale = fit.xy[0] / fit.xx[0].clamp_min(torch.finfo(torch.float64).tiny)

    nothing = torch.full((sets, layers), torch.nan, dtype=torch.float64, device=A.device)
    shared_sse, rank_one, along, gains = nothing.clone(), nothing.clone(), nothing.clone(), nothing[0].clone()
    if start is None:
        block = torch.randn(k, min(BLOCK, k), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        start = torch.linalg.qr(block.to(A.device))[0].expand(layers, -1, -1)
    found = start.new_zeros(start.shape)
    energy = (fit.yy[0] / fit.n[0]).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    for first, last in phases.values():
        chosen = slice(first, last + 1)
        if first == last:
            continue
        a, b, d = A[chosen], B[chosen], D[chosen]
        scaled = b / energy[chosen, None, None]
        T, _ = _least_squares(a.sum(dim=0) - a, scaled.sum(dim=0) - scaled, ridge)
        S = T.mT @ T
        c = (T * b).sum(dim=(1, 2)) / (S * a).sum(dim=(1, 2)).clamp_min(torch.finfo(torch.float64).tiny)
        T, S = c[:, None, None] * T, c.square()[:, None, None] * S
        crossed = T @ b.mT
        found[chosen] = _top_directions(d - crossed - crossed.mT + T @ a @ T.mT, start[chosen])
        v = found[chosen, :, :1]
        image = T.mT @ v
        w = torch.cholesky_solve(b.mT @ v - a @ image, factor[chosen])
        # The test sets one after the other: all at once, the temporaries would outweigh the sums.
        for own_set in range(sets):
            at, bt, dt = tests.A[own_set, chosen], tests.B[own_set, chosen], tests.D[own_set, chosen]
            shared = tests.yy[own_set, chosen] - 2 * (T * bt).sum(dim=(1, 2)) + (S * at).sum(dim=(1, 2))
            held_out = bt.mT @ v
            shared_sse[own_set, chosen] = shared
            along[own_set, chosen] = (v * (dt @ v) - 2 * image * held_out + image * (at @ image)).sum(dim=(1, 2))
            rank_one[own_set, chosen] = shared + (w * (at @ w - 2 * (held_out - at @ image))).sum(dim=(1, 2))
        gains[chosen] = c
    rungs = {
        "scaled": tests.yy - 2 * scale * tests.xy + scale.square() * tests.xx,
        "shared": shared_sse,
        "rank_one": rank_one,
        "own": transfer.diagonal(dim1=1, dim2=2),
    }
    scores = _Scores(
        _numpy(tests.yy),
        _numpy(tests.D.diagonal(dim1=2, dim2=3).sum(dim=-1)),
        {name: _numpy(rungs[name]) for name in RUNGS},
        _numpy(along),
        _numpy(transfer),
        _numpy(gains),
    )
    return scores, found


def _numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.cpu().numpy())


def _least_squares(A: Tensor, B: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """B (A + mu I)^-1 and the Cholesky factor of A + mu I, in batches over layers."""
    mean = A.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    factor = torch.linalg.cholesky(
        A + (ridge * mean)[:, None, None] * torch.eye(A.shape[1], out=torch.empty_like(A[0]))
    )
    # Two triangular solves from the right take less than cholesky_solve, which would want B transposed.
    half = torch.linalg.solve_triangular(factor.mT, B, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False), factor


def _products(T: Tensor, S: Tensor, sums: Sums) -> tuple[Tensor, Tensor]:
    """tr(T_M B_L^T) and tr(T_M A_L T_M^T), S_M = T_M^T T_M, for all pairs: (sets, L, M)."""
    return sums.B.flatten(2) @ T.flatten(1).T, sums.A.flatten(2) @ S.flatten(1).T


def _top_directions(
    matrices: Float64[Tensor, "layers k k"], block: Float64[Tensor, "layers k b"]
) -> Float64[Tensor, "layers k b"]:
    """The top eigenvectors of each matrix, by subspace iteration with Rayleigh-Ritz steps; the first is converged."""
    for _ in range(MOST_STEPS):
        image = matrices @ block
        values, vectors = torch.linalg.eigh(block.mT @ image)
        block, image = block @ vectors.flip(-1), image @ vectors.flip(-1)
        rest = image[..., 0] - values[:, -1:] * block[..., 0]
        if bool((rest.norm(dim=1) <= TOLERANCE * values[:, -1].abs()).all()):
            break
        block = torch.linalg.qr(image)[0]
    return block


def _choose_ridge(sums: Sums, fold: slice, device: torch.device) -> float:
    """The ridge with the least held-out error of the own maps inside the training fold, over a few layers: three of its
    groups of documents fit, two test."""
    layers = sums.A.shape[1]
    chosen = sorted({round(i * (layers - 1) / (RIDGE_LAYERS - 1)) for i in range(RIDGE_LAYERS)})
    few = sums.layers(chosen)
    train = few.total(slice(fold.start, fold.start + 3), device)
    test, fit = few.total(slice(fold.start + 3, fold.stop), device).about(train), train.about(train)
    errors = []
    for ridge in RIDGES:
        T, _ = _least_squares(fit.A[0], fit.B[0], ridge)
        explained = 2 * (T * test.B[0]).sum(dim=(1, 2)) - ((T @ test.A[0]) * T).sum(dim=(1, 2))
        errors.append(float((1 - explained / test.yy[0].clamp_min(torch.finfo(torch.float64).tiny)).mean()))
    return RIDGES[int(np.argmin(errors))]


# --- all fits --------------------------------------------------------------------------------------------------


def _assemble(
    whole: Sequence[_Scores],
    without: Sequence[Sequence[_Scores]],
    phases: PhaseMap,
    form: Form,
    tokens: int,
    documents: int,
    hidden: int,
    k: int,
    ridges: tuple[float, float],
    directions: Float64[np.ndarray, "folds layers hidden"],
) -> Law:
    """Averages over the two folds, of all documents and without each group of them in turn."""
    cases: list[list[_Scores]] = [[own.total() for own in whole]] + [[]] * GROUPS
    for position, group in enumerate(ORDER):
        fold, index = divmod(position, GROUPS // 2)
        # A group leaves both the training of its own fold and the test of the other fold's maps.
        remaining = [other != index for other in range(GROUPS // 2)]
        cases[1 + group] = [without[fold][index], whole[1 - fold].total(remaining)]

    def averaged(figure: Iterable[Sequence[np.ndarray]]) -> np.ndarray:
        return np.stack([np.mean(np.concatenate(own), axis=0) for own in figure])

    with np.errstate(invalid="ignore"):  # 0 / 0 of a layer whose update does not vary
        r2 = {name: averaged([1 - own.rungs[name] / own.mean for own in case] for case in cases) for name in RUNGS}
        transfer = averaged([1 - own.transfer / own.mean[..., None] for own in case] for case in cases)
        share = averaged([own.along / own.rungs["shared"] for own in case] for case in cases)
        captured = averaged([own.inside / own.mean for own in case] for case in cases[:1])[0]
    gains = np.mean([own.gains for own in whole], axis=0)
    return Law(
        dict(phases), form, tokens, documents, hidden, k, ridges, r2, share, transfer, gains, captured, directions
    )
