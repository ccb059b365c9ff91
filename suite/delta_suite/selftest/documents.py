"""Draw documents from a planted population, as the residual stream that the tap would record of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Float64

if TYPE_CHECKING:
    from delta_suite.capture.stream import ResidualStream

DOCUMENTS = 80
"""Number of documents in one repeat."""

SCALE, SPREAD = 0.3, 0.4
"""Spread of the log scale of documents (30%), and of document means (14% of a layer's variance)."""

DOMAIN_SCALE, DOMAIN_SPREAD = 0.3, 0.4
"""Spreads of domains, where a population has them: they differ as much as documents of one domain do."""

START = 3.0
"""Standard deviation of the entries of h_0; one update is then a tenth to a fifth of the stream."""

SINK = 40.0
"""Length of a sink's update in each layer; ordinary updates have a length of about 6."""

Layers = tuple[int, int]
"""The first and last layer of a scope."""

ValueOf = Callable[[str, Layers, tuple[float, ...]], float]
"""Function of a metric, layers and ridges that returns the true value; only metrics of the law depend on the ridges."""


class Population(ABC):
    """A population that documents are drawn from.

    The noise of token t of document j in layer L is s_j (z_t + SPREAD m_jL) with s_j = exp(SCALE g_j), where z, m and g
    are standard normal. So documents differ in scale (the same in all layers) and in mean, and tokens of one document
    are alike. Where there are domains, each has a scale exp(DOMAIN_SCALE g_k) and a mean DOMAIN_SPREAD m_kL more.

    Where tails are heavy, all of a token's noise in a layer is multiplied by one factor sqrt((tail - 2) / chi^2_tail),
    whose mean square is 1: a multivariate Student's t with the second moments of the normal.
    """

    tokens: int
    """Number of tokens in each document."""
    in_domain: int = 0
    """Number of documents of each domain; 0 where documents are independent."""
    tail: int | None = None
    """Degrees of freedom of the noise; None where it is normal. Above 4, so that energies have a variance."""
    copied: bool = False
    """True if every second document is a copy of the one before it."""
    sink: Float64[np.ndarray, " hidden"] | None = None
    """The direction in which every layer pushes two tokens of each document, the first and one more."""

    @property
    @abstractmethod
    def layers(self) -> int:
        """The number of layers."""

    @property
    @abstractmethod
    def hidden(self) -> int:
        """The number of hidden dimensions."""

    @abstractmethod
    def update(
        self,
        layer: int,
        state: Float64[np.ndarray, "tokens hidden"],
        noise: Float64[np.ndarray, "tokens hidden"],
        scale: Float64[np.ndarray, "tokens 1"],
    ) -> Float64[np.ndarray, "tokens hidden"]:
        """Return the update of a layer. `noise` is z + SPREAD m, not yet multiplied by the documents' `scale`."""

    @abstractmethod
    def truth(self, draw: np.random.Generator, documents: int) -> ValueOf:
        """Return the function that gives true values; `documents` are drawn for those without a closed form."""

    def states(
        self, draw: np.random.Generator, documents: int = DOCUMENTS
    ) -> list[Float32[np.ndarray, "tokens hidden"]]:
        """Return the states h_0 .. h_N of new documents."""
        document = np.arange(documents * self.tokens) // self.tokens
        shape = (len(document), self.hidden)
        scale = np.exp(SCALE * draw.standard_normal(documents))[document, None]
        domains = documents // self.in_domain if self.in_domain else 0
        if domains:
            scale = scale * np.exp(DOMAIN_SCALE * draw.standard_normal(domains))[document % domains, None]
        sinks = np.arange(documents) * self.tokens
        sinks = np.concatenate([sinks, sinks + draw.integers(1, self.tokens, documents)])
        state = START * draw.standard_normal(shape)
        out = [state.astype(np.float32)]
        for layer in range(self.layers):
            noise = draw.standard_normal(shape) + SPREAD * draw.standard_normal((documents, self.hidden))[document]
            if domains:
                noise += DOMAIN_SPREAD * draw.standard_normal((domains, self.hidden))[document % domains]
            if self.tail is not None:
                noise *= np.sqrt((self.tail - 2) / draw.chisquare(self.tail, len(document)))[:, None]
            update = self.update(layer, state, noise, scale)
            if self.sink is not None:
                update[sinks] += SINK * self.sink
            state = state + update
            out.append(state.astype(np.float32))
        if self.copied:
            for rounded in out:
                by_document = rounded.reshape(documents, self.tokens, self.hidden)
                by_document[1::2] = by_document[::2]
        return out

    def stream(self, draw: np.random.Generator, documents: int = DOCUMENTS) -> ResidualStream:
        """Return new documents as the residual stream that the tap would record."""
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


def domains_of(documents: int, in_domain: int) -> list[str]:
    """Return the domain of each document, as `Population.states` draws them; none where documents are independent.

    Example:
        >>> domains_of(4, in_domain=2)
        ['0', '1', '0', '1']
    """
    return [str(document % (documents // in_domain)) for document in range(documents)] if in_domain else []


def unit(vectors: Float64[np.ndarray, "... hidden"]) -> Float64[np.ndarray, "... hidden"]:
    """Return the vectors scaled to length 1."""
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


def orthonormal(draw: np.random.Generator, hidden: int, count: int | None = None) -> Float64[np.ndarray, "rows hidden"]:
    """Return `count` random orthonormal rows; by default as many as there are dimensions."""
    return np.asarray(np.linalg.qr(draw.standard_normal((hidden, count or hidden)))[0].T)
