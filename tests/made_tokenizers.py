"""Small tokenizers of every kind, saved as a model's folder holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from delta_suite.models.files import ModelFiles
from delta_suite.models.spec import ModelSpec
from delta_suite.models.tokenizer import load_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = {"<s>": 0, "<unk>": 1, "alpha": 2, "beta": 3, "gamma": 4}

CHAT = "{{ bos_token }}{% for message in messages %}<|user|>{{ message.content }}<|eot|>{% endfor %}"
"""A chat template that begins with BOS, as many do."""


def words(unknown: str = "<unk>") -> Tokenizer:
    """Return a tokenizer of the words of WORDS."""
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def merged_letters(**options: Any) -> Tokenizer:
    """Return byte-pair encoding of a, b and their pairs, without any other letter."""
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "abab": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("ab", "ab")], **options))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def letters() -> Tokenizer:
    """Return a Unigram tokenizer of a and b."""
    return Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0)], unk_id=0))


def word_pieces() -> Tokenizer:
    """Return a WordPiece tokenizer of a and ab."""
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def every_byte() -> Tokenizer:
    """Return a tokenizer of one token a byte, with BOS before a text, EOS after it, and the tokens of CHAT."""
    special = ["<|end|>", "<s>", "<|user|>", "<|eot|>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(special)
    return around(tokenizer, "<s> $A <|end|>", [("<s>", 1), ("<|end|>", 0)])


def around(tokenizer: Tokenizer, template: str, special: list[tuple[str, int]]) -> Tokenizer:
    """Return the tokenizer with special tokens around each text."""
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


def saved(folder: Path, tokenizer: Tokenizer | dict[str, Any], **config: Any) -> Any:
    """Save a tokenizer, or the content of its tokenizer.json, in a folder, and load it as the suite does."""
    content = json.loads(tokenizer.to_str()) if isinstance(tokenizer, Tokenizer) else tokenizer
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return configured(folder, tokenizer_class="PreTrainedTokenizerFast", **config)


def configured(folder: Path, *, trusted: bool = False, **config: Any) -> Any:
    """Write a tokenizer_config.json, and load what the folder holds."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    spec = ModelSpec(name="x", path=folder, trust_remote_code=trusted)
    return load_tokenizer(spec, ModelFiles(folder, None, (), tuple(folder.iterdir())))
