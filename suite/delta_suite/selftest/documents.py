"""Documents of a planted population: how alike their tokens are, and the stream that the tap would keep of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Float64

if TYPE_CHECKING:
    from delta_suite.capture.stream import ResidualStream

DOCUMENTS = 80
"""Documents of one repeat."""

SCALE, SPREAD = 0.3, 0.4
"""Documents differ in scale by 30%, and 14% of the variance inside a layer lies between documents."""

START = 3.0
"""Standard deviation of the entries of h_0, so that one update is a tenth to a fifth of the stream."""

SINK = 40.0
"""Length of a sink's update, in each layer, where ordinary ones have about 6."""

Layers = tuple[int, int]
"""First and last."""

ValueOf = Callable[[str, Layers, tuple[float, ...]], float]
"""A metric's true value over layers; of the law's for maps with these ridges, which no other figure has."""


class Population(ABC):
    """A population that documents are drawn from.

    Noise of token t of document j in layer L is s_j (z_t + SPREAD m_jL), z and m standard normal, s_j = exp(SCALE g_j):
    documents differ in scale (the same in all layers) and in mean, and tokens of one document are alike.
    """

    tokens: int
    """Tokens of each document."""
    sink: Float64[np.ndarray, " hidden"] | None = None
    """The direction in which the first token of each document, and one more, are pushed in every layer."""

    @property
    @abstractmethod
    def layers(self) -> int:
        """Return the number of layers."""

    @property
    @abstractmethod
    def hidden(self) -> int:
        """Return the number of hidden dimensions."""

    @abstractmethod
    def update(
        self,
        layer: int,
        state: Float64[np.ndarray, "tokens hidden"],
        noise: Float64[np.ndarray, "tokens hidden"],
        scale: Float64[np.ndarray, "tokens 1"],
    ) -> Float64[np.ndarray, "tokens hidden"]:
        """delta of a layer. `noise` is z + SPREAD m, before the documents' `scale`."""

    @abstractmethod
    def truth(self, draw: np.random.Generator, documents: int) -> ValueOf:
        """Return what every figure would be with unlimited text; `documents` are drawn for what has no closed form."""

    def states(
        self, draw: np.random.Generator, documents: int = DOCUMENTS
    ) -> list[Float32[np.ndarray, "tokens hidden"]]:
        """h_0 .. h_N of new documents."""
        document = np.arange(documents * self.tokens) // self.tokens
        shape = (len(document), self.hidden)
        scale = np.exp(SCALE * draw.standard_normal(documents))[document, None]
        sinks = np.arange(documents) * self.tokens
        sinks = np.concatenate([sinks, sinks + draw.integers(1, self.tokens, documents)])
        state = START * draw.standard_normal(shape)
        out = [state.astype(np.float32)]
        for layer in range(self.layers):
            noise = draw.standard_normal(shape) + SPREAD * draw.standard_normal((documents, self.hidden))[document]
            update = self.update(layer, state, noise, scale)
            if self.sink is not None:
                update[sinks] += SINK * self.sink
            state = state + update
            out.append(state.astype(np.float32))
        return out

    def stream(self, draw: np.random.Generator, documents: int = DOCUMENTS) -> ResidualStream:
        """Return the documents as the tap would keep them."""
        import torch

        from delta_suite.capture.stream import ResidualStream

        token = torch.arange(documents * self.tokens)
        return ResidualStream(
            [torch.from_numpy(state) for state in self.states(draw, documents)],
            token // self.tokens,
            token % self.tokens,
            torch.ones(len(token), dtype=torch.bool),
            "device",
        )


def unit(vectors: Float64[np.ndarray, "... hidden"]) -> Float64[np.ndarray, "... hidden"]:
    """Rows of length 1."""
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


def orthonormal(draw: np.random.Generator, hidden: int, count: int | None = None) -> Float64[np.ndarray, "rows hidden"]:
    """Random orthonormal rows; as many as dimensions, where no count is given."""
    return np.asarray(np.linalg.qr(draw.standard_normal((hidden, count or hidden)))[0].T)
