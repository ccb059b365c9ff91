"""Planted models whose directions matter to the loss or do not, so that claims about causes have known answers.

A model works on each token alone. Its stream has three parts: what the token is (WIDTH dimensions, to which the blocks
listen), what C writes and what E writes (as many each, which only the head reads). Block L adds

    (b_L + g_L tanh(w_L . token)) v_L + N_L token

with v_L in its phase's part, and a small random map N_L into the rest of that part: energy that lies lower in the
spectrum than v_L, and that nothing reads. Where the law is planted, or maps of single layers in its place, N_L is a
rotation into all of the part, and the head reads all of it.

The next token of a document is drawn from a softmax of scores that depend on the token alone. Where the scores are the
model's, its loss rises without what the head reads. Between its scores with that and without it there is a point at
which the loss without it is the same, but for the chance of the documents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64
from scipy.special import log_softmax

from delta_suite.capture.units import Units
from delta_suite.claims.schema import Expectation
from delta_suite.selftest.documents import DOCUMENTS, Population, ValueOf, orthonormal

if TYPE_CHECKING:
    from delta_suite.capture.stream import ResidualStream
    from delta_suite.reduction.losses import Causes

WIDTH, VOCABULARY = 8, 40
"""Width of each of the three parts of the stream, and number of tokens."""

CAUSE_C, CAUSE_E = (1, 3), (4, 6)
"""The first and last layer of phases C and E."""

PHASES = {"C": CAUSE_C, "E": CAUSE_E}

DEPTH = 8

CAUSE_TOKENS = 24
"""Number of tokens in a document."""

STRENGTH, LOWER, READ = 1.0, 0.15, 0.5
"""Length of an update along v_L; standard deviation of the entries of N_L; standard deviation of a score for an update
of length 1."""

ROUNDS, HALVINGS = 3, 16
"""Rounds over both phases, and halvings in each, in which the scores are sought at which directions are idle."""


@dataclass(frozen=True)
class Caused(Population):
    """A model, and the scores that its documents are drawn from."""

    embedding: Float64[np.ndarray, "vocabulary hidden"]
    directions: Float64[np.ndarray, "layers hidden"]
    """v_L."""
    readers: Float64[np.ndarray, "layers hidden"]
    """w_L."""
    constants: Float64[np.ndarray, " layers"]
    """b_L."""
    gammas: Float64[np.ndarray, " layers"]
    """g_L."""
    lower: Float64[np.ndarray, "layers hidden hidden"]
    """N_L."""
    head: Float64[np.ndarray, "vocabulary hidden"]
    unread: Float64[np.ndarray, "vocabulary hidden"]
    """Head of what the scores of the documents have more than the model's."""
    lawful: bool = False
    """True where the law is fitted, and put in place of the updates."""
    tokens: int = CAUSE_TOKENS

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.directions)

    @property
    def hidden(self) -> int:
        """The number of hidden dimensions."""
        return int(self.directions.shape[1])

    def update(self, layer: int, state: np.ndarray, noise: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Return the update of one layer; there is no noise but that of the documents."""
        along = self.constants[layer] + self.gammas[layer] * np.tanh(state @ self.readers[layer])
        return np.asarray(along[:, None] * self.directions[layer] + state @ self.lower[layer].T)

    def truth(self, draw: np.random.Generator, documents: int) -> ValueOf:
        """Raise, as no interval is compared with a true value here."""
        raise NotImplementedError

    def sharing(self, phase: str) -> float:
        """Return the true `causal_sharing` over a phase: of unlimited text, with directions fitted on as much.

        Blocks listen to no block, so that what a change takes away from an update is gone from the last state.
        """
        states, (first, last) = self._states(), PHASES[phase]
        updates = np.diff(states, axis=0)[first : last + 1]
        chance = np.exp(log_softmax(states[-1] @ (self.head + self.unread).T, axis=1))
        fitted, predicted = _visits(chance, self.tokens - 1), _visits(chance, self.tokens - 2)
        moments = np.einsum("t,lti,ltj->lij", fitted, updates, updates)
        directions = np.linalg.eigh(moments)[1][:, :, -1]
        common = np.linalg.svd(directions, full_matrices=False)[2][0]

        def loss(taken: np.ndarray) -> float:
            """Return the loss, but for a factor, without what the updates hold along one direction each."""
            gone = np.einsum("lti,li,lj->tj", updates, taken, taken)
            return -float(predicted @ (chance * log_softmax((states[-1] - gone) @ self.head.T, axis=1)).sum(axis=1))

        base = loss(np.zeros_like(directions))
        return float((loss(np.tile(common, (len(directions), 1))) - base) / (loss(directions) - base))

    def states(self, draw: np.random.Generator, documents: int = DOCUMENTS) -> list[Any]:
        """Return the states h_0 .. h_N of new documents."""
        ids = self.drawn(draw, documents).ravel()
        return [state[ids].astype(np.float32) for state in self._states()]

    def _states(self) -> list[np.ndarray]:
        """Return the states of every token of the vocabulary."""
        states = [self.embedding]
        for layer in range(self.layers):
            states.append(states[-1] + self.update(layer, states[-1], np.zeros(0), np.zeros(0)))
        return states

    def drawn(self, draw: np.random.Generator, documents: int) -> np.ndarray:
        """Return the token ids of new documents, (documents, tokens)."""
        scores = self._states()[-1] @ (self.head + self.unread).T
        chance = np.exp(scores - scores.max(axis=1, keepdims=True))
        below = np.cumsum(chance / chance.sum(axis=1, keepdims=True), axis=1)
        ids = draw.integers(0, VOCABULARY, (documents, self.tokens))
        for place in range(1, self.tokens):
            after = (below[ids[:, place - 1]] < draw.random(documents)[:, None]).sum(axis=1)
            ids[:, place] = np.minimum(after, VOCABULARY - 1)
        return np.asarray(ids)

    def causes(self, draw: np.random.Generator, stream: ResidualStream, units: Units) -> Causes:
        """Return the losses under the interventions, of the documents that this draw has given the stream of."""
        import torch

        from delta_suite.capture.sinks import find_sinks
        from delta_suite.capture.tokens import TokenSequences
        from delta_suite.models.blocks import Decoder
        from delta_suite.reduction.causal_passes import CausalFit, Runnable, measure_causes
        from delta_suite.reduction.law_fit import measure_law

        ids = torch.from_numpy(self.drawn(draw, len(stream.document) // self.tokens))
        model = _module(self)
        fit = CausalFit.of(PHASES)
        fit.no_law = "no law is planted in this model"
        sinks = find_sinks(stream)
        entering = stream.kept & ~sinks.dropped
        subject = Runnable(
            model=model,
            decoder=Decoder(model, tuple(model.blocks), "blocks"),
            sequences=TokenSequences(tuple(ids), tuple(range(len(ids))), (True,) * len(ids), drop_first_token=False),
            device=torch.device("cpu"),
            batch_tokens=ids.numel(),
        )
        with torch.no_grad():
            fit.fit(lambda layers: [stream], entering, stream.document, units, [torch.device("cpu")])
            if self.lawful:
                measure_law(stream, fit.phases, units=units, sinks=sinks, collect=fit.collect)
        return measure_causes(subject, fit, units, entering)


def sharing_is_as_claimed(population: Caused, claim: Expectation) -> bool:
    """Return True if a claim on `causal_sharing` is true of a model.

    The three v_L of E are as long in the mean over draws, and unrelated, so that one direction has a third of their
    effect. But a draw has 40 tokens and three random directions of the head, and in a quarter of the draws one
    direction truly has more than half. To support the claim there would be an error.
    """
    other, required = claim.than, claim.threshold
    if other is not None:
        assert other.scope is not None
        required = other.required(population.sharing(other.scope))
    assert required is not None
    margin = population.sharing(claim.scope) - required
    return margin >= 0 if claim.rising else margin <= 0


def _visits(chance: np.ndarray, steps: int) -> np.ndarray:
    """Return how often each token is expected at the so many places after the first, given what follows each."""
    at, often = np.full(VOCABULARY, 1 / VOCABULARY), np.zeros(VOCABULARY)
    for _ in range(steps):
        at = at @ chance
        often += at
    return often


def _module(population: Caused) -> Any:
    """Return the model as a module of torch."""
    import torch
    from torch import Tensor, nn

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).float()

    class Block(nn.Module):
        """One layer of the model."""

        def __init__(self, layer: int) -> None:
            super().__init__()
            self.direction, self.reader = tensor(population.directions[layer]), tensor(population.readers[layer])
            self.lower = tensor(population.lower[layer])
            self.constant, self.gamma = float(population.constants[layer]), float(population.gammas[layer])

        def forward(self, hidden_states: Tensor) -> Tensor:
            along = self.constant + self.gamma * torch.tanh(hidden_states @ self.reader)
            return hidden_states + along[..., None] * self.direction + hidden_states @ self.lower.T

    class Model(nn.Module):
        """The whole model, with its head."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, population.hidden, _weight=tensor(population.embedding))
            self.blocks = nn.ModuleList([Block(layer) for layer in range(population.layers)])
            self.head = tensor(population.head)

        def get_input_embeddings(self) -> Any:
            return self.embedding

        def forward(self, input_ids: Tensor) -> Any:
            state = self.embedding(input_ids)
            for block in self.blocks:
                state = block(state)
            return SimpleNamespace(logits=state @ self.head.T)

    return Model().eval()


def _planted(draw: np.random.Generator, *, shared: str = "", constant: str = "", width: int = WIDTH) -> Caused:
    """Return a model whose v_L all matter.

    shared: the phases whose v_L are one direction; those of the others are orthogonal. constant: the phases that write
    along v_L the same on every token. width: that of each part.
    """
    hidden = 3 * width
    directions, lower = np.zeros((DEPTH, hidden)), np.zeros((DEPTH, hidden, hidden))
    readers, gammas, constants = np.zeros((DEPTH, hidden)), np.zeros(DEPTH), np.zeros(DEPTH)
    embedding, head = np.zeros((VOCABULARY, hidden)), np.zeros((VOCABULARY, hidden))
    embedding[:, :width] = draw.standard_normal((VOCABULARY, width))
    head[:, :width] = READ / 2 * draw.standard_normal((VOCABULARY, width))
    for number, (name, (first, last)) in enumerate(PHASES.items(), start=1):
        part = slice(number * width, (number + 1) * width)
        count = 1 if name in shared else last - first + 1
        basis = orthonormal(draw, width)
        head[:, part] = READ * draw.standard_normal((VOCABULARY, count)) @ basis[:count]
        for layer in range(first, last + 1):
            directions[layer, part] = basis[(layer - first) % count]
            readers[layer, :width] = 2.0 * orthonormal(draw, width, 1)[0]
            lower[layer, part, :width] = LOWER * basis[count:].T @ draw.standard_normal((width - count, width))
            (constants if name in constant else gammas)[layer] = STRENGTH
    return Caused(embedding, directions, readers, constants, gammas, lower, head, np.zeros_like(head))


def _mapped(draw: np.random.Generator, *, shared: bool) -> Caused:
    """Return a model whose layers write rotations of the token: of each phase the same one and v_L, or each another.

    Its parts are wide and tokens fill them evenly, so that one direction holds little of a rotation.
    """
    width = 2 * WIDTH
    model = _planted(draw, width=width)
    embedding, head, lower = model.embedding.copy(), model.head.copy(), np.zeros_like(model.lower)
    embedding[:, :width] = VOCABULARY**0.5 * orthonormal(draw, VOCABULARY, width).T
    for number, (first, last) in enumerate((CAUSE_C, CAUSE_E), start=1):
        part = slice(number * width, (number + 1) * width)
        head[:, part] = READ * draw.standard_normal((VOCABULARY, width))
        common = orthonormal(draw, width)
        for layer in range(first, last + 1):
            lower[layer, part, :width] = STRENGTH / width**0.5 * (common if shared else orthonormal(draw, width))
    gammas = model.gammas if shared else np.zeros_like(model.gammas)
    return replace(model, embedding=embedding, lower=lower, head=head, gammas=gammas, lawful=True)


def law(draw: np.random.Generator) -> Caused:
    """Return a model whose layers obey the law: one map in each phase, and a direction in each layer; all matter."""
    return _mapped(draw, shared=True)


def own_maps(draw: np.random.Generator) -> Caused:
    """Return a model in which each layer has a map to itself and no direction, which matters: there is no law.

    What the law saves of its loss is what one direction and chance likeness of the maps hold: about 0.4, at times 0.5.
    """
    return _mapped(draw, shared=False)


def causes(draw: np.random.Generator) -> Caused:
    """Return a model in which C writes along one shared direction, and each layer of E along another; all matter."""
    return _planted(draw, shared="C")


def exchanged(draw: np.random.Generator) -> Caused:
    """Return a model in which E shares a direction, along which it writes the same on every token, and C shares none.

    Constants along several directions would be one direction, their sum, so that they cannot stand for C.
    """
    return _planted(draw, shared="E", constant="E")


def constant(draw: np.random.Generator) -> Caused:
    """Return a model in which C writes the same on every token, along one direction, and that matters."""
    return _planted(draw, shared="C", constant="C")


def idle(draw: np.random.Generator) -> Caused:
    """Return a model whose head reads the v_L, but whose loss is the same without those of either phase.

    A part of what the head reads of each phase is missing in the scores of the documents, about a half: the one with
    which the true effect of taking the v_L away is 0.
    """
    matters = _planted(draw)
    state = matters._states()[-1]
    parts = [slice(number * WIDTH, (number + 1) * WIDTH) for number in range(3)]
    token, *read = (state[:, part] @ matters.head[:, part].T for part in parts)
    kept = [0.5, 0.5]

    def effect(phase: int) -> float:
        """Return the true effect of taking the v_L of a phase away from all tokens of a document but the first."""
        chance = np.exp(log_softmax(token + kept[0] * read[0] + kept[1] * read[1], axis=1))
        often = _visits(chance, CAUSE_TOKENS - 2)
        whole = token + read[0] + read[1]
        gain = log_softmax(whole, axis=1) - log_softmax(whole - read[phase], axis=1)
        return float(often @ (chance * gain).sum(axis=1))

    for _ in range(ROUNDS):  # each phase changes what documents hold, and so the other's effect, a little
        for phase in (0, 1):
            low, high = 0.0, 1.0
            for _ in range(HALVINGS):
                kept[phase] = (low + high) / 2
                low, high = (low, kept[phase]) if effect(phase) > 0 else (kept[phase], high)
    unread = np.zeros_like(matters.head)
    for phase in (0, 1):
        unread[:, parts[1 + phase]] = (kept[phase] - 1.0) * matters.head[:, parts[1 + phase]]
    return replace(matters, unread=unread)
