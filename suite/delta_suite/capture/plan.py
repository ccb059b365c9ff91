"""Plan of the batches of a capture, without torch.

It follows from token counts, the kind of device and the width of the model, never from free memory: padding and the
sequences beside it move a token's state in the seventh digit.
"""

from __future__ import annotations

from collections.abc import Sequence

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384, "mps": 4096}
"""Largest number of padded tokens of a batch, by device. Larger batches gave no speed-up."""

COPIES_PER_TOKEN = 6
"""Memory of a forward pass for each token, in outputs of the widest matrix of a block. Measured on 20 architectures:
dense blocks with sdpa take 2.5 to 5.9. Others take up to 60 (eager attention of long documents, scans of state-space
models without their kernels, experts); where memory runs out, the batch is halved."""

BATCH_BYTES = 6 << 30
"""Most memory that a batch is planned to take: what 16,384 tokens of Llama-70B in bfloat16 do."""

REFERENCE_DOCUMENTS = 64
"""Number of documents, the first of the calibration, over which the median norm is taken that sinks are told by."""


def tokens_per_batch(kind: str) -> int:
    """Return the largest number of padded tokens of a batch on a kind of device; "sharded" is several GPUs."""
    return TOKENS_PER_BATCH.get(kind, TOKENS_PER_BATCH["cuda"])


def planned_tokens(kind: str, bytes_per_output: int) -> int:
    """Return the padded tokens of a batch on a kind of device.

    bytes_per_output: size of the output of the widest matrix of a block, for one token.

    Example:
        >>> planned_tokens("cuda", 2 * 28672), planned_tokens("cuda", 2 * 53248), planned_tokens("cpu", 4 * 1536)
        (16384, 10082, 2048)
    """
    return max(1, min(tokens_per_batch(kind), BATCH_BYTES // (COPIES_PER_TOKEN * bytes_per_output)))


def plan_batches(lengths: Sequence[int], limit: int) -> list[range]:
    """Return the sequences of each batch, at most `limit` padded tokens or one sequence; the longest come first.

    Example:
        >>> plan_batches([50, 30, 20, 20], 100)
        [range(0, 2), range(2, 4)]
    """
    batches, start = [], 0
    while start < len(lengths):
        used = max(1, min(len(lengths) - start, limit // lengths[start]))
        batches.append(range(start, start + used))
        start += used
    return batches
