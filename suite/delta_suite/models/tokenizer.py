"""A model's tokenizer: loading it so that it answers the same each time, and what it does to a text."""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from delta_suite.errors import UnavailableError, brief
from delta_suite.models.files import ModelFiles, is_tokenizer_file
from delta_suite.models.model_config import MOST, newer_transformers
from delta_suite.models.spec import ModelSpec
from delta_suite.models.undisturbed import errors_only
from delta_suite.reading import ARRAYS_LIMIT, UnreadableFileError, decode, parse_json, read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNLIMITED = int(1e30)
"""The `model_max_length` that transformers gives a tokenizer without one: only the calibration cuts texts."""

_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
"""Packages that read a SentencePiece model, and the module of each."""

_DATE = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}\n"
"""Put before a chat template that asks for the date, so that figures repeat from day to day; Llama's templates fall
back to this one. A block takes the line break behind it along, so that the template still begins a line."""


_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % len(str(MOST)))
"""Digits of a number that may be above MOST. Most files have none, and need not be parsed here as well."""


_REMOVING = (b'"Removed"', b'"CharDelimiterSplit"')
"""Marks of the splits that leave out what they match, in the form in which the tokenizers library saves them."""


def load_tokenizer(spec: ModelSpec, files: ModelFiles) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer; one in a GGUF file is rebuilt, which takes seconds.

    It samples nothing (dropout of merges and SentencePiece's sampling are for training), and cuts and pads nothing.

    Raises:
        UnavailableError: transformers cannot build it from the files, or a token's number is absurd.
    """
    from transformers import AutoTokenizer

    _check_numbers(spec, files)
    try:
        with errors_only(), _panics_as_errors():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                files.directory, gguf_file=files.gguf, local_files_only=True, trust_remote_code=spec.trust_remote_code
            )
        steady(tokenizer)
    except Exception as error:  # any type: it comes of the files, through transformers, tokenizers or trusted code
        why = _damaged(files) or brief(error)
        raise UnavailableError(
            spec.name, f"its tokenizer cannot be built from {files.directory} ({why})", _cure(files)
        ) from error
    return tokenizer


def _damaged(files: ModelFiles) -> str | None:
    """Return the first of the tokenizer's JSON files that is no JSON object, and why; None where all are."""
    for file in files.others:
        if not is_tokenizer_file(file.name) or file.suffix != ".json":
            continue
        try:
            content = parse_json(decode(read_bytes(file, ARRAYS_LIMIT), file), file)
        except UnreadableFileError as error:
            return f"{file.name}: {error.why}"
        if not isinstance(content, dict):
            return f"{file.name} is not a JSON object"
    return None


def _check_numbers(spec: ModelSpec, files: ModelFiles) -> None:
    """Refuse numbers of tokens that no vocabulary has.

    The tokenizers library makes a table as long as the largest; where memory does not hold it, the process ends.
    """
    for file in files.others:
        if not is_tokenizer_file(file.name) or file.suffix != ".json":
            continue
        try:
            content = read_bytes(file, ARRAYS_LIMIT)
            if not _LONG_NUMBER.search(content):
                continue
            numbers = [*_token_numbers(parse_json(decode(content, file), file))]
        except UnreadableFileError as error:
            raise UnavailableError(spec.name, str(error), _cure(files)) from None
        if max(numbers, default=0) > MOST:
            why = f"{file} numbers a token {max(numbers)}, and the most that a vocabulary may have is {MOST:,}"
            raise UnavailableError(spec.name, why, _cure(files))


def _token_numbers(content: Any) -> Iterator[int]:
    """Yield the numbers of the tokens in a tokenizer.json, or in a vocabulary that holds nothing else."""
    if not isinstance(content, dict):
        return
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else content
    if isinstance(vocabulary, dict) and all(type(number) is int for number in vocabulary.values()):
        yield from vocabulary.values()
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and type(token.get("id")) is int:
            yield token["id"]


def _cure(files: ModelFiles) -> str:
    if files.gguf is not None:
        return newer_transformers()
    absent = [package for package, module in _SENTENCEPIECE.items() if not _installed(module)]
    pieces = [file.name for file in files.others if file.suffix in {".model", ".spm"}]
    if absent and pieces and not any(file.name == "tokenizer.json" for file in files.others):
        return f"{pieces[0]} is read by packages that are not installed here: pip install {' '.join(absent)}."
    return "Save the one it was trained with there: tokenizer.save_pretrained(DIRECTORY)."


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that would hold it
        return False


def steady(tokenizer: Any) -> None:
    """Switch off what makes two answers for one text, and what a file may have saved of cutting and padding."""
    tokenizer.model_max_length = _UNLIMITED
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None) is not None:
            backend.model.dropout = None
    for part in vars(tokenizer).values():
        if getattr(part, "_enable_sampling", False):  # a SentencePieceProcessor
            part._enable_sampling = False


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Turn a panic of the tokenizers library, which is no Exception and would end the run, into a RuntimeError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(str(error)) from error


def has_chat_template(tokenizer: Any) -> bool:
    """Return True if the model brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode(tokenizer: Any, text: str, *, chat_template: bool = False, special_tokens: bool = True) -> Any:
    """Return the token ids of a text, as the tokenizer gives them: nothing is checked.

    chat_template: the text is one message of a user, in the model's own template, which also writes the special tokens.
        A template that asks for the date gets 26 July 2024.
    special_tokens: False leaves out those that the tokenizer adds to every text.
    """
    with _panics_as_errors():
        if not chat_template:
            return tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]
        template = tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            chat_template=_DATE + template if "strftime_now" in template else template,
            tokenize=True,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},
        )["input_ids"]


def unknown_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids that stand for text that the tokenizer does not know; none for those that work on bytes.

    The name `unk_token` does not tell: GPT-2 has one, and no text that gives it.
    """
    model = _model(tokenizer)
    if hasattr(model, "unk_token"):
        unknown = None if model.unk_token is None else model.token_to_id(model.unk_token)
    elif model is not None:  # Unigram, which shows the id nowhere else
        written = re.search(rb'"unk_id":(\d+)', model.__getstate__())
        unknown = None if written is None else int(written[1])
    else:
        unknown = getattr(tokenizer, "unk_token_id", None)
    return frozenset() if unknown is None else frozenset({unknown})


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the special tokens: those with a role, such as BOS, and those marked as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {number for number, token in added.items() if getattr(token, "special", False)}
    return frozenset(marked | set(getattr(tokenizer, "all_special_ids", ())))


def lost_share(tokenizer: Any, texts: Iterable[str]) -> float:
    """Return the share of letters and digits for which there is no token at all.

    Byte-pair encoding without an unknown token and without all bytes drops what it does not know.
    """
    from tokenizers import pre_tokenizers

    model = _model(tokenizer)
    drops = hasattr(model, "byte_fallback") and hasattr(model, "dropout") and not unknown_ids(tokenizer)
    if not drops or model.byte_fallback:
        return 0.0
    if all(model.token_to_id(letter) is not None for letter in pre_tokenizers.ByteLevel.alphabet()):
        return 0.0
    letters = lost = 0
    for text in texts:
        covered = bytearray(len(text))
        for first, last in tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets:
            covered[first:last] = b"\1" * (last - first)
        for character, kept in zip(text, covered, strict=True):
            letters += character.isalnum()
            lost += character.isalnum() and not kept
    return lost / max(letters, 1)


def deleted_share(tokenizer: Any, texts: Iterable[str]) -> float:
    """Return the share of letters and digits that are deleted before a text is cut into tokens.

    A normalizer may delete them, or a split that removes what it matches. 0 for tokenizers of Python, which show no
    such step. A text that is composed, decomposed or folded has as many letters as before.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normalizer, splitter = getattr(backend, "normalizer", None), getattr(backend, "pre_tokenizer", None)
    if splitter is not None and not any(mark in splitter.__getstate__() for mark in _REMOVING):
        splitter = None
    if normalizer is None and splitter is None:
        return 0.0
    letters = lost = 0
    with _panics_as_errors():
        for text in texts:
            seen = text if normalizer is None else normalizer.normalize_str(text)
            if splitter is not None:
                seen = " ".join(seen[first:last] for _, (first, last) in splitter.pre_tokenize_str(seen))
            there = _letters(text)
            letters += there
            lost += max(0, there - _letters(seen))
    return lost / max(letters, 1)


def _letters(text: str) -> int:
    """Return the number of letters and digits of a text, in the form in which equal ones are written alike."""
    return sum(map(str.isalnum, unicodedata.normalize("NFKC", text)))


def _model(tokenizer: Any) -> Any:
    return getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
