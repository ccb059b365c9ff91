"""Fit of the update law: does one map of the stream, shared by the layers of a phase, predict their updates?

    h_{L+1} = h_L + T_shared(h_L) + gamma_L v_L f(...)

For a layer, x is h_L / rms(h_L) (or h_L) and delta its update. Both are taken less their mean over the training
documents, so each layer has a separate offset on every rung, and the ladder begins at the training mean. Rows are those
of `sink_free`, as massive rows would decide every least-squares fit. Even documents train and odd ones test, then the
other way round.

A = sum x x^T, B = sum delta x^T, D = sum delta delta^T over n training tokens; mu is in multiples of the mean
eigenvalue of A.

    own map         T_L = (B/n) (A/n + mu I)^-1, fitted on layer L alone
    shared map      T^(-L) = (sum B_M/(n g_M)) (sum A_M/n + mu I)^-1 over the phase's other layers M, g_M^2 = tr D_M/n
    gain            c_L = tr(T B_L^T) / tr(T A_L T^T) with T = T^(-L); for the rung c_L h with T = I
    residual        R_L = D - c (T B^T + B T^T) + c^2 T A T^T; v_L is its top eigenvector
    rank one        c_L T^(-L) + v_L w^T, w = (A/n + mu I)^-1 (B/n - c T A/n)^T v_L: f(...) as far as it is linear in x
    held-out error  SSE(T) = tr D - 2 tr(T B^T) + tr(T A T^T) over the test tokens; R^2 = 1 - SSE(T) / SSE(their mean
                    in training)

Intervals come from deleting a group of documents from both training and test and fitting the maps and v_L again, with
the same basis and mu. So they cover what these maps would reach with unlimited text and the same mu. That differs a
little from mu = 0: a shared map is no optimum of the layer on which it is scored, so its R^2 changes with mu to first
order, and the ratios show it where R^2(own) - R^2(shared) is small.

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
    law_bytes,
    place_for,
    sum_groups,
    walk_rows,
)

TOKENS_PER_DIMENSION = 10
"""Training tokens per dimension of x that least squares needs: its held-out error is then 1.1 times the noise."""

FEWEST_COMPONENTS = 16
"""Fewest principal components to fit in: with tokens for fewer, the maps say nothing about the stream."""

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Values of mu that are tried, in multiples of the mean eigenvalue of A."""

RIDGE_LAYERS = 4
"""Number of evenly spaced layers on which mu is chosen."""

BLOCK, TOLERANCE, MOST_STEPS = 8, 1e-5, 500
"""Subspace iteration for v_L: number of directions, the residual ||Rv - r v|| / r at which it ends, and the most steps.
The error of the held-out energy along v_L is of first order in that residual: at 1e-3 shares were off by 1e-4, now by
1e-6."""


def components(tokens: int, hidden: int) -> int:
    """Return how many dimensions a fold of this many tokens can be fitted in.

    Example:
        >>> components(8_000, 576), components(8_000, 2_048)
        (576, 800)
    """
    return hidden if tokens >= TOKENS_PER_DIMENSION * hidden else tokens // TOKENS_PER_DIMENSION


def expected_law_bytes(layers: int, hidden: int, tokens: int, documents: int) -> int | None:
    """Return the bytes of the law's sums and algebra, or None where there are too few documents or tokens for a law.

    Two folds of half the tokens each are assumed, and no sinks.
    """
    k = components(tokens // 2, hidden)
    if documents < GROUPS or k < min(FEWEST_COMPONENTS, hidden):
        return None
    return sum(law_bytes(layers, k, 1 if k == hidden else 2))


def measure_law(
    stream: ResidualStream,
    phases: PhaseMap,
    devices: Sequence[torch.device] = (),
    *,
    form: Form = "normalised",
    sinks: Sinks | None = None,
) -> Law:
    """Return the law over every phase of one stream that holds all documents.

    The sums of layer L are formed on device L modulo their number, and the maps are fitted on the first device; without
    devices, where the first state lies. A law that cannot be fitted (too few documents or tokens, too little memory) is
    returned without numbers and with the reason. Pass `sinks` where they are known, so that they are not sought again.
    """
    device = algebra_device(devices[0] if devices else stream.states[0].device)
    sinks = find_sinks(stream) if sinks is None else sinks
    entering = (stream.kept & ~sinks.dropped).cpu()
    group = (stream.document.cpu() % GROUPS)[entering]
    rows = entering.nonzero().flatten()
    counts = [int((group == number).sum()) for number in ORDER]
    ends = np.cumsum([0, *counts])
    slices = [slice(int(a), int(b)) for a, b in pairwise(ends)]
    folds = [slice(slices[fold][0].start, slices[fold][-1].stop) for fold in FOLDS]
    tokens = min(fold.stop - fold.start for fold in folds)
    documents = len(set(stream.document.cpu()[entering].tolist()))
    hidden = stream.hidden
    k = components(tokens, hidden)

    def unmeasured(reason: str) -> Law:
        return Law.absent(reason, phases, form=form, tokens=len(rows), documents=documents, hidden=hidden)

    if min(counts) == 0:
        return unmeasured(
            f"the law needs {GROUPS} groups of documents (document i is in group i % {GROUPS}), and these "
            f"{documents} documents leave {counts.count(0)} of them without a token"
        )
    if k < FEWEST_COMPONENTS and k < hidden:
        return unmeasured(
            f"least squares needs {TOKENS_PER_DIMENSION} tokens per dimension: a fold of n = {tokens} tokens allows "
            f"k = {k} of d = {hidden}, and fewer than {FEWEST_COMPONENTS} say nothing about the stream"
        )
    home, reason = place_for(stream.layers, k, 1 if k == hidden else 2, device)
    if reason is not None:
        return unmeasured(reason)

    order = torch.cat([rows[group == number] for number in ORDER])
    walk = walk_rows(stream, order, form, devices)
    bases = fold_bases(walk, folds, hidden, k, device)
    sums = sum_groups(walk, slices, stream.layers, hidden, bases, home)

    whole: list[_Scores] = []
    without: list[list[_Scores]] = []
    ridges, directions = [], []
    for fold, groups in enumerate(FOLDS):
        train, other = sums[fold].total(groups, device), sums[fold].sets(FOLDS[1 - fold], device)
        ridges.append(_choose_ridge(sums[fold], groups, device))
        scores, leading = _evaluate(train, other, phases, ridges[-1])
        whole.append(scores)
        directions.append(bases[fold].lifted(leading[..., 0]).cpu().numpy())
        everything = sums[fold].total(FOLDS[1 - fold], device)
        replicates = []
        for deleted in range(groups.start, groups.stop):
            fewer = train - sums[fold].sets(slice(deleted, deleted + 1), device)
            replicates.append(_evaluate(fewer, everything, phases, ridges[-1], leading)[0])
        without.append(replicates)
    return _assemble(
        whole, without, phases, form, len(rows), documents, hidden, k, (ridges[0], ridges[1]), np.stack(directions)
    )


# --- one fit ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scores:
    """Squared errors of maps that were fitted on one set of documents, on each test set; additive over test sets."""

    mean: Float64[np.ndarray, "sets layers"]
    """SSE of the training mean."""
    inside: Float64[np.ndarray, "sets layers"]
    """The part of `mean` inside the basis."""
    rungs: Mapping[str, Float64[np.ndarray, "sets layers"]]
    """SSE of each rung; NaN where a phase has one layer and therefore no shared map."""
    along: Float64[np.ndarray, "sets layers"]
    """Energy of the residual after the shared map along v_L."""
    transfer: Float64[np.ndarray, "sets layers layers"]
    """SSE on layer L (second axis) of the map of layer M (third axis) with its best gain."""
    gains: Float64[np.ndarray, " layers"]
    """c_L of the shared maps."""

    def total(self, chosen: Sequence[bool] | None = None) -> _Scores:
        """Return the scores over all test sets together, or over those that are chosen."""

        def over(errors: np.ndarray) -> np.ndarray:
            return np.asarray((errors if chosen is None else errors[np.array(chosen)]).sum(axis=0, keepdims=True))

        rungs = {name: over(errors) for name, errors in self.rungs.items()}
        return _Scores(over(self.mean), over(self.inside), rungs, over(self.along), over(self.transfer), self.gains)


def _evaluate(
    train: Sums, tests: Sums, phases: PhaseMap, ridge: float, start: Tensor | None = None
) -> tuple[_Scores, Float64[Tensor, "layers k b"]]:
    """Fit every map, and v_L, on one set of documents, and score them on each test set.

    Also return the leading directions of the residuals, v_L first. They are a good `start` of the iteration for sets
    that have most documents in common.
    """
    tests, fit = tests.about(train), train.about(train)
    A, B, D = fit.A[0], fit.B[0], fit.D[0]
    layers, k = A.shape[:2]
    sets = len(tests.n)

    maps, factor = _least_squares(A, B, ridge)
    squared = maps.mT @ maps
    fitted, test = _products(maps, squared, fit), _products(maps, squared, tests)
    gain = fitted[0][0] / fitted[1][0].clamp_min(torch.finfo(torch.float64).tiny)
    gain.fill_diagonal_(1.0)  # on its own layer a map is the least-squares one without a gain
    transfer = tests.yy[:, :, None] - 2 * gain * test[0] + gain.square() * test[1]
    scale = fit.xy[0] / fit.xx[0].clamp_min(torch.finfo(torch.float64).tiny)

    unset = torch.full((sets, layers), torch.nan, dtype=torch.float64, device=A.device)
    shared_sse, rank_one, along, gains = unset.clone(), unset.clone(), unset.clone(), unset[0].clone()
    if start is None:
        block = torch.randn(k, min(BLOCK, k), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        start = torch.linalg.qr(block.to(A.device))[0].expand(layers, -1, -1)
    leading = start.new_zeros(start.shape)
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
        leading[chosen] = _top_directions(d - crossed - crossed.mT + T @ a @ T.mT, start[chosen])
        v = leading[chosen, :, :1]
        image = T.mT @ v
        w = torch.cholesky_solve(b.mT @ v - a @ image, factor[chosen])
        # One test set after the other: all at once, the temporaries would take more memory than the sums.
        for one in range(sets):
            at, bt, dt = tests.A[one, chosen], tests.B[one, chosen], tests.D[one, chosen]
            shared = tests.yy[one, chosen] - 2 * (T * bt).sum(dim=(1, 2)) + (S * at).sum(dim=(1, 2))
            held_out = bt.mT @ v
            shared_sse[one, chosen] = shared
            along[one, chosen] = (v * (dt @ v) - 2 * image * held_out + image * (at @ image)).sum(dim=(1, 2))
            rank_one[one, chosen] = shared + (w * (at @ w - 2 * (held_out - at @ image))).sum(dim=(1, 2))
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
    return scores, leading


def _numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.cpu().numpy())


def _least_squares(A: Tensor, B: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return B (A + mu I)^-1 and the Cholesky factor of A + mu I, in batches over layers."""
    mean = A.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    factor = torch.linalg.cholesky(
        A + (ridge * mean)[:, None, None] * torch.eye(A.shape[1], out=torch.empty_like(A[0]))
    )
    # Two triangular solves from the right are faster than cholesky_solve, which needs B transposed.
    half = torch.linalg.solve_triangular(factor.mT, B, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False), factor


def _products(T: Tensor, S: Tensor, sums: Sums) -> tuple[Tensor, Tensor]:
    """Return tr(T_M B_L^T) and tr(T_M A_L T_M^T) for all pairs of layers, (sets, L, M), from S_M = T_M^T T_M."""
    return sums.B.flatten(2) @ T.flatten(1).T, sums.A.flatten(2) @ S.flatten(1).T


def _top_directions(
    matrices: Float64[Tensor, "layers k k"], block: Float64[Tensor, "layers k b"]
) -> Float64[Tensor, "layers k b"]:
    """Return the top eigenvectors of each matrix, by subspace iteration with Rayleigh-Ritz steps.

    Only the first is iterated to convergence.
    """
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
    """Return the ridge with the least held-out error of the layers' own maps, inside the training fold.

    Three of its groups of documents fit and two test, over RIDGE_LAYERS layers.
    """
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
    """Return the law: averages over the two folds, for all documents and without each group of them in turn."""
    cases: list[list[_Scores]] = [[scores.total() for scores in whole]] + [[]] * GROUPS
    for position, group in enumerate(ORDER):
        fold, index = divmod(position, GROUPS // 2)
        # A group is deleted from the training of one fold and from the test of the maps of the other.
        remaining = [other != index for other in range(GROUPS // 2)]
        cases[1 + group] = [without[fold][index], whole[1 - fold].total(remaining)]

    def averaged(figure: Iterable[Sequence[np.ndarray]]) -> np.ndarray:
        return np.stack([np.mean(np.concatenate(folds), axis=0) for folds in figure])

    with np.errstate(invalid="ignore"):  # 0 / 0 of a layer whose update does not vary
        r2 = {name: averaged([1 - fold.rungs[name] / fold.mean for fold in case] for case in cases) for name in RUNGS}
        transfer = averaged([1 - fold.transfer / fold.mean[..., None] for fold in case] for case in cases)
        share = averaged([fold.along / fold.rungs["shared"] for fold in case] for case in cases)
        captured = averaged([fold.inside / fold.mean for fold in case] for case in cases[:1])[0]
    gains = np.mean([scores.gains for scores in whole], axis=0)
    return Law(
        dict(phases), form, tokens, documents, hidden, k, ridges, r2, share, transfer, gains, captured, directions
    )
