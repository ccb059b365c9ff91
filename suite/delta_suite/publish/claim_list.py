"""The claims of hypothesis files as text: what each says, the threshold it is held to, and where that comes from."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from delta_suite.claims.schema import Expectation, Hypothesis

WIDTH = 100
"""Characters of a line."""


def claim_list(hypotheses: Sequence[Hypothesis]) -> str:
    """Return the claims of hypotheses, each with its threshold, its origin, and file and line."""
    return "\n\n".join(_hypothesis(hypothesis) for hypothesis in hypotheses)


def _hypothesis(hypothesis: Hypothesis) -> str:
    head = f"{hypothesis.id}: {' '.join(hypothesis.title.split())}"
    where = f"version {hypothesis.version}, {hypothesis.path}"
    return "\n".join([head, f"  {where}", *(_claim(claim) for claim in hypothesis.expect)])


def _claim(claim: Expectation) -> str:
    warns = "; a refutation only warns" if claim.severity == "warn" else ""
    text = f"{claim.id} (line {claim.line}): {claim.claim()}{warns}"
    return "\n".join([_wrapped(text, 2), _wrapped(f"origin: {' '.join(claim.origin.split())}", 6)])


def _wrapped(text: str, indent: int) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + 4), break_long_words=False
    )
