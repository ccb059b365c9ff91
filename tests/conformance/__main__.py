"""`python -m tests.conformance`: every architecture through the capture; writes TABLE.md beside this file."""

from __future__ import annotations

import os
import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

from tests.conformance.build import Architecture, architectures
from tests.conformance.check import Verdict, examine

TABLE = Path(__file__).with_name("TABLE.md")

SECTIONS = {
    "AutoModelForCausalLM": "Causal language models",
    "AutoModelForSeq2SeqLM": "Encoder-decoders and speech models, the text decoder",
    "AutoModelForImageTextToText": "Multimodal models, the text decoder",
}

REFUSALS = {
    "has shape": "the stream is not (batch, time, hidden): several side by side, or of a length of its own",
    "causality fails": "a token sees what follows it",
    "reads": "the encoder reads no text",
    "does not run on token ids alone": "needs more than text",
    "fire count fails": "a block does not run once for each text",
    "cannot be told by structure": "several stacks of blocks, and which is the stream's is open",
    "continuity fails": "something acts on the stream between the blocks",
    "final norm fails": "the model does not end with its stream",
}
"""Short reason for a refusal, by a part of its message."""


NOTES = {
    "blt": "bytes and patches of bytes go through stacks of different lengths, one inside the other",
    "cpmant": "a prompt of its own comes first, and all behind it is read in both directions",
    "deepseek_v4": "four streams side by side, mixed at every block (hyper-connections)",
    "gemma3n_text": "four versions of the stream, one of them active at a time (AltUp)",
    "hrm_text": "two stacks, each run several times in turn: a block is not one layer",
    "hy_v4": "four streams side by side, mixed at every block (hyper-connections)",
    "inkling2_text": "every few blocks the stream starts anew, and earlier ones are attended to, also after the last",
    "qwen4_exp": "four streams in one vector of four times the width (hyper-connections)",
    "qwen4_exp_text": "the same",
    "reformer": "two streams, each block's updates going to both in turn (reversible)",
}
"""Reason why a causal type that is refused has no single residual stream, from the source of transformers."""


def main(only: Iterable[str]) -> int:
    """Examine all types, or those named without writing the table. Return 1 if a capture was wrong."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    chosen = set(only)
    started = time.perf_counter()
    verdicts = []
    for architecture in architectures():
        if not chosen or architecture.model_type in chosen:
            verdict = examine(architecture)
            verdicts.append(verdict)
            if chosen or verdict.outcome == "wrong":
                print(f"{verdict.outcome}: {architecture.model_type} ({architecture.class_name}): {verdict.reason}")
    if not chosen:
        TABLE.write_text(table(verdicts), "utf-8")
    print(f"{summary(verdicts)} {time.perf_counter() - started:.0f} s")
    return int(any(verdict.outcome == "wrong" for verdict in verdicts))


def summary(verdicts: list[Verdict]) -> str:
    count = Counter(verdict.outcome for verdict in verdicts)
    built = len(verdicts) - count["not built"]
    one_stream = built - sum(verdict.outcome == "refused" and "has shape" in verdict.reason for verdict in verdicts)
    share = 100 * count["supported"] / max(1, built)
    share_of_one_stream = 100 * count["supported"] / max(1, one_stream)
    return (
        f"{count['supported']} of {built} types that build are supported without override ({share:.1f}%; "
        f"{share_of_one_stream:.1f}% of those with one stream of shape (batch, time, hidden)), {count['refused']} are "
        f"refused, {count['wrong']} are wrong; {count['not built']} do not build."
    )


def table(verdicts: list[Verdict]) -> str:
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    lines = [
        "# Architectures: which decoders the capture supports",
        "",
        f"**{summary(verdicts)}** {versions}; {datetime.now(UTC):%Y-%m-%d}.",
        "",
        "Made by `python -m tests.conformance`. Each type that transformers' auto classes know is built from a tiny",
        "random config (4 blocks) and sent through `find_decoder`, `capture` and the certificate, with three documents",
        "of different lengths in one padded batch (one after the other where the model takes none, as XLNet does not).",
        "*Supported*: every identity of the certificate holds; each document run alone, unpadded, gives the same",
        "h_0 .. h_N; and h_0 .. h_{N-1} equal `output_hidden_states` of the whole model, all within 1e-5 in float32.",
        "*Attention and MLP*: whether what the two write can be told apart, with its own identity of the certificate:",
        "in turn, in parallel, or why not.",
        "*Refused*: an error of the suite says why. *Wrong*: states were given out that differ from the model's own;",
        "there must be none.",
        "",
    ]
    apart = sum(verdict.writes in {"in turn", "parallel"} for verdict in verdicts)
    lines += [f"Attention and MLP are told apart in {apart} of those that are supported.", ""]
    causal = [verdict for verdict in verdicts if verdict.architecture.mapping == "AutoModelForCausalLM"]
    lines += [
        f"Causal language models alone: {summary(causal)}",
        "BERT and its kin, XLM and XLNet are built as the decoders that their configs can make of them.",
        "The aim was 95% of those that build. What is left is not causal, or has no single stream to give out, and",
        "could be supported only by calling something else a residual stream:",
        "",
        *(
            f"- {verdict.architecture.model_type}: {NOTES.get(verdict.architecture.model_type, _words(verdict))}"
            for verdict in causal
            if verdict.outcome == "refused"
        ),
        "",
        "Refused among the others:",
        "",
        *_remaining([verdict for verdict in verdicts if verdict not in causal]),
        "",
    ]
    for mapping, title in SECTIONS.items():
        section = [verdict for verdict in verdicts if verdict.architecture.mapping == mapping]
        lines += [f"## {title}", "", f"{summary(section)}", ""]
        lines += ["| type | class | verdict | reason | after the last block | attention and MLP |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        lines += [_row(verdict) for verdict in section]
        lines.append("")
    lines += ["## What the refused are told", ""]
    for verdict in verdicts:
        if verdict.outcome == "refused":
            lines.append(
                f"- **{verdict.architecture.model_type}** ({verdict.architecture.class_name}): {verdict.reason}"
            )
    return "\n".join(lines) + "\n"


def _remaining(verdicts: list[Verdict]) -> list[str]:
    """List the refused types by reason, the most frequent reason first."""
    by_reason: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.outcome == "refused":
            by_reason.setdefault(_words(verdict), []).append(verdict.architecture.model_type)
    return [
        f"- {words}: {', '.join(types)}"
        for words, types in sorted(by_reason.items(), key=lambda reason: -len(reason[1]))
    ]


def _words(verdict: Verdict) -> str:
    return next(words for text, words in REFUSALS.items() if text in verdict.reason)


def _row(verdict: Verdict) -> str:
    reason = verdict.reason
    if verdict.outcome == "refused":
        reason = _words(verdict)
    architecture: Architecture = verdict.architecture
    cells = (
        architecture.model_type,
        architecture.class_name,
        verdict.outcome,
        reason[:200],
        verdict.norm,
        verdict.writes,
    )
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
