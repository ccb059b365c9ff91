"""The token sequences of a calibration, and what of them is not its text."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from delta_suite.capture.calibration import Calibration
from delta_suite.errors import CalibrationError, brief
from delta_suite.models.tokenizer import deleted_share, encode, has_chat_template, lost_share, special_ids, unknown_ids

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor

    _Ids = array[int]  # eight bytes an id, where a list takes 36: a calibration may have 10^8
MAX_TOKENS = 2048
"""Longest sequence that runs through a model, the `max_length` of the reference script; longer documents run in
pieces."""

UNKNOWN_REFUSED = 0.5
"""Share of unknown tokens above which nothing is measured: most of what would run is not the text."""

NAMED = 8
"""Most special tokens at either end of the documents that are named."""

SpecialTokens = tuple[tuple[str, int], ...]
"""Special tokens in order, each with its id."""


@dataclass(frozen=True)
class TokenSequences:
    """Token sequences to run: pieces of documents, longest first, so that memory runs out at the start or never."""

    ids: tuple[Int64[Tensor, " tokens"], ...]
    """The token ids of each piece."""
    documents: tuple[int, ...]
    """The document of each piece."""
    starts_document: tuple[bool, ...]
    """True for each piece that holds the first token of its document."""
    drop_first_token: bool
    """True if the first token of each document is dropped from the stream."""
    unknown: float = 0.0
    """Share of the tokens, without dropped ones, that stand for what the tokenizer does not know; where that is more,
    the share of letters and digits that it deletes, or has no token for."""
    begins_with: SpecialTokens = ()
    """Special tokens that every document begins with, such as BOS."""
    ends_with: SpecialTokens = ()
    """Special tokens that every document ends with; none where one was cut."""

    def dealt(self, rank: int, size: int) -> TokenSequences:
        """Return the pieces of one of several processes. They are dealt in turn, so each has nearly as many tokens."""
        mine = slice(rank, None, size)
        return replace(
            self, ids=self.ids[mine], documents=self.documents[mine], starts_document=self.starts_document[mine]
        )

    def of(self, documents: Collection[int]) -> TokenSequences:
        """Return the pieces of these documents, which keep their numbers."""
        pieces = [piece for piece, document in enumerate(self.documents) if document in documents]
        return replace(
            self,
            ids=tuple(self.ids[piece].clone() for piece in pieces),  # a view would travel with all of its document
            documents=tuple(self.documents[piece] for piece in pieces),
            starts_document=tuple(self.starts_document[piece] for piece in pieces),
        )

    @property
    def dropped(self) -> int:
        """Number of tokens that run and do not enter the metrics."""
        return sum(self.starts_document) if self.drop_first_token else 0

    @property
    def tokens(self) -> int:
        """Number of all tokens that run through the model, dropped ones included."""
        return sum(len(ids) for ids in self.ids)


def tokenize(
    calibration: Calibration, tokenizer: Any, vocabulary: int, context: int | None, *, chat_template: bool = False
) -> TokenSequences:
    """Return the token sequences of the documents, with the special tokens that the tokenizer adds.

    A document that is longer than MAX_TOKENS, or than the `context` of the model, runs in pieces of that length; of
    `seed` only the first piece is kept, as the reference script does.

    vocabulary: how many ids the model embeds.
    chat_template: each document is one message of a user in the model's own chat template, which then writes the
        special tokens.

    Raises CalibrationError where the tokenizer fails, gives other ids than the model embeds, or answers a text in two
    ways; where fewer than two tokens remain, or more than UNKNOWN_REFUSED of them are unknown; where all documents are
    the same tokens; and where the model has no chat template to apply.
    """
    import torch

    if context is not None and context < 2:
        raise CalibrationError(
            f"the model's config says max_position_embeddings = {context}, and no document of one token can be "
            f"measured. Correct it in the model's config.json."
        )
    if chat_template and not has_chat_template(tokenizer):
        raise CalibrationError(
            "--chat-template: the model brings no chat template (neither chat_template.jinja nor `chat_template` in "
            "tokenizer_config.json). Measure it without the option, or save its template there."
        )
    limit = min(MAX_TOKENS, context or MAX_TOKENS)
    dropped = int(calibration.drop_first_token)
    whole = [
        _document_ids(calibration, document, tokenizer, vocabulary, chat_template=chat_template)
        for document in range(len(calibration.documents))
    ]
    most = limit if dropped else None
    ran = [ids[:most] for ids in whole]
    kept = sum(len(ids) - dropped for ids in ran)
    if kept < 2:
        raise CalibrationError(
            f"calibration {calibration.name!r} leaves {kept} token(s) under this model's tokenizer; "
            f"a spectrum needs at least 2. Give it more text."
        )
    before, after = (0, 0) if chat_template else _added(tokenizer, calibration.documents[0], whole[0])
    unknown = unknown_ids(tokenizer)
    if unknown:
        of_text = (ids[max(before, dropped) : len(all_ids) - after] for all_ids, ids in zip(whole, ran, strict=True))
        share = sum(token in unknown for ids in of_text for token in ids) / kept
    else:
        share = lost_share(tokenizer, calibration.documents)
    deleted = deleted_share(tokenizer, calibration.documents)
    _check_text(calibration, ran, share, _named(tokenizer, sorted(unknown)), deleted, chat_template=chat_template)
    special = special_ids(tokenizer) - unknown
    ends = [
        ids[: -NAMED - 1 : -1] if len(ids) == len(all_ids) else array("q")
        for all_ids, ids in zip(whole, ran, strict=True)
    ]
    pieces = [
        (piece, document, index == 0)
        for document, ids in enumerate(ran)
        for index, piece in enumerate(torch.split(torch.frombuffer(ids, dtype=torch.int64), limit))
    ]
    pieces.sort(key=lambda piece: -len(piece[0]))  # stable: equal lengths stay in document order
    return TokenSequences(
        ids=tuple(ids for ids, _, _ in pieces),
        documents=tuple(document for _, document, _ in pieces),
        starts_document=tuple(first for _, _, first in pieces),
        drop_first_token=calibration.drop_first_token,
        unknown=max(share, deleted),
        begins_with=_named(tokenizer, _common_run(ran, before, special)),
        ends_with=_named(tokenizer, _common_run(ends, after, special)[::-1]),
    )


def _document_ids(
    calibration: Calibration, document: int, tokenizer: Any, vocabulary: int, *, chat_template: bool
) -> _Ids:
    """Return the ids of one document, asked for twice. Raises CalibrationError where they cannot be measured with."""
    text = calibration.documents[document]
    where = f"document {document} of calibration {calibration.name!r}"
    who = f"the model's {'chat template or ' if chat_template else ''}tokenizer ({type(tokenizer).__name__})"
    check = f"Check the model's tokenizer files{', or measure without --chat-template' if chat_template else ''}."
    try:
        ids, again = (
            array("q", map(operator.index, encode(tokenizer, text, chat_template=chat_template))) for _ in range(2)
        )
    except Exception as error:  # any type: it comes of the model's files, or of code that is trusted
        raise CalibrationError(f"{who} fails on {where} ({brief(error)}). {check}") from error
    if ids != again:
        raise CalibrationError(f"{who} gives two answers for {where}, and figures must repeat. {check}")
    if not ids:
        raise CalibrationError(
            f"{who} gives no token for {where}, {text.strip()[:40]!r}. Leave the document out. {check}"
        )
    outside = min(ids) if min(ids) < 0 else max(ids)
    if not 0 <= outside < vocabulary:
        raise CalibrationError(
            f"the tokenizer gives id {outside} in {where}, but the model embeds only {vocabulary} ids: tokenizer and "
            f"weights do not belong together. Check the model directory's tokenizer files."
        )
    return ids


def _check_text(
    calibration: Calibration,
    ran: Sequence[_Ids],
    share: float,
    unknown: SpecialTokens,
    deleted: float,
    *,
    chat_template: bool,
) -> None:
    """Raise CalibrationError where the tokens that would run are mostly not those of the text.

    share: that of unknown tokens; `unknown` names them. deleted: the share of letters that the tokenizer deletes.
    """
    if deleted > UNKNOWN_REFUSED:
        raise CalibrationError(
            f"{deleted:.1%} of the letters and digits of calibration {calibration.name!r} are deleted by the model's "
            f"tokenizer before it cuts a text into tokens, so that most of what would run is not the text. Check the "
            f"`normalizer` and `pre_tokenizer` of its tokenizer.json."
        )
    if share > UNKNOWN_REFUSED:
        named = "".join(f" ({token}, id {number})" for token, number in unknown)
        raise CalibrationError(
            f"{share:.1%} of the tokens of calibration {calibration.name!r} are unknown to the model's tokenizer"
            f"{named}, so that most of what would run is not the text. Check its tokenizer files, or bring texts that "
            f"it knows: --calibration FILE."
        )
    if len(ran) > 1 and all(ids == ran[0] for ids in ran):
        why = "the chat template does not write their text" if chat_template else "its tokenizer does not tell them"
        raise CalibrationError(
            f"the {len(ran)} documents of calibration {calibration.name!r} run as the same {len(ran[0])} tokens: {why}."
            " Check the model's tokenizer files, or bring other texts: --calibration FILE."
        )


def _added(tokenizer: Any, text: str, ids: _Ids) -> tuple[int, int]:
    """Return how many special tokens the tokenizer adds before and after a text."""
    plain = array("q", encode(tokenizer, text, special_tokens=False))
    added = len(ids) - len(plain)
    before = next((start for start in range(added + 1) if ids[start : start + len(plain)] == plain), None)
    return (0, 0) if before is None else (before, added - before)


def _common_run(documents: Sequence[_Ids], added: int, special: frozenset[int]) -> list[int]:
    """Return the special tokens that all documents begin with; the tokenizer adds the first `added`."""
    run: list[int] = []
    for token, *others in zip(*documents, strict=False):
        is_special = len(run) < added or token in special
        if not is_special or len(run) == NAMED or any(other != token for other in others):
            break
        run.append(token)
    return run


def _named(tokenizer: Any, ids: Sequence[int]) -> SpecialTokens:
    return tuple((str(tokenizer.convert_ids_to_tokens(number)), number) for number in ids)
