"""Simulate a measurement on many GPUs, from rates that were measured on one.

    python examples/scale.py                                  # 10^8 tokens, two models, 8 to 512 GPUs
    python examples/scale.py --design owners --model 32b --gpus 64

It is arithmetic, and no run: docs/scale.md says which rates were measured, which are assumed, and what it leaves out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

GROUPS, SETS, VARIANTS = 20, 2, 3
"""Groups of units, sets of rows (sinks are kept apart), and variants that are solved."""

STATE_SHARE, MOMENTS_SHARE = 0.5, 0.25
"""Shares of free memory that the stream and moments between shards take."""

BATCH_TOKENS, BATCH_BYTES, COPIES = 16_384, 6 << 30, 6
"""The plan of batches, as in capture/plan.py."""


EIGEN = ((576, 6.5e-3), (2047, 28e-3), (4096, 127e-3), (5120, 217e-3), (8192, 627e-3))

DESIGNS = {
    "held": "each process holds the moments of all groups, and they are merged once: as it is built",
    "domains": "each process has whole domains, and holds the moments of their groups alone",
    "owners": "the moments of a layer lie in one process, to which each shard's are added",
}


@dataclass(frozen=True)
class Rates:
    """What one GPU and its links do. The first four were measured, the last two are assumed."""

    forward: float = 479e12
    """Operations a second of a forward pass: 2,048 tokens of a 32B shape in 267 ms."""
    gram: float = 8192 * 5120**2 / 4.6e-3
    """Token times hidden^2 a second of a Gram matrix in float64, upper blocks: 8,192 x 5,120 in 4.6 ms."""
    product: float = 63.5e12
    """Operations a second of a large product in float64."""
    eigen: tuple[tuple[int, float], ...] = EIGEN
    """Size and seconds of eigenproblems in float64."""
    nvlink: float = 300e9
    """Bytes a second between the GPUs of a host, each."""
    network: float = 40e9
    """Bytes a second between hosts, each GPU."""

    def eigh(self, size: int) -> float:
        """Return the seconds of an eigenproblem, between those measured; above them they grow as the cube."""
        below = [point for point in self.eigen if point[0] <= size]
        above = [point for point in self.eigen if point[0] > size]
        if not below:
            return self.eigen[0][1]
        if not above:
            return below[-1][1] * (size / below[-1][0]) ** 3
        (n, seconds), (m, more) = below[-1], above[0]
        return seconds + (more - seconds) * (size**3 - n**3) / (m**3 - n**3)


@dataclass(frozen=True)
class Model:
    """The shape of a model, without embedding and head, which the capture does not run."""

    parameters: float
    layers: int
    hidden: int
    widest: int

    @property
    def bytes(self) -> float:
        """Size in bfloat16."""
        return 2 * self.parameters

    @property
    def moment(self) -> float:
        """Size of one matrix of moments."""
        return 8.0 * self.hidden**2

    @property
    def state(self) -> float:
        """Size of the stream of one token in bfloat16."""
        return 2.0 * self.hidden * (self.layers + 1)

    @property
    def batch(self) -> int:
        """Number of tokens of a batch."""
        return min(BATCH_TOKENS, BATCH_BYTES // (COPIES * 2 * self.widest))


MODELS = {"32b": Model(31.2e9, 64, 5120, 25_600), "405b": Model(401.6e9, 126, 16_384, 53_248)}
"""Qwen3-32B and Llama-3.1-405B."""


@dataclass(frozen=True)
class Prediction:
    """Seconds, bytes and what bounds a measurement."""

    forward: float
    """Seconds of the forward passes alone, with nothing waited for, of one pass over the tokens."""
    gathering: float
    """Seconds of bringing weights, of one pass; they run beside the forward pass."""
    moments: float
    merge: float
    analysis: float
    passes: int
    """Passes over the tokens, because memory holds the moments of so few layers at once."""
    merged_bytes: float
    """What every process gives to the merge."""
    memory: float
    """Bytes of weights and a batch on each GPU."""
    fits: bool

    @property
    def seconds(self) -> float:
        """Seconds in all, without load and hashing."""
        return self.passes * max(self.forward, self.gathering) + self.moments + self.merge + self.analysis

    @property
    def efficiency(self) -> float:
        """Share of the forward pass in the whole."""
        return self.forward / self.seconds


def one_gpu(model: Model, tokens: float, rates: Rates, *, eigh: float | None = None) -> float:
    """Return the seconds of capture and one variant on one GPU, without intervals, as results/benchmarks.md has them.

    eigh: the seconds of one eigenproblem on that GPU, where they were measured there.
    """
    forward = 2 * model.parameters * tokens / rates.forward
    gram = model.layers * tokens * model.hidden**2 / rates.gram
    return forward + gram + model.layers * (rates.eigh(model.hidden) if eigh is None else eigh)


def predict(
    model: Model, tokens: float, gpus: int, rates: Rates, *, memory: float = 80e9, design: str = "held"
) -> Prediction:
    """Return what a measurement over processes of FSDP takes, with `gpus` GPUs, 8 to a host, in one of the DESIGNS."""
    link = rates.nvlink if gpus <= 8 else rates.network
    # Its share, and two blocks that are gathered.
    used = model.bytes / gpus + 2 * model.bytes / model.layers + BATCH_BYTES
    free = max(0.0, memory - used)
    stream = tokens / gpus * model.state
    shards = max(1.0, stream / (STATE_SHARE * free)) if free else 1.0
    everything = GROUPS * SETS * model.moment
    held = {"held": everything, "domains": min(1.0, 1 / GROUPS + 1 / gpus) * everything, "owners": everything / gpus}
    given = {"held": 1.0, "domains": held["domains"] / everything, "owners": shards}
    # A stream that is whole is reduced layer by layer, and each layer's moments go at once.
    at_once = model.layers if shards == 1.0 else min(model.layers, int(MOMENTS_SHARE * free // held[design]))
    merged = given[design] * model.layers * everything
    solve = rates.eigh(model.hidden) + 4 * GROUPS * model.hidden**3 / rates.product
    return Prediction(
        forward=2 * model.parameters * tokens / rates.forward / gpus,
        gathering=tokens / (gpus * model.batch) * model.bytes * (gpus - 1) / gpus / link,
        moments=model.layers * tokens * model.hidden**2 / rates.gram / gpus,
        merge=merged / link,
        analysis=-(-model.layers // gpus) * VARIANTS * solve,
        passes=-(-model.layers // at_once) if at_once else 0,
        merged_bytes=merged,
        memory=used,
        fits=used < memory and at_once > 0,
    )


def row(name: str, gpus: int, told: Prediction) -> str:
    """Return a prediction as a row of a table in Markdown."""
    if not told.fits:
        why = "the moments of one layer do not fit" if told.memory < 80e9 else "the weights do not fit"
        return f"| {name} | {gpus} | {told.memory / 1e9:.0f} GB | {why} |" + " |" * 5
    return (
        f"| {name} | {gpus} | {told.memory / 1e9:.0f} GB | {told.passes} x {told.forward:,.0f} s "
        f"| {told.passes} x {told.gathering:,.0f} s | {told.moments:,.0f} s "
        f"| {told.merged_bytes / 1e12:,.1f} TB, {told.merge:,.0f} s | {told.analysis:,.0f} s | {told.efficiency:.0%} |"
    )


def main(words: Sequence[str] | None = None) -> None:
    """Print a table of predictions, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), action="append")
    parser.add_argument("--tokens", type=float, default=1e8)
    parser.add_argument("--gpus", type=int, action="append")
    parser.add_argument("--memory-gb", type=float, default=80)
    parser.add_argument("--design", choices=list(DESIGNS), action="append")
    chosen = parser.parse_args(words)
    for design in chosen.design or DESIGNS:
        print(f"{chosen.tokens:.0e} tokens; {DESIGNS[design]}:\n")
        print("| model | GPUs | weights and batch | forward | gathering | moments | merge | analysis | efficiency |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for name in chosen.model or MODELS:
            for gpus in chosen.gpus or (8, 64, 512):
                options = {"memory": chosen.memory_gb * 1e9, "design": design}
                print(row(name, gpus, predict(MODELS[name], chosen.tokens, gpus, Rates(), **options)))
        print()


if __name__ == "__main__":
    main()
