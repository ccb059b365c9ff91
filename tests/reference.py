"""The reference script's arithmetic, written plainly and apart from the suite: numpy, full SVDs, no Gram matrix.

It takes the states of one stream, the last one raw, and returns every figure that the reference prints.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
from scipy.optimize import brentq


def entropy_rank(p: np.ndarray) -> float:
    p = p[p > 1e-12]
    return float(np.exp(-(p * np.log(p)).sum()))


def layer_figures(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Return the figures of one layer from its states (tokens, hidden) in float32, without the first token."""
    delta = (after.astype(np.float32) - before.astype(np.float32)).astype(np.float64)
    h, nxt = before.astype(np.float64), before.astype(np.float64) + delta
    step, norm = np.linalg.norm(delta, axis=1), np.linalg.norm(h, axis=1)
    cosine = (delta * h).sum(axis=1) / np.maximum(step * norm, 1e-8)
    between = (h * nxt).sum(axis=1) / (norm * np.linalg.norm(nxt, axis=1))
    _, s, vt = np.linalg.svd(delta, full_matrices=False)
    p = s**2 / (s**2).sum()
    q = s / s.sum()
    return {
        "gamma": s[0],
        "effective_rank": entropy_rank(p),
        "effective_rank_roy": entropy_rank(q),
        "participation_ratio": 1 / (p**2).sum(),
        "stable_rank": 1 / p[0],
        "top1_energy": p[0],
        "top3_energy": p[:3].sum(),
        "top10_energy": p[:10].sum(),
        "spectral_gap": s[0] / s[1],
        "frobenius": np.linalg.norm(delta),
        "update_norm": step.mean(),
        "update_norm_sd": step.std(),
        "stream_norm": norm.mean(),
        "stream_norm_sd": norm.std(),
        "relative_step": (step / np.maximum(norm, 1e-8)).mean(),
        "relative_step_sd": (step / np.maximum(norm, 1e-8)).std(),
        "alignment": cosine.mean(),
        "parallel_fraction": np.abs(cosine).mean(),
        "block_influence": (1 - between).mean(),
        "mean_energy": len(delta) * (delta.mean(axis=0) ** 2).sum() / (delta**2).sum(),
        "rounding_share": (np.finfo(np.float32).eps ** 2 / 24) * (norm**2).mean() / (step**2).mean(),
        "angular_distance": (np.arccos(np.clip(between, -1, 1)) / np.pi).mean(),
        "directions": vt[:8],
        "singular_values": s,
    }


def sublayer_rows(model: Any, texts: list[Any]) -> dict[str, list[list[np.ndarray]]]:
    """Return the states h_0 .. h_N of a Llama, and what attention and MLP write in each layer, by document.

    texts: the token ids of each document, which runs alone.
    """
    import torch

    layers = model.model.layers
    rows: dict[str, list[list[np.ndarray]]] = {name: [[] for _ in layers] for name in ("h", "attention", "mlp")}
    rows["h"].append([])

    def kept(name: str, layer: int, state: Any) -> None:
        rows[name][layer].append(state[0].numpy().astype(np.float64))

    handles = []
    for layer, block in enumerate(layers):
        handles += [
            block.register_forward_pre_hook(lambda m, args, layer=layer: kept("h", layer, args[0])),
            block.self_attn.register_forward_hook(lambda m, args, out, layer=layer: kept("attention", layer, out[0])),
            block.mlp.register_forward_hook(lambda m, args, out, layer=layer: kept("mlp", layer, out)),
        ]
    handles.append(model.model.norm.register_forward_pre_hook(lambda m, args: kept("h", len(layers), args[0])))
    with torch.no_grad():
        for text in texts:
            model(input_ids=text[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return rows


def write_figures(rows: dict[str, list[list[np.ndarray]]]) -> dict[str, list[dict[str, Any]]]:
    """Return the figures of what attention and MLP write in each layer, without sinks, by variant and write.

    rows: of `sublayer_rows`. Sinks are each first token, and tokens whose state exceeds six times the median norm in
    any layer.
    """
    first = np.concatenate([np.arange(len(states)) == 0 for states in rows["h"][0]])
    norms = np.stack([np.linalg.norm(np.concatenate(states), axis=1) for states in rows["h"]])
    large = (norms > 6 * np.median(norms[:, ~first], axis=1, keepdims=True)).any(axis=0)
    figures: dict[str, list[dict[str, Any]]] = {}
    for write in ("attention", "mlp"):
        for documents in rows[write]:
            wrote = np.concatenate(documents)[~first & ~large]
            for variant, delta in (("sink_free", wrote), ("centred", wrote - wrote.mean(axis=0))):
                _, s, vt = np.linalg.svd(delta, full_matrices=False)
                p = s**2 / (s**2).sum()
                figures.setdefault(f"{variant}.{write}", []).append(
                    {"gamma": s[0], "effective_rank": entropy_rank(p), "top3_energy": p[:3].sum(), "directions": vt[:8]}
                )
    return figures


def causal_losses(
    model: Any, texts: list[Any], phases: dict[str, tuple[int, int]], half: list[int], mu: tuple[float, float]
) -> dict[str, list[float]]:
    """Return the loss of each document of a Llama, in nats over all its tokens, by plain hooks and full SVDs.

    The keys are "undisturbed", "C.zero" and so on; and for two blocks "skip.3" and "swap.3". half: 0 or 1 for each
    document, that of the other half is fitted on. mu: the ridge of the maps of each half. Sinks are as in
    `write_figures`.
    """
    import torch

    blocks = model.model.layers

    def run(text: Any, change: Any = None, order: list[int] | None = None) -> tuple[float, list[np.ndarray]]:
        """Return the loss of a text and the states, with `change(layer, h, delta)` in place of updates."""
        states: list[np.ndarray] = []

        def hook(layer: int, args: Any, out: Any) -> Any:
            h = args[0]
            states.append(h[0].numpy().copy())
            return None if change is None else h + torch.from_numpy(change(layer, h[0].numpy(), (out - h)[0].numpy()))

        handles = [
            block.register_forward_hook(lambda m, args, out, layer=layer: hook(layer, args, out))
            for layer, block in enumerate(blocks)
        ]
        handles.append(
            model.model.norm.register_forward_pre_hook(lambda m, args: states.append(args[0][0].numpy().copy()))
        )
        model.model.layers = torch.nn.ModuleList([blocks[layer] for layer in order or range(len(blocks))])
        count, model.model.config.num_hidden_layers = len(blocks), len(model.model.layers)
        with torch.no_grad():
            scores = model(input_ids=text[None], use_cache=False).logits[0].numpy()
        model.model.layers, model.model.config.num_hidden_layers = blocks, count
        for handle in handles:
            handle.remove()
        p = scores[:-1] - np.logaddexp.reduce(scores[:-1], axis=1, keepdims=True)
        return float(-p[np.arange(len(text) - 1), text[1:].numpy()].sum()), states

    whole = [run(text) for text in texts]
    streams = [states for _, states in whole]
    first = [np.arange(len(text)) == 0 for text in texts]
    norms = [[np.linalg.norm(state, axis=1) for state in states] for states in streams]
    medians = [
        np.median(np.concatenate([n[layer][~f] for n, f in zip(norms, first, strict=True)]))
        for layer in range(len(blocks) + 1)
    ]
    enters = [
        ~f & ~np.any([row > 6 * median for row, median in zip(n, medians, strict=True)], axis=0)
        for n, f in zip(norms, first, strict=True)
    ]

    def rows(layer: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = [(s, e) for s, e, h in zip(streams, enters, half, strict=True) if h == side]
        h = np.concatenate([s[layer][e] for s, e in chosen])
        return h / np.sqrt((h**2).mean(axis=1, keepdims=True)), np.concatenate(
            [(s[layer + 1] - s[layer])[e] for s, e in chosen]
        )

    fits: dict[tuple[int, int], dict[str, Any]] = {}
    for low, high in phases.values():
        layers = range(low, high + 1)
        for side in (0, 1):
            for layer in layers:
                x, delta = rows(layer, side)
                _, s, vt = np.linalg.svd(delta, full_matrices=False)
                x0, d0 = x - x.mean(axis=0), delta - delta.mean(axis=0)
                fits[layer, side] = {
                    "v": vt[0], "e": s**2, "vt": vt, "mean": delta.mean(axis=0), "x": x.mean(axis=0),
                    "A": x0.T @ x0, "B": d0.T @ x0, "D": d0.T @ d0, "g": math.sqrt((d0**2).sum() / len(d0)),
                }  # fmt: skip
            u = np.linalg.svd(np.stack([fits[layer, side]["v"] for layer in layers]))[2][0]
            for layer in layers:
                fit = fits[layer, side]
                fit["u"] = u
                others = [fits[m, side] for m in layers if m != layer]
                eye = np.eye(len(u))
                if others:
                    a, b = sum(o["A"] for o in others), sum(o["B"] / o["g"] for o in others)
                    T = b @ np.linalg.inv(a + mu[side] * np.trace(a) / len(a) * eye)
                    T = T * (T * fit["B"]).sum() / ((T.T @ T) * fit["A"]).sum()
                    residual = fit["D"] - T @ fit["B"].T - fit["B"] @ T.T + T @ fit["A"] @ T.T
                    v = np.linalg.eigh(residual)[1][:, -1]
                    ridge = mu[side] * np.trace(fit["A"]) / len(eye) * eye
                    w = np.linalg.solve(fit["A"] + ridge, fit["B"].T @ v - fit["A"] @ T.T @ v)
                    fit["T"] = T + np.outer(v, w)
                generator = torch.Generator().manual_seed(2 * layer + side)
                random = torch.randn(len(u), generator=generator, dtype=torch.float64).numpy()
                fit["random"] = random / np.linalg.norm(random)

    def removed(fit: dict[str, Any], condition: str, h: np.ndarray, delta: np.ndarray) -> np.ndarray:
        if condition == "mean":
            return np.broadcast_to(fit["mean"], delta.shape)
        if condition == "law":
            x = h / np.sqrt((h**2).mean(axis=1, keepdims=True))
            return fit["mean"] + (x - fit["x"]) @ fit["T"].T
        if condition == "matched":
            left, out = fit["e"][0], delta.copy()
            for energy, v in zip(fit["e"][1:], fit["vt"][1:], strict=True):
                part = math.sqrt(min(1.0, left / energy)) if left > 0 else 0.0
                left -= part**2 * energy
                out -= part * np.outer(delta @ v, v)
            return out
        v = fit[{"zero": "v", "kept": "v", "shared": "u", "random": "random"}[condition]]
        kept = v @ fit["mean"] if condition == "kept" else 0.0
        return delta - np.outer(delta @ v - kept, v)

    losses = {"undisturbed": [loss for loss, _ in whole]}
    for name, (low, high) in phases.items():
        for condition in ("zero", "kept", "shared", "matched", "random", "mean", "law"):
            if condition == "law" and low == high:
                continue

            def changed(document: int, condition: str = condition, low: int = low, high: int = high) -> float:
                def change(layer: int, h: np.ndarray, delta: np.ndarray) -> np.ndarray:
                    out = delta.copy()
                    if low <= layer <= high:
                        e = enters[document]
                        out[e] = removed(fits[layer, 1 - half[document]], condition, h[e], delta[e])
                    return out

                return run(texts[document], change)[0]

            losses[f"{name}.{condition}"] = [changed(document) for document in range(len(texts))]
    for layer in (0, 3):
        order = [m for m in range(len(blocks)) if m != layer]
        losses[f"skip.{layer}"] = [run(text, order=order)[0] for text in texts]
        if layer + 1 < len(blocks):
            order = [*range(layer), layer + 1, layer, *range(layer + 2, len(blocks))]
            losses[f"swap.{layer}"] = [run(text, order=order)[0] for text in texts]
    return losses


def phase_figures(directions: list[np.ndarray], phase: list[int]) -> dict[str, float]:
    """Return the figures of a phase from the directions of every layer, (8, hidden) each."""
    v = [rows[0] for rows in directions]
    others = [layer for layer in range(len(v)) if layer not in phase]
    figures: dict[str, float] = {}
    if len(phase) > 1:
        figures["intra_cosine"] = float(np.mean([abs(v[a] @ v[b]) for a, b in combinations(phase, 2)]))
        stack = np.concatenate([directions[layer] for layer in phase])
        basis = np.linalg.svd(stack, full_matrices=False)[2][:8]
        figures["capture_fraction"] = float(np.mean([((basis @ v[layer]) ** 2).sum() for layer in phase]))
        overlaps = [directions[a] @ directions[b].T for a, b in combinations(phase, 2)]
        figures["subspace_overlap"] = float(np.mean([(m**2).sum() / 8 for m in overlaps]))
        angles = [np.arccos(np.clip(np.linalg.svd(m, compute_uv=False), 0, 1)).mean() for m in overlaps]
        figures["principal_angle"] = float(np.mean(angles))
        figures["adjacent_cosine"] = float(np.mean([abs(v[a] @ v[a + 1]) for a in phase[:-1]]))
    else:
        figures["intra_cosine"] = 1.0
    if others:
        figures["cross_cosine"] = float(np.mean([abs(v[a] @ v[b]) for a in phase for b in others]))
    sigma = np.linalg.svd(np.stack([v[layer] for layer in phase]), compute_uv=False)
    figures["block_effective_rank"] = entropy_rank(sigma**2 / (sigma**2).sum())
    figures["block_effective_rank_fraction"] = figures["block_effective_rank"] / len(phase)
    if len(phase) > 1:
        figures["equal_cosine"] = equal_cosine(figures["block_effective_rank"], len(phase))
    projector = sum(directions[layer].T @ directions[layer] for layer in phase) / len(phase)
    figures["shared_fraction"] = float(np.linalg.eigvalsh(projector)[-1])
    return figures


def equal_cosine(rank: float, count: int) -> float:
    """Return the c for which `count` unit vectors with all pairwise cosines c have this entropy rank."""

    def excess(c: float) -> float:
        eigenvalues = np.linalg.eigvalsh((1 - c) * np.eye(count) + c * np.ones((count, count)))
        return entropy_rank(np.maximum(eigenvalues, 0.0) / count) - rank

    return float(brentq(excess, 0.0, 1.0, xtol=1e-14)) if excess(0.0) > 0 else 0.0


def held_out_capture(a: list[np.ndarray], b: list[np.ndarray], phase: list[int]) -> float:
    """Return the held-out capture of a phase from the directions of both document halves, (8, hidden) per layer."""

    def captured(half: list[np.ndarray], other: list[np.ndarray], layer: int) -> float:
        stack = np.concatenate([other[m] for m in phase if m != layer])
        basis = np.linalg.svd(stack, full_matrices=False)[2][:8]
        return float(((basis @ half[layer][0]) ** 2).sum())

    return float(np.mean([(captured(a, b, layer) + captured(b, a, layer)) / 2 for layer in phase]))


def edge_contrast(cosines: np.ndarray, phase: range) -> float:
    """Return the largest 1 - across / inside over shifts of a phase by up to two layers, pair by pair."""
    layers, count, contrasts = len(cosines), len(phase), []
    for shift in range(-2, 3):
        window = set(range(phase[0] + shift, phase[-1] + 1 + shift))
        if not window <= set(range(layers)):
            continue
        inside, across = 0.0, 0.0
        for lag in range(1, count):
            pairs = [(a, a + lag) for a in range(layers - lag)]
            both = [cosines[pair] for pair in pairs if len(window & set(pair)) == 2]
            one = [cosines[pair] for pair in pairs if len(window & set(pair)) == 1]
            inside += (count - lag) * float(np.mean(both))
            across += (count - lag) * float(np.mean(one))
        contrasts.append(1 - across / inside)
    return max(contrasts)


def drift_p(cosines: np.ndarray, phase: range, seed: int, draws: int) -> float:
    """Return the p-value of a phase against smooth drifts fitted to the other pairs, one drift after the other.

    `cosines` have the reliability of each layer on the diagonal. Random numbers are those of the suite: 40 drifts for
    each of eight steps of the fit, and then `draws`, 100 at a time.
    """
    layers, random = len(cosines), np.random.default_rng(seed)
    reliable = np.diag(cosines)
    squares = np.array(
        [[min(1.0, cosines[a, b] ** 2 / (reliable[a] * reliable[b])) for b in range(layers)] for a in range(layers)]
    )

    def fitted(a: int, b: int) -> bool:
        return a == b or not (a in phase and b in phase)

    def by_lag(matrix: np.ndarray) -> tuple[list[float], float]:
        means = []
        for lag in range(layers):
            pairs = [(a, a + lag) for a in range(layers - lag) if fitted(a, a + lag)]
            means.append(float(np.mean([matrix[pair] for pair in pairs])))
        both = [(a, b) for a in range(layers) for b in range(layers) if fitted(a, b)]
        return means, float(np.mean([(matrix[a, b] - means[abs(a - b)]) ** 2 for a, b in both]))

    def factor(dimensions: float) -> np.ndarray:
        unrelated = 1 / (round(dimensions) if dimensions < layers else dimensions)
        kernel = np.sqrt(np.maximum((np.array(means) - unrelated) / (1 - unrelated), 0))
        values, vectors = np.linalg.eigh(kernel[np.abs(np.subtract.outer(range(layers), range(layers)))])
        rows = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
        return np.asarray(rows / np.linalg.norm(rows, axis=1)[:, None])

    def drawn(rows: np.ndarray, dimensions: float, count: int) -> list[np.ndarray]:
        if dimensions < layers:
            noises = [random.standard_normal((layers, round(dimensions))) for _ in range(count)]
        else:
            below = [np.tril(random.standard_normal((layers, layers)), k=-1) for _ in range(count)]
            degrees = [dimensions - layer for layer in range(layers)]
            noises = [noise + np.diag([math.sqrt(random.chisquare(nu)) for nu in degrees]) for noise in below]
        paths = [rows @ noise for noise in noises]
        unit = [path / np.linalg.norm(path, axis=1)[:, None] for path in paths]
        return [np.abs(path @ path.T) for path in unit]

    means, departure = by_lag(squares)
    dimensions = 100.0
    for _ in range(8):
        pilot = drawn(factor(dimensions), dimensions, 40)
        departures = float(np.mean([by_lag(drift**2)[1] for drift in pilot]))
        dimensions = min(max(dimensions * departures / max(departure, departures / 1e6), 2.0), 1e6)
    damping = np.sqrt(np.outer(reliable, reliable))
    rows, beyond = factor(dimensions), 0
    for first in range(0, draws, 100):
        for drift in drawn(rows, dimensions, min(100, draws - first)):
            beyond += edge_contrast(drift * damping, phase) >= edge_contrast(cosines, phase)
    return (1 + beyond) / (1 + draws)


def domain_jackknife(
    updates: list[np.ndarray], domain: np.ndarray, phase: list[int]
) -> dict[str, tuple[float, np.ndarray]]:
    """Return figures of all rows, and without the rows of each domain, by full SVDs.

    `updates` are the rows of each layer, `domain` the domain of each row, in numbers from 0. The figures are the mean
    |cos| of a phase, under "intra_cosine", and those of the spectrum of its first layer.
    """

    def figures(kept: np.ndarray) -> dict[str, float]:
        directions = [np.linalg.svd(rows[kept].astype(np.float64), full_matrices=False)[2][0] for rows in updates]
        s = np.linalg.svd(updates[phase[0]][kept].astype(np.float64), compute_uv=False)
        p = s**2 / (s**2).sum()
        return {
            "intra_cosine": float(np.mean([abs(directions[a] @ directions[b]) for a, b in combinations(phase, 2)])),
            "gamma": float(s[0]) * np.sqrt(len(kept) / kept.sum()),
            "effective_rank": entropy_rank(p),
            "effective_rank_roy": entropy_rank(s / s.sum()),
            "top10_energy": float(p[:10].sum()),
            "spectral_gap": float(s[0] / s[1]),
        }

    whole = figures(np.ones(len(domain), dtype=bool))
    without = [figures(domain != number) for number in range(domain.max() + 1)]
    return {name: (value, np.array([row[name] for row in without])) for name, value in whole.items()}


def state_figures(
    before: np.ndarray,
    after: np.ndarray,
    document: np.ndarray,
    position: np.ndarray,
    sink: np.ndarray,
    group: np.ndarray,
) -> dict[str, dict[str, float]]:
    """Return the figures of one state h_L (tokens, hidden) with the state after the block, by variant, in float64.

    group: that of the unit of each token; the even ones are one half.
    """
    h, update = before.astype(np.float64), after.astype(np.float64) - before.astype(np.float64)
    norms = np.linalg.norm(h, axis=1)
    out: dict[str, dict[str, float]] = {"centred": {}}
    for variant, chosen in (("raw", np.ones(len(h), dtype=bool)), ("sink_free", ~sink)):
        angles = []
        for t in range(len(h) - 2):
            rows = range(t, t + 3)
            if chosen[t : t + 3].all() and document[t] == document[t + 2] and position[t + 2] == position[t] + 2:
                a, b = (h[row + 1] - h[row] for row in rows[:2])
                if a.any() and b.any():
                    angles.append(math.acos(max(-1.0, min(1.0, a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))))
        linear, next_state = _held_out(h[chosen], update[chosen], group[chosen], h[chosen])
        out[variant] = {
            "stream_effective_rank": _rank_of(h[chosen]),
            "curvature": float(np.mean(angles)),
            "linearity": next_state,
            "update_linearity": linear,
        }
    out["raw"]["sink_norm_ratio"] = float(norms[position == 0].mean() / np.median(norms[position > 0]))
    kept = h[~sink]
    out["centred"]["stream_effective_rank"] = _rank_of(kept - kept.mean(axis=0))
    x = kept / np.sqrt((kept**2).mean(axis=1, keepdims=True))
    draw = np.random.default_rng(0)
    weights, bias = draw.standard_normal((h.shape[1], 512)) / math.sqrt(h.shape[1]), draw.standard_normal(512)
    bent = np.hstack([x, np.maximum(x @ weights + bias, 0)])
    out["sink_free"]["tokenwise_share"] = _held_out(bent, update[~sink], group[~sink], kept)[0]
    return out


def _rank_of(rows: np.ndarray) -> float:
    s = np.linalg.svd(rows, compute_uv=False)
    return entropy_rank(s**2 / (s**2).sum())


def _held_out(x: np.ndarray, y: np.ndarray, group: np.ndarray, h: np.ndarray) -> tuple[float, float]:
    """Return the held-out R^2 of ridge regression of y on x, and that of h + y by h and the same regression.

    The ridge, in multiples of the mean variance of x, is the best of those that are fitted on half of the training
    groups and tested on the others.
    """

    def fitted(rows: np.ndarray, ridge: float) -> Any:
        mean_x, mean_y = x[rows].mean(axis=0), y[rows].mean(axis=0)
        z = x[rows] - mean_x
        mu = ridge * (z**2).sum() / x.shape[1]
        coefficients = np.linalg.solve(z.T @ z + mu * np.eye(x.shape[1]), z.T @ (y[rows] - mean_y))
        return lambda other: y[other] - mean_y - (x[other] - mean_x) @ coefficients

    left = energy = energy_next = 0.0
    for side in (0, 1):
        train, test = group % 2 != side, group % 2 == side
        inner = [train & (group // 2 % 2 == part) for part in (0, 1)]
        ridges = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
        ridge = min(ridges, key=lambda ridge: (fitted(inner[0], ridge)(inner[1]) ** 2).sum())
        left += float((fitted(train, ridge)(test) ** 2).sum())
        energy += float(((y[test] - y[train].mean(axis=0)) ** 2).sum())
        energy_next += float((((h + y)[test] - (h + y)[train].mean(axis=0)) ** 2).sum())
    return 1 - left / energy, 1 - left / energy_next
