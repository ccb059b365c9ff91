"""Maps of the update law, fitted on one set of documents, and their scores on others; law_fit.py has the formulas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from delta_suite.models.phases import PhaseMap
from delta_suite.reduction.law_memory import FEWEST_LAYERS, Plan
from delta_suite.reduction.law_scores import CONSTANTS, RUNGS
from delta_suite.reduction.law_sums import GROUPS, Maps, Means, Sums
from delta_suite.reduction.orthonormal import orthonormal

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Values of mu that are tried, in multiples of the mean eigenvalue of A."""

RIDGE_LAYERS = FEWEST_LAYERS
"""Number of evenly spaced layers on which mu is chosen."""

TINY = float(torch.finfo(torch.float64).tiny)
"""Smallest energy that is divided by."""

BLOCK, MOST_STEPS = 8, 500
"""Subspace iteration for v_L: number of directions, and the most steps."""

TOLERANCE, TOLERANCE_WITHOUT_GROUP = 1e-8, 1e-5
"""The residual ||Rv - r v|| / r at which the iteration ends, and in fits without a group of units. The error of the
held-out energy along v_L, and of the loss with the law in place of updates, is of first order in that residual: at 1e-3
shares were off by 1e-4, at 1e-5 by 1e-6, and `law_recovered` by 1e-5. Replicates tell a spread, and need less."""


@dataclass(frozen=True)
class Scores:
    """Squared errors of maps that were fitted on one set of documents, on each test set; additive over test sets."""

    zero: Float64[np.ndarray, "sets layers"]
    """SSE of an update of zero, the energy of delta."""
    mean: Float64[np.ndarray, "sets layers"]
    """SSE of the training mean; NaN where the update does not vary in training, so that there is nothing to learn."""
    inside: Float64[np.ndarray, "sets layers"]
    """The part of `mean` inside the basis."""
    rungs: Mapping[str, Float64[np.ndarray, "sets layers"]]
    """SSE of each rung, and of the constants below; NaN where a phase has one layer and therefore shares nothing."""
    along: Float64[np.ndarray, "sets layers"]
    """Energy of the residual after the shared map along v_L."""
    transfer: Float64[np.ndarray, "sets layers layers"]
    """SSE on layer L (second axis) of the map of layer M (third axis) with its best gain."""
    gains: Float64[np.ndarray, " layers"]
    """c_L of the shared maps."""

    @classmethod
    def empty(cls, sets: int, layers: int) -> Scores:
        """Return scores that are all NaN."""
        unset = np.full((sets, layers), np.nan)
        rungs = {name: unset.copy() for name in (*CONSTANTS, *RUNGS)}
        square = np.full((sets, layers, layers), np.nan)
        return cls(unset.copy(), unset.copy(), unset.copy(), rungs, unset.copy(), square, unset[0].copy())

    def take(self, scores: Scores, layers: Sequence[int]) -> None:
        """Take over those of some layers, where they are not NaN."""
        pairs = [(errors, scores.rungs[name]) for name, errors in self.rungs.items()]
        for name in ("zero", "mean", "inside", "along", "gains"):
            pairs.append((getattr(self, name), getattr(scores, name)))
        for whole, part in pairs:
            whole[..., layers] = np.where(np.isnan(part), whole[..., layers], part)
        self.transfer[np.ix_(range(len(self.transfer)), layers, layers)] = scores.transfer

    def total(self, chosen: Sequence[bool] | None = None) -> Scores:
        """Return the scores over all test sets together, or over those that are chosen."""

        def over(errors: np.ndarray) -> np.ndarray:
            return np.asarray((errors if chosen is None else errors[np.array(chosen)]).sum(axis=0, keepdims=True))

        rungs = {name: over(errors) for name, errors in self.rungs.items()}
        errors = (over(self.zero), over(self.mean), over(self.inside))
        return Scores(*errors, rungs, over(self.along), over(self.transfer), self.gains)


@dataclass
class _Shared:
    """What the layers of one phase that are within one step share."""

    phase: str
    within: slice
    """Their places in the step."""
    map: Float64[Tensor, "layers k k"]
    """c_L T^(-L)."""
    square: Float64[Tensor, "layers k k"]
    """T^T T of it."""
    residual: Float64[Tensor, "layers k k"]
    """R_L."""


@dataclass
class _Step:
    """The maps of the layers of one step."""

    layers: slice
    means: Means
    """Means over the training documents."""
    own_map: Float64[Tensor, "layers k k"]
    """T_L."""
    square: Float64[Tensor, "layers k k"]
    """T_L^T T_L."""
    factor: Float64[Tensor, "layers k k"]
    """Cholesky factor of A + mu I."""
    scale: Float64[Tensor, " layers"]
    """c_L of the rung c_L h."""
    energy: Float64[Tensor, " layers"]
    """g_L."""
    constant: Float64[Tensor, "layers hidden"]
    """The training mean of delta itself."""
    unit: Float64[Tensor, "layers hidden"]
    """That over the root of the mean energy of delta."""
    shared: list[_Shared]


class Fit:
    """Every map, and v_L, fitted on the documents of one fold, or on those without one of its groups.

    The layers are taken in steps; matrices between steps lie where the sums do.
    """

    def __init__(
        self,
        sums: Sums,
        maps: Maps,
        fold: int,
        phases: PhaseMap,
        ridge: float,
        plan: Plan,
        device: torch.device,
        deleted: int | None = None,
        start: Float64[Tensor, "layers k b"] | None = None,
    ) -> None:
        """Fit on the documents of a fold without the group `deleted`; v_L is iterated from `start`."""
        self.sums, self.trained, self.deleted = sums, GROUPS + fold, deleted
        self.phases = {name: span for name, span in phases.items() if span[0] < span[1]}
        self.ridge, self.maps, self.device = ridge, maps, device
        layers, k = sums.A.shape[1:3]
        size = plan.layers_a_step
        steps = [slice(first, min(first + size, layers)) for first in range(0, layers, size)]
        self._held: dict[int, Sums] = {}
        if start is None:
            block = torch.randn(k, min(BLOCK, k), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            start = orthonormal(block.to(device)).expand(layers, -1, -1)
        self.leading = start.new_zeros(start.shape)
        """The leading directions of the residuals, v_L first; zero where no map is shared."""
        self.gains = start.new_full((layers,), torch.nan)
        """c_L of the shared maps."""
        self._pooled: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.steps = [self._own_maps(step, hold=plan.holds) for step in steps]
        self.gain = torch.cat([self._shared_maps(step) for step in self.steps])
        """Gain of the map of layer M (second axis) on layer L; 1 on its own, which is least squares without a gain."""
        self.gain.fill_diagonal_(1.0)
        for name in self.phases:
            self._directions(name, start)

    def _training(self, layers: slice) -> tuple[Means, Sums]:
        """Return the means of the training documents, and their sums about these (but for those about zero)."""
        train = self.sums.part(self.trained, layers, self.device)
        if self.deleted is not None:
            train = train - self.sums.part(self.deleted, layers, self.device)
        means = train.means()
        return means, train.about(means, overwrite=self.deleted is not None)

    def _again(self, step: _Step) -> Sums:
        held = self._held.get(step.layers.start)
        return self._training(step.layers)[1] if held is None else held

    def _own_maps(self, layers: slice, *, hold: bool) -> _Step:
        means, fit = self._training(layers)
        A, B = fit.A[0], fit.B[0]
        T, factor = least_squares(A, B, self.ridge)
        energy = (fit.yy[0] / fit.n[0]).sqrt().clamp_min(TINY)
        constant = fit.update[0] / fit.n[0, :, None]
        unit = constant / (fit.energy[0] / fit.n[0]).sqrt().clamp_min(TINY)[:, None]
        for name, within in self._inside(layers):
            a, b = A[within].sum(dim=0), (B[within] / energy[within, None, None]).sum(dim=0)
            m, earlier = unit[within].sum(dim=0), self._pooled.get(name)
            self._pooled[name] = (a, b, m) if earlier is None else (earlier[0] + a, earlier[1] + b, earlier[2] + m)
        if hold:
            self._held[layers.start] = fit
        scale = fit.xy[0] / fit.xx[0].clamp_min(TINY)
        matrices = {"own_map": T, "square": T.mT @ T, "factor": factor}
        kept = {kind: self.maps.keep(kind, layers, matrix) for kind, matrix in matrices.items()}
        return _Step(layers, means, **kept, scale=scale, energy=energy, constant=constant, unit=unit, shared=[])

    def _inside(self, layers: slice) -> Iterator[tuple[str, slice]]:
        """Yield each phase with a layer among these, and the places of its layers."""
        for name, (first, last) in self.phases.items():
            within = slice(max(first, layers.start) - layers.start, min(last + 1, layers.stop) - layers.start)
            if within.start < within.stop:
                yield name, within

    def _shared_maps(self, step: _Step) -> Float64[Tensor, "step_layers layers"]:
        """Fit the shared maps of a step, and return the gains of all layers' own maps on it."""
        fit = self._again(step)
        for name, within in self._inside(step.layers):
            a, b, d = fit.A[0][within], fit.B[0][within], fit.D[0][within]
            pooled_a, pooled_b, _ = self._pooled[name]
            T, _ = least_squares(pooled_a - a, pooled_b - b / step.energy[within, None, None], self.ridge)
            S = T.mT @ T
            c = (T * b).sum(dim=(1, 2)) / (S * a).sum(dim=(1, 2)).clamp_min(TINY)
            T, S = c[:, None, None] * T, c.square()[:, None, None] * S
            half = torch.baddbmm(b, T, a, alpha=-0.5) @ T.mT  # B T^T - T A T^T / 2: of what T explains
            matrices = {"shared": T, "shared_square": S, "residual": d - half - half.mT}
            layers = slice(step.layers.start + within.start, step.layers.start + within.stop)
            kept = (self.maps.keep(kind, layers, matrix) for kind, matrix in matrices.items())
            step.shared.append(_Shared(name, within, *kept))
            self.gains[step.layers][within] = c
        explained, energy = self._products(fit)
        return explained / energy.clamp_min(TINY)

    def _products(self, sums: Sums) -> tuple[Tensor, Tensor]:
        """Return tr(T_M B_L^T) and tr(T_M A_L T_M^T) of one set, for the layers L of the sums and all layers M."""
        B, A = sums.B[0].flatten(1), sums.A[0].flatten(1)
        explained = [B @ step.own_map.to(self.device).flatten(1).T for step in self.steps]
        energy = [A @ step.square.to(self.device).flatten(1).T for step in self.steps]
        return torch.cat(explained, dim=1), torch.cat(energy, dim=1)

    def _directions(self, phase: str, start: Float64[Tensor, "layers k b"]) -> None:
        """Find v_L of the layers of a phase."""
        parts = [(step, shared) for step in self.steps for shared in step.shared if shared.phase == phase]
        blocks = top_directions(
            [shared.residual for _, shared in parts],
            [start[step.layers][shared.within] for step, shared in parts],
            TOLERANCE if self.deleted is None else TOLERANCE_WITHOUT_GROUP,
        )
        for (step, shared), block in zip(parts, blocks, strict=True):
            self.leading[step.layers][shared.within] = block
            shared.residual = block.new_empty(len(block), 0, 0)  # it has served

    def law_maps(self) -> Iterator[tuple[int, Float64[Tensor, "k k"]]]:
        """Yield c_L T^(-L) + v_L w^T of each layer that shares a map, with the layer's place in the sums."""
        for step in self.steps:
            for shared, v, _, w in self._rank_one(step):
                maps = shared.map.to(self.device) + v @ w.mT
                for number, matrix in enumerate(maps):
                    yield step.layers.start + shared.within.start + number, matrix

    def scores(self, tests: Sequence[int]) -> Scores:
        """Score every map on each of these sets."""
        parts = [self._step_scores(step, tests) for step in self.steps]
        joined = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
        rungs = {name: joined[name] for name in (*CONSTANTS, *RUNGS)}
        errors = (joined["zero"], joined["mean"], joined["inside"])
        return Scores(*errors, rungs, joined["along"], joined["transfer"], self.gains.cpu().numpy())

    def _step_scores(self, step: _Step, tests: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the scores of the layers of a step, by name; the first axis is the test set."""
        lines = self._rank_one(step)
        out: dict[str, list[Tensor]] = {}
        gain = self.gain[step.layers]
        for number in tests:
            # One set after the other: all at once, the temporaries would take more memory than the sums.
            test = self.sums.part(number, step.layers, self.device).about(step.means)
            explained, energy = self._products(test)
            yy, xy, xx = test.yy[0], test.xy[0], test.xx[0]
            transfer = yy[:, None] - 2 * gain * explained + gain.square() * energy
            scores = {
                "mean": yy.where(step.energy > TINY, torch.nan),
                "inside": test.D[0].diagonal(dim1=1, dim2=2).sum(dim=-1),
                "scaled": yy - 2 * step.scale * xy + step.scale.square() * xx,
                "transfer": transfer,
                "own": transfer[:, step.layers].diagonal(),
            }
            scores |= self._constant_scores(step, test)
            scores |= {name: torch.full_like(yy, torch.nan) for name in ("shared", "rank_one", "along")}
            for shared, v, image, w in lines:
                at, bt, dt = (matrix[0][shared.within] for matrix in (test.A, test.B, test.D))
                T, S = shared.map.to(self.device), shared.square.to(self.device)
                remaining = yy[shared.within] - 2 * (T * bt).sum(dim=(1, 2)) + (S * at).sum(dim=(1, 2))
                held_out = bt.mT @ v
                along = v * (dt @ v) - 2 * image * held_out + image * (at @ image)
                closed = w * (at @ w - 2 * (held_out - at @ image))
                scores["shared"][shared.within] = remaining
                scores["along"][shared.within] = along.sum(dim=(1, 2))
                scores["rank_one"][shared.within] = remaining + closed.sum(dim=(1, 2))
            for name, score in scores.items():
                out.setdefault(name, []).append(score)
        return {name: torch.stack(each).cpu().numpy() for name, each in out.items()}

    def _constant_scores(self, step: _Step, test: Sums) -> dict[str, Tensor]:
        """Return the errors on one set of updates that are the same for every token: none, shared, and the layer's."""
        update, zero, n = test.update[0], test.energy[0], test.n[0]

        def error(constant: Tensor, layers: slice = slice(None)) -> Tensor:
            crossed = (constant * update[layers]).sum(dim=1)
            return zero[layers] - 2 * crossed + n[layers] * constant.square().sum(dim=1)

        shared = torch.full_like(zero, torch.nan)
        for name, within in self._inside(step.layers):
            m, mean = self._pooled[name][2] - step.unit[within], step.constant[within]
            c = (m * mean).sum(dim=1) / m.square().sum(dim=1).clamp_min(TINY)
            shared[within] = error(c[:, None] * m, within)
        return {"zero": zero, "shared_mean": shared, "own_mean": error(step.constant)}

    def _rank_one(self, step: _Step) -> list[tuple[_Shared, Tensor, Tensor, Tensor]]:
        """Return the layers of each phase in a step, with their v_L, T^T v_L and w."""
        fit = self._again(step)
        lines = []
        for shared in step.shared:
            v = self.leading[step.layers][shared.within][..., :1]
            image = shared.map.to(self.device).mT @ v
            gap = fit.B[0][shared.within].mT @ v - fit.A[0][shared.within] @ image
            lines.append((shared, v, image, torch.cholesky_solve(gap, step.factor.to(self.device)[shared.within])))
        return lines


def least_squares(A: Tensor, B: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return B (A + mu I)^-1 and the Cholesky factor of A + mu I, in batches over layers."""
    mean = A.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(TINY)
    factor = torch.linalg.cholesky(
        A + (ridge * mean)[:, None, None] * torch.eye(A.shape[1], out=torch.empty_like(A[0]))
    )
    # Two triangular solves from the right are faster than cholesky_solve, which needs B transposed.
    half = torch.linalg.solve_triangular(factor.mT, B, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False), factor


def top_directions(
    matrices: Sequence[Float64[Tensor, "_ k k"]], blocks: Sequence[Float64[Tensor, "_ k b"]], tolerance: float
) -> list[Float64[Tensor, "_ k b"]]:
    """Return the top eigenvectors of each matrix, by subspace iteration with Rayleigh-Ritz steps.

    Only the first is iterated to convergence: until its residual is within `tolerance` of its eigenvalue. Matrices of
    all parts take the same number of steps, the fewest at which all have converged, so that nothing depends on how they
    are parted.
    """
    out, taken, wanted = list(blocks), [-1] * len(matrices), 0
    while min(taken) < wanted:
        for number, part in enumerate(matrices):
            if taken[number] < wanted:
                home = out[number].device
                out[number], taken[number] = _iterate(part.to(home), out[number], taken[number], wanted, tolerance)
        wanted = max(taken)
    return out


def _iterate(
    matrices: Float64[Tensor, "_ k k"], block: Float64[Tensor, "_ k b"], taken: int, wanted: int, tolerance: float
) -> tuple[Float64[Tensor, "_ k b"], int]:
    """Go on from a number of steps (-1 before the first) until at least `wanted`, and all matrices have converged.

    Return the block and the number of its last step, from 0.
    """
    step = max(0, taken)
    while True:
        image = matrices @ block
        # On the host: a GPU would spend its time on launching problems of eight dimensions.
        values, vectors = (part.to(block.device) for part in torch.linalg.eigh((block.mT @ image).cpu()))
        block, image = block @ vectors.flip(-1), image @ vectors.flip(-1)
        rest = image[..., 0] - values[:, -1:] * block[..., 0]
        converged = bool((rest.norm(dim=1) <= tolerance * values[:, -1].abs()).all())
        if step >= wanted and (converged or step == MOST_STEPS - 1):
            return block, step
        block = orthonormal(image)
        step += 1


def choose_ridge(sums: Sums, layers: Sequence[int], fold: slice, device: torch.device) -> float:
    """Return the ridge with the least held-out error of these layers' own maps, inside the training fold.

    Three of its groups of documents fit and two test. Layers whose update does not vary in both have no error.
    """
    train = sums.total(slice(fold.start, fold.start + 3), layers, device)
    means = train.means()
    test, fit = sums.total(slice(fold.start + 3, fold.stop), layers, device).about(means), train.about(means)
    varies = (fit.yy[0] > 0) & (test.yy[0] > 0)
    if not varies.any():
        return RIDGES[0]
    errors = []
    for ridge in RIDGES:
        T, _ = least_squares(fit.A[0], fit.B[0], ridge)
        explained = 2 * (T * test.B[0]).sum(dim=(1, 2)) - ((T @ test.A[0]) * T).sum(dim=(1, 2))
        errors.append(float((1 - explained / test.yy[0])[varies].mean()))
    return RIDGES[int(np.argmin(errors))]
